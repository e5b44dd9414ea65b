"""Saved states of a base optimizer: checked before the base loads them, and loaded completely or not at all."""

import inspect
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from epi_kernels.distributed import local, shard_of
from epi_kernels.engine import storages
from epi_kernels.engine.checkpoint import check_form, check_place, check_tensor, named, pairs_of
from epi_kernels.engine.groups import name_of
from epi_kernels.engine.settings import Groups, check_shared
from epi_kernels.isolation.guest import CODES, KEYS, SCALES, VALUES, Held, check_storages, storage_settings
from epi_kernels.isolation.layers import check_saved
from epi_kernels.isolation.settings import CLOCK, SETTINGS, SHARED, check_settings
from epi_kernels.storage import block8

# all settings that a group of a base has from us, without the clock
OURS = (*SETTINGS, "importance_dtype", "rounding_seed")

# arguments that some of torch's optimizers have and others lack: they tell which optimizer a state comes from
_HYPERPARAMETERS = {
    name
    for each in vars(torch.optim).values()
    if isinstance(each, type) and issubclass(each, Optimizer) and each.__module__.startswith("torch.optim.")
    for name in inspect.signature(each).parameters
} - {"params", "defaults", "foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}


def in_torchs_form(packed: Any, groups: Groups) -> bool:
    """Return whether the state of a base has torch's form: one entry for each parameter, and each entry a dict."""
    try:
        fits = isinstance(packed, dict) and check_form(packed, groups)
    except ValueError:
        return False
    return fits and all(isinstance(entry, dict) for entry in packed["state"].values())


def own_form(groups: Groups) -> dict[str, Any]:
    """Return a state in torch's form that has only our settings."""
    found, number = [], 0
    for group in groups:
        keys = ("param_names", *OURS, CLOCK, "layers_auto", "layer_digest")
        members = list(range(number, number + len(group["params"])))
        number += len(members)
        found.append({**{key: group[key] for key in keys if key in group}, "params": members})
    return {"state": {}, "param_groups": found}


def clock_of(state_dict: dict[str, Any]) -> int:
    """Return the clock of a saved state; if the state has none, as a base's own state, return its largest ``step``."""
    groups = state_dict["param_groups"]
    if groups and CLOCK in groups[0]:
        return int(groups[0][CLOCK])
    steps = [entry.get("step", 0) for entry in state_dict["state"].values() if isinstance(entry, dict)]
    return max((int(local(step)) if isinstance(step, Tensor) else int(step) for step in steps), default=0)


def checked_entries(
    base: Optimizer, groups: Groups, state_dict: dict[str, Any], importances: dict[Tensor, Held]
) -> dict[Any, Any]:
    """Check a saved state, move its importances into `importances`, and return the other entries, for the base.

    Args:
        base: the optimizer that will load the entries.
        groups: the base's groups, with our settings.
        state_dict: the saved state, in torch's form.
        importances: filled with this rank's shard of each importance in the state, under the keys that it has there.

    Raises:
        ValueError: the state comes from another optimizer than the base, or has other shapes or another grouping, or
            a setting is out of its range; the message names the entry.
        NotImplementedError: see `check_storages`.
    """
    saved_groups = state_dict["param_groups"]
    check_saved(saved_groups, groups)
    own = [{key: group[key] for key in OURS if key in group} for group in groups]
    loaded = []
    for i, (ours, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        stays = {"importance_dtype": own[i].get("importance_dtype")}
        group = {**own[i], CLOCK: 0, **saved, **stays}
        with named(f"parameter group {i} of the state"):
            check_settings(group, "exp_avg_sq")
            storages.check_settings(storage_settings(group))
            check_shared(SHARED, group, {**own[0], **saved_groups[0]})
            if group["importance"] != "ema":
                raise ValueError(f"importance={group['importance']!r}: a base has no place for it; only 'ema' loads")
            if not isinstance(group[CLOCK], int) or group[CLOCK] < 0:
                raise ValueError(f"Invalid {CLOCK}: {group[CLOCK]!r}; it is a number of steps, >= 0")
            foreign = sorted((_HYPERPARAMETERS - base.defaults.keys()) & (saved.keys() - ours.keys()))
            if foreign and is_torchs(base):
                raise ValueError(f"{type(base).__name__}, the base, has no {', '.join(foreign)}")
        loaded.append({**group, "params": ours["params"]})
    check_storages(loaded, groups)
    entries = dict(state_dict["state"])
    for number, param in pairs_of(saved_groups, groups):
        entry, name = entries.pop(number, {}), name_of(param, groups)
        if not isinstance(entry, dict):
            raise ValueError(f"the state of {name} is a {type(entry).__name__} and not a dict")
        rest = {key: _of_base(base, key, value, param, name) for key, value in entry.items() if key not in KEYS}
        held = {key: entry[key] for key in KEYS if key in entry}
        if held:
            importances[param] = _checked_importance(held, param, name)
        if rest:  # some bases take any entry, even an empty one, for a state that they made
            entries[number] = rest
    if is_torchs(base):
        for i, (ours, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            members = zip(saved["params"], ours["params"], strict=True)
            with named(f"parameter group {i} of the state"):
                _check_goes_on(base, groups, ours, saved, {p: entries[n] for n, p in members if n in entries})
    return entries


def _checked_importance(held: Held, param: Tensor, name: str) -> Held:
    """Check an importance of a saved state, and return this rank's shard of it.

    Args:
        held: what the entry of the parameter has of it.
        param: the parameter.
        name: what messages call it.

    Raises:
        ValueError: it is incomplete, or a tensor of it has another shape, dtype or placement.
    """
    if (CODES in held) != (SCALES in held):
        has, lacks = (CODES, SCALES) if CODES in held else (SCALES, CODES)
        raise ValueError(f"the state of {name} has {has} and no {lacks}; it is incomplete")
    for key, value in held.items():
        shape = tuple(param.shape)
        if key == SCALES:
            shape = block8.scales_shape(param.shape) if param.dim() > 1 else ()
        check_tensor(key, value, param, name, shape)
    # codes are the importance where other code has left values too, as they are in a state
    return {key: shard_of(value, param) for key, value in held.items() if key != VALUES or CODES not in held}


def _check_goes_on(
    base: Optimizer,
    groups: Groups,
    ours: dict[str, Any],
    saved: dict[str, Any],
    entries: dict[Tensor, dict[str, Any]],
) -> None:
    """Check that the base, one of torch's optimizers, can take a step from a saved group and saved entries.

    A second optimizer of the same class tries such a step, with tensors of one value.

    Raises:
        ValueError: the base cannot; the message names the settings or the parameter.
    """
    for key, value in base.defaults.items():
        if (isinstance(value, bool) or key in ("foreach", "fused")) and not isinstance(saved.get(key), bool | None):
            raise ValueError(f"Invalid {key}: {saved[key]!r}; it is a flag")
    if not ours["params"] or not _goes_on(base, ours, ours["params"][0], {}):
        return  # this class cannot be tried with one value
    _goes_on(base, {**ours, **saved}, ours["params"][0], {}, "the settings")
    for param, entry in entries.items():
        _goes_on(base, {**ours, **saved}, param, entry, f"the state of {name_of(param, groups)}")


def _of_base(base: Optimizer, key: str, value: Any, param: Tensor, name: str) -> Any:
    """Check an item of the base's state, and return the item, or this rank's shard if the item is a whole tensor."""
    if not isinstance(value, Tensor):
        return value
    whole = tuple(param.shape)
    if is_torchs(base):
        # one number, or a value for each entry, or (Adafactor) a value for each row or column
        fits = value.dim() == len(whole) and all(a in (1, b) for a, b in zip(value.shape, whole, strict=True))
        check_place(key, value, param, name, tuple(value.shape) if fits or value.numel() == 1 else whole)
    return shard_of(value, param) if key != "step" and tuple(value.shape) == whole else value


@contextmanager
def as_before(base: Optimizer) -> Iterator[None]:
    """If the base raises, restore the base, its groups, its state, and the optimizers among its attributes."""
    held = [base, *(value for value in vars(base).values() if isinstance(value, Optimizer))]
    mappings: list[MutableMapping[Any, Any]] = [vars(one) for one in held]
    lists: list[list[Any]] = []
    for one in held:
        state, groups = getattr(one, "state", None), getattr(one, "param_groups", [])
        if isinstance(state, MutableMapping):
            mappings += [state, *(entry for entry in state.values() if isinstance(entry, MutableMapping))]
        mappings += groups
        lists.append(groups)
    contents, members = [dict(mapping) for mapping in mappings], [list(groups) for groups in lists]
    try:
        yield
    except BaseException:
        for mapping, content in zip(mappings, contents, strict=True):
            mapping.clear()
            mapping.update(content)
        for groups, had in zip(lists, members, strict=True):
            groups[:] = had
        raise


def is_torchs(base: Optimizer) -> bool:
    """Return whether an optimizer is one of torch's own."""
    return type(base).__module__.startswith("torch.optim.")


def _goes_on(
    base: Optimizer, group: dict[str, Any], param: Tensor, entry: dict[str, Any], what: str | None = None
) -> bool:
    """Return whether an optimizer of the class of `base` can step one value with these settings and this state.

    Raises:
        ValueError: the optimizer cannot, and `what` is given, which names the settings or the state in the message.
    """

    def small(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.zeros((1,) * value.dim(), dtype=value.dtype, device="cpu")
        return value

    def on_cpu(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(on_cpu, value))
        return value.detach().cpu() if isinstance(value, Tensor) else value

    shape = (1,) * (0 if is_lazy(param) else param.dim())
    one = torch.zeros(shape, dtype=param.dtype, device="cpu", requires_grad=True)
    one.grad = torch.zeros(shape, dtype=param.dtype, device="cpu")
    settings = {key: on_cpu(group[key]) for key in base.defaults if key in group}
    # the plain implementation of a step, which every class has
    flags = {
        key: value for key, value in (("foreach", False), ("fused", False), ("capturable", False)) if key in settings
    }
    differentiable = {"differentiable": False} if "differentiable" in settings else {}
    try:
        with torch.no_grad(), torch.device("cpu"):
            stand_in = type(base)([one])  # type: ignore[call-arg]
            stand_in.param_groups[0].update({**settings, **flags, **differentiable})
            if entry:
                stand_in.state[one] = {key: small(value) for key, value in entry.items()}
            inspect.unwrap(type(base).step)(stand_in)  # without the hooks that a program registered for all optimizers
    except Exception as error:
        if what is None:
            return False
        raise ValueError(
            f"{type(base).__name__}, the base, cannot go on from {what}: {type(error).__name__}: {error}"
        ) from error
    return True
