"""What a step needs that does not change from step to step: prepared once, and anew where anything has changed.

A step of an optimizer of this package is a look at every tensor (has it moved? has it a gradient?), one addition that
counts all clocks, and one launch for each bundle of tensors.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from epi_kernels.backends import native
from epi_kernels.backends import registry as dispatch
from epi_kernels.backends.support import Spec
from epi_kernels.contract import check_lists, shares_memory
from epi_kernels.distributed import Ranks, group_of, is_dtensor, local, local_gradient
from epi_kernels.notices import warn
from epi_kernels.optim.checkpoint import STATE_DTYPES
from epi_kernels.optim.clocks import DeviceClocks, HostClocks
from epi_kernels.optim.complex import as_real
from epi_kernels.optim.drop_in import DropInAdamW, releases_of
from epi_kernels.optim.groups import settings_of

_NOTHING: dict[str, Any] = {}
_PLAIN = {Tensor, Parameter}

_address, _is_neg = Tensor.data_ptr, Tensor.is_neg
_dtype, _shape, _requires_grad = map(attrgetter, ("dtype", "shape", "requires_grad"))

_T = TypeVar("_T")

# (group, its parameters that may take part)
Members = Iterable[tuple[dict[str, Any], Sequence[Tensor]]]


@dataclass(slots=True)
class Present:
    """The tensors of the parameters that take part in a step, as groups and state hold them now; gone with the step.

    Nothing that outlives a step holds a tensor of theirs: a program moves states and weights to another device between
    two steps to have their memory.
    """

    params: list[Tensor] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)  # of each parameter
    grads: list[Tensor] = field(default_factory=list)  # as the parameters have them
    held: list[Tensor] = field(default_factory=list)  # what this rank holds of each parameter
    state: dict[str, list[Any]] = field(default_factory=dict)  # key -> what this rank holds of it, None: nothing


@dataclass(slots=True)
class Bundle:
    """The tensors of one launch, by their positions among those of a step."""

    where: list[int]
    groups: list[int]  # of each, its position in param_groups
    plain: bool  # real tensors whose gradients are in memory, and no DTensor among them

    def of(self, values: list[_T]) -> list[_T]:
        """Return those of this bundle among `values`, of which all parameters of the step have one."""
        # in order, and each position once
        return values if len(values) == len(self.where) else [values[i] for i in self.where]

    def params(self, now: Present) -> list[Tensor]:
        """Return what this rank holds of the parameters, as an operation takes it."""
        return self.of(now.held) if self.plain else list(map(as_real, self.of(now.held)))

    def grads(self, now: Present) -> list[Tensor]:
        """Return the gradients as an operation takes them."""
        return self.of(now.grads) if self.plain else list(map(real_gradient, self.of(now.params)))

    def state(self, now: Present, key: str) -> list[Any]:
        """Return the states `key` as an operation takes them; None where a parameter has none."""
        values = self.of(now.state[key])
        return values if self.plain else [None if value is None else as_real(value) for value in values]


@dataclass
class Prepared:
    """What was prepared for some parameters, and what it was made from; it holds no tensor of theirs."""

    seen: list[object] | None = None
    alive: list["weakref.ref[Tensor]"] = field(default_factory=list)  # the states that were seen
    gone: list[object] = field(default_factory=list)  # not empty once one of them is: another may have its address
    bundles: list[Any] = field(default_factory=list)  # of what a subclass's `_bundle` returns
    clocks: HostClocks | DeviceClocks = field(default_factory=lambda: HostClocks([]))

    def holds(self, seen: list[object]) -> bool:
        """Return whether what was prepared is for what is `seen` now."""
        return not self.gone and seen == self.seen

    def remember(self, seen: list[object], states: Iterable[Tensor]) -> None:
        """Note for what everything was prepared, and hear of the death of any of these states.

        Not of a parameter's: torch.utils.swap_tensors, by which a module of DTensors moves, refuses what has a weak
        reference. Of parameters all is looked at that a table of them depends on.
        """
        gone: list[object] = []
        self.seen, self.gone = seen, gone
        self.alive = [weakref.ref(state, gone.append) for state in states]


class PreparedAdamW(DropInAdamW):
    """torch.optim.AdamW on operations that take all tensors of a device and pair of dtypes at once.

    Not used itself.
    """

    _met = False  # the other ranks, since parameters, masks or a state came

    # What a subclass says -------------------------------------------------------------------------------------------

    def _bundle(self, now: Present, where: list[int], groups: list[int], plain: bool) -> Bundle:
        """Return the bundle of parameters of one device and pair of dtypes; arguments as of `Bundle`."""
        raise NotImplementedError

    def _update(self, prepared: Prepared, now: Present) -> None:
        """Update the parameters, their clocks counted."""
        raise NotImplementedError

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Create what `param` lacks of state."""
        raise NotImplementedError

    def _moves(self, param: Tensor) -> bool:
        """Return whether a step may do anything to a parameter that has a gradient."""
        return True

    def _settings_seen(self, group: dict[str, Any]) -> tuple[object, ...]:
        """Return the settings of a group on which what is prepared depends."""
        return ()

    def _kind(self, param: Tensor) -> tuple[object, ...]:
        """Return what parameters of one bundle have in common, besides device and dtypes."""
        return ()

    def _check_layout(self, param: Tensor, group: dict[str, Any]) -> None:
        """Check what a step cannot do with a parameter; called before anything is changed.

        Raises:
            RuntimeError: the parameter is a lazily conjugated or negated view, or several of its entries share memory.
        """
        if param.is_conj() or param.is_neg():
            raise RuntimeError(
                f"{self._name(param)} is {'conjugated' if param.is_conj() else 'negated'} lazily: its values are not "
                "in memory, where a step writes. Optimize the tensor that it is a view of, or "
                "resolve_conj().resolve_neg(), a copy"
            )
        if shares_memory(local(param)):
            raise RuntimeError(
                f"{self._name(param)} is expanded, or strided over itself: several of its entries are one place in "
                "memory, and a step would write there several times; clone() it first"
            )

    # ----------------------------------------------------------------------------------------------------------------

    def _compare_ranks(self, masks: Mapping[Tensor, int]) -> None:
        """Compare the settings, and `digest_of` each DTensor's mask, with those of the ranks that hold the rest, once.

        Raises:
            ValueError: on every rank: they differ; the message names the first that does.
        """
        if self._met:
            return
        group = group_of([param for group in self.param_groups for param in group["params"]], self._process_group)
        if group is not None:
            digests = [
                {f"the mask of {self._name(param)}": masks.get(param) for param in filter(is_dtensor, one["params"])}
                for one in self.param_groups
            ]
            settings = map(settings_of, self.param_groups)
            Ranks(group).agree([], [{**one, **of_masks} for one, of_masks in zip(settings, digests, strict=True)])
        self._met = True

    def _step_alone(self, param: Tensor, group: int) -> None:
        if len(self._alone) > 2 * sum(len(one["params"]) for one in self.param_groups):  # of parameters that have left
            self._alone.clear()
        prepared = self._alone.setdefault(id(param), Prepared())
        now = self._bring_up_to_date(prepared, [(self.param_groups[group], [param])])
        if prepared.bundles and prepared.clocks.count({}):
            self._update(prepared, now)

    _told_of_moments = False

    def _forget(self) -> None:
        self._met = False
        self._prepared = Prepared()
        self._alone: dict[int, Prepared] = {}  # by the identity of a parameter

    def _bring_up_to_date(self, prepared: Prepared, members: Members, capturing: bool = False) -> Present:
        """Prepare anew if anything has changed since the last step, and return the tensors of this one.

        Raises:
            RuntimeError: a gradient is sparse, or a graph is being captured.
        """
        members = list(members)
        seen, now = self._look(members)
        if prepared.holds(seen):
            return now
        if capturing:
            raise RuntimeError(
                "step() is being captured, and it is not the step of before: its tensors are not prepared, or "
                "other parameters have a gradient now, or a state was loaded. Take a step outside of the capture "
                "first, with the same parameters having gradients"
            )
        return self._prepare(prepared, members, now)

    def _look(self, members: Members) -> tuple[list[object], Present]:
        """Return what decides whether the bundles of the last step still hold, and the tensors of this step.

        That is settings, and of each tensor its identity, address, dtype and layout; the shape of a state is that of
        the first look, for as long as it is the same tensor at the same address. This is all that a step does for each
        tensor, in loops of C where there are any: 291 small tensors are looked at in 0.3 ms.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        now = Present()
        settings: list[object] = []
        for group, params in members:
            settings.append(self._settings_seen(group))
            before = len(now.params)
            for param in params:
                grad = param.grad
                if grad is not None and self._moves(param):
                    now.params.append(param)
                    now.grads.append(grad)
            count = len(now.params) - before
            settings.append(count)
            now.groups.extend([group] * count)
        grads = now.grads
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        now.held, plain = now.params, _PLAIN.issuperset(map(type, now.params))
        if not plain:
            now.held, grads = list(map(local, now.params)), list(map(local, grads))
        seen = [
            settings,
            plain,
            list(map(id, now.params)),
            list(map(_requires_grad, now.params)),
            *_memory(now.held),
            list(map(_shape, now.held)),
            [held.is_contiguous() or held.stride() for held in now.held],
            list(map(_is_neg, now.held)),
            list(map(_dtype, grads)),
            list(map(_is_neg, grads)),
            [grad.is_contiguous() or grad.stride() for grad in grads],
        ]
        if any(dtype.is_complex for dtype in set(map(_dtype, now.held))):
            seen.append([(held.is_conj(), grad.is_conj()) for held, grad in zip(now.held, grads, strict=True)])
        states = [self.state.get(param, _NOTHING) for param in now.params]
        for key in ("step", *self._STATE):
            values = [state.get(key) for state in states]
            seen += [key, list(map(id, values))]
            if not plain:
                values = [None if value is None else local(value) for value in values]
            present = [value for value in values if value is not None]
            if present:
                seen += _memory(present)
                now.state[key] = values
        return seen, now

    def _prepare(self, prepared: Prepared, members: Members, now: Present) -> Present:
        """Check the parameters that have a gradient, create what state they lack, and bundle them into launches."""
        self._check_gradients_come()
        prepared.seen, prepared.bundles = None, []
        numbers = {id(group): i for i, group in enumerate(self.param_groups)}
        of_group: dict[Tensor, int] = {}
        for param, group in zip(now.params, now.groups, strict=True):
            of_group.setdefault(param, numbers[id(group)])
        check_lists(params=list(map(as_real, of_group)), grads=list(map(real_gradient, of_group)))
        for param, i in of_group.items():
            self._check_layout(param, self.param_groups[i])
        self._say_what_is_slow(of_group)
        bundles: defaultdict[tuple[object, ...], dict[Tensor, int]] = defaultdict(dict)
        for i, param in enumerate(now.params):
            self._ensure_state(param, now.groups[i])
            moments = moment_dtypes(self.state[param])
            key = (param.device, param.dtype, param.grad.dtype, moments, *self._kind(param))  # type: ignore[union-attr]
            bundles[key].setdefault(param, i)
        self._gather_clocks(prepared, list(map(list, bundles.values())), of_group)
        seen, now = self._look(members)
        for bundle in bundles.values():
            plain = all(local(p) is p and not p.is_complex() and not p.grad.is_neg() for p in bundle)  # type: ignore[union-attr]
            groups = [of_group[param] for param in bundle]
            prepared.bundles.append(self._bundle(now, list(bundle.values()), groups, plain))
        states = [self.state[param] for param in of_group]
        prepared.remember(seen, [state[key] for state in states for key in self._STATE if key in state])
        return now

    def _check_gradients_come(self) -> None:
        """Check that no other optimizer takes the gradients in backward() and leaves nothing to this one.

        Raises:
            RuntimeError: one does; the message names a parameter.
        """
        for param in self._step_tensors():
            if param.grad is None and any(release is not self._released for release in releases_of(param)):
                raise RuntimeError(
                    f"{self._name(param)} is released to another optimizer, which steps it in backward() and frees its "
                    "gradient: there is nothing for this one. remove() that release"
                )

    def _say_what_is_slow(self, params: Iterable[Tensor]) -> None:
        """Warn where "auto" takes the reference backend for parameters that have a faster one on a usual machine."""
        for param in params if self._backend == "auto" else ():
            if param.dtype not in native.DTYPES:
                continue
            dispatch.say_if_slow(param.device)
            other = [dtype for dtype in moment_dtypes(self.state.get(param, _NOTHING)) if dtype != torch.float32]
            fast = dispatch.choose(Spec("masked_adamw_"), param.device, "auto").backend
            if other and fast != "reference" and not self._told_of_moments:
                self._told_of_moments = True
                warn(
                    f"the moments of {self._name(param)} are {other[0]}, and backend {fast!r} takes float32 alone: its "
                    "step, and that of all parameters like it, runs on plain torch, several times slower. Let the "
                    "optimizer make the moments, or cast those in its state to float32. Said once for each optimizer"
                )

    def _gather_clocks(self, prepared: Prepared, bundles: list[list[Tensor]], members: dict[Tensor, int]) -> None:
        """Make every ``state["step"]`` an element of the vectors of `prepared.clocks`."""
        steps = [[self.state[param]["step"] for param in bundle] for bundle in bundles]
        if any(self._clock_device(param, self.param_groups[i]) is not None for param, i in members.items()):
            prepared.clocks = DeviceClocks(steps, [bundle[0].device for bundle in bundles])
        else:
            prepared.clocks = HostClocks(steps)
        params = [param for bundle in bundles for param in bundle]
        for param, step in zip(params, prepared.clocks.elements(), strict=True):
            self.state[param]["step"] = step


def _memory(tensors: list[Tensor]) -> tuple[list[int], list[torch.dtype]]:
    """Return of tensors where they are, and as what."""
    return list(map(_address, tensors)), list(map(_dtype, tensors))


def real_gradient(param: Tensor) -> Tensor:
    """Return what this rank holds of a parameter's gradient, as real numbers."""
    return as_real(local_gradient(param))


def moment_dtypes(state: Mapping[str, Any]) -> frozenset[torch.dtype]:
    """Return the dtypes of the moments in a parameter's state: those of AMSGrad are one launch with the others."""
    moments = [state.get(key) for key, dtype in STATE_DTYPES.items() if dtype is None]
    return frozenset(moment.dtype for moment in moments if isinstance(moment, Tensor))
