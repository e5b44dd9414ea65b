// The mathematics of what decides a mask, for one entry, once for CPU and GPU: float32 in, float32 out, no memory and
// no threads.
//
// Names and equations are those of epi_kernels/ops/equations.py and epi_kernels/lock.py. Every product and sum must
// round separately, or masks would differ between backends: compile with -ffp-contract=off (nvcc: -fmad=false).
#pragma once

#include "bits.h"

namespace epi {

// The bits of two bounds below which a value that decides a mask counts as 0, so that masks do not depend on whether
// the hardware flushes subnormals (a library built with -ffast-math switches flushing on). An importance or a
// difference of two importances counts as 0 below the smallest normal number; a product or quotient below twice that
// number, since some hardware flushes a result that rounds up to the smallest normal number on other hardware.
constexpr uint32_t SMALLEST_NORMAL = 0x00800000u;
constexpr uint32_t NEGLIGIBLE = 0x01000000u;

// The lock: the sign bit of a signed importance -------------------------------------------------------------------

EPI_INLINE bool is_locked(float signed_importance) { return (bits_of(signed_importance) & SIGN) != 0; }

EPI_INLINE float magnitude(float signed_importance) { return float_of(bits_of(signed_importance) & ~SIGN); }

EPI_INLINE float with_lock(float importance, bool locked) {
    return float_of((bits_of(importance) & ~SIGN) | (locked ? SIGN : 0u));
}

// Importance ------------------------------------------------------------------------------------------------------

// A product or quotient >= 0 that decides a mask: 0 where it is negligible. NaN and infinity pass through.
EPI_INLINE float noticed(float value) { return selected(bits_of(value) < NEGLIGIBLE, 0.0f, value); }

// EPI Eq. 5: beta * S + (1 - beta) * g * g, in this order of roundings.
EPI_INLINE float importance_average(float importance, float grad, float beta, float one_minus_beta) {
    return noticed(importance * beta) + noticed(grad * one_minus_beta * grad);
}

// Return signed S after this gradient, its lock untouched. Where g * g is not finite, S stays unchanged if
// `keep_finite`.
EPI_INLINE float advanced_importance(float signed_importance, float grad, float beta, float one_minus_beta,
                                     bool keep_finite) {
    const float before = magnitude(signed_importance);
    const float after = importance_average(before, grad, beta, one_minus_beta);
    const bool keep = keep_finite & !is_finite(grad * grad);
    return with_lock(selected(keep, before, after), is_locked(signed_importance));
}

// S as scores and ranges use it: a subnormal S is 0. NaN and infinity pass through.
EPI_INLINE float usable(float signed_importance) {
    const float value = magnitude(signed_importance);
    return selected(bits_of(value) < SMALLEST_NORMAL, 0.0f, value);
}

// EPI Eq. 8 with eps = 0: (S - low) / (high - low); 0 where S is not finite or the layer is constant.
EPI_INLINE float score(float signed_importance, float low, float high) {
    const float value = usable(signed_importance);
    const float smallest = float_of(SMALLEST_NORMAL);
    const float distance = value - low;
    const float span = high - low;
    const bool spans = span >= smallest;
    const bool valid = is_finite(value) & (distance >= smallest) & spans;
    // most S may be 0, and all of a constant layer: a GPU divides 0, or by 0, on a slow path, and this one does not
    const float divisor = selected(spans, span, 1.0f);
    return selected(valid, noticed(selected(valid, distance, divisor) / divisor), 0.0f);
}

// The score without a range: S itself.
EPI_INLINE float raw_score(float signed_importance) {
    const float value = usable(signed_importance);
    return selected(is_finite(value), value, 0.0f);
}

}  // namespace epi
