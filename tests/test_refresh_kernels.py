"""What the kernels of a refresh in Triton do not do, interpreted.

- No score divides 0 or divides by 0: a GPU does both on a slow path, and most S may be 0.
- A program that has counted nothing queues for no counter: it executes no atomic.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
