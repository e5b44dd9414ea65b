/* The C interface of the CUDA kernels: device memory, no torch.
 *
 * A table of rows, int64 words in device memory, describes the tensors of a call; a table of chunks says what each
 * block works on: tensor << EPI_CHUNK_BITS | number of the chunk in that tensor. Tensors are flat as in
 * epi_native.h, and no two overlap. Meaning of the values: the docstrings of epi_kernels/ops/functional.py.
 *
 * Functions that launch return a cudaError_t at once: 0 means launched, and without chunks nothing is launched. Without
 * a driver or a device they also return an error. They allocate nothing and wait for nothing, so that a graph can
 * capture them.
 *
 * schema.h has the rows. Where a function changes, raise _INTERFACE in epi_kernels/schema.py.
 */
#ifndef EPI_CUDA_H
#define EPI_CUDA_H

#include <stdint.h>

#include "schema.h"

#define EPI_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* EPI_VERSION of schema.h: a binding made from another version of schema.h must not use the library. */
EPI_EXPORT int32_t epi_cuda_abi_version(void);

/* The compiler that built the library, and its version. */
EPI_EXPORT const char* epi_cuda_compiler(void);

/* The number of entries in a chunk of epi_cuda_score_histogram. */
EPI_EXPORT int64_t epi_cuda_histogram_chunk(void);

/* 0 if the current device can run the kernels, else why not. */
EPI_EXPORT int32_t epi_cuda_device_error(void);

/* Count scores by the `digit_bits` bits above the lowest `shift` where the bits above are the budget's prefix.
 *
 * rows: epi_score_row, on the device. Where `aligned` is 1 a tensor is read four entries at a time.
 * ranges: [layers][2] on the device; NULL: the score is S itself.
 * selection: [budgets][2] on the device: the prefix, and k, which is not read.
 * due: one value on the device; if it is 0, nothing is counted. NULL: 1.
 * digit_bits: 1 to 12.
 * counts: [budgets][1 << digit_bits] on the device; the kernel adds to them. */
EPI_EXPORT int32_t epi_cuda_score_histogram(const int64_t* rows, const int64_t* chunks, int64_t chunk_count,
                                            const float* ranges, const int64_t* selection, const float* due,
                                            int32_t shift, int32_t digit_bits, int64_t* counts, void* stream);

#ifdef __cplusplus
}
#endif

#endif
