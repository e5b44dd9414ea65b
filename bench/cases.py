"""What is timed on every device: the optimizers and what they move, and what machine it was."""

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from eager import EagerEPI
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW, __version__, ops
from epi_kernels.contract import Scalars

TENSORS = 16  # each a layer
PROTECTED = 0.01
SELECTED = 0.001
LR = 1e-5  # the values must stay where they are over all rounds
BASELINE = "torch AdamW, fused"
EPI = "EPI"
IN_EXP_AVG_SQ = "EPI, S = exp_avg_sq"
EAGER = "eager EPI"
COMPILED_EAGER = "eager EPI, torch.compile"
REFRESH = "EPI, refresh at every step"

SPARSE = "0.1% of the entries"

# bytes of one step for each entry, float32: what is read and what is written
BYTES = {
    BASELINE: 28,  # p g m v, p m v
    "torch AdamW, foreach": None,  # many passes
    "isolation off": 28,
    EPI: 36,  # p g m v S, p m v S
    IN_EXP_AVG_SQ: 28,
    "fixed mask": 29,  # one byte of lock
    REFRESH: 36 + 28,  # and g S, S; three times S; S, S; but S no more in the sweep
    EAGER: None,
    COMPILED_EAGER: None,
    SPARSE: None,  # scattered: the sectors of 64 bytes decide
}


def bytes_of(name: str, dtype: torch.dtype) -> int | None:
    """Return the bytes of one step for each entry, parameters and gradients in `dtype`.

    Our states are float32. torch's have the dtype of the parameters: there it moves less.
    """
    size = BYTES[name]
    if size is None:
        return None
    if name == BASELINE:
        return size // 4 * dtype.itemsize
    reads_of_gradient = 2 if name == REFRESH else 1
    return size - (4 - dtype.itemsize) * (2 + reads_of_gradient)


Shapes = Sequence[tuple[int, ...]]


def candidates(
    shapes: Shapes,
    *,
    names: Sequence[str] = (),
    compiled: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], object]]:
    """Return name -> step, over tensors of these shapes, each a layer; all of BYTES, or `names` of them."""
    params = [Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    named = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3

    def epi(**settings: Any) -> Callable[[], object]:
        optimizer = EPIAdamW(named, lr=LR, isolation_ratio=PROTECTED, **{"mask_interval": None, **settings})
        optimizer.step()
        optimizer.refresh()
        return optimizer.step

    def masks() -> dict[Parameter, Tensor]:
        return {p: torch.rand(p.shape, device=device) < PROTECTED for p in params}

    def eager(*, compiled: bool) -> Callable[[], object]:
        return EagerEPI(
            params, [mask.flatten().nonzero().flatten() for mask in masks().values()], compiled=compiled
        ).step

    steps: dict[str, Callable[[], Callable[[], object]]] = {
        BASELINE: lambda: torch.optim.AdamW(params, lr=LR, fused=True).step,
        "torch AdamW, foreach": lambda: torch.optim.AdamW(params, lr=LR, foreach=True).step,
        "isolation off": lambda: EPIAdamW(named, lr=LR, isolation_ratio=0.0).step,
        EPI: epi,
        IN_EXP_AVG_SQ: lambda: epi(importance="exp_avg_sq"),
        "fixed mask": lambda: MaskedAdamW(params, lr=LR, frozen=masks()).step,
        REFRESH: lambda: epi(mask_interval=1),
        EAGER: lambda: eager(compiled=False),
        COMPILED_EAGER: lambda: eager(compiled=True),
        SPARSE: lambda: sparse_step(params),
    }
    chosen = names or [name for name in steps if compiled or name != COMPILED_EAGER]
    return {name: steps[name]() for name in chosen}


def sparse_step(params: list[Parameter]) -> Callable[[], object]:
    """Return a step of SELECTED of the entries, drawn at random."""
    counts = [int(p.numel() * SELECTED) for p in params]
    device = params[0].device
    indices = [
        torch.randint(p.numel(), (count,), device=device).unique() for p, count in zip(params, counts, strict=True)
    ]
    state = [[torch.zeros(len(chosen), device=device) for chosen in indices] for _ in range(2)]
    group = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    scalars = torch.tensor([Scalars.of(group, 1.0)], dtype=torch.float64)
    data, grads = [p.detach() for p in params], [p.grad for p in params]
    return lambda: ops.sparse_adamw_(data, grads, indices, *state, scalars, [0] * len(params), "auto")


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
