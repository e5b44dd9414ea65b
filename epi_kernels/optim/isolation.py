"""Evolving isolation of an optimizer's parameters: who competes for protection, when, and what a refresh did.

What EPIAdamW and IsolatedOptimizer share. It knows torch's parameter groups, and of a parameter's state the one tensor
whose sign bits are the mask.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from epi_kernels import contract, lock
from epi_kernels.backends import registry as dispatch
from epi_kernels.distributed import (
    AgreeAgain,
    Agreement,
    Held,
    Ranks,
    agreement,
    group_of,
    is_slice,
    local,
    local_gradient,
    shard_key,
)
from epi_kernels.integrations.deepspeed import Segment
from epi_kernels.layers import Grouping, has_names
from epi_kernels.ops.table import Uploads, on_device
from epi_kernels.optim.checkpoint import LATEST
from epi_kernels.optim.complex import as_real, squared_by_importance
from epi_kernels.optim.groups import Named, settings_of
from epi_kernels.optim.nonfinite import NonfiniteCounts
from epi_kernels.optim.plain import is_count, is_number
from epi_kernels.optim.refresh import Candidate, refresh_
from epi_kernels.optim.scaling import UNSCALED, Scaling
from epi_kernels.telemetry import Budget, Record, Records

_CHOICES = {
    "normalize": ("layer", "none"),
    "scope": ("global", "layer"),
    "threshold": ("exact", "histogram"),
    "importance": ("ema", "exp_avg_sq"),
}

# Where a group keeps the number of steps that the optimizer has taken. Refreshes go by this clock and not by
# state["step"]: parameters that stand still, such as those of a finished task, must not stop the refreshes.
CLOCK = "isolation_clock"

# settings of the whole optimizer: they stand in every group, so that a checkpoint holds them, and are equal in all
SHARED = ("mask_interval", "layers", "normalize", "scope", "threshold", "importance")


@dataclass
class _Plan:
    """Who competes for protection in a refresh, as far as this rank holds them."""

    agreed: Agreement
    candidates: list[Candidate] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)  # of the candidates
    untouched: list[int] = field(default_factory=list)  # layers


@dataclass
class _Iteration:
    """The calls of `step` since the clock was last counted; parameters by their identities."""

    stepped: set[int] = field(default_factory=set)
    parameters: int = 0  # as many as have joined with groups
    clock: int = 0


class Isolation(Named):
    """The part of an optimizer that chooses the protected entries; mixed into a torch.optim.Optimizer.

    A group has the settings that `check_settings` names, all of them.
    """

    # of the optimizer
    state: Any
    _backend: str
    _nonfinite: NonfiniteCounts

    _take_written: Callable[[], None]  # what a program has written into the groups

    # of the isolation; the optimizer sets the first, before it adds a group
    _grouping: Grouping
    _records: Records
    _process_group: Any = None
    _agreed: Agreement | None = None
    _agreed_on: tuple[Sequence[Held], Ranks] | None = None  # what this rank held then, and with whom
    _segments: list[Segment] | None = None  # of flat partitions
    _every_group: Sequence[dict[str, Any]] = ()  # the groups that the segments count by
    _known_ranks: tuple[Ranks | None] | None = None
    _clock_there: Tensor | None = None  # the clock, int64 of no dimension, where a device alone knows it

    def _signed_importance(self, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return the tensor whose sign bits are the mask of `param`; None: nothing of it is or can be protected yet."""
        raise NotImplementedError

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` are protected: a new bool tensor of its shape, True = protected.

        Of a DTensor: of the shard that this rank holds.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        signed = self._signed_importance(param, self._group_of(param))
        if signed is None:
            return torch.zeros_like(local(param), dtype=torch.bool)
        return lock.is_locked(local(signed))

    def importance(self, param: Tensor) -> Tensor:
        """Return the importance S of each entry of `param`: a new tensor of its shape, >= 0, in squared gradient units.

        Of a DTensor: of the shard that this rank holds.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        signed = self._signed_importance(param, self._group_of(param))
        if signed is None:
            return torch.zeros_like(local(param), dtype=torch.float32)
        return lock.magnitude(local(signed))

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the protected entries now, from the importance as it is; nothing else changes.

        Where parameters are sharded, every rank must call it at the same step.

        Raises:
            ValueError: a setting that was written into the groups is out of its range, or not in all of them.

        For task boundaries. With beta = 0.99 the importance remembers about 100 steps: what is protected is what the
        task just trained uses.
        """
        self._take_written()
        self._refresh((), UNSCALED)

    def telemetry(self) -> list[dict[str, Any]]:
        """Return what the last refreshes of this object did, oldest first, 256 of them at most (telemetry.RECORDS).

        Reading waits for the device, stepping does not. pickle and deepcopy of the optimizer keep the records.

        With ``capturable``, or ``fused`` and a scaler on a GPU, the device alone knows which steps refreshed, and the
        list has the last one. A record is a dict of plain numbers and names, over all ranks but for ``nonfinite``:

        - ``step``: the clock at the refresh; ``protected_share``: protected / eligible.
        - ``eligible``, ``budget``, ``protected``: entries that compete, k, and entries protected; `protected` is below
          `budget` only for want of scores above 0, and above it only by ties at the threshold.
        - ``nonfinite``: NaN or infinite squared gradients so far, over all parameters, as far as this rank holds them.
        - ``budgets``: for each, ``scope`` ("global" or the layer's name), ``isolation_ratio``, ``eligible``,
          ``budget``, ``threshold`` (tau) and ``protected``.
        - ``layers``: for each, ``layer``, ``eligible``, ``protected``, ``locked`` (newly), ``released``, and the range
          of its importance, ``minimum`` and ``maximum``.
        """
        records = self._records.read()
        self._nonfinite.warn(self._names)
        return records

    # Inside ----------------------------------------------------------------------------------------------------------

    def _isolation_text(self) -> str:
        """Return one line on the grouping and the backend in force."""
        layers = self._grouping.of(self.param_groups)
        kinds = sorted({(p.device, as_real(p.detach()).dtype) for p in layers if not is_lazy(p)}, key=str)
        chosen = [f"{dispatch.explain(device, self._backend, dtype)} on {device}" for device, dtype in kinds]
        backends = "; ".join(dict.fromkeys(chosen))
        return (
            f"Isolation: {len(layers)} tensors in {len(set(layers.values()))} layers by {self._grouping.name!r}; "
            f"backend {backends}"
        )

    # The clock -------------------------------------------------------------------------------------------------------

    def _latest_clock(self) -> int:
        """Return how many steps this optimizer has taken; waits for the device where the clock runs there."""
        if self._clock_there is not None:
            return int(self._clock_there)
        # groups that a program has put in the place of others may not have it
        return int(self._clocked_groups()[0].get(CLOCK, self._turns().clock))

    def _keep_clock(self, clock: int) -> None:
        """Set the number of steps that this optimizer has taken."""
        self._turns().clock = clock
        for group in self._clocked_groups():
            group[CLOCK] = clock
        if self._clock_there is not None:
            self._clock_there.fill_(clock)  # in place: a captured step has its address

    def _clocked_groups(self) -> Sequence[dict[str, Any]]:
        """Return the groups that keep the clock: all of them, where DeepSpeed shows one at a time."""
        return self.param_groups if self._segments is None else self._every_group

    def _count_step(self) -> int:
        """Count a call of `step`, and return the clock.

        DeepSpeed calls `step` once for each group or sub-group and shows the optimizer those parameters alone. Calls
        with some parameters, none of which has stepped since the last count, are one iteration, and count once. (All
        parameters that have not stepped are others, which a wrapper has put in the place of those that have.)
        """
        now = self._turns()
        here = {id(param) for group in self.param_groups for param in group["params"]}
        if now.stepped and 0 < len(here) < now.parameters and here.isdisjoint(now.stepped):
            now.stepped |= here
        else:
            now.stepped, now.clock = here, self._latest_clock() + 1
        clock = now.clock
        self._keep_clock(clock)
        return clock

    def _turns(self) -> _Iteration:
        """Return the calls of `step` that are one iteration; a copy of an optimizer begins anew."""
        found: _Iteration | None = self.__dict__.get("_iteration")
        if found is None:
            count = sum(len(group["params"]) for group in self.param_groups)
            found = self.__dict__["_iteration"] = _Iteration(parameters=count)
        return found

    def _admit(self, group: dict[str, Any]) -> None:
        """Give a group that joins the clock, which is one for all, and count the parameters that there are now."""
        group[CLOCK] = self._latest_clock()
        self._turns().parameters = sum(len(one["params"]) for one in self.param_groups)

    def _count_step_on(self, device: torch.device, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
        """Count a step on a device that alone knows whether it is skipped, and wait for nothing.

        Args:
            device: where the clock runs from now on.
            found_inf: float32 of one value on that device, not 0 where the step is skipped; None: it is not.

        Returns:
            (the clock after this step, whether this step counts), int64 and bool of no dimension on the device.
        """
        if self._clock_there is None:
            self._clock_there = on_device(torch.tensor(self._latest_clock(), dtype=torch.int64, device="cpu"), device)
        found_inf = torch.zeros((), dtype=torch.float32, device=device) if found_inf is None else found_inf
        counted = (found_inf == 0).reshape(())
        self._clock_there += counted
        return self._clock_there.clone(), counted

    # Inside ----------------------------------------------------------------------------------------------------------

    def _refresh(
        self,
        stepping: Sequence[Tensor],
        scaling: Scaling,
        clock: int | Tensor | None = None,
        due: Tensor | None = None,
    ) -> None:
        """Advance the importance of the parameters that are `stepping`, and choose the protected entries.

        Where the device alone knows whether it is time, `due` is not 0 where it is, and `clock` is there as well.
        """
        grads = {param: squared_by_importance(local_gradient(param).detach()) for param in stepping}
        step = self._latest_clock() if clock is None else clock
        try:
            self._refresh_once(grads, scaling, step, due)
        except AgreeAgain:
            # of the importance, which has taken the gradients in
            self._agreed = None
            self._refresh_once({}, scaling, step, due)

    def _refresh_once(
        self, grads: dict[Tensor, Tensor], scaling: Scaling, step: int | Tensor, due: Tensor | None
    ) -> None:
        """Advance the importance by these gradients, and choose the protected entries.

        Raises:
            AgreeAgain: after the importance has advanced, before anything else has: another rank holds something else
                now than when all agreed.
        """
        ranks, plan = self._ranks(), self._plan(grads, step)
        shared, agreed = self.param_groups[0], plan.agreed
        if not agreed.layers:  # nothing can be protected
            if ranks is not None:
                assert isinstance(step, int)
                ranks.ranges(
                    torch.zeros(0, 2, dtype=torch.float32, device="cpu"), step, self._settings_of_ranks()
                )  # until a rank says otherwise
            return
        if not plan.candidates and ranks is None:
            return
        budgets = [
            Budget(scope, ratio, eligible, contract.budget(ratio, eligible))
            for (scope, ratio), eligible in zip(agreed.budgets, agreed.budget_eligible, strict=True)
        ]
        found = refresh_(
            plan.candidates,
            plan.untouched,
            layer_count=len(agreed.layers),
            budget_ranks=[budget.rank for budget in budgets],
            counters=lambda where: self._nonfinite.counter([plan.params[i] for i in where]),
            normalize=shared["normalize"] == "layer",
            exact=shared["threshold"] == "exact",
            keep_finite=shared["importance"] == "ema",
            grad_factor=scaling.factor,
            due=due,
            backend=self._backend,
            ranks=ranks,
            pairs=agreed.pairs,
            clock=step,
            settings=self._settings_of_ranks() if ranks else None,
        )
        rows = agreed.pairs if ranks else [(candidate.layer, candidate.budget) for candidate in plan.candidates]
        record = Record(
            step=step,
            layers=agreed.layers,
            layer_eligible=agreed.layer_eligible,
            budgets=budgets,
            layer_of=[layer for layer, _ in rows],
            budget_of=[budget for _, budget in rows],
            ranges=found.ranges,
            thresholds=found.thresholds,
            counts=found.counts,
            nonfinite=self._nonfinite.counters() if due is not None else self._nonfinite.snapshot(self._names),
        )
        if due is None:
            self._records.add(record, {found.counts.device, *(c.importance.device for c in plan.candidates)})
        else:
            written = self._records.add_where(due, record)
            uploads = Uploads.current()
            if uploads is not None:  # a graph writes into it, for as long as there is the graph
                uploads.keep(written)

    def _plan(self, grads: dict[Tensor, Tensor], clock: int | Tensor) -> _Plan:
        """Return who competes for protection, in which layer and for which budget."""
        held = dict(self._held()) if self._segments is None else {}
        pieces = list(held.values()) if self._segments is None else [piece for _, _, piece in self._pieces()]
        plan = _Plan(self._agree(clock) if self._ranks() else agreement([pieces], 0))
        layers = {layer: i for i, layer in enumerate(plan.agreed.layers)}
        budgets = {budget: i for i, budget in enumerate(plan.agreed.budgets)}
        if self._segments is not None:
            self._plan_segments(plan, layers, budgets)
            return plan
        for param, group in self._eligible():
            piece = held[param]
            layer, signed = layers[piece.layer], self._signed_importance(param, group)
            if signed is None:
                # never had a gradient: its importance is 0, for which no memory is spent
                plan.untouched.extend([layer] if piece.entries else [])
                continue
            beta = group["importance_beta"] if group["importance"] == "ema" else float(group["betas"][1])
            plan.params.append(param)
            counted = piece.name in plan.agreed.owned
            plan.candidates.append(
                Candidate(local(signed), grads.get(param), beta, 1.0 - beta, layer, budgets[piece.budget], counted)
            )
        return plan

    def _plan_segments(self, plan: _Plan, layers: dict[str, int], budgets: dict[tuple[str, float], int]) -> None:
        """Let every piece of a parameter in a flat partition compete, in the layer of its parameter."""
        assert self._segments is not None
        for segment, group, piece in self._pieces():
            layer, signed = layers[piece.layer], self._signed_importance(segment.flat, group)
            if signed is None:
                plan.untouched.extend([layer] if piece.entries else [])
            elif piece.entries:
                part = signed[segment.start : segment.start + segment.entries]
                plan.params.append(segment.flat)
                # between two steps: the importance has all gradients
                plan.candidates.append(Candidate(part, None, 0.0, 1.0, layer, budgets[piece.budget]))

    def _pieces(self) -> Iterator[tuple[Segment, dict[str, Any], Held]]:
        """Yield the pieces in flat partitions that compete, with their groups and what the ranks hear of them."""
        for segment in self._segments or ():
            group = self._every_group[segment.group]
            if group["isolation_ratio"] > 0:
                layer = self._grouping.layer(segment.name)
                scope = layer if group["scope"] == "layer" else "global"
                rank = 0 if self._ranks() is None else self._ranks().rank  # type: ignore[union-attr]
                budget = (scope, group["isolation_ratio"])
                yield segment, group, Held(segment.name, ("rank", rank), layer, budget, segment.entries, segment.of)

    # Ranks -----------------------------------------------------------------------------------------------------------

    def _ranks(self) -> Ranks | None:
        """Return the ranks among which the parameters are shared out, or None."""
        if self._known_ranks is None:
            params = [param for group in self.param_groups for param in group["params"]]
            group = group_of(params, self._process_group)
            self._known_ranks = (None if group is None else Ranks(group),)
        return self._known_ranks[0]

    def _part(self) -> None:
        """Forget the ranks: parameters are others now. What all agreed on holds until the others hear of it."""
        self._known_ranks = None

    def _holds_nothing(self) -> bool:
        """Return whether other ranks hold all entries."""
        params = (param for group in self.param_groups for param in group["params"])
        return self._ranks() is not None and not any(local(param).numel() for param in params)

    def _meet(self) -> None:
        """Agree with the other ranks, if there are any, once.

        Raises:
            ValueError: on every rank: they have other settings, or not the same parameters.
        """
        if self._ranks() is not None and self._agreed is None:
            self._agree(clock=0)

    def _agree(self, clock: int | Tensor) -> Agreement:
        """Return what all ranks hold; asked of them again when this rank holds something else than before."""
        ranks = self._ranks()
        assert ranks is not None
        bound = self._segments is not None
        held = [piece for _, _, piece in self._pieces()] if bound else [piece for _, piece in self._held()]
        settings = self._settings_of_ranks()
        if self._agreed is not None and self._agreed_on is not None:
            before, partners = self._agreed_on
            if partners.group is not ranks.group:
                self._agreed = None
            elif held != before:
                # the others wait for this rank's ranges, and hear it there
                nothing = torch.tensor([[math.inf, -math.inf]], dtype=torch.float32, device="cpu").repeat(
                    len(self._agreed.layers), 1
                )
                with suppress(AgreeAgain):
                    ranks.ranges(nothing, int(clock), settings, again=True)
                self._agreed = None
        if self._agreed is None:
            self._agreed = ranks.agree(held, settings)
            self._agreed_on = held, ranks
        return self._agreed

    def _settings_of_ranks(self) -> list[dict[str, Any]]:
        """Return of each group what must be equal on all ranks."""
        return [settings_of(group, ("isolation_ratio", "importance_beta", *SHARED)) for group in self.param_groups]

    def _held(self) -> Iterator[tuple[Tensor, Held]]:
        """Yield what this rank holds of each eligible parameter.

        Raises:
            NotImplementedError: FSDP1 has cut nothing: of what it holds nobody can tell which ranks have the same.
        """
        layers = self._grouping.of(self.param_groups)
        ranks = self._ranks()
        rank = 0 if ranks is None else ranks.rank
        # alone by position, since torch takes a name twice
        names = {
            param: str(group["param_names"][j]) if ranks is not None and has_names(group) else f"{i}.{j}"
            for i, group in enumerate(self.param_groups)
            for j, param in enumerate(group["params"])
        }
        named = any("param_names" in group for group in self.param_groups)
        partitioned = self._process_group is not None and not named
        for param, group in self._eligible():
            name = f"{rank}:{names[param]}" if partitioned else names[param]
            layer = f"{rank}:{layers[param]}" if partitioned else layers[param]
            scope = layer if group["scope"] == "layer" else "global"
            if ranks is not None and ranks.size > 1 and is_slice(param) and param.dim() > 1:
                raise NotImplementedError(
                    f"{name} is whole on every rank, as FSDP1's NO_SHARD leaves it, and each would count it; use "
                    "DistributedDataParallel"
                )
            key = shard_key(param, rank, partitioned=partitioned)
            of = None if is_slice(param) else param.numel()
            yield param, Held(name, key, layer, (scope, group["isolation_ratio"]), local(param).numel(), of)

    def _eligible(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the parameters whose entries may be protected, each once, with their groups."""
        seen = set()
        for group in self.param_groups:
            for param in group["params"]:
                shaped = not is_lazy(param)  # a lazy module gives it entries in its first forward pass
                if group["isolation_ratio"] > 0 and param.requires_grad and shaped and param not in seen:
                    seen.add(param)
                    yield param, group


def check_settings(settings: dict[str, Any]) -> None:
    """Check our arguments.

    Raises:
        ValueError: naming the argument and its value.
    """
    ratio, beta, interval = settings["isolation_ratio"], settings["importance_beta"], settings["mask_interval"]
    if not (is_number(ratio) and 0.0 <= ratio < 1.0):
        raise ValueError(f"Invalid isolation_ratio: {ratio!r}; it is a share of the entries, 0 <= p < 1")
    if not (is_number(beta) and 0.0 <= beta < 1.0):
        raise ValueError(f"Invalid importance_beta: {beta!r}; 0 <= beta < 1")
    if interval is not None and not is_count(interval, 1, math.inf):
        raise ValueError(f"Invalid mask_interval: {interval!r}; steps >= 1, or None for refresh() alone")
    for name, allowed in _CHOICES.items():
        if not isinstance(settings[name], str) or settings[name] not in allowed:
            raise ValueError(f"Invalid {name}: {settings[name]!r}; choose one of {allowed}")
    clock = settings.get(CLOCK, 0)
    if not is_count(clock, 0, LATEST):
        raise ValueError(f"Invalid {CLOCK}: {clock!r}; it is a number of steps, >= 0")
