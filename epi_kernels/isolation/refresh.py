"""One refresh of the masks: importance, layer ranges, thresholds, locks.

A `Refresh` works on tensors and numbers, for any optimizer and any number of devices in one process. It keeps no tensor
of the optimizer: it is prepared once, and serves for as long as the candidates are the same.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from epi_kernels import ops
from epi_kernels.contract import DIGITS
from epi_kernels.distributed import Ranks
from epi_kernels.ops.table import on_device
from epi_kernels.storage.noise import Place, whole

_T = TypeVar("_T")

# importances, and the scales of those in blocks of 8 bits, None for the others
Held = tuple[list[Tensor], list[Tensor | None]]


class Candidate(NamedTuple):
    """A tensor whose entries compete for protection."""

    importance: Tensor  # S, with the locks in its sign bits
    grad: Tensor | None  # advances S first; None: S stays as it is
    beta: float
    one_minus_beta: float
    layer: int
    budget: int
    counted: bool = True  # False: another rank has the same entries and counts them
    scales: Tensor | None = None  # of an importance in blocks of 8 bits
    place: Place | None = None  # where the entries lie in the whole tensor, if they are rounded stochastically


class Refreshed(NamedTuple):
    """What a refresh found; tensors on the device of the first candidate."""

    ranges: Tensor  # float32 [layers, 2]: (mu, nu) = (minimum, maximum); (inf, -inf) for a layer without entries
    thresholds: Tensor  # float32 [budgets]: tau
    counts: Tensor  # int64 [candidates, 3], or [pairs, 3] over all ranks: locked now, newly locked, released


class Refresh:
    """Advance every importance, then lock the entries with the largest scores (EPI Alg. 1, lines 8-11).

    Args:
        candidates: at least one, or `ranks`. Their tensors are read but not kept.
        untouched: layers with entries that have no state yet, whose importance is therefore 0.
        layer_count: layers are 0 .. layer_count - 1.
        ks: the number of places k of each budget.
        counters: positions of candidates -> int64 counters on their device, to which every run adds the numbers of
            squared gradients that are NaN or infinite.
        normalize: True: the scores are (S - mu) / (nu - mu) of each layer; False: they are the raw S.
        exact: True: the threshold is the exact k-th largest score; False: see `epi_kernels.ops.find_threshold`.
        keep_finite: see `epi_kernels.ops.importance_`.
        backend: "auto" or the name of a backend.
        ranks: the ranks that have the other shards; all of them must run the refresh. None: one process has all.
        pairs: (layer, budget) of each row of the counts, if there are ranks.

    Raises:
        ValueError, TypeError, RuntimeError: as the operations raise them; nothing has changed.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        untouched: Sequence[int],
        layer_count: int,
        ks: Sequence[int],
        counters: Callable[[Sequence[int]], Tensor],
        *,
        normalize: bool,
        exact: bool,
        keep_finite: bool,
        backend: str,
        ranks: Ranks | None = None,
        pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
        for i, candidate in enumerate(candidates):
            by_device[candidate.importance.device].append(i)
        row_of = {pair: row for row, pair in enumerate(pairs)}
        self._parts = []
        for where in by_device.values():
            members = [candidates[i] for i in where]
            part = _Part(members, where, counters(where), layer_count, len(ks), normalize, keep_finite, backend)
            self._parts.append(part)
        self.devices = set(by_device)
        self._ranks, self._pair_count, self._normalize = ranks, len(pairs), normalize
        self._digits = DIGITS if exact else DIGITS[:1]
        self._home = next(iter(by_device), ranks.device if ranks else torch.device("cpu"))
        self._ranges = torch.tensor([[math.inf, -math.inf]], dtype=torch.float32, device="cpu").repeat(layer_count, 1)
        self._ranges[list(set(untouched))] = 0.0
        self._selection = torch.tensor([[0, k] for k in ks], dtype=torch.int64, device="cpu").view(-1, 2)
        self._select_digit_ = ops.prepared_digit(self._home, backend)
        places = [i for where in by_device.values() for i in where]
        # the row of each candidate in the counts of all devices, one device after the other
        self._order = _positions(sorted(range(len(places)), key=places.__getitem__), self._home)
        for part in self._parts if ranks is not None else ():
            counted = [candidates[part.where[j]] for j in part.counted]
            rows = [row_of[candidate.layer, candidate.budget] for candidate in counted]
            part.index = _positions(rows, self._home), _positions(part.counted, self._home)

    def run_(
        self,
        importances: list[Tensor],
        grads: list[Tensor | None],
        *,
        grad_factor: dict[torch.device, Tensor],
        due: Tensor | None,
        clock: int | Tensor = 0,
        settings: object = None,
        scales: list[Tensor | None] | None = None,
        steps: Sequence[Any] = (),
    ) -> Refreshed:
        """Refresh once.

        Args:
            importances: one for each candidate, equal to the constructor's in all but the values; written.
            grads: one for each candidate, with the dtypes and strides of the constructor's, and None where those were
                None.
            grad_factor: device -> one float32 value that multiplies every gradient first; a device that is missing: 1.
            due: one float32 value; if it is 0, nothing changes and the result means nothing. None: 1.
            clock: the step of the refresh; with ranks it must be an int, the same on all of them.
            settings: see `Ranks.ranges`.
            scales: of each candidate in blocks of 8 bits, None for the others; written. None: there are none.
            steps: the clock of each candidate, numbers or tensors of one value, if any is rounded stochastically.

        Raises:
            AgreeAgain: see `Ranks.ranges`; the importance has advanced by then.
        """
        ranks, home = self._ranks, self._home
        scales = scales or [None] * len(importances)
        running = [(part, (part.of(importances), part.of(scales)), _on(part.device, due)) for part in self._parts]
        found = [
            part.advance_(held, part.of(grads), _copy_on(part.device, self._ranges), grad_factor, now, steps)
            for part, held, now in running
        ]
        increment_version(importances)
        increment_version([of_codes for of_codes in scales if of_codes is not None])
        ranges = found[0] if found else self._ranges.to(home)
        if len(found) > 1:
            every = torch.stack([of_part.to(home) for of_part in found])
            ranges = torch.stack([every[:, :, 0].amin(0), every[:, :, 1].amax(0)], 1)
        if ranks is not None:
            assert isinstance(clock, int)
            ranges = ranks.ranges(ranges, clock, settings)
        of_scores = ranges if self._normalize else None

        selection = _copy_on(home, self._selection)
        for shift, bins in self._digits:
            histograms = [part.count(held, of_scores, selection, shift, bins, now) for part, held, now in running]
            if ranks is not None:
                none = torch.zeros(1, len(selection), bins, dtype=torch.int64, device=home)
                histograms = [ranks.sum(torch.cat([none, *(there.to(home) for there in histograms)]).sum(0))[None]]
            counted = histograms[0] if len(histograms) == 1 else torch.cat([there.to(home) for there in histograms])
            thresholds = self._select_digit_(counted, selection, shift)
        counts = [part.lock_(held, of_scores, thresholds, now) for part, held, now in running]
        if ranks is not None:
            total = torch.zeros(self._pair_count, 3, dtype=torch.int64, device=home)
            for (part, *_), rows in zip(running, counts, strict=True):
                to, counted_rows = part.index
                total.index_add_(0, to, rows.to(home)[counted_rows])
            return Refreshed(ranges, thresholds, ranks.sum(total))
        if len(counts) == 1:
            return Refreshed(ranges, thresholds, counts[0])
        return Refreshed(ranges, thresholds, torch.cat([there.to(home) for there in counts])[self._order])


class _Part:
    """The candidates on one device, as the operations have prepared them."""

    # with ranks, on the device of the sums: for each counted candidate the row of its (layer, budget), and its position
    index: tuple[Tensor, Tensor]

    def __init__(
        self,
        members: Sequence[Candidate],
        where: list[int],
        counter: Tensor,
        layer_count: int,
        budget_count: int,
        normalize: bool,
        keep_finite: bool,
        backend: str,
    ) -> None:
        self.where, self._counter = where, counter  # positions among all candidates
        self.device = device = members[0].importance.device
        self.counted = [j for j, member in enumerate(members) if member.counted]
        importances, grads = [member.importance for member in members], [member.grad for member in members]
        betas = torch.tensor([(m.beta, m.one_minus_beta) for m in members], dtype=torch.float64, device="cpu")
        layers, budgets = [member.layer for member in members], [member.budget for member in members]
        scales = [member.scales for member in members]
        self._noisy = any(member.place is not None for member in members)
        # a tensor that is kept in float32 needs no noise, and its place is not read
        places = [member.place or whole(0, member.importance.shape) for member in members] if self._noisy else []
        self._importance = ops.prepared_importance(
            *(importances, grads, betas, layers, layer_count, keep_finite, device, backend), scales, places
        )
        rows = layer_count if normalize else None
        self._histogram = ops.prepared_histogram(
            self._of_counted(importances),
            self._of_counted(layers),
            rows,
            self._of_counted(budgets),
            budget_count,
            device,
            backend,
            self._of_counted(scales),
        )
        self._lock = ops.prepared_lock(importances, layers, rows, budgets, budget_count, device, backend, scales)

    def of(self, values: list[_T]) -> list[_T]:
        """Return, from the values of all candidates, those of the candidates on this device."""
        return values if len(values) == len(self.where) else [values[i] for i in self.where]

    def _of_counted(self, values: list[_T]) -> list[_T]:
        return values if len(values) == len(self.counted) else [values[j] for j in self.counted]

    def advance_(
        self,
        held: Held,
        grads: list[Tensor | None],
        ranges: Tensor,
        grad_factor: dict[torch.device, Tensor],
        due: Tensor | None,
        steps: Sequence[Any],
    ) -> Tensor:
        """Advance the importances, write the ranges of the layers, and return them."""
        clocks = _clocks(self.of(list(steps)), self.device) if self._noisy else None
        factor = grad_factor.get(self.device)
        self._importance.advance_(held[0], grads, ranges, self._counter, factor, due, held[1], clocks)
        return ranges

    def count(
        self,
        held: Held,
        ranges: Tensor | None,
        selection: Tensor,
        shift: int,
        bins: int,
        due: Tensor | None,
    ) -> Tensor:
        """Return the histograms of the scores that this rank counts."""
        there, selection = _on(self.device, ranges), selection.to(self.device)
        importances, scales = self._of_counted(held[0]), self._of_counted(held[1])
        return cast(Tensor, self._histogram.count(importances, there, selection, shift, bins, due, scales))

    def lock_(self, held: Held, ranges: Tensor | None, thresholds: Tensor, due: Tensor | None) -> Tensor:
        """Lock the entries whose scores reach the thresholds, and return the counts of each candidate."""
        there = _on(self.device, ranges), thresholds.to(self.device)
        return cast(Tensor, self._lock.lock_(held[0], *there, due, held[1]))


def _positions(values: list[int], device: torch.device) -> Tensor:
    """Return positions as int64 on a device; nothing waits for it, as an index in a list would."""
    return on_device(torch.tensor(values, dtype=torch.int64, device="cpu"), device)


def _clocks(steps: Sequence[Any], device: torch.device) -> Tensor:
    """Return clocks, numbers or tensors of one value, as one float32 tensor on a device."""
    there = [step for step in steps if isinstance(step, Tensor) and step.device.type != "cpu"]
    if there:  # the host does not know them
        return torch.stack([torch.as_tensor(step, dtype=torch.float32, device=device).reshape(()) for step in steps])
    return on_device(torch.tensor([float(step) for step in steps], dtype=torch.float32, device="cpu"), device)


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _copy_on(device: torch.device, values: Tensor) -> Tensor:
    """Copy values from the CPU to a device, and return the copy, which the caller may write."""
    return values.clone() if device.type == "cpu" else on_device(values, device)
