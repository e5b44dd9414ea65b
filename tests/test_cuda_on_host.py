"""The arithmetic of the CUDA kernel, compiled for the CPU: equal to the reference bit for bit.

csrc/cuda keeps the work of a thread in headers that any C++ compiler takes; tests/cuda_on_host.cpp runs the threads one
after the other. What this cannot see, the launch and the atomics, is compared on a GPU, by the backend's self-check.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from agreement import SIZES, signed

from epi_kernels import ops
from epi_kernels.backends import native
from epi_kernels.ops.threshold.rows import table_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if native.obstacle():
        pytest.skip(native.obstacle())  # whoever has no C++ compiler
    path = tmp_path_factory.mktemp("cuda") / "cuda_on_host.so"
    flags = "-std=c++17 -O1 -fPIC -shared -ffp-contract=off -fno-strict-aliasing"
    subprocess.run(["c++", *flags.split(), str(ROOT / "tests/cuda_on_host.cpp"), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.score_histogram.argtypes = (pointer, pointer, int64, pointer, pointer, int32, int32, pointer)
    return loaded


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("shift", "bins"), [(19, 4096), (9, 1024), (0, 512)])
def test_histograms(library: ctypes.CDLL, normalize: bool, shift: int, bins: int) -> None:
    importances = [signed((size,)) for size in SIZES] + [torch.full((70_000,), 2.0), signed((9001,))[1:]]
    layers, budgets = ([i % n for i in range(len(importances))] for n in (3, 2))
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [2.0, 2.0]]) if normalize else None
    digits = 31 - shift - (bins.bit_length() - 1)
    selection = torch.tensor([[0x3F000000 >> (31 - digits), 5], [0, 100]])
    table = table_of(importances, layers, budgets, int(library.histogram_chunk()), torch.device("cpu"))
    counts = torch.zeros(2, bins, dtype=torch.int64)
    library.score_histogram(
        table.rows().data_ptr(), table.chunks.data_ptr(), table.chunks.numel(),
        None if ranges is None else ranges.data_ptr(), selection.data_ptr(),
        shift, bins.bit_length() - 1, counts.data_ptr(),
    )  # fmt: skip
    expected = ops.score_histogram(importances, layers, ranges, budgets, selection, shift, bins, None, "reference")
    assert torch.equal(counts, expected.sum(0))
    assert counts.sum() > 0
