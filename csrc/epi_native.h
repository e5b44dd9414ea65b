/* The C interface of the native backend: plain memory, no torch.
 *
 * Every call takes an array of tensors, one struct each, and works on all of them together. Tensors are flat: `size`
 * entries side by side, in any order, but the same order for all pointers of one struct. No two tensors overlap.
 * Results do not depend on the number of threads, nor on the SIMD level. Meaning of the values: the docstrings of
 * epi_kernels/ops/functional.py.
 *
 * schema.h has the structs. Where a function changes, raise _INTERFACE in epi_kernels/schema.py.
 */
#ifndef EPI_NATIVE_H
#define EPI_NATIVE_H

#include <stdint.h>

#include "schema.h"

#define EPI_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* EPI_VERSION of schema.h: a binding made from another version of schema.h must not use the library. */
EPI_EXPORT int32_t epi_abi_version(void);

/* The compiler that built the library, and its version. */
EPI_EXPORT const char* epi_compiler(void);

/* The instruction set in use: 1 is the compiler's baseline, 3 x86-64-v3 (AVX2, FMA), 4 x86-64-v4 (AVX-512). The best
 * set that this machine has, but at most the number in the environment variable EPI_KERNELS_SIMD_LEVEL. The choice is
 * made once.
 */
EPI_EXPORT int32_t epi_simd_level(void);

/* One step of a rule (enum epi_rule). `advanced`: the signed tensor already has this step's squared gradient. */
EPI_EXPORT void epi_sweep(epi_sweep_tensor* tensors, int64_t count, int32_t rule, int32_t advanced, int32_t threads);

/* Advance the importance by the gradient times `grad_factor`; ranges: [layer_count][2], written, (inf, -inf) for a
 * layer without entries; or NULL: they are not wanted, and cost a third of the time. */
EPI_EXPORT void epi_importance(epi_importance_tensor* tensors, int64_t count, float* ranges, int64_t layer_count,
                               float grad_factor, int32_t keep_finite, int32_t threads);

/* sum += g, square_sum += g * g. */
EPI_EXPORT void epi_gradient_sums(const epi_sums_tensor* tensors, int64_t count, int32_t threads);

/* Count scores by the `digit_bits` bits above the lowest `shift` where the bits above are prefixes[budget].
 * counts: [budgets][1 << digit_bits], which the function adds to; digit_bits <= 16. */
EPI_EXPORT void epi_score_histogram(const epi_score_tensor* tensors, int64_t count, const int64_t* prefixes,
                                    int32_t shift, int32_t digit_bits, int64_t* counts, int32_t threads);

/* Find one digit of the k-th largest score of every budget. selection: [budgets][2], the digits found so far and k
 * among the scores that have these digits, written; counts: [parts][budgets][bins], which the function sums over the
 * parts; thresholds: [budgets], written. */
EPI_EXPORT void epi_select_digit(int64_t* selection, int64_t budgets, const int64_t* counts, int64_t parts,
                                 int64_t bins, int32_t shift, float* thresholds);

/* Lock where score >= thresholds[budget] and score > 0, release elsewhere. */
EPI_EXPORT void epi_lock(epi_score_tensor* tensors, int64_t count, const float* thresholds, int32_t threads);

/* One step of a rule over the trainable entries. */
EPI_EXPORT void epi_gather(const epi_gather_tensor* tensors, int64_t count, int32_t rule, int32_t threads);

/* values[i] = memory[positions[i]], bit for bit. */
EPI_EXPORT void epi_take(epi_positions_tensor* tensors, int64_t count, int32_t threads);

/* memory[positions[i]] = values[i], bit for bit. */
EPI_EXPORT void epi_put(epi_positions_tensor* tensors, int64_t count, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
