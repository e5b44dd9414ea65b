// One step of a rule in which locked entries do not move. Contract: epi_kernels.ops.sweep_.
#include "../sweep.h"

#include <utility>

#include "../rules/all.h"
#include "convert.h"
#include "kernels.h"
#include "scalars.h"

namespace epi::EPI_LEVEL {
namespace {

#define COUNT(code, Rule) +1
static_assert(EPI_FOR_EACH_RULE(COUNT) == EPI_RULES, "csrc/rules/all.h and epi_kernels/rules/__init__.py differ");

// The hardware does not follow five streams well. Prefetching 128 to 512 entries ahead reduces the CPU time of a step
// by 7 to 10%, and 1024 or more do not reduce it (one core of a Xeon with AVX-512, beside another job).
constexpr int64_t AHEAD = 384;
constexpr int64_t LINE = 16;
constexpr int64_t BLOCK = 2 * LINE;  // entries between prefetches

template <typename Rule>
struct Streams {
    float* param;
    const float* grad;
    float* slots[Rule::SLOTS];
    float* importance;
    const int8_t* fixed;
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

// Not inlined: within a larger function gcc finds fewer registers for the loop, and a step takes a tenth longer.
template <typename Rule, Lock lock, bool advanced, bool optional, std::size_t... k>
[[gnu::noinline]] int64_t sweep_streams(std::index_sequence<k...> every, const Streams<Rule>& at, int64_t size,
                                        const Scalars& scalars) {
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

// The tensors of a row that a sweep reads and writes, apart from the gradient, in their storages.
class Tensors {
  public:
    Tensors(const epi_sweep_tensor& row, int slots, int important, bool advanced)
        : row_(row),
          blocks_(blocks_of(row)),
          place_(Place::of(row, Scalars{row.scalars}.of_sweep().step)),
          slots_(slots),
          important_(important),
          writes_lock_(row.lock_in == EPI_LOCK_IMPORTANCE && !advanced),
          kept_(row.lock_in == EPI_LOCK_SLOT && advanced ? important : -1) {
        bool narrow = writes_lock_ && row.lock_dtype != EPI_FLOAT32;
        for (int k = 0; k < slots; ++k) narrow = narrow || row.slot_dtypes[k] != EPI_FLOAT32;
        noisy_ = row.run > 0 && (narrow || row.stochastic);
    }

    const Blocks& blocks() const { return blocks_; }

    // Whether every tensor is float32, the gradient included: a sweep can then run over the memory itself.
    bool in_place() const {
        bool all = row_.param_dtype == EPI_FLOAT32 && row_.grad_dtype == EPI_FLOAT32;
        all = all && (row_.lock_in != EPI_LOCK_IMPORTANCE || row_.lock_dtype == EPI_FLOAT32);
        for (int k = 0; k < slots_; ++k) all = all && row_.slot_dtypes[k] == EPI_FLOAT32;
        return all;
    }

    template <typename Rule>
    Streams<Rule> open(const Run& run) {
        Streams<Rule> at = {};
        at.param = open_param(run);
        at.grad = as_float32(row_.grad, row_.grad_dtype, run.begin, run.size, grads_);
        for (int k = 0; k < slots_; ++k) at.slots[k] = opened(slot(k), blocks_, run, values_[k]);
        if (row_.lock_in == EPI_LOCK_IMPORTANCE) at.importance = opened(lock(), blocks_, run, importances_);
        if (row_.lock_in == EPI_LOCK_STATIC) at.fixed = static_cast<const int8_t*>(row_.lock) + run.begin;
        return at;
    }

    template <typename Rule>
    void close(const Run& run, const Streams<Rule>& at) {
        const uint32_t* mixed = nullptr;
        if (noisy_) {
            place_.fill(mixed_, run.begin, run.size);
            mixed = mixed_;
        }
        close_param(run, at, mixed);
        for (int k = 0; k < slots_; ++k)
            if (k != kept_) closed(at.slots[k], slot(k), blocks_, run, {mixed, NOISE_OF_SLOT[k], k == important_});
        if (writes_lock_) closed(at.importance, lock(), blocks_, run, {mixed, NOISE_IMPORTANCE, false});
    }

  private:
    Stored slot(int k) const { return {row_.slots[k], row_.scales[k], row_.slot_dtypes[k]}; }

    Stored lock() const { return {row_.lock, row_.lock_scales, row_.lock_dtype}; }

    template <typename Memory>
    static Memory* at(void* memory, const Run& run) {
        return static_cast<Memory*>(memory) + run.begin;
    }

    float* open_param(const Run& run) {
        if (!row_.rest) return as_float32(row_.param, row_.param_dtype, run.begin, run.size, params_);
        const uint16_t* const params = at<const uint16_t>(row_.param, run);
        if (row_.rest_bits == 16)
            join(params, at<const int16_t>(row_.rest, run), run.size, params_);
        else
            join(params, at<const int8_t>(row_.rest, run), run.size, params_);
        return params_;
    }

    template <typename Rule>
    void close_param(const Run& run, const Streams<Rule>& streams, const uint32_t* mixed) {
        const uint32_t* const noise = row_.stochastic ? mixed : nullptr;
        if (row_.rest) {
            uint16_t* const params = at<uint16_t>(row_.param, run);
            const float* const locks = lock_bits(run, streams);
            if (row_.rest_bits == 16)
                split(params_, params, at<int16_t>(row_.rest, run), run.size, locks, noise);
            else
                split(params_, params, at<int8_t>(row_.rest, run), run.size, locks, noise);
        } else if (row_.param_dtype == EPI_BFLOAT16) {
            closed<BFloat16>(params_, at<uint16_t>(row_.param, run), run.size, noise, NOISE_PARAM);
        } else if (row_.param_dtype == EPI_FLOAT16) {
            closed<Float16>(params_, at<uint16_t>(row_.param, run), run.size, noise, NOISE_PARAM);
        }
    }

    // Return floats whose sign bits are the locks of a run. The gradients' buffer is free once the step is taken.
    template <typename Rule>
    const float* lock_bits(const Run& run, const Streams<Rule>& streams) {
        if (row_.lock_in == EPI_LOCK_IMPORTANCE) return streams.importance;
        if (row_.lock_in == EPI_LOCK_SLOT) return streams.slots[important_];
        const bool fixed = row_.lock_in == EPI_LOCK_STATIC;
        for (int64_t j = 0; j < run.size; ++j) grads_[j] = fixed && streams.fixed[j] < 0 ? -0.0f : 0.0f;
        return grads_;
    }

    const epi_sweep_tensor& row_;
    const Blocks blocks_;
    const Place place_;
    const int slots_;
    const int important_;
    const bool writes_lock_;
    const int kept_;  // the slot that is not written, or -1
    bool noisy_;
    // a run of each tensor as float32, unless its memory is float32
    alignas(64) float params_[RUN];
    alignas(64) float grads_[RUN];
    alignas(64) float values_[EPI_SLOTS][RUN];
    alignas(64) float importances_[RUN];
    alignas(64) uint32_t mixed_[RUN];
};

template <typename Rule>
int64_t sweep_of(const epi_sweep_tensor& tensor, int64_t begin, int64_t end, bool advanced) {
    const bool optional = Rule::REQUIRED < Rule::SLOTS && tensor.slots[Rule::SLOTS - 1];
    Tensors tensors(tensor, optional ? Rule::SLOTS : Rule::REQUIRED, Rule::IMPORTANCE_SLOT, advanced);
    const bool in_place = tensors.in_place();
    Runs runs(tensors.blocks(), begin, end, RUN);
    int64_t nonfinite = 0;
    Run run = {begin, end - begin, 0};
    while (in_place || runs.take(&run)) {
        const Streams<Rule> at = tensors.open<Rule>(run);
        nonfinite += sweep_of<Rule>(tensor.lock_in, advanced, optional, at, run.size, Scalars{tensor.scalars});
        if (in_place) break;
        tensors.close(run, at);
    }
    return nonfinite;
}

}  // namespace

int64_t sweep(int32_t rule, const epi_sweep_tensor& tensor, int64_t begin, int64_t end, bool advanced) {
    switch (rule) {
#define CASE(code, Rule) \
    case code:           \
        return sweep_of<Rule>(tensor, begin, end, advanced);
        EPI_FOR_EACH_RULE(CASE)
    }
    return 0;
}

}  // namespace epi::EPI_LEVEL
