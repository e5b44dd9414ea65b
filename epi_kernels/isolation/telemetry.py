"""Records of the last refreshes: tensors until a device has copied them to the host, then plain numbers."""

import reprlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# how many refreshes an optimizer remembers
RECORDS = 256


@dataclass(frozen=True)
class Budget:
    """Entries that compete for the same k places."""

    scope: str  # "global", or the name of the one layer that the budget covers
    isolation_ratio: float
    eligible: int
    k: int


class Layout(NamedTuple):
    """The part of a record that is equal in all refreshes of the same parameters."""

    layers: tuple[str, ...]
    layer_eligible: tuple[int, ...]
    budgets: tuple[Budget, ...]


@dataclass(frozen=True, slots=True)
class Numbers:
    """One refresh in plain numbers."""

    step: int
    layout: Layout
    counts: "np.ndarray[Any, Any]"  # [layers, 3]: protected, newly locked, released; in the narrowest dtype that fits
    protected: "np.ndarray[Any, Any]"  # [budgets]: protected entries
    ranges: "np.ndarray[Any, Any]"  # float32 [layers, 2]: minimum and maximum importance
    thresholds: "np.ndarray[Any, Any]"  # float32 [budgets]
    nonfinite: int

    def as_dict(self) -> dict[str, Any]:
        """Return the record as `EPIAdamW.telemetry` documents it."""
        layers, layer_eligible, budgets = self.layout
        per_budget = self.protected.tolist()
        eligible, protected = sum(layer_eligible), sum(per_budget)
        _, locked, released = self.counts.sum(0, dtype=np.int64).tolist()
        kept, either = protected - locked, protected + released
        return {
            "step": self.step,
            "protected_share": protected / eligible if eligible else 0.0,
            "eligible": eligible,
            "budget": sum(budget.k for budget in budgets),
            "protected": protected,
            "locked": locked,
            "released": released,
            "kept": kept,
            "jaccard": kept / either if either else 1.0,
            "hamming": locked + released,
            "nonfinite": self.nonfinite,
            "budgets": [
                {
                    "scope": budget.scope,
                    "isolation_ratio": budget.isolation_ratio,
                    "eligible": budget.eligible,
                    "budget": budget.k,
                    "threshold": threshold,
                    "protected": count,
                }
                for budget, threshold, count in zip(budgets, self.thresholds.tolist(), per_budget, strict=True)
            ],
            "layers": [
                {
                    "layer": name,
                    "eligible": eligible,
                    "protected": counts[0],
                    "locked": counts[1],
                    "released": counts[2],
                    "kept": counts[0] - counts[1],
                    "minimum": low,
                    "maximum": high,
                }
                for name, eligible, counts, (low, high) in zip(
                    layers, layer_eligible, self.counts.tolist(), self.ranges.tolist(), strict=True
                )
                if eligible
            ],
        }


def numbers_of(record: object, place: int, before: Layout | None) -> Numbers:
    """Return the numbers of a record that `Numbers.as_dict` has made.

    Args:
        record: the dict.
        place: its position among the records, for messages.
        before: the layout of the record before it; it is kept once if both are equal.

    Raises:
        ValueError: it is no such record, or its sums differ from the numbers of its layers.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"telemetry record {place} is a {type(record).__name__} and not a dict")
    try:
        layers, budgets = record["layers"], record["budgets"]
        layout = Layout(
            tuple(str(layer["layer"]) for layer in layers),
            tuple(int(layer["eligible"]) for layer in layers),
            tuple(
                Budget(str(of["scope"]), float(of["isolation_ratio"]), int(of["eligible"]), int(of["budget"]))
                for of in budgets
            ),
        )
        counts = [[int(layer[key]) for key in ("protected", "locked", "released")] for layer in layers]
        of_layers = np.array(counts, np.int64).reshape(-1, 3)
        found = Numbers(
            int(record["step"]),
            before if before == layout else layout,
            of_layers.astype(_narrowest(of_layers)),
            np.array([int(of["protected"]) for of in budgets], np.int64),
            np.array([(layer["minimum"], layer["maximum"]) for layer in layers], np.float32).reshape(-1, 2),
            np.array([of["threshold"] for of in budgets], np.float32),
            int(record["nonfinite"]),
        )
    except KeyError as error:
        raise ValueError(f"telemetry record {place} has no {error}; pass records as telemetry() returns them") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"telemetry record {place} is not one that telemetry() returned: {error}") from None
    for key, value in found.as_dict().items():
        if key in record and record[key] != value:
            raise ValueError(
                f"telemetry record {place} has been changed: its {key} is {reprlib.repr(record[key])}, and its other "
                f"numbers give {reprlib.repr(value)}"
            )
    return found


def _narrowest(counts: "np.ndarray[Any, Any]") -> "np.dtype[Any]":
    """Return the narrowest dtype for counts: an optimizer keeps many of them."""
    return np.min_scalar_type(counts.max(initial=0))


@dataclass(frozen=True)
class Record:
    """One refresh, with results that may still be on their device."""

    step: int | Tensor
    layout: Layout
    layer_of: "np.ndarray[Any, Any]"  # layer of each row of counts
    budget_of: "np.ndarray[Any, Any]"  # budget of each row of counts
    ranges: Tensor  # [layers, 2]: minimum and maximum importance
    thresholds: Tensor  # [budgets]
    counts: Tensor  # [tensors, 3]: protected, newly locked, released
    nonfinite: list[Tensor]  # all counters of non-finite gradients, or copies of them on the CPU

    def kept_where(self, due: Tensor, before: "Record | None") -> "Record":
        """Return this record if `due` is not 0, and else the record `before`; the device decides.

        If `before` has the same layout, and the same layer and budget for each row of counts, its tensors are written
        and it is returned. Otherwise this record is returned, with step 0, which means no refresh, if `due` is 0.
        """
        assert isinstance(self.step, Tensor)
        rows = [(of.layer_of.tolist(), of.budget_of.tolist()) for of in (self, before) if of is not None]
        if before is None or before.layout != self.layout or rows[0] != rows[1]:
            return replace(self, step=self.step * (due != 0))
        for name in ("step", "ranges", "thresholds", "counts"):
            mine, theirs = getattr(self, name), getattr(before, name)
            theirs.copy_(torch.where(due.to(mine.device) != 0, mine, theirs))
        return before

    def on_the_host(self) -> "Record":
        """Return this record with copies on the CPU, which are valid once the device has been waited for."""
        there = {name: getattr(self, name) for name in ("ranges", "thresholds", "counts")}
        return replace(self, **{name: tensor.to("cpu", non_blocking=True) for name, tensor in there.items()})

    def numbers(self, before: Layout | None) -> Numbers:
        """Return the record in plain numbers, with the object `before` as its layout if both are equal."""
        layout, rows = self.layout, self.counts.cpu().numpy()
        counts = np.zeros((len(layout.layers), 3), np.int64)
        np.add.at(counts, self.layer_of, rows)
        protected = np.zeros(len(layout.budgets), np.int64)
        np.add.at(protected, self.budget_of, rows[:, 0])
        return Numbers(
            int(self.step),
            before if before == layout else layout,
            counts.astype(_narrowest(counts)),
            protected,
            np.array(self.ranges.cpu().numpy()),
            np.array(self.thresholds.cpu().numpy()),
            sum(int(counts.sum()) for counts in self.nonfinite),
        )


def numbers_of_all(records: Sequence[object]) -> list[Numbers]:
    """Return the numbers of records that an optimizer's ``telemetry()`` returned; see `numbers_of`."""
    found: list[Numbers] = []
    for place, record in enumerate(records):
        found.append(numbers_of(record, place, found[-1].layout if found else None))
    return found


class Records:
    """The last refreshes of an optimizer, RECORDS at most; pickle and deepcopy keep their numbers."""

    def __init__(self) -> None:
        self._done: deque[Numbers] = deque(maxlen=RECORDS)
        self._under_way: deque[tuple[Record, list[torch.Event]]] = deque(maxlen=RECORDS)
        # the last record of steps of which only the device knows whether they refreshed, and that record before a copy
        self.on_device: Record | None = None
        self._on_device_before: Numbers | None = None

    def __len__(self) -> int:
        """Return how many records there are, without the one that only a device knows."""
        return min(len(self._done) + len(self._under_way), RECORDS)

    def add(self, record: Record, devices: Iterable[torch.device]) -> None:
        """Add the record of a refresh that was launched on these devices; this waits for no accelerator."""
        self._settle(wait=False)
        events = []
        copy = record.on_the_host()
        for device in devices:
            if device.type != "cpu":
                event = torch.Event(device)
                event.record(torch.accelerator.current_stream(device))
                events.append(event)
        self._under_way.append((copy, events))
        self._settle(wait=False)

    def add_where(self, due: Tensor, record: Record) -> Record:
        """Add the record of a refresh that happened if `due` is not 0, and return the record that is written."""
        self.on_device = record.kept_where(due, self.on_device)
        return self.on_device

    def kept(self) -> tuple[list[Numbers], list[tuple[Record, list[torch.Event]]]]:
        """Return the present records, for `bring_back`."""
        return list(self._done), list(self._under_way)

    def bring_back(self, kept: tuple[list[Numbers], list[tuple[Record, list[torch.Event]]]]) -> None:
        """Restore the records that `kept` returned."""
        self._done, self._under_way = deque(kept[0], maxlen=RECORDS), deque(kept[1], maxlen=RECORDS)

    def read(self, at_most: int = RECORDS) -> list[dict[str, Any]]:
        """Return the last records as `EPIAdamW.telemetry` documents them, oldest first; this waits for the devices."""
        self._settle(wait=True)
        last = self._last()
        return [numbers.as_dict() for numbers in [*self._done, *([last] if last else [])][-at_most:]]

    def load(self, records: Sequence[Numbers]) -> None:
        """Let these be the records; of more than RECORDS, the last ones."""
        self.__init__()  # type: ignore[misc]
        self._done.extend(records)

    def _last(self) -> Numbers | None:
        """Return the record that only a device knows, if there was such a refresh."""
        record = self.on_device
        if record is not None and record.counts.device.type != "cpu":
            torch.accelerator.synchronize(record.counts.device)
        if record is None or not int(record.step):
            return self._on_device_before
        return record.numbers(None)

    def _settle(self, wait: bool) -> None:
        """Turn the records that have arrived into numbers, or all records if `wait`."""
        while self._under_way:
            record, events = self._under_way[0]
            for event in events:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._under_way.popleft()
            self._done.append(record.numbers(self._done[-1].layout if self._done else None))

    def __getstate__(self) -> dict[str, Any]:
        """Return the numbers; this waits for the devices."""
        self._settle(wait=True)
        return {"done": list(self._done), "last": self._last()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.load(state["done"])
        self._on_device_before = state["last"]
