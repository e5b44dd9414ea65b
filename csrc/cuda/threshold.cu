// One launch for the histograms of all tensors; a block keeps its own histogram until its chunk is counted. The work is
// in threshold.h. This file also has the functions that describe the library.
#include "threshold.h"

#define TEXT_OF(value) #value
#define TEXT(value) TEXT_OF(value)

namespace epi::cuda {
namespace {

constexpr int32_t THREADS = 256;

__global__ void __launch_bounds__(THREADS)
    score_histogram_kernel(const epi_score_row* __restrict__ rows, const int64_t* __restrict__ chunks,
                           const float* __restrict__ ranges, const int64_t* __restrict__ selection,
                           const float* __restrict__ due, int32_t shift, int32_t digit_bits,
                           unsigned long long* __restrict__ counts) {
    __shared__ uint32_t bins[1 << LARGEST_DIGIT];
    if (due && *due == 0.0f) return;  // all threads of all blocks
    const int64_t number = chunks[blockIdx.x];
    const epi_score_row row = rows[tensor_of(number)];
    const Chunk chunk = chunk_of(number, HISTOGRAM_CHUNK, row.size, row.aligned != 0);
    const int32_t bin_count = 1 << digit_bits;
    for (int32_t i = threadIdx.x; i < bin_count; i += THREADS) bins[i] = 0;
    const Digit digit = digit_of(row, selection, shift, digit_bits);
    __syncthreads();

    // the constant 1 lets the hardware add up equal bins of a warp: ATOMS.POPC.INC
    const uint32_t zeros = __reduce_add_sync(~0u, histogram(row, chunk, range_of(row, ranges), digit, threadIdx.x,
                                                            THREADS, [](uint32_t bin) { atomicAdd(&bins[bin], 1u); }));
    if (zeros && threadIdx.x % 32 == 0) atomicAdd(&bins[0], zeros);
    __syncthreads();

    unsigned long long* const total = counts + (row.budget << digit_bits);
    for (int32_t i = threadIdx.x; i < bin_count; i += THREADS)
        if (bins[i]) atomicAdd(&total[i], static_cast<unsigned long long>(bins[i]));
}

}  // namespace
}  // namespace epi::cuda

using namespace epi::cuda;

int32_t epi_cuda_abi_version(void) { return EPI_VERSION; }

const char* epi_cuda_compiler(void) {
    return "nvcc " TEXT(__CUDACC_VER_MAJOR__) "." TEXT(__CUDACC_VER_MINOR__) "." TEXT(__CUDACC_VER_BUILD__);
}

int32_t epi_cuda_device_error(void) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, score_histogram_kernel);
}

int64_t epi_cuda_histogram_chunk(void) { return HISTOGRAM_CHUNK; }

int32_t epi_cuda_score_histogram(const int64_t* rows, const int64_t* chunks, int64_t chunk_count, const float* ranges,
                                 const int64_t* selection, const float* due, int32_t shift, int32_t digit_bits,
                                 int64_t* counts, void* stream) {
    if (chunk_count == 0) return cudaSuccess;
    if (chunk_count < 0 || chunk_count > INT32_MAX || shift < 0 || digit_bits < 1 || digit_bits > LARGEST_DIGIT ||
        shift + digit_bits > 31)
        return cudaErrorInvalidValue;
    score_histogram_kernel<<<static_cast<uint32_t>(chunk_count), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const epi_score_row*>(rows), chunks, ranges, selection, due, shift, digit_bits,
        reinterpret_cast<unsigned long long*>(counts));
    return cudaGetLastError();
}
