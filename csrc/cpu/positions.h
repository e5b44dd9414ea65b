// Values at positions of a tensor. They are moved and not computed with, so one SIMD level is enough, and of a dtype
// only its size matters.
#pragma once

#include <cstdint>

#include "../schema.h"
#include "parallel.h"

namespace epi {
namespace {

// Each position is in another cache line. A line is asked for this many positions ahead, and only into the second-level
// cache, which can wait for more lines at once than the first: with 1% of 2^22 float32 entries that takes 5 ns for each
// position, without any prefetch or with one into the first level 10 (one core of an EPYC, Zen 4). From 64 to 512
// positions ahead the time is the same.
constexpr int64_t AHEAD = 128;

template <typename Entry, typename Move>
void move_entries(const epi_positions_tensor& tensor, int64_t begin, int64_t end, Move move) {
    auto* const entries = static_cast<Entry*>(tensor.memory);
    auto* const values = static_cast<Entry*>(tensor.values);
    const int64_t* const positions = tensor.positions;
    int64_t i = begin;
    for (; i + AHEAD < end; ++i) {
        __builtin_prefetch(entries + positions[i + AHEAD], 0, 2);
        move(entries[positions[i]], values[i]);
    }
    for (; i < end; ++i) move(entries[positions[i]], values[i]);
}

template <typename Move>
void move_chunk(const epi_positions_tensor& tensor, int64_t begin, int64_t end, Move move) {
    switch (tensor.entry_bytes) {
        case 1:
            return move_entries<uint8_t>(tensor, begin, end, move);
        case 2:
            return move_entries<uint16_t>(tensor, begin, end, move);
        case 4:
            return move_entries<uint32_t>(tensor, begin, end, move);
        case 8:
            return move_entries<uint64_t>(tensor, begin, end, move);
    }
}

// Call move(entry, value) for all positions of all tensors whose positions are inside.
template <typename Move>
void at_positions(epi_positions_tensor* tensors, int64_t count, int32_t threads, Move move) {
    for (int64_t i = 0; i < count; ++i) {
        epi_positions_tensor& tensor = tensors[i];
        const int64_t last = tensor.size - 1;
        tensor.outside = last >= 0 && (tensor.positions[0] < 0 || tensor.positions[last] >= tensor.entries);
    }
    Chunks all(tensors, count);
    run(all, threads, [&](Chunks& chunks) {
        for (Chunk chunk; chunks.take(&chunk);) {
            const epi_positions_tensor& tensor = tensors[chunk.tensor];
            if (!tensor.outside) move_chunk(tensor, chunk.begin, chunk.end, move);
        }
    });
}

}  // namespace
}  // namespace epi
