"""What the papers say, each as a number that is above 0 where it holds here, one for every seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from intervals import Interval, count_that_tells, interval

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

MANY = 1000  # seeds, beyond which their number says nothing
Values = Callable[[Found, str], list[float]]
EPI, STATIC = "EPI, p = 10%", "static by update, p = 10%"
FEW_EPI, FEW_STATIC = "EPI, p = 1%", "static by update, p = 1%"


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and what it says here."""

    source: str
    says: str
    paper: str  # the paper's own figures; "": it has none
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
SAME_RATE = "at EPI's rate"


def ends_better(source: str, name: str, other: str, says: str, paper: str = "") -> Claim:
    """Return the claim that a system has more OP than another."""
    return Claim(source, says, paper, POINTS, higher(name, other, performance))


def forgets_less(source: str, name: str, other: str, says: str, paper: str = "") -> Claim:
    """Return the claim that a system has less FR than another."""
    return Claim(source, says, paper, RATIO, lower(name, other, forgetting))


def learns_more(source: str, name: str, other: str, says: str, paper: str = "") -> Claim:
    """Return the claim that a system has more AP than another."""
    return Claim(source, says, paper, "points of AP", higher(name, other, plasticity))


def conflicts_less(source: str, name: str, other: str, says: str, paper: str = "") -> Claim:
    """Return the claim that the tasks' gradients conflict less under a system than under another."""
    return Claim(source, says, paper, "TGC", lower(name, other, conflict))


# The papers' figures are those of LLaMA-3-8B: EPI's scores are of 10, EPI's FR, PIECE's OP and BWT of 100. "Plain
# sequential fine-tuning" is EPI's "Multi-Stage (Random)" and PIECE's "SeqFT".
CLAIMS = (
    ends_better(
        "EPI Table 1",
        FEW_EPI,
        "sequential",
        "EPI at 1% ends better than plain sequential fine-tuning",
        "7.98, 7.44",
    ),
    ends_better("EPI Table 1", FEW_EPI, FEW_STATIC, "EPI at 1% ends better than static isolation at 1%", "7.98, 7.68"),
    ends_better(
        "EPI Table 1", FEW_EPI, "multi-task", "EPI at 1% ends better than full multi-task fine-tuning", "7.98, 7.32"
    ),
    ends_better(
        "EPI Table 1",
        "heuristic groups",
        "random groups",
        "grouping by kind ends better than random grouping",
        "7.48, 7.44",
    ),
    forgets_less(
        "EPI Table 6",
        FEW_EPI,
        "sequential",
        "EPI at 1% forgets less than plain sequential fine-tuning",
        "4.66, 7.94",
    ),
    forgets_less(
        "EPI Table 6", FEW_EPI, FEW_STATIC, "EPI at 1% forgets less than static isolation at 1%", "4.66, 5.14"
    ),
    ends_better(
        "EPI Table 1, at 10%",
        EPI,
        "sequential",
        "EPI ends better than plain sequential fine-tuning, each at its own rate",
    ),
    ends_better("EPI Table 1, at 10%", EPI, STATIC, "EPI ends better than static isolation, each at its own rate"),
    *(
        claim(source, EPI, f"{other}, {SAME_RATE}", f"EPI {does} than {what}, at one rate")
        for source, other, what in (
            ("EPI Table 6, at 10%", "sequential", "plain sequential fine-tuning"),
            ("EPI Table 6, at 10%", STATIC, "static isolation"),
            ("control, at 10%", "random mask, p = 10%", "a random mask"),
        )
        for claim, does in (
            (forgets_less, "forgets less"),
            (ends_better, "ends better"),
            (learns_more, "learns more"),
        )
    ),
    conflicts_less(
        "EPI Table 7",
        FEW_EPI,
        "sequential",
        "gradients of tasks conflict less under EPI at 1% than under plain fine-tuning",
        "0.108, 0.262",
    ),
    conflicts_less(
        "EPI Table 7",
        FEW_EPI,
        FEW_STATIC,
        "gradients of tasks conflict less under EPI at 1% than under static isolation",
        "0.108, 0.138",
    ),
    ends_better(
        "EPI Table 2, at 10%",
        "static by update, normalised, p = 10%",
        STATIC,
        "normalisation within layers improves a static mask",
        "7.82, 7.68",
    ),
    ends_better(
        "EPI Table 2, at 10%",
        EPI,
        "EPI without normalisation, p = 10%",
        "normalisation within layers improves EPI",
        "7.98, 7.83",
    ),
    ends_better(
        "EPI Table 2, at 10%",
        EPI,
        "static by importance, normalised, p = 10%",
        "a mask that evolves is better than a static one, both by importance and normalised",
        "7.98, 7.82",
    ),
    ends_better(
        "EPI Table 3, at 10%",
        EPI,
        "EPI, budget per layer, p = 10%",
        "one budget over all layers is better than one for each layer",
        "7.98, 7.82",
    ),
    ends_better(
        "EPI Table 4, at 10%",
        EPI,
        "EPI, beta = 0, p = 10%",
        "a moving average is better than the last gradient",
        "7.98, 7.81",
    ),
    ends_better(
        "EPI Table 4, at 10%",
        "EPI, beta = 0.99, p = 10%",
        "EPI, beta = 0.9, p = 10%",
        "beta = 0.99 is better than 0.9",
        "7.98, 7.90",
    ),
    ends_better(
        "EPI Table 5, at 10%",
        EPI,
        "EPI, H = 5, p = 10%",
        "H = 20 is better than a quarter of it (the paper: 500, 100)",
        "7.98, 7.92",
    ),
    ends_better(
        "EPI Table 5, at 10%",
        EPI,
        "EPI, H = 120, p = 10%",
        "H = 20 is better than six times as much (the paper: 500, 2000)",
        "7.98, 7.89",
    ),
    ends_better("EPI Figure 6", swept("EPI", 1), swept("EPI", 0.5), "p = 1% is better than 0.5%", "best at 1%, drawn"),
    ends_better("EPI Figure 6", swept("EPI", 1), swept("EPI", 5), "p = 1% is better than 5%", "best at 1%, drawn"),
    ends_better(
        "EPI Table 10",
        swept("static by update", 1),
        swept("static by update", 5),
        "static isolation is better at p = 1% than at 5%",
        "7.68, 7.12",
    ),
    Claim(
        "EPI Table 14",
        "from p = 1% to 20% static isolation loses more plasticity than EPI (the paper: to 5%)",
        "0.7, 0.4",
        "points of the last task",
        more_steady,
    ),
    Claim("EPI Table 11", "the mask drifts from the first one, by more than noise", "overlap 0.447", "overlap", drift),
    Claim("EPI Table 12", "upper layers flip more than lower ones", "41.2%, 12.3%", "flip rate", upper_flip_more),
    Claim(
        "EPI Table 15",
        "importance goes with the effect of perturbations on the task, early",
        "0.72",
        "Pearson's r",
        lambda found, size: correlation(found, size, "early, task", "pearson"),
    ),
    Claim(
        "EPI Table 15",
        "importance goes with the effect of perturbations on what was known before, late",
        "0.73",
        "Pearson's r",
        lambda found, size: correlation(found, size, "late, prose", "pearson"),
    ),
    ends_better(
        "PIECE Table 1",
        "PIECE-F, 1%",
        "sequential",
        "PIECE-F at 1% ends better than plain sequential fine-tuning",
        "50.05, 39.22",
    ),
    ends_better(
        "PIECE Table 1",
        "PIECE-S, 1%",
        "sequential",
        "PIECE-S at 1% ends better than plain sequential fine-tuning",
        "49.05, 39.22",
    ),
    forgets_less(
        "PIECE Table 1",
        "PIECE-F, 1%",
        "sequential",
        "PIECE-F at 1% forgets less than plain sequential fine-tuning",
        "BWT -2.66, -10.69",
    ),
    ends_better("PIECE Table 1", "PIECE-F, 1%", "EWC", "PIECE-F at 1% ends better than EWC", "50.05, 32.95"),
    ends_better(
        "PIECE Table 1",
        "PIECE-F, 1%",
        "replay after",
        "PIECE-F at 1% ends better than replay after each task",
        "50.05, 38.62",
    ),
    ends_better("PIECE Table 1", "PIECE-F, 1%", "LoRA", "PIECE-F at 1% ends better than LoRA", "50.05, 46.04"),
    ends_better(
        "control", "PIECE-F, 1%", "random entries, 1%", "PIECE-F at 1% ends better than as many random entries"
    ),
    learns_more(
        "control", "PIECE-F, 1%", "random entries, 1%", "PIECE-F at 1% learns more than as many random entries"
    ),
    ends_better(
        "control", "PIECE-S, 1%", "random entries, 1%", "PIECE-S at 1% ends better than as many random entries"
    ),
    Claim(
        "PIECE Figure 5",
        "tasks share fewer of PIECE-S's entries than of PIECE-F's, at 0.1%",
        "yes, drawn",
        "overlap",
        lambda found, size: [
            f - s for f, s in zip(overlaps(found, size, "F 0.001"), overlaps(found, size, "S 0.001"), strict=True)
        ],
    ),
    ends_better("PIECE Figure 7", "PIECE-F, 0.1%", "PIECE-F, 1%", "0.1% is better than 1%, PIECE-F", "yes, drawn"),
    ends_better("PIECE Figure 7", "PIECE-F, 1%", "PIECE-F, 5%", "1% is better than 5%, PIECE-F", "yes, drawn"),
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
    seeds = count_that_tells(values, most=MANY)
    what = "it" if found.mean > 0 else "the opposite"
    many = f"about {seeds} seeds" if seeds < MANY else f"{MANY:,} seeds or more"
    return f"cannot be told here; if the mean stays, {many} would show {what}"


def judged(claim: Claim, found: Found, size: str) -> tuple[Interval, str]:
    """Return a claim's interval at a size, and the verdict."""
    values = claim.values(found, size)
    result = interval(values)
    return result, verdict(result, values)
