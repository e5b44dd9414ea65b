"""Systems that train few entries: PIECE and its controls, MIGU, LayerNorm, LoRA and O-LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from claims.system import Scores, System, random_scores
from claims.world import Batch, Task, World
from epi_kernels import SparseAdamW
from epi_kernels.importance import fisher, output_magnitude, second_order
from epi_kernels.metrics import mask_jaccard
from epi_kernels.select import top_k


class Selecting(System):
    """Train the entries that are chosen for a task, others for each task and with fresh moments."""

    def __init__(self, world: World, rate: float) -> None:
        self.masks: dict[str, dict[str, Tensor]] = {}
        super().__init__(world, rate)

    def make(self) -> SparseAdamW:
        """Return SparseAdamW with nothing selected."""
        return SparseAdamW(self.model.named_parameters(), lr=self.rate, trainable={})

    def begin(self, stage: Sequence[Task]) -> None:
        """Choose the entries of the next task."""
        (task,) = stage
        self.masks[task.name] = self.choose(task)
        self.optimizer.select(self.masks[task.name])

    def choose(self, task: Task) -> dict[str, Tensor]:
        """Return the entries to train, {name: bool tensor}."""
        raise NotImplementedError

    def fixed(self) -> dict[str, Tensor]:
        """Return all but the entries of the last task."""
        return {name: ~mask for name, mask in list(self.masks.values())[-1].items()}

    def details(self) -> dict[str, Any]:
        """Return the overlap of each two tasks, and how much of each parameter the first task trains."""
        pairs = itertools.combinations(self.masks, 2)
        first = next(iter(self.masks.values()))
        sizes = {name: int(mask.sum()) for name, mask in first.items()}
        return {
            "overlaps": {f"{a} {b}": round(mask_jaccard(self.masks[a], self.masks[b]), 4) for a, b in pairs},
            "selected": {name: size for name, size in sizes.items() if size},
        }


class Sparse(Selecting):
    """Train the entries that score highest for a task (PIECE).

    Args:
        world: as in `System`.
        rate: as in `System`.
        ratio: the share to train.
        score: (world, model, batches of the task) -> scores.
    """

    def __init__(
        self, world: World, rate: float, ratio: float, score: Callable[[World, nn.Module, list[Batch]], Scores]
    ) -> None:
        self.ratio, self.score = ratio, score
        super().__init__(world, rate)

    def choose(self, task: Task) -> dict[str, Tensor]:
        """Return the entries with the highest scores."""
        return top_k(self.score(self.world, self.model, self.world.scoring(task)), self.ratio)


def fisher_scores(world: World, model: nn.Module, batches: list[Batch]) -> Scores:
    """Score as PIECE-F."""
    return fisher(model, batches, world.loss, progress=False)


def second_order_scores(xi: float | None) -> Callable[[World, nn.Module, list[Batch]], Scores]:
    """Return the scores of PIECE-S; None for xi is that of the released code."""
    return lambda world, model, batches: second_order(model, batches, world.loss, xi=xi, progress=False)


def weight_magnitude(world: World, model: nn.Module, batches: list[Batch]) -> Scores:
    """Score by the size of the weights."""
    return {name: param.detach().abs() for name, param in model.named_parameters()}


def chance(world: World, model: nn.Module, batches: list[Batch]) -> Scores:
    """Score at random, other entries for each task."""
    return random_scores(model, int(batches[0][0].sum()))


class MIGU(Selecting):
    """Train the rows of linear layers with the larger outputs, half of them as in its authors' code, and all else."""

    def choose(self, task: Task) -> dict[str, Tensor]:
        """Return the rows, and all other parameters; for the first task all entries."""
        scores = output_magnitude(self.model, self.world.scoring(task), forward=lambda model, batch: model(batch[0]))
        rows = top_k(scores, 0.5, scope="layer") if self.masks else {}
        return {name: torch.ones_like(param, dtype=torch.bool) for name, param in self.model.named_parameters()} | rows


class LayerNorms(System):
    """Train the parameters of the norms alone."""

    def make(self) -> torch.optim.Optimizer:
        """Return AdamW of the norms."""
        norms = [p for module in self.model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()]
        return torch.optim.AdamW(norms, lr=self.rate)


class LowRank(nn.Module):
    """W -> W + scale B A, with A [rank, columns] and B [rows, rank] (LoRA)."""

    RANK, SCALE = 8, 32 / 8

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(self.RANK, columns, device=weight.device) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, self.RANK, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the update."""
        return weight + self.SCALE * (self.b @ self.a)


class LoRA(System):
    """One low-rank update of the query and value projections, trained through all tasks (SeqLoRA; no dropout)."""

    def make(self) -> torch.optim.Optimizer:
        """Add the updates, and return AdamW of them."""
        self.model.requires_grad_(False)
        torch.manual_seed(self.world.seed)
        self.updates = self.add()
        return torch.optim.AdamW([param for update in self.updates for param in update.parameters()], lr=self.rate)

    def add(self) -> list[LowRank]:
        """Add an update to each projection."""
        updates = []
        for name, module in self.model.named_modules():
            if name.endswith((".query", ".value")):
                updates.append(LowRank(module.weight))
                parametrize.register_parametrization(module, "weight", updates[-1])
        return updates


class OrthogonalLoRA(LoRA):
    """New low-rank updates for each task, pushed to be orthogonal to those of earlier tasks (O-LoRA)."""

    GAMMA = 0.5

    def make(self) -> torch.optim.Optimizer:
        """Return AdamW of the first task's updates."""
        self.earlier: list[list[LowRank]] = []
        self.begun = False
        return super().make()

    def begin(self, stage: Sequence[Task]) -> None:
        """Freeze the updates so far, and add others."""
        if self.begun:
            for update in self.updates:
                update.requires_grad_(False)
            self.earlier.append(self.updates)
            self.updates = self.add()
            params = [param for update in self.updates for param in update.parameters()]
            self.optimizer = torch.optim.AdamW(params, lr=self.rate)
        self.begun = True

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss and the penalty."""
        penalty = sum(
            (old.a @ new.a.T).square().sum()
            for updates in self.earlier
            for old, new in zip(updates, self.updates, strict=True)
        )
        return super().loss(batch) + self.GAMMA * penalty
