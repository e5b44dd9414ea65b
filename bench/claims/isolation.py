"""Isolation: entries that keep their bits, chosen again as training goes on (EPI) or once (static isolation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from claims.system import Scores, System, random_scores
from claims.world import Task, World, cut
from epi_kernels import EPIAdamW, MaskedAdamW
from epi_kernels.first_mask import FirstMask
from epi_kernels.importance import update_magnitude
from epi_kernels.metrics import flip_rates
from epi_kernels.select import top_k


class EPI(System):
    """Evolving isolation; settings are those of EPIAdamW, and those of the budget where none is given."""

    def __init__(self, world: World, rate: float, **settings: Any) -> None:
        budget = world.budget
        self.settings = {"mask_interval": budget.interval, "importance_beta": budget.beta, "layers": "block"} | settings
        self.steps = 0
        self.refreshes: list[dict[str, Any]] = []
        self.before: dict[str, Tensor] = {}
        super().__init__(world, rate)

    def make(self) -> EPIAdamW:
        """Return EPIAdamW, and keep its first mask."""
        optimizer = EPIAdamW(self.model.named_parameters(), lr=self.rate, **self.settings)
        self.first = FirstMask(optimizer)
        return optimizer

    def adjust(self, loss: Tensor) -> None:
        """Write down what the refresh of the step before has changed."""
        self.note()
        self.steps += 1

    def end(self, stage: Sequence[Task]) -> None:
        """Write down the last refresh of a stage."""
        self.note()

    def note(self) -> None:
        """Write down the last refresh, unless that is done."""
        record = self.optimizer.telemetry(last=True)
        if record is None or (self.refreshes and self.refreshes[-1]["step"] == record["step"]):
            return
        now = self.fixed()
        rates = flip_rates(self.before, now) if self.before else {}
        self.refreshes.append(
            {
                "step": record["step"],
                "share": record["protected_share"],
                "first": self.first.overlap(),
                "previous": record["jaccard"] if self.before else None,
                "flips": {layer: round(rate, 4) for layer, rate in rates.items()},
            }
        )
        self.before = now

    def fixed(self) -> dict[str, Tensor]:
        """Return the mask."""
        return {name: self.optimizer.isolation_mask(param) for name, param in self.model.named_parameters()}

    def details(self) -> dict[str, Any]:
        """Return the refreshes, and where the last mask is."""
        sizes = {name: int(mask.sum()) for name, mask in self.fixed().items()}
        return {"refreshes": self.refreshes, "protected": {name: size for name, size in sizes.items() if size}}


class AtBoundaries(EPI):
    """EPI that chooses a mask at the end of each task and at no other time."""

    def end(self, stage: Sequence[Task]) -> None:
        """Protect what this task has used."""
        self.optimizer.refresh()
        super().end(stage)


class AdaptiveRatio(EPI):
    """EPI with a ratio that follows the loss: little is protected while a task is new, more when it is learned.

    ::

        p = highest (1 - L / L_peak),      L the mean loss since the last refresh, L_peak the largest L of the last six
    """

    LEAST, HIGHEST = 0.005, 0.2

    def __init__(self, world: World, rate: float) -> None:
        self.losses: list[Tensor] = []
        self.means: list[float] = []
        super().__init__(world, rate, isolation_ratio=self.LEAST)

    def adjust(self, loss: Tensor) -> None:
        """Set the ratio before each refresh."""
        super().adjust(loss)
        self.losses.append(loss.detach())
        if self.steps % self.settings["mask_interval"] == 0:
            self.means.append(torch.stack(self.losses).mean().item())
            self.losses.clear()
            share = 1.0 - self.means[-1] / max(self.means[-6:])
            for group in self.optimizer.param_groups:
                group["isolation_ratio"] = max(self.LEAST, self.HIGHEST * share)


class Fixed(System):
    """Static isolation: a mask that is chosen before the first task and never changes.

    Args:
        world: as in `System`.
        rate: as in `System`.
        choose: world -> mask, True = frozen.
    """

    def __init__(self, world: World, rate: float, choose: Callable[[World], dict[str, Tensor]]) -> None:
        self.mask = choose(world)
        super().__init__(world, rate)

    def make(self) -> MaskedAdamW:
        """Return MaskedAdamW with the mask."""
        return MaskedAdamW(self.model.named_parameters(), lr=self.rate, frozen=self.mask)

    def fixed(self) -> dict[str, Tensor]:
        """Return the mask."""
        return self.mask


def probes(world: World, kind: str) -> Scores:
    """Return how important entries are by probes, short runs on each task from the pre-trained weights: the mean.

    Args:
        world: its `budget.probe` is the number of steps of a probe.
        kind: "update": how far an entry has moved (CPI-FT); "importance": EPI's S at the end of a probe.
    """
    mean: Scores = {}
    for task in world.order:
        model = world.fresh()
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer = EPIAdamW(
            model.named_parameters(), lr=3e-4, isolation_ratio=0.01, mask_interval=None, importance_beta=0.95
        )
        batches = cut(world.batch(task, world.budget.probe * world.budget.rows, "probe"), world.budget.rows)
        for batch in batches:
            world.loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if kind == "update":
            scores = update_magnitude(before, dict(model.named_parameters()))
        else:
            scores = {name: optimizer.importance(param) for name, param in model.named_parameters()}
        for name, tensor in scores.items():
            mean[name] = mean.get(name, 0.0) + tensor / len(world.order)
    return mean


def by_probes(ratio: float, kind: str, normalize: str | None = None) -> Callable[[World], dict[str, Tensor]]:
    """Return the choice of a static mask: the top share of the scores of `probes`."""
    return lambda world: top_k(probes(world, kind), ratio, normalize=normalize, layers="block")


def at_random(ratio: float) -> Callable[[World], dict[str, Tensor]]:
    """Return the choice of a static mask of random entries."""
    return lambda world: top_k(random_scores(world.fresh(), world.seed), ratio)
