"""EPIAdamW: AdamW with evolving parameter isolation (EPI, arXiv 2604.14010, Alg. 1)."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.distributed import Lost, local, wrapped
from epi_kernels.integrations.deepspeed import group_of, segments_of
from epi_kernels.layers import Grouping, LayersArgument, check_saved, has_names
from epi_kernels.notices import warn
from epi_kernels.optim.base import LockedAdamW, new_state
from epi_kernels.optim.clocks import DeviceClocks, HostClocks
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
        mask_interval: H, steps from one choice to the next, counted by ``state[p]["step"]``. None: only `refresh`.
        layers: what is normalised together. "block": the transformer block, and the module outside of blocks;
            "tensor": each parameter; a callable: name -> layer. "auto": "block" where names are known, else "tensor".
        normalize: "layer" as above; "none" ranks the raw S.
        scope: "global" has one budget over all layers; "layer" protects the top p of each.
        threshold: "exact" is the k-th largest score to the bit; "histogram" reads the scores once instead of three
            times and may protect up to one histogram bin more (1/16 in the score; see `epi_kernels.ops`).
        importance: "ema" keeps S; "exp_avg_sq" takes AdamW's second moment for it (beta = betas[1]), without any
            state or traffic of its own. The lock bit then rides in the sign of ``exp_avg_sq``; `state_dict` has that
            without locks, so that torch.optim.AdamW can load it, and the signed tensor as ``importance``.
        clip_grad_norm: the largest norm of all gradients together, as of torch.nn.utils.clip_grad_norm_: one pass over
            them, and the factor is applied in the step, importance included, without writing the gradients. None: no
            clipping.
        importance_dtype, rounding, master_weights, state_dtype: not in this version.
        process_group: the ranks that share the parameters out. None is the default group where a parameter is a DTensor
            (FSDP2, HSDP, tensor parallel) or a slice of FSDP1's, and no communication otherwise, DDP included. Given
            with plain parameters that have no names, each rank's parameters are its own. Slices of FSDP1 do not say
            which are replicas: with HYBRID_SHARD give the group that shards; NO_SHARD is refused.
        backend: "auto", or the name of one, which then runs or raises.

    State of a parameter: torch's ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` and, with
    ``importance="ema"``, ``importance``: S in float32 with the lock in its sign bit (see `epi_kernels.lock`). A group
    has the settings above, a digest of its layers, and ``isolation_clock``, the largest ``step`` of all ranks.

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
        """
        segments = list(segments_of(engine))
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
    _STATE = (*LockedAdamW._STATE, "importance")
    _refreshed_at: int | None = None  # the clock of the last refresh between steps
    _warned = False  # of flat partitions

    def _lock_in(self, param: Tensor, group: dict[str, Any]) -> str:
        if group["isolation_ratio"] == 0:
            return "none"
        return "importance" if group["importance"] == "ema" else "exp_avg_sq"

    def _new_lock(self, param: Tensor) -> Tensor:
        return new_state(param, "importance")

    def _settings_seen(self, group: dict[str, Any]) -> tuple[object, ...]:
        return *super()._settings_seen(group), group["isolation_ratio"] == 0, group["importance"]

    def _signed_importance(self, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        lock_in = self._lock_in(param, group)
        return None if lock_in == "none" else self.state.get(param, {}).get(lock_in)

    def _before_update(
        self, clocks: HostClocks | DeviceClocks, params: Sequence[Tensor], scaling: Scaling
    ) -> bool | Tensor:
        """Refresh the masks where mask_interval says so; the clock is the largest step of any parameter."""
        self._meet()
        if self._segments is not None:
            return False
        if isinstance(clocks, HostClocks):
            self._keep_clock(clocks.latest)
        self._warn_of_flat_partitions()
        interval = self.param_groups[0]["mask_interval"]
        due = interval is not None and clocks.due(interval)
        if isinstance(due, Tensor):
            self._refresh(params, scaling, clocks.latest, due)
        elif due:
            self._refresh(params, scaling, clocks.latest)
        return due

    def _run_step(self) -> None:
        self._ranks()  # a copy may have lost them, and says so before anything has changed
        if self._segments is not None:
            self._refresh_between_steps()
        super()._run_step()

    def _prepared_for_these(self) -> Prepared:
        if self._segments is None:
            return self._prepared
        first = next((param for group in self.param_groups for param in group["params"]), None)
        return self._prepared if first is None else self._alone.setdefault(id(first), Prepared())

    def _refresh_between_steps(self) -> None:
        """Refresh before the first group of a step, if the last step, of all groups, has made it due.

        DeepSpeed steps one group after the other, or one sub-group, and shows no other.
        """
        interval, clock = self._every_group[0]["mask_interval"], self._latest_clock()
        if interval is None or not clock or clock % interval or clock == self._refreshed_at:
            return
        stepping = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if all(int(self.state.get(param, {}).get("step", 0)) == clock for param in stepping):  # it is over for all
            self._refreshed_at = clock
            self._refresh((), UNSCALED, clock)

    def _warn_of_flat_partitions(self) -> None:
        if self._warned or all(has_names(g) or "param_names" not in g or not g["params"] for g in self.param_groups):
            return
        self._warned = True
        warn(
            "the parameters are not those that were named: DeepSpeed ZeRO has put flat partitions in their place. "
            "Each is one layer now, with a budget of its own; optimizer.bind_deepspeed(engine) brings the layers back"
        )

    def _sleeping(self, members: Iterable[Tensor]) -> list[Tensor]:
        # a flat partition that is not bound goes by its own clock
        named = all(has_names(g) or "param_names" not in g or not g["params"] for g in self.param_groups)
        return super()._sleeping(members) if named else []

    def _idle_step(self) -> None:
        """Take part in the refreshes of the ranks that hold entries, where this one holds none."""
        if not self._holds_nothing():
            return
        self._meet()
        clock, interval = self._latest_clock() + 1, self.param_groups[0]["mask_interval"]
        self._keep_clock(clock)
        if interval is not None and clock % interval == 0:
            self._refresh((), UNSCALED, clock)

    def _clock_device(self, param: Tensor, group: dict[str, Any]) -> torch.device | None:
        # ranks decide together whether to refresh, and the host must know
        return None if self._ranks() is not None else super()._clock_device(param, group)

    def _between_iterations(self) -> None:
        """Refresh where the step that was taken one by one brought the clock to a multiple of mask_interval."""
        super()._between_iterations()
        interval, clock = self.param_groups[0]["mask_interval"], self._latest_clock()
        if interval is not None and clock % interval == 0:
            self._refresh((), UNSCALED, clock)

    # Groups and state ------------------------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for param in group["params"]:
            if param.is_complex() and self._lock_in(param, group) == "exp_avg_sq":
                raise NotImplementedError(
                    f"{self._name(param)} is {param.dtype}, whose second moment has two parts for each entry and no "
                    "place for its lock; use importance='ema', or isolation_ratio=0 in its group"
                )
        self._grouping.resolve(named="param_names" in group)
        self._grouping.stamp(self.param_groups)
        self._part()

    def _check_settings(self, group: dict[str, Any], shared: dict[str, Any]) -> None:
        check_settings(group)
        super()._check_settings(group, shared)

    def _packed(self, packed: dict[str, Any]) -> dict[str, Any]:
        if self.defaults["importance"] != "exp_avg_sq":
            return packed
        return {**packed, "state": {key: _unlocked(entry) for key, entry in packed["state"].items()}}

    def _check_loaded(self, groups: list[dict[str, Any]]) -> None:
        check_saved(groups, self.param_groups)

    def _after_load(self) -> None:
        self._grouping.adopt(self.param_groups)
        self._part()
        if self._segments is not None:
            self._every_group = self.param_groups
        for param in self.state:
            self._put_locks_back(param, self._group_of(param))

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
        super()._ensure_state(param, group)
        # ZeroRedundancyOptimizer writes a loaded state into ours, past load_state_dict
        self._put_locks_back(param, group)

    def _put_locks_back(self, param: Tensor, group: dict[str, Any]) -> None:
        """Take the locks out of a loaded importance and into the second moment, where that is where they are."""
        state = self.state[param]
        if self.defaults["importance"] != "exp_avg_sq" or "importance" not in state:
            return
        locked = lock.is_locked(local(state.pop("importance")))
        signed = wrapped(lock.with_lock(local(state["exp_avg_sq"]), locked), param)
        # a captured step has the address of the one that is there; otherwise that is the state_dict's
        state["exp_avg_sq"] = state["exp_avg_sq"].copy_(signed) if group["capturable"] else signed

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep; no segments of DeepSpeed, which steps no copy."""
        if self._segments is None:
            return super().__getstate__()
        return {**super().__getstate__(), "_process_group": Lost("call bind_deepspeed(engine) of the copy")}

    _KEPT = (*LockedAdamW._KEPT, "_grouping", "_records")


def _unlocked(entry: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter's state with the lock taken out of exp_avg_sq."""
    if "exp_avg_sq" not in entry:
        return entry
    signed = entry["exp_avg_sq"]
    return {**entry, "exp_avg_sq": wrapped(lock.magnitude(local(signed)), signed), "importance": signed}
