"""The threshold in plain torch: count score keys digit by digit, then lock entries from the k-th largest up."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.ops.equations import score, selected
from epi_kernels.ops.storages import read

# entries scored at a time: this limits the working memory to some MB for a model of any size
CHUNK = 1 << 20


class _Scored:
    """A fixed list of importances, with the layer and the budget of each."""

    def __init__(
        self,
        importances: Sequence[Tensor],
        layers: Sequence[int],
        budgets: Sequence[int],
        device: torch.device,
        scales: Sequence[Tensor | None],
    ) -> None:
        self._layers, self._budgets = layers, budgets


class Histogram(_Scored):
    """The histograms of a fixed list of importances; contract: `epi_kernels.ops.prepared_histogram`."""

    def count(
        self,
        importances: Sequence[Tensor],
        ranges: Tensor | None,
        selection: Tensor,
        shift: int,
        bins: int,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
    ) -> Tensor:
        """Count the scores of each budget by one digit of their bits."""
        counts = torch.zeros(1, len(selection), bins, dtype=torch.int64, device=selection.device)
        if due is not None and not due:
            return counts
        for i, (importance, layer, budget) in enumerate(zip(importances, self._layers, self._budgets, strict=True)):
            layer_range = None if ranges is None else ranges[layer]
            for _, value in _chunks(importance, scales[i] if scales else None):
                key = score(value, layer_range).view(torch.int32) >> shift
                digit = key[(key // bins) == selection[budget, 0]] % bins
                counts[0, budget] += torch.bincount(digit, minlength=bins)
        return counts


def select_digit_(counts: Tensor, selection: Tensor, shift: int) -> Tensor:
    """Find one digit of each k-th largest score; contract: `epi_kernels.ops.select_digit_`."""
    found, thresholds = selected(counts, selection, shift)
    selection.copy_(found)
    return thresholds


class Lock(_Scored):
    """The lock of a fixed list of importances; contract: `epi_kernels.ops.prepared_lock`."""

    def lock_(
        self,
        importances: Sequence[Tensor],
        ranges: Tensor | None,
        thresholds: Tensor,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
    ) -> Tensor:
        """Lock every entry whose score reaches its budget's threshold."""
        counts = torch.zeros(len(importances), 3, dtype=torch.int64, device=thresholds.device)
        if due is not None and not due:
            return counts
        for i, (importance, layer, budget) in enumerate(zip(importances, self._layers, self._budgets, strict=True)):
            layer_range = None if ranges is None else ranges[layer]
            for chunk, signed in _chunks(importance, scales[i] if scales else None):
                value = score(signed, layer_range)
                before = lock.is_locked(chunk)
                after = (value >= thresholds[budget]) & (value > 0)
                chunk.copy_(lock.with_lock(chunk, after))
                counts[i] += torch.stack([after.sum(), (after & ~before).sum(), (before & ~after).sum()])
        return counts


def _chunks(tensor: Tensor, scales: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (a view, its values) of about CHUNK entries that together cover `tensor`, whatever its strides."""
    if tensor.dim() == 0:
        tensor = tensor.view(1)
    if tensor.numel():
        rows = max(1, CHUNK * tensor.shape[0] // tensor.numel())
        views = tensor.split(rows)
        of_views = [None] * len(views) if scales is None else scales.split(rows)
        for view, own in zip(views, of_views, strict=True):
            yield view, read(view, own, view.dtype)
