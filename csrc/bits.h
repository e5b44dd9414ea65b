// The bits of a float32, and choices between them: the same on every machine, however it treats NaN and -0.0.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EPI_INLINE static __host__ __device__ inline
#else
#define EPI_INLINE static inline
#endif

namespace epi {

constexpr uint32_t SIGN = 0x80000000u;
constexpr uint32_t INFINITE = 0x7f800000u;  // the bits of +inf; above them are the NaNs

EPI_INLINE uint32_t bits_of(float value) {
    union {
        float value;
        uint32_t bits;
    } both = {value};
    return both.bits;
}

EPI_INLINE float float_of(uint32_t bits) {
    union {
        uint32_t bits;
        float value;
    } both = {bits};
    return both.value;
}

// A choice between bits, which changes neither a NaN nor -0.0. It uses masks rather than ?:, which compilers turn into
// a branch where one side is a constant; a loop with a branch stays scalar.
EPI_INLINE uint32_t selected(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = condition ? ~0u : 0u;
    return (yes & mask) | (no & ~mask);
}

EPI_INLINE float selected(bool condition, float yes, float no) {
    return float_of(selected(condition, bits_of(yes), bits_of(no)));
}

EPI_INLINE bool is_finite(float value) { return (bits_of(value) & INFINITE) != INFINITE; }

}  // namespace epi
