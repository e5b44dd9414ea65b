"""Parameters found and named in torch's parameter groups."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Groups = Sequence[dict[str, Any]]


def position_of(param: Tensor, groups: Groups) -> tuple[int, int]:
    """Return (group, place in it) of a parameter.

    Raises:
        ValueError: `param` is not a parameter of these groups.
    """
    for i, group in enumerate(groups):
        for j, other in enumerate(group["params"]):
            if other is param:
                return i, j
    raise ValueError(f"the tensor of shape {tuple(param.shape)} is not a parameter of this optimizer")


def name_of(param: Tensor, groups: Groups) -> str:
    """Return the parameter's name, or "<group>.<place>" where the groups have none; or raise as `position_of`."""
    i, j = position_of(param, groups)
    names = groups[i].get("param_names")
    return str(names[j]) if names else f"{i}.{j}"


def check_shared(keys: Sequence[str], group: dict[str, Any], settings: dict[str, Any]) -> None:
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


class Named:
    """An optimizer that finds its parameters and speaks of them by name."""

    param_groups: list[dict[str, Any]]

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        """Return the group of a parameter, or raise ValueError where it is none of this optimizer."""
        return self.param_groups[position_of(param, self.param_groups)[0]]

    def _name(self, param: Tensor) -> str:
        """Return the parameter's name, or "<group>.<place>" where the optimizer was given none."""
        return name_of(param, self.param_groups)
