/* The C interface of the CUDA kernels: device memory, no torch.
 *
 * A table of rows, int64 words in device memory, describes the tensors of a call; a table of pieces says what each
 * block works on: tensor << EPI_CUDA_PIECE_BITS | number of the piece in that tensor. Tensors are flat as in
 * epi_native.h, and no two overlap. Meaning of the values: the docstrings of epi_kernels/ops/functional.py.
 *
 * Functions that launch return a cudaError_t at once: 0 is launched, and no pieces launch nothing. Without a driver or
 * a device they return an error too. They allocate nothing and wait for nothing, so that a graph can capture them.
 *
 * The FIELDS in epi_kernels/ops/threshold/rows.py repeat this struct: change both, and EPI_CUDA_ABI_VERSION with them.
 */
#ifndef EPI_CUDA_H
#define EPI_CUDA_H

#include <stdint.h>

#include "epi_native.h" /* EPI_EXPORT */

#define EPI_CUDA_ABI_VERSION 3
#define EPI_CUDA_PIECE_BITS 40

#ifdef __cplusplus
extern "C" {
#endif

/* `aligned` is 1 where every address of the row is a multiple of 16 bytes, 0 included: such a tensor is read
 * four entries at a time. */
typedef struct {
    int64_t size;
    int64_t importance; /* signed float */
    int64_t layer;
    int64_t budget;
    int64_t aligned;
} epi_cuda_score_row;

EPI_EXPORT int32_t epi_cuda_abi_version(void);

/* The size of the struct above: what a binding compares its own with. */
EPI_EXPORT extern const int64_t epi_cuda_row_sizes[1];

/* The compiler that built the library, and its version. */
EPI_EXPORT const char* epi_cuda_compiler(void);

/* Entries of a piece of epi_cuda_score_histogram. */
EPI_EXPORT int64_t epi_cuda_histogram_piece(void);

/* 0 if the current device can run the kernels, else why not. */
EPI_EXPORT int32_t epi_cuda_device_error(void);

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
