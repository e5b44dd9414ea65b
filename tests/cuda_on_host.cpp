// The CUDA kernels without CUDA: the same headers, with a loop where a GPU has blocks and threads. See
// test_cuda_on_host.py.
#include "../csrc/cuda/threshold.h"

using namespace epi::cuda;

constexpr int32_t THREADS = 256;

extern "C" int64_t histogram_chunk() { return HISTOGRAM_CHUNK; }

extern "C" void score_histogram(const int64_t* rows, const int64_t* chunks, int64_t chunk_count, const float* ranges,
                                const int64_t* selection, int32_t shift, int32_t digit_bits, int64_t* counts) {
    for (int64_t block = 0; block < chunk_count; ++block) {
        const int64_t number = chunks[block];
        const auto& row = reinterpret_cast<const epi_score_row*>(rows)[tensor_of(number)];
        const Chunk chunk = chunk_of(number, HISTOGRAM_CHUNK, row.size, row.aligned != 0);
        int64_t* const bins = counts + (row.budget << digit_bits);
        for (int32_t thread = 0; thread < THREADS; ++thread)
            bins[0] += histogram(row, chunk, range_of(row, ranges), digit_of(row, selection, shift, digit_bits), thread,
                                 THREADS, [&](uint32_t bin) { ++bins[bin]; });
    }
}
