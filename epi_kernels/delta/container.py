"""safetensors files, read and written byte by byte: checked in whole, and patched in place where they are large.

A file is the length of its header in 8 bytes, the header in JSON, and the tensors' bytes without gaps. A sealed one is
an ordinary one, which any reader of safetensors reads; its metadata has a checksum of all bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# the names of dtypes in a header; other ones are carried along as bytes
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# safetensors reads no longer header
_LONGEST = 100_000_000

_METADATA, CHECKSUM = "__metadata__", "epi_kernels.checksum"
# a quotation mark within JSON's strings has a backslash before it: these bytes are in a header once
_MARK = b'"epi_kernels.checksum":"'
_DIGITS = 32


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is in a file, in bytes from its beginning."""

    dtype: torch.dtype | None  # None: one that torch does not have, or that is not listed
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors and the metadata of a file."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    data: int  # where the bytes of the tensors begin


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file, checked against the size of the file.

    Raises:
        ValueError: the file is none, is truncated, or its header contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST, size - 8):
            raise ValueError(f"{path} is no safetensors file, or truncated: it has {size} bytes")
        return parsed(file.read(length), size, path)


def parsed(text: bytes, size: int, path: Path) -> Header:
    """Return what the header of a file of `size` bytes says, checked; raise as `read_header`."""
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is no list of tensors")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has metadata that are no texts")
    data = 8 + len(text)
    tensors = {name: _stored(name, said, data, path) for name, said in header.items()}
    expected = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != expected:
            raise ValueError(f"{path} has {name} at byte {stored.begin}, where {expected} is next: it was changed")
        expected = stored.end
    if expected != size:
        raise ValueError(f"{path} has {size} bytes and its header tells of {expected}: it is truncated, or was changed")
    return Header(tensors, metadata, data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _stored(name: str, said: Any, data: int, path: Path) -> Stored:
    wrong = f"{path} has a header that does not say what {name} is"
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(wrong)
    shape, offsets = said["shape"], said["data_offsets"]
    try:
        natural(shape), natural(offsets)
    except ValueError as error:
        raise ValueError(wrong) from error
    if len(offsets) != 2 or offsets[1] < offsets[0] or not isinstance(said["dtype"], str):
        raise ValueError(wrong)
    dtype = DTYPES.get(said["dtype"])
    if dtype is not None and math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"{path} has {offsets[1] - offsets[0]} bytes of {name}, {said['dtype']} of shape {shape}")
    return Stored(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def natural(numbers: Any) -> list[int]:
    """Return a list from JSON if it is one of natural numbers of 63 bits, or raise ValueError."""
    # True is an int, too
    if not isinstance(numbers, list) or not all(type(one) is int and 0 <= one < 1 << 63 for one in numbers):
        raise ValueError(f"{numbers!r} is no list of natural numbers")
    return numbers


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Return the header of a file and its tensors, in memory of their own.

    Raises:
        ValueError: as `read_header`; or the file has a checksum and its bytes have another; or an unknown dtype.
    """
    header = read_header(path)
    whole = path.read_bytes()
    _check_checksum(whole, header, path)
    tensors = {}
    for name, stored in header.tensors.items():
        if stored.dtype is None:
            raise ValueError(f"{path} has {name} in a dtype that is not known here")
        # a copy is aligned and may be written
        part = bytearray(whole[stored.begin : stored.end])
        # a buffer of no bytes is refused
        flat = torch.frombuffer(part or bytearray(8), dtype=stored.dtype)[: None if part else 0]
        try:
            tensors[name] = flat.view(stored.shape)
        except RuntimeError as error:  # of no entries, but with a size that overflows
            raise ValueError(f"{path} has {name} of shape {list(stored.shape)}, which no tensor has") from error
    return header, tensors


def _check_checksum(whole: bytes, header: Header, path: Path) -> None:
    said = header.metadata.get(CHECKSUM)
    if said is None:
        return
    place = whole.find(_MARK, 0, header.data) + len(_MARK)
    if whole.count(_MARK, 0, header.data) != 1 or whole[place : place + _DIGITS] != said.encode():
        raise ValueError(f"{path} has a checksum that cannot be found in its header: it was changed")
    if _digest(whole[:place], bytes(_DIGITS), whole[place + _DIGITS :]) != said:
        raise ValueError(f"{path} was changed or damaged: its checksum is not that of its bytes. Copy it again")


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, sealed: bool = False) -> None:
    """Write a safetensors file; another file of that name is replaced once it is complete.

    Args:
        path: of the file.
        tensors: by name.
        metadata: texts by name.
        sealed: add a checksum over all bytes. A file that is patched afterwards has none.

    Raises:
        ValueError: a tensor has a dtype that safetensors does not have.
    """
    # wide ones first, so that every tensor is aligned
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {_METADATA: {**metadata, **({CHECKSUM: "0" * _DIGITS} if sealed else {})}}
    parts, begin = [], 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors does not have; convert it")
        part = bytes_of(tensor)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + len(part)],
        }
        parts.append(part)
        begin += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    if sealed:
        place = start.index(_MARK) + len(_MARK)
        checksum = _digest(start[:place], bytes(_DIGITS), start[place + _DIGITS :], *parts)
        start = start[:place] + checksum.encode() + start[place + _DIGITS :]
    with replacing(path) as file:
        file.write(start)
        for part in parts:
            file.write(part)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return flat.view(torch.uint8).numpy().data.cast("B")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes the place of `path` once it is complete, and is deleted if it is not."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            yield file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
