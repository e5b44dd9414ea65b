"""torch's contract: groups, state, checkpoints, hooks and compilation of an optimizer whose step is ours."""

from collections.abc import Callable
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from epi_kernels.backends import registry
from epi_kernels.backends.support import Spec
from epi_kernels.contract import FLOATING
from epi_kernels.distributed import is_dtensor, shard_of
from epi_kernels.engine import compiled, storages
from epi_kernels.engine.checkpoint import (
    check_form,
    check_state,
    checked_groups,
    in_our_order,
    in_own_dtypes,
    moments_of,
    named,
    pairs_of,
    taken,
)
from epi_kernels.engine.groups import group_of, name_of, params_of
from epi_kernels.engine.method import Method
from epi_kernels.engine.plan import Planner
from epi_kernels.engine.settings import (
    FLAGS,
    check_clip_grad_norm,
    check_shared,
    check_torchs,
    check_written,
    plain_settings,
)
from epi_kernels.engine.state import OPTIONS
from epi_kernels.storage import block8

# torch's complaint about a capture that its own flags do not allow; the first name is that of torch >= 2.11
_HEALTH_CHECK = next(
    name
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if hasattr(Optimizer, name)
)


class Released(Protocol):
    """An object that steps each parameter by itself, before `step` is called."""

    def end_iteration(self) -> None:
        """Finish a step once every parameter has stepped."""

    def start_over(self) -> None:
        """Let every parameter step again."""

    def check_group(self, group: dict[str, Any]) -> None:
        """Check a group that is added or loaded; ValueError is for the caller."""


class FusedOptimizer(Optimizer):
    """A torch optimizer whose step is a few fused passes; an optimizer of torch may stand behind it in the class.

    An abstract base. It has a planner, which plans and takes steps, and a method, which says which entries move.
    Arguments and settings that torch has too are refused with torch's texts.

    Args:
        params: as torch.optim.Optimizer takes them.
        torchs: arguments, beside `params`, for the constructor of the torch class behind this one.
        planner: plans and takes the steps; the rule and the method are the planner's.
        settings: the defaults of this package for groups, the method's included.
        process_group: the one that the user gave, or None.
        backend: "auto", or the name of a backend.
        dtypes: the dtypes that a parameter may have.
        scales: whether the step can divide by the scale of a torch.amp.GradScaler.
    """

    # what takes the steps instead, parameter by parameter: see `epi_kernels.optim.release`
    _released: Released | None = None

    def __init__(
        self,
        params: Any,
        torchs: dict[str, Any],
        *,
        planner: Planner,
        settings: dict[str, Any],
        process_group: Any,
        backend: str,
        dtypes: tuple[torch.dtype, ...] = (*FLOATING, torch.complex64, torch.complex128),
        scales: bool = True,
    ) -> None:
        registry.check(backend)
        self._backend, self._process_group = backend, process_group
        self._planner, self._dtypes, self._scales = planner, dtypes, scales
        self._ours, self._given = tuple(settings), storages.said(plain_settings(settings))
        self._written: list[list[Any]] | None = None  # settings of the groups when `_take_written` last looked
        super().__init__(params, **torchs)
        self._given = {}  # the defaults have them now
        storages.check_parameters(self.param_groups, lambda param: name_of(param, self.param_groups))
        self._settle()

    @property
    def _method(self) -> Method:
        return self._planner.method

    @property
    def _shared(self) -> tuple[str, ...]:
        """Settings that must be equal in all groups: every group has them, so that a checkpoint has them too."""
        own = (key for key in ("differentiable", "clip_grad_norm") if key in self.defaults)
        return *own, *self._method.shared

    # The step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, as torch's optimizer of this name does, except that protected entries keep their bits.

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
        """Take a step outside of the compiled graph: torch has no sharding rule for our operation on DTensors."""
        self._run_step()

    def _run_step(self) -> None:
        """Take a step with the gradients that the parameters have now."""
        self._method.before_step(self)
        self._take_written()
        if self._released is not None:
            self._released.end_iteration()
        else:
            self._planner.run(self)

    def _step_alone(self, param: Tensor, group: int) -> None:
        """Step one parameter of the group at position `group`, with its gradient."""
        self._method.before_param(self, param)
        self._planner.run_alone(self, param, group)

    def _end_iteration(self) -> None:
        """Do what is due after every parameter has stepped alone."""
        self._method.between_iterations(self)

    def __repr__(self) -> str:
        """Return torch's text and the path that a step takes."""
        return f"{super().__repr__()}\n{self._planner.text(self)}"

    def _step_tensors(self) -> list[Tensor]:
        """Return every parameter, for `epi_kernels.engine.compiled`."""
        return params_of(self.param_groups)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; `param_groups` also as `_groups`, the name by which a compiled step reads them."""
        super().__setattr__(name, value)
        if name == "param_groups":
            self.__dict__["_groups"] = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as torch does; where they are released, start over: see `release_gradients`."""
        super().zero_grad(set_to_none)
        if self._released is not None:
            self._released.start_over()

    # Groups ----------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; its settings are checked like the constructor's arguments.

        Raises:
            ValueError: a setting, of this group or one that a program wrote into an earlier one, is out of its range,
                or differs between groups where it must be equal in all.
            NotImplementedError: a parameter's class or dtype is not supported.
            RuntimeError: the backend that was named cannot run on a parameter.
        """
        if "_number" in self.__dict__:  # after the constructor: a setting written into every group holds for this one
            self._method.before_group(self)
            self._take_written()
        # torch's constructor calls this once for each group and knows nothing of our defaults
        for key, value in self._given.items():
            self.defaults.setdefault(key, value)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.update(plain_settings(group))
        storages.take_dtypes(group)
        try:
            self._check_settings(group, self.defaults)
            for param in group["params"]:
                self._check_kind(param)
                storages.check_parameter(param, name_of(param, self.param_groups), group)
            self._method.admit(self, group)
        except Exception:
            self.param_groups.pop()
            raise
        self._method.constructed(self)
        self._method.added(self)

    def _check_kind(self, param: Tensor) -> None:
        """Check that a parameter's class and dtype are supported, and that the backend can run on it."""
        name = name_of(param, self.param_groups)
        if param.dtype not in self._dtypes:
            raise NotImplementedError(f"{name} is {param.dtype}; this class takes {', '.join(map(str, self._dtypes))}")
        if type(param.data) is not Tensor and not is_dtensor(param):
            raise NotImplementedError(
                f"{name} is a {type(param.data).__name__}; this class takes plain tensors and DTensors"
            )
        # raises where the backend cannot run
        registry.explain(param.device, self._backend, param.dtype.to_real() if param.is_complex() else param.dtype)

    def _check_settings(self, group: dict[str, Any], shared: dict[str, Any]) -> None:
        """Check the settings of a group; those that are one for all groups must equal the values in `shared`.

        Raises:
            ValueError, RuntimeError: a setting is out of its range, or two exclude each other; torch's texts for
                torch's settings.
        """
        self._method.check_settings(group)
        storages.check_settings(group)
        check_clip_grad_norm(group.get("clip_grad_norm"))
        check_torchs(group)
        check_shared(self._shared, group, shared)
        if self._released is not None:
            self._released.check_group(group)

    def _take_written(self) -> None:
        """Take over settings that a program has written into groups; one that holds for all must be in all of them.

        Raises:
            ValueError: a setting is out of range, differs between groups or cannot change; nothing has changed then.
        """
        shared, counted = self._shared, self._method.counted
        keys = [key for key in dict.fromkeys((*self._ours, *shared)) if key not in counted]
        written = [
            # of lr only the type: a schedule writes it at every step, and the checks differ only for a Tensor
            [*map(group.get, keys), *map(group.get, FLAGS), type(group["lr"])]
            for group in self.param_groups
        ]
        if written == self._written:
            return
        fixed = self._method.fixed(self)
        for group in self.param_groups:
            storages.take_dtypes(group)  # as a wrapper writes them that copies the groups of a saved state
            self._check_settings(group, group)
        check_written(self.param_groups, shared, fixed)
        if self.param_groups:
            first = self.param_groups[0]
            self.defaults.update({key: first[key] for key in shared if key not in fixed})
        self._written = written
        self._planner.forget()  # what was planned depends on the settings

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form.

        Raises:
            ValueError: a program has written a setting into one group that must be equal in all, or cannot change.
        """
        self._method.catch_up(self)
        self._take_written()
        # ours runs before the user's hooks, which must see what the checkpoint will have
        ours = self.register_state_dict_post_hook(lambda _, packed: self._packed(packed), prepend=True)
        try:
            return super().state_dict()
        finally:
            ours.remove()

    def _packed(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Return torch's state_dict as a checkpoint shall have it."""
        packed = self._method.packed(self, packed)
        return {
            **packed,
            "state": {number: storages.packed(entry) for number, entry in packed["state"].items()},
            "param_groups": list(map(storages.packed_group, packed["param_groups"])),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, but in this class's dtypes: torch casts each state to its parameter's dtype.

        Settings of this package that the saved groups lack (those of torch.optim.AdamW lack all) stay as they are. If
        both sides have the same parameter names in another order, each parameter gets its state by name (torch goes by
        position); if the names differ, by position.

        Raises:
            ValueError: the state is of another optimizer, of other shapes, or incomplete; the message names the entry,
                and the optimizer is as it was.
        """
        self._method.catch_up(self)
        loading = _Loading(self)
        # The pre-hook runs after the user's, the post-hook before them. Between the two, torch loads the groups but no
        # state, since it would copy every tensor into the dtype of its parameter.
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, given: loading.checked(given)),
            self.register_load_state_dict_post_hook(lambda _: loading.take(), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._method.constructed(self)

    def _settle(self) -> None:
        """Take over what the groups say now."""
        # A scaler leaves the gradients alone where the step can divide by the scale; else it unscales and skips by
        # itself. With released gradients a scaler would find no gradients and raise an error about that; claiming AMP
        # support lets step() raise ours, which names the cause.
        fused = self._scales and any(group["fused"] for group in self.param_groups)
        self._step_supports_amp_scaling = fused or self._released is not None
        # Dynamo special-cases `param_groups` of torch's optimizers, so compiled code reads this alias instead
        self._groups = self.param_groups
        self._number = compiled.register(self)

    def _release(self, released: Released | None) -> None:
        """Let `released` step each parameter by itself from now on; None ends that."""
        self._released = released
        self._settle()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and our own attributes."""
        self._method.catch_up(self)
        kept = ("_backend", "_planner", "_dtypes", "_scales", "_ours", "_given")
        own = {key: self.__dict__[key] for key in kept}
        return {**super().__getstate__(), **own, "_process_group": self._method.process_group_of_copy(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, or the groups and the state that torch's `load_state_dict` passes."""
        own = dict(state.get("defaults", self.__dict__.get("defaults", {})))
        super().__setstate__(state)
        # torch adds settings of its own to the defaults; groups would have other keys after a load than before, and
        # torch.distributed.checkpoint could not load a full state of the ones into the others
        for key in self.defaults.keys() - own.keys():
            del self.defaults[key]
        if "_planner" in state:  # a shallow copy would share it with the original
            self._planner = self._planner.copied()
        self._written = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._planner.forget()
        self._settle()
        self._method.constructed(self)


class _Loading:
    """One load of a state: checked before torch takes any part of the state, and taken without a second copy."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer, self._method = optimizer, optimizer._method
        groups = optimizer.param_groups
        self._entries: dict[Tensor, dict[str, Any]] = {}
        # a captured step reads its state at fixed addresses; else the old state is freed before the new one is made
        captured = any(group["capturable"] for group in groups)
        with_state = [param for param in params_of(groups) if param in optimizer.state]
        self._before = {
            param: self._method.captured(optimizer, optimizer.state[param]) for param in with_state if captured
        }
        self._live = {
            param: {key: value.dtype for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}
            for param in with_state
        }
        self._settings = [dict(group) if captured else {} for group in groups]

    def checked(self, given: dict[str, Any]) -> dict[str, Any]:
        """Check a state, keep its tensors here, and return what torch shall load: the groups.

        Raises:
            ValueError: the state does not fit; nothing has changed then.
        """
        optimizer, method = self._optimizer, self._method
        own_groups, rule = optimizer.param_groups, optimizer._planner.rule
        if not check_form(given, own_groups):
            return given  # its groups are others: torch raises its own error
        given = {**given, "param_groups": checked_groups(given["param_groups"], rule)}
        given = in_own_dtypes(in_our_order(given, own_groups, method.grouping), own_groups)
        known = (*chain.from_iterable(storages.keys_of(slot.name) for slot in rule.slots), *method.state_keys)
        if "master_weight_bits" in optimizer._ours:
            known = (*known, storages.REST)
        check_state(given, own_groups, rule, known, self._shape_of, method.check_entry, complete=method.complete)
        own = [{key: group[key] for key in optimizer._ours if key in group} for group in own_groups]
        lacking = method.lacking(given)
        saved = [
            {key: value for key, value in group.items() if key not in storages.OWN} for group in given["param_groups"]
        ]
        groups = [{**ours, **lacking, **theirs} for ours, theirs in zip(own, saved, strict=True)]
        for i, (theirs, ours) in enumerate(zip(given["param_groups"], own_groups, strict=True)):
            with named(f"parameter group {i} of the state"):
                storages.check_bits(theirs, ours)
        # for settings that a state of an old torch lacks
        usual = {key: optimizer.defaults[key] for key in optimizer._shared}
        for i, group in enumerate(groups):
            with named(f"parameter group {i} of the state"):
                optimizer._check_settings({**usual, **group}, {**usual, **groups[0]})
                self._check_new_options(group, own_groups[i])
        method.check_loaded(optimizer, groups)
        numbers = dict(pairs_of(groups, own_groups))
        self._entries = {numbers[number]: entry for number, entry in given["state"].items() if entry}
        for param, entry in self._entries.items():
            storages.check_rest(entry, name_of(param, own_groups), group_of(param, own_groups))
        self._check_moments()
        return {**given, "state": {}, "param_groups": groups}

    def take(self) -> None:
        """Take the tensors, once torch has the groups."""
        optimizer, method, rule = self._optimizer, self._method, self._optimizer._planner.rule
        converted: list[str] = []
        for param in dict.fromkeys((*self._entries, *self._before)):
            group = group_of(param, optimizer.param_groups)
            entry = self._unpacked(self._entries[param], param) if param in self._entries else {}
            entry, changed = storages.asked_for(
                method.joined(entry, param, group), self._names, param, group, rule.importance_slot
            )
            converted += [f"{name} of {name_of(param, optimizer.param_groups)}" for name in changed]
            live = self._live.get(param, {})
            if storages.wanted_dtype(group.get("state_dtype"), param) is not None:  # each slot has what was asked for
                live = {**live, **{name: entry[name].dtype for name in self._names if name in entry}}
            state = taken(entry, param, self._before.get(param, {}), live)
            state["step"] = optimizer._planner.clock(optimizer, state["step"], param, group)
            optimizer.state[param] = state
        for group, old in zip(optimizer.param_groups, self._settings, strict=True):
            for key in ("lr", "eps", "weight_decay"):
                if isinstance(old.get(key), Tensor):
                    group[key] = _written(old[key], group[key])
            group["betas"] = tuple(
                _written(ours, beta) if isinstance(ours, Tensor) else beta
                for ours, beta in zip(old.get("betas", (None, None)), group["betas"], strict=True)
            )
        first = optimizer.param_groups[0]
        optimizer.defaults.update({key: first[key] for key in optimizer._shared})
        optimizer._settle()
        method.loaded(optimizer)
        storages.say_converted(converted)

    @property
    def _names(self) -> list[str]:
        """Return the names of the slots, and "importance" where the method keeps one."""
        own = ["importance"] if "importance" in self._method.state_keys else []
        return [*(slot.name for slot in self._optimizer._planner.rule.slots), *own]

    def _shape_of(self, key: str, param: Tensor, entry: dict[str, Any]) -> tuple[int, ...]:
        """Return the shape that `key` of a parameter's state must have in a saved entry."""
        if key.endswith("_scales"):
            return block8.scales_shape(param.shape) if param.dim() > 1 else ()
        return self._method.state_shape(key, param, entry)

    def _unpacked(self, entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
        unpacked = self._method.unpacked(entry, param)
        if unpacked is not None:
            return unpacked
        return {key: value if key == "step" else shard_of(value, param) for key, value in entry.items()}

    def _check_new_options(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        """Check that a group's parameters can have the options that are on in the saved group and off in the group.

        Raises:
            ValueError, NotImplementedError, RuntimeError: a parameter cannot.
        """
        new = [key for key in OPTIONS if saved.get(key) and not own.get(key)]
        for param in own["params"] if new else ():
            try:
                self._optimizer._planner.check_options(
                    self._optimizer, param, {"fused": None, "capturable": False, **saved}
                )
            except AssertionError as error:  # torch's
                name = name_of(param, self._optimizer.param_groups)
                raise ValueError(f"{new[0]}={saved[new[0]]!r} and {name}: {error}") from error

    def _check_moments(self) -> None:
        """Check that the backend, if one was named, can take a step with moments in the dtypes of the loaded state.

        Raises:
            ValueError: it cannot; the message names the moment and the way out.
        """
        optimizer = self._optimizer
        for param, entry in self._entries.items() if optimizer._backend not in ("auto", "reference") else ():
            for key, dtype in moments_of(entry, optimizer._planner.rule, param, self._live.get(param, {})):
                if dtype.is_complex:
                    continue
                with named(f"{key} of {name_of(param, optimizer.param_groups)} is {dtype}"):
                    spec = Spec(optimizer._planner.operation, frozenset({param.dtype}), frozenset({dtype}))
                    registry.choose(spec, param.device, optimizer._backend)


def _written(tensor: Tensor, value: Any) -> Tensor:
    """Write a number, or the one value of a tensor, into a tensor of one value, and return that."""
    given = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    return tensor.copy_(given.reshape(tensor.shape))
