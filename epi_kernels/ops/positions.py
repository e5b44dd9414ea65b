"""Values at positions of many tensors, taken and put: by the native library where that can, and else by torch."""

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from epi_kernels import schema
from epi_kernels.backends import native
from epi_kernels.ops.flat import put_


def take_all(tensors: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
    """Return the values at positions in row-major order of each tensor, bit for bit.

    Args:
        tensors: of any dtypes and strides, on any devices.
        positions: for each tensor int64 [k], strictly increasing, on its device.

    Raises:
        IndexError: a position is out of range.

    Example:
        >>> take_all([torch.tensor([[1.0, 2.0], [3.0, 4.0]])], [torch.tensor([0, 3])])
        [tensor([1., 4.])]
    """
    fast = [_is_native(tensor, where) for tensor, where in zip(tensors, positions, strict=True)]
    values = [
        torch.empty(where.shape, dtype=tensor.dtype, device="cpu") if is_native else torch.take(tensor, where)
        for tensor, where, is_native in zip(tensors, positions, fast, strict=True)
    ]
    _move("epi_take", fast, tensors, positions, values)
    return values


def put_all_(tensors: Sequence[Tensor], positions: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values at positions in row-major order of each tensor, bit for bit.

    Args:
        tensors: as in `take_all`, written; no two of them overlap.
        positions: as in `take_all`.
        values: for each tensor contiguous [k], of its dtype, on its device.

    Raises:
        IndexError: a position is out of range.
        RuntimeError: values have another dtype than their tensor.

    Example:
        >>> tensor = torch.zeros(2, 2)
        >>> put_all_([tensor], [torch.tensor([0, 3])], [torch.tensor([1.0, 4.0])])
        >>> tensor
        tensor([[1., 0.],
                [0., 4.]])
    """
    fast = [
        _is_native(tensor, where) and tensor.dtype == new.dtype
        for tensor, where, new in zip(tensors, positions, values, strict=True)
    ]
    for tensor, where, new, is_native in zip(tensors, positions, values, fast, strict=True):
        if is_native:
            increment_version(tensor)
        else:
            put_(tensor, where, new)
    _move("epi_put", fast, tensors, positions, values)


def _is_native(tensor: Tensor, positions: Tensor) -> bool:
    """Return whether the native library can move entries of this tensor: whether they are plain memory."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.is_cpu
        and positions.is_cpu
        and tensor.is_contiguous()
        and positions.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.element_size() in (1, 2, 4, 8)
        and not native.obstacle()
    )


def _move(
    function: str,
    fast: Sequence[bool],
    tensors: Sequence[Tensor],
    positions: Sequence[Tensor],
    values: Sequence[Tensor],
) -> None:
    """Call a function of the library for the tensors that are `fast`.

    Raises:
        IndexError: a position is out of range; nothing is moved in that tensor.
    """
    if not any(fast):
        return
    memory, where, of = (list(compress(all_of, fast)) for all_of in (tensors, positions, values))
    table = native.table_of(schema.POSITIONS.struct, positions=where, memory=memory, values=of)
    table["entries"] = [tensor.numel() for tensor in memory]
    table["entry_bytes"] = [tensor.element_size() for tensor in memory]
    native.call(function, table)
    for i in table["outside"].nonzero()[0]:
        raise IndexError(f"position {int(where[i][-1])} is out of range for a tensor of {memory[i].numel()} entries")
