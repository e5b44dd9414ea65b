"""One AdamW step in which locked entries do not move, plain torch: the truth for every other backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.contract import Scalars, arithmetic_dtype
from epi_kernels.ops.equations import advanced_importance, first_moment, moved, second_moment


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    locks: Sequence[Tensor],
    nonfinite: Tensor,
    scalars: Tensor,
    lock_in: str,
    advanced: bool,
) -> None:
    """Step every tensor of the lists in place; contract: `epi_kernels.ops.masked_adamw_`."""
    for i, param in enumerate(params):
        s = Scalars(*scalars[i].tolist())
        dtype = arithmetic_dtype(param.dtype)
        grad = grads[i].to(dtype) * s.sign
        exp_avg, exp_avg_sq = exp_avgs[i], exp_avg_sqs[i]

        m = first_moment(exp_avg.to(dtype), grad, s.one_minus_beta1)
        exp_avg.copy_(m)

        if lock_in != "exp_avg_sq":
            # the magnitude: a tensor that was exempted from isolation since its last step still carries lock bits here
            v = lock.magnitude(exp_avg_sq).to(dtype)
            exp_avg_sq.copy_(second_moment(v, grad, s.beta2, s.one_minus_beta2))
        if lock_in == "importance" and not advanced:
            beta, one_minus_beta = s.importance_beta, s.one_minus_importance_beta
            after, bad = advanced_importance(locks[i], grads[i], beta, one_minus_beta, keep_finite=True)
            locks[i].copy_(after)
            nonfinite[i] += bad
        elif lock_in == "exp_avg_sq" and not advanced:
            after, bad = advanced_importance(exp_avg_sq, grads[i], s.beta2, s.one_minus_beta2, keep_finite=False)
            exp_avg_sq.copy_(after)
            nonfinite[i] += bad

        v = lock.magnitude(exp_avg_sq).to(dtype)
        if max_exp_avg_sqs:
            v = torch.maximum(max_exp_avg_sqs[i].to(dtype), v)
            max_exp_avg_sqs[i].copy_(v)

        theta = moved(param.to(dtype), m, v, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps).to(param.dtype)
        if lock_in != "none":
            # a selection, never a product with 0: 0 * inf is NaN, and a locked entry keeps its bits
            locked = lock.is_locked(exp_avg_sq if lock_in == "exp_avg_sq" else locks[i])
            theta = torch.where(locked, param, theta)
        param.copy_(theta)
