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

// Groups --------------------------------------------------------------------------------------------------------------
//
// Conversions to 8 or 16 bits work on groups of entries in buffers of 32 bits: a loop that also narrows its results
// needs more registers than there are. A group without NaN and infinity, which is nearly every one, takes fewer steps.

constexpr int64_t GROUP = Block8::BLOCK;

// Call visit(first entry, entries) for each group. The number of entries is a constant where the group is whole: loops
// over it have no rest.
template <typename Visit>
inline void for_each_group(int64_t size, const Visit& visit) {
    int64_t at = 0;
    for (; at + GROUP <= size; at += GROUP) visit(at, std::integral_constant<int64_t, GROUP>());
    if (at < size) visit(at, size - at);
}

template <typename From, typename To>
inline void copy(const From* __restrict from, To* __restrict to, int64_t size) {
    for (int64_t j = 0; j < size; ++j) to[j] = static_cast<To>(from[j]);
}

// The bits of the largest magnitude, NaN above infinity: the order of the bits is that of the values.
inline uint32_t largest_bits(const float* __restrict values, int64_t size) {
    int32_t largest = 0;
    for (int64_t j = 0; j < size; ++j) {
        const auto bits = static_cast<int32_t>(bits_of(values[j]) & ~SIGN);
        largest = bits > largest ? bits : largest;
    }
    return static_cast<uint32_t>(largest);
}

// The same without NaN and infinity.
inline uint32_t largest_finite_bits(const float* __restrict values, int64_t size) {
    int32_t largest = 0;
    for (int64_t j = 0; j < size; ++j) {
        const auto bits = static_cast<int32_t>(bits_of(values[j]) & ~SIGN);
        const int32_t finite = bits < static_cast<int32_t>(INFINITE) ? bits : 0;
        largest = finite > largest ? finite : largest;
    }
    return static_cast<uint32_t>(largest);
}

// Write `size` opened entries to their places, rounded to nearest, or stochastically if there are mixed offsets.
template <typename Storage>
inline void closed(const float* values, typename Storage::Memory* memory, int64_t size, const uint32_t* mixed,
                   int slot) {
    const NoiseOf noise(slot);
    for_each_group(size, [=](int64_t at, auto count) {
        const float* __restrict from = values + at;
        auto* __restrict to = memory + at;
        const bool numbers = largest_bits(from, count) <= INFINITE;
        if (mixed) {
            const uint32_t* __restrict own = mixed + at;
            if (numbers)
                for (int64_t j = 0; j < count; ++j) to[j] = Storage::store_number(from[j], noise(own[j]));
            else
                for (int64_t j = 0; j < count; ++j) to[j] = Storage::store(from[j], noise(own[j]));
        } else if (numbers) {
            for (int64_t j = 0; j < count; ++j) to[j] = Storage::store_number(from[j]);
        } else {
            for (int64_t j = 0; j < count; ++j) to[j] = Storage::store(from[j]);
        }
    });
}

// Blocks --------------------------------------------------------------------------------------------------------------

// Call visit(first entry in the run, entries, number of the block in the run) for each block, as `for_each_group`.
template <typename Visit>
inline void for_each_block(const Blocks& blocks, const Run& run, const Visit& visit) {
    if (blocks.row == 0) {
        for_each_group(run.size, [&](int64_t at, auto count) { visit(at, count, at / GROUP); });
        return;
    }
    int64_t left = blocks.row - run.block % blocks.of_row * GROUP;  // entries up to the row's end
    for (int64_t at = 0, block = 0; at < run.size; ++block) {
        if (left >= GROUP)
            visit(at, std::integral_constant<int64_t, GROUP>(), block);
        else
            visit(at, left, block);
        at += left < GROUP ? left : GROUP;
        left = left > GROUP ? left - GROUP : blocks.row;
    }
}

inline void open_blocks(const uint8_t* codes, const float* scales, const Blocks& blocks, const Run& run,
                        float* buffer) {
    for_each_block(blocks, run, [=](int64_t at, auto size, int64_t block) {
        alignas(64) uint32_t wide[GROUP];
        copy(codes + at, wide, size);
        float* __restrict to = buffer + at;
        const float scale = scales[block];
        for (int64_t j = 0; j < size; ++j) to[j] = Block8::load(wide[j], scale);
    });
}

template <bool positive>
inline void close_blocks(const float* values, uint8_t* codes, float* scales, const Blocks& blocks, const Run& run,
                         const uint32_t* mixed, const NoiseOf noise) {
    constexpr int64_t MOST = RUN / GROUP;
    bool finite[MOST] = {};
    float largest[MOST] = {}, of_blocks[MOST], inverses[MOST];
    for_each_block(blocks, run, [&, values](int64_t at, auto size, int64_t block) {
        const uint32_t bits = largest_bits(values + at, size);
        finite[block] = bits < INFINITE;
        largest[block] = float_of(finite[block] ? bits : largest_finite_bits(values + at, size));
    });
    for (int64_t block = 0; block < MOST; ++block) {
        of_blocks[block] = Block8::scale_of(largest[block]);
        inverses[block] = Block8::inverse_of(of_blocks[block]);
    }
    for_each_block(blocks, run, [&, values, mixed, noise](int64_t at, auto size, int64_t block) {
        alignas(64) uint32_t wide[GROUP];
        const float* __restrict from = values + at;
        const uint32_t* __restrict own = mixed + at;
        const float inverse = inverses[block];
        scales[block] = of_blocks[block];
        if (finite[block])
            for (int64_t j = 0; j < size; ++j) wide[j] = Block8::store<positive, true>(from[j], inverse, noise(own[j]));
        else
            for (int64_t j = 0; j < size; ++j)
                wide[j] = Block8::store<positive, false>(from[j], inverse, noise(own[j]));
        copy(wide, codes + at, size);
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
inline void join(const uint16_t* params, const Rest* rests, int64_t size, float* buffer) {
    for_each_group(size, [=](int64_t at, auto count) {
        alignas(64) uint32_t high[GROUP];
        alignas(64) int32_t low[GROUP];
        copy(params + at, high, count);
        copy(rests + at, low, count);
        float* __restrict to = buffer + at;
        for (int64_t j = 0; j < count; ++j) to[j] = Split<Rest>::load(high[j], low[j]);
    });
}

// Whether no value is 0, infinity or NaN.
inline bool all_ordinary(const float* __restrict values, int64_t size) {
    uint32_t largest = 0;  // of the magnitudes less one: that of 0 is beyond all others
    for (int64_t j = 0; j < size; ++j) {
        const uint32_t bits = (bits_of(values[j]) & ~SIGN) - 1;
        largest = bits > largest ? bits : largest;
    }
    return largest < INFINITE - 1;
}

// Split weights into parameters and rests. Both stay as they are where `locks` has a sign bit, or where weight and
// parameter are NaN. `mixed` is NULL to round to nearest.
//
// The weight of a locked entry is what its parameter and rest were joined to, and splits into them again. So locks
// matter only where a rest did not count: where the weight is 0 or infinite.
template <typename Rest>
inline void split(const float* values, uint16_t* params, Rest* rests, int64_t size, const float* locks,
                  const uint32_t* mixed) {
    const NoiseOf noise(NOISE_PARAM);
    for_each_group(size, [=](int64_t at, auto count) {
        alignas(64) uint32_t high[GROUP];
        alignas(64) int32_t low[GROUP];
        alignas(64) uint32_t up[GROUP];
        const float* __restrict from = values + at;
        const float* __restrict own = locks + at;
        if (mixed)
            for (int64_t j = 0; j < count; ++j) up[j] = noise(mixed[at + j]) >> 8;
        else
            for (int64_t j = 0; j < count; ++j) up[j] = 0x80u;
        if (all_ordinary(from, count)) {
            for (int64_t j = 0; j < count; ++j) {
                const auto now = Split<Rest>::template store<true>(from[j], up[j]);
                high[j] = now.param;
                low[j] = now.rest;
            }
        } else {
            copy(params + at, high, count);
            copy(rests + at, low, count);
            for (int64_t j = 0; j < count; ++j) {
                const auto now = Split<Rest>::template store<false>(from[j], up[j]);
                const bool nan = (bits_of(from[j]) & ~SIGN) > INFINITE;
                const bool kept = ((bits_of(own[j]) & SIGN) != 0) | (nan & Split<Rest>::is_nan(high[j]));
                high[j] = selected(kept, high[j], now.param);
                const auto rest = static_cast<uint32_t>(low[j]);
                low[j] = static_cast<int32_t>(selected(kept, rest, static_cast<uint32_t>(now.rest)));
            }
        }
        copy(high, params + at, count);
        copy(low, rests + at, count);
    });
}

}  // namespace
}  // namespace epi
