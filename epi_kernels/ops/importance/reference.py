"""Importance in plain torch: the EMA of squared gradients with each layer's range, and the sums that PIECE needs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.contract import arithmetic_dtype
from epi_kernels.ops.equations import advanced_importance, multiplied, noticed, usable
from epi_kernels.ops.storages import noise_of, read, write_
from epi_kernels.storage.noise import IMPORTANCE, OF_SLOT, Place


class Importance:
    """The advance of a fixed list of importances; contract: `epi_kernels.ops.prepared_importance`."""

    def __init__(
        self,
        importances: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        betas: Tensor,
        layers: Sequence[int],
        keep_finite: bool,
        device: torch.device,
        scales: Sequence[Tensor | None],
        places: Sequence[Place],
    ) -> None:
        self._betas, self._layers, self._keep_finite, self._places = betas.tolist(), layers, keep_finite, places

    def advance_(
        self,
        importances: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        ranges: Tensor | None,
        nonfinite: Tensor,
        grad_factor: Tensor | None,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
        steps: Tensor | None,
    ) -> None:
        """Advance where there is a gradient, extend the ranges if they are wanted."""
        if due is not None and not due:
            return
        slot = IMPORTANCE if self._keep_finite else OF_SLOT[1]
        clocks = None if steps is None else steps.tolist()
        for i, (importance, grad, layer) in enumerate(zip(importances, grads, self._layers, strict=True)):
            own = scales[i] if scales else None
            signed = read(importance, own, arithmetic_dtype(importance.dtype))
            if grad is not None:
                grad = multiplied(grad, grad_factor)
                signed, bad = advanced_importance(signed, grad, *self._betas[i], keep_finite=self._keep_finite)
                noise = None
                if self._places and clocks is not None:
                    noise = noise_of(self._places[i], clocks[i], importance.shape, importance.device)
                write_(importance, own, signed, noise, slot, positive=not self._keep_finite)
                signed = read(importance, own, signed.dtype)
                nonfinite[i] += bad
            if ranges is not None and importance.numel():
                value, valid = usable(signed)
                low = torch.where(valid, value, math.inf).amin()
                high = torch.where(valid, value, -math.inf).amax()
                ranges[layer, 0] = torch.minimum(ranges[layer, 0], low)
                ranges[layer, 1] = torch.maximum(ranges[layer, 1], high)


def gradient_sums_(sums: Sequence[Tensor], square_sums: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add g and g^2 in place; contract: `epi_kernels.ops.gradient_sums_`."""
    for i, (square_sum, grad) in enumerate(zip(square_sums, grads, strict=True)):
        wide = grad.to(torch.promote_types(grad.dtype, square_sum.dtype))
        if sums:
            sums[i].add_(wide)
        square_sum.add_(noticed(wide * wide))
