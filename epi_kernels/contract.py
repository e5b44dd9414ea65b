"""What every operation of the package agrees on: dtypes, score keys, and the checks of its arguments.

Backends import this module and nothing above it. A check stands here once; a backend assumes that it has passed.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# the dtypes of tensors in an operation; int8 is that of a static lock and of 8 bits of a rest, int16 that of 16 bits of
# a rest, and uint8 that of codes in blocks
_DTYPES = frozenset({*FLOATING, torch.int8, torch.int16, torch.uint8})

# A score is a non-negative float32, so its bits, read as an integer, order as its value does. The 31 bits below the
# sign are cut into digits, highest first; the first one alone has 16 bins for each factor of two (see `threshold`).
KEY_DIGITS = (12, 10, 9)

# of each digit, highest first: the number of bits below it, and of values that it can have
DIGITS = tuple((sum(KEY_DIGITS[i + 1 :]), 1 << bits) for i, bits in enumerate(KEY_DIGITS))

# Below this a float32 is subnormal. Hardware that flushes subnormals (a library built with -ffast-math switches that on
# for the whole process) and hardware that keeps them must protect the same entries, so an importance below it counts as
# 0 everywhere, and so does a difference of importances.
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

# A product or quotient that decides a mask counts as 0 below this. SMALLEST_NORMAL is too low: a result that rounds up
# to it on one hardware is flushed on the other, which rounds to all bits of a normal number before it looks.
NEGLIGIBLE = 2 * SMALLEST_NORMAL


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a step of a parameter of `dtype` is computed and its moments are kept.

    float32 for everything but float64, which stays as it is.
    """
    return torch.promote_types(dtype, torch.float32)


def budget(isolation_ratio: float, eligible: int) -> int:
    """Return k = floor(p * d + 1e-9), the number of entries to protect, in double (spec of Eq. 9).

    Example:
        >>> budget(0.01, 250), budget(0.29, 100)
        (2, 29)
    """
    # 0.29 * 100 is 28.999999999999996: without the 1e-9 one entry would be lost to the binary fraction
    return math.floor(isolation_ratio * eligible + 1e-9)


def shares_memory(tensor: Tensor) -> bool:
    """Return whether several entries of a strided tensor are one place in memory, which no step may write.

    Example:
        >>> shares_memory(torch.ones(3, 1).expand(3, 4)), shares_memory(torch.ones(3, 4).t())
        (True, False)
    """
    if tensor.is_contiguous() or not tensor.numel():
        return False
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach = 0  # the largest offset within the dimensions with smaller strides
    for stride, size in dims:
        if stride <= reach or stride == 0:
            break
        reach += (size - 1) * stride
    else:
        return False
    if dims[0][0] == 0:
        return True
    # strides that interleave: a case rare enough to try every entry
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in dims:
        offsets = offsets.unsqueeze(-1) + stride * torch.arange(size, dtype=torch.int64, device="cpu")
    return len(offsets.unique()) < tensor.numel()


def check_lists(
    optional: Mapping[str, Sequence[Tensor | None]] | None = None, /, **lists: Sequence[Tensor | None]
) -> None:
    """Check that the tensors of an operation belong together; the first list decides.

    Args:
        optional: name -> tensors, like `lists`; an empty list is absent.
        lists: name -> tensors. Entry i of each list must have the shape and the device of entry i of the first list; a
            None skips its position.

    Raises:
        ValueError: lengths, shapes or devices differ; the message names the list, the position and both values.
        TypeError: a tensor is neither floating point nor int8.
    """
    first, owners = next(iter(lists.items()))
    absent = {name for name, tensors in (optional or {}).items() if not tensors}
    lists = {**lists, **(optional or {})}
    for name, tensors in lists.items():
        if name not in absent and len(tensors) != len(owners):
            raise ValueError(f"{name} has {len(tensors)} tensors but {first} has {len(owners)}; pass one for each")
    # every step of an optimizer comes through here: a shape is read once for each tensor
    kinds = [None if owner is None else (owner.shape, owner.device) for owner in owners]
    for name, tensors in lists.items():
        for i, (tensor, kind) in enumerate(zip(tensors, kinds, strict=False)):
            if tensor is None or kind is None:
                continue
            if tensor.dtype not in _DTYPES:
                raise TypeError(f"{name}[{i}] is {tensor.dtype}; the operations take {', '.join(map(str, FLOATING))}")
            if (tensor.shape, tensor.device) != kind:
                shape, device = kind
                if tensor.shape != shape:
                    raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)} but {first}[{i}] has {tuple(shape)}")
                raise ValueError(f"{name}[{i}] is on {tensor.device} but {first}[{i}] is on {device}")


def check_indices(params: Sequence[Tensor], indices: Sequence[Tensor], **states: Sequence[Tensor | None]) -> None:
    """Check the indices of a sparse operation and the compact tensors that have one value for each.

    Indices increase, so the first and the last decide their range. They are read only on the CPU: reading them on an
    accelerator would wait for it.

    Raises:
        ValueError: lengths, shapes or devices differ, or an index is out of range.
        TypeError: indices are neither int64 nor int32.
    """
    if len(indices) != len(params):
        raise ValueError(f"indices has {len(indices)} tensors but params has {len(params)}; pass one for each")
    for i, (param, chosen) in enumerate(zip(params, indices, strict=True)):
        if chosen.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices[{i}] is {chosen.dtype}; pass int64 or int32")
        if chosen.dim() != 1:
            raise ValueError(f"indices[{i}] has shape {tuple(chosen.shape)}; pass one dimension")
        if chosen.device != param.device:
            raise ValueError(f"indices[{i}] is on {chosen.device} but params[{i}] is on {param.device}")
        if chosen.device.type == "cpu" and chosen.numel():
            first, last = int(chosen[0]), int(chosen[-1])
            if first < 0 or last >= param.numel():
                raise ValueError(
                    f"indices[{i}] goes from {first} to {last} but params[{i}] has {param.numel()} entries"
                )
    for name, tensors in states.items():
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=False)):
            if tensor is not None and tensor.device != param.device:
                raise ValueError(f"{name}[{i}] is on {tensor.device} but params[{i}] is on {param.device}")
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
        wanted = [tuple(chosen.shape) for chosen in indices]
        if len(shapes) != len(wanted) or any(s not in (None, w) for s, w in zip(shapes, wanted, strict=True)):
            raise ValueError(f"{name} has the shapes {shapes}; pass one value for each of the indices")
    if states:
        check_lists(**states)


def check_one_device(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    """Check that the tensors of a list are on one device, where a backend runs.

    Raises:
        ValueError: one is on another device; the message names its position and both devices.
    """
    for i, tensor in enumerate(tensors):
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}; pass it on {device}, or call once for each device")


def check_one_dtype(**lists: Sequence[Tensor]) -> None:
    """Check that the tensors of each list have one dtype: one launch serves one combination.

    Raises:
        TypeError: naming the list and two dtypes in it.
    """
    for name, tensors in lists.items():
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        if len(dtypes) > 1:
            raise TypeError(f"{name} are {' and '.join(dtypes)}; call the operation once for each dtype")


def check_tensor(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    """Check an argument whose memory compiled code reads or writes with this dtype and shape; None is absent.

    Raises:
        TypeError: the dtype is another.
        ValueError: the shape or the device is another, or the tensor is not contiguous.
    """
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}; pass {dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; pass {tuple(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; pass it on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; pass it contiguous")


def check_value(name: str, tensor: Tensor | None, device: torch.device) -> None:
    """Check an argument that is float32 of one value, of any shape, or None; raises as `check_tensor` does."""
    if tensor is not None:
        check_tensor(name, tensor, torch.float32, tensor.shape if tensor.numel() == 1 else (1,), device)


def check_positions(name: str, positions: Sequence[int], count: int, of: str, length: int | None) -> None:
    """Check that each of `count` tensors has a position below `length`; `of` names what the positions are in.

    With None as `length`, any position will do.

    Raises:
        ValueError: there are more or fewer positions than tensors, or one is out of range.
    """
    if len(positions) != count:
        raise ValueError(f"{name} has {len(positions)} values for {count} tensors; pass one for each")
    for i, position in enumerate(positions):
        if length is not None and not 0 <= position < length:
            raise ValueError(f"{name}[{i}] is {position}, and {of} has {length}; pass 0 to {length - 1}")


def check_rows(scalars: Tensor, rows: Sequence[int], count: int, width: int) -> None:
    """Check a table of scalars, `width` to a row, and the row that each of `count` tensors uses of it.

    Raises:
        TypeError: the table is not float64.
        ValueError: the shape is not [n, width], a tensor has no row in it, it is not on the CPU, or not contiguous.
    """
    if scalars.dim() != 2 or scalars.shape[1] != width:
        raise ValueError(f"scalars has shape {tuple(scalars.shape)}, not [n, {width}]")
    check_tensor("scalars", scalars, torch.float64, scalars.shape, torch.device("cpu"))
    if len(rows) != count or not all(0 <= row < len(scalars) for row in rows):
        raise ValueError(
            f"rows is {list(rows)}; pass for each of {count} tensors one of {len(scalars)} rows of scalars"
        )
