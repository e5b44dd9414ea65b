"""Five tasks on a byte-level transformer that was pre-trained on English prose."""

from __future__ import annotations

import hashlib
import os
import platform
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from model import ByteTransformer
from torch import Tensor, nn
from torch.nn import functional

from claims.tasks import CONTEXT, IGNORED, Task, make_tasks, prose
from claims.world import Batch, Budget, World, cut

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


def byte_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of the bytes that are predicted."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


class Language(World):
    """The byte-level world of a size and a seed.

    Args:
        size: of SIZES.
        seed: as in `World`.
        budget: as in `World`.
        folder: of pre-trained weights.
        device: of the model and the rows.
        tasks: how many of the five are learned, the first ones of the order.
    """

    def __init__(self, size: str, seed: int, budget: Budget, folder: Path, device: str = "cpu", tasks: int = 5) -> None:
        order = list(make_tasks())
        random.Random(seed).shuffle(order)
        super().__init__(seed, budget, order[:tasks])
        self.size, self.device, self.weights = size, device, pretrained(size, folder, device)

    def fresh(self) -> ByteTransformer:
        """Return a model with the pre-trained weights."""
        model = SIZES[self.size].model()
        model.load_state_dict(self.weights)
        return model.to(self.device)

    def rows(self, task: Task, count: int, seed: int) -> Batch:
        """Return training rows: inputs and targets."""
        return tuple(part.to(self.device) for part in task.rows(count, seed))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the bytes that are predicted."""
        return byte_loss(model, batch)

    @torch.no_grad()
    def examine(self, model: nn.Module, *, choosing: bool) -> list[tuple[float, float]]:
        """Return the shares of right bytes and of right lines, of each task in order and of the prose."""
        found = []
        for task in [*self.order, prose()]:
            inputs, targets = task.examination(self.budget.examined, choosing=choosing)
            logits = torch.cat([model(part.to(self.device)).cpu() for part in inputs.split(32)])
            found.append(tuple(round(100 * share, 3) for share in task.score(logits, targets)))
        return found


def pretrained(size: str, folder: Path, device: str = "cpu") -> Mapping[str, Tensor]:
    """Return weights that know English prose, float32: those in the folder, or new ones, which it gets.

    The folder has them as float16. Two CPUs round differently, and after 2,500 steps their weights differ: runs on two
    machines can be compared only if both start from the same file.

    Args:
        size: of SIZES.
        folder: of pre-trained weights, one file for each size.
        device: of a model that is trained.

    Raises:
        ValueError: the folder has weights of this size that were made from another text or another model. Nothing is
            trained or written.
    """
    made = SIZES[size]
    text = prose()
    model_source = (ROOT / "examples" / "model.py").read_bytes()
    recipe = repr((made, text.train, model_source))
    file = folder / f"pretrained-{size}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.pt"
    if not file.exists():
        others = sorted(other.name for other in folder.glob(f"pretrained-{size}-*.pt"))
        if others:
            raise ValueError(
                f"size {size}: {folder} has {', '.join(others)} and not {file.name}: the text is that of another "
                f"Python than {platform.python_version()}, or the model has changed; take the Python of the runs so "
                "far, or remove the file and the runs of this size from results.jsonl to begin again"
            )
        write_pretrained(made, text, file, device)
    return {name: tensor.float() for name, tensor in torch.load(file, weights_only=True).items()}


def write_pretrained(made: Size, text: Task, file: Path, device: str) -> None:
    """Pre-train a model of a size on a text, and write its weights as float16."""
    torch.manual_seed(0)
    model = made.model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.rate, betas=(0.9, 0.95), fused=True)
    rows = text.rows(made.steps * 12, seed=0)
    for step, (inputs, targets) in enumerate(cut(rows, 12)):
        for group in optimizer.param_groups:  # warm-up, then down to a twentieth
            group["lr"] = made.rate * min(1.0, (step + 1) / 100) * (1 - 0.95 * step / made.steps)
        byte_loss(model, (inputs.to(device), targets.to(device))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    file.parent.mkdir(parents=True, exist_ok=True)
    # written whole or not at all, also when two processes make it
    part = file.with_suffix(f".part-{os.getpid()}")
    torch.save({name: tensor.half() for name, tensor in model.cpu().state_dict().items()}, part)
    part.replace(file)
