"""The CPU path against torch: time of a step for each entry, bytes moved, and ratios to torch's fused AdamW.

    python bench/cpu.py                      # 2^24 and 2^26 entries, one thread and all
    python bench/cpu.py --entries 20 --rounds 3 --compile

Prints a table and, with --json, writes it with the machine and the versions. All candidates share the parameters and
their gradients; each has its own state, allocated as its optimizer allocates it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from eager import EagerEPI
from measure import Timing, interleave, ratio
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW, __version__, ops
from epi_kernels.contract import Scalars

TENSORS = 16  # each a layer
PROTECTED = 0.01
SELECTED = 0.001
LR = 1e-5  # the values must stay where they are over all rounds
BASELINE = "torch AdamW, fused"
EPI = "EPI"
REFRESH = "EPI, refresh at every step"

# bytes of one step for each entry, float32: what is read and what is written
BYTES = {
    BASELINE: 28,  # p g m v, p m v
    "torch AdamW, foreach": None,  # many passes
    "isolation off": 28,
    EPI: 36,  # p g m v S, p m v S
    "EPI, S = exp_avg_sq": 28,
    "fixed mask": 29,  # one byte of lock
    REFRESH: 36 + 28,  # and g S, S; three times S; S, S; but S no more in the sweep
    "eager EPI": None,
    "eager EPI, torch.compile": None,
    "0.1% of the entries": None,  # scattered: the sectors of 64 bytes decide
}


def candidates(entries: int, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """Return name -> step, over `entries` float32 entries in TENSORS tensors."""
    shape = (entries // TENSORS,)
    params = [Parameter(torch.randn(shape)) for _ in range(TENSORS)]
    named = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    for p in params:
        p.grad = torch.randn(shape) * 1e-3

    def epi(**settings: Any) -> EPIAdamW:
        optimizer = EPIAdamW(named, lr=LR, isolation_ratio=PROTECTED, **{"mask_interval": None, **settings})
        optimizer.step()
        optimizer.refresh()
        return optimizer

    with_importance = epi()
    masks = {p: with_importance.isolation_mask(p) for p in params}
    where = [masks[p].flatten().nonzero().flatten() for p in params]
    optimizers: dict[str, Any] = {
        BASELINE: torch.optim.AdamW(params, lr=LR, fused=True),
        "torch AdamW, foreach": torch.optim.AdamW(params, lr=LR, foreach=True),
        "isolation off": EPIAdamW(named, lr=LR, isolation_ratio=0.0),
        EPI: with_importance,
        "EPI, S = exp_avg_sq": epi(importance="exp_avg_sq"),
        "fixed mask": MaskedAdamW(params, lr=LR, frozen=masks),
        REFRESH: epi(mask_interval=1),
        "eager EPI": EagerEPI(params, where, compiled=False),
    }
    if compiled:
        optimizers["eager EPI, torch.compile"] = EagerEPI(params, where, compiled=True)
    steps: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    if hasattr(ops, "sparse_adamw_"):
        steps["0.1% of the entries"] = sparse_step(params)
    return steps


def sparse_step(params: list[Parameter]) -> Callable[[], object]:
    """Return a step of SELECTED of the entries, drawn at random."""
    count = int(params[0].numel() * SELECTED)
    indices = [torch.randperm(p.numel())[:count].sort().values for p in params]
    state = [[torch.zeros(count) for _ in params] for _ in range(2)]
    group = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    scalars = torch.tensor([Scalars.of(group, 1.0)], dtype=torch.float64)
    data, grads = [p.detach() for p in params], [p.grad for p in params]
    return lambda: ops.sparse_adamw_(data, grads, indices, *state, scalars, [0] * len(params), "auto")


def row(name: str, timings: dict[str, Timing], entries: int, clock: str) -> dict[str, Any]:
    """Return the figures of one candidate on one clock."""
    own = timings[name].clock(clock)
    median = statistics.median(own)
    to_torch = ratio(own, timings[BASELINE].clock(clock))
    size = BYTES[name]
    return {
        "step": name,
        "ns_per_entry": median / entries * 1e9,
        "bytes_per_entry": size,
        "gb_per_s": size * entries / median / 1e9 if size else None,
        "ratio": to_torch[0],
        "ratio_least": to_torch[1],
        "ratio_greatest": to_torch[2],
        "cpu_per_wall": sum(timings[name].cpu) / sum(timings[name].wall),
    }


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "device": processor,
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "commit": commit,
        "epi_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "simd": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, nargs="+", default=[24, 26], help="powers of two [24 26]")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also eager EPI under torch.compile (slow to start)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    results = []
    for power in arguments.entries:
        steps = candidates(1 << power, compiled=arguments.compile)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            title = f"2^{power} entries, {threads} thread{'s' if threads > 1 else ''}"
            timings = interleave(steps, arguments.rounds, title)
            # threads that wait use the processor too, so with several of them only the wall clock tells
            clock = "cpu" if threads == 1 else "wall"
            rows = [row(name, timings, 1 << power, clock) for name in steps]
            results.append({"entries": 1 << power, "threads": threads, "clock": clock, "steps": rows})
            print(
                f"\n{title} ({clock} time; ratio to {BASELINE}: median [least, greatest] of {arguments.rounds} rounds)"
            )
            for figures in rows:
                speed = f"{figures['gb_per_s']:6.1f} GB/s" if figures["gb_per_s"] else " " * 11
                print(
                    f"  {figures['step']:<28}{figures['ns_per_entry']:8.3f} ns/entry {speed}  "
                    f"{figures['ratio']:6.2f} [{figures['ratio_least']:.2f}, {figures['ratio_greatest']:.2f}]  "
                    f"cpu/wall {figures['cpu_per_wall']:.2f}"
                )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
