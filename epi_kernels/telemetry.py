"""What a refresh did: kept as it came from the device, turned into plain numbers when somebody reads it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """Entries that compete for the same k places."""

    scope: str  # "global", or the name of the one layer it covers
    isolation_ratio: float
    eligible: int
    rank: int  # k


@dataclass(frozen=True)
class Record:
    """One refresh. Tensors stay on their device until `as_dict`."""

    step: int | Tensor
    layers: list[str]
    layer_eligible: list[int]
    budgets: list[Budget]
    layer_of: list[int]  # layer of each row of counts
    budget_of: list[int]  # budget of each row of counts
    ranges: Tensor  # [layers, 2]: minimum and maximum importance
    thresholds: Tensor  # [budgets]
    counts: Tensor  # [tensors, 3]: protected, newly locked, released
    nonfinite: list[Tensor]  # all counters, or copies of them on the CPU

    def kept_where(self, due: Tensor, before: "Record | None") -> "Record":
        """Return this record where `due` is not 0, and the one `before` it elsewhere; its tensors are then written.

        Without one before, and `due` 0, the step is 0: there was no refresh.
        """
        fits = before is not None and (before.layers, before.budgets, before.layer_of) == (
            self.layers,
            self.budgets,
            self.layer_of,
        )
        assert isinstance(self.step, Tensor)
        if before is None or not fits:
            return replace(self, step=self.step * (due != 0))
        for name in ("step", "ranges", "thresholds", "counts"):
            mine, theirs = getattr(self, name), getattr(before, name)
            theirs.copy_(torch.where(due.to(mine.device) != 0, mine, theirs))
        return before

    def as_dict(self) -> dict[str, Any]:
        """Return the record as `EPIAdamW.telemetry` documents it."""
        per_layer = [[0, 0, 0] for _ in self.layers]
        per_budget = [0 for _ in self.budgets]
        for row, layer, budget in zip(self.counts.tolist(), self.layer_of, self.budget_of, strict=True):
            per_layer[layer] = [total + count for total, count in zip(per_layer[layer], row, strict=True)]
            per_budget[budget] += row[0]
        eligible, protected = sum(self.layer_eligible), sum(per_budget)
        return {
            "step": int(self.step),
            "protected_share": protected / eligible if eligible else 0.0,
            "eligible": eligible,
            "budget": sum(budget.rank for budget in self.budgets),
            "protected": protected,
            "nonfinite": sum(int(counts.sum()) for counts in self.nonfinite),
            "budgets": [
                {
                    "scope": budget.scope,
                    "isolation_ratio": budget.isolation_ratio,
                    "eligible": budget.eligible,
                    "budget": budget.rank,
                    "threshold": threshold,
                    "protected": count,
                }
                for budget, threshold, count in zip(self.budgets, self.thresholds.tolist(), per_budget, strict=True)
            ],
            "layers": [
                {
                    "layer": name,
                    "eligible": eligible,
                    "protected": counts[0],
                    "locked": counts[1],
                    "released": counts[2],
                    "minimum": low,
                    "maximum": high,
                }
                for name, eligible, counts, (low, high) in zip(
                    self.layers, self.layer_eligible, per_layer, self.ranges.tolist(), strict=True
                )
                if eligible
            ],
        }
