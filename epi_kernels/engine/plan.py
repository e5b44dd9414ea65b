"""What a step needs that does not change from step to step: planned once, and anew where anything has changed.

A step of an optimizer of this package is a look at every tensor (has it moved? has it a gradient?), one addition that
counts all clocks, and one launch for each bundle of tensors.
"""

import copy
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from epi_kernels.backends import registry
from epi_kernels.backends.support import Spec
from epi_kernels.contract import arithmetic_dtype, check_lists
from epi_kernels.distributed import local, local_gradient
from epi_kernels.engine.clocks import DeviceClocks, HostClocks
from epi_kernels.engine.complex import as_real
from epi_kernels.engine.groups import name_of, noise_name, params_of
from epi_kernels.engine.method import Method, Owner
from epi_kernels.engine.releases import releases_of
from epi_kernels.engine.state import new_clock, storages_of
from epi_kernels.engine.storages import REST, check_parameters, keys_of, place_of, rounds
from epi_kernels.notices import warn
from epi_kernels.rules import Rule
from epi_kernels.storage import STATES, VALUES
from epi_kernels.storage.noise import Place

_NOTHING: dict[str, Any] = {}

# the classes of tensors that are memory of one device and nothing else
PLAIN = frozenset({Tensor, Parameter})

# plans that are kept, one for each set of parameters that have gradients together, such as blocks that take turns
KEPT_PLANS = 8

_address, _is_neg = Tensor.data_ptr, Tensor.is_neg
_dtype, _shape, _device = map(attrgetter, ("dtype", "shape", "device"))
_requires_grad, _is_sparse = map(attrgetter, ("requires_grad", "is_sparse"))

_T = TypeVar("_T")


@dataclass(slots=True)
class Present:
    """The tensors of the parameters that take part in a step, as groups and state hold them now; gone with the step.

    Nothing that outlives a step refers to these tensors, so that a program that moves states and weights to another
    device between two steps gets their memory back.
    """

    params: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)  # of each parameter, the position of its group
    grads: list[Tensor] = field(default_factory=list)  # as the parameters have them
    shards: list[Tensor] = field(default_factory=list)  # this rank's shard of each parameter
    plain: bool = True  # every parameter is a Tensor or Parameter of torch, and none a DTensor
    columns: dict[str, list[Any]] = field(default_factory=dict)  # key of a state -> each parameter's value, or shard
    complete: bool = True  # no value in the columns is None, which stands for a state that a parameter lacks


@dataclass(slots=True)
class Bundle:
    """The tensors of one launch, by their positions among those of a step."""

    where: list[int]
    groups: list[int]  # for each tensor, the position of its group in param_groups
    plain: bool  # every parameter is real and no DTensor, and no gradient is negated lazily

    def of(self, values: list[_T]) -> list[_T]:
        """Return the members of this bundle from `values`, which has one value for each parameter of the step."""
        # `where` is in order and has each position once
        return values if len(values) == len(self.where) else [values[i] for i in self.where]

    def params(self, now: Present) -> list[Tensor]:
        """Return the shards of the parameters, as an operation takes them."""
        return self.of(now.shards) if self.plain else list(map(as_real, self.of(now.shards)))

    def grads(self, now: Present) -> list[Tensor]:
        """Return the gradients as an operation takes them."""
        return self.of(now.grads) if self.plain else list(map(real_gradient, self.of(now.params)))

    def column(self, now: Present, key: str) -> list[Any]:
        """Return the states `key` as an operation takes them; None where a parameter has none."""
        values = self.of(now.columns[key])
        return values if self.plain else [None if value is None else as_real(value) for value in values]


@dataclass
class Plan:
    """What was planned for some parameters, and what it was made from; it holds no tensor of theirs."""

    identities: list[object] | None = None  # of parameters and states; see `Planner._identities`
    memory: list[object] | None = None  # see `_memory_of`
    keys: tuple[str, ...] = ()  # of the states that a step reads or writes
    stored: list[list[int]] | None = None  # the identities of all entries of the state, and of their parameters
    places: list[int] | None = None  # the positions of this plan's entries among all; None: all, in order
    alive: list["weakref.ref[Tensor]"] = field(default_factory=list)  # the state tensors that were seen
    gone: list[object] = field(default_factory=list)  # not empty once one was freed: its address may be reused
    bundles: list[Any] = field(default_factory=list)  # what a subclass's `_bundle` has returned
    clocks: HostClocks | DeviceClocks = field(default_factory=lambda: HostClocks([]))


class Planner:
    """Plans the steps of an optimizer; a subclass says how a bundle is made and launched.

    Args:
        rule: the update rule.
        method: says which entries move.
    """

    # of `epi_kernels.ops`, which a step runs
    operation: str

    def __init__(self, rule: Rule, method: Method) -> None:
        self.rule, self.method = rule, method
        self._told_of_moments = False
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: no plan, and nothing of a graph."""
        return {"rule": self.rule, "method": self.method}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__init__(**state)  # type: ignore[misc]

    def copied(self) -> "Planner":
        """Return the planner of a copy of the optimizer: the same rule, a copy of the method, and no plan."""
        return type(self)(self.rule, copy.copy(self.method))

    def forget(self) -> None:
        """Let the next step plan anew."""
        self._plans: OrderedDict[object, Plan] = OrderedDict()
        self._alone: dict[int, Plan] = {}  # id of a parameter -> its plan

    # What a subclass says --------------------------------------------------------------------------------------------

    def run(self, owner: Owner) -> None:
        """Take a step with the gradients of the parameters."""
        raise NotImplementedError

    def run_alone(self, owner: Owner, param: Tensor, group: int) -> None:
        """Step one parameter of the group at position `group`, with its gradient."""
        raise NotImplementedError

    def _bundle(self, owner: Owner, now: Present, bundle: Bundle) -> Bundle:
        """Return what a launch needs for parameters of one device and pair of dtypes."""
        raise NotImplementedError

    def _kind(self, owner: Owner, param: Tensor) -> tuple[object, ...]:
        """Return what parameters of one bundle have in common, besides device and dtypes."""
        raise NotImplementedError

    def ensure_state(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Create the state that a parameter lacks."""
        raise NotImplementedError

    def check_options(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check the options of a group that not every parameter can have."""
        raise NotImplementedError

    def clock_device(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> torch.device | None:
        """Return the device on which the clock of a parameter runs, or None: on the host."""
        raise NotImplementedError

    def check(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check what a step cannot do with a parameter; called before anything is changed."""
        raise NotImplementedError

    def clock(self, owner: Owner, value: float | Tensor, param: Tensor, group: dict[str, Any]) -> Tensor:
        """Return a ``state["step"]`` of `value`, where and in which dtype torch has it."""
        return new_clock(value, self.clock_device(owner, param, group), bool(group["fused"]))

    def places(self, owner: Owner, params: Sequence[Tensor], groups: Sequence[int]) -> list[Place]:
        """Return where the entries of parameters of one bundle lie in the whole tensors; empty if no noise is needed.

        Args:
            owner: the optimizer.
            params: of one bundle.
            groups: the position of each parameter's group.

        Raises:
            NotImplementedError: see `epi_kernels.engine.storages.place_of`.
        """
        kept = {dtype for name, dtype in storages_of(self.rule, owner.state[params[0]]) if name != REST}
        if not kept & {torch.bfloat16, torch.uint8} and not rounds(params[0], owner.param_groups[groups[0]]):
            return []
        return [self.place(owner, param, i) for param, i in zip(params, groups, strict=True)]

    def place(self, owner: Owner, param: Tensor, group: int) -> Place:
        """Return where the entries of a parameter of the group at position `group` lie in the whole tensor."""
        name = noise_name(param, owner.param_groups)
        return place_of(param, name, owner.param_groups[group], *self.method.rank_of(owner, param))

    def text(self, owner: Owner) -> str:
        """Return one line on the path that a step takes for each device and dtype of the parameters."""
        paths: dict[tuple[str, str], None] = {}
        for param in params_of(owner.param_groups):
            dtype = param.dtype.to_real() if param.is_complex() else param.dtype
            kept = {dtype for name, dtype in storages_of(self.rule, owner.state.get(param, _NOTHING)) if name != REST}
            spec = Spec(self.operation, frozenset({dtype}), frozenset(kept or {arithmetic_dtype(dtype)}))
            path = registry.path_of(spec, param.device, owner._backend)
            paths[f"{str(dtype).removeprefix('torch.')} on {param.device}", path] = None
        return f"Step: {'; '.join(f'{kind}: {path}' for kind, path in paths)}"

    # A step ----------------------------------------------------------------------------------------------------------

    def planned(
        self, owner: Owner, members: Sequence[tuple[int, Sequence[Tensor]]], capturing: bool = False
    ) -> tuple[Plan, Present]:
        """Return the plan of a step and its tensors; planned anew if anything has changed since the last such step.

        Args:
            owner: the optimizer.
            members: (position of a group, its parameters that may take part).
            capturing: a graph is being captured.

        Raises:
            RuntimeError: a gradient is sparse; or a graph is being captured, and there is no plan for the step.
        """
        now = self._look(owner, members)
        key = tuple(map(id, now.params))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = Plan()
            if len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan, self._up_to_date(owner, plan, now, capturing)

    def planned_alone(self, owner: Owner, param: Tensor, group: int) -> tuple[Plan, Present]:
        """Return the plan and the tensors of a step of one parameter; see `planned`."""
        plan = self._alone.get(id(param))
        if plan is None:
            if len(self._alone) > 2 * len(params_of(owner.param_groups)):  # many have left
                self._alone.clear()
            plan = self._alone[id(param)] = Plan()
        now = self._look(owner, [(group, [param])])
        return plan, self._up_to_date(owner, plan, now, capturing=False)

    def last_bundles(self, owner: Owner) -> list[Any]:
        """Return the bundles of the last step, or of the last step of each parameter if gradients are released."""
        released = getattr(owner, "_released", None) is not None
        plans = [*self._alone.values()] if released else [*self._plans.values()][-1:]
        return [bundle for plan in plans for bundle in plan.bundles]

    def _up_to_date(self, owner: Owner, plan: Plan, now: Present, capturing: bool) -> Present:
        # all work for each tensor is here and in `_look`, in loops that run in C where possible
        alike = not plan.gone and plan.identities == self._identities(owner, plan, now)
        if alike and plan.memory == _memory_of(now):
            return now
        if capturing:
            raise RuntimeError(
                "step() is being captured, and it is not the step of before: its tensors are not prepared, or "
                "other parameters have a gradient now, or a state was loaded. Take a step outside of the capture "
                "first, with the same parameters having gradients"
            )
        return self._plan(owner, plan, now)

    def _look(self, owner: Owner, members: Sequence[tuple[int, Sequence[Tensor]]]) -> Present:
        """Return the tensors that take part in a step, except the states.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        now, method = Present(), self.method
        params, grads = now.params, now.grads
        picks = type(method).moves is not Method.moves
        for i, members_of_group in members:
            before = len(params)
            for param in members_of_group:
                grad = param.grad
                if grad is not None and not (picks and not method.moves(owner, param)):
                    params.append(param)
                    grads.append(grad)
            now.groups += [i] * (len(params) - before)
        check_dense(grads)
        now.shards, now.plain = params, PLAIN.issuperset(map(type, params))
        if not now.plain:
            now.shards = list(map(local, params))
        return now

    def _identities(self, owner: Owner, plan: Plan, now: Present) -> list[object]:
        """Return a list that changes if groups, parameters or states do; look up the states in passing."""
        entries = self._entries(owner, plan, now)
        for key in plan.keys:
            try:
                now.columns[key] = list(map(itemgetter(key), entries))
            except KeyError:
                now.complete, now.columns[key] = False, [entry.get(key) for entry in entries]
        values = list(map(id, chain.from_iterable(now.columns.values())))
        scaler = getattr(owner, "found_inf", None)  # with a scaler, a device may have to count
        where = None if scaler is None else scaler.device
        return [where, now.groups, now.plain, list(map(_requires_grad, now.params)), values]

    def _entries(self, owner: Owner, plan: Plan, now: Present) -> list[dict[str, Any]]:
        """Return the state of each parameter of a step."""
        state = owner.state
        if len(now.params) > 1:  # for one parameter, as in a released step, a look at all states would take longer
            stored, of_params = list(state.values()), list(map(id, state))
            if plan.stored == [list(map(id, stored)), of_params]:
                return stored if plan.places is None else [stored[i] for i in plan.places]
        # slow: a tensor's hash is computed in Python, so that these lookups take longer than all the rest
        return [state.get(param, _NOTHING) for param in now.params]

    # Planning --------------------------------------------------------------------------------------------------------

    def _plan(self, owner: Owner, plan: Plan, now: Present) -> Present:
        """Check the parameters that have a gradient, create the state that they lack, and bundle them into launches."""
        self._check_gradients_come(owner)
        plan.identities, plan.bundles = None, []
        of_group: dict[Tensor, int] = {}
        for param, i in zip(now.params, now.groups, strict=True):
            of_group.setdefault(param, i)
        check_lists(params=list(map(as_real, of_group)), grads=list(map(real_gradient, of_group)))
        check_parameters(owner.param_groups, lambda param: name_of(param, owner.param_groups))
        for param, i in of_group.items():
            self.check(owner, param, owner.param_groups[i])
        self._say_what_is_slow(owner, of_group)
        bundles: defaultdict[tuple[object, ...], dict[Tensor, int]] = defaultdict(dict)
        for position, param in enumerate(now.params):
            self.ensure_state(owner, param, owner.param_groups[now.groups[position]])
            storages = storages_of(self.rule, owner.state[param])
            grad_dtype = now.grads[position].dtype
            group = owner.param_groups[now.groups[position]]
            kind = (
                *(param.device, param.dtype, grad_dtype, storages, rounds(param, group)),
                *self._kind(owner, param),
            )
            bundles[kind].setdefault(param, position)
        self._gather_clocks(owner, plan, list(map(list, bundles.values())), of_group)
        slots = (*chain.from_iterable(keys_of(slot.name) for slot in self.rule.slots), *self.method.state_keys, REST)
        states = [owner.state[param] for param in of_group]
        plan.keys = ("step", *(key for key in slots if any(key in state for state in states)))
        if len(now.params) > 1:
            of_params = list(map(id, owner.state))
            place = {param: i for i, param in enumerate(of_params)}
            places = [place[id(param)] for param in now.params]
            plan.stored = [list(map(id, owner.state.values())), of_params]
            plan.places = None if places == list(range(len(of_params))) else places
        identities = self._identities(owner, plan, now)
        plan.memory = _memory_of(now)
        for members in bundles.values():
            plain = now.plain and not any(p.is_complex() or p.grad.is_neg() for p in members)  # type: ignore[union-attr]
            groups = [of_group[param] for param in members]
            plan.bundles.append(self._bundle(owner, now, Bundle(list(members.values()), groups, plain)))
        # Weak references tell when a state is freed. Parameters have none: torch.utils.swap_tensors, by which a module
        # of DTensors moves, refuses tensors that have one; `_memory_of` compares all that a table takes from them.
        gone: list[object] = []
        plan.identities, plan.gone = identities, gone
        plan.alive = [
            weakref.ref(state[key], gone.append)
            for state in states
            for key in plan.keys
            if key != "step" and isinstance(state.get(key), Tensor)
        ]
        return now

    def _check_gradients_come(self, owner: Owner) -> None:
        """Check that no other optimizer takes the gradients in backward() and leaves nothing to this one.

        Raises:
            RuntimeError: one does; the message names a parameter.
        """
        own = getattr(owner, "_released", None)
        for param in params_of(owner.param_groups):
            if param.grad is None and any(release is not own for release in releases_of(param)):
                raise RuntimeError(
                    f"{name_of(param, owner.param_groups)} is released to another optimizer, which steps it in "
                    "backward() and frees its gradient: there is nothing for this one. remove() that release"
                )

    def _say_what_is_slow(self, owner: Owner, params: Iterable[Tensor]) -> None:
        """Warn where "auto" takes the reference backend for parameters that have a faster one on a usual machine."""
        for param in params if owner._backend == "auto" else ():
            if param.dtype not in VALUES:
                continue
            registry.say_if_slow(param.device)
            storages = storages_of(self.rule, owner.state.get(param, _NOTHING))
            other = [dtype for name, dtype in storages if name != REST and dtype not in STATES]
            fast = registry.choose(Spec(self.operation), param.device, "auto").backend
            if other and fast != "reference" and not self._told_of_moments:
                self._told_of_moments = True
                warn(
                    f"the moments of {name_of(param, owner.param_groups)} are {other[0]}, which backend {fast!r} does "
                    "not take: its step, and that of all parameters like it, runs on plain torch, several times "
                    "slower. Let the optimizer make the moments, or cast those in its state to float32 or bfloat16. "
                    "Said once for each optimizer"
                )

    def _gather_clocks(self, owner: Owner, plan: Plan, bundles: list[list[Tensor]], members: dict[Tensor, int]) -> None:
        """Make every ``state["step"]`` an element of the vectors of the plan's clocks."""
        for param, i in members.items():
            state = owner.state[param]
            if not isinstance(state["step"], Tensor):  # a number that a program has written
                state["step"] = self.clock(owner, state["step"], param, owner.param_groups[i])
        steps = [[owner.state[param]["step"] for param in bundle] for bundle in bundles]
        groups = owner.param_groups
        if any(self.clock_device(owner, param, groups[i]) is not None for param, i in members.items()):
            plan.clocks = DeviceClocks(steps, [bundle[0].device for bundle in bundles])
        else:
            plan.clocks = HostClocks(steps)
        params = [param for bundle in bundles for param in bundle]
        for param, step in zip(params, plan.clocks.hand_out(), strict=True):
            owner.state[param]["step"] = step


def _memory_of(now: Present) -> list[object]:
    """Return the addresses, dtypes and layouts of the tensors of a step; unwrap DTensors in passing.

    The shape of a state is not compared: it cannot change while the state is the same tensor at the same address.
    """
    shards, grads, columns = now.shards, now.grads, now.columns
    if not now.plain:
        grads = list(map(local, grads))
        columns = now.columns = {
            key: [None if value is None else local(value) for value in values] for key, values in columns.items()
        }
    states = list(chain.from_iterable(columns.values()))
    if not now.complete:
        states = list(filter(is_there, states))
    dtypes = list(map(_dtype, shards))
    seen: list[object] = [
        list(map(_address, shards)),
        dtypes,
        list(map(_shape, shards)),
        _layouts(shards),
        list(map(_is_neg, shards)),
        list(map(_dtype, grads)),
        list(map(_is_neg, grads)),
        _layouts(grads),
        list(map(_address, states)),
        list(map(_dtype, states)),
    ]
    if any(dtype.is_complex for dtype in set(dtypes)):
        seen.append([(tensor.is_conj(), grad.is_conj()) for tensor, grad in zip(shards, grads, strict=True)])
    return seen


def form_of(tensors: list[Tensor]) -> list[object]:
    """Return what a table of some tensors was made from, but for their addresses."""
    return [list(map(_dtype, tensors)), list(map(_shape, tensors)), _layouts(tensors), list(map(_device, tensors))]


def _layouts(tensors: list[Tensor]) -> list[object]:
    """Return for each tensor True, or its strides if it is not contiguous."""
    contiguous: list[Any] = list(map(Tensor.is_contiguous, tensors))
    return contiguous if all(contiguous) else [tensor.is_contiguous() or tensor.stride() for tensor in tensors]


def is_there(value: object) -> bool:
    """Return whether a value is not None."""
    return value is not None


def check_dense(grads: Iterable[Tensor | None]) -> None:
    """Check that no gradient is sparse.

    Raises:
        RuntimeError: one is; the text is torch's.
    """
    if True in map(_is_sparse, grads):
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")


def real_gradient(param: Tensor) -> Tensor:
    """Return the shard of a parameter's gradient, as real numbers."""
    return as_real(local_gradient(param))
