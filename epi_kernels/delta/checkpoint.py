"""Deltas and checkpoints in files: a folder of ``save_pretrained``, sharded or not, is patched without its model.

Only the bytes of the delta's entries are read and written. Files are looked at one after the other: a checkpoint
may be larger than memory.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epi_kernels.delta import container, file
from epi_kernels.delta.entries import (
    Delta,
    Entries,
    belongings,
    bits_of,
    by_name,
    check,
    check_before,
    check_digest,
    check_dtype,
    check_undoes,
    checksum,
    digest_of,
    line_of,
)
from epi_kernels.engine.groups import without_wrappers

# entries of a tensor that are looked at together: they stay in the cache
_CHUNK = 1 << 16

# files of weights in other forms, which a merge would leave as they were
_OTHER_WEIGHTS = frozenset({".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth"})

_INTEGERS: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a checkpoint."""

    name: str
    path: Path
    stored: container.Stored


class Checkpoint:
    """The tensors of a checkpoint by name, and where they are.

    Args:
        path: a folder with ``*.safetensors`` files, of which ``*.safetensors.index.json`` says which belong together;
            or one such file.

    Raises:
        FileNotFoundError: there is nothing, or a file that the index names is missing.
        ValueError: a file is damaged, or the index says something else than the files.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist; give a folder of save_pretrained, or a file of it")
        self.weights: dict[str, Weight] = {}
        for one in self._files():
            for name, stored in container.read_header(one).tensors.items():
                if name in self.weights:
                    raise ValueError(f"{name} is in {self.weights[name].path} and in {one}; remove one of the files")
                self.weights[name] = Weight(name, one, stored)

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        found = sorted(self.path.glob("*.safetensors"))
        indices = sorted(self.path.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise ValueError(f"{self.path} has several indices: {', '.join(index.name for index in indices)}")
        if indices:
            try:
                names = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
                found = [self.path / Path(name).name for name in sorted(names)]
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                raise ValueError(f"{indices[0]} is no index of a sharded checkpoint: {error!r}") from error
            for one in found:
                if not one.exists():
                    raise FileNotFoundError(f"{indices[0]} names {one.name}, which is not there; copy it, too")
        if not found:
            raise FileNotFoundError(
                f"{self.path} has no *.safetensors; save the model with save_pretrained(safe_serialization=True)"
            )
        return found


def known_dtype(weight: Weight) -> torch.dtype:
    """Return the dtype of a tensor of a checkpoint, or raise ValueError."""
    if weight.stored.dtype is None:
        raise ValueError(f"{weight.name} is in {weight.path} in a dtype that is not known here")
    return weight.stored.dtype


@contextmanager
def bits_in(weight: Weight, mode: Any, path: Path | None = None) -> Iterator[Any]:
    """Open the integers that a tensor of a file consists of, which need not be aligned there."""
    dtype, stored = known_dtype(weight), weight.stored
    if stored.begin == stored.end:
        yield np.empty(0, _INTEGERS[dtype.itemsize])
        return
    mapped = np.memmap(path or weight.path, np.uint8, mode)
    try:
        yield mapped[stored.begin : stored.end].view(_INTEGERS[dtype.itemsize])
        if mode != "r":
            mapped.flush()
    finally:
        del mapped


def values_from(integers: Any, dtype: torch.dtype) -> Tensor:
    """Return a copy of integers of a file as values."""
    return torch.from_numpy(integers.copy()).view(dtype)


@dataclass(frozen=True, slots=True)
class Place:
    """Entries of a delta, and what a checkpoint has where they belong."""

    name: str  # in the delta
    weight: Weight
    positions: Tensor
    values: Tensor
    old: Tensor


def places_in(checkpoint: Checkpoint, delta: Delta, convert: bool, whole: bool, otherwise: str) -> list[Place]:
    """Return what is to be written where, with what is there, after all checks."""
    names = by_name(delta, checkpoint.weights, "the checkpoint")
    found = []
    for name, (positions, values) in delta.items():
        weight = checkpoint.weights[names[name]]
        dtype, shape = known_dtype(weight), weight.stored.shape
        expected = delta.shapes.get(name)
        if expected is not None and expected != shape:
            raise ValueError(f"{name} has shape {shape} in the checkpoint and {expected} in the delta's base")
        check(name, positions, values, shape)
        check_dtype(name, values.dtype, dtype, "the checkpoint", convert)
        with bits_in(weight, "r") as integers:
            old = values_from(integers[positions.numpy()], dtype)
        found.append(Place(name, weight, positions, values.to(dtype), old))
    if whole:
        check_digest(delta, _digest(checkpoint))
    sums = {p.name: int(checksum(p.positions, p.old)) for p in found if delta[p.name][1].dtype == p.old.dtype}
    check_before(delta, sums, otherwise)
    return found


def _write(places: list[Place], folder: Path | None = None) -> None:
    for place in places:
        path = place.weight.path if folder is None else folder / place.weight.path.name
        with bits_in(place.weight, "r+", path) as integers:
            integers[place.positions.numpy()] = bits_of(place.values).numpy()


def _old(places: list[Place], delta: Delta) -> Delta:
    return Delta(
        {p.name: (p.positions, p.old) for p in places},
        shapes={p.name: p.weight.stored.shape for p in places},
        before={p.name: int(checksum(p.positions, p.values)) for p in places},
        base=delta.target,
        target=delta.base,
    )


def apply(
    path: str | PathLike[str],
    delta: Mapping[str, Entries],
    undo: str | PathLike[str],
    *,
    convert: bool = False,
    digest: bool = False,
) -> Delta:
    """Write a delta's values into the files of a checkpoint, in place, and return what was there.

    A machine that fails in the middle leaves some entries old and some new, which neither this function nor `undo`
    takes: `merge`, whose result appears complete or not at all, is for where that matters.

    Args:
        path: a folder of save_pretrained, or a file of safetensors; written.
        delta: as `epi_kernels.delta.apply` takes it; names are those in the checkpoint.
        undo: the file that the delta of the old values is saved to before anything else is written.
        convert: as in `epi_kernels.delta.apply`.
        digest: as in `epi_kernels.delta.apply`, of the checkpoint's tensors.

    Raises:
        ValueError: as `epi_kernels.delta.apply`; or a file of the checkpoint is a link, as in the cache of the
            Hub: other checkpoints may use it.
        FileExistsError: there is a file at `undo`.
    """
    undo = Path(undo)
    if undo.exists():
        raise FileExistsError(f"{undo} exists, and may be what undoes another delta; give another name")
    of = belongings(delta)
    places = places_in(
        _own(path),
        of,
        convert,
        digest,
        "the model from which the delta was made. Apply it to the base that its task began with",
    )
    old = _old(places, of)
    file.save(old, undo)
    _write(places)
    return old


def undo(path: str | PathLike[str], old: Delta) -> None:
    """Write back the values that `apply` has replaced in the files of a checkpoint, bit for bit.

    Args:
        path: to which the delta was applied; written.
        old: what `apply` returned and saved.

    Raises:
        ValueError: an entry has been overwritten since, or `old` does not fit; nothing has been written.
    """
    check_undoes(old)
    otherwise = "were written there: they have been overwritten since. Undo what came later first"
    _write(places_in(_own(path), old, False, False, otherwise))


def _own(path: str | PathLike[str]) -> Checkpoint:
    found = Checkpoint(path)
    for weight in found.weights.values():
        if weight.path.is_symlink():
            raise ValueError(f"{weight.path} is a link, and others may use its file; merge into a folder of its own")
    return found


def merge(
    base: str | PathLike[str],
    delta: Mapping[str, Entries],
    out: str | PathLike[str],
    *,
    convert: bool = False,
    digest: bool = False,
) -> list[str]:
    """Write a checkpoint that has a delta's values, file by file: a copy of the base in which its entries are replaced.

    Args:
        base: a folder of save_pretrained; read.
        delta: as in `apply`.
        out: the new folder, which appears once it is complete. Configuration and tokenizer are copied.
        convert: as in `apply`.
        digest: as in `apply`.

    Returns:
        What has not been copied: weights in other forms than safetensors, which would be those of the base, and hidden
        files.

    Raises:
        ValueError: as `apply`; nothing has been written.
        FileExistsError: `out` exists and is not empty.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from epi_kernels.delta.container import write
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, out = Path(folder, "base"), Path(folder, "out")
        ...     base.mkdir()
        ...     write(base / "model.safetensors", {"weight": torch.zeros(3)}, {})
        ...     merge(base, {"weight": (torch.tensor([1]), torch.tensor([0.5]))}, out)
        ...     Checkpoint(out).weights["weight"].stored.shape
        []
        (3,)
    """
    base, out = Path(base), Path(out)
    check_free(out)
    checkpoint = Checkpoint(base)
    if base.is_file():
        raise ValueError(f"{base} is a file; give the folder of the checkpoint")
    places = places_in(
        checkpoint,
        belongings(delta),
        convert,
        digest,
        "the model from which the delta was made. Merge it into the base that its task began with",
    )
    ours = {weight.path for weight in checkpoint.weights.values()}
    left_out = []
    with complete(out) as made:
        for path in sorted(base.iterdir()):
            stale = path.suffix in _OTHER_WEIGHTS or (path.suffix == ".safetensors" and path not in ours)
            if path.name.startswith(".") or stale:
                left_out.append(path.name)
            elif path.is_dir():
                shutil.copytree(path, made / path.name)
            else:
                shutil.copyfile(path, made / path.name)
                _write([p for p in places if p.weight.path == path], made)
    return left_out


def check_free(out: Path) -> None:
    """Check that a folder can be made, or raise FileExistsError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; give another folder")


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """Make a folder that takes its name once everything is in it, and is deleted if that fails."""
    check_free(out)
    made = out.with_name(f".{out.name}.part")
    made.mkdir(parents=True)
    try:
        yield made
        made.replace(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def digest(path: str | PathLike[str]) -> str:
    """Return the digest of a checkpoint: `epi_kernels.delta.digest` of a model with the same tensors."""
    return _digest(Checkpoint(path))


def _digest(checkpoint: Checkpoint) -> str:
    lines = []
    for name, weight in checkpoint.weights.items():
        dtype = known_dtype(weight)
        total = torch.zeros((), dtype=torch.int64, device="cpu")
        with bits_in(weight, "r") as integers:
            for begin in range(0, len(integers), _CHUNK):
                part = values_from(integers[begin : begin + _CHUNK], dtype)
                where = torch.arange(begin, begin + len(part), dtype=torch.int64, device="cpu")
                total += checksum(where, part)
        lines.append(line_of(without_wrappers(name), dtype, weight.stored.shape, int(total)))
    return digest_of(lines)
