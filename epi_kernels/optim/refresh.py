"""One refresh of the masks: importance, layer ranges, thresholds, locks.

It is a function of tensors and numbers alone, for any optimizer and any number of devices in one process.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_kernels import ops


class Candidate(NamedTuple):
    """A tensor whose entries compete for protection."""

    importance: Tensor  # signed S
    grad: Tensor | None  # advances S first; None: S stays as it is
    beta: float
    one_minus_beta: float
    layer: int
    budget: int


class Refreshed(NamedTuple):
    """What a refresh found; tensors on the device of the first candidate."""

    ranges: Tensor  # float32 [layers, 2]: (mu, nu); (inf, -inf) for a layer without entries
    thresholds: Tensor  # float32 [budgets]: tau
    counts: Tensor  # int64 [candidates, 3]: locked now, newly locked, released
    nonfinite: Tensor  # int64 [candidates]: squared gradients that were NaN or infinite


def refresh_(
    candidates: Sequence[Candidate],
    untouched: Sequence[int],
    layer_count: int,
    ranks: Sequence[int],
    *,
    normalize: bool,
    exact: bool,
    keep_finite: bool,
    backend: str,
) -> Refreshed:
    """Advance every importance, then lock the entries with the largest scores (EPI Alg. 1, lines 8-11).

    Args:
        candidates: at least one; importances are written.
        untouched: the layers that hold entries without a state, whose importance is therefore 0.
        layer_count: layers are 0 .. layer_count - 1.
        ranks: k of each budget.
        normalize: rank (S - mu) / (nu - mu) of each layer; False ranks the raw S.
        exact: the exact k-th largest score; False: see `epi_kernels.ops.find_threshold`.
        keep_finite: see `epi_kernels.ops.importance_`.
        backend: "auto" or the name of one.
    """
    home = candidates[0].importance.device
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for i, candidate in enumerate(candidates):
        by_device[candidate.importance.device].append(i)
    parts = [_Part([candidates[i] for i in indices], backend) for indices in by_device.values()]
    # position of each candidate in the concatenation of the parts
    order = torch.tensor([i for indices in by_device.values() for i in indices], device=home).argsort()

    per_part = torch.stack([part.advance(layer_count, keep_finite).to(home) for part in parts])
    ranges = torch.stack([per_part[:, :, 0].amin(0), per_part[:, :, 1].amax(0)], 1)
    for layer in set(untouched):
        ranges[layer, 0] = 0.0
        ranges[layer, 1].clamp_(min=0.0)
    score_ranges = ranges if normalize else None

    def histogram(prefixes: Tensor, shift: int, bins: int) -> Tensor:
        return torch.stack([part.histogram(score_ranges, prefixes, shift, bins).to(home) for part in parts]).sum(0)

    thresholds = ops.find_threshold(histogram, torch.tensor(ranks, device=home), exact=exact)
    counts = torch.cat([part.lock(score_ranges, thresholds).to(home) for part in parts])[order]
    nonfinite = torch.cat([part.nonfinite.to(home) for part in parts])[order]
    return Refreshed(ranges, thresholds, counts, nonfinite)


class _Part:
    """The candidates on one device, as the lists that the operations take."""

    def __init__(self, candidates: Sequence[Candidate], backend: str) -> None:
        self.importances = [candidate.importance for candidate in candidates]
        self.grads = [candidate.grad for candidate in candidates]
        self.betas = torch.tensor([(c.beta, c.one_minus_beta) for c in candidates], dtype=torch.float64)
        self.layers = [candidate.layer for candidate in candidates]
        self.budgets = [candidate.budget for candidate in candidates]
        self.device = self.importances[0].device
        self.nonfinite = torch.zeros(len(candidates), dtype=torch.int64, device=self.device)
        self.backend = backend

    def advance(self, layer_count: int, keep_finite: bool) -> Tensor:
        return ops.importance_(
            self.importances,
            self.grads,
            self.nonfinite,
            self.betas,
            self.layers,
            layer_count,
            keep_finite,
            self.backend,
        )

    def histogram(self, ranges: Tensor | None, prefixes: Tensor, shift: int, bins: int) -> Tensor:
        return ops.score_histogram(
            self.importances,
            self.layers,
            self._here(ranges),
            self.budgets,
            prefixes.to(self.device),
            shift,
            bins,
            self.backend,
        )

    def lock(self, ranges: Tensor | None, thresholds: Tensor) -> Tensor:
        return ops.lock_(
            self.importances,
            self.layers,
            self._here(ranges),
            self.budgets,
            thresholds.to(self.device),
            self.backend,
        )

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.device)
