"""IsolatedOptimizer: evolving isolation (EPI, arXiv 2604.14010) around any torch optimizer."""

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

# not by way of torch.optim, where a program may have put other classes in the place of torch's
from torch.optim.lbfgs import LBFGS
from torch.optim.optimizer import Optimizer

from epi_kernels import dispatch, lock, native, ops
from epi_kernels.distributed import given, local, local_gradient, shard_of
from epi_kernels.layers import Grouping, LayersArgument, check_saved
from epi_kernels.optim.base import new_state
from epi_kernels.optim.checkpoint import check_form, check_place, check_tensor, named, pairs_of
from epi_kernels.optim.complex import squared_by_importance
from epi_kernels.optim.drop_in import DropInAdamW
from epi_kernels.optim.groups import check_shared, check_written
from epi_kernels.optim.isolation import CLOCK, SHARED, Isolation, check_settings
from epi_kernels.optim.nonfinite import NonfiniteCounts
from epi_kernels.optim.plain import plain_settings
from epi_kernels.optim.scaling import UNSCALED
from epi_kernels.telemetry import Records

# what torch's optimizers are constructed with, and not all of them: it tells the states of one from those of another
_HYPERPARAMETERS = {
    name
    for each in vars(torch.optim).values()
    if isinstance(each, type) and issubclass(each, Optimizer) and each.__module__.startswith("torch.optim.")
    for name in inspect.signature(each).parameters
} - {"params", "defaults", "foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}


class IsolatedOptimizer(Isolation, Optimizer):
    """Any torch optimizer, kept from moving the most important entries; they are chosen again as training goes on.

    ::

        S <- beta S + (1 - beta) g^2, and every mask_interval steps the top isolation_ratio of the scores: EPIAdamW
        kept <- the protected entries of theta
        base.step()
        the protected entries of theta <- kept

    For 8-bit optimizers, Muon, CPU offload and whatever else moves parameters by its own rule. Protected entries keep
    their bits, whatever `base` does to them. It costs a pass over S and the gradients, 12 bytes for each entry, and
    memory for S and the k protected values; where the base is AdamW, `EPIAdamW` does all of it in one pass.

    It is a torch.optim.Optimizer with the base's groups and state: schedulers, scalers and training loops take it in
    the base's place. `base` itself must no longer be stepped.

    Args:
        base: an optimizer, constructed over its parameters; with ``model.named_parameters()`` layers can be
            transformer blocks. It takes its step without a closure.
        isolation_ratio, importance_beta, mask_interval, layers, normalize, scope, threshold, process_group: as in
            `EPIAdamW`. A group of `base` may carry ``isolation_ratio`` and ``importance_beta`` of its own.
        backend: of the importance and the refresh: "auto", or the name of one, which then runs or raises.

    A checkpoint is the base's, with ``importance`` in each parameter's state and the settings in the groups: it loads
    into `base` alone too, where that ignores what it does not know.

    Raises:
        TypeError: `base` is not a torch.optim.Optimizer.
        ValueError: an argument is out of its range; or `base` isolates by itself, or needs its closure several times.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> base = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = IsolatedOptimizer(base, isolation_ratio=0.1, mask_interval=1)
        >>> model(torch.randn(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> int(sum(optimizer.isolation_mask(p).sum() for p in model.parameters()))  # floor(0.1 * 144)
        14
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        isolation_ratio: float = 0.01,
        importance_beta: float = 0.99,
        mask_interval: int | None = 500,
        layers: LayersArgument = "auto",
        normalize: Literal["layer", "none"] = "layer",
        scope: Literal["global", "layer"] = "global",
        threshold: Literal["exact", "histogram"] = "exact",
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        _check_base(base)
        dispatch.check(backend)
        self._settings: dict[str, Any] = {
            "isolation_ratio": isolation_ratio,
            "importance_beta": importance_beta,
            "mask_interval": mask_interval,
            "layers": layers,
            "normalize": normalize,
            "scope": scope,
            "threshold": threshold,
            "importance": "ema",
        }
        check_settings(self._settings)
        self._settings = plain_settings(self._settings)
        self.base = base
        self._backend = backend
        self._grouping = Grouping(layers)
        self._records = Records()
        self._process_group = process_group
        self._nonfinite = NonfiniteCounts()
        # it makes the hooks of an optimizer; the groups, the state and the defaults stay the base's
        super().__init__([{"params": []}], {})
        self._importances: dict[Tensor, Tensor] = {}
        for group in base.param_groups:
            self._take_group(group)
        # a scaler then unscales the gradients before the step, which importance needs
        self._step_supports_amp_scaling = False

    # What belongs to the base ----------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups; one that was added to the base itself is taken over here, with the settings of ours."""
        groups = self.base.param_groups
        if "_importances" in self.__dict__:  # else torch's constructor asks
            for group in groups:
                if CLOCK not in group:
                    self._take_group(group)
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Leave them: torch's constructor sets an empty list."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state; `importance` and `isolation_mask` show what this class adds."""
        return self.base.state

    @state.setter
    def state(self, state: object) -> None:
        """Leave it, as with the groups."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: object) -> None:
        """Leave them, as with the groups."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; it may bring ``isolation_ratio`` and ``importance_beta``.

        Raises:
            ValueError: a setting is out of its range, or differs where it is one for all groups.
        """
        if "_importances" not in self.__dict__:  # torch's constructor adds an empty one
            return
        self.base.add_param_group(param_group)
        try:
            self._take_group(self.base.param_groups[-1])
        except Exception:
            self.base.param_groups.pop()
            raise

    def _take_group(self, group: dict[str, Any]) -> None:
        """Check a group of the base and write the settings that it lacks into it."""
        # a group that was isolated before, or loaded such a state, has the name of its layers
        own = {**group, "layers": self._settings["layers"]} if "layer_digest" in group else group
        settings = plain_settings({key: own.get(key, value) for key, value in self._settings.items()})
        check_settings(settings)
        check_shared(SHARED, settings, self._settings)
        self._grouping.resolve(named="param_names" in group)
        group.update({**settings, CLOCK: group.get(CLOCK, 0)})
        # from the start: a distributed checkpoint loads what the optimizer has a place for
        self._make_importances(group)
        self._part()
        self._grouping.stamp(self.base.param_groups)

    def _take_written(self) -> None:
        """Take over the settings that a program has written into the groups: those for all must be in all of them.

        Raises:
            ValueError: one is out of its range, differs between groups or cannot change; nothing has changed then.
        """
        groups = self.param_groups
        for group in groups:
            check_settings(group)
        layers = (self._grouping.name, self._settings["layers"])
        check_written(groups, SHARED, {"importance": ("ema",), "layers": layers})
        self._settings.update({key: groups[0][key] for key in SHARED if key != "layers"} if groups else {})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do what the base does."""
        self.base.zero_grad(set_to_none)

    # The step --------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the base and put the protected entries back.

        Args:
            closure: evaluated first, with gradients enabled; its value is returned.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_written()
        groups = self.param_groups
        stepping = {
            param: group
            for group in groups
            for param in group["params"]
            if param.grad is not None and group["isolation_ratio"] > 0
        }
        for param in stepping:
            if param.grad.is_sparse:
                raise RuntimeError(
                    f"{self._name(param)} has a sparse gradient; importance needs dense ones. Give its group "
                    "isolation_ratio=0"
                )
        if self._holds_nothing() or any(param.grad is not None for group in groups for param in group["params"]):
            self._advance(stepping)
        locks = [
            (param, self._importances[param])
            for group in groups
            for param in group["params"]
            if group["isolation_ratio"] > 0 and param in self._importances
        ]
        kept = [local(param)[lock.is_locked(local(signed))] for param, signed in locks]
        self.base.step()
        for (param, signed), values in zip(locks, kept, strict=True):
            if values.numel():
                local(param).masked_scatter_(lock.is_locked(local(signed)), values)
        self._nonfinite.warn(self._names)
        return loss

    def _advance(self, stepping: dict[Tensor, dict[str, Any]]) -> None:
        """Count the step and advance the importance; refresh if it is time."""
        self._meet()
        clock = self._latest_clock() + 1
        self._keep_clock(clock)
        for group in self.param_groups:
            self._make_importances(group)  # a group may have joined since
        interval = self.param_groups[0]["mask_interval"]
        if interval is not None and clock % interval == 0:
            self._refresh([param for param in stepping if param.requires_grad], UNSCALED, clock)
            stepping = {param: group for param, group in stepping.items() if not param.requires_grad}
        for device in dict.fromkeys(param.device for param in stepping):
            here = [param for param in stepping if param.device == device]
            if self._backend == "auto" and any(param.dtype in native.DTYPES for param in here):
                dispatch.say_if_slow(device)
            betas = [stepping[param]["importance_beta"] for param in here]
            ops.importance_(
                [local(self._importances[param]) for param in here],
                [squared_by_importance(local_gradient(param)) for param in here],
                torch.zeros(1, 2, dtype=torch.float32, device=device),  # nobody asks for a range between two refreshes
                self._nonfinite.counter(here),
                torch.tensor([(beta, 1.0 - beta) for beta in betas], dtype=torch.float64, device="cpu"),
                [0] * len(here),
                True,
                None,
                None,
                self._backend,
            )

    def _make_importances(self, group: dict[str, Any]) -> None:
        """Create the importance of the parameters of a group that can be protected and have none."""
        for param in group["params"]:
            if group["isolation_ratio"] > 0 and param not in self._importances:
                self._importances[param] = new_state(param, "importance")

    def _signed_importance(self, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        return self._importances.get(param) if group["isolation_ratio"] > 0 else None

    def _latest_clock(self) -> int:
        return int(self.param_groups[0][CLOCK])

    def __repr__(self) -> str:
        """Return the base's text and the grouping and backend in force."""
        return f"{type(self).__name__} of {self.base!r}\n{self._isolation_text()}"

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state with ``importance`` in the entry of each parameter that has one.

        Raises:
            ValueError: a setting that is one for all groups, or cannot change, was written into one.
        """
        self._take_written()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = self.base.state_dict()
        state = dict(packed["state"])
        for number, param in pairs_of(packed["param_groups"], self.param_groups):
            if param in self._importances:
                state[number] = {**state.get(number, {}), "importance": self._importances[param]}
        packed = {**packed, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or one of the base, whose importance then starts at 0.

        A whole state of one process loads into DTensors: each rank takes its shard.

        Raises:
            ValueError: the state is of another optimizer than the base, of other shapes or another grouping of the
                parameters into layers, or a setting is out of its range; the message names the entry.

        Whatever is raised, by the base too, nothing has changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        importances: dict[Tensor, Tensor] = {}
        if check_form(state_dict, self.param_groups):  # else the base says
            state_dict = {**state_dict, "state": self._checked_entries(state_dict, importances)}
        own = [{key: group[key] for key in (*self._settings, "layer_digest")} for group in self.param_groups]
        before = dict(vars(self.base))
        try:
            self.base.load_state_dict(state_dict)
            for i, (group, had) in enumerate(zip(self.base.param_groups, before["param_groups"], strict=True)):
                missing = [key for key in self.base.defaults if key in had and key not in group]
                if missing:
                    raise ValueError(
                        f"parameter group {i} of the state has no {', '.join(missing)}: it is not of "
                        f"{type(self.base).__name__}, the base"
                    )
        except BaseException:
            vars(self.base).update(before)
            raise
        for group, settings in zip(self.base.param_groups, own, strict=True):
            for key, value in {**settings, CLOCK: 0}.items():
                group.setdefault(key, value)
        self._importances.clear()  # before the new ones are on a device
        self._importances.update({p: s.to(p.device, torch.float32) for p, s in importances.items()})
        for group in self.param_groups:
            self._make_importances(group)
        self._settings.update({key: self.param_groups[0][key] for key in SHARED if key != "layers"})
        self._grouping.adopt(self.param_groups)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked_entries(self, state_dict: dict[str, Any], importances: dict[Tensor, Tensor]) -> dict[Any, Any]:
        """Check a saved state, put its importances aside, and return the entries that are left for the base."""
        saved_groups = state_dict["param_groups"]
        check_saved(saved_groups, self.param_groups)
        own = [{key: group[key] for key in self._settings} for group in self.param_groups]
        for i, (ours, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            group = {**own[i], CLOCK: 0, **saved}
            with named(f"parameter group {i} of the state"):
                check_settings(group)
                check_shared(SHARED, group, {**own[0], **saved_groups[0]})
                if group["importance"] != "ema":
                    raise ValueError(
                        f"importance={group['importance']!r}: a base has no place for it; only 'ema' loads"
                    )
                if not isinstance(group[CLOCK], int) or group[CLOCK] < 0:
                    raise ValueError(f"Invalid {CLOCK}: {group[CLOCK]!r}; it is a number of steps, >= 0")
                foreign = sorted((_HYPERPARAMETERS - self.base.defaults.keys()) & (saved.keys() - ours.keys()))
                if foreign and _is_torchs(self.base):
                    raise ValueError(f"{type(self.base).__name__}, the base, has no {', '.join(foreign)}")
        entries = dict(state_dict["state"])
        for number, param in pairs_of(saved_groups, self.param_groups):
            entry, name = entries.pop(number, {}), self._name(param)
            if not isinstance(entry, dict):
                raise ValueError(f"the state of {name} is a {type(entry).__name__} and not a dict")
            rest = {key: self._of_base(key, value, param, name) for key, value in entry.items() if key != "importance"}
            if "importance" in entry:
                check_tensor("importance", entry["importance"], param, name, tuple(param.shape))
                importances[param] = shard_of(entry["importance"], param)
            if rest:  # some bases take an entry that is there for one of their own
                entries[number] = rest
        return entries

    def _of_base(self, key: str, value: Any, param: Tensor, name: str) -> Any:
        """Check an item of the base's state, and return it: of a whole tensor this rank's shard."""
        if not isinstance(value, Tensor):
            return value
        whole = tuple(param.shape)
        if _is_torchs(self.base):
            # a number, an entry each, or of Adafactor's one for each row or column
            fits = value.dim() == len(whole) and all(a in (1, b) for a, b in zip(value.shape, whole, strict=True))
            check_place(key, value, param, name, tuple(value.shape) if fits or value.numel() == 1 else whole)
        return shard_of(value, param) if key != "step" and tuple(value.shape) == whole else value

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        kept = ("base", "_backend", "_settings", "_grouping", "_records", "_nonfinite", "_importances")
        group = {"_process_group": given(self._process_group)}
        return {**{key: self.__dict__[key] for key in kept}, **group, "_step_supports_amp_scaling": False}


def _is_torchs(base: Optimizer) -> bool:
    return type(base).__module__.startswith("torch.optim.")


def _check_base(base: object) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}; pass a torch.optim.Optimizer")
    if isinstance(base, (DropInAdamW, IsolatedOptimizer)):
        raise ValueError(f"{type(base).__name__} locks entries by itself; pass it no further optimizer around it")
    if isinstance(base, LBFGS):
        raise ValueError("LBFGS moves the parameters several times in a step, by gradients of its own closure calls")
