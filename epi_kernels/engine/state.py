"""The state of a parameter: made where it lacks something, and checked before a step reads or writes it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_capturable_supported_devices

from epi_kernels.contract import arithmetic_dtype, shares_memory
from epi_kernels.distributed import is_sharded, local
from epi_kernels.engine import differentiable
from epi_kernels.engine.storages import (
    REST,
    check_parameter,
    converted,
    dtypes_of,
    new_scales,
    put,
    stored,
    wanted_dtype,
)
from epi_kernels.rules import Rule
from epi_kernels.storage import split

# states with a fixed dtype, loaded or new
FIXED_DTYPES = {"frozen": torch.int8, "trainable": torch.uint8, "joined": torch.int32}

# where the lock bit is -> the name of the state that has it, for locks with a state of their own
LOCK_STATE = {"importance": "importance", "static": "frozen"}

# options that say how a step is taken, which not every parameter can have
OPTIONS = ("fused", "capturable", "differentiable", "clip_grad_norm")

# options that are refused for parameters that are sharded over ranks, and what to do instead
_NOT_SHARDED = {
    "capturable": "",
    "differentiable": "",
    "clip_grad_norm": "; clip before the step, by torch.nn.utils.clip_grad_norm_ or what the wrapper has for it",
}

# a state of this many entries or more is staggered: each starts STAGGER bytes after the one before
STAGGER_FROM = 1 << 14
STAGGER = 832
_STAGGERED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "importance", "frozen", REST)


def new_state(param: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros for the state `name` of a parameter.

    They have the given dtype and are contiguous, as stochastic rounding and codes need them; without a dtype, they have
    that in which this package keeps such a state, and lie as `param` does.

    On the CPU the states of a large parameter start at different offsets within a page. Large allocations all start at
    the same offset, so that a sweep through five of them finds their lines in the same cache sets: staggered, it took
    2 to 5% less time. (Huge pages brought nothing beyond that.)
    """
    form = torch.preserve_format if dtype is None else torch.contiguous_format
    if dtype is None:
        dtype = torch.float32 if name == "importance" else FIXED_DTYPES.get(name) or arithmetic_dtype(param.dtype)
    with torch.inference_mode(False):  # else the state could not be written outside of it
        if local(param) is not param or param.device.type != "cpu" or param.numel() < STAGGER_FROM:
            return torch.zeros_like(param, dtype=dtype, memory_format=form)
        strides = torch.empty_like(param, device="meta", memory_format=form).stride()
        offset = STAGGER * (1 + (_STAGGERED.index(name) if name in _STAGGERED else len(_STAGGERED))) // dtype.itemsize
        memory = torch.zeros(param.numel() + offset, dtype=dtype, device=param.device)
        return memory.as_strided(param.shape, strides, offset)


def new_clock(value: float | Tensor, device: torch.device | None, fused: bool) -> Tensor:
    """Return a ``state["step"]`` of `value`, where and in which dtype torch has it.

    Args:
        value: how many steps were taken.
        device: where the clock runs; None: on the host.
        fused: the setting of the parameter's group, under which torch's clocks are float32.
    """
    if device is not None or fused:
        dtype = torch.float32
    else:
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        # a 16-bit clock soon stops counting: 256 + 1 is 256 in bfloat16
        own = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
        return value.to(device or value.device, torch.float32 if device else own)
    with torch.inference_mode(False):  # else the clock could not be counted outside of it
        return torch.tensor(value, dtype=dtype, device=device or "cpu")


def ensure_slots(rule: Rule, state: dict[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    """Create the slots of a rule that a state lacks, and a rest; convert those that are kept otherwise than asked.

    The clock is the caller's.
    """
    for slot in rule.slots:
        if slot.wanted(group):
            ensure(state, slot.name, param, group.get("state_dtype"), positive=slot.name == rule.importance_slot)
    dtype = split.RESTS.get(group.get("master_weight_bits") or 0) if param.dtype == torch.bfloat16 else None
    if dtype is not None and REST not in state:
        state[REST] = new_state(param, REST, dtype)


def ensure(state: dict[str, Any], name: str, param: Tensor, setting: Any, *, positive: bool = False) -> None:
    """Let a state have a slot or an importance, kept as `setting` asks; what is there is converted.

    Args:
        state: the parameter's; written.
        name: of the slot.
        param: the parameter.
        setting: a ``state_dtype`` or ``importance_dtype``.
        positive: see `epi_kernels.storage.block8.encoded`.
    """
    tensor, scales = stored(state, name)
    dtype = wanted_dtype(setting, param)
    if tensor is None:
        made = new_state(param, name, dtype)
        put(state, name, made, new_scales(param, made.device) if dtype == torch.uint8 else None)
    elif (scales is not None) if dtype is None else (tensor.dtype != dtype):
        # without a setting, values that a framework has made in bfloat16 stay so
        put(state, name, *converted(tensor, scales, dtype or torch.float32, positive=positive))


def storages_of(rule: Rule, state: Mapping[str, Any]) -> tuple[tuple[str, torch.dtype], ...]:
    """Return the slots, importance and rest of a state that are not float32, with their dtypes; uint8 for codes.

    One launch takes parameters for which this is equal.
    """
    kept = [(name, dtype) for name, dtype in dtypes_of(rule, state, ("importance", REST)) if dtype != torch.float32]
    return tuple(kept)


def check_memory(param: Tensor, name: str) -> None:
    """Check that each entry of a parameter has a place in memory of its own, where a step can write.

    Raises:
        RuntimeError: the parameter is a lazily conjugated or negated view, or several of its entries share memory.
    """
    if param.is_conj() or param.is_neg():
        raise RuntimeError(
            f"{name} is {'conjugated' if param.is_conj() else 'negated'} lazily: its values are not "
            "in memory, where a step writes. Optimize the tensor that it is a view of, or "
            "resolve_conj().resolve_neg(), a copy"
        )
    if shares_memory(local(param)):
        raise RuntimeError(
            f"{name} is expanded, or strided over itself: several of its entries are one place in "
            "memory, and a step would write there several times; clone() it first"
        )


def check_shapes(state: Mapping[str, Any], keys: tuple[str, ...], param: Tensor, name: str) -> None:
    """Check that the tensors of a parameter's state have the shape of the parameter.

    Args:
        state: the parameter's.
        keys: the keys of the state that a step reads or writes.
        param: the parameter.
        name: what messages call it.

    Raises:
        ValueError: one has another shape; the message says what to do.
    """
    shard = local(param)
    for key in keys:
        value = state.get(key)
        if not isinstance(value, Tensor) or key.endswith("_scales"):
            continue
        if local(value).shape != shard.shape:
            raise ValueError(
                f"{name} has shape {tuple(shard.shape)} now, and {key} in its state "
                f"{tuple(local(value).shape)}. If you resized or replaced the parameter, give every tensor of "
                "optimizer.state[parameter] its shape too, importance and frozen included (0 for a new entry, "
                "which is free), or delete optimizer.state[parameter], which starts over"
            )


def check_options(param: Tensor, name: str, group: Mapping[str, Any], lock_in: str, partitioned: bool) -> None:
    """Check the options of a group that not every parameter can have.

    Args:
        param: a parameter of the group.
        name: what messages call it.
        group: the settings.
        lock_in: where the lock bits of the parameter are.
        partitioned: the user gave a process group.

    Raises:
        RuntimeError: ``differentiable`` and a leaf that requires a gradient; or torch's fused kernels cannot take it.
        NotImplementedError: ``capturable`` and a complex parameter; or an option is refused for sharded parameters.
        AssertionError: ``capturable`` on a device that has no graphs, in torch's words.
    """
    check_parameter(param, name, group)
    if group.get("differentiable"):
        differentiable.check(name, param, lock_in)
        if param.is_leaf and param.requires_grad:
            raise RuntimeError(
                f"{name} is a leaf that requires a gradient, into which a differentiable step cannot "
                "write; use differentiable=False"
            )
    if is_sharded(param) or partitioned:
        for flag, instead in _NOT_SHARDED.items():
            if group.get(flag):
                raise NotImplementedError(
                    f"{flag}={group[flag]!r} and {name}, which is shared out over ranks: not in this version{instead}"
                )
    if group["fused"]:
        _device_dtype_check_for_fused(param)
    if group["capturable"]:
        if param.is_complex():
            raise NotImplementedError(
                f"{name} is {param.dtype}, and its locks go by way of the host; use capturable=False"
            )
        supported = _get_capturable_supported_devices()
        if param.device.type not in supported:
            raise AssertionError(
                f"If capturable=True, params and state_steps must be on supported devices: {supported}."
            )
