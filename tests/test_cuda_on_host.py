"""The CUDA kernel, compiled for the CPU with a thread for each thread of a block: equal to the reference bit for bit.

- Counts of every size, alignment and digit.
- ThreadSanitizer finds no race; it finds one as soon as a barrier is left out.

What this cannot see, blocks that run at once, is compared on a GPU, by the backend's self-check.
"""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from agreement import SIZES, signed

from epi_kernels import ops
from epi_kernels.backends import native
from epi_kernels.ops.threshold.rows import table_of

ROOT = Path(__file__).parents[1]


def compiled(path: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Compile the kernel's source for the CPU; `path` is the result."""
    source = (ROOT / "csrc/cuda/threshold.cu").read_text()
    kernels = path.with_name("kernels.h")
    kernels.write_text(re.sub(r"(\w+)<<<(.*?)>>>\(", r"launch(\1, \2)(", source))
    given = ["-std=c++17", "-O1", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing", f'-DKERNELS="{kernels}"']
    given += [f"-I{ROOT / 'csrc/cuda'}", str(ROOT / "tests/cuda_on_host.cpp"), "-o", str(path)]
    return subprocess.run(["c++", *given, *flags], capture_output=True, text=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if native.obstacle():
        pytest.skip(native.obstacle())  # whoever has no C++ compiler
    path = tmp_path_factory.mktemp("cuda") / "cuda_on_host.so"
    done = compiled(path, "-fPIC", "-shared")
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(path))
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.epi_cuda_score_histogram.argtypes = (pointer, pointer, int64, *(pointer,) * 3, int32, int32, *(pointer,) * 2)
    return loaded


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("shift", "bins"), [(19, 4096), (9, 1024), (0, 512)])
def test_histograms(library: ctypes.CDLL, normalize: bool, shift: int, bins: int) -> None:
    importances = [signed((size,)) for size in SIZES] + [torch.full((70_000,), 2.0), signed((9001,))[1:]]
    layers, budgets = ([i % n for i in range(len(importances))] for n in (3, 2))
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [2.0, 2.0]]) if normalize else None
    digits = 31 - shift - (bins.bit_length() - 1)
    selection = torch.tensor([[0x3F000000 >> (31 - digits), 5], [0, 100]])
    table = table_of(importances, layers, budgets, int(library.epi_cuda_histogram_chunk()), torch.device("cpu"))
    counts = torch.zeros(2, bins, dtype=torch.int64)
    error = library.epi_cuda_score_histogram(
        table.rows().data_ptr(), table.chunks.data_ptr(), table.chunks.numel(),
        None if ranges is None else ranges.data_ptr(), selection.data_ptr(), None,
        shift, bins.bit_length() - 1, counts.data_ptr(), None,
    )  # fmt: skip
    assert error == 0
    expected = ops.score_histogram(importances, layers, ranges, budgets, selection, shift, bins, None, "reference")
    assert torch.equal(counts, expected.sum(0))
    assert counts.sum() > 0


def test_no_race_is_found_unless_a_barrier_is_left_out(tmp_path: Path) -> None:
    if native.obstacle():
        pytest.skip(native.obstacle())
    path = tmp_path / "cuda_on_host"
    done = compiled(path, "-fsanitize=thread")
    if done.returncode:
        pytest.skip("this compiler has no ThreadSanitizer")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([str(path), *arguments], capture_output=True, text=True)

    clean = run()
    if "FATAL: ThreadSanitizer" in clean.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "17161 of 17161\n", "")
    barriers = (ROOT / "csrc/cuda/threshold.cu").read_text().count("__syncthreads();")
    assert barriers == 2
    for barrier in range(barriers):
        assert "WARNING: ThreadSanitizer: data race" in run(str(barrier)).stderr, barrier
