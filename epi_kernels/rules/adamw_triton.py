# mypy: allow-untyped-defs, allow-incomplete-defs
"""AdamW in Triton, in float32, with the names, equations and roundings of adamw.py."""

import triton
import triton.language as tl

from epi_kernels.ops.tiles import Budget


@triton.jit
def update(param, grad, slots, scalars, given, OPTIONAL: tl.constexpr):
    """Return (theta, slots) after the step; contract: `epi_kernels.rules.Rule.update`.

    given: whether the importance slot already includes this gradient, one value for the whole program; None means that
    it does not. OPTIONAL: whether the launch has optional slots; an optional slot that this tensor lacks is 0.
    """
    exp_avg, exp_avg_sq, max_exp_avg_sq = slots
    decay, _beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, correction, eps = scalars
    exp_avg = first_moment(exp_avg, grad, one_minus_beta1)
    advanced = second_moment(exp_avg_sq, grad, beta2, one_minus_beta2)
    if given is not None:
        advanced = tl.where(given, exp_avg_sq, advanced)
    largest = advanced
    if OPTIONAL:
        largest = tl.maximum(max_exp_avg_sq, advanced, propagate_nan=tl.PropagateNan.ALL)
        max_exp_avg_sq = largest
    return moved(param, exp_avg, largest, decay, step_size, correction, eps), (exp_avg, advanced, max_exp_avg_sq)


@triton.jit
def first_moment(exp_avg, grad, one_minus_beta1):
    near = one_minus_beta1 < 0.5
    # not one_minus_beta1 - 1, which is +0 where beta1 is 0: a zero moment would then get another sign
    weight = tl.where(near, one_minus_beta1, -(1.0 - one_minus_beta1))
    return tl.fma(weight, grad - exp_avg, tl.where(near, exp_avg, grad))


@triton.jit
def second_moment(exp_avg_sq, grad, beta2, one_minus_beta2):
    return tl.fma(grad * one_minus_beta2, grad, exp_avg_sq * beta2)


@triton.jit
def moved(param, exp_avg, exp_avg_sq, decay, step_size, correction, eps):
    root = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.broadcast_to(correction, exp_avg_sq.shape))
    return param * decay - tl.div_rn(exp_avg * step_size, root + eps)


SWEEPS = (
    Budget("AdamW, float32", 73),
    Budget("EPI, float32", 95, lock_in="importance"),
    Budget("EPI after a refresh, float32", 74, lock_in="importance", changes={"ADVANCED": True}),
    Budget(
        "EPI, float32, factor and found_inf",
        95,
        lock_in="importance",
        changes={"grad_factor": "*fp32", "found_inf": "*fp32"},
    ),
    Budget("EPI in a graph, float32", 97, lock_in="importance", changes={"refreshed": "*fp32"}),
    Budget("EPI, float32, AMSGrad", 99, lock_in="importance", optional=True),
    Budget("EPI, bfloat16", 101, "bfloat16", "bfloat16", "importance"),
    Budget("EPI, bfloat16 with float32 gradients", 99, "bfloat16", "float32", "importance"),
    Budget("EPI, S = exp_avg_sq, float32", 91, lock_in="slot"),
    Budget("EPI, S = exp_avg_sq, bfloat16", 96, "bfloat16", "bfloat16", "slot"),
    Budget("fixed mask, float32", 77, lock_in="static"),
    Budget("fixed mask, bfloat16", 83, "bfloat16", "bfloat16", "static"),
    # noise, codes and rests are arithmetic that 64 registers do not hold: the loop under masks needs the most. Noise is
    # made from the gradient, and the compiler waits for it before it issues the reads that are needed last
    Budget(
        "EPI, float32 with bfloat16 states",
        126,
        lock_in="importance",
        state="bfloat16",
        registers=80,
        late_reads=2,
    ),
    Budget(
        "EPI, stochastic bfloat16",
        136,
        "bfloat16",
        "bfloat16",
        "importance",
        state="bfloat16",
        stochastic=True,
        registers=80,
        late_reads=2,
    ),
    Budget(
        "EPI, weights of 32 bits with bfloat16 states",
        156,
        "bfloat16",
        "bfloat16",
        "importance",
        state="bfloat16",
        rest=16,
        registers=96,
        late_reads=2,
    ),
    Budget(
        "EPI, weights of 24 bits with states of 8 bits",
        275,
        "bfloat16",
        "bfloat16",
        "importance",
        state="block8",
        rest=8,
        stochastic=True,
        registers=128,
    ),
    Budget(
        "EPI, S = exp_avg_sq, weights of 24 bits with states of 8 bits",
        224,
        "bfloat16",
        "bfloat16",
        "slot",
        state="block8",
        rest=8,
        stochastic=True,
        registers=144,
    ),
)

GATHERS = (
    Budget("selected entries, float32", 108),
    Budget("selected entries, bfloat16", 108, "bfloat16", "bfloat16"),
    Budget("selected entries beyond 2^31, float32", 108, changes={"OFFSET": tl.int64}),
)
