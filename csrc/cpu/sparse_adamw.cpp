// One AdamW step of selected entries: gather, step, scatter. Contract: epi_kernels.ops.sparse_adamw_.
#include "convert.h"
#include "kernels.h"

namespace epi::EPI_LEVEL {
namespace {

// entries at a time: two of them fit the second-level cache at a line for each parameter and gradient. The next piece's
// lines are asked for before this piece is computed: the memory's latency is what a gather waits for. With 128 instead
// a step of 2^26 entries of which 0.1% are selected took 15% longer on an AMD EPYC, on two threads more
constexpr int64_t PIECE = 512;

// Parameters into the second-level cache, gradients past it: read once, they would only push lines out. Against the
// default, both into every cache, that took 12 to 15% off a step of 2^26 entries of which 0.1% are selected.
template <typename Offset>
void prefetch(const epi_sparse_tensor& tensor, const Offset* params, const Offset* grads, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        __builtin_prefetch(at(tensor.param, tensor.param_dtype, params[i]), 0, 1);
        __builtin_prefetch(at(tensor.grad, tensor.grad_dtype, grads[i]), 0, 0);
    }
}

template <typename Offset>
void gather(const void* memory, int32_t dtype, const Offset* offsets, int64_t size, float* __restrict values) {
    const uint16_t* const halves = static_cast<const uint16_t*>(memory);
    if (dtype == EPI_FLOAT32)
        for (int64_t i = 0; i < size; ++i) values[i] = static_cast<const float*>(memory)[offsets[i]];
    else if (dtype == EPI_BFLOAT16)
        for (int64_t i = 0; i < size; ++i) values[i] = from_bfloat16(halves[offsets[i]]);
    else
        for (int64_t i = 0; i < size; ++i) values[i] = from_float16(halves[offsets[i]]);
}

template <typename Offset>
void scatter(const float* __restrict values, void* memory, int32_t dtype, const Offset* offsets, int64_t size) {
    uint16_t* const halves = static_cast<uint16_t*>(memory);
    if (dtype == EPI_FLOAT32)
        for (int64_t i = 0; i < size; ++i) static_cast<float*>(memory)[offsets[i]] = values[i];
    else if (dtype == EPI_BFLOAT16)
        for (int64_t i = 0; i < size; ++i) halves[offsets[i]] = to_bfloat16(values[i]);
    else
        for (int64_t i = 0; i < size; ++i) halves[offsets[i]] = to_float16(values[i]);
}

template <typename Offset>
void step(const epi_sparse_tensor& tensor, int64_t begin, int64_t end) {
    alignas(64) float params[PIECE];
    alignas(64) float grads[PIECE];
    const Offset* const param_offsets = static_cast<const Offset*>(tensor.param_offsets);
    const Offset* const grad_offsets = static_cast<const Offset*>(tensor.grad_offsets);
    for (int64_t i = begin; i < end; i += PIECE) {
        const int64_t size = end - i < PIECE ? end - i : PIECE;
        const int64_t next = i + PIECE < end ? i + PIECE : end;
        const int64_t next_size = end - next < PIECE ? end - next : PIECE;
        prefetch(tensor, param_offsets + next, grad_offsets + next, next_size);

        gather(tensor.param, tensor.param_dtype, param_offsets + i, size, params);
        gather(tensor.grad, tensor.grad_dtype, grad_offsets + i, size, grads);
        epi_adamw_tensor dense = {};
        dense.param = params;
        dense.grad = grads;
        dense.exp_avg = tensor.exp_avg + i;
        dense.exp_avg_sq = tensor.exp_avg_sq + i;
        dense.param_dtype = dense.grad_dtype = EPI_FLOAT32;
        dense.scalars = tensor.scalars;
        masked_adamw(dense, 0, size, false);  // zero: EPI_LOCK_NONE
        scatter(params, tensor.param, tensor.param_dtype, param_offsets + i, size);
    }
}

}  // namespace

void sparse_adamw(const epi_sparse_tensor& tensor, int64_t begin, int64_t end) {
    if (tensor.wide_offsets)
        step<int64_t>(tensor, begin, end);
    else
        step<int32_t>(tensor, begin, end);
}

}  // namespace epi::EPI_LEVEL
