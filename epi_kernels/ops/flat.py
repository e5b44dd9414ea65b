"""Tensors of any strides as flat memory, for kernels that know nothing about strides."""

from collections.abc import Sequence

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor | None]]


class Flat:
    """Lists of tensors whose entries lie side by side; all tensors at one position have the same order of entries.

    Where the tensors at a position are dense and have equal strides, in whatever order, they are used in place.
    Elsewhere contiguous copies replace the tensors that are not contiguous, and `write_back` copies the written ones
    back.

    Args:
        written, read: the lists. An empty list counts as absent; None skips a position.
        strided: the positions that need copies, if they are already known from tensors of the same layouts.
        row_major: the order of all entries must be row-major, on which noise and blocks depend: wherever a tensor is
            not contiguous its position gets copies.

    Example:
        >>> columns = torch.zeros(2, 3)[:, ::2]
        >>> flat = Flat(written=[[columns]], read=[[torch.ones(2, 2)]])
        >>> _ = flat.written[0][0].add_(flat.read[0][0])
        >>> flat.write_back()
        >>> columns
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(
        self, *, written: Lists, read: Lists = (), strided: Sequence[int] | None = None, row_major: bool = False
    ) -> None:
        self.written = [list(tensors) for tensors in written]
        self.read = [list(tensors) for tensors in read]
        self._copies: list[tuple[Tensor, Tensor]] = []
        lists = [tensors for tensors in (*self.written, *self.read) if tensors]
        if strided is None:
            count = len(lists[0]) if lists else 0
            usable = _contiguous if row_major else _same_order
            strided = [i for i in range(count) if not usable([tensors[i] for tensors in lists])]
        self.strided = strided
        for i in strided:
            for tensors in lists:
                tensors[i] = self._contiguous(tensors[i], any(tensors is other for other in self.written))

    def write_back(self) -> None:
        """Copy the written copies back into the tensors that they replaced."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)

    def _contiguous(self, tensor: Tensor | None, written: bool) -> Tensor | None:
        if tensor is None or tensor.is_contiguous():
            return tensor
        copy = tensor.contiguous()
        if written:
            self._copies.append((tensor, copy))
        return copy


def put_(tensor: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Write values at positions in row-major order of a tensor of any strides, and return the tensor.

    It replaces torch.Tensor.put_, which torch.use_deterministic_algorithms(True) refuses, although the result is
    deterministic when all positions differ.

    Args:
        tensor: written.
        positions: int64 [k], each once.
        values: [k], of the tensor's dtype.
    """
    if tensor.is_contiguous():
        tensor.view(-1)[positions] = values
    else:
        tensor[torch.unravel_index(positions, tensor.shape)] = values
    return tensor


def _contiguous(tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


def _same_order(tensors: list[Tensor | None]) -> bool:
    present = [tensor for tensor in tensors if tensor is not None]
    if _contiguous(present):
        return True
    strides = {tensor.stride() for tensor in present}
    # empty_like keeps the strides of a tensor only if the tensor is dense
    return len(strides) == 1 and torch.empty_like(present[0], device="meta").stride() in strides
