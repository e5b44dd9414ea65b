// What the kernels share: entries in memory, one or four at a time, and the pieces. The work of a thread is in headers
// that a C++ compiler takes too, so that it can be tested on a machine without a GPU.
#pragma once

#include <cstdint>

#include "../adamw.h"
#include "../epi_cuda.h"

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
    // of an address from a table the compiler knows no space, and would ask for it at every access
    __builtin_assume(__isGlobal(entry));
#endif
    return reinterpret_cast<Pack<Memory, width>*>(entry);
}

template <int width, typename Memory>
EPI_INLINE Pack<Memory, width> load(int64_t address, int64_t i) {
    return *pack_at<width, Memory>(address, i);
}

// A run of entries of one tensor. From `quads_end` on they are taken one by one.
struct Piece {
    int64_t tensor, begin, quads_end, end;
};

EPI_INLINE int64_t tensor_of(int64_t piece) { return piece >> EPI_CUDA_PIECE_BITS; }

EPI_INLINE Piece piece_of(int64_t piece, int64_t entries, int64_t size, bool aligned) {
    const int64_t begin = (piece & ((int64_t{1} << EPI_CUDA_PIECE_BITS) - 1)) * entries;
    const int64_t end = size - begin < entries ? size : begin + entries;
    return {tensor_of(piece), begin, aligned ? begin + (end - begin) / QUAD * QUAD : begin, end};
}

}  // namespace epi::cuda
