// The C functions of epi_native.h: choose the SIMD level, share the chunks among threads, merge the results.
//
// Counts are integers, and minima and maxima do not depend on an order, so the results equal those of one thread.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>

#include "kernels.h"
#include "parallel.h"
#include "positions.h"

namespace epi {
namespace {

struct Level {
    int32_t number;
    const Kernels* kernels;
};

// The highest level that this machine has, but at most EPI_KERNELS_SIMD_LEVEL, which is read once.
Level best_level() {
#if defined(__x86_64__)
    const char* const wish = std::getenv("EPI_KERNELS_SIMD_LEVEL");
    const int limit = wish ? std::atoi(wish) : 4;
    __builtin_cpu_init();
    if (limit >= 4 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return {4, &v4::kernels};
    if (limit >= 3 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
        return {3, &v3::kernels};
#endif
    return {1, &baseline::kernels};
}

const Level& level() {
    static const Level chosen = best_level();
    return chosen;
}

template <typename Compare>
void replace_if(std::atomic<int32_t>& current, int32_t value, Compare better) {
    int32_t seen = current.load(std::memory_order_relaxed);
    while (better(value, seen) && !current.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
    }
}

// Add to a count that several threads share. (A field of a C struct cannot be a std::atomic.)
void add(int64_t& count, int64_t amount) {
    if (amount) __atomic_fetch_add(&count, amount, __ATOMIC_RELAXED);
}

float float_from(int32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

constexpr int32_t INFINITE_BITS = 0x7f800000;

}  // namespace
}  // namespace epi

using namespace epi;

int32_t epi_abi_version(void) { return EPI_VERSION; }

const char* epi_compiler(void) {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}

int32_t epi_simd_level(void) { return level().number; }

void epi_sweep(epi_sweep_tensor* tensors, int64_t count, int32_t rule, int32_t advanced, int32_t threads) {
    const Kernels& kernels = *level().kernels;
    Chunks all(tensors, count);
    run(all, threads, [&](Chunks& chunks) {
        for (Chunk chunk; chunks.take(&chunk);) {
            epi_sweep_tensor& tensor = tensors[chunk.tensor];
            add(tensor.nonfinite, kernels.sweep(rule, tensor, chunk.begin, chunk.end, advanced != 0));
        }
    });
}

void epi_importance(epi_importance_tensor* tensors, int64_t count, float* ranges, int64_t layer_count,
                    float grad_factor, int32_t keep_finite, int32_t threads) {
    const Kernels& kernels = *level().kernels;
    const std::unique_ptr<std::atomic<int32_t>[]> lows(new std::atomic<int32_t>[layer_count]);
    const std::unique_ptr<std::atomic<int32_t>[]> highs(new std::atomic<int32_t>[layer_count]);
    for (int64_t i = 0; i < layer_count; ++i) {
        lows[i] = INFINITE_BITS;
        highs[i] = -1;
    }
    Chunks all(tensors, count);
    run(all, threads, [&](Chunks& chunks) {
        for (Chunk chunk; chunks.take(&chunk);) {
            epi_importance_tensor& tensor = tensors[chunk.tensor];
            Range range = {INFINITE_BITS, -1};
            add(tensor.nonfinite, kernels.importance(tensor, chunk.begin, chunk.end, grad_factor, keep_finite != 0,
                                                     ranges ? &range : nullptr));
            if (!ranges) continue;
            replace_if(lows[tensor.layer], range.low, std::less<int32_t>());
            replace_if(highs[tensor.layer], range.high, std::greater<int32_t>());
        }
    });
    for (int64_t i = 0; ranges && i < layer_count; ++i) {
        ranges[2 * i] = float_from(lows[i]);
        ranges[2 * i + 1] = highs[i] < 0 ? -INFINITY : float_from(highs[i]);
    }
}

void epi_gradient_sums(const epi_sums_tensor* tensors, int64_t count, int32_t threads) {
    const Kernels& kernels = *level().kernels;
    Chunks all(tensors, count);
    run(all, threads, [&](Chunks& chunks) {
        for (Chunk chunk; chunks.take(&chunk);) kernels.gradient_sums(tensors[chunk.tensor], chunk.begin, chunk.end);
    });
}

void epi_score_histogram(const epi_score_tensor* tensors, int64_t count, const int64_t* prefixes, int32_t shift,
                         int32_t digit_bits, int64_t* counts, int32_t threads) {
    const Kernels& kernels = *level().kernels;
    const int64_t bins = int64_t{1} << digit_bits;
    Chunks all(tensors, count);
    run(all, threads, [&](Chunks& chunks) {
        // each thread has its own histogram; with counts of 32 bits, 4096 bins fit the first-level cache
        std::vector<uint32_t> histogram(bins, 0);
        int64_t counted = 0;
        int32_t budget = 0;
        const auto flush = [&] {
            for (int64_t i = 0; i < bins; ++i) {
                add(counts[budget * bins + i], histogram[i]);
                histogram[i] = 0;
            }
            counted = 0;
        };
        for (Chunk chunk; chunks.take(&chunk);) {
            const epi_score_tensor& tensor = tensors[chunk.tensor];
            if (counted && (tensor.budget != budget || counted >= int64_t{1} << 31)) flush();
            budget = tensor.budget;
            kernels.score_histogram(tensor, chunk.begin, chunk.end, prefixes[budget], shift, digit_bits,
                                    histogram.data());
            counted += chunk.end - chunk.begin;
        }
        if (counted) flush();
    });
}

void epi_select_digit(int64_t* selection, int64_t budgets, const int64_t* counts, int64_t parts, int64_t bins,
                      int32_t shift, float* thresholds) {
    for (int64_t budget = 0; budget < budgets; ++budget) {
        int64_t& prefix = selection[2 * budget];
        int64_t& rank = selection[2 * budget + 1];
        const bool wanted = rank > 0;
        int64_t bin = bins - 1;
        for (;; --bin) {
            int64_t here = 0;
            for (int64_t part = 0; part < parts; ++part) here += counts[(part * budgets + budget) * bins + bin];
            if (here >= rank || bin == 0) break;
            rank -= here;
        }
        prefix = prefix * bins + bin;
        thresholds[budget] = wanted ? float_from(static_cast<int32_t>(prefix << shift)) : INFINITY;
    }
}

void epi_lock(epi_score_tensor* tensors, int64_t count, const float* thresholds, int32_t threads) {
    const Kernels& kernels = *level().kernels;
    Chunks all(tensors, count);
    run(all, threads, [&](Chunks& chunks) {
        for (Chunk chunk; chunks.take(&chunk);) {
            epi_score_tensor& tensor = tensors[chunk.tensor];
            const LockCounts found = kernels.lock(tensor, chunk.begin, chunk.end, thresholds[tensor.budget]);
            add(tensor.locked, found.locked);
            add(tensor.newly_locked, found.newly_locked);
            add(tensor.released, found.released);
        }
    });
}

void epi_gather(const epi_gather_tensor* tensors, int64_t count, int32_t rule, int32_t threads) {
    const Kernels& kernels = *level().kernels;
    Chunks all(tensors, count);
    run(all, threads, [&](Chunks& chunks) {
        for (Chunk chunk; chunks.take(&chunk);) kernels.gather(rule, tensors[chunk.tensor], chunk.begin, chunk.end);
    });
}

void epi_take(epi_positions_tensor* tensors, int64_t count, int32_t threads) {
    at_positions(tensors, count, threads, [](auto& entry, auto& value) { value = entry; });
}

void epi_put(epi_positions_tensor* tensors, int64_t count, int32_t threads) {
    at_positions(tensors, count, threads, [](auto& entry, auto& value) { entry = value; });
}
