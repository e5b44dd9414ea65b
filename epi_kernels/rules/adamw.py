"""AdamW (arXiv 1711.05101, Alg. 2), with AMSGrad where the slot max_exp_avg_sq is present.

::

    m <- m + (1 - beta1)(g - m)
    v <- beta2 v + (1 - beta2) g^2
    theta <- (1 - lr lambda) theta - step_size m / (sqrt(v) / correction + eps)

It rounds as torch.optim.AdamW does. With AMSGrad, the last line uses the largest v so far instead of v.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_kernels.rules.rule import Rule, Slot


class Scalars(NamedTuple):
    """The numbers of one AdamW step of one tensor, computed once in double; a backend rounds them to its own precision.

    Every backend sees the same ``1 - beta`` and the same bias corrections, so that no number is computed twice with
    different roundings.
    """

    decay: float  # 1 - lr * weight_decay
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1^t)
    bias_correction2_sqrt: float  # sqrt(1 - beta2^t)
    eps: float

    @classmethod
    def of(cls, group: dict[str, Any], step: Any) -> "Scalars":
        """Return the scalars of a parameter group at `step` (1 is the first).

        Args:
            group: lr, betas, eps and weight_decay as torch.optim.AdamW keeps them.
            step: the parameter's own clock, after this step was counted: a float, or a float64 tensor of clocks. With a
                tensor, the numbers in the group may also be tensors, and every scalar that depends on a tensor is a
                tensor.
        """
        lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        if not isinstance(step, Tensor):
            lr, eps, weight_decay, beta1, beta2 = map(float, (lr, eps, weight_decay, beta1, beta2))
        return cls(
            decay=1.0 - lr * weight_decay,
            beta1=beta1,
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            step_size=lr / (1.0 - beta1**step),
            bias_correction2_sqrt=(1.0 - beta2**step) ** 0.5,
            eps=eps,
        )


def update(
    param: Tensor, grad: Tensor, slots: list[Tensor | None], s: Scalars, given: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Return (theta, slots) after the step; contract: `epi_kernels.rules.Rule.update`."""
    exp_avg, exp_avg_sq, max_exp_avg_sq = slots
    assert exp_avg is not None
    assert exp_avg_sq is not None
    exp_avg = first_moment(exp_avg, grad, s.one_minus_beta1)
    if not given:
        exp_avg_sq = second_moment(exp_avg_sq, grad, s.beta2, s.one_minus_beta2)
    largest = exp_avg_sq
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = largest = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    param = moved(param, exp_avg, largest, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps)
    return param, [exp_avg, exp_avg_sq, max_exp_avg_sq]


def first_moment(exp_avg: Tensor, grad: Tensor, one_minus_beta1: float) -> Tensor:
    """Return m + (1 - beta1) * (g - m), rounded as torch.optim.AdamW rounds it."""
    # lerp multiplies and adds with one rounding. With two roundings, where g and m nearly cancel, the step of a small
    # weight was 48 ulp away from the step of torch
    if one_minus_beta1 == 1.0:
        # g, except where m is not finite. torch.lerp gives a zero either sign, depending on the entry's place in a
        # vector
        return grad - (grad - exp_avg) * 0.0
    return torch.lerp(exp_avg, grad, one_minus_beta1)


def second_moment(exp_avg_sq: Tensor, grad: Tensor, beta2: float, one_minus_beta2: float) -> Tensor:
    """Return beta2 * v + (1 - beta2) * g * g, rounded as torch.optim.AdamW rounds it: with one multiply-add."""
    return torch.addcmul(exp_avg_sq * beta2, grad, grad, value=one_minus_beta2)


def moved(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, decay: float, step_size: float, correction: float, eps: float
) -> Tensor:
    """Return (1 - lr * lambda) * theta - step_size * m / (sqrt(v) / correction + eps).

    Args:
        param: theta.
        exp_avg: m, this step's gradient included; same shape and dtype.
        exp_avg_sq: v, likewise.
        decay: 1 - lr * lambda.
        step_size: lr / (1 - beta1^t).
        correction: sqrt(1 - beta2^t).
        eps: added to the denominator.
    """
    return param * decay - exp_avg * step_size / (square_root(exp_avg_sq) / correction + eps)


def square_root(value: Tensor) -> Tensor:
    """Return the square root, correctly rounded in float32."""
    # torch.sqrt may use MKL, which rounds 0.6 to 20% of the float32 roots to the wrong neighbour (torch 2.13, AVX-512,
    # Xeon and EPYC). A root in double, even with an error of one ulp, is never so close to the middle between two
    # float32 numbers that it rounds to the wrong one
    return value.double().sqrt().to(value.dtype)


ADAMW = Rule(
    name="adamw",
    title="AdamW",
    settings=("lr", "betas", "eps", "weight_decay", "amsgrad"),
    slots=(
        Slot("exp_avg"),
        Slot("exp_avg_sq"),
        Slot("max_exp_avg_sq", option="amsgrad"),
    ),
    scalars=Scalars,
    update=update,
    importance_slot="exp_avg_sq",
)
