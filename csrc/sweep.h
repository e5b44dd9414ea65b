// What a sweep does to one entry: it advances the importance, applies the rule, and leaves the parameter where its lock
// bit is set. Contract: epi_kernels.ops.sweep_.
#pragma once

#include <cstdint>

#include "importance.h"
#include "schema.h"

namespace epi {
namespace {

// Where an entry's lock bit is: nowhere, in its importance, in the rule's importance slot, or in a byte of its own.
enum class Lock { none, importance, slot, fixed };

// Change the slots and the importance; return the parameter after the step.
//
// Rule: see csrc/rules. `advanced`: the importance, or the importance slot, already has this step's squared gradient.
// `optional`: the tensor has the optional slots. grad: the gradient times its sign and factor. nonfinite: counts
// squares that are NaN or infinite, if the importance is advanced here.
template <typename Rule, Lock lock, bool advanced, bool optional>
inline float sweep_entry(float param, float grad, float* slots, float& importance, int8_t fixed,
                         const epi_sweep_scalars& all, const typename Rule::Scalars& s, int32_t& nonfinite) {
    constexpr bool in_slot = lock == Lock::slot;
    constexpr bool advances = (lock == Lock::importance || in_slot) && !advanced;
    bool locked = lock == Lock::fixed && fixed < 0;
    if constexpr (lock == Lock::importance) {
        locked = is_locked(importance);
        if constexpr (advances)
            importance =
                advanced_importance(importance, grad, all.importance_beta, all.one_minus_importance_beta, true);
    }
    if constexpr (Rule::IMPORTANCE_SLOT >= 0) {
        float& slot = slots[Rule::IMPORTANCE_SLOT];
        if constexpr (in_slot) locked = is_locked(slot);
        if constexpr (in_slot && advances)
            slot = advanced_importance(slot, grad, all.importance_beta, all.one_minus_importance_beta, false);
        slot = magnitude(slot);  // a slot that is not the importance may have lock bits from a time when it was
    }
    if constexpr (advances) nonfinite += is_finite(grad * grad) ? 0 : 1;
    const float next = Rule::template update<in_slot, optional>(param, grad, slots, s);
    if constexpr (in_slot) slots[Rule::IMPORTANCE_SLOT] = with_lock(slots[Rule::IMPORTANCE_SLOT], locked);
    return lock == Lock::none ? next : selected(locked, param, next);
}

}  // namespace
}  // namespace epi
