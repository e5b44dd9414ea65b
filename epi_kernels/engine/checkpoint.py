"""Saved states in torch's form: checked before any part is taken, and taken without a second copy."""

import math
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from epi_kernels.contract import FLOATING, arithmetic_dtype
from epi_kernels.distributed import is_dtensor, local
from epi_kernels.engine.groups import name_of, without_wrappers
from epi_kernels.engine.settings import Groups, is_number, plain_settings
from epi_kernels.engine.state import FIXED_DTYPES
from epi_kernels.engine.storages import REST, is_compact, keys_of, narrowed
from epi_kernels.rules import Rule
from epi_kernels.storage import block8

# settings of a group, torch's and ours, that are flags, and numbers of torch's, which may be in a tensor
_FLAGS = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay", "layers_auto")
_FLAGS_OR_NONE = ("foreach", "fused")
_NUMBERS = ("lr", "eps", "weight_decay")

# below this, a float64 clock counts every step
LATEST = 1 << 53

# dtypes in which frameworks keep moments on purpose, under parameters of more bits
_HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn an error that a check raises into a ValueError, with `what` before its text."""
    try:
        yield
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise ValueError(f"{what}: {error}") from error


def check_form(state_dict: dict[str, Any], groups: Groups) -> bool:
    """Check that a saved state has torch's form, and return whether its groups have the sizes of `groups`.

    Where the sizes differ, torch's own load raises.

    Raises:
        ValueError: it does not have that form; the message says what it has instead.
    """
    for key, kind in (("state", dict), ("param_groups", list)):
        if key not in state_dict:
            raise ValueError(f"the state has no {key!r}; pass what state_dict() of an optimizer returned")
        if not isinstance(state_dict[key], kind):
            raise ValueError(
                f"{key!r} of the state is a {type(state_dict[key]).__name__} and not a {kind.__name__}; pass what "
                "state_dict() of an optimizer returned"
            )
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"parameter group {i} of the state has no list of params; it is incomplete")
        strange = [number for number in group["params"] if not isinstance(number, (Integral, str))]
        if strange:
            raise ValueError(
                f"parameter group {i} of the state has {said(strange[0])} among its params; each is the number or name "
                "of an entry"
            )
        if not isinstance(group.get("param_names", []), (list, tuple)):
            raise ValueError(f"param_names of parameter group {i} of the state: {said(group['param_names'])}; a list")
    return [len(group["params"]) for group in state_dict["param_groups"]] == [len(g["params"]) for g in groups]


def checked_groups(saved_groups: Groups, rule: Rule) -> list[dict[str, Any]]:
    """Return the groups of a saved state with plain values, after checking that each value is of the right kind.

    Ranges are not checked here.

    Raises:
        ValueError: a group lacks a setting that the rule needs, a flag is not a bool, or a number is not a finite
            number; the message names the setting and its value.
    """
    for i, group in enumerate(saved_groups):
        missing = [key for key in rule.settings if key not in group]
        if missing:
            raise ValueError(f"parameter group {i} of the state has no {', '.join(missing)}: it is not {rule.title}'s")
    plain = map(plain_settings, saved_groups)
    return [_checked_group(group, f"parameter group {i} of the state") for i, group in enumerate(plain)]


def _checked_group(group: dict[str, Any], where: str) -> dict[str, Any]:
    for key in (*_FLAGS, *_FLAGS_OR_NONE):
        value = group.get(key, False)
        if isinstance(value, int) and value in (0, 1):
            group.update({key: bool(value)} if key in group else {})
        elif not (value is None and key in _FLAGS_OR_NONE):
            either = "True, False or None" if key in _FLAGS_OR_NONE else "True or False"
            raise ValueError(f"{where}: {key} is {said(value)}; it is {either}")
    for key in filter(group.__contains__, _NUMBERS):
        _check_number(group[key], f"{where}: {key}")
    betas = group["betas"]
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ValueError(f"{where}: betas is {said(betas)}; it is two numbers")
    for i, beta in enumerate(betas):
        _check_number(beta, f"{where}: betas[{i}]")
    # states of an old torch have integers, which today's torch refuses
    group["betas"] = tuple(float(beta) if isinstance(beta, int) else beta for beta in betas)
    return group


def _check_number(value: Any, what: str) -> None:
    if isinstance(value, Tensor):
        real = value.layout == torch.strided and not (value.is_meta or value.is_complex() or value.dtype == torch.bool)
        good = real and value.numel() == 1 and math.isfinite(local(value).item())
    else:
        good = is_number(value) and abs(value) <= sys.float_info.max
    if not good:
        raise ValueError(f"{what} is {said(value)}; it is a finite number")


def said(value: object) -> str:
    """Return a value's text for a message, shortened if it is long."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_meta):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return reprlib.repr(value)


class Stamps(Protocol):
    """A grouping of parameters into layers."""

    def stamp(self, groups: Groups) -> None:
        """Write into the groups which parameters share a layer."""


def in_our_order(state_dict: dict[str, Any], groups: Groups, grouping: Stamps | None = None) -> dict[str, Any]:
    """Return a saved state of the form and size of `groups` with its parameters in the order of the names of `groups`.

    If both sides have the same names (without what wrappers add) in another order, the result is a new dict: torch goes
    by position, and would give a parameter the state, mask or selection of another. If the names differ, parameters
    were renamed, and the position counts, as with torch. The settings of a group always go by its position.

    Args:
        state_dict: in torch's form.
        groups: the optimizer's own.
        grouping: how the optimizer's parameters are grouped into layers, if they are.
    """
    saved_groups = state_dict["param_groups"]
    for key in (lambda name: without_wrappers(str(name)), str):
        theirs = [_named(group, group["params"], key) for group in saved_groups]
        ours = [_named(group, group["params"], key) for group in groups]
        numbers = {name: number for members in theirs for name, number in members}
        params = {name: param for members in ours for name, param in members}
        total = sum(len(group["params"]) for group in groups)
        if len(numbers) == len(params) == total and numbers.keys() == params.keys():  # each has a name of its own
            break
    else:
        return state_dict
    if list(numbers) == list(params):
        return state_dict
    own_names = {key(name): name for group in groups for name in group["param_names"]}
    as_saved = [
        {**group, "params": [params[n] for n, _ in members], "param_names": [own_names[n] for n, _ in members]}
        for group, members in zip(groups, theirs, strict=True)
    ]
    if grouping is not None:
        grouping.stamp(as_saved)
    found = []
    for saved, group, members, there in zip(saved_groups, groups, ours, as_saved, strict=True):
        moved: dict[str, Any] = {
            "params": [numbers[name] for name, _ in members],
            "param_names": list(group["param_names"]),
        }
        if "layer_digest" in saved and "layer_digest" in group:
            # a digest goes by position: that of our layers in the state's order tells whether the layers are the same
            same = saved["layer_digest"] == there["layer_digest"]
            moved["layer_digest"] = group["layer_digest"] if same else ""
        found.append({**saved, **moved})
    return {**state_dict, "param_groups": found}


def _named(group: dict[str, Any], members: Sequence[Any], key: Callable[[Any], str]) -> list[tuple[str, Any]]:
    """Return (name, member) of each member of a group, or nothing if the group has no names."""
    names = group.get("param_names", ())
    if not isinstance(names, (list, tuple)) or len(names) != len(members):
        return []
    return list(zip(map(key, names), members, strict=True))


def in_own_dtypes(state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """Return a saved state, of the form and size of `groups`, with codes, scales and rests in their own dtypes.

    Raises:
        ValueError: a loader has cast them, and lost bits; the message names the entry.
    """
    params, state = dict(pairs_of(state_dict["param_groups"], groups)), dict(state_dict["state"])
    for number, entry in state.items():
        compact = [key for key in entry if is_compact(key)] if isinstance(entry, dict) and number in params else []
        for key in compact:
            value = entry[key]
            if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
                # SparseAdamW keeps the values of its entries side by side, unless it has them in the parameter's shape
                dimensions = 1 if "indices" in entry and "trainable" not in entry else params[number].dim()
                with named(f"{key} of {name_of(params[number], groups)} in the state"):
                    state[number] = {**state[number], key: narrowed(key, value, dimensions)}
    return {**state_dict, "state": state}


def check_state(
    state_dict: dict[str, Any],
    groups: Groups,
    rule: Rule,
    known: Sequence[str],
    shape_of: Callable[[str, Tensor, dict[str, Any]], tuple[int, ...]],
    check_entry: Callable[[dict[str, Any], Tensor, str], None],
    complete: bool,
) -> None:
    """Check that a saved state, of the form and size of `groups`, belongs to this rule and fits the parameters.

    Args:
        state_dict: in torch's form.
        groups: the optimizer's own.
        rule: the optimizer's; an entry must have the slots of it.
        known: the keys of a parameter's state that the optimizer can take.
        shape_of: (key, parameter, entry) -> the shape that the tensor of this key must have.
        check_entry: (entry, parameter, its name); raises ValueError for anything else that is wrong.
        complete: whether every parameter that requires a gradient must have an entry.

    Raises:
        ValueError: the state is of another optimizer, of other shapes or incomplete; the message names the entry.
    """
    saved_groups = state_dict["param_groups"]
    for i, group in enumerate(saved_groups):
        if not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"parameter group {i} of the state has decoupled_weight_decay=False: it is Adam's, whose weight decay "
                "is a part of the gradient. Set it to True there to go on with AdamW's"
            )
    params = dict(pairs_of(saved_groups, groups))
    group_of = {number: group for group in saved_groups for number in group["params"]}
    for saved_id, entry in state_dict["state"].items():
        if saved_id not in params:
            raise ValueError(
                f"the state has an entry {saved_id!r} that belongs to none of its {len(params)} parameters; it is "
                "incomplete, or was changed"
            )
        name = name_of(params[saved_id], groups)
        if not isinstance(entry, dict):
            raise ValueError(f"the state of {name} is a {type(entry).__name__} and not a dict")
        if entry:
            check_entry(entry, params[saved_id], name)
            _check_keys(entry, name, rule, group_of[saved_id], known)
            for key, value in entry.items():
                if key != "step":
                    check_tensor(key, value, params[saved_id], name, shape_of(key, params[saved_id], entry))
            _check_step(entry["step"], params[saved_id], name)
    for saved_id, param in params.items():
        if complete and param.requires_grad and not state_dict["state"].get(saved_id):
            raise ValueError(f"the state has no entry for {name_of(param, groups)}, which would not train any more")


def _check_keys(entry: dict[str, Any], name: str, rule: Rule, group: dict[str, Any], known: Sequence[str]) -> None:
    wanted = [slot for slot in rule.slots if slot.wanted(group)]
    missing = [] if "step" in entry else ["step"]
    for slot in wanted:
        values, codes, scales = keys_of(slot.name)
        missing += [
            key for key in ((codes, scales) if {codes, scales} & entry.keys() else (values,)) if key not in entry
        ]
    _, codes, scales = keys_of("importance")
    missing += [key for key in (codes, scales) if key not in entry and {codes, scales} & entry.keys()]
    if missing:
        options = [slot.option for slot in wanted if slot.option is not None]
        raise ValueError(
            f"the state of {name} has no {', '.join(missing)} and is not {rule.title}'s"
            f"{f' with {options[0]}' if options else ''}; it has {', '.join(map(str, entry))}"
        )
    foreign = [key for key in entry if key != "step" and key not in known]
    if foreign:
        raise ValueError(
            f"the state of {name} has {', '.join(map(str, foreign))}, which this optimizer has not: the state is of "
            f"another one. Take these out of it to go on with the rest"
        )


def _check_step(step: Any, param: Tensor, name: str) -> None:
    if isinstance(step, Tensor):
        check_place("step", step, param, name, ())
    clock = local(step).item() if isinstance(step, Tensor) else step  # a number in a state of an old torch
    if not (is_number(clock) and 0 <= clock < LATEST):
        raise ValueError(f"step of {name} is {clock!r} in the state; it is a number of steps, >= 0")


def check_tensor(key: str, value: Any, param: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Check that `key` of a parameter's saved state is a tensor that can be taken, of this shape.

    Raises:
        ValueError: it is not; the message names it.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} of {name} is a {type(value).__name__} and not a tensor")
    check_place(key, value, param, name, shape)
    if key == "frozen" and not value.dtype.is_signed:
        raise ValueError(f"frozen of {name} is {value.dtype} in the state, which has no sign; it is int8, -1 = frozen")
    if is_compact(key):
        if key == REST and param.dtype != torch.bfloat16:
            raise ValueError(f"rest of {name} is in the state, and the parameter is {param.dtype} here, not bfloat16")
        return
    wanted = _dtype_of(key, param, value, {})
    if value.is_complex() != wanted.is_complex or (wanted.is_floating_point and not value.is_floating_point()):
        raise ValueError(f"{key} of {name} is {value.dtype} in the state, and {wanted} here")


def check_place(key: str, value: Tensor, param: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Check that `key` of a parameter's saved state has values, this shape, and the placement of the parameter.

    Raises:
        ValueError: it does not; the message names it.
    """
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{key} of {name} is {value.layout} on {value.device} in the state; a step needs all its values"
        )
    if tuple(value.shape) != shape:
        blocks = f": blocks of 8 bits have {block8.BLOCK} entries of a row here" if key.endswith("_scales") else ""
        raise ValueError(f"{key} of {name} has shape {tuple(value.shape)} in the state, and {shape} here{blocks}")
    if is_dtensor(value) and not placed_alike(value, param):
        theirs, ours = (_placements(tensor) for tensor in (value, param))
        raise ValueError(
            f"{key} of {name} is placed {theirs} in the state, and the parameter {ours} here; load it with "
            "torch.distributed.checkpoint, which places it anew"
        )


def placed_alike(value: Tensor, param: Tensor) -> bool:
    """Return whether a DTensor is sharded over the same ranks in the same way as a parameter."""
    return is_dtensor(param) and _placements(value) == _placements(param)


def _placements(tensor: Tensor) -> Any:
    if not is_dtensor(tensor):
        return "whole"
    return tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]


def pairs_of(saved_groups: Groups, groups: Groups) -> Iterator[tuple[Any, Tensor]]:
    """Yield (the number of a parameter in a saved state, the parameter), by position; see `in_our_order`."""
    for saved, own in zip(saved_groups, groups, strict=True):
        yield from zip(saved["params"], own["params"], strict=True)


def taken(
    entry: dict[str, Any], param: Tensor, before: dict[str, Tensor], live: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """Return the state of a parameter from a saved entry, in the dtypes that it has in this package.

    A tensor that fits is taken and not copied, as in torch: copies would need the memory of a second optimizer. Tensors
    in `before` are overwritten in place (a CUDA graph may hold their addresses); those that the entry lacks are zeroed,
    except `frozen`, which is kept. `live` has the dtypes of the parameter's state so far, which moments keep.
    """
    state: dict[str, Any] = {}
    for key, value in entry.items():
        if key in before:
            state[key] = before[key].copy_(value) if isinstance(value, Tensor) else before[key].fill_(value)
        elif key == "step":
            state[key] = value  # the caller knows where the clock runs
        elif key in ("indices", "trainable", "departed"):
            state[key] = value.to(param.device)  # positions
        else:
            state[key] = _writable(value.to(device=param.device, dtype=_dtype_of(key, param, value, live)))
    for key, old in before.items():
        if key not in state:
            state[key] = old if key == "frozen" else old.zero_()
    return state


def moments_of(
    entry: dict[str, Any], rule: Rule, param: Tensor, live: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the slots in a saved entry and the dtype in which `taken` takes each."""
    for slot in rule.slots:
        if slot.name in entry:
            yield slot.name, _dtype_of(slot.name, param, entry[slot.name], live)


def _writable(value: Tensor) -> Tensor:
    """Return a tensor that a step can write: no two entries share memory, and it is not a lazy view."""
    if is_dtensor(value):
        return value
    value = value.resolve_conj().resolve_neg()
    shared = any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.clone(memory_format=torch.contiguous_format) if shared else value


def _dtype_of(key: str, param: Tensor, value: Tensor, live: Mapping[str, torch.dtype]) -> torch.dtype:
    """Return the dtype in which `key` of a saved entry is taken.

    A moment takes the dtype of the live state, which its maker has chosen. Without a live state it takes the dtype of
    the arithmetic; but 16 bits under a float32 or float64 parameter were chosen on purpose too, and stay.
    """
    if key in ("indices", "departed"):
        return value.dtype
    if is_compact(key) or (key == "importance" and value.dtype == torch.bfloat16):
        return value.dtype
    fixed, usual = {"importance": torch.float32, **FIXED_DTYPES}.get(key), arithmetic_dtype(param.dtype)
    if fixed is not None:
        return fixed
    if live.get(key) in (*FLOATING, usual) and live[key].is_complex == usual.is_complex:
        return live[key]
    return value.dtype if key not in live and value.dtype in _HALVES and usual == param.dtype else usual
