"""What the papers say, each as a number that is above 0 where it holds here, one for every seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from intervals import Interval, interval

from claims.found import (
    Found,
    Measure,
    conflict,
    forgetting,
    newest,
    performance,
    plasticity,
    stage_of,
)
from claims.systems import swept

Values = Callable[[Found, str], list[float]]
EPI, STATIC = "EPI, p = 10%", "static by update, p = 10%"
FEW_EPI, FEW_STATIC = "EPI, p = 1%", "static by update, p = 1%"


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and what it says here."""

    source: str
    says: str
    unit: str
    values: Values  # (records, size) -> a number for every seed, above 0 where the claim holds


def higher(name: str, other: str, measure: Measure) -> Values:
    """Return by how much a measure of one system is above that of another."""
    return lambda found, size: found.differences(name, other, size, measure)


def lower(name: str, other: str, measure: Measure) -> Values:
    """Return by how much a measure of one system is below that of another."""
    return lambda found, size: found.differences(other, name, size, measure)


def more_steady(found: Found, size: str) -> list[float]:
    """Return how much more of the last task static isolation fails to learn than EPI, from p = 1% to 20%."""
    ours = zip(
        found.differences(swept("EPI", 1), swept("EPI", 20), size, newest),
        found.differences(swept("static by update", 1), swept("static by update", 20), size, newest),
        strict=False,
    )
    return [static - evolving for evolving, static in ours]


def drift(found: Found, size: str) -> list[float]:
    """Return how far the last mask's overlap with the first is below that of two masks which differ by noise alone."""
    runs, floors = found.runs(FEW_EPI, size), found.runs("noise floor", size)
    return [
        floors[seed]["found"]["overlaps"]["0.01"] - runs[seed]["details"]["refreshes"][-1]["first"]
        for seed in runs
        if seed in floors
    ]


def flips(found: Found, size: str) -> dict[str, list[float]]:
    """Return the mean flip rate of each layer over the refreshes, one number for every seed."""
    rates: dict[str, list[float]] = {}
    for record in found.runs(FEW_EPI, size).values():
        refreshes = [refresh["flips"] for refresh in record["details"]["refreshes"] if refresh["flips"]]
        for layer in refreshes[0] if refreshes else ():
            rates.setdefault(layer, []).append(statistics.fmean(rates[layer] for rates in refreshes))
    return rates


def upper_flip_more(found: Found, size: str) -> list[float]:
    """Return by how much the flip rate of the last block is above that of the first."""
    blocks = [rates for layer, rates in flips(found, size).items() if layer.startswith("blocks.")]
    return [last - first for first, last in zip(blocks[0], blocks[-1], strict=True)] if blocks else []


def overlaps(found: Found, size: str, key: str) -> list[float]:
    """Return the mean overlap of the tasks' top entries at the pre-trained weights, one number for every seed."""
    records = found.runs("overlap of tasks", size).values()
    return [statistics.fmean(record["found"]["overlaps"][key].values()) for record in records]


def correlation(found: Found, size: str, stage: str, kind: str) -> list[float]:
    """Return a correlation of importance with the effect of perturbations, one number for every seed."""
    records = found.runs("importance and perturbation", size).values()
    return [record["found"]["correlations"][stage][kind] for record in records]


def overlap_and_forgetting(found: Found, size: str) -> list[float]:
    """Return the correlation, over pairs of tasks, of PIECE-F's overlap with what the later task makes forget.

    What the stage in which the later task is learned takes from the earlier one, in points. One number for every seed.
    """
    correlations = []
    for record in found.runs("PIECE-F, 1%", size).values():
        overlaps, losses = [], []
        for pair, overlap in record["details"]["overlaps"].items():
            earlier, later = pair.split()
            number = record["order"].index(earlier)
            stage = stage_of(record, record["order"].index(later))
            overlaps.append(overlap)
            losses.append(record["scores"][stage][number][0] - record["scores"][stage + 1][number][0])
        if len(set(overlaps)) > 1 and len(set(losses)) > 1:
            correlations.append(statistics.correlation(overlaps, losses))
    return correlations


POINTS = "points of OP"
RATIO = "points of FR"

CLAIMS = (
    # EPI
    Claim(
        "EPI Table 1",
        "EPI at 1% ends better than plain sequential fine-tuning",
        POINTS,
        higher(FEW_EPI, "sequential", performance),
    ),
    Claim(
        "EPI Table 1",
        "EPI at 1% ends better than static isolation at 1%",
        POINTS,
        higher(FEW_EPI, FEW_STATIC, performance),
    ),
    Claim(
        "EPI Table 1",
        "EPI at 1% ends better than full multi-task fine-tuning",
        POINTS,
        higher(FEW_EPI, "multi-task", performance),
    ),
    Claim(
        "EPI Table 1",
        "grouping by kind ends better than random grouping",
        POINTS,
        higher("heuristic groups", "random groups", performance),
    ),
    Claim(
        "EPI Table 6",
        "EPI at 1% forgets less than plain sequential fine-tuning",
        RATIO,
        lower(FEW_EPI, "sequential", forgetting),
    ),
    Claim(
        "EPI Table 6",
        "EPI at 1% forgets less than static isolation at 1%",
        RATIO,
        lower(FEW_EPI, FEW_STATIC, forgetting),
    ),
    Claim(
        "EPI Table 1, at 10%",
        "EPI ends better than plain sequential fine-tuning, each at its own rate",
        POINTS,
        higher(EPI, "sequential", performance),
    ),
    Claim(
        "EPI Table 1, at 10%",
        "EPI ends better than static isolation, each at its own rate",
        POINTS,
        higher(EPI, STATIC, performance),
    ),
    *(
        Claim(source, f"{says}, at one rate", unit, sign(EPI, f"{other}, at EPI's rate", measure))
        for source, says, other in (
            ("EPI Table 6, at 10%", "EPI {} than plain sequential fine-tuning", "sequential"),
            ("EPI Table 6, at 10%", "EPI {} than static isolation", STATIC),
            ("control, at 10%", "EPI {} than a random mask", "random mask, p = 10%"),
        )
        for says, unit, sign, measure in (
            (says.format("forgets less"), RATIO, lower, forgetting),
            (says.format("ends better"), POINTS, higher, performance),
            (says.format("learns more"), "points of AP", higher, plasticity),
        )
    ),
    Claim(
        "EPI Table 7",
        "gradients of tasks conflict less under EPI at 1% than under plain fine-tuning",
        "TGC",
        lower(FEW_EPI, "sequential", conflict),
    ),
    Claim(
        "EPI Table 7",
        "gradients of tasks conflict less under EPI at 1% than under static isolation",
        "TGC",
        lower(FEW_EPI, FEW_STATIC, conflict),
    ),
    Claim(
        "EPI Table 2, at 10%",
        "normalisation within layers improves a static mask",
        POINTS,
        higher("static by update, normalised, p = 10%", STATIC, performance),
    ),
    Claim(
        "EPI Table 2, at 10%",
        "normalisation within layers improves EPI",
        POINTS,
        higher(EPI, "EPI without normalisation, p = 10%", performance),
    ),
    Claim(
        "EPI Table 2, at 10%",
        "a mask that evolves is better than a static one, both by importance and normalised",
        POINTS,
        higher(EPI, "static by importance, normalised, p = 10%", performance),
    ),
    Claim(
        "EPI Table 3, at 10%",
        "one budget over all layers is better than one for each layer",
        POINTS,
        higher(EPI, "EPI, budget per layer, p = 10%", performance),
    ),
    Claim(
        "EPI Table 4, at 10%",
        "a moving average is better than the last gradient",
        POINTS,
        higher(EPI, "EPI, beta = 0, p = 10%", performance),
    ),
    Claim(
        "EPI Table 4, at 10%",
        "beta = 0.99 is better than 0.9",
        POINTS,
        higher("EPI, beta = 0.99, p = 10%", "EPI, beta = 0.9, p = 10%", performance),
    ),
    Claim(
        "EPI Table 5, at 10%",
        "H = 20 is better than a quarter of it",
        POINTS,
        higher(EPI, "EPI, H = 5, p = 10%", performance),
    ),
    Claim(
        "EPI Table 5, at 10%",
        "H = 20 is better than six times as much",
        POINTS,
        higher(EPI, "EPI, H = 120, p = 10%", performance),
    ),
    Claim(
        "EPI Figure 6", "p = 1% is better than 0.5%", POINTS, higher(swept("EPI", 1), swept("EPI", 0.5), performance)
    ),
    Claim("EPI Figure 6", "p = 1% is better than 5%", POINTS, higher(swept("EPI", 1), swept("EPI", 5), performance)),
    Claim(
        "EPI Table 10",
        "static isolation is better at p = 1% than at 5%",
        POINTS,
        higher(swept("static by update", 1), swept("static by update", 5), performance),
    ),
    Claim(
        "EPI Table 14",
        "from p = 1% to 20% static isolation loses more plasticity than EPI",
        "points of the last task",
        more_steady,
    ),
    Claim("EPI Table 11", "the mask drifts from the first one, by more than noise", "overlap", drift),
    Claim("EPI Table 12", "upper layers flip more than lower ones", "flip rate", upper_flip_more),
    Claim(
        "EPI Table 15",
        "importance goes with the effect of perturbations on the task, early",
        "Pearson's r",
        lambda found, size: correlation(found, size, "early, task", "pearson"),
    ),
    Claim(
        "EPI Table 15",
        "importance goes with the effect of perturbations on what was known before, late",
        "Pearson's r",
        lambda found, size: correlation(found, size, "late, prose", "pearson"),
    ),
    # PIECE
    Claim(
        "PIECE Table 1",
        "PIECE-F at 1% ends better than plain sequential fine-tuning",
        POINTS,
        higher("PIECE-F, 1%", "sequential", performance),
    ),
    Claim(
        "PIECE Table 1",
        "PIECE-S at 1% ends better than plain sequential fine-tuning",
        POINTS,
        higher("PIECE-S, 1%", "sequential", performance),
    ),
    Claim(
        "PIECE Table 1",
        "PIECE-F at 1% forgets less than plain sequential fine-tuning",
        RATIO,
        lower("PIECE-F, 1%", "sequential", forgetting),
    ),
    Claim("PIECE Table 1", "PIECE-F at 1% ends better than EWC", POINTS, higher("PIECE-F, 1%", "EWC", performance)),
    Claim(
        "PIECE Table 1",
        "PIECE-F at 1% ends better than replay after each task",
        POINTS,
        higher("PIECE-F, 1%", "replay after", performance),
    ),
    Claim("PIECE Table 1", "PIECE-F at 1% ends better than LoRA", POINTS, higher("PIECE-F, 1%", "LoRA", performance)),
    Claim(
        "control",
        "PIECE-F at 1% ends better than as many random entries",
        POINTS,
        higher("PIECE-F, 1%", "random entries, 1%", performance),
    ),
    Claim(
        "control",
        "PIECE-F at 1% learns more than as many random entries",
        "points of AP",
        higher("PIECE-F, 1%", "random entries, 1%", plasticity),
    ),
    Claim(
        "control",
        "PIECE-S at 1% ends better than as many random entries",
        POINTS,
        higher("PIECE-S, 1%", "random entries, 1%", performance),
    ),
    Claim(
        "PIECE Figure 5",
        "tasks share fewer of PIECE-S's entries than of PIECE-F's, at 0.1%",
        "overlap",
        lambda found, size: [
            f - s for f, s in zip(overlaps(found, size, "F 0.001"), overlaps(found, size, "S 0.001"), strict=True)
        ],
    ),
    Claim(
        "PIECE Figure 7", "0.1% is better than 1%, PIECE-F", POINTS, higher("PIECE-F, 0.1%", "PIECE-F, 1%", performance)
    ),
    Claim("PIECE Figure 7", "1% is better than 5%, PIECE-F", POINTS, higher("PIECE-F, 1%", "PIECE-F, 5%", performance)),
)


def verdict(found: Interval, values: Sequence[float]) -> str:
    """Return whether a claim shows, and where that cannot be told, how many seeds would tell."""
    if found.count < 3:
        return "too few seeds so far" if found.count else "not run"
    if found.mean - found.half > 0:
        return "**shows**"
    if found.mean + found.half < 0:
        return "**the opposite shows**"
    if not found.mean:
        return "cannot be told here: no difference was seen"
    # 2.1: Student's t for 20 seeds; fewer need a little more
    seeds = max(found.count + 1, math.ceil((2.1 * statistics.stdev(values) / found.mean) ** 2))
    direction = "" if found.mean > 0 else "the opposite of "
    many = f"about {seeds:,} seeds" if seeds <= 1000 else "more than a thousand seeds"
    return f"cannot be told here; {many} would tell {direction}it, if the mean stays"


def judged(claim: Claim, found: Found, size: str) -> tuple[Interval, str]:
    """Return a claim's interval at a size, and the verdict."""
    values = claim.values(found, size)
    result = interval(values)
    return result, verdict(result, values)
