// A float32 weight in two tensors, a bfloat16 parameter and the rest in 16 or 8 bits. Definition:
// epi_kernels/storage/split.py.
#pragma once

#include <cstdint>

#include "../bits.h"

namespace epi {
namespace {

// Rest: int16_t or int8_t.
template <typename Rest>
struct Split {
    static constexpr int SHIFT = sizeof(Rest) == 2 ? 0 : 8;
    static constexpr uint32_t CUT = (1u << SHIFT) - 1;  // the bits below the last one of a weight

    uint16_t param;
    Rest rest;

    static inline float load(uint16_t param, Rest rest) {
        const uint32_t low = static_cast<uint32_t>(static_cast<int32_t>(rest)) << SHIFT;
        const uint32_t magnitude = param & 0x7fffu;
        const bool foreign = ((magnitude == 0) & (rest < 0)) | ((magnitude == 0x7f80u) & (rest > 0));
        return float_of((uint32_t{param} << 16) + (foreign ? 0u : low));
    }

    // up: what is added before the bits below the last one are cut off, from 0 to CUT.
    static inline Split store(float value, uint32_t up) {
        uint32_t bits = bits_of(value);
        const uint32_t magnitude = bits & ~SIGN;
        if constexpr (SHIFT) bits = (bits + (magnitude < INFINITE ? up : 0u)) & ~CUT;
        const uint32_t high = (bits + 0x8000u) >> 16;
        const auto low = static_cast<int32_t>(bits - (high << 16)) >> SHIFT;
        const bool nan = magnitude > INFINITE;
        return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : high), static_cast<Rest>(nan ? 0 : low)};
    }

    static inline bool is_nan(uint16_t param) { return (param & 0x7fffu) > 0x7f80u; }
};

}  // namespace
}  // namespace epi
