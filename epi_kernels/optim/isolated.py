"""IsolatedOptimizer: evolving isolation (EPI, arXiv 2604.14010) around any torch optimizer."""

import copy
import functools
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

# not by way of torch.optim, where a program may have put other classes in the place of torch's
from torch.optim.lbfgs import LBFGS
from torch.optim.optimizer import Optimizer

from epi_kernels import lock, ops
from epi_kernels.backends import native
from epi_kernels.backends import registry as dispatch
from epi_kernels.distributed import given, local, local_gradient, shard_of
from epi_kernels.layers import Grouping, LayersArgument, check_saved, has_names
from epi_kernels.ops.flat import put_
from epi_kernels.optim.base import new_state
from epi_kernels.optim.checkpoint import check_form, check_place, check_tensor, in_our_order, named, pairs_of
from epi_kernels.optim.complex import squared_by_importance
from epi_kernels.optim.drop_in import DropInAdamW
from epi_kernels.optim.groups import check_shared, check_written
from epi_kernels.optim.isolation import CLOCK, SHARED, Isolation, check_settings
from epi_kernels.optim.nonfinite import NonfiniteCounts
from epi_kernels.optim.plain import plain_settings
from epi_kernels.optim.scaling import UNSCALED, Scaling
from epi_kernels.telemetry import Records

# what torch's optimizers are constructed with, and not all of them: it tells the states of one from those of another
_HYPERPARAMETERS = {
    name
    for each in vars(torch.optim).values()
    if isinstance(each, type) and issubclass(each, Optimizer) and each.__module__.startswith("torch.optim.")
    for name in inspect.signature(each).parameters
} - {"params", "defaults", "foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}


class _Kept(NamedTuple):
    """Protected entries of a parameter, as they were."""

    param: Tensor
    positions: Tensor  # int64, in row-major order of what this rank holds
    values: Tensor


class _Positions(NamedTuple):
    """Where the protected entries of a parameter are, and what tells that they still are there."""

    signed: weakref.ref[Tensor]  # weak: the program may move a state away, and wants its memory then
    seen: tuple[int, int]  # address and version of its memory
    positions: Tensor


class IsolatedOptimizer(Isolation, Optimizer):
    """Any torch optimizer, kept from moving the most important entries; they are chosen again as training goes on.

    ::

        S <- beta S + (1 - beta) g^2, and every mask_interval steps the top isolation_ratio of the scores: EPIAdamW
        kept <- the protected entries of theta
        base.step()
        the protected entries of theta <- kept

    For 8-bit optimizers, Muon, CPU offload and whatever else moves parameters by its own rule. Protected entries keep
    their bits, whatever `base` does to them. A step reads and writes S and reads the gradients (12 bytes for each
    entry with float32 gradients), and reads and writes the k protected values twice. Memory is 4 bytes for each entry
    and, for each protected one, 8 bytes and its value. Where the base is AdamW, `EPIAdamW` does all of it in one pass.
    On an accelerator no step waits for it, but for those that refresh and the first one after the masks were changed by
    other means.

    It is a torch.optim.Optimizer with the base's groups, state and defaults: schedulers, scalers and training loops
    take it in the base's place. What else `base` has, such as ``train`` and ``eval``, is passed on; protected entries
    keep their bits around such calls too. `base` itself must no longer be stepped.

    Args:
        base: an optimizer, constructed over its parameters; with ``model.named_parameters()`` layers can be
            transformer blocks. It takes its step without a closure.
        isolation_ratio, importance_beta, mask_interval, layers, normalize, scope, threshold, process_group: as in
            `EPIAdamW`. A group of `base` may carry ``isolation_ratio`` and ``importance_beta`` of its own.
        backend: of the importance and the refresh: "auto", or the name of one, which then runs or raises.

    From its first step on, or from the start where `base` has a state, ``state[p]["importance"]`` is S in float32 with
    the lock in its sign bit (see `epi_kernels.lock`), for each parameter that requires a gradient. While `base` runs it
    is not there: `base` sees the state that it made. A parameter whose ``importance`` was deleted starts over at 0,
    with nothing locked.

    A checkpoint is the base's, with ``importance`` in each parameter's state and the settings in the groups: it loads
    into `base` alone too, where that ignores what it does not know. Where the checkpoints of `base` have a form of
    their own, they are in ours, whole, under ``base``.

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
        self._backend = backend
        self._grouping = Grouping(layers)
        self._records = Records()
        self._process_group = process_group
        self._nonfinite = NonfiniteCounts()
        self._own_state: defaultdict[Tensor, Any] = defaultdict(dict)
        self._emptied: set[Tensor] = set()
        self._positions: dict[int, _Positions] = {}  # by id of the parameter
        # it makes the hooks of an optimizer; what it assigns else is lost, since there is no base yet that it could
        # belong to
        super().__init__([{"params": []}], {})
        self.base = base
        for group in base.param_groups:
            self._take_group(group)
        # a scaler then unscales the gradients before the step, which importance needs
        self._step_supports_amp_scaling = False

    # What belongs to the base ----------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups; those that were added to the base itself are taken over at the next step or save."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "base" in vars(self):  # else torch's constructor assigns
            self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state, with the importance of each parameter; of a base without one, the importance alone."""
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
        """Return what the base has and this class has not; protected entries keep their bits around its methods."""
        base = vars(self).get("base")
        if base is None or name.startswith("_") or not hasattr(base, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(base, name)
        if not inspect.ismethod(found):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            kept = self._protected()
            try:
                with self._set_aside():
                    return found(*args, **kwargs)
            finally:
                self._put_back(kept)

        return call

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; it may bring ``isolation_ratio`` and ``importance_beta``.

        Raises:
            ValueError: a setting is out of its range, or differs where it is one for all groups; of the groups that are
                there too.
        """
        if "base" not in vars(self):  # torch's constructor adds an empty one
            return
        self._take_groups()
        self._take_written()  # what was written into every group holds for this one too
        with self._set_aside():
            self.base.add_param_group(param_group)
        try:
            self._take_group(self.base.param_groups[-1])
        except Exception:
            self.base.param_groups.pop()
            raise

    def _take_groups(self) -> None:
        """Take over the groups that lack our settings, and parameters that others have put into the groups."""
        groups = self.param_groups
        for group in groups:
            if any(key not in group for key in (*self._settings, CLOCK, "layer_digest")):
                self._take_group(group)
        params = [id(param) for group in groups for param in group["params"]]
        if params != self._taken:
            self._taken = params
            self._positions.clear()
            self._part()

    def _take_group(self, group: dict[str, Any]) -> None:
        """Check a group of the base and write the settings that it lacks into it."""
        # a group that was isolated before, or loaded such a state, has the name of its layers
        own = {**group, "layers": self._settings["layers"]} if "layer_digest" in group else group
        settings = plain_settings({key: own.get(key, value) for key, value in self._settings.items()})
        check_settings(settings)
        check_shared(SHARED, settings, self._settings)
        self._grouping.resolve(named="param_names" in group)
        group.update(settings)
        self._admit(group)
        self._grouping.stamp(self.param_groups)
        self._make_places()

    # The importance in the base's state ------------------------------------------------------------------------------

    def _signed_importance(self, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        entry = self.state.get(param)
        if not group.get("isolation_ratio", self._settings["isolation_ratio"]) or not isinstance(entry, MutableMapping):
            return None
        return entry.get("importance")

    def _put_importance(self, param: Tensor, signed: Tensor) -> None:
        """Put an importance into the state of a parameter.

        Raises:
            TypeError: the state of the parameter is no dict.
        """
        state = self.state
        entry = state.get(param)
        if entry is None:
            entry = state[param] = {}
        elif not isinstance(entry, MutableMapping):
            raise TypeError(
                f"the state of {self._name(param)} is a {type(entry).__name__}; the importance needs a dict"
            )
        elif not entry:
            self._emptied.add(param)
        entry["importance"] = signed

    @contextmanager
    def _set_aside(self) -> Iterator[dict[Tensor, Tensor]]:
        """Take the importances out of the base's state while the base may look at it.

        Bases make their state where a parameter has none, or an empty one: an entry that has the importance alone is no
        entry meanwhile, unless the base itself has made an empty one.

        Yields:
            The importances; those that are in it at the end are put into the state that the base has then.
        """
        aside: dict[Tensor, Tensor] = {}
        state = self.state
        for param in [param for group in self.param_groups for param in group["params"]]:
            entry = state.get(param)
            if isinstance(entry, MutableMapping) and "importance" in entry:
                aside[param] = entry.pop("importance")
                if not entry and param not in self._emptied:
                    del state[param]
        self._emptied = set()
        try:
            yield aside
        finally:
            for param, signed in aside.items():
                self._put_importance(param, signed)

    def _make_importances(self) -> list[Tensor]:
        """Make the importance of the parameters that can be protected and have none, and return these parameters."""
        made = []
        for group in self.param_groups:
            for param in group["params"] if group["isolation_ratio"] > 0 else ():
                stands = is_lazy(param) or param.is_meta or not (param.requires_grad or param.grad is not None)
                if not stands and self._signed_importance(param, group) is None:
                    signed = new_state(param, "importance")
                    self._put_importance(param, signed)
                    if (seen := _seen(signed)) is not None:  # nothing is protected: no need to ask the device
                        nothing = torch.empty(0, dtype=torch.int64, device=param.device)
                        self._positions[id(param)] = _Positions(weakref.ref(signed), seen, nothing)
                    made.append(param)
        return made

    def _make_places(self) -> None:
        """Make the importances where there is a state already: a distributed checkpoint loads what has a place in it.

        Where there is none, torch.distributed.checkpoint takes a step of zeros to have it made.
        """
        if self.state and all("isolation_ratio" in group for group in self.param_groups):
            self._make_importances()

    def _drop_importance(self, param: Tensor) -> None:
        """Take an importance out of the state of a parameter, and the entry too, where it has nothing else."""
        entry = self.state.get(param, {})
        entry.pop("importance", None)
        if not entry and param not in self._emptied:
            self.state.pop(param, None)

    def _check_importances(self) -> None:
        """Check that every importance is still that of its parameter, whoever has written into the state.

        Raises:
            ValueError: it is of another shape, dtype or device; the message names the parameter.
        """
        for group in self.param_groups:
            for param in group["params"]:
                signed = self._signed_importance(param, group)
                if signed is None:
                    continue
                wanted = (torch.float32, tuple(param.shape), tuple(local(param).shape), param.device)
                if not isinstance(signed, Tensor) or wanted != (
                    signed.dtype,
                    tuple(signed.shape),
                    tuple(local(signed).shape),
                    signed.device,
                ):
                    what = (
                        f"{signed.dtype} of shape {tuple(signed.shape)} on {signed.device}"
                        if isinstance(signed, Tensor)
                        else f"a {type(signed).__name__}"
                    )
                    raise ValueError(
                        f'state[p]["importance"] of {self._name(param)} is {what}, and the parameter has shape '
                        f"{tuple(param.shape)} on {param.device}: it must be torch.float32 of that shape there. Bring "
                        "it into that form (0 for a new entry, which is free), or delete it, which starts over at 0 "
                        "with nothing locked"
                    )

    # Protected entries -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _protected(self) -> list[_Kept]:
        """Return the protected entries of all parameters; it waits for no device where no mask has changed."""
        kept = []
        for group in self.param_groups:
            for param in group["params"]:
                signed = self._signed_importance(param, group)
                if signed is not None and signed.shape == param.shape:
                    positions = self._positions_of(param, signed)
                    if positions.numel():
                        kept.append(_Kept(param, positions, torch.take(local(param), positions)))
        return kept

    def _positions_of(self, param: Tensor, signed: Tensor) -> Tensor:
        """Return where the protected entries of a parameter are."""
        known, seen = self._positions.get(id(param)), _seen(signed)
        if known is None or seen is None or known.signed() is not signed or known.seen != seen:
            found = lock.is_locked(local(signed)).flatten().nonzero().squeeze(1)
            if seen is None:
                return found
            known = self._positions[id(param)] = _Positions(weakref.ref(signed), seen, found)
        return known.positions

    def _same_masks(self, param: Tensor, signed: Tensor) -> None:
        """Say that this class has written the importance of a parameter, and no sign of it."""
        known, seen = self._positions.get(id(param)), _seen(signed)
        if known is not None and seen is not None and known.signed() is signed:
            self._positions[id(param)] = known._replace(seen=seen)

    @torch.no_grad()
    def _put_back(self, kept: Sequence[_Kept]) -> None:
        """Write entries back, into whatever memory their parameters have now."""
        for param, positions, values in kept:
            put_(local(param), positions, values)

    def _refresh(
        self,
        stepping: Sequence[Tensor],
        scaling: Scaling,
        clock: int | Tensor | None = None,
        due: Tensor | None = None,
    ) -> None:
        self._take_groups()
        try:
            super()._refresh(stepping, scaling, clock, due)
        finally:
            self._positions.clear()

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

    _taken: list[int] | None = None  # ids of the parameters that were in the groups when they were last looked at

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the base and put the protected entries back.

        Where `base` raises, the clock, the masks, the telemetry and the protected entries are as before the step. The
        importance, an average over many steps, has taken the gradients in: to undo that, every step would have to copy
        4 bytes for each entry.

        Args:
            closure: evaluated first, with gradients enabled; its value is returned.

        Raises:
            RuntimeError: a gradient is sparse, a parameter has no values (meta), or the parameters are not those that
                were named: DeepSpeed ZeRO has put flat partitions in their place.
            ValueError: an importance in the state is not that of its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_groups()
        self._take_written()
        stepping = self._stepping()
        self._check_importances()
        before = self._protected()
        clocks, iteration = [(group, group[CLOCK]) for group in self.param_groups], copy.deepcopy(self._turns())
        kept, made, records = before, self._make_importances(), None
        try:
            self._meet()
            clock, interval = self._count_step(), self.param_groups[0]["mask_interval"]
            if interval is not None and clock % interval == 0:
                records = self._records.kept()
                self._refresh([param for param in stepping if param.requires_grad], UNSCALED, clock)
                kept = self._protected()
                stepping = {param: group for param, group in stepping.items() if not param.requires_grad}
            self._advance(stepping)
            with self._set_aside():
                self.base.step()
        except BaseException:
            self._put_back((*kept, *before))
            for group, number in clocks:
                group[CLOCK] = number
            self._iteration = iteration
            for param in made:
                self._drop_importance(param)
            if records is not None:
                self._records.bring_back(records)
                self._lock_again(before)
            raise
        self._put_back(kept)
        self._nonfinite.warn(self._names)
        return loss

    def _stepping(self) -> dict[Tensor, dict[str, Any]]:
        """Return the parameters whose importance this step advances, and their groups.

        Raises:
            RuntimeError: see `step`.
        """
        stepping = {}
        for group in self.param_groups:
            if "param_names" in group and group["params"] and not has_names(group):
                raise RuntimeError(
                    "the parameters are not those that were named: DeepSpeed ZeRO has put flat partitions in their "
                    "place, and each rank would choose masks of its own partition. Use EPIAdamW and its "
                    "bind_deepspeed, or FSDP2 (fully_shard), or ZeRO stage 0"
                )
            for param in group["params"] if group["isolation_ratio"] > 0 else ():
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError(
                        f"{self._name(param)} has a sparse gradient; importance needs dense ones. Give its group "
                        "isolation_ratio=0"
                    )
                if param.is_meta:
                    raise RuntimeError(
                        f"{self._name(param)} is on the meta device and has no values; materialise the model first, by "
                        'model.to_empty(device="cpu") for instance, and construct the optimizer then'
                    )
                stepping[param] = group
        return stepping

    def _advance(self, stepping: dict[Tensor, dict[str, Any]]) -> None:
        """Advance the importance by the gradients."""
        for device in dict.fromkeys(param.device for param in stepping):
            here = [param for param in stepping if param.device == device]
            if self._backend == "auto" and any(param.dtype in native.DTYPES for param in here):
                dispatch.say_if_slow(device)
            signed = [self.state[param]["importance"] for param in here]
            betas = [stepping[param]["importance_beta"] for param in here]
            ops.importance_(
                [local(one) for one in signed],
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
            for param, one in zip(here, signed, strict=True):
                self._same_masks(param, one)

    def _lock_again(self, before: Sequence[_Kept]) -> None:
        """Let these entries be protected again, and no others."""
        positions = {param: where for param, where, _ in before}
        for group in self.param_groups:
            for param in group["params"]:
                signed = self._signed_importance(param, group)
                if signed is not None:
                    held = local(signed)
                    locked = torch.zeros_like(held, dtype=torch.bool)
                    if param in positions:
                        ones = torch.ones(len(positions[param]), dtype=torch.bool, device=held.device)
                        put_(locked, positions[param], ones)
                    held.copy_(lock.with_lock(held, locked))

    def __repr__(self) -> str:
        """Return the base's text and the grouping and backend in force."""
        return f"{type(self).__name__} of {self.base!r}\n{self._isolation_text()}"

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state with ``importance`` in the entry of each parameter that has one.

        Raises:
            ValueError: a setting that is one for all groups, or cannot change, was written into one.
        """
        self._take_groups()
        self._take_written()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        with self._set_aside() as aside:
            packed = self.base.state_dict()
            if not self._in_torchs_form(packed):
                packed = {"base": packed, **self._own_form()}
            state = dict(packed["state"])
            for number, param in pairs_of(packed["param_groups"], self.param_groups):
                if param in aside:
                    state[number] = {**state.get(number, {}), "importance": aside[param]}
        packed = {**packed, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, packed)
            packed = packed if changed is None else changed
        return packed

    def _in_torchs_form(self, packed: Any) -> bool:
        """Return whether a state of the base has torch's form: an entry for each parameter, which is a dict."""
        try:
            fits = isinstance(packed, dict) and check_form(packed, self.param_groups)
        except ValueError:
            return False
        return fits and all(isinstance(entry, dict) for entry in packed["state"].values())

    def _own_form(self) -> dict[str, Any]:
        """Return a state of torch's form that has our settings alone."""
        groups, number = [], 0
        for group in self.param_groups:
            keys = ("param_names", *self._settings, CLOCK, "layers_auto", "layer_digest")
            members = list(range(number, number + len(group["params"])))
            number += len(members)
            groups.append({**{key: group[key] for key in keys if key in group}, "params": members})
        return {"state": {}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or one of the base, whose importance then starts at 0.

        A whole state of one process loads into DTensors: each rank takes its shard.

        Raises:
            ValueError: the state is of another optimizer than the base, of other shapes or another grouping of the
                parameters into layers, or a setting is out of its range; the message names the entry.

        Whatever is raised, by the base too, nothing has changed then.
        """
        self._take_groups()
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        importances: dict[Tensor, Tensor] = {}
        with self._set_aside() as aside, _as_before(self.base):
            packed = self.base.state_dict()
            plain, of_base = self._in_torchs_form(packed), state_dict
            if not plain and "base" not in state_dict and not {"state", "param_groups"} & state_dict.keys():
                state_dict = {"base": state_dict, **self._own_form()}  # of the base alone
                for group in state_dict["param_groups"]:
                    del group[CLOCK]
            if check_form(state_dict, self.param_groups):  # else the base says
                state_dict = in_our_order(state_dict, self.param_groups, self._grouping)
                of_base = {**state_dict, "state": self._checked_entries(state_dict, importances)}
            if not plain:
                if "base" not in state_dict:
                    raise ValueError(
                        f"the state has no 'base': it is not of IsolatedOptimizer around {type(self.base).__name__}"
                    )
                of_base = state_dict["base"]
            own = [{key: group[key] for key in (*self._settings, "layer_digest")} for group in self.param_groups]
            clock = self._clock_of(state_dict)
            had = [group.keys() for group in packed["param_groups"]] if plain else []
            self.base.load_state_dict(of_base)
            for i, (group, keys) in enumerate(zip(self.param_groups, had, strict=False)):
                missing = [key for key in self.base.defaults if key in keys and key not in group]
                if missing:
                    raise ValueError(
                        f"parameter group {i} of the state has no {', '.join(missing)}: it is not of "
                        f"{type(self.base).__name__}, the base"
                    )
            aside.clear()  # before the new ones are on a device
            for param, signed in importances.items():
                aside[param] = signed.to(param.device, torch.float32)
        if not plain:
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
                group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        for group, settings in zip(self.param_groups, own, strict=True):
            for key, value in settings.items():
                group.setdefault(key, value)
        self._turns().stepped.clear()
        self._keep_clock(self.param_groups[0].get(CLOCK, clock))
        self._settings.update({key: self.param_groups[0][key] for key in SHARED if key != "layers"})
        self._grouping.adopt(self.param_groups)
        self._make_places()
        self._positions.clear()
        self._part()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _clock_of(self, state_dict: dict[str, Any]) -> int:
        """Return the clock of a saved state; of one that has none, such as the base's, its largest ``step``."""
        groups = state_dict["param_groups"]
        if groups and CLOCK in groups[0]:
            return int(groups[0][CLOCK])
        steps = [entry.get("step", 0) for entry in state_dict["state"].values() if isinstance(entry, dict)]
        return max((int(local(step)) if isinstance(step, Tensor) else int(step) for step in steps), default=0)

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
        if _is_torchs(self.base):
            for i, (ours, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
                members = zip(saved["params"], ours["params"], strict=True)
                with named(f"parameter group {i} of the state"):
                    self._check_goes_on(ours, saved, {p: entries[n] for n, p in members if n in entries})
        return entries

    def _check_goes_on(
        self, ours: dict[str, Any], saved: dict[str, Any], entries: dict[Tensor, dict[str, Any]]
    ) -> None:
        """Check that the base, one of torch's, can take a step from a saved group and saved entries.

        An optimizer of its kind tries it with tensors of one value.

        Raises:
            ValueError: it cannot; the message names the setting or the parameter.
        """
        for key, value in self.base.defaults.items():
            if (isinstance(value, bool) or key in ("foreach", "fused")) and not isinstance(saved.get(key), bool | None):
                raise ValueError(f"Invalid {key}: {saved[key]!r}; it is a flag")
        if not ours["params"] or not _goes_on(self.base, ours, ours["params"][0], {}):
            return  # its kind cannot be tried that way
        _goes_on(self.base, {**ours, **saved}, ours["params"][0], {}, "the settings")
        for param, entry in entries.items():
            _goes_on(self.base, {**ours, **saved}, param, entry, f"the state of {self._name(param)}")

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
        kept = ("_backend", "_settings", "_grouping", "_records", "_nonfinite", "_own_state", "_emptied")
        base, importances = self._base_without_importances()
        return {
            **{key: self.__dict__[key] for key in kept},
            "base": base,
            "_copied": importances,
            "_process_group": given(self._process_group),
            "_positions": {},
            "_step_supports_amp_scaling": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        state = dict(state)
        copied = state.pop("_copied", {})
        super().__setstate__(state)
        for param, signed in copied.items():
            self._put_importance(param, signed)

    def _base_without_importances(self) -> tuple[Optimizer, dict[Tensor, Tensor]]:
        """Return the base as it would be without this class, and the importances.

        Bases of torch read the clock of the first entry of their state when they are copied.
        """
        state = vars(self.base).get("state")
        if not isinstance(state, MutableMapping):
            return self.base, {}  # which keeps its state in a way of its own
        importances, bare = {}, copy.copy(state)
        for param, entry in state.items():
            if isinstance(entry, MutableMapping) and "importance" in entry:
                importances[param] = entry["importance"]
                rest = {key: value for key, value in entry.items() if key != "importance"}
                if rest or param in self._emptied:
                    bare[param] = rest
                else:
                    del bare[param]
        base = object.__new__(type(self.base))
        vars(base).update({**vars(self.base), "state": bare})
        return base, importances


def _seen(signed: Tensor) -> tuple[int, int] | None:
    """Return the address and version of the memory of an importance; None: nobody counts its versions."""
    held = local(signed)
    return None if held.is_inference() else (held.data_ptr(), held._version)


@contextmanager
def _as_before(base: Optimizer) -> Iterator[None]:
    """Let a base that raises be as it was, with its groups, its state, and the optimizers that it holds."""
    held = [base, *(value for value in vars(base).values() if isinstance(value, Optimizer))]
    mappings: list[MutableMapping[Any, Any]] = [vars(one) for one in held]
    lists: list[list[Any]] = []
    for one in held:
        state, groups = getattr(one, "state", None), getattr(one, "param_groups", [])
        if isinstance(state, MutableMapping):
            mappings += [state, *(entry for entry in state.values() if isinstance(entry, MutableMapping))]
        mappings += groups
        lists.append(groups)
    contents, members = [dict(mapping) for mapping in mappings], [list(groups) for groups in lists]
    try:
        yield
    except BaseException:
        for mapping, content in zip(mappings, contents, strict=True):
            mapping.clear()
            mapping.update(content)
        for groups, had in zip(lists, members, strict=True):
            groups[:] = had
        raise


def _is_torchs(base: Optimizer) -> bool:
    return type(base).__module__.startswith("torch.optim.")


def _goes_on(
    base: Optimizer, group: dict[str, Any], param: Tensor, entry: dict[str, Any], what: str | None = None
) -> bool:
    """Return whether an optimizer of the kind of `base` takes a step of one value by these settings and this state.

    Raises:
        ValueError: it does not, and there is a name of `what` it takes.
    """

    def small(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.zeros((1,) * value.dim(), dtype=value.dtype, device="cpu")
        return value

    def on_cpu(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(on_cpu, value))
        return value.detach().cpu() if isinstance(value, Tensor) else value

    shape = (1,) * (0 if is_lazy(param) else param.dim())
    one = torch.zeros(shape, dtype=param.dtype, device="cpu", requires_grad=True)
    one.grad = torch.zeros(shape, dtype=param.dtype, device="cpu")
    settings = {key: on_cpu(group[key]) for key in base.defaults if key in group}
    # of the places where a step runs, the one that every kind has
    flags = {
        key: value for key, value in (("foreach", False), ("fused", False), ("capturable", False)) if key in settings
    }
    differentiable = {"differentiable": False} if "differentiable" in settings else {}
    try:
        with torch.no_grad(), torch.device("cpu"):
            stand_in = type(base)([one])  # type: ignore[call-arg]
            stand_in.param_groups[0].update({**settings, **flags, **differentiable})
            if entry:
                stand_in.state[one] = {key: small(value) for key, value in entry.items()}
            inspect.unwrap(type(base).step)(stand_in)  # without the hooks that a program has for every optimizer
    except Exception as error:
        if what is None:
            return False
        raise ValueError(
            f"{type(base).__name__}, the base, cannot go on from {what}: {type(error).__name__}: {error}"
        ) from error
    return True


def _check_base(base: object) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}; pass a torch.optim.Optimizer")
    if isinstance(base, (DropInAdamW, IsolatedOptimizer)):
        raise ValueError(f"{type(base).__name__} locks entries by itself; pass it no further optimizer around it")
    if isinstance(base, LBFGS):
        raise ValueError("LBFGS moves the parameters several times in a step, by gradients of its own closure calls")
