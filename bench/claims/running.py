"""Does the jobs of a plan, in processes of one thread, and keeps each when it ends."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cases import said_by
from tqdm import tqdm

from claims.learning import Budget, learn, make_world, pretrained
from claims.plan import CHOOSING_TASKS, Job, Table, key_of, read, record_of, runs, trials
from claims.studies import STUDIES
from claims.systems import make

# seconds of a run on one core of an AMD EPYC at 2.6 GHz, by which the plan is announced
SECONDS = {"XS": 1, "S": 60, "M": 180, "L": 20_000}


def go(tables: Iterable[Table], budget: Budget, results: Path, folder: Path, options: argparse.Namespace) -> None:
    """Run what the results lack of the tables, one table after the other."""
    announce(tables, results)
    if options.plan:
        return
    started = time.monotonic()
    # each worker is a fresh process: torch's threads do not survive a fork
    with ProcessPoolExecutor(options.workers, get_context("spawn"), one_thread) as pool:
        for table in tables:
            pool.submit(pretrained, table.size, folder, options.device).result()
            for jobs in (trials, lambda table: runs(table, read(results))):
                done = {key_of(record) for record in read(results)}
                left = [job for job in jobs(table) if job.key() not in done]
                work = partial(run, budget=budget, folder=folder, device=options.device)
                title = f"{table.title}, size {table.size}" + (", choosing rates" if jobs is trials else "")
                with results.open("a") as file, tqdm(total=len(left), desc=title, unit="run") as progress:
                    for record in in_turn(pool, work, left, started + 60 * options.minutes, options.workers):
                        print(json.dumps(record), file=file, flush=True)
                        progress.update()
                if time.monotonic() > started + 60 * options.minutes:
                    return


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


def run(job: Job, budget: Budget, folder: Path, device: str) -> dict[str, Any]:
    """Do a job, and return its record."""
    choosing = job.kind == "trial"
    tasks = {"tasks": CHOOSING_TASKS} if choosing else {}
    world = make_world(job.size, job.seed, budget, folder, device, **tasks)
    started = time.perf_counter()
    if job.kind == "study":
        found = {"found": STUDIES[job.name](world), "seconds": round(time.perf_counter() - started, 1)}
    else:
        found = asdict(learn(make(job.name, world, dict(job.trial)), world, choosing=choosing))
    return record_of(
        job, found, {"commit": said_by("git", "describe", "--always", "--dirty"), "torch": torch.__version__}
    )


def announce(tables: Iterable[Table], results: Path) -> None:
    """Print what is left of each table, in runs and in seconds of one core."""
    records = read(results)
    done = {key_of(record) for record in records}
    told: set[Any] = set()
    for table in tables:
        jobs = [job.key() for job in trials(table)]
        jobs += [("run", name, table.size, seed) for seed in range(table.seeds) for name in table.systems]
        jobs += [("study", name, table.size, seed) for seed in range(table.seeds) for name in table.studies]
        left = [key for key in jobs if key not in done and key not in told]
        told |= set(left)
        seconds = SECONDS[table.size]
        print(f"{table.title}, size {table.size}: {len(left)} of {len(jobs)} runs left, of {seconds} s each")
