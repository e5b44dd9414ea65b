"""A step of every optimizer over tensors of several shapes, against torch's fused AdamW of the same round."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BASELINE, BYTES, COMPACT, COMPILED_EAGER, TENSORS, Candidate, bytes_of, candidates, compact_candidates
from measure import DEVICES

from epi_kernels import memory

# name -> the shapes of the tensors
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "1M in 16 tensors": [((1 << 20) // TENSORS // 1024, 1024)] * TENSORS,
    "16M in 16 tensors": [((1 << 24) // TENSORS // 1024, 1024)] * TENSORS,
    "16M in one tensor": [((1 << 24) // 1024, 1024)],
    "2000 of 64 to 4096": [(64 * (1 + i % 64),) for i in range(2000)],
    "gpt2 at 1/4 of its width": [tuple(max(1, n // 4) if n != 50257 else n for n in s) for s in memory.MODELS["gpt2"]],
}
NAMES = [name for name in BYTES if name != COMPILED_EAGER]


@functools.lru_cache(maxsize=1)  # those of one shape, one after the other
def steps(shape: str, device: str, compact: bool) -> dict[str, Candidate]:
    torch.manual_seed(0)
    shapes = SHAPES[shape]
    return compact_candidates(shapes, device) if compact else candidates(shapes, names=NAMES, device=device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_steps(name: str, shape: str, device: str, benchmark: Any, interleaved: Callable[..., None]) -> None:
    benchmark.group = f"step, float32, {shape}, {device}"
    made = steps(shape, device, compact=False)
    entries = sum(torch.Size(of).numel() for of in SHAPES[shape])
    interleaved(made[name], made[BASELINE], device, entries, bytes_of(name, torch.float32, device))


@pytest.mark.parametrize("name", COMPACT)
@pytest.mark.parametrize("shape", ["1M in 16 tensors", "16M in 16 tensors"])
@pytest.mark.parametrize("device", DEVICES)
def test_steps_in_fewer_bytes(
    name: str, shape: str, device: str, benchmark: Any, interleaved: Callable[..., None]
) -> None:
    benchmark.group = f"step in fewer bytes, {shape}, {device}"
    made = steps(shape, device, compact=True)
    entries = sum(torch.Size(of).numel() for of in SHAPES[shape])
    interleaved(made[name], made[BASELINE], device, entries, bytes_of(name, torch.float32, device))
