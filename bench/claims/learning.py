"""One training loop for all systems: the sizes, the budget, the pre-training, and what a run writes down."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from model import ByteTransformer
from torch import Tensor, nn
from torch.nn import functional

from claims.tasks import CONTEXT, IGNORED, Batch, Task, make_tasks, prose
from epi_kernels.metrics import conflict_matrix

if TYPE_CHECKING:
    from claims.system import System

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Size:
    """A byte-level transformer and its pre-training."""

    width: int
    blocks: int
    heads: int
    steps: int  # of the pre-training
    rate: float  # of the pre-training

    def model(self) -> ByteTransformer:
        """Return a model with fresh weights."""
        return ByteTransformer(CONTEXT, self.width, self.blocks, self.heads)


SIZES = {
    "XS": Size(64, 1, 2, 2, 1e-3),  # for --smoke: it learns nothing
    "S": Size(80, 5, 5, 2500, 3e-3),  # 0.43M parameters
    "M": Size(160, 5, 5, 2500, 2e-3),  # 1.6M
    "L": Size(512, 12, 8, 20_000, 5e-4),  # 38M, for a GPU
}


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


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of the bytes that are predicted."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Return a batch as batches of `size` rows."""
    yield from zip(batch[0].split(size), batch[1].split(size), strict=True)


@dataclass
class World:
    """What a run gives to its system, the same for all systems of a seed."""

    size: str
    seed: int
    budget: Budget
    order: Sequence[Task]  # in which the tasks are learned
    weights: Mapping[str, Tensor]  # of the pre-training
    device: str = "cpu"

    def batch(self, task: Task, count: int, purpose: str) -> Batch:
        """Return training rows for a purpose, other ones for another purpose."""
        # by a digest: hash() of a string is another number in another process
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()[:6], "big")
        inputs, targets = task.rows(count, seed)
        return inputs.to(self.device), targets.to(self.device)

    def stage(self, tasks: Sequence[Task]) -> Iterator[Batch]:
        """Return the batches of a stage: rows of all its tasks in a mixture; a task has the same rows in any stage."""
        parts = [self.batch(task, self.budget.steps * self.budget.rows, "training") for task in tasks]
        inputs, targets = (torch.cat(rows) for rows in zip(*parts, strict=True))
        if len(tasks) > 1:
            places = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(self.seed))
            inputs, targets = inputs[places], targets[places]
        return cut((inputs, targets), self.budget.rows)

    def scoring(self, task: Task) -> list[Batch]:
        """Return the rows by which the entries of a model are scored for a task."""
        return list(cut(self.batch(task, self.budget.scored, "scoring"), 64))

    def memory(self, task: Task) -> Batch:
        """Return the first rows that were learned from, 1% of them: what replay and GEM keep of a task."""
        inputs, targets = self.batch(task, self.budget.steps * self.budget.rows, "training")
        return inputs[: self.budget.remembered], targets[: self.budget.remembered]

    def fresh(self) -> ByteTransformer:
        """Return a model with the pre-trained weights."""
        model = SIZES[self.size].model()
        model.load_state_dict(self.weights)
        return model.to(self.device)


def make_world(size: str, seed: int, budget: Budget, folder: Path, device: str = "cpu", tasks: int = 5) -> World:
    """Return the world of a seed, which draws the order of the tasks and the rows; the first `tasks` of the order."""
    order = list(make_tasks())
    random.Random(seed).shuffle(order)
    return World(size, seed, budget, order[:tasks], pretrained(size, folder, device), device)


def pretrained(size: str, folder: Path, device: str = "cpu") -> Mapping[str, Tensor]:
    """Return weights that know English prose; made once for a size, and kept under a name that tells their recipe."""
    made = SIZES[size]
    text = prose()
    model_source = (ROOT / "examples" / "model.py").read_bytes()
    recipe = repr((made, torch.__version__, text.train, model_source))
    file = folder / f"pretrained-{size}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    torch.manual_seed(0)
    model = made.model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.rate, betas=(0.9, 0.95), fused=True)
    rows = text.rows(made.steps * 12, seed=0)
    for step, (inputs, targets) in enumerate(cut(rows, 12)):
        for group in optimizer.param_groups:  # warm-up, then down to a twentieth
            group["lr"] = made.rate * min(1.0, (step + 1) / 100) * (1 - 0.95 * step / made.steps)
        loss_of(model, (inputs.to(device), targets.to(device))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    # written whole or not at all, also when two processes make it
    part = file.with_suffix(f".part-{os.getpid()}")
    torch.save(model.cpu().state_dict(), part)
    part.replace(file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def examine(model: nn.Module, world: World, *, choosing: bool) -> list[tuple[float, float]]:
    """Return the shares of right bytes and of right lines, in percent: of each task in order, and of the prose."""
    found = []
    for task in [*world.order, prose()]:
        inputs, targets = task.examination(world.budget.examined, choosing=choosing)
        logits = torch.cat([model(part.to(world.device)).cpu() for part in inputs.split(32)])
        found.append(tuple(round(100 * share, 3) for share in task.score(logits, targets)))
    return found


def gradient_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the gradient of the loss of a batch, {name: tensor}, without touching .grad."""
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss_of(model, batch), list(named.values())), strict=True))


def conflicts(system: System, world: World, seen: Sequence[Task]) -> float | None:
    """Return the mean gradient conflict over all pairs of tasks (EPI Eq. 15), in the entries that may move.

    None: the system has learned only one task so far.
    """
    if len(seen) < 2:
        return None
    fixed = system.fixed()
    gradients = {}
    for task in seen:
        gradient = gradient_of(system.model, world.batch(task, world.budget.conflict, "conflict"))
        gradients[task.name] = {
            name: tensor.masked_fill(fixed[name], 0.0) if name in fixed else tensor for name, tensor in gradient.items()
        }
    matrix = conflict_matrix(gradients)
    names = [task.name for task in seen]
    pairs = [matrix[a][b] for i, a in enumerate(names) for b in names[:i]]
    return sum(pairs) / len(pairs)


@dataclass
class Result:
    """What a run found; one line of JSON."""

    order: list[str]
    stages: list[list[str]]
    scores: list[list[tuple[float, float]]]  # row t: after t stages, of each task in order and of the prose: `examine`
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
    result = Result([task.name for task in world.order], names, [examine(system.model, world, choosing=choosing)])
    seen: list[Task] = []
    for stage in stages:
        system.begin(stage)
        for batch in world.stage(stage):
            step(system, batch)
        system.end(stage)
        seen += stage
        result.scores.append(examine(system.model, world, choosing=choosing))
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
