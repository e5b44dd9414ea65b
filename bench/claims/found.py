"""The records of all runs, and the measures that are taken of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from claims.plan import choices, rate_of
from epi_kernels.metrics import forgetting_ratio

Record = Mapping[str, Any]
Measure = Callable[[Record], float]


class Found:
    """Records by name, size and seed."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self._runs: dict[tuple[str, str], dict[int, Record]] = {}
        chosen = choices(self.records)
        for record in self.records:
            # another rate may have been chosen since, by more trials
            at = tuple(record["trial"].items())
            stale = record["kind"] == "run" and at != rate_of(record["name"], record["size"], chosen)
            if record["kind"] in ("run", "study") and not stale:
                self._runs.setdefault((record["name"], record["size"]), {})[record["seed"]] = record

    def runs(self, name: str, size: str) -> dict[int, Record]:
        """Return seed -> record of a system or a study; {} if there is none."""
        return dict(sorted(self._runs.get((name, size), {}).items()))

    def sizes(self) -> list[str]:
        """Return the sizes of which there are runs, from small to large."""
        return [size for size in ("XS", "S", "M", "L", "E") if any(size == key for _, key in self._runs)]

    def values(self, name: str, size: str, measure: Measure) -> list[float]:
        """Return a measure of every seed's run."""
        return [measure(record) for record in self.runs(name, size).values()]

    def differences(self, name: str, other: str, size: str, measure: Measure) -> list[float]:
        """Return the measure of a system less that of another, for every seed that both have."""
        ours, theirs = self.runs(name, size), self.runs(other, size)
        return [measure(ours[seed]) - measure(theirs[seed]) for seed in ours if seed in theirs]


def stage_of(record: Record, number: int) -> int:
    """Return the stage in which task `number` of the order is learned."""
    return next(i for i, names in enumerate(record["stages"]) if record["order"][number] in names)


def learned(record: Record) -> list[float]:
    """Return the score of each task right after the stage in which it is learned, in percent."""
    return [record["scores"][stage_of(record, i) + 1][i][0] for i in range(len(record["order"]))]


def last(record: Record) -> list[float]:
    """Return the score of each task at the end, in percent."""
    return [score for score, _ in record["scores"][-1][:-1]]


def plasticity(record: Record) -> float:
    """Return AP: the mean score right after learning, in percent (PIECE Figure 7)."""
    return statistics.fmean(learned(record))


def performance(record: Record) -> float:
    """Return OP: the mean score at the end, in percent (PIECE Eq. 26)."""
    return statistics.fmean(last(record))


def exact(record: Record) -> float:
    """Return the mean share of whole answers at the end, in percent."""
    return statistics.fmean(share for _, share in record["scores"][-1][:-1])


def transfer(record: Record) -> float:
    """Return BWT: the mean change after learning, in points (PIECE Eq. 27, divided by the number of tasks)."""
    return performance(record) - plasticity(record)


def forgetting(record: Record) -> float:
    """Return FR: the mean forgetting ratio of the tasks before the last stage, in percent (EPI Eq. 14).

    NaN where all tasks are learned in one stage, or none was learned.
    """
    count = len(record["order"])
    early = [i for i in range(count) if stage_of(record, i) < len(record["stages"]) - 1]
    pairs = [(learned(record)[i], last(record)[i]) for i in early]
    ratios = [forgetting_ratio(initial, after) for initial, after in pairs if initial > 0]
    return statistics.fmean(ratios) if ratios else math.nan


def retention(record: Record) -> float:
    """Return how much of the score on the pre-training's prose is left at the end, in percent; NaN if it was 0."""
    before = record["scores"][0][-1][0]
    return 100 * record["scores"][-1][-1][0] / before if before else math.nan


def conflict(record: Record) -> float:
    """Return TGC: the mean gradient conflict after each stage (EPI Eq. 15)."""
    return statistics.fmean(value for value in record["conflict"] if value is not None)


def newest(record: Record) -> float:
    """Return the score of the last task right after learning it, in percent: how well can it still learn."""
    return learned(record)[-1]
