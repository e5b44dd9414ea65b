/* The C interface of the native backend: plain memory, no torch.
 *
 * Every call takes an array of tensors, one struct each, and works on all of them together. Tensors are flat: `size`
 * entries side by side, in any order that is the same for all pointers of one struct. No two tensors overlap. Results
 * do not depend on the number of threads, nor on the SIMD level. Meaning of the values: the docstrings of
 * epi_kernels/ops/functional.py.
 *
 * epi_kernels/native.py repeats these structs: change both, and EPI_ABI_VERSION with them.
 */
#ifndef EPI_NATIVE_H
#define EPI_NATIVE_H

#include <stdint.h>

#define EPI_ABI_VERSION 3
#define EPI_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum epi_dtype { EPI_FLOAT32, EPI_BFLOAT16, EPI_FLOAT16 };
enum epi_lock_in { EPI_LOCK_NONE, EPI_LOCK_IMPORTANCE, EPI_LOCK_EXP_AVG_SQ, EPI_LOCK_STATIC };

/* A row of epi_kernels.contract.Scalars, in its order. */
typedef struct {
    float sign;
    float decay;
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float step_size;
    float bias_correction2_sqrt;
    float eps;
    float importance_beta;
    float one_minus_importance_beta;
} epi_scalars;

typedef struct {
    int64_t size;
    void* param; /* written */
    const void* grad;
    float* exp_avg;        /* written */
    float* exp_avg_sq;     /* written; signed with EPI_LOCK_EXP_AVG_SQ */
    float* max_exp_avg_sq; /* written; NULL: no AMSGrad */
    void* lock; /* signed float importance, written; int8 with EPI_LOCK_STATIC; NULL where the lock has no tensor */
    int64_t nonfinite; /* result: entries whose squared gradient is NaN or infinite */
    int32_t param_dtype;
    int32_t grad_dtype;
    int32_t lock_in; /* enum epi_lock_in */
    epi_scalars scalars;
} epi_adamw_tensor;

typedef struct {
    int64_t size;
    float* importance; /* signed; written where there is a gradient */
    const void* grad;  /* NULL: the range alone */
    int64_t nonfinite; /* result */
    int32_t grad_dtype;
    int32_t layer;
    float beta;
    float one_minus_beta;
} epi_importance_tensor;

typedef struct {
    int64_t size;
    float* sum;        /* written */
    float* square_sum; /* written */
    const void* grad;
    int32_t grad_dtype;
} epi_sums_tensor;

typedef struct {
    int64_t size;
    float* importance; /* signed; sign bits written by epi_lock */
    int64_t locked;    /* results of epi_lock */
    int64_t newly_locked;
    int64_t released;
    float low; /* range of the tensor's layer */
    float high;
    int32_t normalized; /* 0: the score is S itself */
    int32_t budget;
} epi_score_tensor;

typedef struct {
    int64_t size; /* number of selected entries */
    void* param;  /* written at the offsets alone */
    const void* grad;
    const void* param_offsets; /* of the selected entries from `param`, in entries; distinct */
    const void* grad_offsets;
    float* exp_avg; /* [size], written */
    float* exp_avg_sq;
    int32_t param_dtype;
    int32_t grad_dtype;
    int32_t wide_offsets; /* 1: int64, 0: int32 */
    epi_scalars scalars;
} epi_sparse_tensor;

EPI_EXPORT int32_t epi_abi_version(void);

/* The sizes of the structs above, in their order from epi_adamw_tensor on: what a binding compares its own with. */
EPI_EXPORT extern const int64_t epi_struct_sizes[5];

/* The compiler that built the library, and its version. */
EPI_EXPORT const char* epi_compiler(void);

/* The instruction set in use: 1 is the compiler's baseline, 3 x86-64-v3 (AVX2, FMA), 4 x86-64-v4 (AVX-512). */
EPI_EXPORT int32_t epi_simd_level(void);

/* Use the highest level that this machine has and that is at most `level`; return it. */
EPI_EXPORT int32_t epi_limit_simd_level(int32_t level);

/* One AdamW step. `advanced`: this step's squared gradient is in the signed tensor already. */
EPI_EXPORT void epi_masked_adamw(epi_adamw_tensor* tensors, int64_t count, int32_t advanced, int32_t threads);

/* Advance the importance by the gradient times `grad_factor`; ranges: [layer_count][2], written, (inf, -inf) for a
 * layer without entries. */
EPI_EXPORT void epi_importance(epi_importance_tensor* tensors, int64_t count, float* ranges, int64_t layer_count,
                               float grad_factor, int32_t keep_finite, int32_t threads);

/* sum += g, square_sum += g * g. */
EPI_EXPORT void epi_gradient_sums(const epi_sums_tensor* tensors, int64_t count, int32_t threads);

/* Count scores by the `digit_bits` bits above the lowest `shift` where the bits above are prefixes[budget].
 * counts: [budgets][1 << digit_bits], added to; digit_bits <= 16. */
EPI_EXPORT void epi_score_histogram(const epi_score_tensor* tensors, int64_t count, const int64_t* prefixes,
                                    int32_t shift, int32_t digit_bits, int64_t* counts, int32_t threads);

/* Lock where score >= thresholds[budget] and score > 0, release elsewhere. */
EPI_EXPORT void epi_lock(epi_score_tensor* tensors, int64_t count, const float* thresholds, int32_t threads);

/* One AdamW step of the selected entries. */
EPI_EXPORT void epi_sparse_adamw(const epi_sparse_tensor* tensors, int64_t count, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
