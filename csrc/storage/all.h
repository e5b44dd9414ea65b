// The storages, and which storage each dtype number of schema.h stands for.
#pragma once

#include "../schema.h"
#include "block8.h"
#include "float32.h"
#include "half.h"
#include "noise.h"
#include "split.h"

namespace epi {
namespace {

// Call `visit` with the storage of a dtype whose entries are converted one by one; any number that is neither float32
// nor bfloat16 counts as float16.
template <typename Visit>
inline auto with_storage(int32_t dtype, const Visit& visit) {
    if (dtype == EPI_FLOAT32) return visit(Float32{});
    if (dtype == EPI_BFLOAT16) return visit(BFloat16{});
    return visit(Float16{});
}

}  // namespace
}  // namespace epi
