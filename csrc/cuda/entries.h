// What the kernels share: access to entries in memory, one or four at a time, and chunks. The work of a thread is in
// headers that a C++ compiler takes too, so that it can be tested on a machine without a GPU.
#pragma once

#include <cstdint>

#include "../epi_cuda.h"
#include "../importance.h"

namespace epi::cuda {

// entries that a thread takes at once: 128 bits
constexpr int64_t QUAD = 4;

template <typename Memory, int width>
struct alignas(width * sizeof(Memory)) Pack {
    Memory entries[width];
};

template <int width, typename Memory>
EPI_INLINE Pack<Memory, width>* pack_at(int64_t address, int64_t i) {
    Memory* const entry = reinterpret_cast<Memory*>(address) + i;
#if defined(__CUDA_ARCH__)
    // the compiler does not know the address space of an address from a table, and would test it at every access
    __builtin_assume(__isGlobal(entry));
#endif
    return reinterpret_cast<Pack<Memory, width>*>(entry);
}

template <int width, typename Memory>
EPI_INLINE Pack<Memory, width> load(int64_t address, int64_t i) {
    return *pack_at<width, Memory>(address, i);
}

// A run of entries of one tensor. From `quads_end` on they are taken one by one.
struct Chunk {
    int64_t tensor, begin, quads_end, end;
};

EPI_INLINE int64_t tensor_of(int64_t chunk) { return chunk >> EPI_CHUNK_BITS; }

EPI_INLINE Chunk chunk_of(int64_t chunk, int64_t entries, int64_t size, bool aligned) {
    const int64_t begin = (chunk & ((int64_t{1} << EPI_CHUNK_BITS) - 1)) * entries;
    const int64_t end = size - begin < entries ? size : begin + entries;
    return {tensor_of(chunk), begin, aligned ? begin + (end - begin) / QUAD * QUAD : begin, end};
}

}  // namespace epi::cuda
