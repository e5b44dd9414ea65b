"""The arithmetic of the CUDA kernels, compiled for the CPU: equal to the reference bit for bit.

csrc/cuda keeps the work of a thread in headers that any C++ compiler takes; tests/cuda_on_host.cpp runs the threads one
after the other. What this cannot see, the launch and the atomics, is compared on a GPU, by the backends' self-checks.
"""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import HALVES, SIZES, assert_same, clones, gradient, signed, step, step_arguments, step_lists
from torch import Tensor

from epi_kernels import ops
from epi_kernels.backends import native
from epi_kernels.ops.masked_adamw.sweep import TableSweep
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
    loaded.masked_adamw.argtypes = (pointer, pointer, int64, *[pointer] * 5, *[int32] * 4)
    loaded.score_histogram.argtypes = (pointer, pointer, int64, pointer, pointer, int32, int32, pointer)
    return loaded


def sweep_on(library: ctypes.CDLL, call: dict[str, Any]) -> None:
    """Do what `ops.masked_adamw_` does, by the kernel on the host."""

    class Sweep(TableSweep):
        def _piece(self) -> int:
            return int(library.sweep_piece())

        def _launch(self, scalars: Tensor, nonfinite: Tensor, advanced: bool, *scale: Tensor | None) -> None:
            pointers = [None if t is None else t.data_ptr() for t in (scalars, nonfinite, *scale)]
            error = library.masked_adamw(
                self._table.rows().data_ptr(),
                self._table.pieces.data_ptr(),
                self._table.pieces.numel(),
                *pointers,
                native.DTYPES[self._param_dtype],
                native.DTYPES[self._grad_dtype],
                native.LOCK_IN[self._lock_in],
                advanced,
            )
            assert not error

    absent = [None] * len(call["params"])
    lists = [
        call[name] or absent for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "locks")
    ]
    names = ("nonfinite", "scalars", "rows", "advanced", "grad_factor", "found_inf")
    Sweep(*lists, call["lock_in"], call["lockable"]).step_(*lists, False, *[call[name] for name in names])


def assert_equals_the_reference(
    library: ctypes.CDLL, lists: dict[str, list[Tensor]], lock_in: str, changes: dict[str, Any], **group: Any
) -> None:
    ours = clones(lists)
    call = {**step_arguments(ours, lock_in, **group), **changes}
    sweep_on(library, call)
    assert_same(
        {**ours, "nonfinite": [call["nonfinite"]]},
        step(lists, "reference", lock_in, {name: value for name, value in changes.items()}, **group),
    )


@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("advanced", [False, True])
def test_step(library: ctypes.CDLL, lock_in: str, amsgrad: bool, advanced: bool) -> None:
    lists = step_lists([torch.randn(size) for size in SIZES], [gradient((size,)) for size in SIZES], lock_in, amsgrad)
    assert_equals_the_reference(library, lists, lock_in, {"advanced": advanced})
    assert_equals_the_reference(library, lists, lock_in, {"grad_factor": torch.tensor(0.3)}, betas=(0.3, 0.9))
    assert_equals_the_reference(library, lists, lock_in, {"found_inf": torch.tensor(1.0)})
    lockable = [lock_in != "none" and i % 3 != 1 for i in range(len(SIZES))]
    lists["locks"] = [held if can else None for held, can in zip(lists["locks"], lockable, strict=False)]
    assert_equals_the_reference(library, lists, lock_in, {"lockable": lockable}, maximize=True)


@pytest.mark.parametrize("param_dtype", HALVES)
@pytest.mark.parametrize("grad_dtype", HALVES)
def test_step_of_every_pair_of_dtypes(library: ctypes.CDLL, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    params = [torch.randn(size).to(param_dtype) for size in SIZES]
    grads = [gradient((size,), grad_dtype) for size in SIZES]
    assert_equals_the_reference(library, step_lists(params, grads, "importance", False), "importance", {})


def test_step_of_views_that_are_not_aligned(library: ctypes.CDLL) -> None:
    params, grads = ([make(9001)[i : i + 9000] for i in (0, 1)] for make in (torch.randn, lambda n: gradient((n,))))
    lists = {name: list(tensors) for name, tensors in step_lists(params, grads, "importance", True).items()}
    assert params[1].data_ptr() % 16
    expected = step(lists, "reference", "importance")
    call = step_arguments(lists, "importance")
    sweep_on(library, call)
    assert_same({**lists, "nonfinite": [call["nonfinite"]]}, expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("shift", "bins"), [(19, 4096), (9, 1024), (0, 512)])
def test_histograms(library: ctypes.CDLL, normalize: bool, shift: int, bins: int) -> None:
    importances = [signed((size,)) for size in SIZES] + [torch.full((70_000,), 2.0), signed((9001,))[1:]]
    layers, budgets = ([i % n for i in range(len(importances))] for n in (3, 2))
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [2.0, 2.0]]) if normalize else None
    digits = 31 - shift - (bins.bit_length() - 1)
    selection = torch.tensor([[0x3F000000 >> (31 - digits), 5], [0, 100]])
    table = table_of(importances, layers, budgets, int(library.histogram_piece()), torch.device("cpu"))
    counts = torch.zeros(2, bins, dtype=torch.int64)
    library.score_histogram(
        table.rows().data_ptr(), table.pieces.data_ptr(), table.pieces.numel(),
        None if ranges is None else ranges.data_ptr(), selection.data_ptr(),
        shift, bins.bit_length() - 1, counts.data_ptr(),
    )  # fmt: skip
    expected = ops.score_histogram(importances, layers, ranges, budgets, selection, shift, bins, None, "reference")
    assert torch.equal(counts, expected.sum(0))
    assert counts.sum() > 0
