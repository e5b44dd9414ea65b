"""What the kernels of a refresh in Triton do not do, interpreted.

- No score divides 0 or divides by 0: a GPU does both on a slow path, and most S may be 0.
- A program that has counted nothing queues for no counter: it executes no atomic.
- That a refresh may not be due is read by the kernels: torch executes nothing more for it. As many programs are
  launched then as the device holds at once, whatever the number of chunks, and together they take every chunk.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from epi_kernels import ops


@pytest.fixture(autouse=True)
def only_triton(backend: str) -> None:
    if backend != "triton":
        pytest.skip("the kernels are Triton's")


@pytest.fixture
def quotients(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Return the operands of the divisions that kernels execute from now on."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = []
    divide = InterpreterBuilder.create_precise_divf

    def recorded(self: Any, numerator: Any, divisor: Any) -> Any:
        found.append((numerator.data.copy(), divisor.data.copy()))
        return divide(self, numerator, divisor)

    monkeypatch.setattr(InterpreterBuilder, "create_precise_divf", recorded)
    return found


def lock(importances: list[Tensor], ranges: Tensor, due: Tensor | None = None) -> Tensor:
    layers = list(range(len(importances)))
    return ops.lock_(importances, layers, ranges, [0] * len(layers), torch.tensor([0.5]), due, "triton")


def test_no_score_divides_zero_or_by_zero(quotients: list[tuple[Any, Any]]) -> None:
    importances = [torch.tensor([0.0, 3.0, 8.0] * 2000), torch.full((5,), 2.0), torch.zeros(5)]
    ranges = torch.tensor([[0.0, 8.0], [2.0, 2.0], [math.inf, -math.inf]])
    assert lock(importances, ranges)[:, 0].tolist() == [2000, 0, 0]
    assert len(quotients) >= len(importances)
    for numerator, divisor in quotients:
        assert np.count_nonzero(numerator) == numerator.size
        assert np.count_nonzero(divisor) == divisor.size


@pytest.fixture
def atomics(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the atomics that kernels execute from now on."""
    from triton.runtime.interpreter import InterpreterBuilder

    found: list[Any] = []
    execute = InterpreterBuilder.create_atomic_rmw

    def recorded(self: Any, operation: Any, *arguments: Any) -> Any:
        found.append(operation)
        return execute(self, operation, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", recorded)
    return found


def importance(importances: list[Tensor], ranges: Tensor, due: Tensor | None = None) -> None:
    count = len(importances)
    ops.importance_(
        importances,
        [torch.ones_like(own) for own in importances],
        ranges,
        torch.zeros(count, dtype=torch.int64),
        torch.tensor([(0.5, 0.5)] * count, dtype=torch.float64),
        list(range(count)),
        False,
        None,
        due,
        "triton",
    )


@pytest.mark.parametrize("due", [0.0, 1.0])
def test_a_refresh_that_is_not_due_executes_no_atomic(due: float, atomics: list[Any]) -> None:
    importances, given = [torch.ones(5), torch.ones(70_000)], torch.tensor([due])
    ranges = torch.tensor([[math.inf, -math.inf], [math.inf, -math.inf]])
    importance(importances, ranges, given)
    assert bool(atomics) == bool(due)
    assert ranges.tolist() == ([[1.0, 1.0]] * 2 if due else [[math.inf, -math.inf]] * 2)

    atomics.clear()
    selection = torch.tensor([[0, 1]])
    counts = ops.score_histogram(importances, [0, 1], None, [0, 0], selection, 19, 4096, given, "triton")
    assert bool(atomics) == bool(due)
    assert counts.sum() == due * 70_005

    atomics.clear()
    assert lock(importances, torch.tensor([[0.0, 1.0]] * 2), given).sum() == due * 2 * 70_005
    assert bool(atomics) == bool(due)


def test_a_program_that_counts_nothing_executes_no_atomic(atomics: list[Any]) -> None:
    ranges = torch.tensor([[math.inf, -math.inf]])
    importance([torch.full((5,), math.nan)], ranges)  # none of them is in the range
    assert ranges.tolist() == [[math.inf, -math.inf]]
    assert lock([torch.ones(5)], torch.tensor([[1.0, 1.0]])).sum() == 0  # a constant layer: none is locked
    assert not atomics


def test_where_the_device_decides_few_programs_take_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from epi_kernels.ops import tiles

    programs = []
    launch = tiles.launch

    def recorded(kernel: Any, count: int, *arguments: Any, **constants: Any) -> None:
        programs.append(count)
        launch(kernel, count, *arguments, **constants)

    monkeypatch.setattr(tiles, "launch", recorded)
    sizes, found = (5, 9 * tiles.CHUNK + 1, 2 * tiles.CHUNK), []
    for due in (None, torch.ones(1)):
        generator = torch.Generator().manual_seed(0)
        importances = [torch.rand(size, generator=generator) for size in sizes]
        ranges = torch.tensor([[math.inf, -math.inf]] * 3)
        importance(importances, ranges, due)
        selection = torch.tensor([[0, 1]])
        counts = ops.score_histogram(importances, [0, 1, 2], ranges, [0] * 3, selection, 19, 4096, due, "triton")
        locked = lock(importances, ranges, due)
        found.append((*importances, ranges, counts.sum(0), locked))
    assert all(map(torch.equal, *found))
    assert found[0][-1].sum() > 0
    assert programs == [13, 13, 13, 3, 3, 3]


class Operations(TorchDispatchMode):
    """Counts the operations of torch by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("operation", ["importance", "score_histogram", "lock"])
def test_whether_a_refresh_is_due_costs_no_operation_of_torch(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.importance.triton import Importance
    from epi_kernels.ops.threshold.triton import Histogram, Lock

    tensors, device = [torch.ones(5), torch.ones(9)], torch.device("cpu")
    ranges, counter = torch.tensor([[0.0, 1.0]]), torch.zeros(2, dtype=torch.int64)
    advance = Importance(tensors, tensors, torch.tensor([(0.5, 0.5)] * 2), [0, 0], True, device, (), ())
    histogram, locks = (of(tensors, [0, 0], [0, 0], device) for of in (Histogram, Lock))

    def run(due: Tensor | None) -> None:
        if operation == "importance":
            advance.advance_(tensors, tensors, ranges, counter, None, due, (), None)
        elif operation == "score_histogram":
            histogram.count(tensors, ranges, torch.tensor([[0, 1]]), 19, 4096, due, ())
        else:
            locks.lock_(tensors, ranges, torch.tensor([0.5]), due, ())

    launched: list[Any] = []
    # the interpreter copies arguments with operations of torch
    monkeypatch.setattr(tiles, "launch", lambda kernel, *_, **__: launched.append(kernel))
    run(None)  # sends the table
    counts = []
    for due in (None, torch.zeros(1)):
        with Operations() as operations:
            run(due)
        counts.append(operations.counts)
    assert counts[0] == counts[1]
    assert len(launched) == 3
