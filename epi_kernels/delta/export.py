"""Deltas in the forms of other programs: vLLM's sparse patches, SGLang's weight versions, an adapter of PEFT.

A merged checkpoint, which every program reads, is `epi_kernels.delta.checkpoint.merge`.
"""

import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from epi_kernels.delta import container
from epi_kernels.delta.checkpoint import Checkpoint, Place, bits_in, check_free, complete, places_in, values_from
from epi_kernels.delta.entries import Entries, belongings, bits_of, check

T = TypeVar("T")

# of a zstandard frame (RFC 8878): its beginning, with 8 bytes of the size to follow; and the most bytes of a block
_ZSTD, _BLOCK = b"\x28\xb5\x2f\xfd\xe0", 1 << 17

_OTHERWISE = "the model from which the delta was made. Give the checkpoint that its task began with"


class SparsePatch(NamedTuple):
    """What vLLM's ``SparseWeightPatch`` has: a patch of one tensor of a checkpoint."""

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def vllm(delta: Mapping[str, Entries], patch: Callable[..., T] = SparsePatch) -> list[T]:  # type: ignore[assignment]
    """Return a delta as the patches that vLLM's weight transfer "sparse_nccl" sends to a running server.

    ``engine.send_weights(vllm(delta, SparseWeightPatch))``: vLLM's own loader maps names and positions of the
    checkpoint to its shards, whatever their number. Move the tensors to the sender's device first.

    Args:
        delta: with the shapes of its parameters, as `SparseAdamW.delta` makes it; the names are those of the
            checkpoint that the server has loaded (`epi_kernels.delta.rename`).
        patch: called with ``name``, ``indices`` (int32 [k], ascending, contiguous), ``values`` ([k], contiguous) and
            ``full_shape``: ``SparseWeightPatch`` of ``vllm.distributed.weight_transfer.sparse_nccl_engine``.

    Raises:
        ValueError: a shape is not known, a tensor has 2^31 entries or more, values are not of a floating dtype, or one
            is NaN, with which vLLM marks the entries that stay.

    Example:
        >>> from epi_kernels.delta import Delta
        >>> vllm(Delta({"weight": (torch.tensor([1]), torch.tensor([0.5]))}, shapes={"weight": (2, 1)}))
        [SparsePatch(name='weight', indices=tensor([1], dtype=torch.int32), values=tensor([0.5000]), full_shape=(2, 1))]
    """
    of = belongings(delta)
    found = []
    for name, (positions, values) in of.items():
        shape = of.shapes.get(name)
        check(name, positions, values, shape)
        if shape is None:
            raise ValueError(f"vLLM needs the shape of {name}; set delta.shapes[{name!r}] = tuple(parameter.shape)")
        if math.prod(shape) >= 1 << 31:
            raise ValueError(f"{name} has {math.prod(shape)} entries, and vLLM has positions of 32 bits; send it whole")
        if not values.is_floating_point():
            raise ValueError(f"{name} has values of {values.dtype}; vLLM takes those of a floating dtype")
        if values.isnan().any():
            raise ValueError(f"{name} has a NaN, with which vLLM marks entries that stay; send it whole")
        order = positions.argsort()
        found.append(
            patch(name=name, indices=positions[order].int(), values=values[order].contiguous(), full_shape=shape)
        )
    return found


def sglang(
    base: str | PathLike[str], delta: Mapping[str, Entries], folder: str | PathLike[str], version: int = 1
) -> Path:
    """Write a delta as a version of weights that SGLang's ``/pull_weights`` takes, in the form that slime publishes.

    ``POST /pull_weights {"source_dir": folder, "target_version": version, "local_checkpoint_dir": ...}`` patches the
    server's copy of the checkpoint, and ``/update_weights_from_disk`` loads it. The encoding is "overwrite": the bytes
    that differ, at their positions in the tensor. Frames of zstandard are not compressed; the checksum of each new
    tensor is its Adler-32.

    Args:
        base: the checkpoint that the server has: version 0, or the one before this after `merge`. Read, one tensor
            after the other.
        delta: its names are those in the checkpoint.
        folder: of the versions; ``weight_v000001`` appears in it once it is complete.
        version: one more than the server has.

    Returns:
        The path of the new version.

    Raises:
        ValueError: the delta does not fit the checkpoint, or a tensor has 2^32 bytes or more; nothing is written.
        FileExistsError: the version exists.
    """
    if version < 1:
        raise ValueError(f"version is {version}; the checkpoint that a server starts with is 0, the first delta 1")
    out = Path(folder) / f"weight_v{version:06d}"
    check_free(out)
    patches, checksums = {}, {}
    for place in places_in(Checkpoint(base), belongings(delta), False, False, _OTHERWISE):
        stored = place.weight.stored
        if stored.end - stored.begin >= 1 << 32:
            raise ValueError(f"{place.name} has {stored.end - stored.begin} bytes, and positions have 32 bits")
        size, positions = place.values.element_size(), place.positions.numpy().astype(np.int64)
        old, new = (np.asarray(container.bytes_of(values)) for values in (place.old, place.values))
        differ = np.flatnonzero(old != new)
        if not len(differ):
            continue
        where = positions[differ // size] * size + differ % size
        order = where.argsort()
        frame = _frame(
            struct.pack("<I", len(where)) + where[order].astype("<u4").tobytes() + new[differ[order]].tobytes()
        )
        patches[place.weight.name] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        checksums[place.weight.name] = f"{_adler32(place):08x}"
    name = "model-00000-of-00001.safetensors"
    index = {
        "metadata": {
            "version": f"{version:06d}",
            "base_version": f"{version - 1:06d}",
            "delta_encoding": "overwrite",
            "compression_format": "zstd",
            "checksum_format": "adler32",
        },
        "weight_map": dict.fromkeys(patches, name),
    }
    with complete(out) as made:
        container.write(made / name, patches, checksums)
        (made / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return out


def _adler32(place: Place) -> int:
    """Return the checksum of a whole tensor with its new values."""
    with bits_in(place.weight, "r") as integers:
        whole = integers.copy()
    whole[place.positions.numpy()] = bits_of(place.values).numpy()
    return zlib.adler32(whole)


def _frame(content: bytes) -> bytes:
    """Return a frame of zstandard that has these bytes as they are."""
    parts = [_ZSTD, len(content).to_bytes(8, "little")]
    for begin in range(0, len(content), _BLOCK):
        block = content[begin : begin + _BLOCK]
        last = begin + _BLOCK >= len(content)
        parts += [(last | len(block) << 3).to_bytes(3, "little"), block]
    return b"".join(parts)


def peft(
    base: str | PathLike[str],
    delta: Mapping[str, Entries],
    out: str | PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write a delta as an adapter of PEFT, of the type SHiRA, that gives the same weights to the bit; else refuse.

    SHiRA adds numbers in float32 to r * (rows + columns) entries of every linear layer that it has. Its r is the least
    that holds all entries of each layer, and the rest of a layer's entries get 0. That an entry becomes what the delta
    says is computed as PEFT does it: in bfloat16 and float16 it mostly does, in float32 where the change is small
    against the weight.

    Args:
        base: the checkpoint, a folder of save_pretrained; read.
        delta: of weights of ``torch.nn.Linear`` alone; its names are those of the model's parameters, and those in the
            checkpoint. PEFT itself refuses layers of another kind.
        out: the new folder, for ``PeftModel.from_pretrained(model, out)``.
        base_model_name_or_path: of the model, for the adapter's configuration.

    Raises:
        ValueError: the delta does not fit the checkpoint, a parameter is no matrix with a name that ends in
            ``.weight``, a layer is too small for r, or a sum in float32 would not be the delta's value; nothing is
            written, and the message says what to do.
        FileExistsError: `out` exists and is not empty.
    """
    check_free(Path(out))
    places = places_in(Checkpoint(base), belongings(delta), False, False, _OTHERWISE)
    if not places:
        raise ValueError("the delta has no parameters, and an adapter needs a layer")
    instead = "merge the delta into a checkpoint instead (epi_kernels.delta.checkpoint.merge)"
    for place in places:
        if len(place.weight.stored.shape) != 2 or not place.weight.name.endswith(".weight"):
            raise ValueError(
                f"{place.name} of shape {place.weight.stored.shape} is no weight of a linear layer, which SHiRA needs; "
                f"{instead}"
            )
    r = max(1, *(-(-len(place.positions) // sum(place.weight.stored.shape)) for place in places))
    tensors = {}
    for place in places:
        rows, columns = place.weight.stored.shape
        if r * (rows + columns) > rows * columns:
            raise ValueError(
                f"{place.name} has {rows * columns} entries, and SHiRA would change {r * (rows + columns)} in each of "
                f"its layers of that shape, for r={r}; {instead}"
            )
        added = _added(place)
        if added is None:
            raise ValueError(
                f"{place.name} has entries that PEFT's sum of the old value and a float32 would not bring to the bits "
                f"of the delta; {instead}"
            )
        fill = _fill(place, r * (rows + columns) - len(place.positions))
        if fill is None:
            raise ValueError(f"{place.name} has too few entries that an added 0 leaves as they are; {instead}")
        positions, order = torch.cat([place.positions.long(), fill]).sort()
        module = f"base_model.model.{place.weight.name.removesuffix('.weight')}"
        tensors[f"{module}.shira_weight"] = torch.cat([added, added.new_zeros(len(fill))])[order]
        tensors[f"{module}.shira_indices"] = torch.stack([positions // columns, positions % columns]).int()
    modules = [re.escape(place.weight.name.removesuffix(".weight")) for place in places]
    config = {
        "peft_type": "SHIRA",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": r,
        "mask_type": "random",  # PEFT draws positions first, and reads these over them
        "target_modules": "|".join(modules),
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "task_type": None,
    }
    with complete(Path(out)) as made:
        container.write(made / "adapter_model.safetensors", tensors, {"format": "pt"})
        (made / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _added(place: Place) -> Tensor | None:
    """Return what is to be added to the old values, in float32; None if no number does."""
    exact = place.values.double() - place.old.double()
    first = exact.float()
    found = torch.full_like(first, math.nan)
    infinity = torch.full_like(first, math.inf)
    for tried in (first, torch.nextafter(first, infinity), torch.nextafter(first, -infinity), first.new_full((), -0.0)):
        tried = tried.expand_as(first)
        where = torch.arange(len(first), dtype=torch.int64, device="cpu")
        sparse = torch.sparse_coo_tensor(
            torch.stack([where * 0, where]), tried, (1, len(first)), device="cpu", check_invariants=True
        )
        summed = place.old[None].clone()
        summed += sparse
        right = (bits_of(summed[0]) == bits_of(place.values)) & found.isnan()
        found[right] = tried[right]
    return None if found.isnan().any() else found


def _fill(place: Place, count: int) -> Tensor | None:
    """Return positions outside of the delta to which 0 may be added; None if there are too few of them."""
    with bits_in(place.weight, "r") as integers:
        whole = values_from(integers, place.values.dtype)
    free = whole.isfinite() & ~((whole == 0) & whole.signbit())
    free[place.positions.long()] = False
    found = free.nonzero()[:count, 0]
    return found if len(found) == count else None
