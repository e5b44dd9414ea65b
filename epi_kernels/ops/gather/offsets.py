"""Where trainable entries lie in memory: the offsets that compiled backends use."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# offsets fit int32 below this
_NARROW = 1 << 31


class Offsets:
    """The offsets of the trainable entries from the first entry of their tensor; int32 if that is wide enough for all.

    For a contiguous tensor, indices of the right width serve as offsets without a copy. Offsets that had to be computed
    live as long as their indices, because `kept` uses the indices as its keys.

    Example:
        >>> columns = torch.zeros(2, 4)[:, ::2]
        >>> offsets = Offsets([columns], [torch.ones(2, 2)], [torch.tensor([1, 2])])
        >>> offsets.of_params, offsets.of_grads, offsets.wide
        ([tensor([2, 4], dtype=torch.int32)], [tensor([1, 2], dtype=torch.int32)], False)
    """

    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], indices: Sequence[Tensor], *, positions: bool = False
    ) -> None:
        self.wide = any(_span(tensor) > _NARROW for tensor in (*params, *grads))
        dtype = torch.int64 if self.wide else torch.int32
        self.of_params = [_offsets(param, chosen, dtype) for param, chosen in zip(params, indices, strict=True)]
        self._indices = indices
        self.of_grads = [
            known if grad.stride() == param.stride() else _offsets(grad, chosen, dtype)
            for param, grad, chosen, known in zip(params, grads, indices, self.of_params, strict=True)
        ]
        # in row-major order whatever the strides, for the noise of stochastic rounding
        self.positions = [
            known if param.is_contiguous() else chosen.to(dtype).contiguous()
            for param, chosen, known in zip(params, indices, self.of_params, strict=True)
            if positions
        ]

    def kept(self) -> WeakTensorKeyDictionary:
        """Return the dictionary that keeps the offsets alive exactly as long as their indices."""
        kept = WeakTensorKeyDictionary()
        of_positions = self.positions or self._indices
        for chosen, *others in zip(self._indices, self.of_params, self.of_grads, of_positions, strict=True):
            made = [offsets for offsets in others if offsets is not chosen]
            if made:
                kept[chosen] = [*kept.get(chosen, ()), *made]
        return kept


def _span(tensor: Tensor) -> int:
    """Return the distance in memory from the first entry to the last, plus one."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _offsets(tensor: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_contiguous():
        return indices.to(dtype).contiguous()
    rest = indices.long()
    offsets = torch.zeros_like(rest)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        offsets += rest % size * stride
        rest = rest // size
    return offsets.to(dtype)
