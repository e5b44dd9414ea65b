"""Parameters found and named in torch's parameter groups, in constant time."""

import difflib
import zlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed import is_dtensor, is_slice
from epi_kernels.engine.settings import Groups

# what `position_of` found in the last few lists of groups: id of the groups -> id of a parameter -> position
_found: dict[int, dict[int, tuple[int, int]]] = {}
_KEPT = 4


def position_of(param: Tensor, groups: Groups) -> tuple[int, int]:
    """Return (group, place in it) of a parameter.

    Callers ask for every parameter in turn, so what a walk through the groups has found is kept. A program may edit the
    groups at any time: a kept position counts only if the parameter is still there, else the groups are walked again.

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


def params_of(groups: Groups) -> list[Tensor]:
    """Return the parameters of all groups, in their order."""
    return [*chain.from_iterable(group["params"] for group in groups)]


def group_of(param: Tensor, groups: Groups) -> dict[str, Any]:
    """Return the group of a parameter; or raise as `position_of`."""
    return groups[position_of(param, groups)[0]]


def has_names(group: Mapping[str, Any]) -> bool:
    """Return whether a group has the names of its parameters.

    DeepSpeed puts other parameters in their place and leaves the names: there are then more names than parameters.
    """
    return len(group.get("param_names", ())) == len(group["params"]) > 0


# components that wrappers put into a parameter's name: layers and lookups by name must not depend on the wrapping
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def without_wrappers(name: str) -> str:
    """Return a parameter's name as the bare model has it, without the components that wrappers add.

    Example:
        >>> without_wrappers("module._orig_mod.head.weight")
        'head.weight'
    """
    # only leading and inner components: a module that is itself called "module" at the end keeps its name
    *path, last = name.split(".")
    return ".".join([component for component in path if component not in _WRAPPERS] + [last])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause for errors: the known names that are most like an unknown one."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"the nearest names are {', '.join(near)}"
    more = ", ..." if len(known) > 3 else ""
    return f"it has {', '.join(known[:3])}{more}" if known else "it has no parameters"


def name_of(param: Tensor, groups: Groups) -> str:
    """Return the parameter's name, or "<group>.<place>" where the groups have none; or raise as `position_of`."""
    i, j = position_of(param, groups)
    return str(groups[i]["param_names"][j]) if has_names(groups[i]) else f"{i}.{j}"


def noise_name(param: Tensor, groups: Groups) -> str:
    """Return what noise knows a parameter by: its name without what wrappers add, or its position across all groups."""
    i, j = position_of(param, groups)
    if has_names(groups[i]):
        return without_wrappers(str(groups[i]["param_names"][j]))
    return str(sum(len(group["params"]) for group in groups[:i]) + j)


def names_of(groups: Groups) -> dict[int, str]:
    """Return {id of a parameter: its name, as `name_of` returns it}."""
    return {id(param): name_of(param, groups) for param in params_of(groups)}


def masks_of(
    masks: Mapping[str | Tensor, Tensor], groups: Groups, argument: str, *, partitioned: bool
) -> dict[Tensor, Tensor]:
    """Return the mask of each parameter that `masks` names, after checking every key and mask.

    Args:
        masks: {name or Parameter: bool tensor of the parameter's shape}; a name is one that torch was given.
        groups: torch's.
        argument: the caller's name for `masks`, "frozen" or "trainable".
        partitioned: there is a process group: a Parameter that is not here may be another rank's.

    Raises:
        ValueError: a name or Parameter is unknown, or given both ways, or its mask is not bool or has another shape.
        TypeError: `masks` is no mapping, or a mask no tensor.
        NotImplementedError: a parameter is a slice that FSDP1 made, which does not say of which entries.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"{argument} is a {type(masks).__name__}; pass {{name or Parameter: bool tensor}}")
    by_name = {
        name: param
        for group in groups
        for name, param in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    params = set(params_of(groups))
    found = {}
    for key, mask in masks.items():
        param = key if isinstance(key, Tensor) else by_name.get(key)
        if param is None:
            known = nearest(str(key), by_name) if by_name else "pass model.named_parameters() to use names"
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
    """Return a checksum of the mask of a whole parameter; 0 for a DTensor, of which this rank has only a shard."""
    return 0 if is_dtensor(mask) else zlib.crc32(mask.contiguous().cpu().numpy().data)
