// The work of one thread in a histogram of the scores' bits. Contract: epi_kernels.ops.score_histogram.
#pragma once

#include "entries.h"

namespace epi::cuda {

// A block clears and adds up to 4096 bins; its 16384 entries are four times as many values to read.
constexpr int64_t HISTOGRAM_CHUNK = 16384;

constexpr int32_t LARGEST_DIGIT = 12;

struct Digit {
    uint32_t prefix;
    int32_t shift;
    int32_t bits;
};

struct ScoreRange {
    bool normalized;
    float low, high;
};

// Pass the bin of every score except zero scores to `add`; return how many scores are 0. In an untouched or a constant
// layer all scores are 0, and each would wait for the one before at the same address.
template <int width, typename Add>
EPI_INLINE uint32_t count(const epi_score_row& row, const ScoreRange& range, const Digit& digit, int64_t i,
                          const Add& add) {
    const auto importance = load<width, float>(row.importance, i);
    uint32_t zeros = 0;
    for (int j = 0; j < width; ++j) {
        const float value = importance.entries[j];
        const uint32_t key = bits_of(range.normalized ? score(value, range.low, range.high) : raw_score(value));
        const uint32_t digits = key >> digit.shift;
        if (key == 0)
            ++zeros;
        else if (digits >> digit.bits == digit.prefix)
            add(digits & ((1u << digit.bits) - 1));
    }
    return zeros;
}

// Return how many zero scores of this thread belong in bin 0.
template <typename Add>
EPI_INLINE uint32_t histogram(const epi_score_row& row, const Chunk& chunk, const ScoreRange& range, const Digit& digit,
                              int32_t thread, int32_t threads, const Add& add) {
    uint32_t zeros = 0;
    for (int64_t i = chunk.begin + thread * QUAD; i < chunk.quads_end; i += threads * QUAD)
        zeros += count<QUAD>(row, range, digit, i, add);
    for (int64_t i = chunk.quads_end + thread; i < chunk.end; i += threads)
        zeros += count<1>(row, range, digit, i, add);
    return digit.prefix == 0 ? zeros : 0;
}

EPI_INLINE ScoreRange range_of(const epi_score_row& row, const float* ranges) {
    if (!ranges) return {false, 0.0f, 0.0f};
    return {true, ranges[2 * row.layer], ranges[2 * row.layer + 1]};
}

EPI_INLINE Digit digit_of(const epi_score_row& row, const int64_t* selection, int32_t shift, int32_t digit_bits) {
    return {static_cast<uint32_t>(selection[2 * row.budget]), shift, digit_bits};
}

}  // namespace epi::cuda
