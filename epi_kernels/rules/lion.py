"""Lion ("Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Alg. 2).

::

    c <- beta1 m + (1 - beta1) g
    theta <- (1 - lr lambda) theta - lr sign(c)
    m <- beta2 m + (1 - beta2) g

Every product and sum is rounded separately. sign(0) is 0 and sign(NaN) is NaN.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_kernels.rules.rule import Rule, Slot


class Scalars(NamedTuple):
    """The numbers of one Lion step of one tensor, computed once in double; a backend then rounds them."""

    decay: float  # 1 - lr * weight_decay
    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float

    @classmethod
    def of(cls, group: dict[str, Any], step: Any) -> "Scalars":
        """Return the scalars of a parameter group with lr, betas and weight_decay; Lion does not read the clock.

        Args:
            group: the settings, as numbers; if `step` is a tensor, some may be tensors.
            step: the parameter's own clock.
        """
        lr, weight_decay = group["lr"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        if not isinstance(step, Tensor):
            lr, weight_decay, beta1, beta2 = map(float, (lr, weight_decay, beta1, beta2))
        return cls(1.0 - lr * weight_decay, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2)


def update(
    param: Tensor, grad: Tensor, slots: list[Tensor | None], s: Scalars, given: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Return (theta, slots) after the step; contract: `epi_kernels.rules.Rule.update`."""
    (exp_avg,) = slots
    assert exp_avg is not None
    direction = sign(exp_avg * s.beta1 + grad * s.one_minus_beta1)
    return param * s.decay - direction * s.lr, [exp_avg * s.beta2 + grad * s.one_minus_beta2]


def sign(value: Tensor) -> Tensor:
    """Return 1 for values above 0 and -1 for values below 0; return a zero or a NaN unchanged."""
    one = torch.ones_like(value)
    return torch.where(value > 0, one, torch.where(value < 0, -one, value))


LION = Rule(
    name="lion",
    title="Lion",
    settings=("lr", "betas", "weight_decay"),
    slots=(Slot("exp_avg"),),
    scalars=Scalars,
    update=update,
)
