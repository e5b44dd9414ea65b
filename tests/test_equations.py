"""The per-element mathematics: scores that no hardware may see differently.

A score is always a number >= 0, since its bits, read as an integer, decide the threshold: a NaN, whose sign differs
between machines, would be the largest score on one of them and none on another.
"""

import pytest
import torch

from epi_kernels.ops.equations import importance_average, score
from epi_kernels.rules.adamw import second_moment


def test_a_constant_layer_scores_exactly_zero() -> None:
    assert score(torch.tensor([5.0, -5.0]), torch.tensor([5.0, 5.0])).view(torch.int32).tolist() == [0, 0]


def test_an_empty_range_scores_exactly_zero() -> None:
    assert score(torch.tensor([5.0]), torch.tensor([torch.inf, -torch.inf])).view(torch.int32).tolist() == [0]


@pytest.mark.parametrize("layer_range", [None, torch.tensor([0.0, 8.0])])
def test_what_is_not_finite_scores_exactly_zero(layer_range: torch.Tensor | None) -> None:
    bad = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf])
    assert score(bad, layer_range).view(torch.int32).tolist() == [0] * 4


def test_scores_use_the_whole_range() -> None:
    importance = torch.tensor([3.0, -4.0, 7.0, -11.0])
    assert score(importance, torch.tensor([3.0, 11.0])).tolist() == [0.0, 0.125, 0.5, 1.0]
    assert score(importance, None).tolist() == [3.0, 4.0, 7.0, 11.0]


def test_importance_rounds_each_operation_and_the_second_moment_once() -> None:
    before, grad = torch.rand(4096), torch.randn(4096)
    beta, rest = torch.tensor(0.9), torch.tensor(0.1)
    stepwise = torch.stack([before * beta, (grad * rest) * grad]).sum(0)
    assert torch.equal(importance_average(before, grad, 0.9, 0.1), stepwise)
    exact = before.double() * 0.9 + grad.double().square() * 0.1
    for result in (stepwise, second_moment(before, grad, 0.9, 0.1)):
        torch.testing.assert_close(result.double(), exact, rtol=3 * 2**-24, atol=0)
