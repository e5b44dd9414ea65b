"""Budgets are exact integers; lists that do not belong together are refused by name before anything runs."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from epi_kernels.contract import budget, check_lists


@pytest.mark.parametrize(
    ("ratio", "eligible", "k"),
    [(0.01, 250, 2), (0.29, 100, 29), (0.1, 30, 3), (0.01, 99, 0), (0.5, 0, 0), (0.001, 8_030_261_248, 8_030_261)],
)
def test_budget(ratio: float, eligible: int, k: int) -> None:
    assert budget(ratio, eligible) == k


# beyond k = 4e6 the product itself rounds by more than 1e-9
@hypothesis.given(st.integers(1, 999), st.integers(1, 4000))
def test_budget_of_a_whole_share_is_that_share(per_mille: int, thousands: int) -> None:
    assert budget(per_mille / 1000, thousands * 1000) == per_mille * thousands


def test_lists_that_do_not_belong_together() -> None:
    ones = torch.ones(2)
    check_lists({"locks": []}, params=[ones], grads=[None])
    with pytest.raises(ValueError, match="grads has 0 tensors but params has 1"):
        check_lists(params=[ones], grads=[])
    with pytest.raises(ValueError, match="locks has 2 tensors but params has 1"):
        check_lists({"locks": [ones, ones]}, params=[ones])
    with pytest.raises(ValueError, match="grads has 2 tensors but params has 1"):
        check_lists(params=[ones], grads=[ones, ones])
    with pytest.raises(ValueError, match=r"grads\[1\] has shape \(3,\) but params\[1\] has \(2,\)"):
        check_lists(params=[ones, ones], grads=[ones, torch.ones(3)])
    with pytest.raises(ValueError, match=r"grads\[0\] is on meta but params\[0\] is on cpu"):
        check_lists(params=[ones], grads=[ones.to("meta")])
    with pytest.raises(TypeError, match=r"grads\[0\] is torch.int64"):
        check_lists(params=[ones], grads=[torch.ones(2, dtype=torch.int64)])
