"""The numbers of one step of one tensor: those of the sweep itself, then those of its rule."""

from typing import Any, NamedTuple

from torch import Tensor

from epi_kernels.rules import Rule


class SweepScalars(NamedTuple):
    """What every sweep needs, whatever its rule."""

    sign: float  # of the gradient: -1 maximizes
    importance_beta: float
    one_minus_importance_beta: float


def scalars_of(rule: Rule, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
    """Return a row of scalars: `SweepScalars`, then the rule's.

    Args:
        rule: whose scalars follow.
        group: a parameter group of torch: what the rule reads, and maximize; importance_beta where it has an importance
            of its own. Where ``group["importance"]`` names the rule's importance slot, that slot's beta, the second of
            ``group["betas"]``, is the importance's.
        step: the parameter's own clock, this step counted; a float, or float64 clocks in a tensor, for which what
            depends on it, or on a number of the group that is a tensor, is a tensor.

    Example:
        >>> from epi_kernels.rules import ADAMW
        >>> group = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0.0, "weight_decay": 0.0, "maximize": False}
        >>> scalars_of(ADAMW, group, 1)
        (1.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.75, 0.25, 1.0, 0.5, 0.0)
    """
    in_slot = rule.importance_slot is not None and group.get("importance") == rule.importance_slot
    beta = group["betas"][1] if in_slot else group.get("importance_beta", 0.0)
    if not isinstance(step, Tensor):
        beta = float(beta)
    own = SweepScalars(-1.0 if group["maximize"] else 1.0, beta, 1.0 - beta)
    return (*own, *rule.scalars.of(group, step))


def width_of(rule: Rule) -> int:
    """Return the number of scalars of a row."""
    return len(SweepScalars._fields) + len(rule.scalars._fields)
