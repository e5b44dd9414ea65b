# mypy: allow-untyped-defs, allow-incomplete-defs
"""Lion in Triton, in float32, with the names, equations and roundings of lion.py."""

import triton
import triton.language as tl

from epi_kernels.ops.tiles import Budget


@triton.jit
def update(param, grad, slots, scalars, given, OPTIONAL: tl.constexpr):
    """Return (theta, slots) after the step; arguments as in adamw_triton.py."""
    exp_avg = slots[0]
    decay, lr, beta1, one_minus_beta1, beta2, one_minus_beta2 = scalars
    direction = sign(exp_avg * beta1 + grad * one_minus_beta1)
    return param * decay - direction * lr, (exp_avg * beta2 + grad * one_minus_beta2,)


@triton.jit
def sign(value):
    return tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, value))


SWEEPS = (
    # without a branch that advances importances, the compiler reads what is needed last, the weights and a lock, after
    # its first wait. With at most 44 registers, 11 programs share a processor and wait at different times
    Budget("Lion, float32", 27, late_reads=1),
    Budget("Lion with locks, float32", 49, lock_in="importance"),
    Budget(
        "Lion with locks after a refresh, float32", 32, lock_in="importance", changes={"ADVANCED": True}, late_reads=2
    ),
    Budget("Lion with locks, bfloat16", 55, "bfloat16", "bfloat16", "importance"),
    Budget("Lion with a fixed mask, float32", 32, lock_in="static", late_reads=1),
    Budget(
        "Lion with locks, stochastic bfloat16",
        85,
        "bfloat16",
        "bfloat16",
        "importance",
        state="bfloat16",
        stochastic=True,
        registers=80,
    ),
)

GATHERS = (Budget("Lion of selected entries, float32", 45),)
