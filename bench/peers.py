"""A step of other packages' optimizers against torch's fused AdamW and ours, and PIECE against its dense forms.

    python -m pip install torch-optimi torchao bitsandbytes pytorch_optimizer flashoptim
    python bench/peers.py                       # about 2 minutes; writes results/peers.json
    python bench/peers.py --power 22 --rounds 5

A package that is missing, or that cannot step on this device, is a row that says why. All candidates share float32
parameters and gradients, in 16 matrices with rows of 1024 entries.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import BASELINE, EPI, IN_EXP_AVG_SQ, LR, PROTECTED, SELECTED, SPARSE, TENSORS, held, machine
from measure import interleave, ratio
from torch.nn import Parameter

from epi_kernels import EPIAdamW, SparseAdamW

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], object]
Made = tuple[Step, torch.optim.Optimizer]


def ours(params: list[Parameter]) -> dict[str, Callable[[], Made]]:
    """Return name -> maker of a step and its optimizer, of torch and of this package."""
    named = [(f"layers.{i}.w", param) for i, param in enumerate(params)]

    def epi(**settings: Any) -> Made:
        optimizer = EPIAdamW(named, lr=LR, isolation_ratio=PROTECTED, mask_interval=None, **settings)
        optimizer.step()
        optimizer.refresh()
        return optimizer.step, optimizer

    def stepping(optimizer: torch.optim.Optimizer) -> Made:
        return optimizer.step, optimizer

    masks = {param: torch.rand(param.shape) < SELECTED for param in params}

    def masked_gradients() -> Made:
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True)
        zeros = [mask.float() for mask in masks.values()]

        def step() -> None:
            torch._foreach_mul_([param.grad for param in params], zeros)
            optimizer.step()

        return step, optimizer

    def vectors() -> Made:
        """The values that PEFT's SHiRA trains, which each forward pass adds to a copy of the weights."""
        values = [Parameter(param.detach()[mask]) for param, mask in masks.items()]
        for value in values:
            value.grad = torch.randn_like(value) * 1e-3
        return stepping(torch.optim.AdamW(values, lr=LR, fused=True))

    return {
        BASELINE: lambda: stepping(torch.optim.AdamW(params, lr=LR, fused=True)),
        EPI: epi,
        IN_EXP_AVG_SQ: lambda: epi(importance="exp_avg_sq"),
        "EPI, 8-bit m, v and S": lambda: epi(state_dtype="8bit"),
        SPARSE: lambda: stepping(SparseAdamW(named, lr=LR, trainable=masks)),
        "0.1%: gradients times a mask, torch AdamW, fused": masked_gradients,
        "0.1%: torch AdamW, fused, on vectors, as SHiRA": vectors,
    }


def _optimi(params: list[Parameter]) -> torch.optim.Optimizer:
    import optimi

    return optimi.AdamW(params, lr=LR, weight_decay=0.01)


def _torchao(params: list[Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=LR)


def _bitsandbytes(params: list[Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=LR)


def _pytorch_optimizer(params: list[Parameter]) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.StableAdamW(params, lr=LR)


def _flashoptim(params: list[Parameter]) -> torch.optim.Optimizer:
    import flashoptim

    return flashoptim.FlashAdamW(params, lr=LR)


def _deepspeed(params: list[Parameter]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, lr=LR)


PEERS: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
    "torch-optimi AdamW": _optimi,
    "torchao AdamW8bit": _torchao,
    "bitsandbytes AdamW8bit": _bitsandbytes,
    "pytorch_optimizer StableAdamW": _pytorch_optimizer,
    "FlashOptim FlashAdamW": _flashoptim,
    "DeepSpeed CPUAdam": _deepspeed,
}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--power", type=int, default=24, help="of two: how many entries [24]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS / "peers.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    entries = 1 << arguments.power
    params = [Parameter(torch.randn(entries // TENSORS // 1024, 1024)) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3

    made, missing = {name: make() for name, make in ours(params).items()}, {}
    for name, build in PEERS.items():
        try:
            optimizer = build(params)
            optimizer.step()
            made[name] = optimizer.step, optimizer
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    timings = interleave({name: step for name, (step, _) in made.items()}, arguments.rounds, "steps")
    rows = []
    for name, timing in timings.items():
        middle, least, greatest = ratio(timing.wall, timings[BASELINE].wall)
        state = held(value for of in made[name][1].state.values() for value in of.values())
        row = {"step": name, "ns_per_entry": statistics.median(timing.wall) / entries * 1e9}
        row |= {"ratio": middle, "ratio_least": least, "ratio_greatest": greatest}
        rows.append({**row, "state_bytes_per_entry": state / entries})
        print(
            f"  {name:<52}{rows[-1]['ns_per_entry']:9.3f} ns{middle:9.2f} [{least:.2f}, {greatest:.2f}]"
            f"{rows[-1]['state_bytes_per_entry']:9.3f} B kept"
        )
    for name, reason in missing.items():
        print(f"  {name:<52}not measured: {reason}")
    found = {"machine": machine(), "threads": torch.get_num_threads(), "entries": entries}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**found, "steps": rows, "missing": missing}, indent=1) + "\n")


if __name__ == "__main__":
    main()
