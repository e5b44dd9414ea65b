"""What is timed on every device: the optimizers, the bytes that they move, and a description of the machine."""

import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from eager import EagerEPI
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import (
    EPIAdamW,
    EPILion,
    IsolatedOptimizer,
    MaskedAdamW,
    SparseAdamW,
    __version__,
    memory,
    ops,
)

TENSORS = 16  # each tensor is a layer
PROTECTED = 0.01
SELECTED = 0.001
LR = 1e-5  # the values must stay where they are over all rounds
BASELINE = "torch AdamW, fused"
DEFAULT = "torch AdamW, as it comes"
EPI = "EPI"
IN_EXP_AVG_SQ = "EPI, S = exp_avg_sq"
EAGER = "eager EPI"
COMPILED_EAGER = "eager EPI, torch.compile"
REFRESH = "EPI, refresh at every step"
LION = "EPILion"
ISOLATED = "IsolatedOptimizer, torch AdamW"
SPARSE = "0.1% of the entries"
SCORING = "sums for PIECE's scores"

# bytes that one step reads and writes for each entry, float32
BYTES = {
    BASELINE: 28,  # read p g m v, write p m v
    "torch AdamW, foreach": None,  # many passes
    DEFAULT: None,  # a loop on the CPU, foreach on a GPU
    "isolation off": 28,
    EPI: 36,  # read p g m v S, write p m v S
    IN_EXP_AVG_SQ: 28,
    "fixed mask": 29,  # one byte of lock
    LION: 28,  # read p g m S, write p m S
    ISOLATED: None,  # see bytes_of
    REFRESH: 36 + 28,  # and g S, S; three times S; S, S; but S no more in the sweep
    EAGER: None,
    COMPILED_EAGER: None,
    SPARSE: None,  # see bytes_of
    SCORING: 20,  # read g and two sums, write two sums: for one example, besides its backward pass
}


# name -> dtype of the parameters and settings of EPIAdamW, for compact states
COMPACT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "EPI, bfloat16 S": (torch.float32, {"importance_dtype": torch.bfloat16}),
    "EPI, bfloat16 m, v and S": (torch.float32, {"state_dtype": torch.bfloat16}),
    "EPI, 24-bit weights, 8-bit m, v and S": (torch.bfloat16, {"state_dtype": "8bit", "master_weight_bits": 24}),
    "EPI, 24-bit weights, 8-bit m and v = S": (
        torch.bfloat16,
        {"state_dtype": "8bit", "master_weight_bits": 24, "importance": "exp_avg_sq"},
    ),
}


# the bytes that a device moves to or from its memory to access a single entry
SECTOR = {"cpu": 64, "cuda": 32}


def bytes_of(name: str, dtype: torch.dtype, device: str) -> float | None:
    """Return the bytes of one step for each entry, parameters and gradients in `dtype`.

    Our states are float32. The states of torch have the dtype of the parameters, so torch moves less if that is
    narrower. Trainable entries lie too far apart to share sectors: for each, a step reads one sector of p and one of g
    and writes one sector of p, whatever the dtype, and moves the entry's own m, v and offset.
    """
    if name == SPARSE:
        return SELECTED * (3 * SECTOR[device] + 2 * 8 + 4)
    if name == ISOLATED:
        # the base's; read g and S and write S; for each protected entry read its position twice, read a sector of p,
        # write and read the value, and read and write a sector of p
        return 7 * dtype.itemsize + dtype.itemsize + 8 + PROTECTED * (3 * SECTOR[device] + 2 * 8 + 2 * dtype.itemsize)
    if name in COMPACT:
        weights, settings = COMPACT[name]
        entries = torch.empty(1024, 1024, dtype=weights, device="meta")
        moved = memory.total(memory.bytes_of([entries], memory.Settings(**settings)))
        return (moved.read + moved.written) / entries.numel()
    size = BYTES[name]
    if size is None:
        return None
    if name == BASELINE:
        return size // 4 * dtype.itemsize
    narrow = {REFRESH: 4, SCORING: 1}.get(name, 3)  # how often a parameter or gradient is read or written
    return size - (4 - dtype.itemsize) * narrow


Shapes = Sequence[tuple[int, ...]]


@dataclass
class Candidate:
    """One step, to be called, and the tensors that the candidate keeps between steps."""

    step: Callable[[], object]
    state: Sequence[Tensor]

    def __call__(self) -> object:
        """Take the step."""
        return self.step()

    def state_bytes(self) -> int:
        """Return the number of bytes of all tensors kept, those with two names once."""
        return held(self.state)


def held(tensors: Iterable[Any]) -> int:
    """Return the bytes of tensors, of those that consist of others too; memory with two names counts once."""
    found: dict[int, int] = {}
    left = [value for value in tensors if isinstance(value, Tensor)]
    while left:
        tensor = left.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            left += [getattr(tensor, name) for name in names]
        else:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def of_optimizer(optimizer: torch.optim.Optimizer) -> Candidate:
    """Return a candidate for an optimizer that has taken its first step."""
    optimizer.step()
    return Candidate(optimizer.step, [value for state in optimizer.state.values() for value in state.values()])


def candidates(
    shapes: Shapes,
    *,
    names: Sequence[str] = (),
    compiled: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Candidate]:
    """Return name -> step over tensors of these shapes, each a layer; for all names in BYTES, or only `names`."""
    params = [Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    named = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3

    def with_masks(optimizer: Any) -> Candidate:
        optimizer.step()
        optimizer.refresh()
        return of_optimizer(optimizer)

    def epi(**settings: Any) -> Candidate:
        return with_masks(EPIAdamW(named, lr=LR, isolation_ratio=PROTECTED, **{"mask_interval": None, **settings}))

    def isolated() -> Candidate:
        base = torch.optim.AdamW(named, lr=LR, fused=True)
        return with_masks(IsolatedOptimizer(base, isolation_ratio=PROTECTED, mask_interval=None))

    def masks(share: float) -> dict[Parameter, Tensor]:
        return {p: torch.rand(p.shape, device=device) < share for p in params}

    def eager(*, compiled: bool) -> Candidate:
        optimizer = EagerEPI(
            params, [mask.flatten().nonzero().flatten() for mask in masks(PROTECTED).values()], compiled=compiled
        )
        kept = of_optimizer(optimizer.adamw).state
        return Candidate(optimizer.step, [*kept, *optimizer.importance, *optimizer.protected])

    def scoring() -> Candidate:
        sums, squares = ([torch.zeros(shape, device=device) for shape in shapes] for _ in range(2))
        grads = [p.grad for p in params]
        return Candidate(lambda: ops.gradient_sums_(sums, squares, grads, "auto"), [*sums, *squares])

    steps: dict[str, Callable[[], Candidate]] = {
        BASELINE: lambda: of_optimizer(torch.optim.AdamW(params, lr=LR, fused=True)),
        "torch AdamW, foreach": lambda: of_optimizer(torch.optim.AdamW(params, lr=LR, foreach=True)),
        DEFAULT: lambda: of_optimizer(torch.optim.AdamW(params, lr=LR)),
        "isolation off": lambda: of_optimizer(EPIAdamW(named, lr=LR, isolation_ratio=0.0)),
        EPI: epi,
        IN_EXP_AVG_SQ: lambda: epi(importance="exp_avg_sq"),
        "fixed mask": lambda: of_optimizer(MaskedAdamW(params, lr=LR, frozen=masks(PROTECTED))),
        LION: lambda: with_masks(EPILion(named, lr=LR, isolation_ratio=PROTECTED, mask_interval=None)),
        ISOLATED: isolated,
        REFRESH: lambda: epi(mask_interval=1),
        EAGER: lambda: eager(compiled=False),
        COMPILED_EAGER: lambda: eager(compiled=True),
        SPARSE: lambda: of_optimizer(SparseAdamW(params, lr=LR, trainable=masks(SELECTED))),
        SCORING: scoring,
    }
    chosen = names or [name for name in steps if compiled or name != COMPILED_EAGER]
    return {name: steps[name]() for name in chosen}


def compact_candidates(shapes: Shapes, device: str = "cpu") -> dict[str, Candidate]:
    """Return name -> step of torch's fused AdamW in float32, of EPI and of all of COMPACT, over as many entries.

    Args:
        shapes: of the tensors, each a layer; with 2 dimensions, since vectors are not kept in blocks of 8 bits.
        device: of the tensors.
    """
    made = candidates(shapes, names=(BASELINE, EPI), device=device)
    for name, (dtype, settings) in COMPACT.items():
        params = [Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        named = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
        optimizer = EPIAdamW(named, lr=LR, isolation_ratio=PROTECTED, mask_interval=None, **settings)
        optimizer.step()
        optimizer.refresh()
        made[name] = of_optimizer(optimizer)
    return made


def available_memory() -> int:
    """Return the bytes of memory that programs could still take on this machine."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def said_by(*command: str) -> str:
    """Return what a command prints, run in this folder; "unknown" if the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """Return a description of the machine and the software that gave the figures."""
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = said_by("git", "describe", "--always", "--dirty")
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
