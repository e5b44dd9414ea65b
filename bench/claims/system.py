"""What a system is: plain fine-tuning, of which every other system changes a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from claims.world import Batch, Task, World

Scores = dict[str, Tensor]


class System:
    """Plain fine-tuning: torch's AdamW on all entries, one task after another, one optimizer throughout."""

    def __init__(self, world: World, rate: float) -> None:
        self.world, self.rate = world, rate
        self.model = world.fresh()
        self.optimizer = self.make()

    def make(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.rate, fused=True)

    def stages(self) -> list[list[Task]]:
        """Return which tasks are learned together, stage by stage."""
        return [[task] for task in self.world.order]

    def begin(self, stage: Sequence[Task]) -> None:
        """Prepare for a stage."""

    def loss(self, batch: Batch) -> Tensor:
        """Return what is minimised."""
        return self.world.loss(self.model, batch)

    def adjust(self, loss: Tensor) -> None:
        """Change the gradients before they are clipped; `loss` is that of this step."""

    def end(self, stage: Sequence[Task]) -> None:
        """Conclude a stage."""

    def fixed(self) -> Mapping[str, Tensor]:
        """Return the entries that cannot move now: name of a parameter -> bool tensor; no name: all may move."""
        return {}

    def details(self) -> dict[str, Any]:
        """Return what is worth writing down beside the scores."""
        return {}


class Together(System):
    """Full multi-task fine-tuning: one stage with the rows of all tasks."""

    def stages(self) -> list[list[Task]]:
        """Return one stage."""
        return [list(self.world.order)]


class RandomGroups(System):
    """Multi-stage fine-tuning, random grouping: pairs of tasks in the order that the seed has drawn."""

    def stages(self) -> list[list[Task]]:
        """Return stages of two tasks; the last has one."""
        order = list(self.world.order)
        return [order[i : i + 2] for i in range(0, len(order), 2)]


class HeuristicGroups(System):
    """Multi-stage fine-tuning, heuristic grouping: tasks of a kind together."""

    KINDS = (("numbers", "sums"), ("sound", "countries"), ("source",))

    def stages(self) -> list[list[Task]]:
        """Return one stage for each kind, in the order of the first task of that kind."""
        groups: dict[tuple[str, ...], list[Task]] = {}
        for task in self.world.order:
            kind = next(names for names in self.KINDS if task.name in names)
            groups.setdefault(kind, []).append(task)
        return list(groups.values())


def random_scores(model: nn.Module, seed: int) -> Scores:
    """Return a random number for each entry."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(param.shape, generator=draw) for name, param in model.named_parameters()}
