"""Counts of gradients whose square is NaN or infinite, kept where the parameters are and read without waiting."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.notices import warn
from epi_kernels.ops.table import zeros

# the counters of one list of parameters, and a copy of them on the CPU
_Snapshot = tuple[list[Tensor], Tensor]


class NonfiniteCounts:
    """Counters for lists of parameters, and one warning for each parameter that has ever counted.

    On the CPU a warning comes with the step. On an accelerator the step does not wait: `snapshot` starts a copy, and
    the next one warns of what the last has brought.
    """

    def __init__(self) -> None:
        self._counters: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}
        self._warned: set[Tensor] = set()
        self._under_way: list[tuple[_Snapshot, torch.Event]] = []

    def counter(self, params: Sequence[Tensor]) -> Tensor:
        """Return the int64 counters, one for each of `params`, into which operations add; always the same."""
        key = tuple(map(id, params))
        if key not in self._counters:
            self._counters[key] = (list(params), zeros((len(params),), torch.int64, params[0].device))
        return self._counters[key][1]

    def counters(self) -> list[Tensor]:
        """Return every counter itself."""
        return [counter for _, counter in self._counters.values()]

    def snapshot(self, name_of: Callable[[Tensor], str]) -> list[Tensor]:
        """Return a copy of every counter on the CPU; those of an accelerator are right once it was waited for.

        Warns of what is known without waiting.
        """
        self.warn(name_of)
        under_way = [
            ((params, counter.to("cpu", non_blocking=True, copy=True)), counter.device)
            for params, counter in self._counters.values()
        ]
        self._under_way = []
        for copy, device in under_way:
            if device.type != "cpu":
                event = torch.Event(device)
                event.record(torch.accelerator.current_stream(device))
                self._under_way.append((copy, event))
        return [counts for (_, counts), _ in under_way]

    def warn(self, name_of: Callable[[Tensor], str]) -> None:
        """Warn of each parameter that has counted and was not named yet, as far as is known without waiting."""
        known = [held for held in self._counters.values() if held[1].device.type == "cpu"]
        known += [copy for copy, event in self._under_way if event.query()]
        for params, counts in known:
            if not counts.any():
                continue
            for param, count in zip(params, counts.tolist(), strict=True):
                if count and param not in self._warned:
                    self._warned.add(param)
                    warn(
                        f"{name_of(param)}: {count} squared gradients were NaN or infinite; these entries keep "
                        "their importance. Said once for each parameter, counted in telemetry().",
                        RuntimeWarning,
                    )

    def __getstate__(self) -> dict[str, Any]:
        """Return the counters and who was warned of; a copy under way is not kept."""
        return {**self.__dict__, "_counters": list(self._counters.values()), "_under_way": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the counters back; the parameters have other identities now."""
        self.__dict__ = {**state, "_counters": {tuple(map(id, held[0])): held for held in state["_counters"]}}
