// Entries of any dtype as float32, and back.
#pragma once

#include <cstdint>

#include "../epi_native.h"
#include "../halves.h"

namespace epi {

static inline int64_t bytes_of(int32_t dtype) { return dtype == EPI_FLOAT32 ? 4 : 2; }

static inline const void* at(const void* memory, int32_t dtype, int64_t i) {
    return static_cast<const char*>(memory) + i * bytes_of(dtype);
}

static inline void* at(void* memory, int32_t dtype, int64_t i) {
    return static_cast<char*>(memory) + i * bytes_of(dtype);
}

// Return `size` entries as float32: the memory itself where it is, else converted into `buffer`.
static inline const float* as_float32(const void* memory, int32_t dtype, int64_t size, float* __restrict buffer) {
    if (dtype == EPI_FLOAT32) return static_cast<const float*>(memory);
    const uint16_t* __restrict halves = static_cast<const uint16_t*>(memory);
    if (dtype == EPI_BFLOAT16)
        for (int64_t i = 0; i < size; ++i) buffer[i] = from_bfloat16(halves[i]);
    else
        for (int64_t i = 0; i < size; ++i) buffer[i] = from_float16(halves[i]);
    return buffer;
}

// Round `size` values into memory of a 16-bit dtype.
static inline void store_halves(const float* __restrict values, int32_t dtype, int64_t size, void* memory) {
    uint16_t* __restrict halves = static_cast<uint16_t*>(memory);
    if (dtype == EPI_BFLOAT16)
        for (int64_t i = 0; i < size; ++i) halves[i] = to_bfloat16(values[i]);
    else
        for (int64_t i = 0; i < size; ++i) halves[i] = to_float16(values[i]);
}

}  // namespace epi
