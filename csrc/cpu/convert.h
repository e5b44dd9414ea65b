// Opens runs of entries: converts them from any storage to float32. And closes them: converts them back. The storage of
// a tensor is chosen at run time, once for a run.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../storage/all.h"
#include "runs.h"

namespace epi {
namespace {

template <typename Storage>
constexpr bool is_float32 = std::is_same_v<typename Storage::Memory, float>;

// A tensor in some storage.
struct Stored {
    void* memory;
    float* scales;  // of a tensor in blocks of 8 bits
    int32_t dtype;

    template <typename Memory>
    Memory* at(int64_t i) const {
        return static_cast<Memory*>(memory) + i;
    }
};

// Noise and rounding of one tensor in a run.
struct Rounding {
    const uint32_t* mixed;  // the mixed offset of each entry; NULL: to nearest
    int slot;               // whose noise it is
    bool positive;          // no value but 0 becomes 0
};

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

// `opened` for the storage with the number `dtype`, which has no blocks.
inline float* as_float32(const void* memory, int32_t dtype, int64_t i, int64_t size, float* buffer) {
    return with_storage(dtype, [&](auto storage) { return opened<decltype(storage)>(memory, i, size, buffer); });
}

// Write `size` opened entries to their places, rounded to nearest, or stochastically if there are mixed offsets.
template <typename Storage>
inline void closed(const float* __restrict values, typename Storage::Memory* __restrict to, int64_t size,
                   const uint32_t* __restrict mixed, int slot) {
    if (mixed) {
        const NoiseOf noise(slot);
        for (int64_t j = 0; j < size; ++j) to[j] = Storage::store(values[j], noise(mixed[j]));
    } else {
        for (int64_t j = 0; j < size; ++j) to[j] = Storage::store(values[j]);
    }
}

// Blocks --------------------------------------------------------------------------------------------------------------

constexpr int64_t BLOCK = Block8::BLOCK;

// Call visit(first entry in the run, entries, number of the block in the run) for each block. The number of entries is
// a constant where the block is not short: loops over it have no rest.
template <typename Visit>
inline void for_each_block(const Blocks& blocks, const Run& run, const Visit& visit) {
    using Whole = std::integral_constant<int64_t, BLOCK>;
    if (blocks.row == 0) {
        for (int64_t block = 0; block * BLOCK < run.size; ++block) visit(block * BLOCK, Whole(), block);
        return;
    }
    int64_t left = blocks.row - run.block % blocks.of_row * BLOCK;  // entries up to the row's end
    for (int64_t at = 0, block = 0; at < run.size; ++block) {
        if (left >= BLOCK)
            visit(at, Whole(), block);
        else
            visit(at, left, block);
        at += left < BLOCK ? left : BLOCK;
        left = left > BLOCK ? left - BLOCK : blocks.row;
    }
}

inline void open_blocks(const uint8_t* codes, const float* scales, const Blocks& blocks, const Run& run,
                        float* buffer) {
    for_each_block(blocks, run, [=](int64_t at, auto size, int64_t block) {
        const uint8_t* __restrict from = codes + at;
        float* __restrict to = buffer + at;
        const float scale = scales[block];
        for (int64_t j = 0; j < size; ++j) to[j] = Block8::load(from[j], scale);
    });
}

template <bool positive>
inline void close_blocks(const float* values, uint8_t* codes, float* scales, const Blocks& blocks, const Run& run,
                         const uint32_t* mixed, const NoiseOf noise) {
    float inverses[RUN / BLOCK];
    for_each_block(blocks, run, [=, &inverses](int64_t at, auto size, int64_t block) {
        const float* __restrict from = values + at;
        int32_t largest = 0;
        for (int64_t j = 0; j < size; ++j) {
            const int32_t bits = Block8::finite_bits(from[j]);
            largest = bits > largest ? bits : largest;
        }
        scales[block] = Block8::scale_of(largest);
        inverses[block] = Block8::inverse_of(scales[block]);
    });
    for_each_block(blocks, run, [=, &inverses](int64_t at, auto size, int64_t block) {
        const float* __restrict from = values + at;
        const uint32_t* __restrict own = mixed + at;
        uint8_t* __restrict to = codes + at;
        const float inverse = inverses[block];
        for (int64_t j = 0; j < size; ++j) to[j] = Block8::store<positive>(from[j], inverse, noise(own[j]));
    });
}

// Slots and importances -----------------------------------------------------------------------------------------------

// Return the entries of a run as float32, with their sign bits: the memory itself if it is float32, else a copy in
// `buffer`.
inline float* opened(const Stored& tensor, const Blocks& blocks, const Run& run, float* buffer) {
    if (tensor.dtype == EPI_BLOCK8) {
        open_blocks(tensor.at<const uint8_t>(run.begin), tensor.scales + run.block, blocks, run, buffer);
        return buffer;
    }
    return as_float32(tensor.memory, tensor.dtype, run.begin, run.size, buffer);
}

// Write the opened entries of a run back to their tensor, unless they are in place.
inline void closed(const float* values, const Stored& tensor, const Blocks& blocks, const Run& run,
                   const Rounding& rounding) {
    if (tensor.dtype == EPI_BFLOAT16)
        closed<BFloat16>(values, tensor.at<uint16_t>(run.begin), run.size, rounding.mixed, rounding.slot);
    if (tensor.dtype == EPI_BLOCK8) {
        uint8_t* const codes = tensor.at<uint8_t>(run.begin);
        float* const scales = tensor.scales + run.block;
        const NoiseOf noise(rounding.slot);
        if (rounding.positive)
            close_blocks<true>(values, codes, scales, blocks, run, rounding.mixed, noise);
        else
            close_blocks<false>(values, codes, scales, blocks, run, rounding.mixed, noise);
    }
}

// Weights in two tensors ----------------------------------------------------------------------------------------------

template <typename Rest>
inline void join(const uint16_t* __restrict params, const Rest* __restrict rests, int64_t size,
                 float* __restrict buffer) {
    for (int64_t j = 0; j < size; ++j) buffer[j] = Split<Rest>::load(params[j], rests[j]);
}

// Split weights into parameters and rests. Both stay as they are where `locks` has a sign bit, or where weight and
// parameter are NaN. `mixed` is NULL to round to nearest.
template <typename Rest>
inline void split(const float* __restrict values, uint16_t* __restrict params, Rest* __restrict rests, int64_t size,
                  const float* __restrict locks, const uint32_t* __restrict mixed) {
    const NoiseOf noise(NOISE_PARAM);
    const auto store = [=](int64_t j, uint32_t up) {
        const uint16_t param = params[j];
        const Rest rest = rests[j];
        const Split<Rest> now = Split<Rest>::store(values[j], up);
        const uint32_t nan = (bits_of(values[j]) & ~SIGN) > INFINITE ? 1u : 0u;
        const uint32_t was = Split<Rest>::is_nan(param) ? 1u : 0u;
        const bool kept = ((nan & was) | (bits_of(locks[j]) >> 31)) != 0;
        params[j] = kept ? param : now.param;
        rests[j] = kept ? rest : now.rest;
    };
    if (mixed)
        for (int64_t j = 0; j < size; ++j) store(j, noise(mixed[j]) >> 8);
    else
        for (int64_t j = 0; j < size; ++j) store(j, 0x80u);
}

}  // namespace
}  // namespace epi
