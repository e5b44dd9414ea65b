// One step of a rule in which locked entries do not move. Contract: epi_kernels.ops.sweep_.
#include "../sweep.h"

#include <cstring>
#include <utility>

#include "../rules/all.h"
#include "convert.h"
#include "kernels.h"

namespace epi::EPI_LEVEL {
namespace {

#define COUNT(code, Rule) +1
static_assert(EPI_FOR_EACH_RULE(COUNT) == EPI_RULES, "csrc/rules/all.h and epi_kernels/rules/__init__.py differ");

// The hardware does not follow five streams well. Prefetching 128 to 512 entries ahead reduces the CPU time of a step
// by 7 to 10%, and 1024 or more do not reduce it (one core of a Xeon with AVX-512, beside another job).
constexpr int64_t AHEAD = 384;
constexpr int64_t LINE = 16;
constexpr int64_t BLOCK = 2 * LINE;  // entries between prefetches

// entries of a tensor that are converted at a time; the buffers stay in the first-level cache
constexpr int64_t BUFFER = 1024;

template <typename Rule>
struct Streams {
    float* param;
    const float* grad;
    float* slots[Rule::SLOTS];
    float* importance;
    const int8_t* fixed;
};

struct Scalars {
    const float* values;

    epi_sweep_scalars of_sweep() const { return read<epi_sweep_scalars>(values); }

    template <typename Rule>
    typename Rule::Scalars of_rule() const {
        return read<typename Rule::Scalars>(values + sizeof(epi_sweep_scalars) / sizeof(float));
    }

    template <typename Struct>
    static Struct read(const float* from) {
        static_assert(sizeof(Struct) <= EPI_SCALARS * sizeof(float));
        Struct made;
        std::memcpy(&made, from, sizeof made);
        return made;
    }
};

template <bool present>
inline float read_slot(const float* slot, int64_t i) {
    if constexpr (present) return slot[i];
    return 0.0f;
}

template <bool written>
inline void write_slot(float* slot, int64_t i, float value) {
    if constexpr (written) slot[i] = value;
}

// The slots are a pack of pointers, not an array: `restrict` works only for arguments, and without it the loop is
// scalar.
template <typename Rule, Lock lock, bool advanced, bool optional, std::size_t... k, typename... Slot>
inline int32_t step(std::index_sequence<k...>, float* __restrict param, const float* __restrict grad,
                    float* __restrict importance, const int8_t* __restrict fixed, int64_t begin, int64_t end,
                    const epi_sweep_scalars all, const typename Rule::Scalars s, Slot* __restrict... slots) {
    constexpr int kept = lock == Lock::slot && advanced ? Rule::IMPORTANCE_SLOT : -1;
    int32_t nonfinite = 0;
    for (int64_t i = begin; i < end; ++i) {
        float values[] = {read_slot < k < Rule::REQUIRED || optional > (slots, i)...};
        float signed_importance = 0.0f;
        int8_t byte = 0;
        if constexpr (lock == Lock::importance) signed_importance = importance[i];
        if constexpr (lock == Lock::fixed) byte = fixed[i];
        param[i] = sweep_entry<Rule, lock, advanced, optional>(param[i], grad[i] * all.sign, values, signed_importance,
                                                               byte, all, s, nonfinite);
        if constexpr (lock == Lock::importance && !advanced) importance[i] = signed_importance;
        (write_slot < (k < Rule::REQUIRED || optional) && static_cast<int>(k) != kept > (slots, i, values[k]), ...);
    }
    return nonfinite;
}

inline void prefetch(const float* next) {
    for (int64_t i = 0; i < BLOCK; i += LINE) __builtin_prefetch(next + i);
}

template <typename Rule, Lock lock, bool advanced, bool optional, std::size_t... k>
int64_t sweep_streams(std::index_sequence<k...> every, const Streams<Rule>& at, int64_t size, const Scalars& scalars) {
    const epi_sweep_scalars all = scalars.of_sweep();
    const typename Rule::Scalars s = scalars.of_rule<Rule>();
    const auto part = [&](int64_t begin, int64_t end) {
        return step<Rule, lock, advanced, optional>(every, at.param, at.grad, at.importance, at.fixed, begin, end, all,
                                                    s, at.slots[k]...);
    };
    int64_t nonfinite = 0;
    int64_t i = 0;
    for (; i + BLOCK <= size; i += BLOCK) {
        prefetch(at.param + i + AHEAD);
        prefetch(at.grad + i + AHEAD);
        for (int slot = 0; slot < Rule::REQUIRED; ++slot) prefetch(at.slots[slot] + i + AHEAD);
        if constexpr (lock == Lock::importance) prefetch(at.importance + i + AHEAD);
        nonfinite += part(i, i + BLOCK);
    }
    return nonfinite + part(i, size);
}

template <typename Rule, Lock lock, bool advanced>
int64_t sweep_of(bool optional, const Streams<Rule>& at, int64_t size, const Scalars& scalars) {
    constexpr auto every = std::make_index_sequence<Rule::SLOTS>();
    if constexpr (Rule::REQUIRED < Rule::SLOTS)
        if (optional) return sweep_streams<Rule, lock, advanced, true>(every, at, size, scalars);
    return sweep_streams<Rule, lock, advanced, false>(every, at, size, scalars);
}

template <typename Rule>
int64_t sweep_of(int32_t lock_in, bool advanced, bool optional, const Streams<Rule>& at, int64_t size,
                 const Scalars& scalars) {
    switch (lock_in) {
        case EPI_LOCK_IMPORTANCE:
            return advanced ? sweep_of<Rule, Lock::importance, true>(optional, at, size, scalars)
                            : sweep_of<Rule, Lock::importance, false>(optional, at, size, scalars);
        case EPI_LOCK_SLOT:
            if constexpr (Rule::IMPORTANCE_SLOT >= 0)
                return advanced ? sweep_of<Rule, Lock::slot, true>(optional, at, size, scalars)
                                : sweep_of<Rule, Lock::slot, false>(optional, at, size, scalars);
            return 0;
        case EPI_LOCK_STATIC:
            return sweep_of<Rule, Lock::fixed, false>(optional, at, size, scalars);
        default:
            return sweep_of<Rule, Lock::none, false>(optional, at, size, scalars);
    }
}

template <typename Rule, typename Param, typename Slot>
int64_t sweep_of(const epi_sweep_tensor& tensor, int64_t begin, int64_t end, bool advanced) {
    const bool in_place = is_float32<Param> && is_float32<Slot> && tensor.grad_dtype == EPI_FLOAT32;
    const int64_t most = in_place ? end - begin : BUFFER;
    alignas(64) float params[is_float32<Param> ? 1 : BUFFER];
    alignas(64) float grads[BUFFER];
    alignas(64) float slots[Rule::SLOTS][is_float32<Slot> ? 1 : BUFFER];
    const bool optional = Rule::REQUIRED < Rule::SLOTS && tensor.slots[Rule::SLOTS - 1];
    const int present = optional ? Rule::SLOTS : Rule::REQUIRED;
    int64_t nonfinite = 0;
    for (int64_t i = begin; i < end; i += most) {
        const int64_t size = end - i < most ? end - i : most;
        Streams<Rule> at = {};
        at.param = opened<Param>(tensor.param, i, size, params);
        at.grad = as_float32(tensor.grad, tensor.grad_dtype, i, size, grads);
        for (int k = 0; k < present; ++k) at.slots[k] = opened<Slot>(tensor.slots[k], i, size, slots[k]);
        if (tensor.lock_in == EPI_LOCK_IMPORTANCE) at.importance = static_cast<float*>(tensor.lock) + i;
        if (tensor.lock_in == EPI_LOCK_STATIC) at.fixed = static_cast<const int8_t*>(tensor.lock) + i;
        nonfinite += sweep_of<Rule>(tensor.lock_in, advanced, optional, at, size, Scalars{tensor.scalars});
        closed<Param>(params, tensor.param, i, size);
        for (int k = 0; k < present; ++k) closed<Slot>(slots[k], tensor.slots[k], i, size);
    }
    return nonfinite;
}

}  // namespace

int64_t sweep(int32_t rule, const epi_sweep_tensor& tensor, int64_t begin, int64_t end, bool advanced) {
    return with_storage(tensor.param_dtype, [&](auto param) -> int64_t {
        switch (rule) {
#define CASE(code, Rule) \
    case code:           \
        return sweep_of<Rule, decltype(param), Float32>(tensor, begin, end, advanced);
            EPI_FOR_EACH_RULE(CASE)
        }
        return 0;
    });
}

}  // namespace epi::EPI_LEVEL
