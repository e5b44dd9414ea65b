"""Evolving isolation of an optimizer's parameters: who competes for protection, when, and what a refresh did.

What EPIAdamW and IsolatedOptimizer share. It knows torch's parameter groups, and of a parameter's state the one tensor
whose sign bits are the mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from epi_kernels import contract, dispatch, lock
from epi_kernels.layers import Grouping
from epi_kernels.optim.complex import as_real, squared_by_importance
from epi_kernels.optim.groups import Named
from epi_kernels.optim.nonfinite import NonfiniteCounts
from epi_kernels.optim.refresh import Candidate, refresh_
from epi_kernels.optim.scaling import UNSCALED, Scaling
from epi_kernels.telemetry import Budget, Record

_CHOICES = {
    "normalize": ("layer", "none"),
    "scope": ("global", "layer"),
    "threshold": ("exact", "histogram"),
    "importance": ("ema", "exp_avg_sq"),
}

# settings of the whole optimizer: they stand in every group, so that a checkpoint holds them, and are equal in all
SHARED = ("mask_interval", "layers", "normalize", "scope", "threshold", "importance")


@dataclass
class _Plan:
    """Who competes for protection in a refresh."""

    layers: list[str]
    layer_eligible: list[int]
    budgets: list[Budget] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)  # of the candidates
    untouched: list[int] = field(default_factory=list)


class Isolation(Named):
    """The part of an optimizer that chooses the protected entries; mixed into a torch.optim.Optimizer.

    A group has the settings that `check_settings` names, all of them.
    """

    # of the optimizer
    state: Any
    _backend: str
    _nonfinite: NonfiniteCounts

    # of the isolation; the optimizer sets the first, before it adds a group
    _grouping: Grouping
    _records: list[Record]
    _on_device: Record | None = None  # the last refresh of which the device alone knows whether it was one

    def _signed_importance(self, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return the tensor whose sign bits are the mask of `param`; None: nothing of it is or can be protected yet."""
        raise NotImplementedError

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
        self._refresh((), UNSCALED)

    def telemetry(self) -> list[dict[str, Any]]:
        """Return what each refresh of this object did, oldest first; reading waits for the device, stepping does not.

        A record is a dict of plain numbers and names:

        With ``capturable``, or ``fused`` and a scaler on a GPU, the device alone knows which steps refreshed, and the
        list has the last one.

        - ``step``: the clock at the refresh; ``protected_share``: protected / eligible.
        - ``eligible``, ``budget``, ``protected``: entries that compete, k, and entries protected; `protected` is below
          `budget` only for want of scores above 0, and above it only by ties at the threshold.
        - ``nonfinite``: NaN or infinite squared gradients so far, over all parameters.
        - ``budgets``: for each, ``scope`` ("global" or the layer's name), ``isolation_ratio``, ``eligible``,
          ``budget``, ``threshold`` (tau) and ``protected``.
        - ``layers``: for each, ``layer``, ``eligible``, ``protected``, ``locked`` (newly), ``released``, and the range
          of its importance, ``minimum`` and ``maximum``.
        """
        records = [*self._records, *([self._on_device] if self._on_device else [])]
        for device in {record.counts.device for record in records}:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        self._nonfinite.warn(self._name)
        return [record.as_dict() for record in records if record is not self._on_device or int(record.step)]

    # Inside ----------------------------------------------------------------------------------------------------------

    def _isolation_text(self) -> str:
        """Return one line on the grouping and the backend in force."""
        layers = self._grouping.of(self.param_groups)
        kinds = sorted({(param.device, as_real(param.detach()).dtype) for param in layers}, key=str)
        chosen = [f"{dispatch.explain(device, self._backend, dtype)} on {device}" for device, dtype in kinds]
        backends = "; ".join(dict.fromkeys(chosen))
        return (
            f"Isolation: {len(layers)} tensors in {len(set(layers.values()))} layers by {self._grouping.name!r}; "
            f"backend {backends}"
        )

    def _latest_clock(self) -> int:
        """Return the largest clock of any parameter."""
        return int(max((float(state["step"]) for state in self.state.values() if "step" in state), default=0.0))

    def _refresh(
        self,
        stepping: Sequence[Tensor],
        scaling: Scaling,
        clock: int | Tensor | None = None,
        due: Tensor | None = None,
    ) -> None:
        """Advance the importance of the parameters that are `stepping`, and choose the protected entries.

        Where the device alone knows whether it is time, `due` is not 0 where it is, and `clock` is there as well.
        """
        plan = self._plan({param: squared_by_importance(param.grad.detach()) for param in stepping})  # type: ignore[union-attr]
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
            grad_factor=scaling.factor,
            due=due,
            backend=self._backend,
        )
        record = Record(
            step=self._latest_clock() if clock is None else clock,
            layers=plan.layers,
            layer_eligible=plan.layer_eligible,
            budgets=plan.budgets,
            layer_of=[candidate.layer for candidate in plan.candidates],
            budget_of=[candidate.budget for candidate in plan.candidates],
            ranges=found.ranges,
            thresholds=found.thresholds,
            counts=found.counts,
            nonfinite=self._nonfinite.counters() if due is not None else self._nonfinite.snapshot(self._name),
        )
        if due is None:
            self._records.append(record)
        else:
            self._on_device = record.kept_where(due, self._on_device)

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


def check_settings(settings: dict[str, Any]) -> None:
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
