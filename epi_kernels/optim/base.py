"""AdamW whose entries can be locked, on `sweep_`; subclasses say where the locks are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_capturable_supported_devices

from epi_kernels.contract import arithmetic_dtype
from epi_kernels.distributed import is_sharded, local, local_gradient
from epi_kernels.ops import Sweep, Tensors
from epi_kernels.ops.table import Uploads
from epi_kernels.optim import differentiable
from epi_kernels.optim.checkpoint import STATE_DTYPES
from epi_kernels.optim.clocks import HostClocks
from epi_kernels.optim.complex import PairLocks, as_real
from epi_kernels.optim.nonfinite import NonfiniteCounts
from epi_kernels.optim.plain import is_number
from epi_kernels.optim.prepared import Bundle, Prepared, PreparedAdamW, Present
from epi_kernels.optim.scaling import UNSCALED, Scaling, scaling_of
from epi_kernels.rules import ADAMW

# what is refused of parameters that are shared out over ranks, and what to do instead
_NOT_SHARDED = {
    "capturable": "",
    "differentiable": "",
    "clip_grad_norm": "; clip before the step, by torch.nn.utils.clip_grad_norm_ or what the wrapper has for it",
}

# where the lock bit is -> the state that holds it, for locks that have one of their own
LOCK_STATE = {"importance": "importance", "static": "frozen"}


@dataclass(slots=True)
class _Bundle(Bundle):
    sweep: Sweep = field(init=False)
    counter: Tensor
    lock_in: str
    lockable: list[bool]
    amsgrad: list[bool]
    pairs: bool  # whether the parameters are complex, and their locks repeated for both parts

    def locks(self, now: Present) -> list[Tensor | None]:
        """Return the tensors that carry the locks, where these have a state of their own."""
        if self.lock_in not in LOCK_STATE:
            return []
        return _where(self.lockable, self.state(now, LOCK_STATE[self.lock_in]))

    def slots(self, now: Present) -> dict[str, list[Tensor | None]]:
        """Return the slots of the rule; the largest second moment of those that take AMSGrad's step."""
        slots = {key: self.state(now, key) for key in ("exp_avg", "exp_avg_sq")}
        if any(self.amsgrad):
            slots["max_exp_avg_sq"] = _where(self.amsgrad, self.state(now, "max_exp_avg_sq"))
        return slots


class LockedAdamW(PreparedAdamW):
    """torch.optim.AdamW with entries that can be locked, on the operations of this package.

    Not used itself: `EPIAdamW` and `MaskedAdamW` are. Arguments up to `fused` are torch's, with torch's errors.
    Arithmetic and state are float32 for float32, bfloat16 and float16 parameters, and float64 for float64.
    """

    _SHARDED = True
    _SHARED = (*PreparedAdamW._SHARED, "clip_grad_norm")
    _DTYPES = (*PreparedAdamW._DTYPES, torch.complex64, torch.complex128)

    def __init__(self, *torchs: Any, clip_grad_norm: float | None, settings: dict[str, Any], **others: Any) -> None:
        """Check every argument, then build torch's optimizer; `settings` are a subclass's defaults of its groups."""
        self._nonfinite = NonfiniteCounts()
        super().__init__(*torchs, settings={"clip_grad_norm": clip_grad_norm, **settings}, **others)

    # What a subclass says -------------------------------------------------------------------------------------------

    def _lock_in(self, param: Tensor, group: dict[str, Any]) -> str:
        """Return where the lock bits of `param`, of `group`, are; see `epi_kernels.ops.sweep_`."""
        raise NotImplementedError

    def _new_lock(self, param: Tensor) -> Tensor:
        """Return the tensor that carries the lock of `param` where it has a state of its own (LOCK_STATE)."""
        raise NotImplementedError

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` cannot move: a new bool tensor of its shape, True = locked."""
        raise NotImplementedError

    def _before_update(
        self, params: Sequence[Tensor], scaling: Scaling, home: torch.device | None = None
    ) -> bool | Tensor:
        """Do what comes before the update of a step of `params`, their clocks counted.

        Args:
            params: the parameters that have a gradient.
            scaling: of their gradients.
            home: the device that alone knows whether this step counts; None: the host knows, and it counts.

        Returns:
            Whether this has advanced the importance of those that can be locked and require a gradient; where the
            device alone knows, as float32 of one value.
        """
        return False

    # The step --------------------------------------------------------------------------------------------------------

    def _run_step(self) -> None:
        """Take a step by the parameters' gradients, as `step` does once it has them."""
        self._take_written()
        if self._released is not None:
            self._released.end_iteration()
            return
        if self.defaults["differentiable"]:
            self._differentiable_step()
            return
        capturing = self._capturing()
        prepared = self._prepared_for_these()
        now = self._bring_up_to_date(prepared, ((group, group["params"]) for group in self.param_groups), capturing)
        if not prepared.bundles:
            self._idle_step()
        else:
            with self._keeping(prepared, now, capturing):
                scaling = self._scaling(prepared, now)
                if prepared.clocks.count(scaling.found_inf):
                    advanced = self._before_update(now.params, scaling, prepared.clocks.home)
                    self._update(prepared, now, advanced, scaling)
            if not capturing:
                self._nonfinite.warn(self._names)

    def _prepared_for_these(self) -> Prepared:
        """Return what was prepared for the parameters that the groups have now."""
        return self._prepared

    def _idle_step(self) -> None:
        """Do what a step does where no parameter has a gradient: count it, and what other ranks do in this step."""

    def _between_iterations(self) -> None:
        """Do what is due after every parameter has stepped alone."""
        self._nonfinite.warn(self._names)

    def _scaling(self, prepared: Prepared, now: Present) -> Scaling:
        """Return what a scaler and clipping do to the gradients of this step."""
        clip_grad_norm = self.param_groups[0]["clip_grad_norm"]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if clip_grad_norm is None and grad_scale is None and found_inf is None:
            return UNSCALED
        grads = [grad for bundle in prepared.bundles for grad in bundle.grads(now)]
        return scaling_of(grads, clip_grad_norm, grad_scale, found_inf)

    def _update(
        self, prepared: Prepared, now: Present, advanced: bool | Tensor = False, scaling: Scaling = UNSCALED
    ) -> None:
        """Update the parameters, their clocks counted, and their importance unless it has `advanced` already."""
        for number, bundle in enumerate(prepared.bundles):
            scalars, rows = prepared.clocks.scalars(ADAMW, number, bundle.groups, self.param_groups)
            params, grads, locks = bundle.params(now), bundle.grads(now), bundle.locks(now)
            device = params[0].device
            # a refresh advances those alone that can be locked
            so_far = advanced if now.params[bundle.where[0]].requires_grad else False
            if isinstance(so_far, Tensor):
                so_far = so_far.to(device)
            factor = scaling.factor.get(device)
            if bundle.pairs and locks:
                pairs = PairLocks(locks, advances=bundle.lock_in == "importance")
                if not so_far:
                    betas = [self.param_groups[i].get("importance_beta", 0.0) for i in bundle.groups]
                    complex_grads = list(map(local_gradient, bundle.of(now.params)))
                    pairs.advance_(complex_grads, bundle.counter, betas, factor, self._backend)
                pairs.repeat_()
                locks = pairs.pairs
            bundle.sweep.step_(
                Tensors(params, grads, bundle.slots(now), locks),
                bundle.counter,
                scalars,
                rows,
                advanced=so_far,
                grad_factor=factor,
                found_inf=scaling.found_inf.get(device),
                moved=bundle.pairs,  # the pairs are made for this step
            )

    def _differentiable_step(self) -> None:
        """Take a step that autograd can go back through: torch's own arithmetic, and the locks put over it."""
        members = {param: group for group in self.param_groups for param in group["params"] if param.grad is not None}
        for param, group in members.items():
            differentiable.check(self._name(param), param, self._lock_in(param, group))
            self._ensure_state(param, group)
        if not members:
            self._idle_step()
            return
        grads = [param.grad.detach() for param in members]
        scaling = scaling_of(list(map(as_real, grads)), self.param_groups[0]["clip_grad_norm"], None, None)
        advanced = self._before_update(list(members), scaling)
        for param, group in members.items():
            if not (advanced and param.requires_grad) and self._lock_in(param, group) == "importance":
                counter = self._nonfinite.counter([param])
                pairs = PairLocks([self.state[param]["importance"]], advances=True)
                factor = scaling.factor.get(param.device)
                pairs.advance_([param.grad.detach()], counter, [group["importance_beta"]], factor, self._backend)
            locked = None if self._lock_in(param, group) == "none" else self.isolation_mask(param)
            with torch.enable_grad():
                differentiable.step_(param, self.state[param], group, locked, scaling.factor.get(param.device))

    def _check_settings(self, group: dict[str, Any], shared: dict[str, Any]) -> None:
        norm = group["clip_grad_norm"]
        if norm is not None and not (is_number(norm) and norm > 0.0):
            raise ValueError(f"Invalid clip_grad_norm: {norm!r}; a norm > 0, or None for no clipping")
        super()._check_settings(group, shared)

    # Preparation -----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        super()._forget()
        if "_uploads" not in self.__dict__:  # not while a state is loaded: a graph may read on
            self._uploads = Uploads()

    def _settings_seen(self, group: dict[str, Any]) -> tuple[object, ...]:
        scaler = getattr(self, "found_inf", None)
        return group["amsgrad"], group["capturable"], group["fused"], scaler is not None and scaler.device

    def _kind(self, param: Tensor) -> tuple[object, ...]:
        # what a refresh advances and what it does not cannot be in one launch
        return (param.requires_grad,)

    def _check_layout(self, param: Tensor, group: dict[str, Any]) -> None:
        """Check what a step cannot do with a parameter.

        Raises:
            RuntimeError: entries of the parameter share memory, or are in none; `fused` is on and torch's kernels
                cannot take it.
            ValueError: a tensor of its state has another shape.
            NotImplementedError: `capturable` is on and it is complex, or an option is not there for what ranks share.
            AssertionError: `capturable` is on and it is on a device that has no graphs.
        """
        super()._check_layout(param, group)
        held = local(param)
        for key, value in self.state.get(param, {}).items():
            if key in self._STATE and isinstance(value, Tensor) and local(value).shape != held.shape:
                raise ValueError(
                    f"{self._name(param)} has shape {tuple(held.shape)} now, and {key} in its state "
                    f"{tuple(local(value).shape)}. If you resized or replaced the parameter, give every tensor of "
                    "optimizer.state[parameter] its shape too, importance and frozen included (0 for a new entry, "
                    "which is free), or delete optimizer.state[parameter], which starts over"
                )
        self._check_options(param, group)

    def _check_options(self, param: Tensor, group: dict[str, Any]) -> None:
        """Check the options of a group that not every parameter can have; see `_check_layout`."""
        if group["differentiable"]:
            differentiable.check(self._name(param), param, self._lock_in(param, group))
            if param.is_leaf and param.requires_grad:
                raise RuntimeError(
                    f"{self._name(param)} is a leaf that requires a gradient, into which a differentiable step cannot "
                    "write; use differentiable=False"
                )
        if is_sharded(param) or self._process_group is not None:
            for flag, instead in _NOT_SHARDED.items():
                if group[flag]:
                    raise NotImplementedError(
                        f"{flag}={group[flag]!r} and {self._name(param)}, which is shared out over ranks: not in this "
                        f"version{instead}"
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

    def _clock_device(self, param: Tensor, group: dict[str, Any]) -> torch.device | None:
        """Return the device on which the clock of `param` runs, or None: on the host.

        torch has it on the device with `fused` too; here only where a scaler alone knows, on the device, whether there
        is a step to count. A refresh that the device decides is launched at every step, and does nothing at most.
        """
        found_inf = getattr(self, "found_inf", None)
        skips_there = found_inf is not None and found_inf.device.type != "cpu"
        return param.device if group["capturable"] or skips_there else None

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
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

    def _bundle(self, now: Present, where: list[int], groups: list[int], plain: bool) -> _Bundle:
        params = [now.params[i] for i in where]
        kinds = [self._lock_in(param, self.param_groups[i]) for param, i in zip(params, groups, strict=True)]
        # an optimizer locks in one way, or not at all
        lock_in = next((kind for kind in kinds if kind != "none"), "none")
        lockable = [kind != "none" for kind in kinds]
        amsgrad = [self.param_groups[i]["amsgrad"] for i in groups]
        counter = self._nonfinite.counter(params)
        pairs = params[0].is_complex()
        bundle = _Bundle(where, groups, plain, counter, lock_in, lockable, amsgrad, pairs)
        locks = bundle.locks(now)
        if pairs and locks:
            locks, lock_in = PairLocks(locks, advances=False).pairs, "static"
        tensors = Tensors(bundle.params(now), bundle.grads(now), bundle.slots(now), locks)
        bundle.sweep = Sweep(ADAMW, tensors, lock_in, lockable, self._backend)
        return bundle

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
    def _keeping(self, prepared: Prepared, now: Present, capturing: bool) -> Iterator[None]:
        """Keep what the device reads in this step for as long as a graph may read it, if one is being captured."""
        if isinstance(prepared.clocks, HostClocks):
            yield
            return
        with self._uploads.step(capturing):
            if capturing:
                self._uploads.keep((prepared.bundles, prepared.clocks, now))
            yield

    _KEPT = (*PreparedAdamW._KEPT, "_nonfinite")


def _where(wanted: list[bool], tensors: list[Any]) -> list[Tensor | None]:
    """Return the tensors that are wanted, None for the others."""
    return [tensor if want else None for want, tensor in zip(wanted, tensors, strict=True)]


# entries from which on a state is staggered, and the entries (832 bytes) by which each follows the one before
STAGGER_FROM = 1 << 14
STAGGER = 208


def new_state(param: Tensor, name: str) -> Tensor:
    """Return zeros laid out like `param` for the state `name`, in the dtype that this class keeps it in.

    On the CPU the states of a large parameter start at different offsets within a page. Large allocations all start at
    the same one, and a sweep that goes through five of them in step finds their lines in the same sets of the cache:
    staggered, it took 2 to 5% less time. (Huge pages brought nothing beyond that.)
    """
    dtype = STATE_DTYPES[name] or arithmetic_dtype(param.dtype)
    with torch.inference_mode(False):  # the state may be written outside of it
        if local(param) is not param or param.device.type != "cpu" or param.numel() < STAGGER_FROM:
            return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        strides = torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()
        offset = STAGGER * (1 + list(STATE_DTYPES).index(name))
        memory = torch.zeros(param.numel() + offset, dtype=dtype, device=param.device)
        return memory.as_strided(param.shape, strides, offset)
