"""How a step, a refresh and PIECE's step grow: with entries, tensors, refreshes and threads; pictures of each.

    python bench/scaling.py                                  # about 6 minutes; writes results/scaling.json and .png
    python bench/scaling.py --only tensors --rounds 3

Each line is divided by what linear growth from its first point would give: a line that stays at or below 1 is linear or
better. What grows faster is a fault. Times are medians over interleaved rounds.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from cases import BASELINE, EPI, LR, PROTECTED, REFRESH, SELECTED, SPARSE, TENSORS, machine
from measure import interleave
from torch.nn import Parameter
from tqdm import tqdm

from epi_kernels import EPIAdamW, SparseAdamW

RESULTS = Path(__file__).parent / "results"
Point = dict[str, Callable[[], object]]


def point(entries: int, tensors: int, only: Iterable[str] = (BASELINE, EPI, REFRESH, SPARSE)) -> Point:
    """Return name -> step over so many entries in so many tensors, nine to a layer."""
    named = [(f"layers.{i // 9}.{i}.w", Parameter(torch.randn(entries // tensors))) for i in range(tensors)]
    for _, param in named:
        param.grad = torch.randn_like(param) * 1e-3

    def epi(interval: int | None) -> torch.optim.Optimizer:
        optimizer = EPIAdamW(named, lr=LR, isolation_ratio=PROTECTED, mask_interval=interval)
        optimizer.step()
        optimizer.refresh()
        return optimizer

    masks = {param: torch.rand(param.shape) < SELECTED for _, param in named}
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        BASELINE: lambda: torch.optim.AdamW(named, lr=LR, fused=True),
        EPI: lambda: epi(None),
        REFRESH: lambda: epi(1),
        SPARSE: lambda: SparseAdamW(named, lr=LR, trainable=masks),
    }
    found = {name: make().step for name, make in made.items() if name in only}
    for step in found.values():
        step()  # makes the state
    return found


# what grows -> the values, and (value -> steps). The first value is where a line begins
def entries_grow() -> Iterable[tuple[int, Point]]:
    """Yield points of more and more entries, in 16 tensors."""
    for power in range(16, 28, 2):
        yield 1 << power, point(1 << power, TENSORS)


def tensors_grow() -> Iterable[tuple[int, Point]]:
    """Yield points of more and more tensors, of 64 entries each."""
    for count in (64, 256, 1024, 4096, 16384):
        yield count, point(64 * count, count)


def intervals_grow() -> Iterable[tuple[int, Point]]:
    """Yield points of more and more steps, with one refresh at their end."""
    steps = point(1 << 22, TENSORS, (EPI, REFRESH))
    for interval in (1, 4, 16, 64):

        def run(interval: int = interval) -> None:
            for _ in range(interval - 1):
                steps[EPI]()
            steps[REFRESH]()

        yield interval, {"steps, the last of which refreshes": run}


SERIES: dict[str, tuple[Callable[[], Iterable[tuple[int, Point]]], str]] = {
    "entries": (entries_grow, "entries in 16 tensors"),
    "tensors": (tensors_grow, "tensors of 64 entries"),
    "interval": (intervals_grow, "steps from one refresh to the next"),
}


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each step at each value of a series."""
    points, label = SERIES[name]
    found: dict[str, Any] = {"label": label, "values": [], "ms": {}}
    for value, steps in tqdm(points(), desc=name, leave=False):
        timings = interleave(steps, rounds, f"{name} {value}")
        found["values"].append(value)
        for step, timing in timings.items():
            found["ms"].setdefault(step, []).append(statistics.median(timing.wall) * 1e3)
        gc.collect()
    return found


def threads_grow(rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each step over 2^24 entries with more and more threads."""
    every = sorted({1 << i for i in range(8) if 1 << i <= torch.get_num_threads()} | {torch.get_num_threads()})
    found: dict[str, Any] = {"label": "threads, 2^24 entries", "values": every, "ms": {}}
    steps = point(1 << 24, TENSORS)
    for threads in every:
        torch.set_num_threads(threads)
        for step, timing in interleave(steps, rounds, f"{threads} threads").items():
            found["ms"].setdefault(step, []).append(statistics.median(timing.wall) * 1e3)
    torch.set_num_threads(every[-1])
    return found


def growth(series: dict[str, Any]) -> dict[str, list[float]]:
    """Return each line divided by linear growth from its first point; of threads, the work done in all."""
    values = series["values"]
    power = -1 if series["label"].startswith("threads") else 1
    return {
        step: [of / ms[0] / (value / values[0]) ** power for of, value in zip(ms, values, strict=True)]
        for step, ms in series["ms"].items()
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a picture of each series, one below the other."""
    from matplotlib.figure import Figure

    series = found["results"]
    figure = Figure(figsize=(7, 3.2 * len(series)), dpi=150, layout="constrained")
    for axes, one in zip(figure.subplots(len(series), squeeze=False)[:, 0], series.values(), strict=True):
        for step, ms in one["ms"].items():
            axes.plot(one["values"], ms, "o-", label=step, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(one["label"])
        axes.set_ylabel("ms, median")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*SERIES, "threads"], default=[*SERIES, "threads"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of scaling.json and scaling.png")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "results": {}}
    for name in arguments.only:
        one = threads_grow(arguments.rounds) if name == "threads" else measured(name, arguments.rounds)
        one["growth"] = growth(one)
        found["results"][name] = one
        print(f"\n{one['label']}: ms, and in brackets the time over that of linear growth from the first value")
        print(f"  {'':<38}" + "".join(f"{value:>17,}" for value in one["values"]))
        for step, ms in one["ms"].items():
            cells = zip(ms, one["growth"][step], strict=True)
            print(f"  {step:<38}" + "".join(f"{of:>10.3f} [{grown:.2f}]" for of, grown in cells))
        (arguments.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, arguments.out / "scaling.png")


if __name__ == "__main__":
    main()
