"""Microbenchmarks by pytest-benchmark: `pytest bench --benchmark-only`, on the CPU and on a GPU if there is one.

    pytest bench --benchmark-only -k "steps and EPI"
    pytest bench --benchmark-only --benchmark-autosave             # keeps the results in .benchmarks
    pytest bench --benchmark-only --benchmark-compare              # with the last ones kept, of another commit perhaps

In every round the baseline runs too, right before: `ratio` among the extra information is the median of the ratios
within rounds. `bytes` are those that a step moves for each entry, `gb_per_s` what that makes.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import ratio

ROUNDS = 7

Step = Callable[[], object]


def finished(step: Step, device: str) -> Step:
    """Return a step that ends when its device is done."""
    if device == "cpu":
        return step

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


@pytest.fixture
def interleaved(benchmark: Any) -> Callable[..., None]:
    """Return a function that measures a step in rounds, each after a run of the baseline."""

    def measure(step: Step, baseline: Step, device: str, entries: int, size: float | None) -> None:
        step, baseline = finished(step, device), finished(baseline, device)
        before: list[float] = []

        def run_baseline() -> None:
            started = time.perf_counter()
            baseline()
            before.append(time.perf_counter() - started)

        for _ in range(2):  # not counted
            baseline()
            step()
        benchmark.pedantic(step, setup=run_baseline, rounds=ROUNDS)
        if benchmark.stats is None:  # --benchmark-disable
            return
        own = benchmark.stats.stats.data
        middle, least, greatest = ratio(own, before)
        benchmark.extra_info.update(entries=entries, ratio=middle, ratio_least=least, ratio_greatest=greatest)
        if size is not None:
            seconds = sorted(own)[len(own) // 2]
            benchmark.extra_info.update(bytes_per_entry=size, gb_per_s=size * entries / seconds / 1e9)

    return measure
