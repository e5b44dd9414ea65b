"""One refresh of the masks: importance, layer ranges, thresholds, locks.

It is a function of tensors and numbers alone, for any optimizer and any number of devices in one process.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_kernels import ops
from epi_kernels.distributed import Ranks
from epi_kernels.ops.table import on_device


class Candidate(NamedTuple):
    """A tensor whose entries compete for protection."""

    importance: Tensor  # signed S
    grad: Tensor | None  # advances S first; None: S stays as it is
    beta: float
    one_minus_beta: float
    layer: int
    budget: int
    counted: bool = True  # False: another rank holds the same entries, and counts them


class Refreshed(NamedTuple):
    """What a refresh found; tensors on the device of the first candidate."""

    ranges: Tensor  # float32 [layers, 2]: (mu, nu); (inf, -inf) for a layer without entries
    thresholds: Tensor  # float32 [budgets]: tau
    counts: Tensor  # int64 [candidates, 3], or [pairs, 3] over all ranks: locked now, newly locked, released


def refresh_(
    candidates: Sequence[Candidate],
    untouched: Sequence[int],
    layer_count: int,
    ks: Sequence[int],
    counters: Callable[[Sequence[int]], Tensor],
    *,
    normalize: bool,
    exact: bool,
    keep_finite: bool,
    grad_factor: dict[torch.device, Tensor],
    due: Tensor | None,
    backend: str,
    ranks: Ranks | None = None,
    pairs: Sequence[tuple[int, int]] = (),
    clock: int | Tensor = 0,
    settings: object = None,
) -> Refreshed:
    """Advance every importance, then lock the entries with the largest scores (EPI Alg. 1, lines 8-11).

    Args:
        candidates: at least one, or `ranks`; importances are written.
        untouched: the layers that hold entries without a state, whose importance is therefore 0.
        layer_count: layers are 0 .. layer_count - 1.
        ks: of each budget, its number of places k.
        counters: positions of candidates -> int64 counters on their device, to which the numbers of squared gradients
            that are NaN or infinite are added.
        normalize: rank (S - mu) / (nu - mu) of each layer; False ranks the raw S.
        exact: the exact k-th largest score; False: see `epi_kernels.ops.find_threshold`.
        keep_finite: see `epi_kernels.ops.importance_`.
        grad_factor: device -> what multiplies every gradient first, float32 of one value; none there: 1.
        due: float32 of one value; where it is 0 nothing changes and what is returned means nothing. None: 1.
        backend: "auto" or the name of one.
        ranks: that hold the other pieces; all of them must call. None: there are none.
        pairs: (layer, budget) of the rows of the counts over all ranks.
        clock: of the refresh; must be the same on all ranks, and on the host if there are any.
        settings: see `Ranks.ranges`.
    """
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for i, candidate in enumerate(candidates):
        by_device[candidate.importance.device].append(i)
    parts = [_Part([candidates[i] for i in where], counters(where), backend) for where in by_device.values()]
    home = parts[0].device if parts else ranks.device if ranks else torch.device("cpu")

    start = torch.tensor([[math.inf, -math.inf]], dtype=torch.float32, device="cpu").repeat(layer_count, 1)
    start[list(set(untouched))] = 0.0
    for part in parts:
        part.advance(start, keep_finite, grad_factor.get(part.device), _on(part.device, due))
    ranges = parts[0].ranges if parts else start.to(home)
    if len(parts) > 1:
        every = torch.stack([part.ranges.to(home) for part in parts])
        ranges = torch.stack([every[:, :, 0].amin(0), every[:, :, 1].amax(0)], 1)
    if ranks is not None:
        assert isinstance(clock, int)
        ranges = ranks.ranges(ranges, clock, settings)
    score_ranges = ranges if normalize else None

    def histogram(selection: Tensor, shift: int, bins: int) -> Tensor:
        counts = [
            part.histogram(score_ranges, selection, shift, bins, _on(part.device, due)).to(home) for part in parts
        ]
        if ranks is not None:
            none = torch.zeros(1, len(ks), bins, dtype=torch.int64, device=home)
            return ranks.sum(torch.cat([none, *counts]).sum(0))[None]
        return counts[0] if len(counts) == 1 else torch.cat(counts)

    thresholds = ops.find_threshold(histogram, ks, exact=exact, device=home, backend=backend)
    counts = [part.lock(score_ranges, thresholds, _on(part.device, due)).to(home) for part in parts]
    if ranks is not None:
        total = torch.zeros(len(pairs), 3, dtype=torch.int64, device=home)
        row_of = {pair: row for row, pair in enumerate(pairs)}
        for where, rows in zip(by_device.values(), counts, strict=True):
            own = [j for j, i in enumerate(where) if candidates[i].counted]
            of = [row_of[candidates[where[j]].layer, candidates[where[j]].budget] for j in own]
            if own:
                total.index_add_(0, torch.tensor(of, dtype=torch.int64, device=home), rows[own])
        return Refreshed(ranges, thresholds, ranks.sum(total))
    if len(counts) == 1:
        return Refreshed(ranges, thresholds, counts[0])
    # position of each candidate in the concatenation of the parts
    order = torch.tensor([i for where in by_device.values() for i in where], dtype=torch.int64, device=home).argsort()
    return Refreshed(ranges, thresholds, torch.cat(counts)[order])


class _Part:
    """The candidates on one device, as the lists that the operations take."""

    ranges: Tensor  # of these candidates alone

    def __init__(self, candidates: Sequence[Candidate], counter: Tensor, backend: str) -> None:
        self.importances = [candidate.importance for candidate in candidates]
        self.grads = [candidate.grad for candidate in candidates]
        self.betas = torch.tensor([(c.beta, c.one_minus_beta) for c in candidates], dtype=torch.float64, device="cpu")
        self.layers = [candidate.layer for candidate in candidates]
        self.budgets = [candidate.budget for candidate in candidates]
        self.counted = [i for i, candidate in enumerate(candidates) if candidate.counted]
        self.device = self.importances[0].device
        self.counter = counter
        self.backend = backend

    def advance(self, start: Tensor, keep_finite: bool, grad_factor: Tensor | None, due: Tensor | None) -> None:
        self.ranges = on_device(start, self.device)
        ops.importance_(
            self.importances,
            self.grads,
            self.ranges,
            self.counter,
            self.betas,
            self.layers,
            keep_finite,
            grad_factor,
            due,
            self.backend,
        )

    def histogram(self, ranges: Tensor | None, selection: Tensor, shift: int, bins: int, due: Tensor | None) -> Tensor:
        return ops.score_histogram(
            [self.importances[i] for i in self.counted],
            [self.layers[i] for i in self.counted],
            _on(self.device, ranges),
            [self.budgets[i] for i in self.counted],
            selection.to(self.device),
            shift,
            bins,
            due,
            self.backend,
        )

    def lock(self, ranges: Tensor | None, thresholds: Tensor, due: Tensor | None) -> Tensor:
        return ops.lock_(
            self.importances,
            self.layers,
            _on(self.device, ranges),
            self.budgets,
            thresholds.to(self.device),
            due,
            self.backend,
        )


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
