// Lion for one entry: float32 in, float32 out. Names, equations and roundings are those of epi_kernels/rules/lion.py.
#pragma once

#include "../bits.h"
#include "../schema.h"

namespace epi {
namespace {

struct Lion {
    using Scalars = epi_lion_scalars;
    static constexpr int SLOTS = EPI_LION_SLOTS;
    static constexpr int REQUIRED = EPI_LION_REQUIRED;
    static constexpr int IMPORTANCE_SLOT = EPI_LION_IMPORTANCE_SLOT;

    // Return the parameter after the step, and change the slot.
    template <bool given, bool optional>
    static inline float update(float param, float grad, float* slots, const Scalars& s) {
        float& exp_avg = slots[EPI_LION_EXP_AVG];
        const float direction = sign(exp_avg * s.beta1 + grad * s.one_minus_beta1);
        exp_avg = exp_avg * s.beta2 + grad * s.one_minus_beta2;
        return param * s.decay - direction * s.lr;
    }

    // 1 for values above 0 and -1 for values below 0; a zero or a NaN unchanged.
    static inline float sign(float value) { return selected(value > 0, 1.0f, selected(value < 0, -1.0f, value)); }
};

}  // namespace
}  // namespace epi
