// AdamW for one entry: float32 in, float32 out. Names, equations and roundings are those of epi_kernels/rules/adamw.py.
#pragma once

#include <cmath>

#include "../bits.h"
#include "../schema.h"

namespace epi {
namespace {

struct AdamW {
    using Scalars = epi_adamw_scalars;
    static constexpr int SLOTS = EPI_ADAMW_SLOTS;
    static constexpr int REQUIRED = EPI_ADAMW_REQUIRED;
    static constexpr int IMPORTANCE_SLOT = EPI_ADAMW_IMPORTANCE_SLOT;

    // Return the parameter after the step, and change the slots. `given`: the importance slot already includes this
    // gradient. `optional`: the tensor has the optional slots.
    template <bool given, bool optional>
    static inline float update(float param, float grad, float* slots, const Scalars& s) {
        float& exp_avg = slots[EPI_ADAMW_EXP_AVG];
        float& exp_avg_sq = slots[EPI_ADAMW_EXP_AVG_SQ];
        exp_avg = first_moment(exp_avg, grad, s.one_minus_beta1);
        if constexpr (!given) exp_avg_sq = second_moment(exp_avg_sq, grad, s.beta2, s.one_minus_beta2);
        float largest = exp_avg_sq;
        if constexpr (optional) {
            largest = maximum(slots[EPI_ADAMW_MAX_EXP_AVG_SQ], exp_avg_sq);
            slots[EPI_ADAMW_MAX_EXP_AVG_SQ] = largest;
        }
        return moved(param, exp_avg, largest, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps);
    }

    // m + (1 - beta1) * (g - m) with the roundings of torch.lerp, which starts from the nearer end.
    static inline float first_moment(float exp_avg, float grad, float one_minus_beta1) {
        const bool near = one_minus_beta1 < 0.5f;
        // not one_minus_beta1 - 1, which is +0 where beta1 is 0: a zero moment would then get another sign
        const float weight = near ? one_minus_beta1 : -(1.0f - one_minus_beta1);
        return fmaf(weight, grad - exp_avg, near ? exp_avg : grad);
    }

    // beta2 * v + (1 - beta2) * g * g with the roundings of torch.addcmul.
    static inline float second_moment(float exp_avg_sq, float grad, float beta2, float one_minus_beta2) {
        return fmaf(grad * one_minus_beta2, grad, exp_avg_sq * beta2);
    }

    // The larger of two numbers; NaN if one of them is NaN.
    static inline float maximum(float left, float right) {
        const bool take_left = left > right || (bits_of(left) & ~SIGN) > INFINITE;
        return take_left ? left : right;
    }

    // (1 - lr * lambda) * theta - step_size * m / (sqrt(v) / correction + eps).
    static inline float moved(float param, float exp_avg, float exp_avg_sq, float decay, float step_size,
                              float correction, float eps) {
        return param * decay - exp_avg * step_size / (sqrtf(exp_avg_sq) / correction + eps);
    }
};

}  // namespace
}  // namespace epi
