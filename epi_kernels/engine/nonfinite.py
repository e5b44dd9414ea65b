"""Counts of gradients whose square is NaN or infinite, kept on the parameters' devices and read without waiting."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels.engine.groups import names_of
from epi_kernels.engine.settings import Groups
from epi_kernels.notices import warn
from epi_kernels.ops.table import Uploads, zeros

# how many counters stay for lists of parameters that may come again: those of steps and of refreshes
_RECENT = 8


@dataclass(slots=True, eq=False)
class _Counter:
    """The counts of one list of parameters."""

    params: tuple[int, ...]  # their ids: a counter keeps no parameter alive
    counts: Tensor
    user: "weakref.ref[Tensor] | None" = (
        None  # the view of `counts` that `counter` returned: once it is freed, nothing adds to `counts` any more
    )
    told: int = 0  # how many counts were not 0 at the last look for a warning


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy of counts to the CPU, which may not have finished yet."""

    of: _Counter
    counts: Tensor
    event: torch.Event
    final: bool  # nothing adds to the counts any more


class NonfiniteCounts:
    """Counters for lists of parameters, and one warning for each parameter whose count is not 0.

    Only the counters in use stay, and a few recent ones; the others are added to one sum. On the CPU a step warns at
    once. On an accelerator a step does not wait: `snapshot` starts a copy, and the next `snapshot` warns of the counts
    in that copy. pickle and deepcopy keep the sum, and the names of parameters that a warning named.
    """

    def __init__(self) -> None:
        self._counters: dict[tuple[int, ...], _Counter] = {}
        self._recent: dict[tuple[int, ...], Tensor] = {}  # the counters last asked for, oldest first
        self._under_way: list[_Copy] = []
        self._past = 0  # the sum of the counters that were dropped
        self._warned: set[str] = set()

    def counter(self, params: Sequence[Tensor]) -> Tensor:
        """Return the int64 counters, one for each of `params`, to which operations add.

        The same list gets the same counters as long as the caller keeps them, or has asked for them recently.
        """
        key = tuple(map(id, params))
        found = self._counters.get(key)
        if found is None:
            counts = zeros((len(params),), torch.int64, params[0].device)
            found = self._counters[key] = _Counter(key, counts)
        user = None if found.user is None else found.user()
        if user is None:
            user = found.counts.view(-1)
            found.user = weakref.ref(user)
        self._recent.pop(key, None)
        self._recent[key] = user
        if len(self._recent) > _RECENT:
            self._recent.pop(next(iter(self._recent)))
        uploads = Uploads.current()
        if uploads is not None:
            uploads.keep(user)
        return user

    def counters(self) -> list[Tensor]:
        """Return every counter itself, and the sum of the dropped ones."""
        return [*self._settled(), *(counter.counts for counter in self._counters.values())]

    def snapshot(self, groups: Groups) -> list[Tensor]:
        """Return copies of `counters` on the CPU; a copy from an accelerator is valid once that was waited for.

        Warns of the counts that are known without waiting.
        """
        self.warn(groups)
        copies = [
            (counter, counter.counts.to("cpu", non_blocking=True, copy=True)) for counter in self._counters.values()
        ]
        settled = self._settled()
        self._under_way = [copy for copy in self._under_way if copy.final]
        self._send(copies, final=False)
        return [*settled, *(copy for _, copy in copies)]

    def warn(self, groups: Groups) -> None:
        """Warn of each parameter with a count that no warning has named yet, as far as is known without waiting."""
        for copy in [copy for copy in self._under_way if copy.event.query()]:
            self._warn(copy.of, copy.counts, groups)
            if copy.final:
                self._past += int(copy.counts.sum())
            self._under_way.remove(copy)
        ended = []
        for key, counter in list(self._counters.items()):
            on_cpu = counter.counts.device.type == "cpu"
            if on_cpu:
                self._warn(counter, counter.counts, groups)
            if counter.user is None or counter.user() is None:
                del self._counters[key]
                if on_cpu:
                    self._past += int(counter.counts.sum())
                else:
                    ended.append((counter, counter.counts.to("cpu", non_blocking=True)))
        self._send(ended, final=True)

    def go_on_from(self, count: int) -> None:
        """Let the sum of all counts be `count`, from which later ones are counted; this waits for an accelerator."""
        self._past += count - self._total()

    def _total(self) -> int:
        ended = [copy for copy in self._under_way if copy.final]
        for copy in ended:
            copy.event.synchronize()
        held = [*(copy.counts for copy in ended), *(counter.counts for counter in self._counters.values())]
        return self._past + sum(int(counts.sum()) for counts in held)

    def _send(self, copies: Sequence[tuple[_Counter, Tensor]], final: bool) -> None:
        for counter, copy in copies:
            device = counter.counts.device
            if device.type != "cpu":
                event = torch.Event(device)
                event.record(torch.accelerator.current_stream(device))
                self._under_way.append(_Copy(counter, copy, event, final))

    def _settled(self) -> list[Tensor]:
        """Return, on the CPU, the counts to which nothing adds any more."""
        past = torch.tensor([self._past], dtype=torch.int64, device="cpu")
        return [past, *(copy.counts for copy in self._under_way if copy.final)]

    def _warn(self, counter: _Counter, counts: Tensor, groups: Groups) -> None:
        nonzero = int(counts.count_nonzero())
        if nonzero == counter.told:
            return
        counter.told = nonzero
        known = names_of(groups)
        for param, count in zip(counter.params, counts.tolist(), strict=True):
            name = known.get(param)  # None: the parameter has left the optimizer
            if count and name is not None and name not in self._warned:
                self._warned.add(name)
                warn(
                    f"{name}: {count} squared gradients were NaN or infinite; these entries keep "
                    "their importance. Said once for each parameter, counted in telemetry().",
                    RuntimeWarning,
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return the sum and the names that were warned of; this waits for an accelerator."""
        return {"past": self._total(), "warned": set(self._warned)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__init__()  # type: ignore[misc]
        self._past, self._warned = state["past"], state["warned"]
