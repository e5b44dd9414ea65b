// Converts runs of entries from any storage to float32, and back.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../storage/all.h"

namespace epi {
namespace {

template <typename Storage>
constexpr bool is_float32 = std::is_same_v<typename Storage::Memory, float>;

// Return `size` entries from the i-th on as float32: the memory itself if it is float32, else a copy in `buffer`.
template <typename Storage>
inline float* opened(const void* memory, int64_t i, int64_t size, float* __restrict buffer) {
    using Memory = typename Storage::Memory;
    const Memory* const first = static_cast<const Memory*>(memory) + i;
    if constexpr (is_float32<Storage>) {
        return const_cast<float*>(first);
    } else {
        const Memory* __restrict from = first;
        for (int64_t j = 0; j < size; ++j) buffer[j] = Storage::load(from[j]);
        return buffer;
    }
}

// Write `size` opened entries back to their tensor, unless they are in place.
template <typename Storage>
inline void closed(const float* __restrict values, void* memory, int64_t i, int64_t size) {
    if constexpr (!is_float32<Storage>) {
        auto* __restrict to = static_cast<typename Storage::Memory*>(memory) + i;
        for (int64_t j = 0; j < size; ++j) to[j] = Storage::store(values[j]);
    }
}

// `opened` for the storage with the number `dtype`.
inline float* as_float32(const void* memory, int32_t dtype, int64_t i, int64_t size, float* buffer) {
    return with_storage(dtype, [&](auto storage) { return opened<decltype(storage)>(memory, i, size, buffer); });
}

}  // namespace
}  // namespace epi
