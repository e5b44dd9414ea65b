"""AdamW whose entries can be locked: what every optimizer of the package shares.

`LockedAdamW` is `torch.optim.AdamW` with another way of taking the step. It collects the tensors, checks them before
anything changes, creates the state, counts the clocks and calls one operation for each combination of device and
dtypes. Subclasses say where the locks are.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels import dispatch
from epi_kernels.contract import FLOATING, Scalars, arithmetic_dtype, check_lists
from epi_kernels.ops import masked_adamw_

# where the lock bit is -> the state that holds it, for locks that have one of their own
LOCK_STATE = {"importance": "importance", "static": "frozen"}


@dataclass(slots=True)
class Member:
    """A parameter that takes part in a step."""

    param: Tensor
    grad: Tensor
    group: dict[str, Any]
    step: float = 0.0  # the parameter's clock, this step included


class LockedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with entries that can be locked, on the operations of this package.

    Not used itself: `EPIAdamW` and `MaskedAdamW` are. Arguments up to `fused` are torch's, with torch's errors.
    Arithmetic and state are float32 for float32, bfloat16 and float16 parameters, and float64 for float64.
    """

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
        self._pending: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}
        self._nonfinite: defaultdict[Tensor, int] = defaultdict(int)
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

    def _before_update(self, members: Sequence[Member]) -> Set[Tensor]:
        """Do what comes before the update of a step; return the parameters whose importance it advanced."""
        return frozenset()

    # The step --------------------------------------------------------------------------------------------------------

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

        members = self._members()
        if not members:
            return loss
        for member in members:
            self._ensure_state(member)
        torch._foreach_add_([self.state[member.param]["step"] for member in members], 1)
        for member in members:
            member.step = self.state[member.param]["step"].item()
        advanced = self._before_update(members)
        for bundle in self._bundles(members, advanced):
            self._update(bundle, advanced)
        if all(member.param.device.type == "cpu" for member in members):
            self._report_nonfinite()
        return loss

    def _members(self) -> list[Member]:
        """Return the parameters that have a gradient, each once, after checking them."""
        members: dict[Tensor, Member] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
                members.setdefault(param, Member(param, param.grad, group))
        check_lists(params=list(members), grads=[member.grad for member in members.values()])
        return list(members.values())

    def _ensure_state(self, member: Member) -> None:
        """Create what `member` lacks of torch's state and of ours."""
        param, group = member.param, member.group
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

    def _bundles(self, members: Sequence[Member], advanced: Set[Tensor]) -> list[list[Member]]:
        """Split the members into lists that one call of an operation can serve."""
        bundles: defaultdict[tuple[Any, ...], list[Member]] = defaultdict(list)
        for member in members:
            key = (
                member.param.device,
                member.param.dtype,
                member.grad.dtype,
                member.group["amsgrad"],
                self._lock_in(member.param, member.group),
                member.param in advanced,
            )
            bundles[key].append(member)
        return list(bundles.values())

    def _update(self, bundle: list[Member], advanced: Set[Tensor]) -> None:
        """Step the tensors of one bundle."""
        params = [member.param for member in bundle]
        states = [self.state[param] for param in params]
        lock_in = self._lock_in(bundle[0].param, bundle[0].group)
        lock_state = LOCK_STATE.get(lock_in)
        masked_adamw_(
            params,
            [member.grad for member in bundle],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if bundle[0].group["amsgrad"] else [],
            [state[lock_state] for state in states] if lock_state else [],
            self._counter(params),
            torch.tensor(self._scalars(bundle), dtype=torch.float64),
            lock_in,
            params[0] in advanced,
            self._backend,
        )

    def _scalars(self, bundle: list[Member]) -> list[Scalars]:
        """Return the scalars of each tensor; computed once for all that share a group and a clock."""
        known: dict[tuple[int, float], Scalars] = {}
        rows = []
        for member in bundle:
            key = (id(member.group), member.step)
            if key not in known:
                known[key] = Scalars.of(member.group, member.step)
            rows.append(known[key])
        return rows

    # Gradients that are not finite -----------------------------------------------------------------------------------

    def _counter(self, params: list[Tensor]) -> Tensor:
        """Return the int64 counters, one for each of `params`, into which operations add; kept until reported."""
        key = tuple(map(id, params))
        if key not in self._pending:
            self._pending[key] = (params, torch.zeros(len(params), dtype=torch.int64, device=params[0].device))
        return self._pending[key][1]

    def _report_nonfinite(self) -> None:
        """Add up the pending counters and warn once for each parameter. Reading them waits for an accelerator."""
        for params, counter in self._pending.values():
            if counter.any():
                for param, count in zip(params, counter.tolist(), strict=True):
                    if count and param not in self._nonfinite:
                        warnings.warn(
                            f"{self._name(param)}: {count} squared gradients were NaN or infinite; these entries keep "
                            "their importance. Said once for each parameter, counted in telemetry().",
                            RuntimeWarning,
                            stacklevel=2,
                        )
                    if count:
                        self._nonfinite[param] += count
                counter.zero_()

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
        self._pending.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and our own attributes."""
        own = {key: value for key, value in self.__dict__.items() if key in self._KEPT}
        return {**super().__getstate__(), **own, "_pending": {}}

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
