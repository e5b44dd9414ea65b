// The EMA of squared gradients and its range in one pass, and the sums that PIECE needs. Contract:
// epi_kernels.ops.importance_ and gradient_sums_.
#include "../importance.h"

#include "convert.h"
#include "kernels.h"

namespace epi::EPI_LEVEL {
namespace {

template <bool keep_finite>
int32_t advance(float* __restrict importance, const float* __restrict grad, int64_t size, float grad_factor, float beta,
                float one_minus_beta) {
    int32_t nonfinite = 0;
    for (int64_t i = 0; i < size; ++i) {
        const float g = grad[i] * grad_factor;
        importance[i] = advanced_importance(importance[i], g, beta, one_minus_beta, keep_finite);
        nonfinite += is_finite(g * g) ? 0 : 1;
    }
    return nonfinite;
}

// The bits of floats >= 0 have the same order as the floats, and the minimum of integers vectorises.
Range range_of(const float* importance, int64_t size, Range range) {
    int32_t low = range.low;
    int32_t high = range.high;
    for (int64_t i = 0; i < size; ++i) {
        const int32_t bits = static_cast<int32_t>(bits_of(usable(importance[i])));
        const bool valid = bits < static_cast<int32_t>(INFINITE);
        const int32_t upper = valid ? bits : -1;
        low = bits < low ? bits : low;  // bits that are not finite are not below +inf, and change nothing
        high = upper > high ? upper : high;
    }
    return {low, high};
}

}  // namespace

int64_t importance(const epi_importance_tensor& tensor, int64_t begin, int64_t end, float grad_factor, bool keep_finite,
                   Range* range) {
    alignas(64) float grads[RUN];
    alignas(64) float buffer[RUN];
    alignas(64) uint32_t mixed[RUN];
    const Stored stored = {tensor.importance, tensor.scales, tensor.importance_dtype};
    const Blocks blocks = blocks_of(tensor);
    const Place place = Place::of(tensor, tensor.step);
    const bool narrow = tensor.importance_dtype != EPI_FLOAT32;
    const bool noisy = narrow && tensor.run > 0;
    const Rounding rounding = {noisy ? mixed : nullptr, keep_finite ? NOISE_IMPORTANCE : NOISE_OF_SLOT[1],
                               !keep_finite};
    int64_t nonfinite = 0;
    Runs runs(blocks, begin, end, RUN);
    for (Run run; runs.take(&run);) {
        float* const values = opened(stored, blocks, run, buffer);
        if (tensor.grad) {
            const float* const grad = as_float32(tensor.grad, tensor.grad_dtype, run.begin, run.size, grads);
            nonfinite += keep_finite
                             ? advance<true>(values, grad, run.size, grad_factor, tensor.beta, tensor.one_minus_beta)
                             : advance<false>(values, grad, run.size, grad_factor, tensor.beta, tensor.one_minus_beta);
            if (narrow) {
                if (noisy) place.fill(mixed, run.begin, run.size);
                closed(values, stored, blocks, run, rounding);
                if (range) opened(stored, blocks, run, buffer);  // the range is that of what is kept
            }
        }
        if (range) *range = range_of(values, run.size, *range);
    }
    return nonfinite;
}

void gradient_sums(const epi_sums_tensor& tensor, int64_t begin, int64_t end) {
    alignas(64) float buffer[RUN];
    for (int64_t i = begin; i < end; i += RUN) {
        const int64_t size = end - i < RUN ? end - i : RUN;
        const float* __restrict grad = as_float32(tensor.grad, tensor.grad_dtype, i, size, buffer);
        if (tensor.sum) {
            float* __restrict sum = tensor.sum + i;
            for (int64_t j = 0; j < size; ++j) sum[j] += grad[j];
        }
        float* __restrict square_sum = tensor.square_sum + i;
        for (int64_t j = 0; j < size; ++j) square_sum[j] += noticed(grad[j] * grad[j]);
    }
}

}  // namespace epi::EPI_LEVEL
