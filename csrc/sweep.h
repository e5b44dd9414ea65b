// What a sweep does to one entry: it advances the importance, applies the rule, and leaves the parameter where its lock
// bit is set. Contract: epi_kernels.ops.sweep_.
#pragma once

#include <cstdint>

#include "importance.h"
#include "schema.h"

namespace epi {
namespace {

// Where the lock bit of an entry is: nowhere; in its importance; in the rule's importance slot; in a byte of its own.
enum class Lock { none, importance, slot, fixed };

// Change the slots and the importance; return the parameter after the step.
//
// Rule: see csrc/rules. `advanced`: this step's squared gradient is in the importance, or in the importance slot,
// already. `optional`: the optional slots are there. grad: with its sign and factor. nonfinite: counts squares that are
// NaN or infinite, where the importance is advanced here.
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
        slot = magnitude(slot);  // where it does not serve, lock bits may be left from a time when it did
    }
    if constexpr (advances) nonfinite += is_finite(grad * grad) ? 0 : 1;
    const float next = Rule::template update<in_slot, optional>(param, grad, slots, s);
    if constexpr (in_slot) slots[Rule::IMPORTANCE_SLOT] = with_lock(slots[Rule::IMPORTANCE_SLOT], locked);
    return lock == Lock::none ? next : selected(locked, param, next);
}

}  // namespace
}  // namespace epi
