// One launch for the AdamW steps of all tensors of a dtype combination; the work is in masked_adamw.h.
#include "masked_adamw.h"

namespace epi::cuda {
namespace {

constexpr int32_t THREADS = 256;
constexpr int32_t BLOCKS = 4;  // on a processor: 64 registers, and nothing spills

template <typename Param, typename Grad>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    masked_adamw_kernel(const epi_cuda_adamw_row* __restrict__ rows, const int64_t* __restrict__ pieces,
                        const epi_scalars* __restrict__ scalars, unsigned long long* __restrict__ nonfinite,
                        const float* __restrict__ refreshed, const float* __restrict__ grad_factor,
                        const float* __restrict__ found_inf, int32_t lock_in, int32_t advanced) {
    if (found_inf && *found_inf != 0.0f) return;
    const int64_t number = pieces[blockIdx.x];
    const epi_cuda_adamw_row row = rows[tensor_of(number)];
    const Piece piece = piece_of(number, SWEEP_PIECE, row.size, row.aligned != 0);
    const bool known = advanced || (refreshed && *refreshed != 0.0f);
    const Step how = step_of(row, scalars[row.scalars], grad_factor ? *grad_factor : 1.0f, lock_in, known);
    const uint32_t found = __reduce_add_sync(~0u, sweep<Param, Grad>(row, piece, how, threadIdx.x, THREADS));
    if (found && threadIdx.x % 32 == 0) atomicAdd(&nonfinite[piece.tensor], found);
}

}  // namespace
}  // namespace epi::cuda

using namespace epi::cuda;

int64_t epi_cuda_sweep_piece(void) { return SWEEP_PIECE; }

int32_t epi_cuda_masked_adamw(const int64_t* rows, const int64_t* pieces, int64_t piece_count, const float* scalars,
                              int64_t* nonfinite, const float* refreshed, const float* grad_factor,
                              const float* found_inf, int32_t param_dtype, int32_t grad_dtype, int32_t lock_in,
                              int32_t advanced, void* stream) {
    if (piece_count == 0) return cudaSuccess;
    if (piece_count < 0 || piece_count > INT32_MAX || lock_in < EPI_LOCK_NONE || lock_in > EPI_LOCK_STATIC)
        return cudaErrorInvalidValue;
    return visit_dtypes(param_dtype, grad_dtype, cudaErrorInvalidValue, [&](auto param, auto grad) -> int32_t {
        masked_adamw_kernel<decltype(param), decltype(grad)>
            <<<static_cast<uint32_t>(piece_count), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
                reinterpret_cast<const epi_cuda_adamw_row*>(rows), pieces,
                reinterpret_cast<const epi_scalars*>(scalars), reinterpret_cast<unsigned long long*>(nonfinite),
                refreshed, grad_factor, found_inf, lock_in, advanced);
        return cudaGetLastError();
    });
}
