"""IsolatedOptimizer: evolving isolation (EPI, arXiv 2604.14010) around any torch optimizer."""

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor

# imported from their modules: in torch.optim a program may have replaced torch's classes
from torch.optim.lbfgs import LBFGS
from torch.optim.optimizer import Optimizer

from epi_kernels.backends import registry
from epi_kernels.distributed import given, local, local_gradient
from epi_kernels.engine import storages
from epi_kernels.engine.checkpoint import check_form, in_our_order, pairs_of
from epi_kernels.engine.complex import squared_by_importance
from epi_kernels.engine.groups import name_of, params_of
from epi_kernels.engine.optimizer import FusedOptimizer
from epi_kernels.engine.settings import check_shared, check_written, plain_settings
from epi_kernels.engine.storages import StorageArgument
from epi_kernels.isolation.advance import Advance, Rounding
from epi_kernels.isolation.based import OURS, as_before, checked_entries, clock_of, in_torchs_form, own_form
from epi_kernels.isolation.guest import Guest, Held, HostedIsolation, check_storages, stepping_of, storage_settings
from epi_kernels.isolation.isolating import Isolating
from epi_kernels.isolation.isolation import Isolation
from epi_kernels.isolation.layers import LayersArgument
from epi_kernels.isolation.protected import Protected, lock_again, put_back
from epi_kernels.isolation.settings import CLOCK, SETTINGS, SHARED, check_settings
from epi_kernels.isolation.telemetry import numbers_of_all
from epi_kernels.storage import VALUES
from epi_kernels.storage.noise import Place, whole


class IsolatedOptimizer(Isolating, Optimizer):
    """Any torch optimizer, kept from moving the most important entries; they are chosen again as training goes on.

    ::

        S <- beta S + (1 - beta) g^2, and every mask_interval steps the top isolation_ratio of the scores: EPIAdamW
        kept <- the protected entries of theta
        base.step()
        the protected entries of theta <- kept

    For 8-bit optimizers, Muon, CPU offload and any other optimizer with a rule of its own. Protected entries keep their
    bits, whatever `base` does to them. A step reads and writes S and reads the gradients (12 bytes for each entry with
    float32 gradients), and reads and writes the k protected values twice. Memory is 4 bytes for each entry, or 2 or
    1.06 as `importance_dtype` says, and, for each protected one, 8 bytes and its value. If the base is AdamW,
    `EPIAdamW` does all of this in one pass. A step waits for an accelerator only if it refreshes, or is the first after
    something else has changed the masks.

    It is a torch.optim.Optimizer with the base's groups, state and defaults: schedulers, scalers and training loops
    take it in the base's place. Other attributes of `base`, such as ``train`` and ``eval``, are passed on; protected
    entries keep their bits in such calls too. `base` itself must no longer be stepped.

    Args:
        base: an optimizer, constructed over its parameters; with ``model.named_parameters()`` layers can be
            transformer blocks. It takes its step without a closure.
        isolation_ratio, importance_beta, mask_interval, layers, normalize, scope, threshold, process_group: as in
            `EPIAdamW`. A group of `base` may carry ``isolation_ratio`` and ``importance_beta`` of its own.
        importance_dtype: how the importance is kept. None and torch.float32: float32. torch.bfloat16: 2 bytes, always
            rounded stochastically. "8bit": 1 byte and a scale for each 64 entries of a row, for parameters of at least
            2 dimensions, 4096 entries and rows of 64; bfloat16 for the others. A group of `base` may carry its own, and
            ``rounding_seed`` (0 by default). The noise is that of `EPIAdamW`, but for its clock: here it is the number
            of steps that the optimizer has taken, since `base` may count none for a parameter.
        backend: what runs importance and refresh: "auto", or the name of a backend, which then runs or raises.

    From its first step on, or from the start if `base` has a state, ``state[p]["importance"]`` is S with the lock in
    its sign bit (see `epi_kernels.lock`), for each parameter that requires a gradient. In blocks of 8 bits S is under
    ``importance_codes``, with the lock in the top bit of a byte, and ``importance_scales``. While `base` runs, the
    importance is taken out: `base` sees only the state that it made. A parameter whose importance was deleted starts
    over at 0, with nothing protected. An importance that is kept otherwise than its group asks, since a program has
    written another ``importance_dtype`` there, is converted at the next step, rounded to nearest; its locks stay.

    A checkpoint is the base's, with the importance in each parameter's state and the settings in the groups: it also
    loads into a bare `base`, if that ignores unknown keys. If the checkpoints of `base` have a form of their own, ours
    contains it unchanged under ``base``. A load converts importances too, since ``importance_dtype`` stays as it is.

    Raises:
        TypeError: `base` is not a torch.optim.Optimizer.
        ValueError: an argument is out of its range; or `base` isolates by itself, or needs its closure several times;
            or no parameter is large enough for ``importance_dtype="8bit"``.
        NotImplementedError: a parameter whose importance is not to be in float32 is float64 or complex, or is sharded
            so that a shard cuts blocks, or over several of its inner dimensions.

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
        importance_dtype: StorageArgument = None,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        _check_base(base)
        registry.check(backend)
        self._settings: dict[str, Any] = {
            "isolation_ratio": isolation_ratio,
            "importance_beta": importance_beta,
            "mask_interval": mask_interval,
            "layers": layers,
            "normalize": normalize,
            "scope": scope,
            "threshold": threshold,
            "importance": "ema",
            "importance_dtype": importance_dtype,
            "rounding_seed": 0,
        }
        check_settings(self._settings)
        self._settings = plain_settings(self._settings)
        self._backend, self._process_group = backend, process_group
        self._method = HostedIsolation(layers)
        self._guest, self._entries, self._advances = Guest(), Protected(), Advance()
        self._own_state: defaultdict[Tensor, Any] = defaultdict(dict)
        # torch's constructor makes the hooks; the groups, state and defaults that it assigns are dropped, since they
        # are the base's, and there is no base yet
        super().__init__([{"params": []}], {})
        self.base = base
        self._check_new()
        for group in base.param_groups:
            self._take_group(group)
        # so a scaler unscales the gradients before the step: the importance needs that
        self._step_supports_amp_scaling = False

    @property
    def _isolation(self) -> Isolation:
        return self._method

    # What belongs to the base ----------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups; groups that were added to the base itself are taken over at the next step or save."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "base" in vars(self):  # without a base, it is torch's constructor that assigns
            self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state, with the importance of each parameter; only the importances if the base has no state."""
        state = getattr(self.base, "state", None)
        return state if isinstance(state, MutableMapping) else self._own_state  # type: ignore[return-value]

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if "base" in vars(self):
            self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if "base" in vars(self):
            self.base.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base; protected entries keep their bits while a method of the base runs."""
        base = vars(self).get("base")
        if base is None or name.startswith("_") or not hasattr(base, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(base, name)
        if not inspect.ismethod(found):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            kept = self._entries.keep(self)
            try:
                with self._guest.aside(self):
                    return found(*args, **kwargs)
            finally:
                put_back(kept)

        return call

    # Groups ----------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; it may bring the settings that a group may have of its own.

        Raises:
            NotImplementedError: see the class.
            ValueError: a setting, of this group or one that a program wrote into an earlier one, is out of its range,
                or differs between groups where it must be equal in all.
        """
        if "base" not in vars(self):  # torch's constructor adds an empty group
            return
        self._take_groups()
        self._take_written()  # a setting written into every group holds for this one too
        with self._guest.aside(self):
            self.base.add_param_group(param_group)
        try:
            self._check_new()
            self._take_group(self.base.param_groups[-1])
        except Exception:
            self.base.param_groups.pop()
            raise

    def _take_groups(self) -> None:
        """Take over groups that lack our settings, and parameters that other code has put into the groups."""
        groups = self.param_groups
        lacking = [group for group in groups if any(key not in group for key in (*SETTINGS, CLOCK, "layer_digest"))]
        if lacking:
            self._check_new()
        for group in lacking:
            self._take_group(group)
        params = [id(param) for group in groups for param in group["params"]]
        if params != self._taken:
            self._taken, self._checked = params, None
            self._entries.forget()
            self._advances = Advance()
            self._isolation.competition.part()

    def _settings_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a group of the base, with the optimizer's for those that it lacks.

        Raises:
            ValueError: one is out of its range, or differs from what is one for all groups.
        """
        # a group of another IsolatedOptimizer, or one that has loaded its state, has the name of a grouping
        own = {**group, "layers": self._settings["layers"]} if "layer_digest" in group else group
        settings = plain_settings({key: own.get(key, value) for key, value in self._settings.items()})
        check_settings(settings, "exp_avg_sq")
        storages.check_settings(storage_settings(settings))
        check_shared(SHARED, settings, self._settings)
        return settings

    def _check_new(self) -> None:
        """Check the settings that all groups of the base have, or would get, and what they ask for.

        Raises:
            ValueError, NotImplementedError: a setting is out of its range, or a parameter cannot have what it says.
        """
        groups = self.param_groups
        check_storages([{**group, **self._settings_of(group)} for group in groups], groups)

    def _check_storages(self) -> None:
        """Check that every importance can be kept as its group asks, where something that matters has changed.

        Raises:
            ValueError, NotImplementedError: see `check_storages`; nothing has changed then.
        """
        groups = self.param_groups
        asked = [group.get("importance_dtype") for group in groups]
        if all(setting is None for setting in asked):
            return
        seen = [asked, [g["isolation_ratio"] for g in groups], [(type(p), p.dtype) for p in params_of(groups)]]
        if seen != self._checked:
            check_storages(groups, groups)
            self._checked = seen

    def _take_group(self, group: dict[str, Any]) -> None:
        """Write the settings that a group of the base lacks into it, after a check of their ranges."""
        settings = self._settings_of(group)
        grouping = self._isolation.grouping
        grouping.resolve(named="param_names" in group)
        group.update(storages.said(settings))
        self._isolation.join(self.param_groups, group)
        grouping.stamp(self.param_groups)
        self._make_places()

    def _make_importances(self) -> list[Tensor]:
        """Make the importance of the parameters that can be protected and have none, and return these parameters."""
        made = self._guest.make(self)
        for param, signed in made:
            self._entries.nothing(param, signed)
        return [param for param, _ in made]

    def _make_places(self) -> None:
        """Make the importances if there is a state already: a distributed checkpoint loads only keys that are there.

        Without a state, torch.distributed.checkpoint takes a step with zero gradients, which makes one.
        """
        if self.state and all("isolation_ratio" in group for group in self.param_groups):
            self._make_importances()

    def _take_written(self) -> None:
        """Take over settings that a program has written into groups; one that holds for all must be in all of them.

        Raises:
            ValueError: a setting is out of range, differs between groups or cannot change; nothing has changed then.
        """
        groups = self.param_groups
        for group in groups:
            storages.check_settings(storage_settings(group))
            check_settings(group, "exp_avg_sq")  # `check_written` says that it cannot be "exp_avg_sq" here
        layers = (self._isolation.grouping.name, self._settings["layers"])
        check_written(groups, SHARED, {"importance": ("ema",), "layers": layers})
        self._settings.update({key: groups[0][key] for key in SHARED if key != "layers"} if groups else {})

    # The step --------------------------------------------------------------------------------------------------------

    _taken: list[int] | None = None  # ids of the parameters that were in the groups when they were last looked at
    _checked: list[Any] | None = None  # on what `_check_storages` last had no objection

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call the base's zero_grad."""
        self.base.zero_grad(set_to_none)

    def refresh(self) -> None:
        """Choose the protected entries now; see `EPIAdamW.refresh`."""
        self._take_groups()
        try:
            super().refresh()
        finally:
            self._entries.forget()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the base and put the protected entries back.

        If `base` raises, the clock, the masks, the telemetry and the protected entries are as before the step. The
        importance, an average over many steps, has advanced: to undo that, every step would have to copy all of it.

        Args:
            closure: evaluated first, with gradients enabled; its value is returned.

        Raises:
            RuntimeError: a gradient is sparse, a parameter has no values (meta), or the parameters are not the named
                ones: DeepSpeed ZeRO has put flat partitions in their place.
            ValueError: an importance in the state is not that of its parameter; or, as in the class, what a program has
                written into a group cannot be.
            NotImplementedError: see the class.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_groups()
        self._take_written()
        self._check_storages()
        stepping = stepping_of(self)
        self._guest.check(self)
        isolation, before = self._isolation, self._entries.keep(self)
        clocks, iteration = [(group, group[CLOCK]) for group in self.param_groups], copy.deepcopy(isolation.iteration)
        kept, made, records = before, self._make_importances(), None
        try:
            isolation.competition.meet(self)
            clock, interval = isolation.count_step(self.param_groups), self.param_groups[0]["mask_interval"]
            if interval is not None and clock % interval == 0:
                records = isolation.records.kept()
                self._entries.forget()
                isolation.refresh(self, [param for param in stepping if param.requires_grad], clock=clock)
                kept = self._entries.keep(self)
                stepping = {param: group for param, group in stepping.items() if not param.requires_grad}
            self._advance(stepping)
            with self._guest.aside(self):
                self.base.step()
        except BaseException:
            self._entries.forget()
            put_back(kept)
            put_back(before)  # a refresh may have released some of these
            for group, number in clocks:
                group[CLOCK] = number
            isolation.iteration = iteration
            for param in made:
                self._guest.drop(self, param)
            if records is not None:
                isolation.records.bring_back(records)
                lock_again(self, before)
            raise
        put_back(kept)
        isolation.nonfinite.warn(self.param_groups)
        return loss

    def _advance(self, stepping: dict[Tensor, dict[str, Any]]) -> None:
        """Advance the importance with the gradients."""
        state = self.state
        for device in dict.fromkeys(param.device for param in stepping):
            here = [param for param in stepping if param.device == device]
            if self._backend == "auto" and any(param.dtype in VALUES for param in here):
                registry.say_if_slow(device)
            held = [storages.stored(state[param], "importance") for param in here]
            signed = [one for one, _ in held if one is not None]
            self._advances.step_(
                [local(one) for one in signed],
                [squared_by_importance(local_gradient(param)) for param in here],
                [stepping[param]["importance_beta"] for param in here],
                self._isolation.nonfinite.counter(here),
                self._backend,
                self._rounding(stepping, here, held) if any(one.dtype != torch.float32 for one in signed) else None,
            )
            for param, one in zip(here, signed, strict=True):
                self._entries.same_masks(param, one)

    def _rounding(
        self,
        stepping: dict[Tensor, dict[str, Any]],
        here: list[Tensor],
        held: list[tuple[Tensor | None, Tensor | None]],
    ) -> Rounding:
        """Return what the importances of these parameters, not all in float32, need to be rounded."""

        def places() -> list[Place]:
            # the place of a float32 importance is not read, and it may have none
            return [
                whole(0, param.shape)
                if signed is None or signed.dtype == torch.float32
                else self._method.place(self, param, stepping[param])
                for param, (signed, _) in zip(here, held, strict=True)
            ]

        scales = [None if scales is None else local(scales) for _, scales in held]
        depends = [(id(param), stepping[param].get("rounding_seed", 0)) for param in here]
        return Rounding(scales, places, depends, self._method.latest_clock(self.param_groups))

    def __repr__(self) -> str:
        """Return the base's text and the grouping and backend in force."""
        return f"{type(self).__name__} of {self.base!r}\n{self._isolation.text(self)}"

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self, *, telemetry: bool = False) -> dict[str, Any]:
        """Return the base's state with the importance in the entry of each parameter that has one.

        Args:
            telemetry: add the records of the last refreshes under "telemetry", from where `load_state_dict` takes them.

        Raises:
            ValueError: a program has written a setting into one group that must be equal in all, or cannot change.
        """
        self._take_groups()
        self._take_written()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        with self._guest.aside(self) as aside:
            packed = self.base.state_dict()
            if not in_torchs_form(packed, self.param_groups):
                packed = {"base": packed, **own_form(self.param_groups)}
            state = dict(packed["state"])
            for number, param in pairs_of(packed["param_groups"], self.param_groups):
                if param in aside:
                    state[number] = {**state.get(number, {}), **aside[param]}
        packed = {**packed, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, packed)
            packed = packed if changed is None else changed
        return {**packed, "telemetry": self.telemetry()} if telemetry else packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or one of the base, whose importance then starts at 0.

        A whole state of one process loads into DTensors: each rank takes its shard. An importance that was kept
        otherwise than its group here asks is converted, rounded to nearest, and a warning says so. Records of refreshes
        load if the state has any.

        Raises:
            ValueError: the state is of another optimizer than the base, of other shapes or another grouping of the
                parameters into layers, a setting is out of its range, or a record of a refresh is none; the message
                names the entry.

        Nothing has changed after any error, the base's own included.
        """
        self._take_groups()
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        records = state_dict.get("telemetry")
        numbers = numbers_of_all(records or ())
        state_dict = {key: value for key, value in state_dict.items() if key != "telemetry"}
        importances: dict[Tensor, Held] = {}
        converted: list[str] = []
        with self._guest.aside(self) as aside, as_before(self.base):
            packed = self.base.state_dict()
            plain, of_base = in_torchs_form(packed, self.param_groups), state_dict
            if not plain and "base" not in state_dict and not {"state", "param_groups"} & state_dict.keys():
                state_dict = {"base": state_dict, **own_form(self.param_groups)}  # saved by a bare base
                for group in state_dict["param_groups"]:
                    del group[CLOCK]
            if check_form(state_dict, self.param_groups):  # else the base raises
                state_dict = in_our_order(state_dict, self.param_groups, self._isolation.grouping)
                entries = checked_entries(self.base, self.param_groups, state_dict, importances)
                of_base = {**state_dict, "state": entries}
            if not plain:
                if "base" not in state_dict:
                    raise ValueError(
                        f"the state has no 'base': it is not of IsolatedOptimizer around {type(self.base).__name__}"
                    )
                of_base = state_dict["base"]
            own = [{key: group[key] for key in (*OURS, "layer_digest") if key in group} for group in self.param_groups]
            clock = clock_of(state_dict)
            of_param = {p: storage_settings(group) for group in self.param_groups for p in group["params"]}
            had = [group.keys() for group in packed["param_groups"]] if plain else []
            self.base.load_state_dict(of_base)
            for i, (group, keys) in enumerate(zip(self.param_groups, had, strict=False)):
                missing = [key for key in self.base.defaults if key in keys and key not in group]
                if missing:
                    raise ValueError(
                        f"parameter group {i} of the state has no {', '.join(missing)}: it is not of "
                        f"{type(self.base).__name__}, the base"
                    )
            aside.clear()  # frees the old importances before the new ones go to a device
            for param, saved_as in importances.items():
                asked = of_param[param]
                held, others = storages.asked_for(saved_as, ["importance"], param, asked, None)
                usual = {"importance": torch.float32} if asked.get("importance_dtype") is None else {}
                aside[param] = {key: one.to(param.device, usual.get(key, one.dtype)) for key, one in held.items()}
                converted += [f"importance of {name_of(param, self.param_groups)}" for _ in others]
        if not plain:
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
                group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        for group, settings in zip(self.param_groups, own, strict=True):
            for key, value in settings.items():
                group.setdefault(key, value)
            group.pop("importance_dtype", None)
            group.update({key: value for key, value in settings.items() if key == "importance_dtype"})
        self._isolation.start_iteration()
        self._isolation.keep_clock(self.param_groups, self.param_groups[0].get(CLOCK, clock))
        self._settings.update({key: self.param_groups[0][key] for key in SHARED if key != "layers"})
        self._isolation.grouping.adopt(self.param_groups)
        self._make_places()
        self._entries.forget()
        self._advances = Advance()
        self._isolation.competition.part()
        if records is not None:
            self._isolation.take_records(numbers)
        storages.say_converted(converted)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        kept = ("_backend", "_settings", "_method", "_guest", "_entries", "_own_state")
        base, importances = self._guest.base_alone(self.base)
        return {
            **{key: self.__dict__[key] for key in kept},
            "base": base,
            "_copied": importances,
            "_process_group": given(self._process_group),
            "_step_supports_amp_scaling": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        state = dict(state)
        copied = state.pop("_copied", {})
        super().__setstate__(state)
        self._method = copy.copy(self._method)  # a shallow copy would share it with the original
        self._advances = Advance()
        for param, held in copied.items():
            self._guest.put(self, param, held)
        self._isolation.iteration.parameters = len(params_of(self.param_groups))


def _check_base(base: object) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}; pass a torch.optim.Optimizer")
    if isinstance(base, (FusedOptimizer, IsolatedOptimizer)):
        raise ValueError(f"{type(base).__name__} locks entries by itself; pass it no further optimizer around it")
    if isinstance(base, LBFGS):
        raise ValueError("LBFGS moves the parameters several times in a step, by gradients of its own closure calls")
