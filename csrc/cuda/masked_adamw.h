// The work of one thread in the AdamW step in which locked entries do not move. Contract:
// epi_kernels.ops.masked_adamw_. Per entry it is step() of csrc/cpu/masked_adamw.cpp.
#pragma once

#include "entries.h"

namespace epi::cuda {

// Every block first waits for its piece, its row and its scalars, one after the other; 4096 entries are 120 KB behind
// that wait, and tensors of a few million entries still give every processor a block.
constexpr int64_t SWEEP_PIECE = 4096;

struct Step {
    int32_t lock_in;
    bool advanced;
    float grad_factor;  // with the sign of `scalars`
    epi_scalars scalars;
};

// Mode and AMSGrad are the same for all threads of a block: branches on them cost little beside the memory, and a
// kernel for each would be 108 of them instead of 9.
template <typename Param, typename Grad, int width>
EPI_INLINE int32_t step(const epi_cuda_adamw_row& row, const Step& step, int64_t i) {
    const epi_scalars& s = step.scalars;
    const bool in_importance = step.lock_in == EPI_LOCK_IMPORTANCE;
    const bool in_exp_avg_sq = step.lock_in == EPI_LOCK_EXP_AVG_SQ;
    const bool in_static = step.lock_in == EPI_LOCK_STATIC;
    const bool amsgrad = row.max_exp_avg_sq != 0;

    auto param = load<width, typename Param::Memory>(row.param, i);
    const auto grad = load<width, typename Grad::Memory>(row.grad, i);
    auto exp_avg = load<width, float>(row.exp_avg, i);
    auto exp_avg_sq = load<width, float>(row.exp_avg_sq, i);
    Pack<float, width> max_exp_avg_sq = {};
    Pack<float, width> importance = {};
    Pack<int8_t, width> fixed = {};
    if (amsgrad) max_exp_avg_sq = load<width, float>(row.max_exp_avg_sq, i);
    if (in_importance) importance = load<width, float>(row.lock, i);
    if (in_static) fixed = load<width, int8_t>(row.lock, i);

    int32_t nonfinite = 0;
    for (int j = 0; j < width; ++j) {
        const float g = Grad::load(grad.entries[j]) * step.grad_factor;
        const float m = first_moment(exp_avg.entries[j], g, s.one_minus_beta1);
        exp_avg.entries[j] = m;

        float v = exp_avg_sq.entries[j];
        if (!in_exp_avg_sq)
            v = second_moment(magnitude(v), g, s.beta2, s.one_minus_beta2);
        else if (!step.advanced)
            v = advanced_importance(v, g, s.beta2, s.one_minus_beta2, false);
        exp_avg_sq.entries[j] = v;

        const float lock = in_importance ? importance.entries[j] : v;
        bool locked = (in_importance || in_exp_avg_sq) && is_locked(lock);
        if (in_static) locked = fixed.entries[j] < 0;
        if (in_importance && !step.advanced)
            importance.entries[j] = advanced_importance(lock, g, s.importance_beta, s.one_minus_importance_beta, true);
        if ((in_importance || in_exp_avg_sq) && !step.advanced) nonfinite += is_finite(g * g) ? 0 : 1;

        v = magnitude(v);
        if (amsgrad) {
            v = maximum(max_exp_avg_sq.entries[j], v);
            max_exp_avg_sq.entries[j] = v;
        }
        const float theta = Param::load(param.entries[j]);
        const float next = moved(theta, m, v, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps);
        // there and back keeps every bit of a 16-bit entry
        param.entries[j] = Param::store(selected(locked, theta, next));
    }

    store(row.param, i, param);
    store(row.exp_avg, i, exp_avg);
    if (!in_exp_avg_sq || !step.advanced) store(row.exp_avg_sq, i, exp_avg_sq);
    if (amsgrad) store(row.max_exp_avg_sq, i, max_exp_avg_sq);
    if (in_importance && !step.advanced) store(row.lock, i, importance);
    return nonfinite;
}

// Return the number of entries of this thread whose squared gradient is not finite.
template <typename Param, typename Grad>
EPI_INLINE int32_t sweep(const epi_cuda_adamw_row& row, const Piece& piece, const Step& how, int32_t thread,
                         int32_t threads) {
    int32_t nonfinite = 0;
    for (int64_t i = piece.begin + thread * QUAD; i < piece.quads_end; i += threads * QUAD)
        nonfinite += step<Param, Grad, QUAD>(row, how, i);
    for (int64_t i = piece.quads_end + thread; i < piece.end; i += threads)
        nonfinite += step<Param, Grad, 1>(row, how, i);
    return nonfinite;
}

// Where the lock of a tensor is: nowhere if it has none.
EPI_INLINE Step step_of(const epi_cuda_adamw_row& row, const epi_scalars& scalars, float grad_factor, int32_t lock_in,
                        bool advanced) {
    return {row.lock ? lock_in : EPI_LOCK_NONE, advanced, scalars.sign * grad_factor, scalars};
}

template <typename Param, typename Visit>
int32_t visit_grad(int32_t grad_dtype, int32_t otherwise, const Visit& visit) {
    switch (grad_dtype) {
        case EPI_FLOAT32:
            return visit(Param{}, Float32{});
        case EPI_BFLOAT16:
            return visit(Param{}, BFloat16{});
        case EPI_FLOAT16:
            return visit(Param{}, Float16{});
        default:
            return otherwise;
    }
}

// Call `visit` with the two dtypes as types; return what it returns, or `otherwise` if there is no such dtype.
template <typename Visit>
int32_t visit_dtypes(int32_t param_dtype, int32_t grad_dtype, int32_t otherwise, const Visit& visit) {
    switch (param_dtype) {
        case EPI_FLOAT32:
            return visit_grad<Float32>(grad_dtype, otherwise, visit);
        case EPI_BFLOAT16:
            return visit_grad<BFloat16>(grad_dtype, otherwise, visit);
        case EPI_FLOAT16:
            return visit_grad<Float16>(grad_dtype, otherwise, visit);
        default:
            return otherwise;
    }
}

}  // namespace epi::cuda
