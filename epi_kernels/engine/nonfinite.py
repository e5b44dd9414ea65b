"""Counts of gradients whose square is NaN or infinite, kept where the parameters are and read without waiting."""

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

# counters kept for lists of parameters that may come again: those of a step, and of the refreshes between
_RECENT = 8


@dataclass(slots=True, eq=False)
class _Counter:
    """The counts of one list of parameters."""

    params: tuple[int, ...]  # their identities: a counter keeps no parameter alive
    counts: Tensor
    user: "weakref.ref[Tensor] | None" = (
        None  # what `counter` returned, a view of `counts`: once it is gone nobody adds any more
    )
    told: int = 0  # how many of the counts that are not 0 were looked at for a warning


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy of counts that is on its way to the CPU, or there."""

    of: _Counter
    counts: Tensor
    event: torch.Event
    final: bool  # nobody adds to them any more


class NonfiniteCounts:
    """Counters for lists of parameters, and one warning for each parameter that has ever counted.

    There are as many counters as are in use, and a few more: those of lists that do not come again are added up. On the
    CPU a warning comes with the step. On an accelerator the step does not wait: `snapshot` starts a copy, and the next
    one warns of what the last has brought. pickle and deepcopy keep the sum, and who was warned of.
    """

    def __init__(self) -> None:
        self._counters: dict[tuple[int, ...], _Counter] = {}
        self._recent: dict[tuple[int, ...], Tensor] = {}  # the last in use
        self._under_way: list[_Copy] = []
        self._past = 0  # the sum of the counters that are no more
        self._warned: set[str] = set()

    def counter(self, params: Sequence[Tensor]) -> Tensor:
        """Return the int64 counters, one for each of `params`, into which operations add.

        The same ones as long as somebody has them, or has asked for them lately.
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
        """Return every counter itself, and the sum of those that are no more."""
        return [*self._settled(), *(counter.counts for counter in self._counters.values())]

    def snapshot(self, groups: Groups) -> list[Tensor]:
        """Return what `counters` does, as copies on the CPU; those of an accelerator are right once it was waited for.

        Warns of what is known without waiting.
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
        """Warn of each parameter that has counted and was not named yet, as far as is known without waiting."""
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

    def _send(self, copies: Sequence[tuple[_Counter, Tensor]], final: bool) -> None:
        for counter, copy in copies:
            device = counter.counts.device
            if device.type != "cpu":
                event = torch.Event(device)
                event.record(torch.accelerator.current_stream(device))
                self._under_way.append(_Copy(counter, copy, event, final))

    def _settled(self) -> list[Tensor]:
        """Return, on the CPU, the counts to which nobody adds any more."""
        past = torch.tensor([self._past], dtype=torch.int64, device="cpu")
        return [past, *(copy.counts for copy in self._under_way if copy.final)]

    def _warn(self, counter: _Counter, counts: Tensor, groups: Groups) -> None:
        nonzero = int(counts.count_nonzero())
        if nonzero == counter.told:
            return
        counter.told = nonzero
        known = names_of(groups)
        for param, count in zip(counter.params, counts.tolist(), strict=True):
            name = known.get(param)  # None: it has left the optimizer
            if count and name is not None and name not in self._warned:
                self._warned.add(name)
                warn(
                    f"{name}: {count} squared gradients were NaN or infinite; these entries keep "
                    "their importance. Said once for each parameter, counted in telemetry().",
                    RuntimeWarning,
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return the sum and who was warned of; it waits for an accelerator."""
        ended = [copy for copy in self._under_way if copy.final]
        for copy in ended:
            copy.event.synchronize()
        held = [*(copy.counts for copy in ended), *(counter.counts for counter in self._counters.values())]
        return {"past": self._past + sum(int(counts.sum()) for counts in held), "warned": set(self._warned)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.__init__()  # type: ignore[misc]
        self._past, self._warned = state["past"], state["warned"]
