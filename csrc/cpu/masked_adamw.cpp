// One AdamW step in which locked entries do not move. Contract: epi_kernels.ops.masked_adamw_.
#include "convert.h"
#include "kernels.h"

namespace epi::EPI_LEVEL {
namespace {

// Five streams are more than the hardware follows well. Asking 128 to 512 entries ahead takes 7 to 10% off the CPU time
// of a step, 1024 and more takes nothing off (one core of a Xeon with AVX-512, beside another job).
constexpr int64_t AHEAD = 384;
constexpr int64_t LINE = 16;
constexpr int64_t BLOCK = 2 * LINE;  // entries between prefetches

// entries of a 16-bit tensor that are float32 at a time; both buffers stay in the first-level cache
constexpr int64_t BUFFER = 1024;

enum class Mode { none, importance, importance_advanced, exp_avg_sq, exp_avg_sq_advanced, fixed };

struct Streams {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    float* max_exp_avg_sq;
    float* importance;
    const int8_t* fixed;
};

template <Mode mode, bool amsgrad>
inline int32_t step(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
                    float* __restrict exp_avg_sq, float* __restrict max_exp_avg_sq, float* __restrict importance,
                    const int8_t* __restrict fixed, int64_t begin, int64_t end, const epi_scalars s) {
    int32_t nonfinite = 0;
    for (int64_t i = begin; i < end; ++i) {
        const float g = grad[i] * s.sign;
        const float m = first_moment(exp_avg[i], g, s.one_minus_beta1);
        exp_avg[i] = m;

        float v = exp_avg_sq[i];
        if constexpr (mode == Mode::exp_avg_sq)
            v = advanced_importance(v, g, s.beta2, s.one_minus_beta2, false);
        else if constexpr (mode != Mode::exp_avg_sq_advanced)  // its own lock bits, if any, are of an earlier mode
            v = second_moment(magnitude(v), g, s.beta2, s.one_minus_beta2);
        if constexpr (mode != Mode::exp_avg_sq_advanced) exp_avg_sq[i] = v;

        bool locked = false;
        if constexpr (mode == Mode::importance || mode == Mode::importance_advanced) {
            locked = is_locked(importance[i]);
            if constexpr (mode == Mode::importance)
                importance[i] =
                    advanced_importance(importance[i], g, s.importance_beta, s.one_minus_importance_beta, true);
        } else if constexpr (mode == Mode::exp_avg_sq || mode == Mode::exp_avg_sq_advanced) {
            locked = is_locked(v);
        } else if constexpr (mode == Mode::fixed) {
            locked = fixed[i] < 0;
        }
        if constexpr (mode == Mode::importance || mode == Mode::exp_avg_sq) nonfinite += is_finite(g * g) ? 0 : 1;

        v = magnitude(v);
        if constexpr (amsgrad) {
            v = maximum(max_exp_avg_sq[i], v);
            max_exp_avg_sq[i] = v;
        }
        const float theta = moved(param[i], m, v, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps);
        param[i] = mode == Mode::none ? theta : selected(locked, param[i], theta);
    }
    return nonfinite;
}

inline void prefetch(const float* next) {
    for (int64_t i = 0; i < BLOCK; i += LINE) __builtin_prefetch(next + i);
}

template <Mode mode, bool amsgrad>
int64_t sweep(const Streams& at, int64_t size, const epi_scalars& s) {
    constexpr bool has_importance = mode == Mode::importance || mode == Mode::importance_advanced;
    const auto part = [&](int64_t begin, int64_t end) {
        return step<mode, amsgrad>(at.param, at.grad, at.exp_avg, at.exp_avg_sq, at.max_exp_avg_sq, at.importance,
                                   at.fixed, begin, end, s);
    };
    int64_t nonfinite = 0;
    int64_t i = 0;
    for (; i + BLOCK <= size; i += BLOCK) {
        prefetch(at.param + i + AHEAD);
        prefetch(at.grad + i + AHEAD);
        prefetch(at.exp_avg + i + AHEAD);
        prefetch(at.exp_avg_sq + i + AHEAD);
        if constexpr (has_importance) prefetch(at.importance + i + AHEAD);
        nonfinite += part(i, i + BLOCK);
    }
    return nonfinite + part(i, size);
}

template <bool amsgrad>
int64_t sweep_of(Mode mode, const Streams& at, int64_t size, const epi_scalars& s) {
    switch (mode) {
        case Mode::none:
            return sweep<Mode::none, amsgrad>(at, size, s);
        case Mode::importance:
            return sweep<Mode::importance, amsgrad>(at, size, s);
        case Mode::importance_advanced:
            return sweep<Mode::importance_advanced, amsgrad>(at, size, s);
        case Mode::exp_avg_sq:
            return sweep<Mode::exp_avg_sq, amsgrad>(at, size, s);
        case Mode::exp_avg_sq_advanced:
            return sweep<Mode::exp_avg_sq_advanced, amsgrad>(at, size, s);
        case Mode::fixed:
            return sweep<Mode::fixed, amsgrad>(at, size, s);
    }
    return 0;
}

Mode mode_of(int32_t lock_in, bool advanced) {
    switch (lock_in) {
        case EPI_LOCK_IMPORTANCE:
            return advanced ? Mode::importance_advanced : Mode::importance;
        case EPI_LOCK_EXP_AVG_SQ:
            return advanced ? Mode::exp_avg_sq_advanced : Mode::exp_avg_sq;
        case EPI_LOCK_STATIC:
            return Mode::fixed;
        default:
            return Mode::none;
    }
}

}  // namespace

int64_t masked_adamw(const epi_adamw_tensor& tensor, int64_t begin, int64_t end, bool advanced) {
    const int32_t lock_in = tensor.lock_in;
    const Mode mode = mode_of(lock_in, advanced);
    const bool wide = tensor.param_dtype == EPI_FLOAT32 && tensor.grad_dtype == EPI_FLOAT32;
    const int64_t piece = wide ? end - begin : BUFFER;
    alignas(64) float params[BUFFER];
    alignas(64) float grads[BUFFER];
    int64_t nonfinite = 0;
    for (int64_t i = begin; i < end; i += piece) {
        const int64_t size = end - i < piece ? end - i : piece;
        void* const param = at(tensor.param, tensor.param_dtype, i);
        const Streams streams = {
            const_cast<float*>(as_float32(param, tensor.param_dtype, size, params)),
            as_float32(at(tensor.grad, tensor.grad_dtype, i), tensor.grad_dtype, size, grads),
            tensor.exp_avg + i,
            tensor.exp_avg_sq + i,
            tensor.max_exp_avg_sq + (tensor.max_exp_avg_sq ? i : 0),
            static_cast<float*>(tensor.lock) + (lock_in == EPI_LOCK_IMPORTANCE ? i : 0),
            static_cast<const int8_t*>(tensor.lock) + (lock_in == EPI_LOCK_STATIC ? i : 0),
        };
        nonfinite += tensor.max_exp_avg_sq ? sweep_of<true>(mode, streams, size, tensor.scalars)
                                           : sweep_of<false>(mode, streams, size, tensor.scalars);
        if (tensor.param_dtype != EPI_FLOAT32) store_halves(params, tensor.param_dtype, size, param);
    }
    return nonfinite;
}

}  // namespace epi::EPI_LEVEL
