// The kernels of one chunk of one tensor. Their files are compiled once for each SIMD level, with EPI_LEVEL as the name
// of a namespace, and include nothing with inline functions of external linkage: the linker keeps one copy of such a
// function, and might keep one that an older machine cannot run.
#pragma once

#include <cstdint>

#include "../epi_native.h"

namespace epi {

struct Range {
    int32_t low;   // bits of the smallest importance; bits of +inf without entries
    int32_t high;  // bits of the largest importance; negative without entries
};

struct LockCounts {
    int64_t locked, newly_locked, released;
};

struct Kernels {
    int64_t (*sweep)(int32_t rule, const epi_sweep_tensor&, int64_t begin, int64_t end, bool advanced);
    int64_t (*importance)(const epi_importance_tensor&, int64_t begin, int64_t end, float grad_factor, bool keep_finite,
                          Range*);
    void (*gradient_sums)(const epi_sums_tensor&, int64_t begin, int64_t end);
    void (*score_histogram)(const epi_score_tensor&, int64_t begin, int64_t end, int64_t prefix, int32_t shift,
                            int32_t digit_bits, uint32_t* histogram);
    LockCounts (*lock)(const epi_score_tensor&, int64_t begin, int64_t end, float threshold);
    void (*gather)(int32_t rule, const epi_gather_tensor&, int64_t begin, int64_t end);
};

#ifdef EPI_LEVEL
namespace EPI_LEVEL {

// these two return the number of entries whose squared gradient is not finite; the range may be NULL
int64_t sweep(int32_t rule, const epi_sweep_tensor&, int64_t begin, int64_t end, bool advanced);
int64_t importance(const epi_importance_tensor&, int64_t begin, int64_t end, float grad_factor, bool keep_finite,
                   Range*);
void gradient_sums(const epi_sums_tensor&, int64_t begin, int64_t end);
void score_histogram(const epi_score_tensor&, int64_t begin, int64_t end, int64_t prefix, int32_t shift,
                     int32_t digit_bits, uint32_t* histogram);
LockCounts lock(const epi_score_tensor&, int64_t begin, int64_t end, float threshold);
void gather(int32_t rule, const epi_gather_tensor&, int64_t begin, int64_t end);

}  // namespace EPI_LEVEL
#endif

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
#endif

}  // namespace epi
