// The CUDA kernels without CUDA: the same headers, with a loop where a GPU has blocks and threads. See
// test_cuda_on_host.py.
#include "../csrc/cuda/masked_adamw.h"
#include "../csrc/cuda/threshold.h"

using namespace epi::cuda;

constexpr int32_t THREADS = 256;

extern "C" int64_t sweep_piece() { return SWEEP_PIECE; }
extern "C" int64_t histogram_piece() { return HISTOGRAM_PIECE; }

extern "C" int32_t masked_adamw(const int64_t* rows, const int64_t* pieces, int64_t piece_count, const float* scalars,
                                int64_t* nonfinite, const float* refreshed, const float* grad_factor,
                                const float* found_inf, int32_t param_dtype, int32_t grad_dtype, int32_t lock_in,
                                int32_t advanced) {
    if (found_inf && *found_inf != 0.0f) return 0;
    return visit_dtypes(param_dtype, grad_dtype, 1, [&](auto param, auto grad) -> int32_t {
        for (int64_t block = 0; block < piece_count; ++block) {
            const int64_t number = pieces[block];
            const auto& row = reinterpret_cast<const epi_cuda_adamw_row*>(rows)[tensor_of(number)];
            const Piece piece = piece_of(number, SWEEP_PIECE, row.size, row.aligned != 0);
            const Step how =
                step_of(row, reinterpret_cast<const epi_scalars*>(scalars)[row.scalars],
                        grad_factor ? *grad_factor : 1.0f, lock_in, advanced || (refreshed && *refreshed != 0.0f));
            for (int32_t thread = 0; thread < THREADS; ++thread)
                nonfinite[piece.tensor] += sweep<decltype(param), decltype(grad)>(row, piece, how, thread, THREADS);
        }
        return 0;
    });
}

extern "C" void score_histogram(const int64_t* rows, const int64_t* pieces, int64_t piece_count, const float* ranges,
                                const int64_t* selection, int32_t shift, int32_t digit_bits, int64_t* counts) {
    for (int64_t block = 0; block < piece_count; ++block) {
        const int64_t number = pieces[block];
        const auto& row = reinterpret_cast<const epi_cuda_score_row*>(rows)[tensor_of(number)];
        const Piece piece = piece_of(number, HISTOGRAM_PIECE, row.size, row.aligned != 0);
        int64_t* const bins = counts + (row.budget << digit_bits);
        for (int32_t thread = 0; thread < THREADS; ++thread)
            bins[0] += histogram(row, piece, range_of(row, ranges), digit_of(row, selection, shift, digit_bits), thread,
                                 THREADS, [&](uint32_t bin) { ++bins[bin]; });
    }
}
