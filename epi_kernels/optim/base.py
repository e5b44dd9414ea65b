"""AdamW whose entries can be locked: what every optimizer of the package shares.

`LockedAdamW` is `torch.optim.AdamW` with another way of taking the step. It collects the tensors, checks them before
anything changes, creates the state, counts the clocks and calls one operation for each combination of device and
dtypes. Subclasses say where the locks are.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_capturable_supported_devices

from epi_kernels.contract import arithmetic_dtype, check_lists
from epi_kernels.distributed import local, local_gradient
from epi_kernels.ops import Sweep
from epi_kernels.ops.table import Uploads
from epi_kernels.optim import differentiable
from epi_kernels.optim.checkpoint import STATE_DTYPES
from epi_kernels.optim.clocks import DeviceClocks, HostClocks
from epi_kernels.optim.complex import PairLocks, as_real
from epi_kernels.optim.drop_in import DropInAdamW
from epi_kernels.optim.nonfinite import NonfiniteCounts
from epi_kernels.optim.scaling import UNSCALED, Scaling, scaling_of

# where the lock bit is -> the state that holds it, for locks that have one of their own
LOCK_STATE = {"importance": "importance", "static": "frozen"}

_NOTHING: dict[str, Tensor] = {}

# (group, its parameters that take part)
_Members = Iterable[tuple[dict[str, Any], Sequence[Tensor]]]


@dataclass(slots=True)
class _Bundle:
    """The tensors of one launch."""

    params: list[Tensor]
    groups: list[int]  # of each, its position in param_groups
    sweep: Sweep
    counter: Tensor
    pairs: PairLocks | None  # of complex parameters
    plain: bool  # real tensors, and no DTensor among them

    def grads(self) -> list[Tensor]:
        """Return the gradients as the sweep takes them."""
        if self.plain:
            return [param.grad for param in self.params]  # type: ignore[misc]
        return [as_real(local_gradient(param)) for param in self.params]


@dataclass
class Prepared:
    """What a step of some parameters needs that does not change from step to step, and what it was made from."""

    seen: list[object] | None = None
    bundles: list[_Bundle] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)  # of the bundles
    clocks: HostClocks | DeviceClocks = field(default_factory=lambda: HostClocks([], []))


class LockedAdamW(DropInAdamW):
    """torch.optim.AdamW with entries that can be locked, on the operations of this package.

    Not used itself: `EPIAdamW` and `MaskedAdamW` are. Arguments up to `fused` are torch's, with torch's errors.
    Arithmetic and state are float32 for float32, bfloat16 and float16 parameters, and float64 for float64.
    """

    _SHARDED = True
    _SHARED = (*DropInAdamW._SHARED, "clip_grad_norm")
    _DTYPES = (*DropInAdamW._DTYPES, torch.complex64, torch.complex128)

    def __init__(self, *torchs: Any, clip_grad_norm: float | None, settings: dict[str, Any], **others: Any) -> None:
        """Check every argument, then build torch's optimizer; `settings` are a subclass's defaults of its groups."""
        if clip_grad_norm is not None and not clip_grad_norm > 0.0:
            raise ValueError(f"Invalid clip_grad_norm: {clip_grad_norm!r}; a norm > 0, or None for no clipping")
        self._nonfinite = NonfiniteCounts()
        super().__init__(*torchs, settings={"clip_grad_norm": clip_grad_norm, **settings}, **others)

    # What a subclass says -------------------------------------------------------------------------------------------

    def _lock_in(self, param: Tensor, group: dict[str, Any]) -> str:
        """Return where the lock bits of `param`, of `group`, are; see `epi_kernels.ops.masked_adamw_`."""
        raise NotImplementedError

    def _new_lock(self, param: Tensor) -> Tensor:
        """Return the tensor that carries the lock of `param` where it has a state of its own (LOCK_STATE)."""
        raise NotImplementedError

    def _lock_settings(self, group: dict[str, Any]) -> tuple[object, ...]:
        """Return the settings of a group on which `_lock_in` depends."""
        return ()

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` cannot move: a new bool tensor of its shape, True = locked."""
        raise NotImplementedError

    def _before_update(
        self, clocks: HostClocks | DeviceClocks, params: Sequence[Tensor], scaling: Scaling
    ) -> bool | Tensor:
        """Do what comes before the update of a step of `params`, their clocks counted.

        Return whether it has advanced the importance of those that can be locked and require a gradient; where the
        device alone knows, as float32 of one value.
        """
        return False

    # The step --------------------------------------------------------------------------------------------------------

    def _run_step(self) -> None:
        """Take a step by the parameters' gradients, as `step` does once it has them."""
        if self._released is not None:
            self._released.end_iteration()
            return
        if self.defaults["differentiable"]:
            self._differentiable_step()
            return
        capturing = self._capturing()
        prepared = self._prepared_for_these()
        self._bring_up_to_date(prepared, ((group, group["params"]) for group in self.param_groups), capturing)
        if not prepared.bundles:
            self._idle_step()
        else:
            with self._keeping(prepared, capturing):
                scaling = self._scaling(prepared)
                if prepared.clocks.count(scaling.found_inf):
                    self._update(prepared, self._before_update(prepared.clocks, prepared.params, scaling), scaling)
            if not capturing:
                self._nonfinite.warn(self._name)

    def _prepared_for_these(self) -> Prepared:
        """Return what was prepared for the parameters that the groups have now."""
        return self._prepared

    def _idle_step(self) -> None:
        """Take part in what other ranks do in this step, where this one has no gradient."""

    def _step_alone(self, param: Tensor, group: int) -> None:
        """Take the step of one parameter, of that group, by its gradient; no refresh."""
        prepared = self._alone.setdefault(param, Prepared())
        self._bring_up_to_date(prepared, [(self.param_groups[group], [param])], capturing=False)
        if prepared.bundles and prepared.clocks.count({}):
            self._update(prepared, False, UNSCALED)

    def _between_iterations(self) -> None:
        """Do what is due after every parameter has stepped alone."""
        self._nonfinite.warn(self._name)

    def _scaling(self, prepared: Prepared) -> Scaling:
        """Return what a scaler and clipping do to the gradients of this step."""
        clip_grad_norm = self.param_groups[0]["clip_grad_norm"]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if clip_grad_norm is None and grad_scale is None and found_inf is None:
            return UNSCALED
        grads = [grad for bundle in prepared.bundles for grad in bundle.grads()]
        return scaling_of(grads, clip_grad_norm, grad_scale, found_inf)

    def _update(self, prepared: Prepared, advanced: bool | Tensor, scaling: Scaling) -> None:
        """Update the parameters, their clocks counted, and their importance unless it has `advanced` already."""
        for number, bundle in enumerate(prepared.bundles):
            scalars, rows = prepared.clocks.scalars(number, bundle.groups, self.param_groups)
            device = bundle.params[0].device
            # a refresh advances those alone that can be locked
            so_far = advanced if bundle.params[0].requires_grad else False
            if isinstance(so_far, Tensor):
                so_far = so_far.to(device)
            grads, factor = bundle.grads(), scaling.factor.get(device)
            if bundle.pairs is not None:
                if not so_far:
                    betas = [self.param_groups[i].get("importance_beta", 0.0) for i in bundle.groups]
                    complex_grads = list(map(local_gradient, bundle.params))
                    bundle.pairs.advance_(complex_grads, bundle.counter, betas, factor, self._backend)
                bundle.pairs.repeat_()
            bundle.sweep.step_(
                grads,
                bundle.counter,
                scalars,
                rows,
                advanced=so_far,
                grad_factor=factor,
                found_inf=scaling.found_inf.get(device),
            )

    def _differentiable_step(self) -> None:
        """Take a step that autograd can go back through: torch's own arithmetic, and the locks put over it."""
        members = {param: group for group in self.param_groups for param in group["params"] if param.grad is not None}
        for param, group in members.items():
            differentiable.check(self._name(param), param, self._lock_in(param, group))
            self._ensure_state(param, group)
        clocks = HostClocks(
            [[self.state[param]["step"].detach().clone() for param in members]], self._sleeping(members)
        )
        if not members or not clocks.count({}):
            return
        grads = [param.grad.detach() for param in members]
        scaling = scaling_of(list(map(as_real, grads)), self.param_groups[0]["clip_grad_norm"], None, None)
        advanced = self._before_update(clocks, list(members), scaling)
        for param, group in members.items():
            if not (advanced and param.requires_grad) and self._lock_in(param, group) == "importance":
                counter = self._nonfinite.counter([param])
                pairs = PairLocks([self.state[param]["importance"]], advances=True)
                factor = scaling.factor.get(param.device)
                pairs.advance_([param.grad.detach()], counter, [group["importance_beta"]], factor, self._backend)
            locked = None if self._lock_in(param, group) == "none" else self.isolation_mask(param)
            with torch.enable_grad():
                differentiable.step_(param, self.state[param], group, locked, scaling.factor.get(param.device))

    # Preparation -----------------------------------------------------------------------------------------------------

    def _bring_up_to_date(self, prepared: Prepared, members: _Members, capturing: bool) -> None:
        """Prepare anew if anything has changed since the last step.

        Raises:
            RuntimeError: a gradient is sparse, or a graph is being captured.
        """
        members = list(members)
        seen = self._look(members)
        if seen == prepared.seen:
            return
        if capturing:
            raise RuntimeError(
                "step() is being captured, and it is not the step of before: its tensors are not prepared, or "
                "other parameters have a gradient now, or a state was loaded. Take a step outside of the capture "
                "first, with the same parameters having gradients"
            )
        self._prepare(prepared, members)
        prepared.seen = self._look(members)

    def _look(self, members: _Members) -> list[object]:
        """Return what decides whether the bundles of the last step still hold: settings, addresses and layouts.

        This is all that a step does for each tensor; the rest of it was prepared.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        seen: list[object] = []
        state = self.state
        scaler = getattr(self, "found_inf", None)
        for group, params in members:
            flags = (group["amsgrad"], group["capturable"], group["fused"], scaler is not None and scaler.device)
            seen.append((*flags, *self._lock_settings(group)))
            for param in params:
                grad = param.grad
                if grad is None:
                    seen.append(None)
                    continue
                if grad.is_sparse:
                    raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
                held, held_grad = local(param), local(grad)
                seen.append(
                    (
                        held.data_ptr(),
                        held.shape,
                        held.is_contiguous() or held.stride(),
                        param.requires_grad,
                        grad.dtype,
                        held_grad.is_contiguous() or held_grad.stride(),
                        *[local(value).data_ptr() for value in state.get(param, _NOTHING).values()],
                    )
                )
        return seen

    def _forget(self) -> None:
        """Let the next step prepare anew."""
        self._prepared = Prepared()
        self._alone: dict[Tensor, Prepared] = {}
        if "_uploads" not in self.__dict__:  # not while a state is loaded: a graph may read on
            self._uploads = Uploads()

    def _prepare(self, prepared: Prepared, members: _Members) -> None:
        """Check the parameters that have a gradient, create what state they lack, and bundle them into launches."""
        prepared.seen, prepared.bundles = None, []
        of_group: dict[Tensor, int] = {}
        numbers = {id(group): i for i, group in enumerate(self.param_groups)}
        for group, params in members:
            for param in params:
                if param.grad is not None:
                    of_group.setdefault(param, numbers[id(group)])
        check_lists(params=list(map(as_real, of_group)), grads=list(map(_real_gradient, of_group)))
        for param, i in of_group.items():
            self._check_layout(param, self.param_groups[i])
        bundles: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for param, i in of_group.items():
            self._ensure_state(param, self.param_groups[i])
            # what a refresh advances and what it does not cannot be in one launch
            key = (param.device, param.dtype, param.grad.dtype, param.requires_grad)  # type: ignore[union-attr]
            bundles[key].append(param)
        prepared.params = [param for bundle in bundles.values() for param in bundle]
        self._gather_clocks(prepared, list(bundles.values()), of_group)
        for bundle in bundles.values():
            prepared.bundles.append(self._bundle(bundle, [of_group[param] for param in bundle]))

    def _check_layout(self, param: Tensor, group: dict[str, Any]) -> None:
        """Check what a step cannot do with a parameter.

        Raises:
            RuntimeError: entries of the parameter share memory; `fused` is on and torch's kernels cannot take it.
            NotImplementedError: `capturable` is on and it is complex, or an option is not there for a DTensor.
            AssertionError: `capturable` is on and it is on a device that has no graphs.
        """
        held = local(param)
        if held is not param:
            for flag in ("capturable", "differentiable", "clip_grad_norm"):
                if group[flag]:
                    raise NotImplementedError(
                        f"{flag}={group[flag]!r} and {self._name(param)}, a DTensor: not in this version"
                        + (
                            "; clip by torch.nn.utils.clip_grad_norm_ before the step"
                            if flag == "clip_grad_norm"
                            else ""
                        )
                    )
        if any(stride == 0 and size > 1 for size, stride in zip(held.shape, held.stride(), strict=True)):
            raise RuntimeError(
                f"{self._name(param)} is expanded: several of its entries are one place in memory, and a step would "
                "write there several times; clone() it first"
            )
        if group["fused"]:
            _device_dtype_check_for_fused(param)
        if group["capturable"]:
            if param.is_complex():
                raise NotImplementedError(
                    f"{self._name(param)} is {param.dtype}, and its locks go by way of the host; use capturable=False"
                )
            supported = _get_capturable_supported_devices()
            if param.device.type not in supported:
                raise AssertionError(
                    f"If capturable=True, params and state_steps must be on supported devices: {supported}."
                )

    def _gather_clocks(self, prepared: Prepared, bundles: list[list[Tensor]], members: dict[Tensor, int]) -> None:
        """Make every ``state["step"]`` an element of the vectors of `prepared.clocks`."""
        steps = [[self.state[param]["step"] for param in bundle] for bundle in bundles]
        others = self._sleeping(members) if prepared is self._prepared else []  # alone it refreshes nothing
        if any(self._clock_device(param, self.param_groups[i]) is not None for param, i in members.items()):
            prepared.clocks = DeviceClocks(steps, others, [bundle[0].device for bundle in bundles])
        else:
            prepared.clocks = HostClocks(steps, others)
        for param, step in zip(prepared.params, prepared.clocks.elements(), strict=True):
            self.state[param]["step"] = step

    def _sleeping(self, members: Iterable[Tensor]) -> list[Tensor]:
        """Return the clocks of the parameters that do not take part in this step."""
        awake = set(members)
        return [state["step"] for param, state in self.state.items() if param not in awake and "step" in state]

    def _clock_device(self, param: Tensor, group: dict[str, Any]) -> torch.device | None:
        """Return the device on which the clock of `param` runs, or None: on the host.

        torch has it on the device with `fused` too; here only where a scaler alone knows, on the device, whether there
        is a step to count. A refresh that the device decides is launched at every step, and does nothing at most.
        """
        found_inf = getattr(self, "found_inf", None)
        skips_there = found_inf is not None and found_inf.device.type != "cpu"
        return param.device if group["capturable"] or skips_there else None

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Create what `param` lacks of torch's state and of ours."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = self._clock(0.0, param, group)
            state["exp_avg"] = new_state(param, "exp_avg")
            state["exp_avg_sq"] = new_state(param, "exp_avg_sq")
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = new_state(param, "max_exp_avg_sq")
        lock_state = LOCK_STATE.get(self._lock_in(param, group))
        if lock_state is not None and lock_state not in state:
            state[lock_state] = self._new_lock(param)

    def _bundle(self, params: list[Tensor], groups: list[int]) -> _Bundle:
        """Return the bundle of parameters of one device and pair of dtypes."""
        states = [self.state[param] for param in params]
        kinds = [self._lock_in(param, self.param_groups[i]) for param, i in zip(params, groups, strict=True)]
        # an optimizer locks in one way, or not at all
        lock_in = next((kind for kind in kinds if kind != "none"), "none")
        locks = [
            local(state[LOCK_STATE[kind]]) if kind in LOCK_STATE else None
            for state, kind in zip(states, kinds, strict=True)
        ]
        pairs = None
        if params[0].is_complex():
            pairs = PairLocks(locks, advances=lock_in == "importance")
            locks, lock_in = pairs.pairs, "none" if lock_in == "none" else "static"
        sweep = Sweep(
            list(map(as_real, params)),
            list(map(_real_gradient, params)),
            [as_real(state["exp_avg"]) for state in states],
            [as_real(state["exp_avg_sq"]) for state in states],
            [
                as_real(state["max_exp_avg_sq"]) if self.param_groups[i]["amsgrad"] else None
                for state, i in zip(states, groups, strict=True)
            ],
            locks,
            lock_in,
            [kind != "none" for kind in kinds],
            self._backend,
        )
        plain = pairs is None and all(local(param) is param for param in params)
        return _Bundle(params, groups, sweep, self._nonfinite.counter(params), pairs, plain)

    # Graphs ----------------------------------------------------------------------------------------------------------

    def _capturing(self) -> bool:
        """Return whether a CUDA graph is being captured.

        Raises:
            RuntimeError: it is, and a parameter that requires a gradient has none.
        """
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return False
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and param.grad is None:
                    raise RuntimeError(
                        f"step() is being captured, and {self._name(param)} has no gradient: replays would never move "
                        "it. Capture a step in which every parameter has one, or let it require none"
                    )
        return True

    @contextmanager
    def _keeping(self, prepared: Prepared, capturing: bool) -> Iterator[None]:
        """Keep what the device reads in this step for as long as a graph may read it, if one is being captured."""
        if isinstance(prepared.clocks, HostClocks):
            yield
            return
        with self._uploads.step(capturing):
            self._uploads.keep(prepared)
            yield

    _KEPT = (*DropInAdamW._KEPT, "_nonfinite")


# entries from which on a state is staggered, and the entries (832 bytes) by which each follows the one before
STAGGER_FROM = 1 << 14
STAGGER = 208


def _real_gradient(param: Tensor) -> Tensor:
    return as_real(local_gradient(param))


def new_state(param: Tensor, name: str) -> Tensor:
    """Return zeros laid out like `param` for the state `name`, in the dtype that this class keeps it in.

    On the CPU the states of a large parameter start at different offsets within a page. Large allocations all start at
    the same one, and a sweep that goes through five of them in step finds their lines in the same sets of the cache:
    staggered, it took 2 to 5% less time. (Huge pages brought nothing beyond that.)
    """
    dtype = STATE_DTYPES[name] or arithmetic_dtype(param.dtype)
    if local(param) is not param or param.device.type != "cpu" or param.numel() < STAGGER_FROM:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    strides = torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()
    offset = STAGGER * (1 + list(STATE_DTYPES).index(name))
    return torch.zeros(param.numel() + offset, dtype=dtype).as_strided(param.shape, strides, offset)
