"""The per-element mathematics in plain torch, one function per equation, in float32 or float64 on any device.

Every value that decides a mask is rounded after each operation, in the order written here, so that every backend can
reproduce the same bits. No function changes its arguments. How a parameter moves is in `epi_kernels.rules`.
"""

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.contract import NEGLIGIBLE, SMALLEST_NORMAL, arithmetic_dtype


def multiplied(grad: Tensor, factor: Tensor | None) -> Tensor:
    """Return factor * g, in float32 or wider; g itself without a factor."""
    return grad if factor is None else grad.to(arithmetic_dtype(grad.dtype)) * factor.reshape(())


def importance_average(importance: Tensor, grad: Tensor, beta: float, one_minus_beta: float) -> Tensor:
    """Return beta * S + (1 - beta) * g * g, EPI Eq. 5, with each product and the sum rounded separately.

    Masks are compared bit for bit between backends, and not every backend has a fused multiply-add. A float32 product
    below `epi_kernels.contract.NEGLIGIBLE` is 0, so that the sum does not depend on whether subnormals are flushed.
    """
    return noticed(importance * beta) + noticed(grad * one_minus_beta * grad)


def noticed(value: Tensor) -> Tensor:
    """Return a tensor >= 0, with 0 for each float32 below `epi_kernels.contract.NEGLIGIBLE`; float64 is unchanged."""
    return torch.where(value < NEGLIGIBLE, torch.zeros_like(value), value) if value.dtype == torch.float32 else value


def advanced_importance(
    importance: Tensor, grad: Tensor, beta: float, one_minus_beta: float, *, keep_finite: bool
) -> tuple[Tensor, Tensor]:
    """Return (signed S after this gradient, how many g * g are not finite): EPI Eq. 5 with the locks untouched.

    Args:
        importance: signed S (`epi_kernels.lock`): float32, or the dtype of a second moment that serves as S.
        grad: same shape, any floating dtype; squared in float32 or wider.
        beta: the smoothing.
        one_minus_beta: 1 - beta.
        keep_finite: True leaves S as it was where g * g is NaN or infinite, so that one bad batch cannot spoil the
            protection for ever; False stores that value, as AdamW does in its second moment.
    """
    dtype = torch.promote_types(importance.dtype, torch.float32)
    grad = grad.to(dtype)
    finite = (grad * grad).isfinite()
    before = lock.magnitude(importance).to(dtype)
    after = importance_average(before, grad, beta, one_minus_beta)
    if keep_finite:
        after = torch.where(finite, after, before)
    return lock.with_lock(after.to(importance.dtype), lock.is_locked(importance)), (~finite).sum()


def usable(importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return (S in float32 with subnormals at 0, whether S is finite) of a signed importance (`epi_kernels.lock`)."""
    value = lock.magnitude(importance)
    value = torch.where(value < SMALLEST_NORMAL, torch.zeros_like(value), value).to(torch.float32)
    return value, value.isfinite()


def score(importance: Tensor, layer_range: Tensor | None) -> Tensor:
    """Return (S - mu) / (nu - mu), or S without a range: EPI Eq. 8 with eps = 0, float32, >= 0, same shape.

    Args:
        importance: signed (`epi_kernels.lock`). A subnormal S counts as 0; an S that is not finite scores 0.
        layer_range: [2], (mu, nu) of the layer, float32; where mu and nu are equal, or differ by less than the smallest
            normal number, every score is 0. A score is also 0 where S - mu is that small, or where the score is below
            `epi_kernels.contract.NEGLIGIBLE`. None: raw S.
    """
    value, valid = usable(importance)
    if layer_range is not None:
        low, high = layer_range.unbind()
        distance, span = value - low, high - low
        valid = valid & (distance >= SMALLEST_NORMAL) & (span >= SMALLEST_NORMAL)
        value = noticed(distance / span)
    return torch.where(valid, value, torch.zeros_like(value))


def selected(counts: Tensor, selection: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Return (selection with one more digit, thresholds); arguments as in `epi_kernels.ops.select_digit_`."""
    bins = counts.shape[2]
    prefixes, remaining = selection.unbind(1)
    reached = counts.sum(0).flip(1).cumsum(1)  # number of scores in each bin and above, highest bin first
    skipped = (reached < remaining[:, None]).sum(1).clamp(max=bins - 1)
    above = torch.where(skipped > 0, reached.gather(1, (skipped - 1).clamp(min=0)[:, None])[:, 0], 0)
    found = prefixes * bins + (bins - 1 - skipped)
    thresholds = torch.where(remaining > 0, (found << shift).to(torch.int32).view(torch.float32), torch.inf)
    return torch.stack([found, remaining - above], 1), thresholds
