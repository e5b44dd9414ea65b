/* The C interface of the CUDA kernels: device memory, no torch.
 *
 * A table of rows, int64 words in device memory, describes the tensors of a call; a table of pieces says what each
 * block works on: tensor << EPI_CUDA_PIECE_BITS | number of the piece in that tensor. Tensors are flat as in
 * epi_native.h, and no two overlap. Meaning of the values: the docstrings of epi_kernels/ops/functional.py.
 *
 * Functions that launch return a cudaError_t at once: 0 is launched, and no pieces launch nothing. Without a driver or
 * a device they return an error too. They allocate nothing and wait for nothing, so that a graph can capture them.
 *
 * The FIELDS in epi_kernels/ops/masked_adamw/sweep.py and ops/threshold/rows.py repeat these structs: change both, and
 * EPI_CUDA_ABI_VERSION with them.
 */
#ifndef EPI_CUDA_H
#define EPI_CUDA_H

#include <stdint.h>

#include "epi_native.h" /* epi_scalars, epi_dtype, epi_lock_in, EPI_EXPORT */

#define EPI_CUDA_ABI_VERSION 2
#define EPI_CUDA_PIECE_BITS 40

#ifdef __cplusplus
extern "C" {
#endif

/* `aligned` is 1 where every address of the row is a multiple of 16 bytes, 0 included: such a tensor is read and
 * written four entries at a time. */
typedef struct {
    int64_t size;
    int64_t param; /* written */
    int64_t grad;
    int64_t exp_avg;        /* float, written */
    int64_t exp_avg_sq;     /* float, written; signed with EPI_LOCK_EXP_AVG_SQ */
    int64_t max_exp_avg_sq; /* float, written; 0: no AMSGrad */
    int64_t lock;           /* signed float importance, written; int8 with EPI_LOCK_STATIC; with EPI_LOCK_EXP_AVG_SQ any
                               number; 0: this tensor has no lock */
    int64_t scalars;        /* row of `scalars` */
    int64_t aligned;
} epi_cuda_adamw_row;

typedef struct {
    int64_t size;
    int64_t importance; /* signed float */
    int64_t layer;
    int64_t budget;
    int64_t aligned;
} epi_cuda_score_row;

EPI_EXPORT int32_t epi_cuda_abi_version(void);

/* The sizes of the structs above, in their order: what a binding compares its own with. */
EPI_EXPORT extern const int64_t epi_cuda_row_sizes[2];

/* The compiler that built the library, and its version. */
EPI_EXPORT const char* epi_cuda_compiler(void);

/* Entries of a piece of epi_cuda_masked_adamw, and of epi_cuda_score_histogram. */
EPI_EXPORT int64_t epi_cuda_sweep_piece(void);
EPI_EXPORT int64_t epi_cuda_histogram_piece(void);

/* 0 if the current device can run the kernels, else why not. */
EPI_EXPORT int32_t epi_cuda_device_error(void);

/* One AdamW step.
 *
 * rows: epi_cuda_adamw_row, on the device.
 * scalars: epi_scalars, on the device.
 * nonfinite: one count for each tensor, on the device, added to.
 * grad_factor: on the device; every gradient is multiplied by it first. NULL: 1.
 * found_inf: on the device; where it is not 0 nothing changes at all. NULL: 0.
 * advanced: this step's squared gradient is in the signed tensor already.
 * refreshed: on the device; where it is not 0 it stands for `advanced`. NULL: 0. */
EPI_EXPORT int32_t epi_cuda_masked_adamw(const int64_t* rows, const int64_t* pieces, int64_t piece_count,
                                         const float* scalars, int64_t* nonfinite, const float* refreshed,
                                         const float* grad_factor, const float* found_inf, int32_t param_dtype,
                                         int32_t grad_dtype, int32_t lock_in, int32_t advanced, void* stream);

/* Count scores by the `digit_bits` bits above the lowest `shift` where the bits above are the budget's prefix.
 *
 * rows: epi_cuda_score_row, on the device.
 * ranges: [layers][2] on the device; NULL: the score is S itself.
 * selection: [budgets][2] on the device: the prefix, and a rank that is not read.
 * digit_bits: 1 to 12.
 * counts: [budgets][1 << digit_bits] on the device, added to. */
EPI_EXPORT int32_t epi_cuda_score_histogram(const int64_t* rows, const int64_t* pieces, int64_t piece_count,
                                            const float* ranges, const int64_t* selection, int32_t shift,
                                            int32_t digit_bits, int64_t* counts, void* stream);

#ifdef __cplusplus
}
#endif

#endif
