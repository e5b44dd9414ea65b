"""Steps of whole tensors with a lock for each entry: under scalers, clipping, CUDA graphs and autograd."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from epi_kernels import ops
from epi_kernels.distributed import local_gradient
from epi_kernels.engine import differentiable
from epi_kernels.engine.clocks import HostClocks
from epi_kernels.engine.complex import PairLocks, as_real
from epi_kernels.engine.groups import name_of
from epi_kernels.engine.method import Method, Owner
from epi_kernels.engine.nonfinite import NonfiniteCounts
from epi_kernels.engine.plan import Bundle, Plan, Planner, Present, check_dense, is_there
from epi_kernels.engine.scaling import UNSCALED, Scaling, scaling_of
from epi_kernels.engine.state import (
    LOCK_STATE,
    check_memory,
    check_options,
    check_shapes,
    ensure,
    ensure_slots,
    storages_of,
)
from epi_kernels.engine.storages import REST, check_rest, keys_of, rounds
from epi_kernels.ops.table import Uploads
from epi_kernels.rules import Rule
from epi_kernels.storage.noise import Place


@dataclass(slots=True)
class _Bundle(Bundle):
    sweep: Any = field(init=False)  # of a backend; see `epi_kernels.ops.prepared_sweep`
    counter: Tensor  # of squared gradients that are not finite
    lock_in: str
    lockable: list[bool]
    options: dict[str, list[bool]]  # optional slot -> which parameters step with it
    pairs: bool  # whether the parameters are complex, and their locks repeated for both parts
    codes: frozenset[str]  # the slots, and the importance, that are in blocks of 8 bits
    rests: bool  # whether the weights have more bits than the parameters
    places: list[Place]  # see `Planner.places`
    rounds: bool  # whether the weights are rounded stochastically
    whole: bool = field(init=False)  # no parameter lacks a lock or a slot that others of the bundle have

    def tensors(self, rule: Rule, now: Present) -> ops.Tensors:
        """Return the lists that the sweep takes."""
        slots: dict[str, list[Tensor | None]] = {}
        scales: dict[str, list[Tensor | None]] = {}
        for slot in rule.slots:
            wanted = self.options.get(slot.name)
            if wanted is not None:
                slots[slot.name] = _where(wanted, self.column(now, slot.name)) if any(wanted) else []
            elif slot.name in self.codes:
                _, codes, of_codes = keys_of(slot.name)
                slots[slot.name], scales[slot.name] = self.column(now, codes), self.column(now, of_codes)
            else:
                slots[slot.name] = self.column(now, slot.name)
        locks: list[Tensor | None] = []
        lock_scales: list[Tensor | None] = []
        if self.lock_in in LOCK_STATE:
            name = LOCK_STATE[self.lock_in]
            if name in self.codes:
                _, codes, of_codes = keys_of(name)
                locks, lock_scales = self.column(now, codes), self.column(now, of_codes)
            else:
                locks = self.column(now, name)
            if not all(self.lockable):
                locks = _where(self.lockable, locks)
                lock_scales = _where(self.lockable, lock_scales) if lock_scales else []
        rests = self.column(now, REST) if self.rests else []
        params, grads = self.params(now), self.grads(now)
        return ops.Tensors(params, grads, slots, locks, scales, lock_scales, rests, self.places, self.rounds)


class Sweeping(Planner):
    """Steps of all parameters by `epi_kernels.ops.Sweep`.

    Args:
        rule: the update rule.
        method: says which entries move; it may count the gradients that are not finite.
    """

    operation = "sweep_"

    def __init__(self, rule: Rule, method: Method) -> None:
        super().__init__(rule, method)
        self.nonfinite: NonfiniteCounts = getattr(method, "nonfinite", None) or NonfiniteCounts()
        self.uploads = Uploads()

    # The step --------------------------------------------------------------------------------------------------------

    def run(self, owner: Owner) -> None:
        """Take a step with the gradients of the parameters."""
        groups = owner.param_groups
        if owner.defaults.get("differentiable"):
            self._run_differentiable(owner)
            return
        capturing = _capturing(groups)
        members = [(i, group["params"]) for i, group in enumerate(groups)]
        plan, now = self.planned(owner, members, capturing)
        if not plan.bundles:
            self.method.idle_step(owner)
            return
        clocks = plan.clocks
        if isinstance(clocks, HostClocks):
            self._take(owner, plan, now, capturing)
        else:
            with self._keeping(plan, now, capturing):
                self._take(owner, plan, now, capturing)

    def _take(self, owner: Owner, plan: Plan, now: Present, capturing: bool) -> None:
        scaling = self._scaling(owner, plan, now)
        if plan.clocks.count(scaling.found_inf):
            advanced = self.method.before_update(owner, now.params, scaling, plan.clocks.home)
            if self._update(owner, plan, now, advanced, scaling) and not capturing:
                self.nonfinite.warn(owner.param_groups)

    def run_alone(self, owner: Owner, param: Tensor, group: int) -> None:
        """Step one parameter of the group at position `group`, with its gradient."""
        plan, now = self.planned_alone(owner, param, group)
        if plan.bundles and plan.clocks.count({}):
            self._update(owner, plan, now, False, UNSCALED)

    def _scaling(self, owner: Owner, plan: Plan, now: Present) -> Scaling:
        """Return what a scaler and clipping do to the gradients of this step."""
        clip_grad_norm = owner.param_groups[0]["clip_grad_norm"]
        grad_scale, found_inf = getattr(owner, "grad_scale", None), getattr(owner, "found_inf", None)
        if clip_grad_norm is None and grad_scale is None and found_inf is None:
            return UNSCALED
        grads = [grad for bundle in plan.bundles for grad in bundle.grads(now)]
        return scaling_of(grads, clip_grad_norm, grad_scale, found_inf)

    def _update(self, owner: Owner, plan: Plan, now: Present, advanced: bool | Tensor, scaling: Scaling) -> bool:
        """Update the parameters, whose clocks are counted, and their importance unless a refresh has `advanced` it.

        Returns:
            Whether gradients that are not finite may have been counted.
        """
        counted = bool(advanced is not False)  # by a refresh
        for number, bundle in enumerate(plan.bundles):
            scalars, rows = plan.clocks.scalars(number, bundle.groups, owner.param_groups, self.rule)
            tensors = bundle.tensors(self.rule, now)
            device = tensors.params[0].device
            # a refresh advances the importance only of parameters that require a gradient
            so_far = advanced if now.params[bundle.where[0]].requires_grad else False
            if isinstance(so_far, Tensor):
                so_far = so_far.to(device)
            factor = scaling.factor.get(device)
            if bundle.pairs and tensors.locks:
                tensors.locks = self._pair_locks(owner, bundle, now, tensors.locks, bool(so_far), factor)
            found_inf, moved = scaling.found_inf.get(device), bundle.pairs  # the pairs are made for this step
            bad = bundle.sweep.step_(tensors, bundle.counter, scalars, rows, so_far, factor, found_inf, moved)
            counted |= bad or bundle.pairs
            lists = (tensors.params, *tensors.slots.values(), tensors.locks)
            compact = (*tensors.scales.values(), tensors.lock_scales, tensors.rests)
            for written in (*lists, *compact):
                increment_version(written if bundle.whole else filter(is_there, written))
        return counted

    def _pair_locks(
        self,
        owner: Owner,
        bundle: _Bundle,
        now: Present,
        locks: Sequence[Tensor | None],
        advanced: bool,
        factor: Tensor | None,
    ) -> list[Tensor | None]:
        """Advance the importances of complex parameters, and return their locks repeated for both parts."""
        pairs = PairLocks(locks, advances=bundle.lock_in == "importance")
        if not advanced:
            betas = [owner.param_groups[i].get("importance_beta", 0.0) for i in bundle.groups]
            complex_grads = list(map(local_gradient, bundle.of(now.params)))
            pairs.advance_(complex_grads, bundle.counter, betas, factor, owner._backend)
        pairs.repeat_()
        return pairs.pairs

    def _run_differentiable(self, owner: Owner) -> None:
        """Take a step that autograd can go back through: torch's own arithmetic, then locked entries are put back."""
        members = {param: group for group in owner.param_groups for param in group["params"] if param.grad is not None}
        lock_in = {param: self.method.lock_in(owner, param, group) for param, group in members.items()}
        check_dense([param.grad for param in members])
        for param, group in members.items():
            self.check(owner, param, group)
        for param, group in members.items():
            self.ensure_state(owner, param, group)
        if not members:
            self.method.idle_step(owner)
            return
        grads = [param.grad.detach() for param in members]
        scaling = scaling_of(list(map(as_real, grads)), owner.param_groups[0]["clip_grad_norm"], None, None)
        advanced = self.method.before_update(owner, list(members), scaling)
        for param, group in members.items():
            if not (advanced and param.requires_grad) and lock_in[param] == "importance":
                counter = self.nonfinite.counter([param])
                pairs = PairLocks([owner.state[param]["importance"]], advances=True)
                factor = scaling.factor.get(param.device)
                pairs.advance_([param.grad.detach()], counter, [group["importance_beta"]], factor, owner._backend)
            locked = None if lock_in[param] == "none" else self.method.mask(owner, param)
            with torch.enable_grad():
                differentiable.step_(param, owner.state[param], group, locked, scaling.factor.get(param.device))

    def text(self, owner: Owner) -> str:
        """Return one line on the path that a step takes, and on its unaligned entries after the first step on a GPU."""
        if owner.defaults.get("differentiable"):
            return "Step: plain torch, as differentiable=True asks for"
        path = super().text(owner)
        tables = [bundle.sweep.table for bundle in self.last_bundles(owner) if bundle.sweep.table is not None]
        entries, unaligned = sum(table.entries() for table in tables), sum(table.unaligned() for table in tables)
        if unaligned:
            return f"{path}; {unaligned:,} of {entries:,} entries unaligned: they take the slower path"
        return f"{path}; all {entries:,} entries aligned" if entries else path

    # Planning --------------------------------------------------------------------------------------------------------

    def _kind(self, owner: Owner, param: Tensor) -> tuple[object, ...]:
        # parameters whose importance a refresh advances cannot share a launch with the others
        return (param.requires_grad,)

    def clock_device(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> torch.device | None:
        """Return the device on which the clock of a parameter runs, or None: on the host.

        torch has the clock on the device with ``fused`` too; here the clock is there only with ``capturable``, or with
        a scaler that knows only on the device whether the step is skipped. Where the host cannot exclude that a refresh
        is due, the kernels of a refresh are launched, and do nothing if it is not: `isolation.mask_clock`.
        """
        found_inf = getattr(owner, "found_inf", None)
        skips_there = found_inf is not None and found_inf.device.type != "cpu"
        on_device = group["capturable"] or skips_there
        return param.device if on_device and not self.method.clock_on_host(owner) else None

    def check(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check what a step cannot do with a parameter.

        Raises:
            RuntimeError: entries of the parameter share memory, or it is a lazy view; `fused` is on and torch's kernels
                cannot take the parameter.
            ValueError: a tensor of its state has another shape.
            NotImplementedError: `capturable` is on and it is complex, or an option is refused for sharded parameters.
            AssertionError: `capturable` is on and the device of the parameter has no graphs.
        """
        name = name_of(param, owner.param_groups)
        self.method.before_check(owner, param, group)
        check_memory(param, name)
        keys = (*chain.from_iterable(keys_of(slot.name) for slot in self.rule.slots), *self.method.state_keys, REST)
        check_shapes(owner.state.get(param, {}), keys, param, name)
        check_rest(owner.state.get(param, {}), name, group)
        self.check_options(owner, param, group)

    def check_options(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check the options of a group that not every parameter can have; see `engine.state.check_options`."""
        lock_in = self.method.lock_in(owner, param, group)
        name = name_of(param, owner.param_groups)
        check_options(param, name, group, lock_in, owner._process_group is not None)

    def ensure_state(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Create what a parameter lacks of state: the clock, the slots of the rule, and a tensor for the lock."""
        state = owner.state[param]
        if "step" not in state:
            state["step"] = self.clock(owner, 0.0, param, group)
        ensure_slots(self.rule, state, param, group)
        lock_state = LOCK_STATE.get(self.method.lock_in(owner, param, group))
        if lock_state == "importance":
            ensure(state, lock_state, param, self.method.importance_dtype(group))
        elif lock_state is not None and lock_state not in state:
            state[lock_state] = self.method.new_lock(owner, param)
        self.method.state_made(owner, param, group)

    def _bundle(self, owner: Owner, now: Present, bundle: Bundle) -> _Bundle:
        params = [now.params[i] for i in bundle.where]
        groups = [owner.param_groups[i] for i in bundle.groups]
        kinds = [self.method.lock_in(owner, param, group) for param, group in zip(params, groups, strict=True)]
        # an optimizer locks in one way, or not at all
        lock_in = next((kind for kind in kinds if kind != "none"), "none")
        lockable = [kind != "none" for kind in kinds]
        options = {slot.name: [slot.wanted(group) for group in groups] for slot in self.rule.slots if slot.option}
        counter, pairs = self.nonfinite.counter(params), params[0].is_complex()
        kept = dict(storages_of(self.rule, owner.state[params[0]]))
        made = _Bundle(
            *(bundle.where, bundle.groups, bundle.plain, counter, lock_in, lockable, options, pairs),
            codes=frozenset(name for name, dtype in kept.items() if dtype == torch.uint8),
            rests=REST in kept,
            places=self.places(owner, params, bundle.groups),
            rounds=rounds(params[0], groups[0]),
        )
        made.whole = all(lockable) and all(all(of_slot) or not any(of_slot) for of_slot in options.values())
        tensors = made.tensors(self.rule, now)
        if pairs and tensors.locks:
            tensors.locks, lock_in = PairLocks(tensors.locks, advances=False).pairs, "static"
        made.sweep = ops.prepared_sweep(self.rule, tensors, lock_in, lockable, owner._backend)
        self.nonfinite.warn(owner.param_groups)  # counters no longer in use are added up
        return made

    # Graphs ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _keeping(self, plan: Plan, now: Present, capturing: bool) -> Iterator[None]:
        """Keep what the device reads in this step for as long as a graph may read it, if one is being captured."""
        with self.uploads.step(capturing):
            if capturing:
                self.uploads.keep((plan.bundles, plan.clocks, now))
            yield


def _capturing(groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether a CUDA graph is being captured.

    Raises:
        RuntimeError: it is, and a parameter that requires a gradient has none.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return False
    for group in groups:
        for param in group["params"]:
            if param.requires_grad and param.grad is None:
                raise RuntimeError(
                    f"step() is being captured, and {name_of(param, groups)} has no gradient: replays would never move "
                    "it. Capture a step in which every parameter has one, or let it require none"
                )
    return True


def _where(wanted: list[bool], tensors: list[Any]) -> list[Tensor | None]:
    """Return the tensors that are wanted, None for the others."""
    return [tensor if want else None for want, tensor in zip(wanted, tensors, strict=True)]
