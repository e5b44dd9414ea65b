// Histograms of the bits of the scores, and the lock that a threshold decides. Contract:
// epi_kernels.ops.score_histogram and lock_.
#include "../adamw.h"
#include "kernels.h"

namespace epi::EPI_LEVEL {
namespace {

// scores at a time, in the first-level cache: computing them vectorises, counting them does not
constexpr int64_t PIECE = 1024;

void scores_of(const epi_score_tensor& tensor, int64_t begin, int64_t size, float* __restrict scores) {
    const float* __restrict importance = tensor.importance + begin;
    const float low = tensor.low;
    const float high = tensor.high;
    if (tensor.normalized)
        for (int64_t i = 0; i < size; ++i) scores[i] = score(importance[i], low, high);
    else
        for (int64_t i = 0; i < size; ++i) scores[i] = raw_score(importance[i]);
}

}  // namespace

void score_histogram(const epi_score_tensor& tensor, int64_t begin, int64_t end, int64_t prefix, int32_t shift,
                     int32_t digit_bits, uint32_t* histogram) {
    alignas(64) float scores[PIECE];
    const int32_t mask = (1 << digit_bits) - 1;
    for (int64_t i = begin; i < end; i += PIECE) {
        const int64_t size = end - i < PIECE ? end - i : PIECE;
        scores_of(tensor, i, size, scores);
        for (int64_t j = 0; j < size; ++j) {
            const int32_t digits = static_cast<int32_t>(bits_of(scores[j])) >> shift;
            if ((digits >> digit_bits) == prefix) ++histogram[digits & mask];
        }
    }
}

LockCounts lock(const epi_score_tensor& tensor, int64_t begin, int64_t end, float threshold) {
    alignas(64) float scores[PIECE];
    LockCounts counts = {0, 0, 0};
    for (int64_t i = begin; i < end; i += PIECE) {
        const int64_t size = end - i < PIECE ? end - i : PIECE;
        scores_of(tensor, i, size, scores);
        float* __restrict importance = tensor.importance + i;
        int32_t locked = 0, newly_locked = 0, released = 0;
        for (int64_t j = 0; j < size; ++j) {
            const bool before = is_locked(importance[j]);
            const bool after = (scores[j] >= threshold) & (scores[j] > 0.0f);
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
