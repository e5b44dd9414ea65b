"""torch.optim.AdamW in all that a program sees of it but the step: groups, state, checkpoints, hooks, compilation."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# not by way of torch.optim, where a program may have put one of our classes in the place of torch's
from torch.optim.adamw import AdamW
from torch.optim.optimizer import Optimizer

from epi_kernels.backends import registry as dispatch
from epi_kernels.backends.support import Spec
from epi_kernels.contract import FLOATING
from epi_kernels.distributed import given, is_dtensor, shard_of
from epi_kernels.optim import compiled
from epi_kernels.optim.checkpoint import (
    check_form,
    check_state,
    checked_groups,
    in_our_order,
    moments_of,
    named,
    pairs_of,
    taken,
)
from epi_kernels.optim.groups import Named, check_shared, check_written
from epi_kernels.optim.plain import plain_settings

# torch's complaint about a capture that its own flags do not allow; the first name is that of torch >= 2.9
_HEALTH_CHECK = next(
    name
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if hasattr(Optimizer, name)
)

# the settings of torch's
_TORCHS = [name for name in inspect.signature(AdamW).parameters if name != "params"]

# those of torch's that say how a step is taken
_FLAGS = [name for name in _TORCHS if name not in ("lr", "betas", "eps", "weight_decay")]

# of which `_check_options` may say that a parameter cannot have them
_OPTIONS = ("fused", "capturable", "differentiable", "clip_grad_norm")


class Released(Protocol):
    """What steps each parameter by itself, before `step` is called."""

    def end_iteration(self) -> None:
        """Do what is left of a step."""

    def start_over(self) -> None:
        """Let every parameter step again."""

    def check_group(self, group: dict[str, Any]) -> None:
        """Check a group that is added or loaded; ValueError is for the caller."""


class DropInAdamW(Named, AdamW):
    """torch.optim.AdamW whose step is another's.

    Not used itself. Arguments up to `fused` are torch's, with torch's errors.
    """

    # settings that are one for all groups: they stand in every group, so that a checkpoint holds them
    _SHARED: tuple[str, ...] = ("differentiable",)

    # settings of a group that the step itself writes
    _COUNTED: tuple[str, ...] = ()

    # keys of a parameter's state that a checkpoint may hold
    _STATE: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    # whether every parameter has a state from the start
    _COMPLETE = False

    # of parameters
    _DTYPES: tuple[torch.dtype, ...] = FLOATING

    # whether parameters may be DTensors
    _SHARDED = False

    # that the user gave
    _process_group: Any = None

    # what takes the steps instead, parameter by parameter: see `epi_kernels.optim.release`
    _released: Released | None = None

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
        self._backend = backend
        self._settings = plain_settings(settings)
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
        self._settle()

    # What a subclass says -------------------------------------------------------------------------------------------

    def _run_step(self) -> None:
        """Take a step by the parameters' gradients, as `step` does once it has them."""
        raise NotImplementedError

    def _step_alone(self, param: Tensor, group: int) -> None:
        """Take the step of one parameter, of that group, by its gradient."""
        raise NotImplementedError

    def _between_iterations(self) -> None:
        """Do what is due after every parameter has stepped alone."""

    def _forget(self) -> None:
        """Let the next step prepare anew."""

    def _state_shape(self, key: str, param: Tensor, entry: dict[str, Any]) -> tuple[int, ...]:
        """Return the shape that `key` of a parameter's state has in a saved `entry`."""
        return tuple(param.shape)

    def _check_entry(self, entry: dict[str, Any], param: Tensor, name: str) -> None:
        """Check a parameter's saved state beyond its keys and shapes; ValueError is for the caller."""

    def _packed(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Return torch's state_dict as a checkpoint shall have it."""
        return packed

    def _unpacked(self, entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return a parameter's saved state as `state` has it: of a DTensor this rank's part, if the whole was saved."""
        return {key: value if key == "step" else shard_of(value, param) for key, value in entry.items()}

    def _captured(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors of a state into which a load must write, since a captured step has their addresses."""
        return state

    def _lacking(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a group that follow from a state of torch's, which does not have them."""
        return {}

    def _check_loaded(self, groups: list[dict[str, Any]]) -> None:
        """Check the groups of a state to be loaded, completed with what it lacked; ValueError is for the caller."""

    def _after_load(self) -> None:
        """Do what a subclass does once a state is loaded."""

    # The step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: `torch.optim.AdamW.step`, except that locked entries keep their bits.

        Args:
            closure: evaluated first, with gradients enabled; its value is returned.

        Raises:
            RuntimeError: a gradient is sparse; or a graph is being captured, and the step cannot be part of it.
            ValueError: a gradient does not fit its parameter.

        Either is raised before anything has changed.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            getattr(self, _HEALTH_CHECK)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not compiling:
            self._run_step()
            return loss
        params = [param for group in self._groups for param in group["params"]]
        if any(map(is_dtensor, params)):
            self._run_uncompiled()
        else:
            compiled.step_(params, [param.grad for param in params], self._number)
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable imports the compiler
    def _run_uncompiled(self) -> None:
        """Take a step within a compiled one: no operation that torch would know how to shard takes DTensors."""
        self._run_step()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; `param_groups` under the name too by which a compiled step follows them."""
        super().__setattr__(name, value)
        if name == "param_groups":
            self.__dict__["_groups"] = value

    def _step_tensors(self) -> list[Tensor]:
        """Return every parameter; of `epi_kernels.optim.compiled`."""
        return [param for group in self.param_groups for param in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as torch does; where they are released, start over: see `release_gradients`."""
        super().zero_grad(set_to_none)
        if self._released is not None:
            self._released.start_over()

    # Groups and state ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; what it brings of its own is checked as the constructor's arguments are.

        Raises:
            ValueError: a setting is out of its range, or differs where it is one for all groups; of the groups that are
                there too.
            NotImplementedError: a parameter is of a kind or dtype that is not taken.
            RuntimeError: the backend that was named cannot run on a parameter.
        """
        if "_number" in self.__dict__:  # constructed: what was written into every group since holds for this one too
            self._take_written()
        # torch's constructor calls this once for each group and knows nothing of the subclass's defaults
        for key, value in self._settings.items():
            self.defaults.setdefault(key, value)
        super().add_param_group(param_group)
        self.param_groups[-1].update(plain_settings(self.param_groups[-1]))
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check a group that was just added; a subclass extends it."""
        self._check_settings(group, self.defaults)
        for param in group["params"]:
            if param.dtype not in self._DTYPES:
                raise NotImplementedError(
                    f"{self._name(param)} is {param.dtype}; this class takes {', '.join(map(str, self._DTYPES))}"
                )
            if type(param.data) is not Tensor and not (self._SHARDED and is_dtensor(param)):
                raise NotImplementedError(
                    f"{self._name(param)} is a {type(param.data).__name__}; this class takes plain tensors"
                    + (" and DTensors" if self._SHARDED else "")
                )
            # raises where the backend cannot run
            dispatch.explain(param.device, self._backend, param.dtype.to_real() if param.is_complex() else param.dtype)

    def _check_options(self, param: Tensor, group: dict[str, Any]) -> None:
        """Check the options of a group that not every parameter can have; a subclass says which.

        Raises:
            NotImplementedError, RuntimeError, AssertionError: `param` cannot have one; torch's with its texts.
        """

    def _check_settings(self, group: dict[str, Any], shared: dict[str, Any]) -> None:
        """Check the settings of a group, of which those that are one for all are as in `shared`; a subclass extends it.

        Raises:
            ValueError, RuntimeError: they are out of their range, or not possible together; torch's with its texts.
        """
        # torch checks them in its constructor alone, and those of the first arguments at that
        AdamW(
            [torch.zeros((), dtype=torch.float32, device="cpu")], **{key: group[key] for key in _TORCHS if key in group}
        )
        check_shared(self._SHARED, group, shared)
        if self._released is not None:
            self._released.check_group(group)

    _written: list[dict[str, Any]] | None = None  # our settings of the groups when `_take_written` last looked

    def _fixed(self) -> dict[str, tuple[Any, ...]]:
        """Return the settings that cannot change once there is a state, each with the values that it may have."""
        return {}

    def _take_written(self) -> None:
        """Take over the settings that a program has written into the groups: those for all must be in all of them.

        Raises:
            ValueError: one is out of its range, differs between groups or cannot change; nothing has changed then.
        """
        keys = [key for key in dict.fromkeys((*self._settings, *self._SHARED)) if key not in self._COUNTED]
        written = [{key: group[key] for key in keys if key in group} for group in self.param_groups]
        for ours, group in zip(written, self.param_groups, strict=True):
            # a schedule writes a learning rate at every step: only whether it is a Tensor is looked at
            ours["flags"] = [*map(group.get, _FLAGS), type(group["lr"])]
        if written == self._written:
            return
        fixed = self._fixed()
        for group in self.param_groups:
            self._check_settings(group, group)
        check_written(self.param_groups, self._SHARED, fixed)
        if self.param_groups:
            first = self.param_groups[0]
            self.defaults.update({key: first[key] for key in self._SHARED if key not in fixed})
        self._written = written

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form.

        Raises:
            ValueError: a setting that is one for all groups, or cannot change, was written into one.
        """
        self._take_written()
        # before the hooks of the user, who shall see what a checkpoint holds
        ours = self.register_state_dict_post_hook(lambda _, packed: self._packed(packed), prepend=True)
        try:
            return super().state_dict()
        finally:
            ours.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, with the dtypes of this class: torch casts every state to its parameter's.

        What the state's groups lack of our settings (a plain torch.optim.AdamW state lacks all) stays as it is. Where
        both sides have the same parameter names in another order, the state of each parameter goes by its name, not,
        as with torch, by its position; where the names differ, by position.

        Raises:
            ValueError: the state is of another optimizer, of other shapes, or incomplete; the message names the entry,
                and the optimizer is as it was.
        """
        entries: dict[Tensor, dict[str, Any]] = {}
        # a captured step has the addresses of its state; else the old one goes before the new one is made
        captured = any(group["capturable"] for group in self.param_groups)
        params = [param for group in self.param_groups for param in group["params"]]
        before = {param: self._captured(self.state[param]) for param in params if captured and param in self.state}
        live = {
            param: {key: value.dtype for key, value in self.state[param].items() if isinstance(value, Tensor)}
            for param in params
            if param in self.state
        }
        settings = [dict(group) if captured else {} for group in self.param_groups]

        def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            if not check_form(given, self.param_groups):
                return given
            given = {**given, "param_groups": checked_groups(given["param_groups"])}
            given = in_our_order(given, self.param_groups, getattr(self, "_grouping", None))
            check_state(
                given, self.param_groups, self._STATE, self._state_shape, self._check_entry, complete=self._COMPLETE
            )
            own = [{key: group[key] for key in self._settings} for group in self.param_groups]
            own = [{**ours, **self._lacking(given)} for ours in own]
            groups = [{**ours, **theirs} for ours, theirs in zip(own, given["param_groups"], strict=True)]
            lacking = {key: self.defaults[key] for key in self._SHARED}  # in a state of an old torch
            for i, group in enumerate(groups):
                with named(f"parameter group {i} of the state"):
                    self._check_settings({**lacking, **group}, {**lacking, **groups[0]})
                    self._check_new_options(group, self.param_groups[i])
            self._check_loaded(groups)
            numbers = dict(pairs_of(groups, self.param_groups))
            entries.update({numbers[number]: entry for number, entry in given["state"].items() if entry})
            self._check_moments(entries, live)
            # the tensors are kept from torch, which would make a copy of them in the dtypes of the parameters
            return {**given, "state": {}, "param_groups": groups}

        def take(_: Any) -> None:
            for param in dict.fromkeys((*entries, *before)):
                entry = self._unpacked(entries[param], param) if param in entries else {}
                state = taken(entry, param, before.get(param, {}), live.get(param, {}))
                state["step"] = self._clock(state["step"], param, self._group_of(param))
                self.state[param] = state
            for group, old in zip(self.param_groups, settings, strict=True):
                for key in ("lr", "eps", "weight_decay"):
                    if isinstance(old.get(key), Tensor):
                        group[key] = _written(old[key], group[key])
                group["betas"] = tuple(
                    _written(ours, beta) if isinstance(ours, Tensor) else beta
                    for ours, beta in zip(old.get("betas", (None, None)), group["betas"], strict=True)
                )
            self.defaults.update({key: self.param_groups[0][key] for key in self._SHARED})
            self._settle()
            self._after_load()

        # the first after, and the last before, the hooks of the user
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(take, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_new_options(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        """Check that the parameters of a group can have the options that a saved group brings and the group has not.

        Raises:
            ValueError, NotImplementedError, RuntimeError: one cannot.
        """
        new = [key for key in _OPTIONS if saved.get(key) and not own.get(key)]
        for param in own["params"] if new else ():
            try:
                self._check_options(param, {**dict.fromkeys(_OPTIONS), **saved})
            except AssertionError as error:  # torch's
                raise ValueError(f"{new[0]}={saved[new[0]]!r} and {self._name(param)}: {error}") from error

    def _check_moments(self, entries: dict[Tensor, dict[str, Any]], live: dict[Tensor, dict[str, torch.dtype]]) -> None:
        """Check that the backend, if one was named, can take a step with moments of the dtypes that entries bring.

        Raises:
            ValueError: it cannot; the message names the moment and the way out.
        """
        for param, entry in entries.items() if self._backend not in ("auto", "reference") else ():
            for key, dtype in moments_of(entry, param, live.get(param, {})):
                if dtype.is_complex:
                    continue
                with named(f"{key} of {self._name(param)} is {dtype}"):
                    spec = Spec("masked_adamw_", frozenset({param.dtype}), frozenset({dtype}))
                    dispatch.choose(spec, param.device, self._backend)

    def _clock_device(self, param: Tensor, group: dict[str, Any]) -> torch.device | None:
        """Return the device on which the clock of `param` runs, or None: on the host."""
        return None

    def _clock(self, value: float | Tensor, param: Tensor, group: dict[str, Any]) -> Tensor:
        """Return a ``state["step"]`` of `value`, where and in which dtype torch has it."""
        device = self._clock_device(param, group)
        if device is not None or group["fused"]:
            dtype = torch.float32
        else:
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        if isinstance(value, Tensor):
            # a clock of 16 bits stands still before long
            own = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
            return value.to(device or value.device, torch.float32 if device else own)
        with torch.inference_mode(False):  # the clock may be counted outside of it
            return torch.tensor(value, dtype=dtype, device=device or "cpu")

    def _settle(self) -> None:
        """Take over what the groups say now."""
        # a scaler then leaves the gradients alone and the step reads its factor; else it unscales and skips by itself.
        # Of released ones it would find none, and say that and not why
        fused = any(group["fused"] for group in self.param_groups)
        self._step_supports_amp_scaling = fused or self._released is not None
        # the name under which a compiler follows the groups: of the other it believes that it is torch's optimizer's
        self._groups = self.param_groups
        self._number = compiled.register(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and our own attributes."""
        own = {key: value for key, value in self.__dict__.items() if key in self._KEPT}
        return {**super().__getstate__(), **own, "_process_group": given(self._process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self._settings.items():
                group.setdefault(key, value)
        self._forget()
        self._settle()

    # the attributes of ours that pickle and deepcopy keep
    _KEPT: tuple[str, ...] = ("_backend", "_settings")


def releases_of(param: Tensor) -> list[Released]:
    """Return what steps a parameter in backward() and frees its gradient: of one optimizer, or of none."""
    hooks = (param._post_accumulate_grad_hooks or {}).values()
    return [hook.release for hook in hooks if hasattr(hook, "release")]


def _written(tensor: Tensor, value: Any) -> Tensor:
    """Write a number, or the one value of a tensor, into a tensor of one value, and return that."""
    given = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    return tensor.copy_(given.reshape(tensor.shape))
