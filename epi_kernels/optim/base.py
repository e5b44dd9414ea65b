"""AdamW whose entries can be locked: what every optimizer of the package shares.

`LockedAdamW` is `torch.optim.AdamW` with another way of taking the step. It collects the tensors, checks them before
anything changes, creates the state, counts the clocks and calls one operation for each combination of device and
dtypes. Subclasses say where the locks are.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels import dispatch
from epi_kernels.contract import FLOATING, Scalars, arithmetic_dtype, check_lists
from epi_kernels.ops import Sweep
from epi_kernels.optim.nonfinite import NonfiniteCounts

# where the lock bit is -> the state that holds it, for locks that have one of their own
LOCK_STATE = {"importance": "importance", "static": "frozen"}

_NOTHING: dict[str, Tensor] = {}


@dataclass(slots=True)
class _Bundle:
    """The tensors of one launch."""

    params: list[Tensor]
    groups: list[int]  # of each, its position in param_groups
    sweep: Sweep
    counter: Tensor


class LockedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with entries that can be locked, on the operations of this package.

    Not used itself: `EPIAdamW` and `MaskedAdamW` are. Arguments up to `fused` are torch's, with torch's errors.
    Arithmetic and state are float32 for float32, bfloat16 and float16 parameters, and float64 for float64.
    """

    # what the last step has seen, and what it prepared for it; the clocks of all bundles, one after the other
    _seen: list[object] | None
    _bundles: list[_Bundle]
    _clocks: Tensor

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float | Tensor, float | Tensor],
        eps: float,
        weight_decay: float,
        amsgrad: bool,
        *,
        maximize: bool,
        foreach: bool | None,
        capturable: bool,
        differentiable: bool,
        fused: bool | None,
        backend: str,
        settings: dict[str, Any],
    ) -> None:
        """Check every argument, then build torch's optimizer; `settings` are a subclass's defaults of its groups."""
        dispatch.check(backend)
        require_default(capturable=(capturable, False), differentiable=(differentiable, False))
        self._backend = backend
        self._settings = settings
        self._nonfinite = NonfiniteCounts()
        self._forget()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        # a scaler then unscales and skips by itself; nothing of ours reads its found_inf
        self._step_supports_amp_scaling = False

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

    def _before_update(self, clock: int) -> bool:
        """Do what comes before the update of a step, all clocks counted and `clock` the largest.

        Return whether it has advanced the importance of the parameters that can be locked and require a gradient.
        """
        return False

    # The step --------------------------------------------------------------------------------------------------------

    # torch.compile(optimizer.step) runs it as it is: addresses mean nothing to a tracer. torch.optim's own decorator;
    # the public torch.compiler.disable imports the compiler, which takes seconds
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: `torch.optim.AdamW.step`, except that locked entries keep their bits.

        Args:
            closure: evaluated first, with gradients enabled; its value is returned.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: a gradient does not fit its parameter.

        Either is raised before anything has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        seen = self._look()
        if seen != self._seen:
            self._prepare()
            self._seen = self._look()
        if not self._bundles:
            return loss
        clocks = self._clocks.add_(1).tolist()
        advanced = self._before_update(int(max(clocks)))
        first = 0
        for bundle in self._bundles:
            keys = list(zip(bundle.groups, clocks[first:], strict=False))
            first += len(keys)
            row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
            bundle.sweep.step_(
                [param.grad for param in bundle.params],  # type: ignore[misc]
                bundle.counter,
                torch.tensor([Scalars.of(self.param_groups[i], clock) for i, clock in row_of], dtype=torch.float64),
                list(map(row_of.__getitem__, keys)),
                advanced=advanced and bundle.params[0].requires_grad,
            )
        self._nonfinite.warn(self._name)
        return loss

    def _look(self) -> list[object]:
        """Return what decides whether the bundles of the last step still hold: settings, addresses and layouts.

        This is all that a step does for each tensor; the rest of it was prepared.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        seen: list[object] = []
        state = self.state
        for group in self.param_groups:
            seen.append((group["amsgrad"], *self._lock_settings(group)))
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    seen.append(None)
                    continue
                if grad.is_sparse:
                    raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
                seen.append(
                    (
                        param.data_ptr(),
                        param.shape,
                        param.is_contiguous() or param.stride(),
                        param.requires_grad,
                        grad.dtype,
                        grad.is_contiguous() or grad.stride(),
                        *[value.data_ptr() for value in state.get(param, _NOTHING).values()],
                    )
                )
        return seen

    def _forget(self) -> None:
        """Let the next step prepare anew."""
        self._seen = None
        self._bundles = []
        self._clocks = torch.empty(0)

    def _prepare(self) -> None:
        """Check the parameters that have a gradient, create what state they lack, and bundle them into launches."""
        self._forget()
        members: dict[Tensor, int] = {}
        for i, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is not None:
                    members.setdefault(param, i)
        check_lists(params=list(members), grads=[param.grad for param in members])
        bundles: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for param, i in members.items():
            self._ensure_state(param, self.param_groups[i])
            # what a refresh advances and what it does not cannot be in one launch
            key = (param.device, param.dtype, param.grad.dtype, param.requires_grad)  # type: ignore[union-attr]
            bundles[key].append(param)
        self._gather_clocks([param for params in bundles.values() for param in params])
        for params in bundles.values():
            self._bundles.append(self._bundle(params, [members[param] for param in params]))

    def _gather_clocks(self, params: list[Tensor]) -> None:
        """Make every ``state["step"]`` an element of one vector: one addition then counts them all.

        291 tensors of their own took 0.8 ms to count, as long as the rest of the step's Python.
        """
        steps = [self.state[param]["step"].cpu() for param in params]
        if steps:
            self._clocks = torch.stack([step.to(steps[0].dtype) for step in steps])
            for param, step in zip(params, self._clocks, strict=True):
                self.state[param]["step"] = step

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Create what `param` lacks of torch's state and of ours."""
        state = self.state[param]
        if "step" not in state:
            wide = torch.get_default_dtype() == torch.float64
            state["step"] = torch.tensor(0.0, dtype=torch.float64 if wide else torch.float32)
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
        sweep = Sweep(
            params,
            [param.grad for param in params],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [
                state["max_exp_avg_sq"] if self.param_groups[i]["amsgrad"] else None
                for state, i in zip(states, groups, strict=True)
            ],
            [
                state[LOCK_STATE[kind]] if kind in LOCK_STATE else None
                for state, kind in zip(states, kinds, strict=True)
            ],
            lock_in,
            [kind != "none" for kind in kinds],
            self._backend,
        )
        return _Bundle(params, groups, sweep, self._nonfinite.counter(params))

    # Names, groups, state --------------------------------------------------------------------------------------------

    def _position(self, param: Tensor) -> tuple[int, int]:
        """Return (group, place in it) of a parameter.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        for i, group in enumerate(self.param_groups):
            for j, other in enumerate(group["params"]):
                if other is param:
                    return i, j
        raise ValueError(f"the tensor of shape {tuple(param.shape)} is not a parameter of this optimizer")

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        """Return the group of a parameter, or raise as `_position` does."""
        return self.param_groups[self._position(param)[0]]

    def _name(self, param: Tensor) -> str:
        """Return the parameter's name, or "<group>.<place>" where the optimizer was given none."""
        i, j = self._position(param)
        names = self.param_groups[i].get("param_names")
        return str(names[j]) if names else f"{i}.{j}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does.

        Raises:
            NotImplementedError: a parameter is complex, or a DTensor.
            RuntimeError: the backend that was named cannot run on a parameter.
        """
        # torch's constructor calls this once for each group and knows nothing of the subclass's defaults
        for key, value in self._settings.items():
            self.defaults.setdefault(key, value)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check a group that was just added; a subclass extends it."""
        for param in group["params"]:
            if param.dtype not in FLOATING:
                raise NotImplementedError(
                    f"{self._name(param)} is {param.dtype}; this version takes {', '.join(map(str, FLOATING))}"
                )
            if type(param.data) is not Tensor:
                raise NotImplementedError(
                    f"{self._name(param)} is a {type(param.data).__name__}; this version takes plain tensors only"
                )
            dispatch.explain(param.device, self._backend, param.dtype)  # raises where the backend cannot run

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, with the dtypes of this class: torch casts every state to its parameter's.

        What the state's groups lack of our settings (a plain torch.optim.AdamW state lacks all) stays as it is.
        """
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):  # else torch says so
            own = [{key: group[key] for key in self._settings} for group in self.param_groups]
            merged = [{**ours, **theirs} for ours, theirs in zip(own, groups, strict=True)]
            state_dict = {**state_dict, "param_groups": merged}
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if key in _STATE_DTYPES:
                    dtype = _STATE_DTYPES[key] or arithmetic_dtype(param.dtype)
                    self.state[param][key] = value.to(device=param.device, dtype=dtype)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and our own attributes."""
        own = {key: value for key, value in self.__dict__.items() if key in self._KEPT}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        super().__setstate__(state)
        self._forget()

    # the attributes of ours that pickle and deepcopy keep
    _KEPT: tuple[str, ...] = ("_backend", "_settings", "_nonfinite", "_step_supports_amp_scaling")


# entries from which on a state is staggered, and the entries (832 bytes) by which each follows the one before
STAGGER_FROM = 1 << 14
STAGGER = 208

# state of ours and of torch that keeps its own dtype when loaded; None: that of the arithmetic
_STATE_DTYPES: dict[str, torch.dtype | None] = {
    "exp_avg": None,
    "exp_avg_sq": None,
    "max_exp_avg_sq": None,
    "importance": torch.float32,
    "frozen": torch.int8,
}


def new_state(param: Tensor, name: str) -> Tensor:
    """Return zeros laid out like `param` for the state `name`, in the dtype that this class keeps it in.

    On the CPU the states of a large parameter start at different offsets within a page. Large allocations all start at
    the same one, and a sweep that goes through five of them in step finds their lines in the same sets of the cache:
    staggered, it took 2 to 5% less time. (Huge pages brought nothing beyond that.)
    """
    dtype = _STATE_DTYPES[name] or arithmetic_dtype(param.dtype)
    if param.device.type != "cpu" or param.numel() < STAGGER_FROM:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    strides = torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()
    offset = STAGGER * (1 + list(_STATE_DTYPES).index(name))
    return torch.zeros(param.numel() + offset, dtype=dtype).as_strided(param.shape, strides, offset)


def require_default(**arguments: tuple[object, object]) -> None:
    """Check that arguments which this version only knows by name have their default, {name: (value, default)}.

    Raises:
        NotImplementedError: one has not; the message names it.
    """
    for name, (value, default) in arguments.items():
        if value != default:
            raise NotImplementedError(f"{name}={value!r} is not part of this version; leave it at {default!r}")
