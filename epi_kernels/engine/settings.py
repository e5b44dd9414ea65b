"""The settings of parameter groups: plain values, torch's checks in torch's words, and what holds for all groups."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

# torch's settings that say how a step is taken
FLAGS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")

Groups = Sequence[dict[str, Any]]


def is_number(value: object) -> bool:
    """Return whether a value is a real number of Python's or of numpy's; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any, first: int, end: float) -> bool:
    """Return whether a value is an integer of Python's or of numpy's with first <= value < end; a bool is not."""
    return is_number(value) and isinstance(value, Integral) and first <= int(value) < end


def plain(value: Any) -> Any:
    """Return numpy's numbers, bools and strings, also in a tuple or list, as Python's; anything else as it is.

    A checkpoint of plain values loads under ``torch.load(weights_only=True)``.
    """
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a group, or those of all groups, as plain values; parameters and their names are kept."""
    return {key: value if key in ("params", "param_names") else plain(value) for key, value in settings.items()}


def check_torchs(group: Mapping[str, Any]) -> None:
    """Check the settings of a group that torch.optim.AdamW checks in its constructor, if the group has them.

    torch checks only its constructor's arguments; a group that is added, written or loaded later is checked here.

    Raises:
        ValueError, RuntimeError: a setting is out of its range, or two exclude each other; the texts are torch's.
    """
    lr, betas = group["lr"], group["betas"]
    unsupported = group.get("foreach") and not group.get("capturable")
    if isinstance(lr, Tensor):
        if unsupported:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not group.get("eps", 0.0) >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    for i in (0, 1):
        if not 0.0 <= betas[i] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    kinds = [isinstance(beta, Tensor) for beta in betas[:2]]
    if not (all(kinds) or all(isinstance(beta, float) for beta in betas[:2])):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas[:2]):
        if isinstance(beta, Tensor):
            if unsupported:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
    if group.get("fused"):
        if group.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        if group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_clip_grad_norm(norm: Any) -> None:
    """Check the setting ``clip_grad_norm``: a norm > 0, or None for no clipping.

    Raises:
        ValueError: it is neither.
    """
    if norm is not None and not (is_number(norm) and norm > 0.0):
        raise ValueError(f"Invalid clip_grad_norm: {norm!r}; a norm > 0, or None for no clipping")


def settings_of(group: dict[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of a group that must be equal on all ranks: torch's and, where the group has them, `others`.

    Values are normalised so that equal settings have equal texts: every number becomes a float, except flags, and
    ``mask_interval`` and ``rounding_seed``, which are integers.
    """
    keys = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", *others)
    found = {key: group[key] for key in keys if key in group}
    exact = {
        key: value
        for key, value in found.items()
        if isinstance(value, bool) or key in ("mask_interval", "rounding_seed")
    }
    numbers = {key: float(value) for key, value in found.items() if isinstance(value, (int, float, Tensor))}
    betas = {"betas": tuple(map(float, found["betas"]))} if "betas" in found else {}
    return {**found, **numbers, **exact, **betas}


def check_shared(keys: Sequence[str], group: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a group has the settings that are one for all groups.

    Raises:
        ValueError: it brings another; the message names it and both values.
    """
    for key in keys:
        if group[key] != settings[key]:
            raise ValueError(
                f"{key}={group[key]!r} in a parameter group; the optimizer has {settings[key]!r}, "
                "and it is one for all groups"
            )


def check_written(groups: Groups, keys: Sequence[str], fixed: Mapping[str, Sequence[Any]]) -> None:
    """Check settings that a program may have written into groups since they were added.

    Args:
        groups: torch's.
        keys: the settings that are one for all groups: a value must be written into all of them.
        fixed: setting -> the values that fit the state of the optimizer; the message names the first.

    Raises:
        ValueError: one differs between groups, or is not what it was; the message names it and both values.
    """
    for i, group in enumerate(groups):
        for key in keys:
            if group[key] != groups[0][key]:
                raise ValueError(
                    f"{key}={group[key]!r} in parameter group {i}, and {groups[0][key]!r} in group 0: it is one for "
                    "all groups; write it into every one"
                )
        for key, values in fixed.items():
            if group[key] not in values:
                raise ValueError(
                    f"{key} of parameter group {i} was changed to {group[key]!r}, and the optimizer was made with "
                    f"{values[0]!r}, of which its masks are. Write {values[0]!r} back, or construct another optimizer "
                    f"with {key}={group[key]!r}"
                )
