"""One AdamW step in which locked entries do not move, plain torch: the truth for every other backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.contract import Scalars, arithmetic_dtype
from epi_kernels.ops.equations import advanced_importance, first_moment, moved, multiplied, second_moment


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.Sweep`."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        locks: Sequence[Tensor | None],
        lock_in: str,
        lockable: Sequence[bool],
    ) -> None:
        self._kinds = [lock_in if can else "none" for can in lockable]

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        locks: Sequence[Tensor | None],
        moved: bool,
        nonfinite: Tensor,
        scalars: Tensor,
        rows: Sequence[int],
        advanced: bool | Tensor,
        grad_factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take the step."""
        if found_inf is not None and found_inf.item():
            return
        numbers = [Scalars(*row) for row in scalars.tolist()]
        tensors = zip(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks, self._kinds, strict=True)
        for i, (grad, row, others) in enumerate(zip(grads, rows, tensors, strict=True)):
            nonfinite[i] += _step(multiplied(grad, grad_factor), numbers[row], bool(advanced), *others)


def _step(
    raw_grad: Tensor,
    s: Scalars,
    advanced: bool,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    lock_: Tensor | None,
    lock_in: str,
) -> Tensor | int:
    """Step one tensor in place; return how many of its squared gradients are not finite, where they are looked at."""
    dtype = arithmetic_dtype(param.dtype)
    grad = raw_grad.to(dtype) * s.sign
    bad: Tensor | int = 0

    m = first_moment(exp_avg.to(dtype), grad, s.one_minus_beta1)
    exp_avg.copy_(m)

    if lock_in != "exp_avg_sq":
        # the magnitude: a tensor that was exempted from isolation since its last step still carries lock bits here
        v = lock.magnitude(exp_avg_sq).to(dtype)
        exp_avg_sq.copy_(second_moment(v, grad, s.beta2, s.one_minus_beta2))
    if lock_in == "importance" and not advanced:
        assert lock_ is not None
        beta, one_minus_beta = s.importance_beta, s.one_minus_importance_beta
        after, bad = advanced_importance(lock_, raw_grad, beta, one_minus_beta, keep_finite=True)
        lock_.copy_(after)
    elif lock_in == "exp_avg_sq" and not advanced:
        after, bad = advanced_importance(exp_avg_sq, raw_grad, s.beta2, s.one_minus_beta2, keep_finite=False)
        exp_avg_sq.copy_(after)

    v = lock.magnitude(exp_avg_sq).to(dtype)
    if max_exp_avg_sq is not None:
        v = torch.maximum(max_exp_avg_sq.to(dtype), v)
        max_exp_avg_sq.copy_(v)

    theta = moved(param.to(dtype), m, v, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps).to(param.dtype)
    if lock_in != "none":
        signed = exp_avg_sq if lock_in == "exp_avg_sq" else lock_
        assert signed is not None
        # a selection, never a product with 0: 0 * inf is NaN, and a locked entry keeps its bits
        theta = torch.where(lock.is_locked(signed), param, theta)
    param.copy_(theta)
    return bad
