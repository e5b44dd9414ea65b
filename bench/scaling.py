"""How a step, a refresh and PIECE's step grow: with entries, tensors, refreshes, threads and ranks; pictures of each.

    python bench/scaling.py                                  # about 3 minutes; writes results/scaling.json and .png
    python bench/scaling.py --only tensors ranks --rounds 3

Each time is divided by what linear growth from the first value would give: a line that stays at or below 1 is linear or
better. What grows faster is a fault, or has its reason in bench/README.md. Times are medians over interleaved rounds.
Where the states of all steps do not fit into memory together, each step is timed alone; one that does not fit alone is
left out, and the results say why.

The ranks are processes of one thread on this machine, each with as many entries: of a model that FSDP2 has sharded over
gloo. In every round they begin together, and what counts is the rank that ends last. CPU times of a rank stand beside
them: they lack what a rank waits for a core, and have what gloo does while it waits.
"""

import argparse
import gc
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import BASELINE, EPI, LR, PROTECTED, REFRESH, SELECTED, SPARSE, TENSORS, available_memory, machine
from measure import RankTiming, Timing, interleave
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from epi_kernels import EPIAdamW, SparseAdamW, distributed

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], object]
Named = Sequence[tuple[str, Parameter]]

# bytes of memory that a step keeps for each entry, beside the parameter and its gradient
SHARED, KEPT = 8, {BASELINE: 8, EPI: 12, REFRESH: 12, SPARSE: 2}
ROOM = 0.85  # the share of the free memory that steps may take

# Steps over fewer entries are so short that a disturbance is a large part of them, and lines begin there: they get ten
# times the rounds.
SHORT = 1 << 18

RANKS = (1, 2, 4)
SHARD = 1 << 22  # entries of each rank
COLLECTIVES = "the collectives of a refresh alone"


def parameters(entries: int, tensors: int) -> Named:
    """Return named parameters with gradients: so many entries in so many tensors, nine to a layer."""
    named = [(f"layers.{i // 9}.{i}.w", Parameter(torch.randn(entries // tensors))) for i in range(tensors)]
    for _, param in named:
        param.grad = torch.randn_like(param).mul_(1e-3)
    return named


def step_of(name: str, named: Named) -> Step:
    """Return a step with a state of its own over parameters with gradients."""
    if name == BASELINE:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(named, lr=LR, fused=True)
    elif name == SPARSE:
        masks = {param: torch.rand(param.shape) < SELECTED for _, param in named}
        optimizer = SparseAdamW(named, lr=LR, trainable=masks)
    else:
        interval = 1 if name == REFRESH else None
        optimizer = EPIAdamW(named, lr=LR, isolation_ratio=PROTECTED, mask_interval=interval)
        optimizer.step()
        optimizer.refresh()
    optimizer.step()  # makes the state
    return optimizer.step


def turns(entries: int, free: float) -> tuple[list[list[str]], dict[str, str]]:
    """Return which steps are timed together, group after group, and why the others are left out.

    Args:
        entries: of the parameters that all steps share.
        free: bytes of memory.
    """
    if entries * (SHARED + sum(KEPT.values())) <= ROOM * free:
        return [list(KEPT)], {}
    needed = {name: entries * (SHARED + kept) for name, kept in KEPT.items()}
    fit = [[name] for name in KEPT if needed[name] <= ROOM * free]
    return fit, {
        name: f"it takes {needed[name] / 2**30:.1f} GiB, and steps may take {ROOM * free / 2**30:.1f}"
        for name in KEPT
        if [name] not in fit
    }


def series(label: str) -> dict[str, Any]:
    """Return a series without values."""
    return {"label": label, "values": [], "linear": [], "ms": {}, "left_out": {}}


def add(found: dict[str, Any], value: int, linear: float, timings: dict[str, Timing]) -> None:
    """Add the times at a value of what grows; `linear` is what linear growth gives, in any unit."""
    found["values"].append(value)
    found["linear"].append(linear)
    for step, timing in timings.items():
        found["ms"].setdefault(step, []).append(statistics.median(timing.wall) * 1e3)


def over_parameters(label: str, sizes: Sequence[tuple[int, int, int]], rounds: int) -> dict[str, Any]:
    """Return a series of every step over (value, entries, tensors)."""
    found = series(label)
    for value, entries, tensors in sizes:
        timings: dict[str, Timing] = {}
        groups, left_out = turns(entries, available_memory())
        named = parameters(entries, tensors) if groups else ()
        times = rounds if entries >= SHORT else 10 * rounds
        for group in groups:
            timings |= interleave({name: step_of(name, named) for name in group}, times, f"{value} {label}")
            gc.collect()
        add(found, value, value, timings)
        for name, reason in left_out.items():
            found["ms"].setdefault(name, []).append(None)
            found["left_out"][f"{name}, {value}"] = reason
        del named
        gc.collect()
    return found


def entries_grow(rounds: int) -> dict[str, Any]:
    """Return a series of more and more entries, in 16 tensors."""
    sizes = [(1 << power, 1 << power, TENSORS) for power in (*range(16, 28, 2), 28, 29)]
    return over_parameters("entries in 16 tensors", sizes, rounds)


def tensors_grow(rounds: int) -> dict[str, Any]:
    """Return a series of more and more tensors, of 64 entries each."""
    sizes = [(count, 64 * count, count) for count in (64, 256, 1024, 4096, 16384)]
    return over_parameters("tensors of 64 entries", sizes, rounds)


def intervals_grow(rounds: int) -> dict[str, Any]:
    """Return a series of more and more steps, with one refresh at their end."""
    found = series("steps from one refresh to the next")
    named = parameters(1 << 22, TENSORS)
    step, refresh = step_of(EPI, named), step_of(REFRESH, named)
    for interval in (1, 4, 16, 64):

        def run(interval: int = interval) -> None:
            for _ in range(interval - 1):
                step()
            refresh()

        run_all = {"steps, the last of which refreshes": run}
        add(found, interval, interval, interleave(run_all, rounds, f"interval {interval}"))
    return found


def threads_grow(rounds: int) -> dict[str, Any]:
    """Return a series of every step over 2^24 entries with more and more threads."""
    most = torch.get_num_threads()
    found = series("threads, 2^24 entries")
    named = parameters(1 << 24, TENSORS)
    steps = {name: step_of(name, named) for name in KEPT}
    for threads in sorted({1 << i for i in range(8) if 1 << i <= most} | {most}):
        torch.set_num_threads(threads)
        add(found, threads, 1 / threads, interleave(steps, rounds, f"{threads} threads"))
    torch.set_num_threads(most)
    return found


class Noted(TorchDispatchMode):
    """Notes the tensors that each collective under it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[list[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.written.append(list(args[0]))
        return func(*args, **(kwargs or {}))


def sharded(ranks: int) -> Named:
    """Return the named parameters of a model that FSDP2 has sharded, with gradients; SHARD entries of each rank."""
    from torch.distributed.fsdp import fully_shard

    rows = SHARD // TENSORS // 1024
    model = nn.Sequential()
    model.add_module("layers", nn.Sequential(*[nn.Linear(1024, rows * ranks, bias=False) for _ in range(TENSORS)]))
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    named = list(model.named_parameters())
    for _, param in named:
        param.grad = distributed.wrapped(torch.randn_like(distributed.local(param)) * 1e-3, param)
    return named


def rank_times(rank: int, ranks: int, folder: str, rounds: int) -> None:
    """Time steps of a sharded model on this rank, and let rank 0 write what all ranks have found to `folder`/found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    named = sharded(ranks)
    steps = {name: step_of(name, named) for name in (BASELINE, EPI, REFRESH)}
    with Noted() as noted:
        steps[REFRESH]()
    exchanged = [torch.zeros_like(tensor) for written in noted.written for tensor in written]
    steps[COLLECTIVES] = lambda: [dist.all_reduce(tensor) for tensor in exchanged]
    timings = interleave(steps, rounds, f"{ranks} ranks" if rank == 0 else "", timing=RankTiming)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, timings)
    if rank == 0:
        found: dict[str, Any] = {"collectives": len(noted.written)}
        found["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in exchanged)
        for clock in ("wall", "cpu"):
            of_rounds = {name: zip(*(one[name].clock(clock) for one in everyone), strict=True) for name in timings}
            found[clock] = {name: list(map(max, times)) for name, times in of_rounds.items()}
        Path(folder, "found").write_text(json.dumps(found))
    dist.barrier()  # no rank takes its connections down while another has use for them
    dist.destroy_process_group()


def ranks_grow(rounds: int) -> dict[str, Any]:
    """Return a series of more and more ranks, each with SHARD entries, with the greatest CPU time of a rank ("cpu_ms").

    "collectives" and "bytes" are those of a refresh on one rank.

    Linear growth is none up to as many ranks as there are cores. From there on a core has the work of several ranks.
    """
    cores = os.cpu_count() or 1
    found = series(f"ranks of 2^{int(math.log2(SHARD))} entries each, one thread a rank, on {cores} cores")
    found |= {"cpu_ms": {}, "collectives": [], "bytes": []}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            # these rounds are short, and processes disturb each other more than threads do
            torch.multiprocessing.spawn(rank_times, (ranks, folder, 5 * rounds), nprocs=ranks)
            of_ranks = json.loads(Path(folder, "found").read_text())
        add(found, ranks, max(1.0, ranks / cores), {name: Timing(wall=of) for name, of in of_ranks["wall"].items()})
        for step, seconds in of_ranks["cpu"].items():
            found["cpu_ms"].setdefault(step, []).append(statistics.median(seconds) * 1e3)
        found["collectives"].append(of_ranks["collectives"])
        found["bytes"].append(of_ranks["bytes"])
    return found


SERIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "entries": entries_grow,
    "tensors": tensors_grow,
    "interval": intervals_grow,
    "threads": threads_grow,
    "ranks": ranks_grow,
}


def growth(found: dict[str, Any]) -> dict[str, list[float | None]]:
    """Return each line divided by linear growth from its first value; None where a step was left out."""
    linear = [of / found["linear"][0] for of in found["linear"]]
    return {
        step: [None if of is None else of / ms[0] / expected for of, expected in zip(ms, linear, strict=True)]
        for step, ms in found["ms"].items()
    }


def text(found: dict[str, Any]) -> str:
    """Return a series as a table in text."""
    head = f"{found['label']}: ms, and in brackets the time over that of linear growth from the first value"
    lines = [head, f"  {'':<38}" + "".join(f"{value:>18,}" for value in found["values"])]
    for step, ms in found["ms"].items():
        cells = zip(ms, found["growth"][step], strict=True)
        lines.append(
            f"  {step:<38}"
            + "".join(f"{'left out':>18}" if of is None else f"{of:>11.3f} [{grown:.2f}]" for of, grown in cells)
        )
    for step, ms in found.get("cpu_ms", {}).items():
        lines.append(f"  {f'CPU: {step}':<38}" + "".join(f"{of:>11.3f}" + " " * 7 for of in ms))
    for name in ("collectives", "bytes"):
        if name in found:
            lines.append(f"  {f'{name} of a refresh':<38}" + "".join(f"{count:>18,}" for count in found[name]))
    lines += [f"  left out: {what}: {reason}" for what, reason in found["left_out"].items()]
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a picture of each series, one below the other."""
    from matplotlib.figure import Figure

    results = found["results"]
    figure = Figure(figsize=(7, 3.2 * len(results)), dpi=150, layout="constrained")
    for axes, one in zip(figure.subplots(len(results), squeeze=False)[:, 0], results.values(), strict=True):
        for step, ms in one["ms"].items():
            axes.plot(one["values"], [math.nan if of is None else of for of in ms], "o-", label=step, markersize=4)
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
    parser.add_argument("--only", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of scaling.json and scaling.png")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "results": {}}
    for name in arguments.only:
        one = SERIES[name](arguments.rounds)
        one["growth"] = growth(one)
        found["results"][name] = one
        print(f"\n{text(one)}")
        (arguments.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, arguments.out / "scaling.png")


if __name__ == "__main__":
    main()
