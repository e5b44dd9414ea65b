"""Parameters found and named in torch's parameter groups."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed import is_dtensor, is_slice
from epi_kernels.layers import has_names

Groups = Sequence[dict[str, Any]]


# what `position_of` found in the groups that were asked last: id of the groups -> id of a parameter -> position
_found: dict[int, dict[int, tuple[int, int]]] = {}
_KEPT = 4


def position_of(param: Tensor, groups: Groups) -> tuple[int, int]:
    """Return (group, place in it) of a parameter.

    It is asked of every parameter in turn, so that what a walk through the groups has found is kept. A program may edit
    the groups at any time: a position counts where the parameter still is at it, else the walk is made again.

    Raises:
        ValueError: `param` is not a parameter of these groups.
    """
    for known in (_found.get(id(groups), {}), None):
        if known is None:
            known = _walk(groups)
        i, j = known.get(id(param), (len(groups), 0))
        if i < len(groups) and j < len(groups[i]["params"]) and groups[i]["params"][j] is param:
            return i, j
    raise ValueError(f"the tensor of shape {tuple(param.shape)} is not a parameter of this optimizer")


def _walk(groups: Groups) -> dict[int, tuple[int, int]]:
    positions: dict[int, tuple[int, int]] = {}
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            positions.setdefault(id(param), (i, j))
    _found.pop(id(groups), None)
    while len(_found) >= _KEPT:
        _found.pop(next(iter(_found)), None)
    _found[id(groups)] = positions
    return positions


def name_of(param: Tensor, groups: Groups) -> str:
    """Return the parameter's name, or "<group>.<place>" where the groups have none; or raise as `position_of`."""
    i, j = position_of(param, groups)
    return str(groups[i]["param_names"][j]) if has_names(groups[i]) else f"{i}.{j}"


def masks_of(
    masks: Mapping[str | Tensor, Tensor], groups: Groups, argument: str, *, partitioned: bool
) -> dict[Tensor, Tensor]:
    """Return the mask of each parameter that `masks` names, after checking every key and mask.

    Args:
        masks: {name or Parameter: bool tensor of the parameter's shape}; a name is what torch was given as one.
        groups: torch's.
        argument: what the caller calls `masks`.
        partitioned: there is a process group: a Parameter that is not here may be another rank's.

    Raises:
        ValueError: a name or Parameter is unknown, or given both ways, or its mask is not bool or has another shape.
        TypeError: `masks` is no mapping, or a mask no tensor.
        NotImplementedError: a parameter is a slice that FSDP1 made, which does not say of what.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"{argument} is a {type(masks).__name__}; pass {{name or Parameter: bool tensor}}")
    by_name = {
        name: param
        for group in groups
        for name, param in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    params = {param for group in groups for param in group["params"]}
    found = {}
    for key, mask in masks.items():
        param = key if isinstance(key, Tensor) else by_name.get(key)
        if param is None:
            known = f"known are {', '.join(by_name)}" if by_name else "pass model.named_parameters() to use names"
            raise ValueError(f"{argument} has the unknown name {key!r}; {known}")
        if param not in params:
            if partitioned and not by_name:
                continue
            raise ValueError(f"{argument} has a tensor of shape {tuple(param.shape)} that is not a parameter here")
        name = name_of(param, groups)
        if param in found:
            raise ValueError(f"{argument} has {name!r} by name and by Parameter; give one mask of it")
        moves = {"frozen": "never moves", "trainable": "moves"}[argument]
        if not isinstance(mask, Tensor):
            raise TypeError(f"{argument}[{name!r}] is a {type(mask).__name__}; pass a bool tensor, True = {moves}")
        if mask.dtype != torch.bool:
            raise ValueError(f"{argument}[{name!r}] is {mask.dtype}; pass a bool tensor, True = {moves}")
        if is_slice(param):
            raise NotImplementedError(
                f"{name} is a slice that FSDP1 made, and does not say of which entries; use FSDP2 (fully_shard)"
            )
        if mask.shape != param.shape:
            raise ValueError(f"{argument}[{name!r}] has shape {tuple(mask.shape)}, the parameter {tuple(param.shape)}")
        found[param] = mask
    return found


def digest_of(mask: Tensor) -> int:
    """Return a number that differs where masks of whole parameters do; 0 of a DTensor, of which a rank has a part."""
    return 0 if is_dtensor(mask) else zlib.crc32(mask.contiguous().cpu().numpy().data)


def settings_of(group: dict[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of a group that must be equal on all ranks: torch's and, where it has them, `others`.

    Equal ones have the same text too: numbers are floats, but for what counts steps or is a flag.
    """
    keys = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", *others)
    found = {key: group[key] for key in keys if key in group}
    exact = {key: value for key, value in found.items() if isinstance(value, bool) or key == "mask_interval"}
    numbers = {key: float(value) for key, value in found.items() if isinstance(value, (int, float, Tensor))}
    betas = {"betas": tuple(map(float, found["betas"]))} if "betas" in found else {}
    return {**found, **numbers, **exact, **betas}


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


def check_written(groups: Groups, keys: Sequence[str], fixed: Mapping[str, Sequence[Any]]) -> None:
    """Check settings that a program may have written into groups since they were added.

    Args:
        groups: torch's.
        keys: the settings that are one for all groups: they hold once they are written into all.
        fixed: setting -> the values that the state of the optimizer is of, the first for the message.

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


class Named:
    """An optimizer that finds its parameters and speaks of them by name."""

    param_groups: list[dict[str, Any]]

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        """Return the group of a parameter, or raise ValueError where it is none of this optimizer."""
        return self.param_groups[position_of(param, self.param_groups)[0]]

    def _names(self) -> dict[int, str]:
        """Return what `_name` does for every parameter, by its identity."""
        return {id(param): self._name(param) for group in self.param_groups for param in group["params"]}

    def _name(self, param: Tensor) -> str:
        """Return the parameter's name, or "<group>.<place>" where the optimizer was given none."""
        return name_of(param, self.param_groups)
