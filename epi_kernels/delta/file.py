"""A delta in a file: about 4 bytes for an entry of a bfloat16 parameter.

The file is safetensors. Of each parameter it has ``<name>.values``, as they are, and ``<name>.gaps``, the number of
entries between each position and the one before it, in 16 bits: 65535 stands for as many and goes on with the next
number. Of d entries of which k are selected the gaps need at most 2k + d / 32768 bytes. The metadata have shapes,
checksums of the old values, digests of base and target, and a checksum over all bytes of the file.
"""

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epi_kernels.delta import container
from epi_kernels.delta.entries import Delta, Entries, belongings, check, narrow

_POSITIONS, _GAPS, _VALUES = ".indices", ".gaps", ".values"

# what a number of 16 bits cannot say and begins
_ESCAPE = (1 << 16) - 1

# of the form of the file, and the keys of its metadata
_VERSION = "2"
_FORM, _PARAMETERS, _BASE, _TARGET = "epi_kernels.delta", "parameters", "base", "target"


def save(delta: Mapping[str, Entries], path: str | PathLike[str]) -> None:
    """Write a delta into a safetensors file; a file of that name is replaced once the new one is complete.

    Args:
        delta: what `SparseAdamW.delta`, `apply` or `combine` returned, or a dict.
        path: of the file.

    Raises:
        ValueError: positions or values do not fit each other, a position occurs twice, or values have a dtype that
            safetensors does not have.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"weight": (torch.tensor([1]), torch.tensor([0.5]))}, folder + "/task.safetensors")
        ...     load(folder + "/task.safetensors")
        {'weight': (tensor([1], dtype=torch.int32), tensor([0.5000]))}
    """
    of = belongings(delta)
    tensors, parameters = {}, {}
    for name, (positions, values) in of.items():
        shape = of.shapes.get(name)
        check(name, positions, values, shape)
        positions, values = positions.cpu().long(), values.cpu()
        if not bool((positions[1:] > positions[:-1]).all()):
            positions, order = positions.sort()
            values = values[order]
        tensors[name + _GAPS], tensors[name + _VALUES] = _gaps(positions), values
        about: dict[str, Any] = {} if shape is None else {"shape": list(shape)}
        if name in of.before:
            about["before"] = f"{of.before[name] % (1 << 64):016x}"
        parameters[name] = about
    metadata = {"format": "pt", _FORM: _VERSION, _PARAMETERS: json.dumps(parameters, separators=(",", ":"))}
    metadata |= {key: digest for key, digest in ((_BASE, of.base), (_TARGET, of.target)) if digest is not None}
    container.write(Path(path), tensors, metadata, sealed=True)


def load(path: str | PathLike[str]) -> Delta:
    """Return the delta in a file that `save` wrote, in this version or an earlier one.

    Nothing in a file is executed, and every byte of it counts for its checksum. Files of versions before 0.2 have
    positions of 32 bits and no checksum.

    Raises:
        ValueError: the file is no delta, or it is truncated, damaged or does not fit together; the message says where.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    header, tensors = container.read(path)
    version = header.metadata.get(_FORM)
    try:
        if version is None:
            return _earlier(tensors)
        if version != _VERSION:
            raise ValueError(f"it is of version {version}, and {_VERSION} is read here; update epi_kernels")
        return _loaded(tensors, header.metadata)
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no delta that save() wrote: {error}") from error


def _gaps(positions: Tensor) -> Tensor:
    """Return the gaps before ascending positions, as uint16."""
    gaps = positions - torch.cat([positions.new_full((1,), -1), positions[:-1]])[: len(positions)] - 1
    escapes, last = gaps // _ESCAPE, gaps % _ESCAPE
    words = torch.full((len(positions) + int(escapes.sum()),), _ESCAPE, dtype=torch.int32, device="cpu")
    places = torch.arange(len(positions), dtype=torch.int64, device="cpu") + escapes.cumsum(0)
    words[places] = last.int()
    return words.to(torch.uint16)


def _positions(gaps: Tensor) -> Tensor:
    """Return the positions that gaps say: ascending, int64."""
    words = gaps.long()
    ends = words != _ESCAPE
    return (words + ends).cumsum(0)[ends] - 1


def _loaded(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Delta:
    if container.CHECKSUM not in metadata:
        raise ValueError("it has no checksum")
    parameters = json.loads(metadata[_PARAMETERS])
    if {name + suffix for name in parameters for suffix in (_GAPS, _VALUES)} != tensors.keys():
        raise ValueError(f"its tensors are not those of its metadata: {', '.join(tensors)}")
    delta = Delta(base=metadata.get(_BASE), target=metadata.get(_TARGET))
    for name, about in parameters.items():
        gaps, values = tensors[name + _GAPS], tensors[name + _VALUES]
        if gaps.dtype != torch.uint16 or gaps.dim() != 1 or (len(gaps) and int(gaps[-1]) == _ESCAPE):
            raise ValueError(f"{name} has no gaps of 16 bits, or they end in the middle of one")
        positions = _positions(gaps)
        shape = about.get("shape")
        if shape is not None:
            delta.shapes[name] = tuple(container.natural(shape))
        check(name, positions, values, delta.shapes.get(name))
        if "before" in about:
            delta.before[name] = (int(about["before"], 16) + (1 << 63)) % (1 << 64) - (1 << 63)
        count = int(positions[-1]) + 1 if shape is None and len(positions) else math.prod(shape or ())
        delta[name] = (narrow(positions, count), values)
    return delta


def _earlier(tensors: dict[str, Tensor]) -> Delta:
    names = [key.removesuffix(_POSITIONS) for key in tensors if key.endswith(_POSITIONS)]
    if {key for name in names for key in (name + _POSITIONS, name + _VALUES)} != tensors.keys():
        raise ValueError(f"it holds {', '.join(tensors)}")
    for name in names:
        check(name, tensors[name + _POSITIONS], tensors[name + _VALUES], None)
    return Delta({name: (tensors[name + _POSITIONS], tensors[name + _VALUES]) for name in names})
