"""One training loop for all systems, and what a run writes down."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from claims.world import Batch, Task, World
from epi_kernels.metrics import conflict_matrix

if TYPE_CHECKING:
    from claims.system import System


def conflicts(system: System, world: World, seen: Sequence[Task]) -> float | None:
    """Return the mean gradient conflict over all pairs of tasks (EPI Eq. 15), in the entries that may move.

    None: the system has learned only one task so far.
    """
    if len(seen) < 2:
        return None
    fixed = system.fixed()
    gradients = {}
    for task in seen:
        gradient = world.gradient(system.model, world.batch(task, world.budget.conflict, "conflict"))
        gradients[task.name] = {
            name: tensor.masked_fill(fixed[name], 0.0) if name in fixed else tensor for name, tensor in gradient.items()
        }
    # a gradient that is 0 where entries may move has no direction, and conflicts with none
    matrix = conflict_matrix({name: of for name, of in gradients.items() if any(map(torch.any, of.values()))})
    names = [task.name for task in seen]
    pairs = [matrix.get(a, {}).get(b, 0.0) for i, a in enumerate(names) for b in names[:i]]
    return sum(pairs) / len(pairs)


@dataclass
class Result:
    """What a run found; one line of JSON."""

    order: list[str]
    stages: list[list[str]]
    scores: list[list[tuple[float, float]]]  # row t: after t stages, as `World.examine` has them
    conflict: list[float | None] = field(default_factory=list)  # after each stage
    seconds: float = 0.0  # of all, on one core
    details: dict[str, Any] = field(default_factory=dict)  # what the system tells of itself


def learn(system: System, world: World, *, choosing: bool = False) -> Result:
    """Learn the tasks, stage by stage.

    Args:
        system: the method, with a model that has the pre-trained weights.
        world: the tasks and the rows.
        choosing: whether this run chooses a learning rate, by other held-out lines than those of reported runs.
    """
    started = time.perf_counter()
    stages = system.stages()
    names = [[task.name for task in stage] for stage in stages]
    result = Result([task.name for task in world.order], names, [world.examine(system.model, choosing=choosing)])
    seen: list[Task] = []
    for stage in stages:
        system.begin(stage)
        for batch in world.stage(stage):
            step(system, batch)
        system.end(stage)
        seen += stage
        result.scores.append(world.examine(system.model, choosing=choosing))
        if not choosing:
            result.conflict.append(conflicts(system, world, seen))
    result.details = system.details()
    result.seconds = round(time.perf_counter() - started, 1)
    return result


def step(system: System, batch: Batch) -> None:
    """Make one optimizer step of a system."""
    loss = system.loss(batch)
    loss.backward()
    system.adjust(loss)
    nn.utils.clip_grad_norm_(system.model.parameters(), 1.0)
    system.optimizer.step()
    system.model.zero_grad()
