"""What a CUDA kernel reads is alive when it is launched; shown without a GPU, by a library that launches nothing.

Torch's caching allocator frees in the order of the stream, which hides the fault. `backend:cudaMallocAsync` and
PYTORCH_NO_CUDA_MEMORY_CACHING=1 do not.
"""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from epi_kernels import cuda
from epi_kernels.ops.masked_adamw.cuda import Sweep
from epi_kernels.ops.table import Table
from epi_kernels.ops.threshold.cuda import score_histogram


class Library:
    """Notes the arguments of each launch, and whether the rows that were sent up last are alive then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[weakref.ref[Tensor], int]] = []
        self.launched: list[tuple[str, tuple[Any, ...]]] = []
        rows = Table.rows

        def noted(table: Table, *arguments: Any) -> Tensor:
            found = rows(table, *arguments)
            self.sent.append((weakref.ref(found), found.data_ptr()))
            return found

        monkeypatch.setattr(Table, "rows", noted)
        monkeypatch.setattr(cuda, "_library", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))

    def epi_cuda_sweep_piece(self) -> int:
        return 4

    epi_cuda_histogram_piece = epi_cuda_sweep_piece

    def __getattr__(self, name: str) -> Any:
        def launch(*arguments: Any) -> int:
            alive, address = self.sent[-1]
            assert alive() is not None, "the rows were freed before the launch"
            assert arguments[0] == address
            self.launched.append((name, arguments))
            return 0

        return launch


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(monkeypatch)


@pytest.mark.parametrize("due", [None, 0.0, 1.0])
@pytest.mark.parametrize("ranged", [True, False])
def test_a_histogram(library: Library, due: float | None, ranged: bool) -> None:
    ranges = torch.tensor([[0.0, 1.0]], dtype=torch.float32, device="cpu") if ranged else None
    selection = torch.tensor([[0, 1]], dtype=torch.int64, device="cpu")
    flag = None if due is None else torch.tensor([due], dtype=torch.float32, device="cpu")
    importance = torch.rand(9, dtype=torch.float32, device="cpu")
    counts = score_histogram([importance], [0], ranges, [0], selection, 19, 4096, flag)
    ((name, arguments),) = library.launched
    assert name == "epi_cuda_score_histogram"
    known = (None if ranges is None else ranges.data_ptr(), selection.data_ptr(), 19, 12, counts.data_ptr(), 7)
    assert arguments[2:] == (3, *known)


@pytest.mark.parametrize("flagged", [True, False])
def test_a_step(library: Library, flagged: bool) -> None:
    p, g, m, v, s = ([torch.zeros(9, dtype=torch.float32, device="cpu")] for _ in range(5))
    lists = (p, g, m, v, [None], s)
    flag = torch.ones(1, dtype=torch.float32, device="cpu") if flagged else None
    count = torch.zeros(1, dtype=torch.int64, device="cpu")
    scalars = torch.zeros(1, 11, dtype=torch.float32, device="cpu")
    Sweep(*lists, "importance", [True]).step_(*lists, False, count, scalars, [0], False, flag, flag)
    ((name, arguments),) = library.launched
    assert name == "epi_cuda_masked_adamw"
    address = None if flag is None else flag.data_ptr()
    assert arguments[2:] == (3, scalars.data_ptr(), count.data_ptr(), None, address, address, 0, 0, 1, False, 7)
