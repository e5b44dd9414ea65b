"""A step that autograd goes back through: torch's own arithmetic, with the locked entries put back."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from epi_kernels.contract import arithmetic_dtype


def check(name: str, param: Tensor, lock_in: str) -> None:
    """Check that a differentiable step can take a parameter whose lock is where `lock_in` says.

    Raises:
        NotImplementedError: it cannot; the message says what to do.
    """
    if arithmetic_dtype(param.dtype) != param.dtype:
        raise NotImplementedError(
            f"{name} is {param.dtype}: torch's differentiable step keeps its moments in that dtype, this package in "
            "float32; use float32 parameters"
        )
    if lock_in == "exp_avg_sq":
        raise NotImplementedError(
            "differentiable=True needs a second moment without locks in it; use importance='ema', which keeps its own"
        )


def step_(
    param: Tensor, state: dict[str, Any], group: dict[str, Any], locked: Tensor | None, grad_factor: Tensor | None
) -> None:
    """Take one step of one parameter in place; the caller has enabled gradients.

    Args:
        param: with a gradient; written.
        state: in torch's form; written, its clock included.
        group: the group of `param`.
        locked: bool, of the parameter's shape: the entries that keep their values; None: no entry does.
        grad_factor: multiplies the gradient first; None: 1.
    """
    assert param.grad is not None
    before = None if locked is None else param.clone()
    amsgrad = group["amsgrad"]
    adamw(
        [param],
        [param.grad if grad_factor is None else param.grad * grad_factor],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [state["max_exp_avg_sq"]] if amsgrad else [],
        [state["step"]],
        foreach=False,
        capturable=group["capturable"],
        differentiable=True,
        fused=False,
        has_complex=param.is_complex(),
        amsgrad=amsgrad,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    if locked is not None:
        param.copy_(torch.where(locked, before, param))  # type: ignore[arg-type]
