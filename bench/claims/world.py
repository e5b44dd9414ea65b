"""What a run gives to its system: tasks in an order, a model, rows for every purpose, a loss and an examination."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# tensors whose first dimension counts the rows, and what belongs to all rows
Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Budget:
    """How long everything takes; equal for all systems."""

    steps: int = 120  # of a task
    rows: int = 12  # of a batch
    examined: int = 96  # rows of a task
    scored: int = 128  # rows by which a task's entries are scored
    conflict: int = 48  # rows that a task's gradient is of
    probe: int = 60  # steps of a probe for static isolation
    interval: int = 20  # EPI's H
    beta: float = 0.95  # of EPI's importance: remembers 20 steps, as the paper's 0.99 a fifth of its interval of 500

    @property
    def remembered(self) -> int:
        """Rows of a task that replay and GEM keep: 1% of those that were learned from, as in PIECE's B.2."""
        return max(1, self.steps * self.rows // 100)


SMOKE = Budget(steps=2, rows=2, examined=2, scored=8, conflict=2, probe=1, interval=1)


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Yield a batch as batches of `size` rows."""
    for first in range(0, len(batch[0]), size):
        yield tuple(part[first : first + size] if isinstance(part, Tensor) else part for part in batch)


class Task(Protocol):
    """What systems know of a task."""

    name: str


class World(abc.ABC):
    """The world of a seed, the same for all systems.

    Args:
        seed: draws the order of the tasks and the rows.
        budget: how long everything takes.
        order: the tasks, in the order in which they are learned.
    """

    def __init__(self, seed: int, budget: Budget, order: Sequence[Task]) -> None:
        self.seed, self.budget, self.order = seed, budget, order

    @abc.abstractmethod
    def fresh(self) -> nn.Module:
        """Return a model with the pre-trained weights."""

    @abc.abstractmethod
    def rows(self, task: Task, count: int, seed: int) -> Batch:
        """Return training rows of a task, which the seed draws."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""

    @abc.abstractmethod
    def examine(self, model: nn.Module, *, choosing: bool) -> list[tuple[float, float]]:
        """Return two scores of each task in order, and last of what the model could do before, in percent.

        Args:
            model: is left as it is.
            choosing: take the held-out rows by which learning rates are chosen; no figure is from these.
        """

    def batch(self, task: Task, count: int, purpose: str) -> Batch:
        """Return training rows for a purpose, other ones for another purpose."""
        # by a digest: hash() of a string is another number in another process
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()[:6], "big")
        return self.rows(task, count, seed)

    def stage(self, tasks: Sequence[Task]) -> Iterator[Batch]:
        """Return the batches of a stage, a mixture of its tasks; a task has the same rows in any stage."""
        parts = [self.batch(task, self.budget.steps * self.budget.rows, "training") for task in tasks]
        if len(tasks) == 1:
            return cut(parts[0], self.budget.rows)
        together = tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
        places = torch.randperm(len(together[0]), generator=torch.Generator().manual_seed(self.seed))
        return cut(tuple(rows[places] for rows in together), self.budget.rows)

    def scoring(self, task: Task) -> list[Batch]:
        """Return the rows by which the entries of a model are scored for a task."""
        return list(cut(self.batch(task, self.budget.scored, "scoring"), 64))

    def memory(self, task: Task) -> Batch:
        """Return the first rows that were learned from, 1% of them: what replay and GEM keep of a task."""
        return next(cut(self.batch(task, self.budget.steps * self.budget.rows, "training"), self.budget.remembered))

    def gradient(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the gradient of the loss of a batch, {name: tensor}, without touching .grad."""
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        return dict(zip(named, torch.autograd.grad(self.loss(model, batch), list(named.values())), strict=True))
