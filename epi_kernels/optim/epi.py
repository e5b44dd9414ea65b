"""EPIAdamW: AdamW with evolving parameter isolation (EPI, arXiv 2604.14010, Alg. 1)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from epi_kernels import contract, dispatch, lock
from epi_kernels.layers import Grouping, LayersArgument, check_saved
from epi_kernels.optim.base import LockedAdamW, new_state, require_default
from epi_kernels.optim.refresh import Candidate, refresh_
from epi_kernels.telemetry import Budget, Record

_CHOICES = {
    "normalize": ("layer", "none"),
    "scope": ("global", "layer"),
    "threshold": ("exact", "histogram"),
    "importance": ("ema", "exp_avg_sq"),
}

# settings of the whole optimizer: they stand in every group, so that a checkpoint holds them, and are equal in all
_SHARED = ("mask_interval", "layers", "normalize", "scope", "threshold", "importance")


@dataclass
class _Plan:
    """Who competes for protection in a refresh."""

    layers: list[str]
    layer_eligible: list[int]
    budgets: list[Budget] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)  # of the candidates
    untouched: list[int] = field(default_factory=list)


class EPIAdamW(LockedAdamW):
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
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, fused: as in torch.optim.AdamW. `foreach` and
            `fused` are checked as torch does; `backend` decides what runs.
        capturable, differentiable: not in this version.
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
            state or traffic of its own. The lock bit then rides in the sign of ``exp_avg_sq``.
        importance_dtype, rounding, master_weights, state_dtype, process_group: not in this version.
        backend: "auto", or the name of one, which then runs or raises.

    State of a parameter: torch's ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` and, with
    ``importance="ema"``, ``importance``: S in float32 with the lock in its sign bit (see `epi_kernels.lock`).

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
        }
        _check_settings(settings)
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Invalid rounding: {rounding!r}; choose one of ('nearest', 'stochastic')")
        require_default(
            importance_dtype=(importance_dtype, torch.float32),
            rounding=(rounding, "nearest"),
            master_weights=(master_weights, None),
            state_dtype=(state_dtype, None),
            process_group=(process_group, None),
        )
        self._grouping = Grouping(layers)
        self._records: list[Record] = []
        self._clock: int | None = None
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
            backend=backend,
            settings=settings,
        )

    # Public ----------------------------------------------------------------------------------------------------------

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` are protected: a new bool tensor of its shape, True = protected.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        signed = self._signed_importance(param, self._group_of(param))
        return torch.zeros_like(param, dtype=torch.bool) if signed is None else lock.is_locked(signed)

    def importance(self, param: Tensor) -> Tensor:
        """Return the importance S of each entry of `param`: a new tensor of its shape, >= 0, in squared gradient units.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        signed = self._signed_importance(param, self._group_of(param))
        return torch.zeros_like(param, dtype=torch.float32) if signed is None else lock.magnitude(signed)

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the protected entries now, from the importance as it is; nothing else changes.

        For task boundaries. With beta = 0.99 the importance remembers about 100 steps: what is protected is what the
        task just trained uses.
        """
        self._refresh({})

    def telemetry(self) -> list[dict[str, Any]]:
        """Return what each refresh of this object did, oldest first; reading waits for the device, stepping does not.

        A record is a dict of plain numbers and names:

        - ``step``: the clock at the refresh; ``protected_share``: protected / eligible.
        - ``eligible``, ``budget``, ``protected``: entries that compete, k, and entries protected; `protected` is below
          `budget` only for want of scores above 0, and above it only by ties at the threshold.
        - ``nonfinite``: NaN or infinite squared gradients so far, over all parameters.
        - ``budgets``: for each, ``scope`` ("global" or the layer's name), ``isolation_ratio``, ``eligible``,
          ``budget``, ``threshold`` (tau) and ``protected``.
        - ``layers``: for each, ``layer``, ``eligible``, ``protected``, ``locked`` (newly), ``released``, and the range
          of its importance, ``minimum`` and ``maximum``.
        """
        for device in {record.counts.device for record in self._records}:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        self._nonfinite.warn(self._name)
        return [record.as_dict() for record in self._records]

    def __repr__(self) -> str:
        """Return torch's text and the grouping and backend in force."""
        layers = self._grouping.of(self.param_groups)
        kinds = sorted({(param.device, param.dtype) for param in layers}, key=str)
        chosen = [f"{dispatch.explain(device, self._backend, dtype)} on {device}" for device, dtype in kinds]
        backends = "; ".join(dict.fromkeys(chosen))
        return (
            f"{super().__repr__()}\nIsolation: {len(layers)} tensors in {len(set(layers.values()))} layers "
            f"by {self._grouping.name!r}; backend {backends}"
        )

    # The step --------------------------------------------------------------------------------------------------------

    def _lock_in(self, param: Tensor, group: dict[str, Any]) -> str:
        if group["isolation_ratio"] == 0:
            return "none"
        return "importance" if group["importance"] == "ema" else "exp_avg_sq"

    def _new_lock(self, param: Tensor) -> Tensor:
        return new_state(param, "importance")

    def _lock_settings(self, group: dict[str, Any]) -> tuple[object, ...]:
        return (group["isolation_ratio"] == 0, group["importance"])

    def _before_update(self, clock: int) -> bool:
        """Refresh the masks where mask_interval says so; the clock is the largest step of any parameter."""
        before = self._clock
        if before is None:
            stepped = {param for bundle in self._bundles for param in bundle.params}
            before = int(max(float(s["step"]) - (p in stepped) for p, s in self.state.items() if "step" in s))
        self._clock = max(before, clock)
        interval = self.param_groups[0]["mask_interval"]
        # a clock that stands still was refreshed, if due, when it reached this value
        if interval is None or self._clock == before or self._clock % interval:
            return False
        self._refresh({param: param.grad for bundle in self._bundles for param in bundle.params})
        return True

    def _refresh(self, grads: dict[Tensor, Tensor | None]) -> None:
        """Advance the importance where there is a gradient, and choose the protected entries."""
        plan = self._plan(grads)
        if not plan.candidates:
            return
        shared = self.param_groups[0]
        found = refresh_(
            plan.candidates,
            plan.untouched,
            layer_count=len(plan.layers),
            ranks=[budget.rank for budget in plan.budgets],
            counters=lambda where: self._nonfinite.counter([plan.params[i] for i in where]),
            normalize=shared["normalize"] == "layer",
            exact=shared["threshold"] == "exact",
            keep_finite=shared["importance"] == "ema",
            backend=self._backend,
        )
        self._records.append(
            Record(
                step=self._clock or 0,
                layers=plan.layers,
                layer_eligible=plan.layer_eligible,
                budgets=plan.budgets,
                layer_of=[candidate.layer for candidate in plan.candidates],
                budget_of=[candidate.budget for candidate in plan.candidates],
                ranges=found.ranges,
                thresholds=found.thresholds,
                counts=found.counts,
                nonfinite=self._nonfinite.snapshot(self._name),
            )
        )

    def _plan(self, grads: dict[Tensor, Tensor | None]) -> _Plan:
        """Return who competes for protection, in which layer and for which budget."""
        layers = self._grouping.of(self.param_groups)
        index = {name: i for i, name in enumerate(dict.fromkeys(layers.values()))}
        plan = _Plan(layers=list(index), layer_eligible=[0] * len(index))
        budget_index: dict[tuple[str, float], int] = {}
        eligible: list[int] = []
        for param, group in self._eligible():
            scope = layers[param] if group["scope"] == "layer" else "global"
            budget = budget_index.setdefault((scope, group["isolation_ratio"]), len(budget_index))
            eligible += [0] * (budget + 1 - len(eligible))
            eligible[budget] += param.numel()
            layer = index[layers[param]]
            plan.layer_eligible[layer] += param.numel()
            signed = self._signed_importance(param, group)
            if signed is None:
                # never had a gradient: its importance is 0, for which no memory is spent
                plan.untouched.extend([layer] if param.numel() else [])
                continue
            beta = group["importance_beta"] if group["importance"] == "ema" else float(group["betas"][1])
            plan.params.append(param)
            plan.candidates.append(Candidate(signed, grads.get(param), beta, 1.0 - beta, layer, budget))
        for (scope, ratio), budget in budget_index.items():
            plan.budgets.append(Budget(scope, ratio, eligible[budget], contract.budget(ratio, eligible[budget])))
        return plan

    def _eligible(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the parameters whose entries may be protected, each once, with their groups."""
        seen = set()
        for group in self.param_groups:
            for param in group["params"]:
                if group["isolation_ratio"] > 0 and param.requires_grad and param not in seen:
                    seen.add(param)
                    yield param, group

    def _signed_importance(self, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return the tensor whose sign bits are the mask of `param`; None: nothing of it is or can be protected yet."""
        lock_in = self._lock_in(param, group)
        return None if lock_in == "none" else self.state.get(param, {}).get(lock_in)

    # Groups and state ------------------------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for key in _SHARED:
            if group[key] != self.defaults[key]:
                raise ValueError(
                    f"{key}={group[key]!r} in a parameter group; the optimizer has {self.defaults[key]!r}, "
                    "and it is one for all groups"
                )
        _check_settings(group)
        self._grouping.resolve(named="param_names" in group)
        self._grouping.stamp(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form.

        With ``importance="exp_avg_sq"`` each entry has ``exp_avg_sq`` without locks, so that torch.optim.AdamW can load
        it, and the signed tensor as ``importance``.
        """
        packed = super().state_dict()
        if self.defaults["importance"] == "exp_avg_sq":
            packed["state"] = {key: _unlocked(entry) for key, entry in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of EPIAdamW or of torch.optim.AdamW, whose importance then starts at 0.

        Settings that the state holds replace those of the constructor, as torch does with lr and betas.

        Raises:
            ValueError: the state was saved under another grouping of the parameters into layers.
        """
        check_saved(state_dict["param_groups"], self.param_groups)
        super().load_state_dict(state_dict)
        self.defaults.update({key: self.param_groups[0][key] for key in _SHARED if key != "layers"})
        self._grouping.stamp(self.param_groups)
        self._clock = None
        if self.defaults["importance"] == "exp_avg_sq":
            for state in self.state.values():
                if "importance" in state:
                    locked = lock.is_locked(state.pop("importance"))
                    state["exp_avg_sq"] = lock.with_lock(state["exp_avg_sq"], locked)

    _KEPT = (*LockedAdamW._KEPT, "_grouping", "_records", "_clock")


def _unlocked(entry: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter's state with the lock taken out of exp_avg_sq."""
    if "exp_avg_sq" not in entry:
        return entry
    return {**entry, "exp_avg_sq": lock.magnitude(entry["exp_avg_sq"]), "importance": entry["exp_avg_sq"]}


def _check_settings(settings: dict[str, Any]) -> None:
    """Check our arguments.

    Raises:
        ValueError: naming the argument and its value.
    """
    ratio, beta, interval = settings["isolation_ratio"], settings["importance_beta"], settings["mask_interval"]
    if not (_is_number(ratio) and 0.0 <= ratio < 1.0):
        raise ValueError(f"Invalid isolation_ratio: {ratio!r}; it is a share of the entries, 0 <= p < 1")
    if not (_is_number(beta) and 0.0 <= beta < 1.0):
        raise ValueError(f"Invalid importance_beta: {beta!r}; 0 <= beta < 1")
    if interval is not None and not (isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1):
        raise ValueError(f"Invalid mask_interval: {interval!r}; steps >= 1, or None for refresh() alone")
    for name, allowed in _CHOICES.items():
        if settings[name] not in allowed:
            raise ValueError(f"Invalid {name}: {settings[name]!r}; choose one of {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
