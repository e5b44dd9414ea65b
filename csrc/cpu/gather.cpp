// One step of a rule over trainable entries: gather, step, scatter. Contract: epi_kernels.ops.gather_.
#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "scalars.h"

namespace epi::EPI_LEVEL {
namespace {

// Entries at a time; the buffers stay in the first-level cache. Nothing is prefetched: the gather itself keeps a
// processor that executes out of order busy with as many cache lines. Prefetching the lines of the next block made a
// step over 2^22 to 2^27 entries, 0.1% of them trainable, take 1.2 to 1.6 times as long (one core of a Xeon with
// AVX-512).
constexpr int64_t GATHERED = 512;

template <typename Storage, typename Offset>
void gather_entries(const void* memory, const Offset* offsets, int64_t size, float* __restrict values) {
    const auto* const entries = static_cast<const typename Storage::Memory*>(memory);
    for (int64_t i = 0; i < size; ++i) values[i] = Storage::load(entries[offsets[i]]);
}

// Gather bfloat16 parameters, which stay in `params`, and join them with their rests.
template <typename Rest, typename Offset>
void gather_joined(const void* memory, const Offset* offsets, const Rest* rests, int64_t size, uint16_t* params,
                   float* values) {
    const auto* const entries = static_cast<const uint16_t*>(memory);
    for (int64_t i = 0; i < size; ++i) params[i] = entries[offsets[i]];
    join(params, rests, size, values);
}

template <typename Storage, typename Offset>
void scatter_entries(const typename Storage::Memory* from, void* memory, const Offset* offsets, int64_t size) {
    auto* const entries = static_cast<typename Storage::Memory*>(memory);
    for (int64_t i = 0; i < size; ++i) entries[offsets[i]] = from[i];
}

template <typename Param, typename Grad, typename Offset>
void step(int32_t rule, const epi_gather_tensor& tensor, int64_t begin, int64_t end) {
    alignas(64) float params[GATHERED];
    alignas(64) float grads[GATHERED];
    alignas(64) float slots[EPI_SLOTS][GATHERED];
    alignas(64) uint32_t mixed[GATHERED];
    alignas(64) uint16_t halves[GATHERED];
    const Offset* const param_offsets = static_cast<const Offset*>(tensor.param_offsets);
    const Offset* const grad_offsets = static_cast<const Offset*>(tensor.grad_offsets);
    const Offset* const positions = static_cast<const Offset*>(tensor.positions);
    const float free[GATHERED] = {};  // no lock
    epi_sweep_tensor dense = {};
    dense.param = params;
    dense.grad = grads;
    std::memcpy(dense.scalars, tensor.scalars, sizeof dense.scalars);
    const Place place = Place::of(tensor, Scalars{tensor.scalars}.of_sweep().step);
    bool narrow = false;
    for (int k = 0; k < EPI_SLOTS; ++k) narrow = narrow || tensor.slot_dtypes[k] != EPI_FLOAT32;
    const bool noisy = tensor.run > 0 && (narrow || tensor.stochastic);
    const Blocks blocks = blocks_of(tensor);
    for (int64_t i = begin; i < end; i += GATHERED) {
        const int64_t size = end - i < GATHERED ? end - i : GATHERED;
        const Run run = {i, size, 0};
        if (!tensor.rest)
            gather_entries<Param>(tensor.param, param_offsets + i, size, params);
        else if (tensor.rest_bits == 16)
            gather_joined(tensor.param, param_offsets + i, static_cast<const int16_t*>(tensor.rest) + i, size, halves,
                          params);
        else
            gather_joined(tensor.param, param_offsets + i, static_cast<const int8_t*>(tensor.rest) + i, size, halves,
                          params);
        gather_entries<Grad>(tensor.grad, grad_offsets + i, size, grads);
        const auto slot = [&](int k) { return Stored{tensor.slots[k], nullptr, tensor.slot_dtypes[k]}; };
        for (int k = 0; k < EPI_SLOTS; ++k)
            dense.slots[k] = tensor.slots[k] ? opened(slot(k), blocks, run, slots[k]) : nullptr;
        sweep(rule, dense, 0, size, false);
        if (noisy) place.gather(mixed, positions + i, size);
        const uint32_t* const noise = noisy ? mixed : nullptr;
        const uint32_t* const of_param = tensor.stochastic ? noise : nullptr;
        for (int k = 0; k < EPI_SLOTS; ++k)
            if (tensor.slots[k])
                closed(static_cast<const float*>(dense.slots[k]), slot(k), blocks, run,
                       {noise, NOISE_OF_SLOT[k], false});
        if constexpr (is_float32<Param>) {
            scatter_entries<Param>(params, tensor.param, param_offsets + i, size);
        } else {
            if (!tensor.rest)
                closed<Param>(params, halves, size, of_param, NOISE_PARAM);
            else if (tensor.rest_bits == 16)
                split(params, halves, static_cast<int16_t*>(tensor.rest) + i, size, free, of_param);
            else
                split(params, halves, static_cast<int8_t*>(tensor.rest) + i, size, free, of_param);
            scatter_entries<Param>(halves, tensor.param, param_offsets + i, size);
        }
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
