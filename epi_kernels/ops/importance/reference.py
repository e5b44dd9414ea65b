"""Importance in plain torch: the EMA of squared gradients with each layer's range, and the sums that PIECE needs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.ops.equations import advanced_importance, multiplied, noticed, usable


def importance_(
    importances: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    ranges: Tensor,
    nonfinite: Tensor,
    betas: Tensor,
    layers: Sequence[int],
    keep_finite: bool,
    grad_factor: Tensor | None,
    due: Tensor | None,
) -> None:
    """Advance where there is a gradient, extend the ranges; contract: `epi_kernels.ops.importance_`."""
    if due is not None and not due:
        return
    for i, (importance, grad, layer) in enumerate(zip(importances, grads, layers, strict=True)):
        if grad is not None:
            beta, one_minus_beta = betas[i].tolist()
            grad = multiplied(grad, grad_factor)
            after, bad = advanced_importance(importance, grad, beta, one_minus_beta, keep_finite=keep_finite)
            importance.copy_(after)
            nonfinite[i] += bad
        if importance.numel():
            value, valid = usable(importance)
            low = torch.where(valid, value, math.inf).amin()
            high = torch.where(valid, value, -math.inf).amax()
            ranges[layer, 0] = torch.minimum(ranges[layer, 0], low)
            ranges[layer, 1] = torch.maximum(ranges[layer, 1], high)


def gradient_sums_(sums: Sequence[Tensor], square_sums: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add g and g^2 in place; contract: `epi_kernels.ops.gradient_sums_`."""
    for total, square_total, grad in zip(sums, square_sums, grads, strict=True):
        wide = grad.to(torch.promote_types(grad.dtype, total.dtype))
        total.add_(wide)
        square_total.add_(noticed(wide * wide))
