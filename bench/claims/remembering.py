"""Methods that keep something of earlier tasks: a penalty (EWC), a constraint (GEM), a teacher (LwF), rows (replay)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from claims.learning import step
from claims.system import Scores, System
from claims.tasks import IGNORED
from claims.world import Batch, Task, World
from epi_kernels.importance import fisher


class EWC(System):
    """Elastic weight consolidation: a quadratic penalty for each earlier task, by its Fisher information (Eq. 14)."""

    def __init__(self, world: World, rate: float, strength: float) -> None:
        self.strength = strength
        self.anchors: list[tuple[Scores, dict[str, Tensor]]] = []
        super().__init__(world, rate)

    def adjust(self, loss: Tensor) -> None:
        """Add the gradient of the penalties."""
        for information, values in self.anchors:
            for name, param in self.model.named_parameters():
                pull = (param.detach() - values[name]).mul_(information[name])
                param.grad.add_(pull, alpha=2 * self.strength)

    def end(self, stage: Sequence[Task]) -> None:
        """Keep the values and the Fisher information."""
        information = fisher(self.model, self.world.scoring(stage[0]), self.world.loss, progress=False)
        self.anchors.append((information, {n: p.detach().clone() for n, p in self.model.named_parameters()}))


class GEM(System):
    """Gradient episodic memory: the nearest gradient that increases the loss on no earlier task (Eq. 15-16)."""

    def __init__(self, world: World, rate: float) -> None:
        self.memories: list[Batch] = []
        super().__init__(world, rate)

    def adjust(self, loss: Tensor) -> None:
        """Project the gradient."""
        if not self.memories:
            return
        named = dict(self.model.named_parameters())
        gradient = torch.cat([param.grad.flatten() for param in named.values()])
        rows = [
            torch.cat([g.flatten() for g in self.world.gradient(self.model, kept).values()]) for kept in self.memories
        ]
        memory = torch.stack(rows)
        products = memory @ gradient
        if bool((products >= 0).all()):
            return
        projected = gradient + memory.T @ nonnegative(memory @ memory.T, products)
        for param, part in zip(named.values(), projected.split([p.numel() for p in named.values()]), strict=True):
            param.grad.copy_(part.view_as(param))

    def end(self, stage: Sequence[Task]) -> None:
        """Keep rows of the task."""
        self.memories.append(self.world.memory(stage[0]))


def nonnegative(matrix: Tensor, vector: Tensor, rounds: int = 200) -> Tensor:
    """Return the x >= 0 that minimises x.matrix.x / 2 + vector.x, by coordinate descent: one number for each task.

    >>> nonnegative(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([-1.0, 3.0]))
    tensor([0.5000, 0.0000])
    """
    x = torch.zeros_like(vector)
    for _, i in itertools.product(range(rounds), range(len(vector))):
        slope = vector[i] + matrix[i] @ x
        x[i] = torch.clamp(x[i] - slope / matrix[i, i].clamp_min(1e-30), min=0.0)
    return x


class LwF(System):
    """Learning without forgetting: the answers of the model before the task, distilled (Eq. 17-19)."""

    ALPHA, TEMPERATURE = 0.5, 2.0

    def begin(self, stage: Sequence[Task]) -> None:
        """Keep the model as it is."""
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss and the distillation loss, over the bytes that are predicted."""
        inputs, targets = batch
        scored = targets.flatten() != IGNORED
        logits = self.model(inputs).flatten(0, 1)[scored]
        old = self.teacher(inputs).flatten(0, 1)[scored]
        soft = functional.cross_entropy(logits / self.TEMPERATURE, (old / self.TEMPERATURE).softmax(-1))
        return functional.cross_entropy(logits, targets.flatten()[scored]) + self.ALPHA * soft


class ReplayDuring(System):
    """Replay-online: a row of earlier tasks joins each batch."""

    def __init__(self, world: World, rate: float) -> None:
        self.kept: list[Batch] = []
        self.draw = torch.Generator().manual_seed(world.seed)
        super().__init__(world, rate)

    def remembered(self, count: int) -> Batch:
        """Return rows of earlier tasks, drawn uniformly."""
        inputs, targets = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        places = torch.randint(len(inputs), (count,), generator=self.draw)
        return inputs[places], targets[places]

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of the batch and the row."""
        if self.kept:
            batch = tuple(torch.cat(parts) for parts in zip(batch, self.remembered(1), strict=True))
        return super().loss(batch)

    def end(self, stage: Sequence[Task]) -> None:
        """Keep rows of the task."""
        self.kept.append(self.world.memory(stage[0]))


class ReplayAfter(ReplayDuring):
    """Replay: after a task, more steps on rows of earlier tasks, a tenth of a task's steps."""

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of the batch alone."""
        return self.world.loss(self.model, batch)

    def end(self, stage: Sequence[Task]) -> None:
        """Take the steps, then keep rows of the task."""
        if self.kept:
            for _ in range(max(1, self.world.budget.steps // 10)):
                step(self, self.remembered(self.world.budget.rows))
        super().end(stage)
