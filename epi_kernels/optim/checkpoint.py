"""The state of an optimizer of torch's form, checked before any of it is taken, and taken without a second copy."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.contract import arithmetic_dtype
from epi_kernels.distributed import is_dtensor
from epi_kernels.optim.groups import Groups, name_of

# state of ours and of torch that keeps its own dtype when loaded; None: that of the arithmetic
STATE_DTYPES: dict[str, torch.dtype | None] = {
    "exp_avg": None,
    "exp_avg_sq": None,
    "max_exp_avg_sq": None,
    "importance": torch.float32,
    "frozen": torch.int8,
    "trainable": torch.uint8,
}

# what an entry of AdamW cannot be without
_NEEDED = ("step", "exp_avg", "exp_avg_sq")
_NEEDED_IN_GROUP = ("lr", "betas", "eps", "weight_decay", "params")


def check_state(
    state_dict: dict[str, Any],
    groups: Groups,
    known: Sequence[str],
    shape_of: Callable[[str, Tensor, dict[str, Any]], tuple[int, ...]],
    check_entry: Callable[[dict[str, Any], Tensor, str], None],
) -> None:
    """Check that a saved state is AdamW's and fits the parameters of `groups`.

    Args:
        state_dict: in torch's form.
        groups: the optimizer's own.
        known: the keys of a parameter's state that the optimizer can take.
        shape_of: (key, parameter, entry) -> the shape that it must have there.
        check_entry: (entry, parameter, its name); raises ValueError for what else is wrong.

    Raises:
        ValueError: the state is of another optimizer, of other shapes or incomplete; the message names the entry.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the state has no {key!r}; pass what state_dict() of an optimizer returned")
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        return  # torch says so, in its words
    for i, group in enumerate(saved_groups):
        missing = [key for key in _NEEDED_IN_GROUP if key not in group]
        if missing:
            raise ValueError(f"parameter group {i} of the state has no {', '.join(missing)}: it is not AdamW's")
    params = dict(pairs_of(saved_groups, groups))
    for saved_id, entry in state_dict["state"].items():
        if saved_id not in params:
            raise ValueError(
                f"the state has an entry {saved_id!r} that belongs to none of its {len(params)} parameters; it is "
                "incomplete, or was changed"
            )
        if entry:
            name = name_of(params[saved_id], groups)
            check_entry(entry, params[saved_id], name)
            _check_entry(entry, params[saved_id], name, known, shape_of)


def _check_entry(
    entry: dict[str, Any],
    param: Tensor,
    name: str,
    known: Sequence[str],
    shape_of: Callable[[str, Tensor, dict[str, Any]], tuple[int, ...]],
) -> None:
    missing = [key for key in _NEEDED if key not in entry]
    if missing:
        raise ValueError(
            f"the state of {name} has no {', '.join(missing)} and is not AdamW's; it has {', '.join(map(str, entry))}"
        )
    foreign = [key for key in entry if key != "step" and key not in known]
    if foreign:
        raise ValueError(
            f"the state of {name} has {', '.join(map(str, foreign))}, which this optimizer has not: the state is of "
            f"another one. Take these out of it to go on with the rest"
        )
    for key, value in entry.items():
        if key == "step" and not isinstance(value, Tensor):
            float(value)  # of an old torch
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} of {name} is a {type(value).__name__} and not a tensor")
        wanted = () if key == "step" else shape_of(key, param, entry)
        if tuple(value.shape) != wanted:
            raise ValueError(f"{key} of {name} has shape {tuple(value.shape)} in the state, and {wanted} here")
        if is_dtensor(value) and not _placed_alike(value, param):
            theirs, ours = (_placements(tensor) for tensor in (value, param))
            raise ValueError(
                f"{key} of {name} is placed {theirs} in the state, and the parameter {ours} here; load it with "
                "torch.distributed.checkpoint, which places it anew"
            )
        if key != "step" and value.is_complex() != _dtype_of(key, param, value).is_complex:
            raise ValueError(f"{key} of {name} is {value.dtype} in the state, and {_dtype_of(key, param, value)} here")


def _placed_alike(value: Tensor, param: Tensor) -> bool:
    return is_dtensor(param) and _placements(value) == _placements(param)


def _placements(tensor: Tensor) -> Any:
    if not is_dtensor(tensor):
        return "whole"
    return tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]


def pairs_of(saved_groups: Groups, groups: Groups) -> Iterator[tuple[Any, Tensor]]:
    """Yield (the number of a parameter in a saved state, the parameter), by position as torch has it."""
    for saved, own in zip(saved_groups, groups, strict=True):
        yield from zip(saved["params"], own["params"], strict=True)


def taken(entry: dict[str, Any], param: Tensor, before: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state of a parameter from a saved entry, in the dtypes that it has in this package.

    A tensor that fits is taken and not copied, as torch does it: two copies would be a second optimizer's worth of
    memory. What `before` has is written instead of replaced.
    """
    state: dict[str, Any] = {}
    for key, value in entry.items():
        if key in before:
            state[key] = before[key].copy_(torch.as_tensor(value))
        elif key == "step":
            state[key] = value  # whoever takes it knows where a clock runs
        else:
            state[key] = value.to(device=param.device, dtype=_dtype_of(key, param, value))
    return state


def _dtype_of(key: str, param: Tensor, value: Tensor) -> torch.dtype:
    if key == "indices":
        return value.dtype
    return STATE_DTYPES[key] or arithmetic_dtype(param.dtype)
