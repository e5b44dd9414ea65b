"""EPIAdamW: AdamW with evolving parameter isolation (EPI, arXiv 2604.14010, Alg. 1)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.distributed import Lost, local, wrapped
from epi_kernels.integrations.deepspeed import group_of, segments_of
from epi_kernels.layers import Grouping, LayersArgument, check_saved, has_names
from epi_kernels.notices import warn
from epi_kernels.optim.base import LockedAdamW, new_state
from epi_kernels.optim.checkpoint import named
from epi_kernels.optim.isolation import CLOCK, SHARED, Isolation, check_settings
from epi_kernels.optim.prepared import Prepared
from epi_kernels.optim.refusals import require_default
from epi_kernels.optim.scaling import UNSCALED, Scaling
from epi_kernels.telemetry import Records


class EPIAdamW(Isolation, LockedAdamW):
    """AdamW that protects the most important entries, and chooses them again as training goes on.

    ::

        S <- beta S + (1 - beta) g^2                         every step; Eq. 5
        every mask_interval steps, before the update:
            I = (S - min S) / (max S - min S)                over each layer; Eq. 7-8
            protected = the top isolation_ratio of I         over all layers together; Eq. 9
        AdamW update of every entry that is not protected    Eq. 12-13

    Source: "Parameter Importance is Not Static", arXiv 2604.14010, Algorithm 1. A protected entry gets no update and
    no weight decay: it keeps its bits. Its moments advance, so that a released entry moves on at full speed. An entry
    whose score is 0 is never protected; ties at the threshold all are.

    Args:
        params: as torch.optim.AdamW takes them; ``model.named_parameters()`` lets layers be transformer blocks and
            messages speak of names.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach: as in torch.optim.AdamW. `foreach` is checked as
            torch does and changes nothing: `backend` decides what runs.
        fused: as there, too. With True a torch.amp.GradScaler leaves the gradients to the step, which divides by the
            scale and, where one is infinite, does nothing at all. It does not write the gradients, and on a GPU
            nothing is read back.
        capturable: lets a CUDA graph capture `step`; clocks and the decision to refresh are on the device. A number in
            a tensor (lr, eps, weight_decay, betas) is read at every replay, any other is a constant of the graph.
        differentiable: autograd goes back through the step, by torch's own arithmetic. For float32, float64 and
            complex parameters, with ``importance="ema"``.
        isolation_ratio: p, share of the entries to protect, 0 <= p < 1. A group may carry its own: each ratio is then
            a budget of its own over its own groups, and 0 exempts a group (no importance, no state for it).
        importance_beta: smoothing of S, 0 <= beta < 1; 0 takes the last gradient alone. A group may carry its own.
        mask_interval: H, steps from one choice to the next. Every call of `step` counts, whichever parameters have a
            gradient in it; a step that a scaler skips does not. None: only `refresh`.
        layers: what is normalised together. "block": the transformer block, and the module outside of blocks;
            "tensor": each parameter; a callable: name -> layer. "auto": "block" where names are known, else "tensor".
        normalize: "layer" as above; "none" ranks the raw S.
        scope: "global" has one budget over all layers; "layer" protects the top p of each.
        threshold: "exact" is the k-th largest score to the bit; "histogram" reads the scores once instead of three
            times and may protect up to one histogram bin more (1/16 in the score; see `epi_kernels.ops`).
        importance: "ema" keeps S; "exp_avg_sq" takes AdamW's second moment for it (beta = betas[1]), without any
            state or traffic of its own. The lock bit then rides in the sign of ``exp_avg_sq``. `state_dict` has
            ``exp_avg_sq`` without locks, so that torch.optim.AdamW can load it, and the signed tensor as
            ``importance``.
        clip_grad_norm: the largest norm of all gradients together, as of torch.nn.utils.clip_grad_norm_: one pass over
            them, and the factor is applied in the step, importance included, without writing the gradients. None: no
            clipping.
        importance_dtype, rounding, master_weights, state_dtype: not in this version.
        process_group: the ranks that share the parameters out. None is the default group where a parameter is a DTensor
            (FSDP2, HSDP, tensor parallel) or a slice of FSDP1's, and no communication otherwise, DDP included. Given
            with plain parameters that have no names, each rank's parameters are its own. Slices of FSDP1 do not say
            which are replicas: with HYBRID_SHARD give the group that shards; NO_SHARD is refused.
        backend: "auto", or the name of one, which then runs or raises.

    State of a parameter: torch's ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` and ``importance``: S in
    float32 with the lock in its sign bit (see `epi_kernels.lock`). With ``importance="exp_avg_sq"``, ``importance`` and
    ``exp_avg_sq`` are one tensor, which carries the lock; where a loader or an offloader has made two tensors of that
    one, the next step takes ``importance`` for both. A group has the settings above, a digest of its layers, and
    ``isolation_clock``: how many steps the optimizer has taken, by which it refreshes. (Under ``capturable`` the clock
    runs on the device, and `state_dict` brings its value into the groups.) A state of torch.optim.AdamW, which has no
    such clock, starts it at the largest ``step``.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
        NotImplementedError: an argument or a parameter's kind is not in this version.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> optimizer = EPIAdamW(model.named_parameters(), lr=1e-3, isolation_ratio=0.1, mask_interval=1)
        >>> model(torch.randn(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> int(sum(optimizer.isolation_mask(p).sum() for p in model.parameters()))  # floor(0.1 * 144)
        14
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        isolation_ratio: float = 0.01,
        importance_beta: float = 0.99,
        mask_interval: int | None = 500,
        layers: LayersArgument = "auto",
        normalize: Literal["layer", "none"] = "layer",
        scope: Literal["global", "layer"] = "global",
        threshold: Literal["exact", "histogram"] = "exact",
        importance: Literal["ema", "exp_avg_sq"] = "ema",
        importance_dtype: torch.dtype = torch.float32,
        rounding: Literal["nearest"] = "nearest",
        master_weights: str | None = None,
        state_dtype: torch.dtype | None = None,
        process_group: Any = None,
        clip_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        settings: dict[str, Any] = {
            "isolation_ratio": isolation_ratio,
            "importance_beta": importance_beta,
            "mask_interval": mask_interval,
            "layers": layers,
            "normalize": normalize,
            "scope": scope,
            "threshold": threshold,
            "importance": importance,
            CLOCK: 0,
        }
        check_settings(settings)
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Invalid rounding: {rounding!r}; choose one of ('nearest', 'stochastic')")
        require_default(
            importance_dtype=(importance_dtype, torch.float32),
            rounding=(rounding, "nearest"),
            master_weights=(master_weights, None),
            state_dtype=(state_dtype, None),
        )
        self._grouping = Grouping(layers)
        self._records = Records()
        self._process_group = process_group
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
            clip_grad_norm=clip_grad_norm,
            backend=backend,
            settings=settings,
        )

    def bind_deepspeed(self, engine: Any) -> None:
        """Say which layer every piece of DeepSpeed's flat partitions belongs to: ZeRO-1, 2 and 3.

        Call it after ``deepspeed.initialize(..., optimizer=optimizer)``, on every rank. A refresh that is due then
        happens at the start of the next step, from the importance that all groups have advanced. Unbound, each flat
        partition is one layer, has a budget of its own, and a warning says so.

        Args:
            engine: as deepspeed.initialize returns it.

        Raises:
            TypeError: `engine` is not an engine.
            ValueError: it steps another optimizer, or its pieces do not lie in the partitions that this one has.
        """
        segments = segments_of(engine, self)
        self._segments = segments or None  # stage 0 leaves the parameters as they are
        self._every_group = self.param_groups
        if segments:
            self._process_group = group_of(engine)
        elif isinstance(self._process_group, Lost):
            self._process_group = None
        self._part()

    def __repr__(self) -> str:
        """Return torch's text and the grouping and backend in force."""
        return f"{super().__repr__()}\n{self._isolation_text()}"

    # The step --------------------------------------------------------------------------------------------------------

    _SHARED = (*LockedAdamW._SHARED, *SHARED)
    _COUNTED = (CLOCK,)
    _STATE = (*LockedAdamW._STATE, "importance")
    _warned = False  # of flat partitions

    def _fixed(self) -> dict[str, tuple[Any, ...]]:
        return {
            "importance": (self.defaults["importance"],),
            "layers": (self._grouping.name, self.defaults["layers"]),  # the second where no names are there to go by
        }

    def _lock_in(self, param: Tensor, group: dict[str, Any]) -> str:
        if group["isolation_ratio"] == 0:
            return "none"
        return "importance" if group["importance"] == "ema" else "exp_avg_sq"

    def _new_lock(self, param: Tensor) -> Tensor:
        return new_state(param, "importance")

    def _settings_seen(self, group: dict[str, Any]) -> tuple[object, ...]:
        return *super()._settings_seen(group), group["isolation_ratio"] == 0, group["importance"]

    def _signed_importance(self, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        state = self.state.get(param, {})
        if group["isolation_ratio"] == 0:
            return None
        if group["importance"] == "exp_avg_sq":
            return state.get("importance", state.get("exp_avg_sq"))
        return state.get("importance")

    def _before_update(
        self, params: Sequence[Tensor], scaling: Scaling, home: torch.device | None = None
    ) -> bool | Tensor:
        """Count the step, and refresh the masks where mask_interval says so."""
        if self._segments is not None:
            return False  # `_run_step` has done both
        self._meet()
        self._warn_of_flat_partitions()
        interval = self.param_groups[0]["mask_interval"]
        if home is not None:
            clock_there, counted = self._count_step_on(home, scaling.found_inf.get(home))
            if interval is None:
                return False
            due_there = (counted & (clock_there % interval == 0)).float()
            self._refresh(params, scaling, clock_there, due_there)
            return due_there
        clock = self._count_step()
        self._clock_there = None  # the host knows the clock, and goes on with it
        due = interval is not None and clock % interval == 0
        if due:
            self._refresh(params, scaling, clock)
        return due

    def _run_step(self) -> None:
        self._ranks()  # a copy may have lost them, and says so before anything has changed
        if self._segments is not None:
            self._begin_iteration()
        super()._run_step()

    def _prepared_for_these(self) -> Prepared:
        if self._segments is None:
            return self._prepared
        first = next((param for group in self.param_groups for param in group["params"]), None)
        return self._prepared if first is None else self._alone.setdefault(id(first), Prepared())

    def _begin_iteration(self) -> None:
        """Count an iteration of DeepSpeed at its first call of `step`, and refresh there if the last one made it due.

        DeepSpeed calls `step` for one group after the other, or for one sub-group, and shows no other: only when the
        next iteration begins is it known that all of them have advanced their importance.
        """
        interval, before = self._every_group[0]["mask_interval"], self._latest_clock()
        begins = self._count_step() != before
        if begins and interval is not None and before and before % interval == 0:
            self._refresh((), UNSCALED, before)

    def _warn_of_flat_partitions(self) -> None:
        if self._warned or all(has_names(g) or "param_names" not in g or not g["params"] for g in self.param_groups):
            return
        self._warned = True
        warn(
            "the parameters are not those that were named: DeepSpeed ZeRO has put flat partitions in their place. "
            "Each is one layer now, with a budget of its own; optimizer.bind_deepspeed(engine) brings the layers back"
        )

    def _idle_step(self) -> None:
        """Count a step without any gradient here, and take part in a refresh that is due."""
        found_inf = getattr(self, "found_inf", None)
        if self._segments is not None or (found_inf is not None and found_inf.item()):
            return
        self._meet()
        clock, interval = self._count_step(), self.param_groups[0]["mask_interval"]
        if interval is not None and clock % interval == 0:
            self._refresh((), UNSCALED, clock)

    def _clock_device(self, param: Tensor, group: dict[str, Any]) -> torch.device | None:
        # ranks decide together whether to refresh, and the host must know
        return None if self._ranks() is not None else super()._clock_device(param, group)

    def _between_iterations(self) -> None:
        """Count the step that the parameters have taken one by one, and refresh if it is due."""
        super()._between_iterations()
        self._idle_step()

    # Groups and state ------------------------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_locks(group, group["params"])
        self._admit(group)
        self._grouping.resolve(named="param_names" in group)
        self._grouping.stamp(self.param_groups)
        self._part()

    def _check_locks(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Check that there is a place for the locks of parameters under the settings of a group."""
        for param in params:
            if param.is_complex() and self._lock_in(param, group) == "exp_avg_sq":
                raise NotImplementedError(
                    f"{self._name(param)} is {param.dtype}, whose second moment has two parts for each entry and no "
                    "place for its lock; use importance='ema', or isolation_ratio=0 in its group"
                )

    def _check_settings(self, group: dict[str, Any], shared: dict[str, Any]) -> None:
        check_settings(group)
        super()._check_settings(group, shared)

    def _packed(self, packed: dict[str, Any]) -> dict[str, Any]:
        clock, groups = self._latest_clock(), packed["param_groups"]
        packed = {**packed, "param_groups": [{**group, CLOCK: clock} for group in groups]}
        if groups[0]["importance"] != "exp_avg_sq":
            return packed
        exempt = {number for group in groups if group["isolation_ratio"] == 0 for number in group["params"]}
        return {
            **packed,
            "state": {
                number: entry if number in exempt and "importance" not in entry else _unlocked(entry)
                for number, entry in packed["state"].items()
            },
        }

    def _captured(self, state: dict[str, Any]) -> dict[str, Any]:
        if self.param_groups[0]["importance"] != "exp_avg_sq":
            return state
        # it is exp_avg_sq once more, and the loaded locks come in with `_after_load`
        return {key: value for key, value in state.items() if key != "importance"}

    def _lacking(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        steps = [float(local(entry["step"])) for entry in state_dict["state"].values() if entry]
        return {CLOCK: int(max(steps, default=0))}

    def _check_loaded(self, groups: list[dict[str, Any]]) -> None:
        check_saved(groups, self.param_groups)
        for i, (group, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            with named(f"parameter group {i} of the state"):
                self._check_locks(group, own["params"])

    def _after_load(self) -> None:
        self._grouping.adopt(self.param_groups)
        self._part()
        if self._segments is not None:
            self._every_group = self.param_groups
        self._turns().stepped.clear()
        self._keep_clock(int(self.param_groups[0][CLOCK]))
        if self.param_groups[0]["importance"] == "exp_avg_sq":
            for param, state in self.state.items():
                own, loaded = state["exp_avg_sq"], state.pop("importance", None)
                # the locks of the one, the values of the other: an importance is loaded as float32
                self._take_signed(param, own if loaded is None else _signed_like(own, loaded))

    def _check_layout(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state.get(param, {})
        shared = group["importance"] == "exp_avg_sq" and {"importance", "exp_avg_sq"} <= state.keys()
        # who gives a parameter another shape, and its moments too, need not know that one moment has two names
        if shared and local(state["importance"]).shape != local(state["exp_avg_sq"]).shape == local(param).shape:
            state["importance"] = state["exp_avg_sq"]
        super()._check_layout(param, group)

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
        super()._ensure_state(param, group)
        state = self.state[param]
        exempt = group["isolation_ratio"] == 0 and "importance" not in state
        if group["importance"] != "exp_avg_sq" or exempt:
            return
        # Whoever writes into `state` past load_state_dict may have made two tensors of the one: a loader of a
        # checkpoint, or an offloader that has moved each to the host and back. The importance has the locks.
        own, other = state["exp_avg_sq"], state.get("importance", state["exp_avg_sq"])
        if other is not own and local(other).data_ptr() != local(own).data_ptr():
            other = other.to(own.device)
            own = other if other.dtype == own.dtype else _signed_like(own, other)
        self._take_signed(param, own)

    def _take_signed(self, param: Tensor, signed: Tensor) -> None:
        """Let a signed second moment be the parameter's, as ``exp_avg_sq`` and as ``importance``: one tensor."""
        state = self.state[param]
        if state["exp_avg_sq"] is not signed and self._group_of(param)["capturable"]:
            signed = state["exp_avg_sq"].copy_(signed)  # a captured step has its address
        state["exp_avg_sq"] = state["importance"] = signed

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep; no segments of DeepSpeed, which steps no copy."""
        self._keep_clock(self._latest_clock())
        if self._segments is None:
            return super().__getstate__()
        return {**super().__getstate__(), "_process_group": Lost("call bind_deepspeed(engine) of the copy")}

    _KEPT = (*LockedAdamW._KEPT, "_grouping", "_records")


def _signed_like(exp_avg_sq: Tensor, signed: Tensor) -> Tensor:
    """Return the values of a second moment with the locks of a signed importance of the same placement."""
    return wrapped(lock.with_lock(local(exp_avg_sq), lock.is_locked(local(signed))), exp_avg_sq)


def _unlocked(entry: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter's state as a checkpoint has it: exp_avg_sq without locks, and the importance with them."""
    if "exp_avg_sq" not in entry:
        return entry
    signed = entry.get("importance", entry["exp_avg_sq"])
    return {**entry, "exp_avg_sq": wrapped(lock.magnitude(local(signed)), signed), "importance": signed}
