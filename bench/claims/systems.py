"""The list of all systems: how each is made, and by what its learning rate is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from claims.few import (
    MIGU,
    LayerNorms,
    LoRA,
    OrthogonalLoRA,
    Sparse,
    chance,
    fisher_scores,
    second_order_scores,
    weight_magnitude,
)
from claims.isolation import EPI, AdaptiveRatio, AtBoundaries, Fixed, at_random, by_probes
from claims.remembering import EWC, GEM, LwF, ReplayAfter, ReplayDuring
from claims.system import HeuristicGroups, RandomGroups, System, Together
from claims.world import World


def rates(*values: float) -> tuple[dict[str, float], ...]:
    """Return a trial for each rate."""
    return tuple({"rate": rate} for rate in values)


# while the best was at an end, one more was tried beyond it
ALL = rates(3e-5, 1e-4, 3e-4, 1e-5)  # of systems that train all entries, or nearly all, task after task
HIGHER = rates(3e-5, 1e-4, 3e-4, 1e-3)
HIGHEST = (*HIGHER, *rates(3e-3))  # of systems that train all entries and repeat earlier tasks in every step
TOGETHER = rates(3e-4, 1e-3, 3e-3, 1e-2)  # of the one that has no task to forget
FEW = rates(1e-4, 3e-4, 1e-3, 4e-3)  # of systems that train few
ADAPTERS = (*FEW, *rates(3e-5))
PENALTIES = tuple(  # 0.5 is the paper's
    {"rate": rate, "strength": strength}
    for rate, strengths in (
        (1e-4, (0.5, 1e2, 1e4, 1e6)),
        (3e-4, (1e4, 1e5, 1e6)),
        (1e-3, (1e4, 1e3, 1e5, 1e2)),
        (3e-3, (1e4,)),
    )
    for strength in strengths
)
LEAST = rates(3e-4, 1e-3, 4e-3, 1.6e-2)  # of systems that train a thousandth


@dataclass(frozen=True)
class Entry:
    """A system by name: how it is made, and from what its learning rate is chosen."""

    make: Callable[..., System]
    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Mapping[str, float], ...] = ALL
    chosen_by: str | None = None  # the system whose chosen rate this one takes, as ablations and sweeps do


# what is learned and what is forgotten at other rates: the systems, and the rates
CURVED = {
    **dict.fromkeys(("sequential", "EPI, p = 1%", "EPI, p = 10%", "random mask, p = 10%"), (5e-5, 1e-4, 2e-4, 4e-4)),
    **dict.fromkeys(("PIECE-F, 1%", "random entries, 1%"), (3e-4, 1e-3, 4e-3)),
}


def at_rate(name: str, rate: float) -> str:
    """Return the name of a system at a rate that is not chosen."""
    return f"{name}, rate {rate:g}"


PERCENTS = (0.5, 1, 2, 5, 10, 20, 40)


def swept(kind: str, percent: float) -> str:
    """Return the name of EPI or static isolation in the sweep over p; p = 10% is the system of the main table."""
    return f"{kind}, p = 10%" if percent == 10 else f"{kind}, p = {percent:g}%, at the rate of 10%"


def epi(**settings: Any) -> Entry:
    """Return a form of EPI, at the rate that is chosen for EPI with p = 10%."""
    return Entry(EPI, {"isolation_ratio": 0.1, **settings}, chosen_by="EPI, p = 10%")


def static(ratio: float, kind: str, normalize: str | None = None) -> Entry:
    """Return a form of static isolation, at the rate that is chosen for the one by update magnitude at p = 10%."""
    return Entry(Fixed, {"choose": by_probes(ratio, kind, normalize)}, chosen_by="static by update, p = 10%")


SYSTEMS: dict[str, Entry] = {
    "multi-task": Entry(Together, trials=TOGETHER),
    "sequential": Entry(System),
    "random groups": Entry(RandomGroups, chosen_by="sequential"),
    "heuristic groups": Entry(HeuristicGroups, chosen_by="sequential"),
    "EPI, p = 1%": Entry(EPI, {"isolation_ratio": 0.01}),
    "EPI, p = 10%": Entry(EPI, {"isolation_ratio": 0.1}, HIGHER),
    "static by update, p = 1%": Entry(Fixed, {"choose": by_probes(0.01, "update")}),
    "static by update, p = 10%": Entry(Fixed, {"choose": by_probes(0.1, "update")}),
    "random mask, p = 10%": Entry(Fixed, {"choose": at_random(0.1)}),
    # forgetting can be compared at one rate alone: at a higher one every system learns and forgets more
    "sequential, at EPI's rate": Entry(System, chosen_by="EPI, p = 10%"),
    "static by update, p = 10%, at EPI's rate": Entry(
        Fixed, {"choose": by_probes(0.1, "update")}, chosen_by="EPI, p = 10%"
    ),
    "random mask, p = 10%, at EPI's rate": Entry(Fixed, {"choose": at_random(0.1)}, chosen_by="EPI, p = 10%"),
    # ablations
    "static by update, normalised, p = 10%": static(0.1, "update", "layer"),
    "static by importance, p = 10%": static(0.1, "importance"),
    "static by importance, normalised, p = 10%": static(0.1, "importance", "layer"),
    "EPI without normalisation, p = 10%": epi(normalize="none"),
    "EPI, budget per layer, p = 10%": epi(scope="layer"),
    "EPI, beta = 0, p = 10%": epi(importance_beta=0.0),
    "EPI, beta = 0.9, p = 10%": epi(importance_beta=0.9),
    "EPI, beta = 0.99, p = 10%": epi(importance_beta=0.99),
    "EPI at task boundaries, p = 10%": Entry(
        AtBoundaries, {"isolation_ratio": 0.1, "mask_interval": None}, chosen_by="EPI, p = 10%"
    ),
    # beyond the papers
    "EPI, p follows the loss": Entry(AdaptiveRatio, chosen_by="EPI, p = 10%"),
    "EPI, importance in exp_avg_sq, p = 10%": epi(importance="exp_avg_sq"),
    "EPI, importance in bfloat16, p = 10%": epi(importance_dtype=torch.bfloat16),
    "EPI, importance in 8 bits, p = 10%": epi(importance_dtype="8bit"),
    # sweeps, all at the rate of p = 10%
    **{swept("EPI", percent): epi(isolation_ratio=percent / 100) for percent in PERCENTS if percent != 10},
    **{swept("static by update", percent): static(percent / 100, "update") for percent in PERCENTS if percent != 10},
    "EPI, H = 5, p = 10%": epi(mask_interval=5),
    "EPI, H = 40, p = 10%": epi(mask_interval=40),
    "EPI, H = 120, p = 10%": epi(mask_interval=120),
    # PIECE
    "PIECE-F, 0.1%": Entry(Sparse, {"ratio": 0.001, "score": fisher_scores}, LEAST),
    "PIECE-F, 1%": Entry(Sparse, {"ratio": 0.01, "score": fisher_scores}, FEW),
    "PIECE-F, 5%": Entry(Sparse, {"ratio": 0.05, "score": fisher_scores}, FEW),
    "PIECE-S, 0.1%": Entry(Sparse, {"ratio": 0.001, "score": second_order_scores(None)}, LEAST),
    "PIECE-S, 1%": Entry(Sparse, {"ratio": 0.01, "score": second_order_scores(None)}, FEW),
    "PIECE-S, 5%": Entry(Sparse, {"ratio": 0.05, "score": second_order_scores(None)}, FEW),
    "PIECE-S with xi = 1e-8, 1%": Entry(Sparse, {"ratio": 0.01, "score": second_order_scores(1e-8)}, FEW),
    "largest weights, 1%": Entry(Sparse, {"ratio": 0.01, "score": weight_magnitude}, FEW),
    "random entries, 0.1%": Entry(Sparse, {"ratio": 0.001, "score": chance}, LEAST),
    "random entries, 1%": Entry(Sparse, {"ratio": 0.01, "score": chance}, FEW),
    "random entries, 5%": Entry(Sparse, {"ratio": 0.05, "score": chance}, FEW),
    "LoRA": Entry(LoRA, trials=ADAPTERS),
    "O-LoRA": Entry(OrthogonalLoRA, trials=FEW),
    "LayerNorm": Entry(LayerNorms, trials=FEW),
    "MIGU": Entry(MIGU),
    "EWC": Entry(EWC, trials=PENALTIES),
    "GEM": Entry(GEM, trials=HIGHEST),
    "LwF": Entry(LwF),
    "replay after": Entry(ReplayAfter, trials=HIGHER),
    "replay during": Entry(ReplayDuring, trials=(*HIGHEST, *rates(1e-2))),
}

SYSTEMS |= {
    at_rate(name, rate): Entry(SYSTEMS[name].make, SYSTEMS[name].settings, rates(rate))
    for name, of in CURVED.items()
    for rate in of
}


def make(name: str, world: World, trial: Mapping[str, float]) -> System:
    """Return the system of a name at a trial's rate and, where it has one, strength."""
    entry = SYSTEMS[name]
    return entry.make(world, **entry.settings, **trial)
