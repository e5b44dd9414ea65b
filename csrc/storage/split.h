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

    uint32_t param;  // the lowest 16 bits count
    int32_t rest;    // the lowest 16 or 8

    // param: the bits of a bfloat16, rest: the rest, both in 32 bits.
    static inline float load(uint32_t param, int32_t rest) {
        const uint32_t weight = (param << 16) + (static_cast<uint32_t>(rest) << SHIFT);
        // a sum that is NaN has a rest that cannot belong to its parameter
        return float_of(selected((weight & ~SIGN) > INFINITE, param << 16, weight));
    }

    // up: what is added before the bits below the last one are cut off, from 0 to CUT. finite: the value is known to
    // be.
    template <bool finite>
    static inline Split store(float value, uint32_t up) {
        uint32_t bits = bits_of(value);
        const bool nan = !finite && (bits & ~SIGN) > INFINITE;
        const uint32_t truncated = (bits >> 16) | 0x40u;
        // infinity ends in zeros and keeps them
        if constexpr (SHIFT > 0) bits = (bits + up) & ~CUT;
        const uint32_t high = selected(nan, truncated, (bits + 0x8000u) >> 16);
        // what is taken from the high half has zeros in the low one
        return {high, static_cast<int32_t>(selected(nan, 0u, bits) >> SHIFT)};
    }

    static inline bool is_nan(uint32_t param) { return (param & 0x7fffu) > 0x7f80u; }
};

}  // namespace
}  // namespace epi
