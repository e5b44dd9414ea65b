"""Programs of a kernel stop where a tensor ends: entries beyond are neither written nor counted.

- Counts of gradients that are not finite are of the tensor's entries, whatever factor multiplies the gradients.
- Where a refresh is not due every tensor has size 0, and a program whose entries would begin beyond 2^31 has none.
- A kernel of CUDA is launched while the tensors whose addresses it gets are alive.
- A table says which tensors are aligned, wherever the lock is.
"""

import math
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import gradient, scalars, step, step_lists, tensors_of
from torch import Tensor

import epi_kernels
from epi_kernels import ops
from epi_kernels.backends import cuda
from epi_kernels.ops.threshold.cuda import Histogram
from epi_kernels.rules import ADAMW
from epi_kernels.schema import SWEEP

OPS = Path(epi_kernels.__file__).parent / "ops"


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("lock_in", ["importance", "exp_avg_sq"])
def test_a_step_counts_entries_that_are_there(factor: float, lock_in: str, backend: str) -> None:
    sizes = (5, 4097, 0, 1)
    lists = step_lists([torch.ones(n) for n in sizes], [torch.full((n,), 2.0) for n in sizes], lock_in, False)
    found = step(lists, backend, lock_in, {"grad_factor": torch.tensor(factor)})["nonfinite"][0]
    assert found.tolist() == (list(sizes) if not math.isfinite(factor) else [0] * 4)


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1.0])
def test_importance_counts_entries_that_are_there(factor: float, backend: str) -> None:
    sizes = (5, 4097, 0, 1)
    counted = torch.zeros(len(sizes), dtype=torch.int64)
    ops.importance_(
        [torch.zeros(n) for n in sizes],
        [torch.full((n,), 2.0) for n in sizes],
        torch.tensor([[math.inf, -math.inf]]),
        counted,
        torch.tensor([(0.9, 0.1)] * len(sizes), dtype=torch.float64),
        [0] * len(sizes),
        True,
        torch.tensor([factor]),
        None,
        backend,
    )
    assert counted.tolist() == (list(sizes) if not math.isfinite(factor) else [0] * 4)


LEFT = """
import torch, triton, triton.language as tl
from epi_kernels.ops.tiles import left_of

@triton.jit
def kernel(row, start, out):
    tl.store(out, left_of(row, tl.load(start), 4096))

for size, start, expected in (
    (0, 0, 0), (0, 4096, 0), (0, 2**31 + 4096, 0), (0, 2**32 - 4096, 0), (0, 2**33, 0),
    (7, 0, 7), (2**31 + 7, 2**31, 7), (2**31 + 4096, 2**31, 4096), (2**40, 0, 4096),
):
    out = torch.full((1,), -77, dtype=torch.int32)
    kernel[(1,)](torch.tensor([size]), torch.tensor([start]), out)
    assert out.item() == expected, (size, start, out.item())
"""


def test_what_is_left_of_a_tensor_is_never_below_zero_nor_wraps() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # from a file: Triton reads the source of a kernel
    done = subprocess.run([sys.executable, "-c", RUN], input=LEFT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RUN = """
import sys, tempfile, runpy, pathlib
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "left.py"
    path.write_text(sys.stdin.read())
    runpy.run_path(str(path))
"""


@pytest.mark.parametrize("path", sorted(OPS.glob("*/triton.py")), ids=lambda path: path.parent.name)
def test_every_kernel_asks_left_of(path: Path) -> None:
    source = path.read_text()
    kernels = len(re.findall(r"^def \w+_kernel\((?!counts)", source, re.M))  # those of chunks
    assert kernels >= 1
    assert len(re.findall(r"left_of\(row, start, BLOCK \* TILES\)", source)) == kernels
    assert not re.search(r"tl\.load\(row[^)]*\) - start", source)


def test_a_kernel_is_launched_while_its_arguments_live(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[bool] = []
    rows: list[Any] = []

    class Stub:
        """The library: it looks whether what it got the addresses of is there."""

        def epi_cuda_score_histogram(self, *_: Any) -> int:
            alive.append(rows[0]() is not None)
            return 0

    class Tables:
        chunks = torch.zeros(1, dtype=torch.int64)

        def rows(self) -> Tensor:
            made = torch.zeros(1, 5, dtype=torch.int64)
            rows.append(weakref.ref(made))
            return made

    class Nothing:
        cuda_stream = 0

        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(cuda, "_library", Stub)
    monkeypatch.setattr(cuda, "histogram_chunk", lambda: 4096)
    monkeypatch.setattr(torch.cuda, "device", lambda _: Nothing())
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    monkeypatch.setattr("epi_kernels.ops.threshold.rows.table_of", lambda *_: Tables())
    selection = torch.zeros(1, 2, dtype=torch.int64)
    histogram = Histogram([torch.zeros(4)], [0], [0], torch.device("cpu"))
    histogram.count([torch.zeros(4)], None, selection, 19, 4096, torch.ones(1))
    assert alive == [True]


@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("shifted", [None, "params", "grads", "exp_avg", "exp_avg_sq", "locks"])
def test_tensors_are_aligned_wherever_the_lock_is(
    lock_in: str, amsgrad: bool, shifted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from epi_kernels.ops import tiles
    from epi_kernels.ops.sweep.triton import Sweep

    launched: list[Tensor] = []
    monkeypatch.setattr(tiles, "launch", lambda kernel, programs, device, rows, *_, **__: launched.append(rows))
    lists: dict[str, Any] = step_lists([torch.ones(64)], [gradient((64,))], lock_in, amsgrad)
    if shifted and not lists[shifted]:
        pytest.skip(f"a step with the lock in {lock_in} has no list of {shifted} to shift")
    if shifted:
        (tensor,) = lists[shifted]
        lists[shifted] = [torch.cat([tensor[:1], tensor])[1:]]  # one entry off
    tensors, in_slot = tensors_of(lists), lock_in == ADAMW.importance_slot
    sweep = Sweep(ADAMW, tensors, "slot" if in_slot else lock_in, [lock_in != "none"])
    nonfinite = torch.zeros(1, dtype=torch.int64)
    sweep.step_(tensors, nonfinite, scalars(lock_in, 1), [0], False, None, None, False)
    assert launched[0][:, SWEEP.word("aligned")].tolist() == [0 if shifted else 1]
    if in_slot:
        assert launched[0][:, SWEEP.word("lock")].tolist() == [1]
