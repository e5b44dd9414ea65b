"""What is run, in order of worth: whole tables, so that a plan that is cut short leaves whole tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from claims.studies import STUDIES
from claims.systems import SYSTEMS
from claims.world import Budget

CHOOSING = 1000  # the seed by which learning rates are chosen, of no reported run
CHOOSING_TASKS = 3  # a run that chooses learns the first three tasks
# a model that was trained well moves less: the rates tried are those of `SYSTEMS` times this
SCALES = {"E": 0.5}
BUDGETS = {"E": Budget(steps=60, rows=16, examined=200, scored=64, conflict=32, probe=30, interval=10, beta=0.9)}

EPI_MAIN = (
    "multi-task",
    "random groups",
    "heuristic groups",
    "sequential",
    "static by update, p = 1%",
    "EPI, p = 1%",
    "static by update, p = 10%",
    "EPI, p = 10%",
    "random mask, p = 10%",
    "sequential, at EPI's rate",
    "static by update, p = 10%, at EPI's rate",
    "random mask, p = 10%, at EPI's rate",
)
PIECE_MAIN = (
    "PIECE-F, 1%",
    "PIECE-S, 1%",
    "random entries, 1%",
    "largest weights, 1%",
    "PIECE-F, 0.1%",
    "PIECE-S, 0.1%",
    "EWC",
    "GEM",
    "LwF",
    "replay after",
    "replay during",
    "LoRA",
    "O-LoRA",
    "LayerNorm",
    "MIGU",
)
ABLATIONS = (
    "static by update, normalised, p = 10%",
    "static by importance, p = 10%",
    "static by importance, normalised, p = 10%",
    "EPI without normalisation, p = 10%",
    "EPI, budget per layer, p = 10%",
    "EPI, beta = 0, p = 10%",
    "EPI, beta = 0.9, p = 10%",
    "EPI, beta = 0.99, p = 10%",
    "EPI at task boundaries, p = 10%",
    "EPI, p follows the loss",
    "EPI, importance in exp_avg_sq, p = 10%",
    "EPI, importance in bfloat16, p = 10%",
    "EPI, importance in 8 bits, p = 10%",
)
ENCODER = (
    "sequential",
    "static by update, p = 1%",
    "EPI, p = 1%",
    "static by update, p = 10%",
    "EPI, p = 10%",
    "random mask, p = 10%",
    "PIECE-F, 1%",
    "PIECE-S, 1%",
    "random entries, 1%",
)
CURVES = tuple(name for name in SYSTEMS if ", rate " in name)
SWEEPS = tuple(name for name in SYSTEMS if name not in {*EPI_MAIN, *PIECE_MAIN, *ABLATIONS, *CURVES})


@dataclass(frozen=True)
class Job:
    """A run: of a system, at a trial of its learning rate, or of a study at fixed weights."""

    kind: str  # "trial", "run" or "study"
    name: str
    size: str
    seed: int
    trial: tuple[tuple[str, float], ...] = ()

    def key(self) -> tuple[Any, ...]:
        """Return what tells the job from others."""
        return (self.kind, self.name, self.size, self.seed, self.trial)


@dataclass(frozen=True)
class Table:
    """Jobs that make sense together."""

    title: str
    size: str
    seeds: int
    systems: tuple[str, ...] = ()
    studies: tuple[str, ...] = ()
    trials: int = 12  # at most, of each system


TABLES = (
    Table("EPI's main tables", "S", 5, EPI_MAIN),
    Table("PIECE's main table", "S", 5, PIECE_MAIN),
    Table("EPI's main tables", "M", 3, EPI_MAIN),
    Table("PIECE's main table", "M", 3, PIECE_MAIN[:6]),
    Table("studies at fixed weights", "S", 5, studies=tuple(STUDIES)),
    Table("isolation and PIECE", "E", 3, ENCODER),
    Table("learning and forgetting by the rate", "S", 5, CURVES),
    Table("ablations", "S", 5, ABLATIONS),
    Table("sweeps", "S", 5, SWEEPS),
    Table("EPI's main tables", "L", 3, EPI_MAIN),
    Table("PIECE's main table", "L", 3, PIECE_MAIN[:6]),
)
SMOKE_TABLES = (Table("smoke", "XS", 1, tuple(SYSTEMS), tuple(STUDIES), trials=1),)


def source_of_rate(name: str) -> str:
    """Return the system whose trials choose the rate of a system."""
    return SYSTEMS[name].chosen_by or name


def trials(table: Table) -> Iterator[Job]:
    """Return the runs that choose the learning rates of a table's systems; none of a system with one rate."""
    for name in dict.fromkeys(map(source_of_rate, table.systems)):
        if len(SYSTEMS[name].trials) > 1:
            for trial in SYSTEMS[name].trials[: table.trials]:
                yield Job("trial", name, table.size, CHOOSING, scaled(trial, table.size))


def scaled(trial: Mapping[str, float], size: str) -> tuple[tuple[str, float], ...]:
    """Return a trial with the rate that a size has in its place."""
    return tuple((trial | {"rate": trial["rate"] * SCALES.get(size, 1.0)}).items())


def runs(table: Table, records: Iterable[Mapping[str, Any]]) -> Iterator[Job]:
    """Return the runs of a table, seed by seed, at the rates that the trials among the records choose."""
    chosen = choices(records)
    for seed in range(table.seeds):
        for name in table.systems:
            yield Job("run", name, table.size, seed, rate_of(name, table.size, chosen))
        for name in table.studies:
            yield Job("study", name, table.size, seed)


def rate_of(name: str, size: str, chosen: Mapping[tuple[str, str], Any]) -> tuple[tuple[str, float], ...]:
    """Return the trial that a system is run at: the only one, or the one that is chosen."""
    entry = SYSTEMS[source_of_rate(name)]
    return scaled(entry.trials[0], size) if len(entry.trials) == 1 else chosen[source_of_rate(name), size]


def choices(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[tuple[str, float], ...]]:
    """Return (system, size) -> the trial with the highest mean score over its tasks at its end (OP)."""
    best: dict[tuple[str, str], tuple[float, tuple[tuple[str, float], ...]]] = {}
    for record in records:
        if record["kind"] == "trial":
            performance = statistics.fmean(score for score, _ in record["scores"][-1][:-1])
            key = record["name"], record["size"]
            if key not in best or performance > best[key][0]:
                best[key] = performance, tuple(record["trial"].items())
    return {key: trial for key, (_, trial) in best.items()}


def key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the key of the job that has made a record."""
    return Job(record["kind"], record["name"], record["size"], record["seed"], tuple(record["trial"].items())).key()


def read(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file, a line of JSON each; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def record_of(job: Job, found: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a job has found as a record."""
    return {**asdict(job), "trial": dict(job.trial), **found, **about}
