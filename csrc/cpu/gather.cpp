// One step of a rule over trainable entries: gather, step, scatter. Contract: epi_kernels.ops.gather_.
#include <cstring>

#include "convert.h"
#include "kernels.h"

namespace epi::EPI_LEVEL {
namespace {

// Entries at a time; the buffers stay in the first-level cache. Nothing is prefetched: the gather itself keeps a
// processor that executes out of order busy with as many cache lines. Prefetching the lines of the next block made a
// step over 2^22 to 2^27 entries, 0.1% of them trainable, take 1.2 to 1.6 times as long (one core of a Xeon with
// AVX-512).
constexpr int64_t BLOCK = 512;

template <typename Storage, typename Offset>
void gather_entries(const void* memory, const Offset* offsets, int64_t size, float* __restrict values) {
    const auto* const entries = static_cast<const typename Storage::Memory*>(memory);
    for (int64_t i = 0; i < size; ++i) values[i] = Storage::load(entries[offsets[i]]);
}

template <typename Storage, typename Offset>
void scatter_entries(const float* __restrict values, void* memory, const Offset* offsets, int64_t size) {
    auto* const entries = static_cast<typename Storage::Memory*>(memory);
    for (int64_t i = 0; i < size; ++i) entries[offsets[i]] = Storage::store(values[i]);
}

template <typename Param, typename Grad, typename Offset>
void step(int32_t rule, const epi_gather_tensor& tensor, int64_t begin, int64_t end) {
    alignas(64) float params[BLOCK];
    alignas(64) float grads[BLOCK];
    const Offset* const param_offsets = static_cast<const Offset*>(tensor.param_offsets);
    const Offset* const grad_offsets = static_cast<const Offset*>(tensor.grad_offsets);
    epi_sweep_tensor dense = {};  // no lock
    dense.param = params;
    dense.grad = grads;
    dense.param_dtype = dense.grad_dtype = EPI_FLOAT32;
    std::memcpy(dense.scalars, tensor.scalars, sizeof dense.scalars);
    for (int64_t i = begin; i < end; i += BLOCK) {
        const int64_t size = end - i < BLOCK ? end - i : BLOCK;
        gather_entries<Param>(tensor.param, param_offsets + i, size, params);
        gather_entries<Grad>(tensor.grad, grad_offsets + i, size, grads);
        for (int k = 0; k < EPI_SLOTS; ++k)
            dense.slots[k] = tensor.slots[k] ? static_cast<float*>(tensor.slots[k]) + i : nullptr;
        sweep(rule, dense, 0, size, false);
        scatter_entries<Param>(params, tensor.param, param_offsets + i, size);
    }
}

}  // namespace

void gather(int32_t rule, const epi_gather_tensor& tensor, int64_t begin, int64_t end) {
    with_storage(tensor.param_dtype, [&](auto param) {
        with_storage(tensor.grad_dtype, [&](auto grad) {
            if (tensor.wide_offsets)
                step<decltype(param), decltype(grad), int64_t>(rule, tensor, begin, end);
            else
                step<decltype(param), decltype(grad), int32_t>(rule, tensor, begin, end);
        });
    });
}

}  // namespace epi::EPI_LEVEL
