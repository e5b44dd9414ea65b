// bfloat16 and float16 in memory: conversion to float32 and back in integer arithmetic, with the same bits on every
// machine, which vectorises without F16C. Rounds to nearest even, or stochastically with 16 bits of noise, as
// epi_kernels/storage/half.py defines it; converting to float32 and back keeps every bit, even of a signalling NaN.
#pragma once

#include <cstdint>

#include "../bits.h"

namespace epi {
namespace {

struct BFloat16 {
    using Memory = uint16_t;

    static inline float load(uint16_t half) { return float_of(uint32_t{half} << 16); }

    static inline uint16_t store(float value) {
        const uint32_t bits = bits_of(value);
        return kept(bits, nearest(bits));
    }

    static inline uint16_t store(float value, uint32_t noise) {
        const uint32_t bits = bits_of(value);
        // infinity has zeros where the noise is added, and no carry leaves them
        return kept(bits, (bits + noise) >> 16);
    }

    // The same for a value that is not NaN.
    static inline uint16_t store_number(float value) { return static_cast<uint16_t>(nearest(bits_of(value))); }

    static inline uint16_t store_number(float value, uint32_t noise) {
        return static_cast<uint16_t>((bits_of(value) + noise) >> 16);
    }

  private:
    static inline uint32_t nearest(uint32_t bits) { return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16; }

    static inline uint16_t kept(uint32_t bits, uint32_t rounded) {
        // a NaN is truncated; if its whole payload is cut off, one bit is set so that it stays a NaN
        const uint32_t cut = (bits >> 16) | ((bits & 0x007f0000u) == 0 ? 0x40u : 0u);
        return static_cast<uint16_t>((bits & ~SIGN) > INFINITE ? cut : rounded);
    }
};

struct Float16 {
    using Memory = uint16_t;

    static inline float load(uint16_t half) {
        const uint32_t sign = (half & 0x8000u) << 16;
        const uint32_t shifted = (half & 0x7fffu) << 13;  // exponent and mantissa in place, the exponent 112 too small
        const uint32_t exponent = shifted & 0x0f800000u;
        const uint32_t normal = shifted + (112u << 23);
        const uint32_t special = shifted + (224u << 23);  // infinity and NaN
        const uint32_t subnormal = bits_of(float_of(shifted + (113u << 23)) - float_of(113u << 23));
        const uint32_t value = exponent == 0 ? subnormal : exponent == 0x0f800000u ? special : normal;
        return float_of(value | sign);
    }

    static inline uint16_t store(float value) {
        const uint32_t bits = bits_of(value) & ~SIGN;
        const uint32_t sign = (bits_of(value) & SIGN) >> 16;
        const uint32_t normal = (bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
        // the last bit of a float32 near 0.5 is worth the last bit of a subnormal float16: the addition rounds to it
        const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
        const uint32_t payload = (bits >> 13) & 0x3ffu;
        const uint32_t nan = 0x7c00u | (payload == 0 ? 0x200u : payload);
        uint32_t half = selected(bits < 0x38800000u, subnormal, normal);  // 2^-14
        half = selected(bits >= 0x47800000u, 0x7c00u, half);  // from 65536 on: infinity; rounding may also reach it
        half = selected(bits > INFINITE, nan, half);
        return static_cast<uint16_t>(half | sign);
    }

    static inline uint16_t store(float value, uint32_t noise) {
        const uint32_t bits = bits_of(value);
        const uint32_t magnitude = bits & ~SIGN;
        const uint32_t up = noise >> 3;  // as many bits as are dropped
        const uint32_t rounded = selected(magnitude < INFINITE, (bits + up) & ~0x1fffu, bits);
        // below 2^-14 a unit of float16 is 2^-24, whatever the exponent, and the number of units is the half
        const bool small = magnitude < 0x38800000u;
        const float units = float_of(selected(small, magnitude, 0u)) * 0x1p24f;
        const auto below = static_cast<int32_t>(units);
        const float part = (units - static_cast<float>(below)) * 8192.0f;
        const int32_t half = below + (part > static_cast<float>(static_cast<int32_t>(up)) ? 1 : 0);
        const uint32_t subnormal = static_cast<uint32_t>(half) | ((bits & SIGN) >> 16);
        return static_cast<uint16_t>(selected(small, subnormal, uint32_t{store(float_of(rounded))}));
    }

    static inline uint16_t store_number(float value) { return store(value); }

    static inline uint16_t store_number(float value, uint32_t noise) { return store(value, noise); }
};

}  // namespace
}  // namespace epi
