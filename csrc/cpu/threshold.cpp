// Histograms of the scores' bits, and the locks that a threshold decides. Contract:
// epi_kernels.ops.score_histogram and lock_.
//
// A score never decreases as S grows: rounding a difference and a quotient once each keeps the order. So "the score is
// at least x" means "S is at least some bound for this tensor", and all passes but the first compare the bits of S
// without a division.
#include "../importance.h"
#include "kernels.h"

namespace epi::EPI_LEVEL {
namespace {

// scores computed at a time, into the first-level cache: computing scores vectorises, counting them does not
constexpr int64_t BLOCK = 1024;

float score_of(const epi_score_tensor& tensor, float importance) {
    return tensor.normalized ? score(importance, tensor.low, tensor.high) : raw_score(importance);
}

void scores_of(const epi_score_tensor& tensor, int64_t begin, int64_t size, float* __restrict scores) {
    const float* __restrict importance = tensor.importance + begin;
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
void count(const epi_score_tensor& tensor, int64_t begin, int64_t end, uint32_t first, uint32_t width, int32_t shift,
           uint32_t mask, uint32_t* histogram) {
    for (int64_t i = begin; i < end; ++i)
        if ((bits_of(tensor.importance[i]) & ~SIGN) - first < width)
            ++histogram[(bits_of(score_of(tensor, tensor.importance[i])) >> shift) & mask];
}

}  // namespace

void score_histogram(const epi_score_tensor& tensor, int64_t begin, int64_t end, int64_t prefix, int32_t shift,
                     int32_t digit_bits, uint32_t* histogram) {
    const uint32_t mask = (1u << digit_bits) - 1;
    if (prefix == 0) {  // all scores for the highest digit; for lower digits, those of 0 or almost 0
        alignas(64) float scores[BLOCK];
        for (int64_t i = begin; i < end; i += BLOCK) {
            const int64_t size = end - i < BLOCK ? end - i : BLOCK;
            scores_of(tensor, i, size, scores);
            for (int64_t j = 0; j < size; ++j) {
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
    const float* __restrict importance = tensor.importance;
    // most groups hold no such entry, which is found without a branch for each entry
    constexpr int64_t GROUP = 64;
    int64_t i = begin;
    for (; i + GROUP <= end; i += GROUP) {
        uint32_t found = 0;
        for (int64_t j = i; j < i + GROUP; ++j) found |= (bits_of(importance[j]) & ~SIGN) - first < width;
        if (found) count(tensor, i, i + GROUP, first, width, shift, mask, histogram);
    }
    count(tensor, i, end, first, width, shift, mask, histogram);
}

LockCounts lock(const epi_score_tensor& tensor, int64_t begin, int64_t end, float threshold) {
    // a score of 0 is never locked, and no score is subnormal; no score reaches NaN
    const float smallest = float_of(SMALLEST_NORMAL);
    const uint32_t first = first_reaching(tensor, threshold < smallest ? smallest : threshold);
    LockCounts counts = {0, 0, 0};
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t size = end - i < BLOCK ? end - i : BLOCK;
        float* __restrict importance = tensor.importance + i;
        int32_t locked = 0, newly_locked = 0, released = 0;
        for (int64_t j = 0; j < size; ++j) {
            const uint32_t bits = bits_of(importance[j]) & ~SIGN;
            const bool before = is_locked(importance[j]);
            const bool after = (bits >= first) & (bits < INFINITE);
            importance[j] = with_lock(importance[j], after);
            locked += after;
            newly_locked += after & !before;
            released += before & !after;
        }
        counts.locked += locked;
        counts.newly_locked += newly_locked;
        counts.released += released;
    }
    return counts;
}

}  // namespace epi::EPI_LEVEL
