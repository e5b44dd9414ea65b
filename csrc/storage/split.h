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

    uint32_t param;
    int32_t rest;

    // param: the bits of a bfloat16, rest: the rest, both in 32 bits.
    static inline float load(uint32_t param, int32_t rest) {
        const uint32_t low = static_cast<uint32_t>(rest) << SHIFT;
        const uint32_t magnitude = param & 0x7fffu;
        // of a parameter of 0 or infinity only a rest that leads away from 0, or towards it, can be a rest
        const int32_t limit = magnitude == 0 ? rest : -rest;
        const bool edge = (magnitude == 0) | (magnitude == 0x7f80u);
        return float_of((param << 16) + selected(edge & (limit < 0), 0u, low));
    }

    // up: what is added before the bits below the last one are cut off, from 0 to CUT. finite: the value is known to
    // be.
    template <bool finite>
    static inline Split store(float value, uint32_t up) {
        uint32_t bits = bits_of(value);
        const uint32_t magnitude = bits & ~SIGN;
        if constexpr (SHIFT > 0) bits = (bits + (finite ? up : selected(magnitude < INFINITE, up, 0u))) & ~CUT;
        const uint32_t high = (bits + 0x8000u) >> 16;
        const uint32_t low = bits - (high << 16);
        if constexpr (finite) return {high, static_cast<int32_t>(low) >> SHIFT};
        const bool nan = magnitude > INFINITE;
        return {selected(nan, (bits >> 16) | 0x40u, high), static_cast<int32_t>(selected(nan, 0u, low)) >> SHIFT};
    }

    static inline bool is_nan(uint32_t param) { return (param & 0x7fffu) > 0x7f80u; }
};

}  // namespace
}  // namespace epi
