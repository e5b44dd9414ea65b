"""How the tensors of a parameter's state are kept: the settings that say so, and the keys under which they are.

Values are under the name of their slot (``exp_avg``), in float32 or bfloat16. Codes in blocks of 8 bits have keys of
their own, ``exp_avg_codes`` and ``exp_avg_scales``, so that no other optimizer takes codes for values. The rest of a
weight of more bits than its bfloat16 parameter is ``rest``.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from epi_kernels.distributed import is_dtensor, is_slice, local, offsets_of, wrapped
from epi_kernels.engine.settings import Groups, is_count
from epi_kernels.notices import warn
from epi_kernels.rules import Rule
from epi_kernels.storage import block8, split
from epi_kernels.storage.noise import Place, key_of

# settings of a group, and what they are where nobody says otherwise
DEFAULTS: dict[str, Any] = {
    "state_dtype": None,
    "importance_dtype": None,
    "rounding": "nearest",
    "master_weight_bits": None,
    "rounding_seed": 0,
}

REST = "rest"

# what says how a state is kept
StorageArgument = torch.dtype | Literal["8bit"] | None

_DTYPES = (None, torch.float32, torch.bfloat16, "8bit")

# the smallest tensor that is kept in blocks of 8 bits: in scales and ragged rows a smaller one would save nothing
SMALLEST = 4096


def check_settings(group: Mapping[str, Any]) -> None:
    """Check the settings of a group that say how numbers are kept, as far as the group has them.

    Raises:
        ValueError: a setting has a value that it cannot have, or two exclude each other.
    """
    for key in ("state_dtype", "importance_dtype"):
        dtype = group.get(key)
        if not any(dtype is known or (isinstance(dtype, str) and dtype == known) for known in _DTYPES):
            raise ValueError(f"Invalid {key}: {dtype!r}; choose None, torch.float32, torch.bfloat16 or '8bit'")
    settings = {**DEFAULTS, **group}
    rounding, bits, seed = settings["rounding"], settings["master_weight_bits"], settings["rounding_seed"]
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"Invalid rounding: {rounding!r}; choose 'nearest' or 'stochastic'")
    if bits is not None and not (is_count(bits, 0, 64) and bits in split.RESTS):
        raise ValueError(f"Invalid master_weight_bits: {bits!r}; choose None, 24 or 32")
    if bits == 32 and rounding == "stochastic":
        raise ValueError(
            "rounding='stochastic' with master_weight_bits=32: such weights are exact and are not rounded; use "
            "rounding='nearest', or master_weight_bits=24"
        )
    if not is_count(seed, -(1 << 63), 1 << 64):
        raise ValueError(f"Invalid rounding_seed: {seed!r}; it is an integer of at most 64 bits")
    if group.get("amsgrad") and group.get("state_dtype") == "8bit":
        raise ValueError(
            "amsgrad=True with state_dtype='8bit': the largest second moment would lose its bits whenever its block's "
            "scale changes; use state_dtype=torch.bfloat16"
        )
    used = [f"{key}={group[key]!r}" for key, usual in DEFAULTS.items() if not is_usual(key, group.get(key, usual))]
    if group.get("differentiable") and used:
        raise ValueError(f"differentiable=True with {', '.join(used)}: autograd cannot go through rounded numbers")
    own = group.get("importance_dtype")
    if group.get("importance") not in (None, "ema") and own not in (None, group.get("state_dtype") or torch.float32):
        raise ValueError(
            f"importance={group['importance']!r} with importance_dtype={group['importance_dtype']!r}: the importance "
            "is the second moment, which state_dtype describes; leave importance_dtype at None"
        )


def said(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those of a storage that say what holds anyway.

    A group has only the others: a checkpoint from before these settings has none of them, and
    torch.distributed.checkpoint looks for every key that a group has.
    """
    return {key: value for key, value in settings.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def take_dtypes(group: MutableMapping[str, Any]) -> None:
    """Put dtypes in the place of the names that `packed_group` gives them, where a group has such names."""
    for key in ("state_dtype", "importance_dtype"):
        for dtype in _DTYPES:
            if isinstance(dtype, torch.dtype) and group.get(key) == _name_of(dtype):
                group[key] = dtype


def packed_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a group as a checkpoint has them, with the names of dtypes.

    torch gathers a state with ``full_state_dict=True`` only if its groups have nothing but numbers, texts and tensors.
    """
    return {key: _name_of(value) if isinstance(value, torch.dtype) else value for key, value in group.items()}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_usual(key: str, value: Any) -> bool:
    """Return whether a setting says what it says where nobody sets it; a seed alone changes nothing."""
    return key == "rounding_seed" or value == DEFAULTS[key] or (key == "state_dtype" and value == torch.float32)


def check_parameters(groups: Groups, name_of: Callable[[Tensor], str]) -> None:
    """Check that some parameter can have what the groups ask for; a group may ask for what some of it cannot have.

    Args:
        groups: torch's.
        name_of: what messages call a parameter.

    Raises:
        ValueError: no parameter of the optimizer is bfloat16, and a group has ``master_weight_bits``; or no parameter
            is large enough for blocks of 8 bits, and a group asks for them.
    """

    def params() -> Iterator[Tensor]:
        """Yield the parameters that have entries: a step alone of each must not look at all of them."""
        for group in groups:
            yield from (param for param in group["params"] if not torch.nn.parameter.is_lazy(param))

    first = next(params(), None)
    if first is None:
        return
    bits = next((group["master_weight_bits"] for group in groups if group.get("master_weight_bits")), None)
    if bits is not None and not any(param.dtype == torch.bfloat16 for param in params()):
        raise ValueError(
            f"master_weight_bits={bits}, and no parameter is bfloat16 ({name_of(first)} is {first.dtype}): there is "
            "nothing to keep more bits of; leave it at None, or convert the model first, by model.to(torch.bfloat16)"
        )
    for key in ("state_dtype", "importance_dtype"):
        if any(group.get(key) == "8bit" for group in groups) and not any(map(qualifies, params())):
            raise ValueError(
                f"{key}='8bit', and no parameter has 2 dimensions, {SMALLEST} entries and rows of {block8.BLOCK} "
                f"({name_of(first)} has shape {tuple(first.shape)}): a wrapper may have flattened the parameters, as "
                f"FSDP1 and DeepSpeed do; use {key}=torch.bfloat16, or FSDP2 (fully_shard)"
            )


def check_parameter(param: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Check that a parameter can be kept as its group asks.

    Raises:
        NotImplementedError: it is float64 or complex; or a shard cuts a block of 8 bits, or lies in the whole tensor in
            a way for which there is no noise.
    """
    used = [key for key, usual in DEFAULTS.items() if not is_usual(key, group.get(key, usual))]
    if used and (param.is_complex() or param.dtype == torch.float64):
        raise NotImplementedError(
            f"{used[0]}={group[used[0]]!r} and {name}, which is {param.dtype}: its states are kept in that precision; "
            "leave the setting at its default in the group of this parameter"
        )
    noisy = [key for key in ("state_dtype", "importance_dtype") if group.get(key) in (torch.bfloat16, "8bit")]
    noisy += ["rounding"] if rounds(param, group) else []
    if noisy and len({dim for dim, _ in _cuts(param) if dim > 0}) > 1:
        raise NotImplementedError(f"{noisy[0]}={group[noisy[0]]!r} and {_scattered(param, name)}")
    for key in ("state_dtype", "importance_dtype"):
        if group.get(key) == "8bit":
            way_out = f"use {key}=torch.bfloat16 in the group of this parameter"
            if is_slice(param):
                raise NotImplementedError(
                    f"{key}='8bit' and {name}, a slice that FSDP1 made, which cuts rows and blocks; {way_out}, or FSDP2"
                )
            if qualifies(param) and _cuts_blocks(param):
                raise NotImplementedError(
                    f"{key}='8bit' and {name}, placed {param.placements}: its shards cut "  # type: ignore[attr-defined]
                    f"blocks of {block8.BLOCK} entries of a row; {way_out}"
                )


def check_rest(state: Mapping[str, Any], name: str, group: Mapping[str, Any]) -> None:
    """Check that the rest in a parameter's state, if there is one, has the bits that its group asks for.

    Raises:
        ValueError: it has others.
    """
    rest, bits = state.get(REST), group.get("master_weight_bits")
    if isinstance(rest, Tensor) and rest.dtype != split.RESTS.get(bits or 0):
        own = next((own for own, dtype in split.RESTS.items() if dtype == rest.dtype), rest.dtype)
        raise ValueError(
            f"master_weight_bits={bits!r} in the group of {name}, and the rest of its weight in the state has {own} "
            f"bits: its values go with no others. Set master_weight_bits={own}, or take 'rest' out of the state, which "
            "rounds the weight to what stands in the parameter"
        )


def qualifies(param: Tensor) -> bool:
    """Return whether the states of a parameter can be kept in blocks of 8 bits; its global shape alone decides."""
    shape = param.shape
    return len(shape) > 1 and shape.numel() >= SMALLEST and shape[1:].numel() >= block8.BLOCK


def _cuts(param: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (dimension, number of ranks) of each cut that a mesh makes through a DTensor; the same on every rank."""
    if not is_dtensor(param):
        return
    for i, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        ranks = param.device_mesh.size(i)  # type: ignore[attr-defined]
        # the placement by which FSDP2 cuts what tensor parallelism has cut has a `dim`, and denies is_shard()
        if ranks > 1 and not (placement.is_replicate() or placement.is_partial()):
            yield placement.dim % param.dim(), ranks


def _cuts_blocks(param: Tensor) -> bool:
    """Return whether the shard of some rank begins or ends within a block; the same answer on every rank.

    What is cut several times within its rows counts too, and what torch would cut otherwise than its scales.
    """
    inner = [(dim, ranks) for dim, ranks in _cuts(param) if dim > 0]
    if not inner:
        return False
    (dim, ranks), *more = inner
    if dim > 1 or more:
        return True
    entries, blocks = param.shape[2:].numel(), block8.scales_shape(param.shape)[1]
    chunk = -(-param.shape[1] // ranks) * entries
    return chunk % block8.BLOCK != 0 or chunk // block8.BLOCK != -(-blocks // ranks)


def _scattered(param: Tensor, name: str) -> str:
    """Return the text for a shard for whose entries there is no noise."""
    return (
        f"{name}, placed {param.placements}, over several of its inner dimensions, "  # type: ignore[attr-defined]
        "where stochastic rounding does not know the place of an entry; keep states in float32 and rounding='nearest' "
        "in the group of this parameter"
    )


# States --------------------------------------------------------------------------------------------------------------


def keys_of(name: str) -> tuple[str, str, str]:
    """Return the keys under which a slot or an importance may be: its values; or its codes, and their scales."""
    return name, f"{name}_codes", f"{name}_scales"


def name_of_key(key: str) -> str:
    """Return the name of the slot that a key belongs to."""
    return key.removesuffix("_codes").removesuffix("_scales")


def stored(state: Mapping[str, Any], name: str) -> tuple[Tensor | None, Tensor | None]:
    """Return (values, None) of a slot or an importance, (codes, scales), or (None, None) where there is none."""
    values, codes, scales = keys_of(name)
    if codes in state:
        return state[codes], state[scales]
    return state.get(values), None


def dtypes_of(rule: Rule, state: Mapping[str, Any], others: Sequence[str]) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the name and dtype of every slot that a state has, uint8 for codes, and those of other names."""
    for name in (*(slot.name for slot in rule.slots), *others):
        tensor, _ = stored(state, name)
        if isinstance(tensor, Tensor):
            yield name, tensor.dtype


def wanted_dtype(setting: Any, param: Tensor) -> torch.dtype | None:
    """Return the dtype in which a state of a parameter is to be kept, uint8 for codes; None: as it is, else float32."""
    if setting == "8bit":
        return torch.uint8 if qualifies(param) else torch.bfloat16
    return torch.bfloat16 if setting == torch.bfloat16 else None


def importance_setting(group: Mapping[str, Any]) -> Any:
    """Return how the importance of a group is to be kept: ``state_dtype`` where ``importance_dtype`` is None."""
    own = group.get("importance_dtype")
    return group.get("state_dtype") if own is None else own


def put(state: MutableMapping[str, Any], name: str, tensor: Tensor, scales: Tensor | None) -> None:
    """Put values, or codes and scales, into a state, and take the slot's other form out."""
    keys = keys_of(name)
    for key in keys:
        state.pop(key, None)
    state.update({keys[0]: tensor} if scales is None else {keys[1]: tensor, keys[2]: scales})


def new_scales(param: Tensor, device: torch.device) -> Tensor:
    """Return scales of 0 for the shard of a parameter, as a DTensor if it is one."""
    shape = block8.scales_shape(local(param).shape)
    zeros = torch.zeros(shape, dtype=torch.float32, device=device)
    return zeros if not is_dtensor(param) else wrapped(zeros, param, torch.Size(block8.scales_shape(param.shape)))


def converted(
    tensor: Tensor, scales: Tensor | None, dtype: torch.dtype, *, positive: bool
) -> tuple[Tensor, Tensor | None]:
    """Return a state of a parameter in another storage, rounded to nearest, with its sign bits.

    Args:
        tensor: values, or codes with `scales`.
        scales: of codes, else None.
        dtype: of the result; uint8: codes.
        positive: see `epi_kernels.storage.block8.encoded`.
    """
    shard = local(tensor)
    values = shard if scales is None else block8.decoded(shard, local(scales))
    if dtype != torch.uint8:
        # contiguous, as noise needs the states that it rounds
        form = torch.preserve_format if dtype == torch.float32 else torch.contiguous_format
        return wrapped(values.to(dtype, memory_format=form), tensor), None
    middle = torch.full(values.shape, 1 << 15, dtype=torch.int64, device=values.device)
    codes, made = block8.encoded(values.float().contiguous(), middle, positive=positive)
    return wrapped(codes, tensor), wrapped(made, tensor, torch.Size(block8.scales_shape(tensor.shape)))


def rounds(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether the parameter itself, or its weight of 24 bits, is rounded stochastically."""
    halves = (torch.bfloat16, torch.float16)
    return group.get("rounding") == "stochastic" and param.dtype in halves


# Checkpoints ---------------------------------------------------------------------------------------------------------

# settings that say how this optimizer keeps its numbers, which a checkpoint does not change
OWN = ("state_dtype", "importance_dtype", "rounding", "master_weight_bits")


def is_compact(key: object) -> bool:
    """Return whether a key of a state has codes, scales or rests, which are not values."""
    return isinstance(key, str) and (key == REST or key.endswith(("_codes", "_scales")))


def packed(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a state as a checkpoint has it: a rest of 16 bits as two bytes, int8 [..., 2], which share its memory.

    Neither gloo nor NCCL sends int16, so that torch could not gather or broadcast it.
    """
    rest = entry.get(REST)
    if not isinstance(rest, Tensor) or rest.dtype != torch.int16:
        return entry
    parts = local(rest).contiguous().unsqueeze(-1).view(torch.int8)
    return {**entry, REST: wrapped(parts, rest, torch.Size((*rest.shape, 2)))}


def narrowed(key: str, tensor: Tensor, dimensions: int) -> Tensor:
    """Return saved codes, scales or a rest in their own dtype, where no loader has cast them so that bits are lost.

    Args:
        key: of the state.
        tensor: as it was saved.
        dimensions: how many the state has here; a rest with one more is that of `packed`.

    Raises:
        ValueError: a cast has lost bits, or the values are none that this key can have.
    """
    value = local(tensor)
    if key.endswith("_scales"):
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"it is {value.dtype}, and scales are float32: a loader has cast them, and lost bits")
        return wrapped(value.float(), tensor, tensor.shape)
    parts = key == REST and value.dim() == dimensions + 1 and value.shape[-1] == 2
    dtype = torch.uint8 if key.endswith("_codes") else torch.int8
    if value.dtype == torch.int16 and key == REST and not parts:
        return tensor
    if value.dtype != dtype:
        limits = torch.iinfo(dtype)  # within which every floating-point dtype tells the integers apart
        whole = value if value.dtype == torch.bool or value.is_complex() else value.to(torch.int64)
        if value.dtype == whole.dtype or not bool(
            ((whole == value) & (whole >= limits.min) & (whole <= limits.max)).all()
        ):
            raise ValueError(
                f"it is {value.dtype}, and {dtype} here: a loader has cast it, and lost bits. Load the state by "
                "load_state_dict of this optimizer, or by torch.distributed.checkpoint"
            )
        value = whole.to(dtype)
    if parts:
        value = value.clone() if value.storage_offset() % 2 else value.contiguous()
        return wrapped(value.view(torch.int16).squeeze(-1), tensor, tensor.shape[:-1])
    return wrapped(value, tensor, tensor.shape)


def asked_for(
    entry: dict[str, Any], names: Sequence[str], param: Tensor, group: Mapping[str, Any], positive: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Return a saved state in the storages that a group asks for, and the names of what was converted.

    Args:
        entry: of the parameter; its tensors are this rank's shards if the parameter is a DTensor.
        names: of the slots, and "importance" where the optimizer has one.
        param: the parameter.
        group: its group.
        positive: the slot whose positive values must not become 0.
    """
    found, changed = dict(entry), []
    in_slot = group.get("importance", "ema") != "ema"
    for name in names:
        if name == "importance" and in_slot:
            continue  # a second name of the slot, for its locks
        setting = importance_setting(group) if name == "importance" else group.get("state_dtype")
        tensor, scales = stored(found, name)
        dtype = wanted_dtype(setting, param)
        if tensor is None:
            continue
        other = tensor.dtype != dtype
        if dtype is None:
            # a moment in bfloat16 may have been made so by a framework, and `taken` decides
            other = scales is not None or (name == "importance" and tensor.dtype == torch.bfloat16)
        if other:
            put(found, name, *converted(tensor, scales, dtype or torch.float32, positive=name == positive))
            changed.append(name)
    return found, changed


def say_converted(names: Sequence[str]) -> None:
    """Warn that states were converted at a load; `names` are what messages call them."""
    if names:
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        warn(
            f"the state was kept otherwise than this optimizer keeps its own: {names[0]}{more} were converted, rounded "
            "to nearest"
        )


def check_bits(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a saved group has no weights of other bits than this optimizer's.

    Raises:
        ValueError: it has.
    """
    theirs, ours = saved.get("master_weight_bits"), own.get("master_weight_bits")
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"master_weight_bits={theirs!r} in the state, and {ours!r} here: the rests of the weights go with no "
            f"other bits; construct the optimizer with master_weight_bits={theirs!r}"
        )


# Noise ---------------------------------------------------------------------------------------------------------------


def place_of(param: Tensor, name: str, group: Mapping[str, Any], rank: int | None, first: int) -> Place:
    """Return where the entries of a parameter, or of this rank's shard, lie in the whole tensor.

    Args:
        param: the parameter.
        name: the text by which the noise knows it.
        group: its group.
        rank: joins the key of the noise, where nothing else tells the entries of several ranks apart.
        first: the offset of the first entry, if the parameter is no DTensor.

    Raises:
        NotImplementedError: the shard does not lie in the whole tensor in runs of one length.
    """
    key = key_of(int(group.get("rounding_seed", 0)), name, rank)
    shape, whole, starts = local(param).shape, param.shape, offsets_of(param)
    entries = max(1, shape.numel())
    row = max(1, shape[1:].numel()) if shape else 1
    strides = [whole[d + 1 :].numel() for d in range(len(whole))]
    first += sum(start * stride for start, stride in zip(starts, strides, strict=True))
    cut = [d for d in range(1, len(whole)) if shape[d] != whole[d]]
    if not cut:
        return Place(key, first, entries, 0, row)
    if len(cut) > 1:
        raise NotImplementedError(_scattered(param, name))
    run, of_whole = max(1, shape[cut[0] :].numel()), whole[cut[0] :].numel()
    return Place(key, first, run, of_whole - run, row)
