// Histograms of the scores' bits, and the locks that a threshold decides. Contract:
// epi_kernels.ops.score_histogram and lock_.
//
// A score never decreases as S grows: rounding a difference and a quotient once each keeps the order. So "the score is
// at least x" means "S is at least some bound for this tensor", and all passes but the first compare the bits of S
// without a division.
#include "../importance.h"
#include "convert.h"
#include "kernels.h"

namespace epi::EPI_LEVEL {
namespace {

float score_of(const epi_score_tensor& tensor, float importance) {
    return tensor.normalized ? score(importance, tensor.low, tensor.high) : raw_score(importance);
}

// Computing scores vectorises, counting them does not: they are computed a run at a time.
void scores_of(const epi_score_tensor& tensor, const float* __restrict importance, int64_t size,
               float* __restrict scores) {
    const float low = tensor.low;
    const float high = tensor.high;
    if (tensor.normalized)
        for (int64_t i = 0; i < size; ++i) scores[i] = score(importance[i], low, high);
    else
        for (int64_t i = 0; i < size; ++i) scores[i] = raw_score(importance[i]);
}

// The bits of the smallest finite S whose score is at least `bound`, which is above 0; INFINITE if there is no such S.
uint32_t first_reaching(const epi_score_tensor& tensor, float bound) {
    uint32_t first = 0;
    uint32_t end = INFINITE;
    while (first < end) {
        const uint32_t middle = first + (end - first) / 2;
        if (score_of(tensor, float_of(middle)) >= bound)
            end = middle;
        else
            first = middle + 1;
    }
    return first;
}

// Count the digits of the scores for which the bits of S lie in [first, first + width).
void count(const epi_score_tensor& tensor, const float* importance, int64_t size, uint32_t first, uint32_t width,
           int32_t shift, uint32_t mask, uint32_t* histogram) {
    for (int64_t i = 0; i < size; ++i)
        if ((bits_of(importance[i]) & ~SIGN) - first < width)
            ++histogram[(bits_of(score_of(tensor, importance[i])) >> shift) & mask];
}

Stored stored(const epi_score_tensor& tensor) {
    return {tensor.importance, const_cast<float*>(tensor.scales), tensor.importance_dtype};
}

// Lock the entries of a run for which the bits of S lie in [first, INFINITE), and release the others: write the top
// bits in memory alone. `importance`: the opened entries, which a float32 tensor holds in `memory` itself.
template <typename Memory>
LockCounts lock_run(Memory* __restrict memory, const float* __restrict importance, int64_t size, uint32_t first) {
    constexpr int TOP = 8 * sizeof(Memory) - 1;
    int32_t locked = 0, newly_locked = 0, released = 0;
    for (int64_t i = 0; i < size; ++i) {
        const Memory entry = memory[i];
        const auto rest = static_cast<Memory>(entry & ~(Memory{1} << TOP));
        uint32_t bits = rest;
        if constexpr (sizeof(Memory) < sizeof(float)) bits = bits_of(importance[i]) & ~SIGN;
        const uint32_t before = entry >> TOP;
        const uint32_t after = (bits >= first) & (bits < INFINITE) ? 1u : 0u;
        memory[i] = static_cast<Memory>(rest | (after << TOP));
        locked += static_cast<int32_t>(after);
        newly_locked += static_cast<int32_t>(after & ~before);
        released += static_cast<int32_t>(before & ~after);
    }
    return {locked, newly_locked, released};
}

}  // namespace

void score_histogram(const epi_score_tensor& tensor, int64_t begin, int64_t end, int64_t prefix, int32_t shift,
                     int32_t digit_bits, uint32_t* histogram) {
    const uint32_t mask = (1u << digit_bits) - 1;
    const Blocks blocks = blocks_of(tensor);
    alignas(64) float buffer[RUN];
    Runs runs(blocks, begin, end, RUN);
    if (prefix == 0) {  // all scores for the highest digit; for lower digits, those of 0 or almost 0
        alignas(64) float scores[RUN];
        for (Run run; runs.take(&run);) {
            scores_of(tensor, opened(stored(tensor), blocks, run, buffer), run.size, scores);
            for (int64_t j = 0; j < run.size; ++j) {
                const uint32_t digits = bits_of(scores[j]) >> shift;
                if (digits <= mask) ++histogram[digits];
            }
        }
        return;
    }
    const int32_t prefix_shift = shift + digit_bits;
    const uint32_t first = first_reaching(tensor, float_of(static_cast<uint32_t>(prefix) << prefix_shift));
    const uint32_t last = first_reaching(tensor, float_of(static_cast<uint32_t>(prefix + 1) << prefix_shift));
    const uint32_t width = last - first;
    // most groups hold no such entry, which is found without a branch for each entry
    for (Run run; runs.take(&run);) {
        const float* __restrict importance = opened(stored(tensor), blocks, run, buffer);
        int64_t i = 0;
        for (; i + GROUP <= run.size; i += GROUP) {
            uint32_t found = 0;
            for (int64_t j = i; j < i + GROUP; ++j) found |= (bits_of(importance[j]) & ~SIGN) - first < width;
            if (found) count(tensor, importance + i, GROUP, first, width, shift, mask, histogram);
        }
        count(tensor, importance + i, run.size - i, first, width, shift, mask, histogram);
    }
}

LockCounts lock(const epi_score_tensor& tensor, int64_t begin, int64_t end, float threshold) {
    // a score of 0 is never locked, and no score is subnormal; no score reaches NaN
    const float smallest = float_of(SMALLEST_NORMAL);
    const uint32_t first = first_reaching(tensor, threshold < smallest ? smallest : threshold);
    const Blocks blocks = blocks_of(tensor);
    const Stored at = stored(tensor);
    alignas(64) float buffer[RUN];
    LockCounts counts = {0, 0, 0};
    Runs runs(blocks, begin, end, RUN);
    for (Run run; runs.take(&run);) {
        LockCounts found;
        if (at.dtype == EPI_FLOAT32) {
            found = lock_run(at.at<uint32_t>(run.begin), nullptr, run.size, first);
        } else {
            const float* const importance = opened(at, blocks, run, buffer);
            found = at.dtype == EPI_BFLOAT16 ? lock_run(at.at<uint16_t>(run.begin), importance, run.size, first)
                                             : lock_run(at.at<uint8_t>(run.begin), importance, run.size, first);
        }
        counts.locked += found.locked;
        counts.newly_locked += found.newly_locked;
        counts.released += found.released;
    }
    return counts;
}

}  // namespace epi::EPI_LEVEL
