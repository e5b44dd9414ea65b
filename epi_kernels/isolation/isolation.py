"""Evolving isolation of an optimizer's parameters: its clock, its masks, its refreshes, and their records.

Each EPIAdamW, EPILion and IsolatedOptimizer has an `Isolation`. It uses torch's parameter groups and, from a
parameter's state, only the tensor whose sign bits are the mask.
"""

import copy
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from epi_kernels import contract, lock
from epi_kernels.backends import registry
from epi_kernels.distributed import AgreeAgain, Ranks, local, local_gradient
from epi_kernels.engine.complex import as_real, squared_by_importance
from epi_kernels.engine.groups import group_of, has_names, noise_name, params_of
from epi_kernels.engine.method import Owner, rank_of
from epi_kernels.engine.nonfinite import NonfiniteCounts
from epi_kernels.engine.plan import PLAIN, form_of
from epi_kernels.engine.scaling import UNSCALED, Scaling
from epi_kernels.engine.settings import Groups
from epi_kernels.engine.storages import place_of, stored
from epi_kernels.isolation.competition import Compact, Competition, Signed
from epi_kernels.isolation.layers import Grouping, LayersArgument
from epi_kernels.isolation.mask_clock import MaskClock
from epi_kernels.isolation.refresh import Refresh
from epi_kernels.isolation.settings import CLOCK
from epi_kernels.isolation.telemetry import Budget, Layout, Numbers, Record, Records
from epi_kernels.notices import warn
from epi_kernels.ops.table import Uploads
from epi_kernels.storage import block8
from epi_kernels.storage.noise import Place

_requires_grad = attrgetter("requires_grad")

# the settings of a group that decide which entries are protected; the others decide when, or are seen in the tensors
_DECIDING = ("isolation_ratio", "importance_beta", "normalize", "scope", "threshold", "importance", "rounding_seed")


@dataclass
class Iteration:
    """The calls of `step` since the clock was last counted."""

    stepped: list[int] = field(default_factory=list)  # ids of the parameters in those calls
    parameters: int = 0  # how many the groups have had in all
    clock: int = 0


@dataclass
class _Plan:
    """A refresh, prepared for certain parameters, states and settings; it keeps none of their tensors."""

    seen: list[object] | None  # see `Isolation._look`; None: the plan serves only one refresh
    where: list[int]  # the position of each candidate among the parameters of all groups
    ranks: Ranks | None
    refresh: Refresh | None  # None: nothing can be protected
    layout: Layout
    layer_of: "np.ndarray[Any, Any]"  # the layer of each row of the counts
    budget_of: "np.ndarray[Any, Any]"  # the budget of each row
    noisy: list[Tensor]  # the parameter of each candidate, if an importance is rounded stochastically; else none


class Isolation:
    """Chooses the protected entries of an optimizer, and remembers what it chose.

    The optimizer, `owner`, is an argument of every method: an `Isolation` keeps no reference to it.

    Args:
        layers: see `epi_kernels.EPIAdamW`.
    """

    def __init__(self, layers: LayersArgument) -> None:
        self.competition = Competition(Grouping(layers))
        self.records = Records()
        self.nonfinite = NonfiniteCounts()
        self._clock_there: MaskClock | None = None  # the clock if only a device knows it
        self.iteration = Iteration()
        self._warned = False  # whether the warning of flat partitions was given
        self._shown: list[int] = []  # ids of the parameters of the last step
        self._plan: _Plan | None = None  # the plan of the last refresh

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        return {"competition": self.competition, "records": self.records, "nonfinite": self.nonfinite}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave; a copy begins a new iteration."""
        competition = copy.copy(state["competition"])  # so that a shallow copy has a competition of its own
        vars(self).update(
            state,
            competition=competition,
            _clock_there=None,
            iteration=Iteration(),
            _warned=False,
            _shown=[],
            _plan=None,
        )

    @property
    def grouping(self) -> Grouping:
        """The grouping of the parameters into layers."""
        return self.competition.grouping

    # Masks -----------------------------------------------------------------------------------------------------------

    def mask(self, owner: Owner, param: Tensor) -> Tensor:
        """Return which entries of a parameter, or of the shard of a DTensor, are protected.

        Raises:
            ValueError: `param` is not a parameter of the optimizer.
        """
        signed = signed_importance(owner, param, group_of(param, owner.param_groups))
        if signed is None:
            return torch.zeros_like(local(param), dtype=torch.bool)
        return lock.is_locked(local(signed))

    def importance(self, owner: Owner, param: Tensor) -> Tensor:
        """Return the importance S of each entry of a parameter, or of the shard of a DTensor.

        Raises:
            ValueError: `param` is not a parameter of the optimizer.
        """
        group = group_of(param, owner.param_groups)
        signed, scales = signed_importance(owner, param, group), scales_of(owner, param, group)
        if signed is None:
            return torch.zeros_like(local(param), dtype=torch.float32)
        values = local(signed) if scales is None else block8.decoded(local(signed), local(scales))
        return lock.magnitude(values).to(torch.promote_types(values.dtype, torch.float32))

    def telemetry(self, owner: Owner, at_most: int) -> list[dict[str, Any]]:
        """Return what the last refreshes did; see `Isolating.telemetry`."""
        records = self.records.read(at_most)
        self.nonfinite.warn(owner.param_groups)
        return records

    def take_records(self, records: Sequence[Numbers]) -> None:
        """Let these be the records; counts of gradients that are not finite go on from the last one."""
        self.records.load(records)
        self.nonfinite.go_on_from(records[-1].nonfinite if records else 0)

    def text(self, owner: Owner) -> str:
        """Return one line on the grouping and the backend in force."""
        layers = self.grouping.of(owner.param_groups)
        kinds = sorted({(p.device, as_real(p.detach()).dtype) for p in layers if not is_lazy(p)}, key=str)
        chosen = [f"{registry.explain(device, owner._backend, dtype)} on {device}" for device, dtype in kinds]
        backends = "; ".join(dict.fromkeys(chosen))
        return (
            f"Isolation: {len(layers)} tensors in {len(set(layers.values()))} layers by {self.grouping.name!r}; "
            f"backend {backends}"
        )

    # The clock -------------------------------------------------------------------------------------------------------

    def _clocked(self, groups: Groups) -> Groups:
        """Return the groups that keep the clock: all groups, also if DeepSpeed shows the optimizer one at a time."""
        return groups if self.competition.segments is None else self.competition.every_group

    def latest_clock(self, groups: Groups) -> int:
        """Return how many steps the optimizer has taken; this waits for the device if the clock runs on one."""
        if self._clock_there is not None:
            return int(self._clock_there.value)
        # groups with which a program replaced others may lack the clock
        return int(self._clocked(groups)[0].get(CLOCK, self.iteration.clock))

    def keep_clock(self, groups: Groups, clock: int) -> None:
        """Set the number of steps that the optimizer has taken."""
        self.iteration.clock = clock
        for group in self._clocked(groups):
            group[CLOCK] = clock
        if self._clock_there is not None:
            self._clock_there.set(clock)

    def join(self, groups: Groups, group: dict[str, Any]) -> None:
        """Give a new group the clock, which all groups share, and count the parameters of all groups."""
        group[CLOCK] = self.latest_clock(groups)
        self.iteration.parameters = len(params_of(groups))

    def start_iteration(self) -> None:
        """Let the next call of `step` begin an iteration, after a state was loaded."""
        self.iteration.stepped.clear()

    def count_step(self, groups: Groups) -> int:
        """Count a call of `step`, and return the clock.

        DeepSpeed calls `step` once for each group or sub-group and shows the optimizer only the parameters of that
        call. Consecutive calls with some of the parameters, none of them twice, are one iteration and count once. (A
        call with as many parameters as all groups have had is an iteration: a wrapper has replaced the parameters.)
        """
        now = self.iteration
        here = [id(param) for group in groups for param in group["params"]]
        if here != self._shown:
            self._shown = here
            self._warn_of_flat_partitions(groups)
        if now.stepped and 0 < len(here) < now.parameters and set(here).isdisjoint(now.stepped):
            now.stepped += here
        else:
            now.stepped, now.clock = here, self.latest_clock(groups) + 1
        clock = now.clock
        self.keep_clock(groups, clock)
        return clock

    def count_step_on(self, groups: Groups, device: torch.device, found_inf: Tensor | None) -> tuple[MaskClock, Tensor]:
        """Count a step if only the device knows whether the step is skipped, and wait for nothing.

        Args:
            groups: torch's parameter groups.
            device: the clock runs on this device from now on.
            found_inf: one float32 value on that device, not 0 if the step is skipped; None: the step is not skipped.

        Returns:
            (the clock, whether this step counts, a bool scalar on the device).
        """
        if self._clock_there is None:
            self._clock_there = MaskClock(self.latest_clock(groups), device)
        found_inf = torch.zeros((), dtype=torch.float32, device=device) if found_inf is None else found_inf
        counted = (found_inf == 0).reshape(())
        self._clock_there.count(counted)
        return self._clock_there, counted

    # The step --------------------------------------------------------------------------------------------------------

    def before_step(self, owner: Owner) -> None:
        """Find the ranks, and count an iteration of DeepSpeed."""
        if self.competition.parted:
            self.competition.ranks(owner)  # a copy that has lost its process group raises before anything has changed
        if self.competition.segments is not None:
            self._begin_iteration(owner)

    def _begin_iteration(self, owner: Owner) -> None:
        """Count an iteration of DeepSpeed at its first `step`, and refresh if the last one made that due.

        DeepSpeed calls `step` for one group or sub-group after the other, and shows only that one: not before the next
        iteration begins is it known that all groups have advanced their importance.
        """
        groups = owner.param_groups
        interval, before = self.competition.every_group[0]["mask_interval"], self.latest_clock(groups)
        begins = self.count_step(groups) != before
        if begins and interval is not None and before and before % interval == 0:
            self.refresh(owner, (), UNSCALED, before)

    def before_update(
        self, owner: Owner, params: Sequence[Tensor], scaling: Scaling, home: torch.device | None = None
    ) -> bool | Tensor:
        """Count the step, and refresh the masks where mask_interval says so; see `Method.before_update`."""
        if self.competition.segments is not None:
            return False  # `before_step` has counted and refreshed already
        if self.competition.unmet:
            self.competition.meet(owner)
        groups = owner.param_groups
        interval = groups[0]["mask_interval"]
        if home is not None:
            clock_there, counted = self.count_step_on(groups, home, scaling.found_inf.get(home))
            if interval is None:
                return False
            # the first step takes the way of a refresh in any case: a capture needs the plan of an earlier step
            if self._plan is not None and not clock_there.may_be_due(interval):
                return False
            now = clock_there.value.clone()
            due_there = (counted & (now % interval == 0)).float()
            self.refresh(owner, params, scaling, now, due_there)
            return due_there
        clock = self.count_step(groups)
        self._clock_there = None  # the host knows the clock again, and keeps counting
        due = interval is not None and clock % interval == 0
        if due:
            self.refresh(owner, params, scaling, clock)
        return due

    def step_without_gradients(self, owner: Owner) -> None:
        """Count a step in which this rank has no gradient, and take part in a refresh that is due."""
        self.competition.meet(owner)
        clock, interval = self.count_step(owner.param_groups), owner.param_groups[0]["mask_interval"]
        if interval is not None and clock % interval == 0:
            self.refresh(owner, (), UNSCALED, clock)

    def _warn_of_flat_partitions(self, groups: Groups) -> None:
        if self.competition.segments is not None or self._warned:
            return
        if all(has_names(group) or "param_names" not in group or not group["params"] for group in groups):
            return
        self._warned = True
        warn(
            "the parameters are not those that were named: DeepSpeed ZeRO has put flat partitions in their place. "
            "Each is one layer now, with a budget of its own; optimizer.bind_deepspeed(engine) brings the layers back"
        )

    def refresh(
        self,
        owner: Owner,
        stepping: Sequence[Tensor] = (),
        scaling: Scaling = UNSCALED,
        clock: int | Tensor | None = None,
        due: Tensor | None = None,
    ) -> None:
        """Advance the importance of the parameters that are `stepping`, and choose the protected entries.

        If only the device knows whether a refresh is due, `due` is not 0 there if one is, and `clock` is there too.
        """
        step = self.latest_clock(owner.param_groups) if clock is None else clock
        with torch.no_grad():
            try:
                self._refresh_once(owner, stepping, scaling, step, due)
            except AgreeAgain:
                # without gradients: the importance has taken them in already
                self.competition.disagree()
                self._refresh_once(owner, (), scaling, step, due)

    def _refresh_once(
        self, owner: Owner, stepping: Sequence[Tensor], scaling: Scaling, step: int | Tensor, due: Tensor | None
    ) -> None:
        """Advance the importance by these gradients, and choose the protected entries.

        Raises:
            AgreeAgain: another rank has other shards now than when all agreed. The importance has advanced, and nothing
                else has changed.
        """
        seen, signed, scales, grads = self._look(owner, stepping)
        plan = self._plan
        if plan is not None and seen is not None and plan.seen == seen:
            signed, scales, grads = ([of_all[i] for i in plan.where] for of_all in (signed, scales, grads))
        else:
            self._plan = None  # frees the counters of the old plan
            plan, signed, scales, grads = self._planned(owner, stepping, seen, step)
            uploads = Uploads.current()
            # what a captured plan sends is on the device only in replays
            if seen is not None and (uploads is None or not uploads.capturing):
                self._plan = plan
        settings = None if plan.ranks is None else self.competition.settings_of_ranks(owner)
        if plan.refresh is None:
            if plan.ranks is not None:
                assert isinstance(step, int)
                nothing = torch.zeros(0, 2, dtype=torch.float32, device="cpu")
                plan.ranks.ranges(nothing, step, settings)  # exchanged because a rank may ask to agree again
            return
        chosen = plan.refresh.run_(
            signed,
            grads,
            grad_factor=scaling.factor,
            due=due,
            clock=step,
            settings=settings,
            scales=scales,
            steps=[self.noise_clock(owner, param) for param in plan.noisy],
        )
        counters = self.nonfinite.counters() if due is not None else self.nonfinite.snapshot(owner.param_groups)
        record = Record(
            step=step,
            layout=plan.layout,
            layer_of=plan.layer_of,
            budget_of=plan.budget_of,
            ranges=chosen.ranges,
            thresholds=chosen.thresholds,
            counts=chosen.counts,
            nonfinite=counters,
        )
        if due is None:
            self.records.add(record, {chosen.counts.device, *plan.refresh.devices})
        else:
            written = self.records.add_where(due, record)
            uploads = Uploads.current()
            if uploads is not None:  # the graph writes into the record for as long as the graph exists
                uploads.keep((written, plan))

    def noise_clock(self, owner: Owner, param: Tensor) -> Any:
        """Return the clock on which the noise of a parameter's importance depends: a number or a tensor."""
        return owner.state[param]["step"]

    def place(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> Place:
        """Return where the entries of a parameter lie in the whole tensor."""
        return place_of(param, noise_name(param, owner.param_groups), group, *self.rank_of(owner, param))

    def rank_of(self, owner: Owner, param: Tensor) -> tuple[int | None, int]:
        """Return what tells this rank's entries of a parameter from those of other ranks."""
        return rank_of(owner, param)

    def _look(
        self, owner: Owner, stepping: Sequence[Tensor]
    ) -> tuple[list[object] | None, list[Any], list[Any], list[Any]]:
        """Return all that a plan depends on, and signed importance, scales and gradient of every parameter.

        The first result holds no tensor. It is None if a plan cannot be kept: ranks exchange settings at each refresh,
        and DTensors, segments and complex parameters compete with tensors that are made for only one refresh.
        """
        groups, competition, grouping = owner.param_groups, self.competition, self.grouping
        params = [*chain.from_iterable(group["params"] for group in groups)]
        if competition.known_ranks != (None,) or owner._process_group is not None or competition.segments is not None:
            return None, [], [], []
        signed = [signed_importance(owner, param, group) for group in groups for param in group["params"]]
        stepped = set(map(id, stepping))
        grads = [param.grad if id(param) in stepped else None for param in params]
        present = [tensor for tensor in signed if tensor is not None]
        given = [grad for grad in grads if grad is not None]
        if not PLAIN.issuperset(map(type, chain(params, present, given))) or True in map(Tensor.is_complex, given):
            return None, [], [], []
        seen: list[object] = [
            owner._backend,
            grouping.layers,
            list(grouping.of(groups).values()) if callable(grouping.layers) else None,
            [list(map(str, group.get("param_names", ()))) for group in groups],
            [[group.get(key) for key in _DECIDING] for group in groups],
            [float(group["betas"][1]) if group.get("importance") == "exp_avg_sq" else None for group in groups],
            [len(group["params"]) for group in groups],
            list(map(id, params)),
            list(map(_requires_grad, params)),
            list(map(Tensor.numel, params)),
            [tensor is None for tensor in signed],
            [grad is None for grad in grads],
            list(map(Tensor.data_ptr, present)),
            *form_of(present),
            *form_of(given),
        ]
        scales: list[Tensor | None] = [None] * len(params)
        if any(tensor.dtype == torch.uint8 for tensor in present):
            scales = [scales_of(owner, param, group) for group in groups for param in group["params"]]
            seen.append([None if tensor is None else tensor.data_ptr() for tensor in scales])
        return seen, signed, scales, grads

    def _planned(
        self, owner: Owner, stepping: Sequence[Tensor], seen: list[object] | None, clock: int | Tensor
    ) -> tuple[_Plan, list[Tensor], list[Tensor | None], list[Tensor | None]]:
        """Return the plan of a refresh with these gradients; and importances, scales, gradients of its candidates."""
        grads = {param: squared_by_importance(local_gradient(param).detach()) for param in stepping}

        def signed_of(param: Tensor, group: dict[str, Any]) -> Tensor | None:
            return signed_importance(owner, param, group)

        def compact_of(param: Tensor, group: dict[str, Any]) -> Compact:
            scales = scales_of(owner, param, group)
            return None if scales is None else local(scales), self.place(owner, param, group)

        signed: Signed = signed_of
        competition, shared = self.competition, owner.param_groups[0]
        ranks, found = competition.ranks(owner), competition.competitors(owner, signed, compact_of, grads, clock)
        agreed = found.agreed
        budgets = [
            Budget(scope, ratio, eligible, contract.budget(ratio, eligible))
            for (scope, ratio), eligible in zip(agreed.budgets, agreed.budget_eligible, strict=True)
        ]
        refresh = None
        if agreed.layers and (found.candidates or ranks is not None):
            refresh = Refresh(
                found.candidates,
                found.untouched,
                layer_count=len(agreed.layers),
                ks=[budget.k for budget in budgets],
                counters=lambda where: self.nonfinite.counter([found.params[i] for i in where]),
                normalize=shared["normalize"] == "layer",
                exact=shared["threshold"] == "exact",
                keep_finite=shared["importance"] == "ema",
                backend=owner._backend,
                ranks=ranks,
                pairs=agreed.pairs,
            )
        rows = agreed.pairs if ranks else [(candidate.layer, candidate.budget) for candidate in found.candidates]
        layer_of, budget_of = np.array(rows, np.int64).reshape(-1, 2).T
        places: dict[int, int] = {}
        for i, param in enumerate(params_of(owner.param_groups)):
            places.setdefault(id(param), i)
        where = [] if seen is None else [places[id(param)] for param in found.params]
        layout = Layout(tuple(agreed.layers), tuple(agreed.layer_eligible), tuple(budgets))
        noisy = found.params if any(c.place is not None for c in found.candidates) else []
        plan = _Plan(seen, where, ranks, refresh, layout, layer_of, budget_of, noisy)
        candidates = found.candidates
        return plan, [c.importance for c in candidates], [c.scales for c in candidates], [c.grad for c in candidates]


def signed_importance(owner: Owner, param: Tensor, group: dict[str, Any]) -> Tensor | None:
    """Return the tensor whose sign bits are the mask of a parameter; None: the parameter has no mask yet.

    It has the parameter's shape: values in float32 or bfloat16, or codes of 8 bits (`scales_of`).
    """
    if not group.get("isolation_ratio", 1):  # a group that was added to a base optimizer may lack our settings at first
        return None
    state = owner.state.get(param)
    if not isinstance(state, MutableMapping):  # a base may keep a state that is no dict
        return None
    signed: Tensor | None = state.get("importance_codes", state.get("importance"))
    if signed is None and group.get("importance") == "exp_avg_sq":
        signed, _ = stored(state, "exp_avg_sq")
    return signed


def scales_of(owner: Owner, param: Tensor, group: dict[str, Any]) -> Tensor | None:
    """Return the scales of a signed importance in blocks of 8 bits; None where it has none."""
    state = owner.state.get(param)
    if not isinstance(state, MutableMapping):
        return None
    _, scales = stored(state, "importance")
    if scales is None and group.get("importance") == "exp_avg_sq" and "importance" not in state:
        _, scales = stored(state, "exp_avg_sq")
    return scales
