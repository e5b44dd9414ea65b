"""A step over the tensors of real models, as a rank of 64 has them, plain and as DTensors; memory of whole models.

    python bench/models.py                        # all models, about 5 minutes
    python bench/models.py --models gpt2 --rounds 5 --json models.json

Each tensor is cut along its first dimension, as FSDP2 cuts it; GPT-2 is whole. The DTensors lie on a mesh of one rank:
what differs from plain tensors is the host's work. Memory is counted on meta tensors, not measured. A model that does
not fit beside its optimizers is a row that says so.
"""

import argparse
import functools
import gc
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import (
    BASELINE,
    EPI,
    IN_EXP_AVG_SQ,
    LR,
    PROTECTED,
    SELECTED,
    SPARSE,
    Candidate,
    available_memory,
    bytes_of,
    machine,
)
from measure import interleave, ratio
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, SparseAdamW, memory

RANKS = {name: 1 if name == "gpt2" else 64 for name in memory.MODELS}

# bytes for each entry: parameter and gradient, and the states of all candidates
NEEDED = 8 + 8 + 12 + 8 + 1


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """Return the shapes of the shards that one rank has."""
    ranks = RANKS[model]
    return [(math.ceil(shape[0] / ranks), *shape[1:]) for shape in memory.MODELS[model]]


def candidates(shapes: list[tuple[int, ...]], placed: Callable[[Tensor], Tensor]) -> dict[str, Candidate]:
    """Return name -> step over parameters of these shapes, which share their gradients."""
    named = [(f"layers.{i // 9}.{i}.weight", Parameter(placed(torch.randn(shape)))) for i, shape in enumerate(shapes)]
    for _, param in named:
        param.grad = torch.randn_like(param) * 1e-3

    def epi(**settings: Any) -> torch.optim.Optimizer:
        optimizer = EPIAdamW(named, lr=LR, isolation_ratio=PROTECTED, mask_interval=None, **settings)
        optimizer.step()
        optimizer.refresh()
        return optimizer

    masks = {param: torch.rand(param.shape) < SELECTED for _, param in named}
    optimizers = {
        BASELINE: torch.optim.AdamW(named, lr=LR, fused=True),
        EPI: epi(),
        IN_EXP_AVG_SQ: epi(importance="exp_avg_sq"),
        SPARSE: SparseAdamW(named, lr=LR, trainable={p: placed(mask) for p, mask in masks.items()}),
    }
    return {name: Candidate(optimizer.step, ()) for name, optimizer in optimizers.items()}


def measured(model: str, kind: str, placed: Callable[[Tensor], Tensor], rounds: int) -> dict[str, Any]:
    """Return the figures of one model with one kind of tensors."""
    shapes = shapes_of(model)
    entries = sum(math.prod(shape) for shape in shapes)
    found: dict[str, Any] = {"model": model, "ranks": RANKS[model], "tensors": kind, "count": len(shapes)}
    found["entries"] = entries
    free = available_memory()
    if entries * NEEDED > 0.8 * free:
        reason = f"it takes {entries * NEEDED >> 30} GiB and {free >> 30} are free"
        return {**found, "left_out": reason}
    timings = interleave(candidates(shapes, placed), rounds, f"{model}, {kind}")
    found["steps"] = []
    for name, timing in timings.items():
        middle, least, greatest = ratio(timing.wall, timings[BASELINE].wall)
        seconds, size = statistics.median(timing.wall), bytes_of(name, torch.float32, "cpu")
        row = {"step": name, "ms": seconds * 1e3, "ratio": middle, "ratio_least": least, "ratio_greatest": greatest}
        row["gb_per_s"] = size * entries / seconds / 1e9 if size else None
        found["steps"].append(row)
    return found


def held(model: str) -> dict[str, Any]:
    """Return the GiB that a whole model holds with its gradients and states, float32 and with the fewest bytes."""
    rows = {
        "torch.optim.AdamW, float32": (torch.float32, memory.Settings(mask="none")),
        "EPIAdamW, float32": (torch.float32, memory.Settings()),
        "EPIAdamW, 24-bit weights, states of 8 bits": (
            torch.bfloat16,
            memory.Settings(state_dtype="8bit", master_weight_bits=24),
        ),
    }
    found = {}
    for name, (dtype, settings) in rows.items():
        params = memory.on_meta(memory.MODELS[model], dtype)
        found[name] = memory.total(memory.bytes_of(params, settings)).held / 2**30
    return {"model": model, "entries": sum(map(math.prod, memory.MODELS[model])), "gib": found}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=memory.MODELS, default=list(memory.MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "results": [], "memory": []}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    sharded = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
    for model in arguments.models:
        found["memory"].append(held(model))
        for kind, placed in (("plain", torch.clone), ("DTensor", sharded)):
            row = measured(model, kind, placed, arguments.rounds)
            found["results"].append(row)
            gc.collect()
            title = f"{model} / {row['ranks']}, {row['entries']:,} entries in {row['count']} tensors, {kind}"
            print(f"\n{title}" + (f": left out, {row['left_out']}" if "left_out" in row else ""))
            for step in row.get("steps", ()):
                speed = f"{step['gb_per_s']:6.1f} GB/s" if step["gb_per_s"] else ""
                spread = f"[{step['ratio_least']:.2f}, {step['ratio_greatest']:.2f}]"
                print(f"  {step['step']:<24}{step['ms']:9.2f} ms {step['ratio']:6.2f} {spread:<14}{speed}")
    dist.destroy_process_group()
    print("\nGiB of a whole model: parameters, gradients and states")
    for row in found["memory"]:
        cells = "".join(f"{gib:8.1f}  {name}" for name, gib in row["gib"].items())
        print(f"  {row['model']:<14}{row['entries']:>16,}{cells}")
    if arguments.json:  # whole, or not at all: make bench-all takes a file that is there for complete
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
