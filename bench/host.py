"""Host time: what Python needs for a step of many small tensors, against torch's fused AdamW, and its growth.

    python bench/host.py                     # half a minute
    python bench/host.py --rounds 5 --tensors 1000 2000 --json host.json

A step moves 291 tensors of 8 float32 entries; a model of 32 blocks has 291 tensors. EPIAdamW has masks and does not
refresh. torch's fused AdamW steps the same kind of tensors:

- "plain": tensors on the CPU;
- "DTensor": the same tensors as DTensors over a group of one rank;
- "DTensor to plain": ours on DTensors, torch's on plain tensors, whose step is faster;
- "halves in turn": plain tensors; one half has gradients in one step, the other half in the next. The time includes the
  assignment of the gradients.

"Growth" is the time of an operation on 8,000 tensors divided by its time on 4,000: 2 if time is linear.

Times are CPU time of the process on one thread. Every round runs each candidate once; a ratio is taken within a round.
As in timeit, Python's garbage collector is off: a full collection would fall into some of the measurements and costs as
much as a refresh of 4,000 tensors.
"""

import argparse
import functools
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import LR, machine
from measure import Timing, interleave, quartiles
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW

TENSORS, ENTRIES = 291, 8
STEPS = 10  # in one measurement
OURS, TORCHS = "EPIAdamW", "torch AdamW, fused"
# the goal: the largest ratio of EPIAdamW's time to torch's time
GOALS = {"plain": 1.0, "DTensor": 1.0, "halves in turn": 1.5}
GROWTH_GOAL = 2.3

Step = Callable[[], object]


def parameters(count: int, placed: Callable[[Tensor], Tensor] = torch.clone) -> list[tuple[str, Parameter]]:
    """Return named parameters with gradients, 9 to a block."""
    named = [(f"layers.{i // 9}.{i % 9}.weight", Parameter(placed(torch.randn(ENTRIES)))) for i in range(count)]
    for _, param in named:
        param.grad = placed(torch.randn(ENTRIES) * 1e-3)
    return named


def with_masks(named: list[tuple[str, Parameter]]) -> EPIAdamW:
    """Return an EPIAdamW that has masks and refreshes only when it is told to."""
    optimizer = EPIAdamW(named, lr=LR, mask_interval=None)
    optimizer.step()
    optimizer.refresh()
    return optimizer


def fused(named: list[tuple[str, Parameter]]) -> torch.optim.AdamW:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(named, lr=LR, fused=True)


def in_turn(optimizer: torch.optim.Optimizer, named: list[tuple[str, Parameter]]) -> Step:
    """Return a step for which one half of the parameters has gradients, and at the next call the other half."""
    params = [param for _, param in named]
    halves = [[param.grad if i % 2 == half else None for i, param in enumerate(params)] for half in (0, 1)]

    def step() -> None:
        halves.reverse()
        for param, grad in zip(params, halves[0], strict=True):
            param.grad = grad
        optimizer.step()

    return step


def repeated(step: Step) -> Step:
    """Return a function that takes STEPS steps."""

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def steps() -> dict[str, dict[str, Step]]:
    """Return kind of tensors -> optimizer -> a function of STEPS steps; this needs a process group."""
    mesh = init_device_mesh("cpu", (1,))
    kinds: dict[str, dict[str, Step]] = {}
    for kind in GOALS:
        placed = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
        kinds[kind] = {}
        for name, make in ((OURS, with_masks), (TORCHS, fused)):
            named = parameters(TENSORS, placed) if kind == "DTensor" else parameters(TENSORS)
            optimizer = make(named)
            optimizer.step()
            kinds[kind][name] = repeated(in_turn(optimizer, named) if kind == "halves in turn" else optimizer.step)
    return kinds


def operations(count: int) -> dict[str, Step]:
    """Return name -> operation on an optimizer of `count` tensors."""
    named = parameters(count)
    optimizer = with_masks(named)
    state = optimizer.state_dict()
    other = EPIAdamW(parameters(count), lr=LR, mask_interval=None)
    return {
        "load_state_dict": lambda: other.load_state_dict(state),
        "all masks": lambda: [optimizer.isolation_mask(param) for _, param in named],
        "refresh": optimizer.refresh,
        "step": optimizer.step,
    }


def milliseconds(timing: Timing, times: int) -> float:
    """Return the median CPU time of one run, if a measurement has `times` runs."""
    return statistics.median(timing.cpu) / times * 1e3


def compared(timings: dict[str, Timing], name: str, to: str, times: int, goal: float | None) -> dict[str, Any]:
    """Return the times of two candidates, and the ratio of the first to the second with its quartiles and its goal."""
    median, lower, upper = quartiles(timings[name].cpu, timings[to].cpu)
    return {
        "milliseconds": {each: milliseconds(timings[each], times) for each in (name, to)},
        "ratio": median,
        "ratio_lower_quartile": lower,
        "ratio_upper_quartile": upper,
        "goal": goal,
    }


def line(what: str, figures: dict[str, Any]) -> str:
    """Return a line of the report."""
    ours, theirs = figures["milliseconds"].values()
    quarters = f"[{figures['ratio_lower_quartile']:.2f}, {figures['ratio_upper_quartile']:.2f}]"
    return f"  {what:<18}{ours:11.2f}{theirs:11.2f}{figures['ratio']:8.2f} {quarters:<14}{figures['goal'] or '':>6}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="of the steps; at least 2 [31]")
    parser.add_argument("--growth-rounds", type=int, default=5, help="of the operations; at least 2 [5]")
    parser.add_argument("--tensors", type=int, nargs=2, default=[4000, 8000], help="for the growth [4000 8000]")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        kinds = steps()
        everyone = {f"{kind}: {name}": step for kind, both in kinds.items() for name, step in both.items()}
        timings = interleave(everyone, arguments.rounds, "steps")
    finally:
        dist.destroy_process_group()
    found = {
        kind: compared(timings, f"{kind}: {OURS}", f"{kind}: {TORCHS}", STEPS, goal) for kind, goal in GOALS.items()
    }
    found["DTensor to plain"] = compared(timings, f"DTensor: {OURS}", f"plain: {TORCHS}", STEPS, None)
    print(f"A step of {TENSORS} tensors of {ENTRIES} entries, ms of CPU time; median ratio [quartiles] of")
    print(f"{arguments.rounds} rounds\n  {'':<18}{OURS:>11}{'torch':>11}{'ratio':>8} {'':<14}{'goal':>6}")
    for kind, figures in found.items():
        print(line(kind, figures))

    few, many = sorted(arguments.tensors)
    sizes = {few: operations(few), many: operations(many)}
    growth = {}
    print(f"\nGrowth from {few} tensors to {many}, ms of CPU time\n  {'':<18}{many:>11}{few:>11}")
    for what in sizes[few]:
        both = {f"{count} tensors": sizes[count][what] for count in (many, few)}
        timings = interleave(both, arguments.growth_rounds, what, warm_up=1)
        growth[what] = compared(timings, *both, times=1, goal=GROWTH_GOAL if many == 2 * few else None)
        print(line(what, growth[what]))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        results = {"steps": found, "growth": growth}
        about = {"machine": machine(), "tensors": TENSORS, "entries": ENTRIES}
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
