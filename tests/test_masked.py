"""MaskedAdamW: frozen entries keep their bits for ever, the others follow torch.optim.AdamW; bad masks are named."""

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from epi_kernels import MaskedAdamW


def test_frozen_entries_keep_their_bits_and_the_rest_is_adamw() -> None:
    weight, bias = Parameter(torch.randn(50, 3)), Parameter(torch.randn(7))
    twins = [Parameter(weight.detach().clone()), Parameter(bias.detach().clone())]
    mask = torch.rand(50, 3) < 0.3
    ours = MaskedAdamW([("weight", weight), ("bias", bias)], lr=0.1, weight_decay=0.1, frozen={"weight": mask})
    theirs = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.1)
    start = weight.detach().clone()
    for _ in range(10):
        for p, q in zip((weight, bias), twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(weight[mask].view(torch.int32), start[mask].view(torch.int32))
    torch.testing.assert_close(weight[~mask], twins[0][~mask], rtol=0, atol=1e-6)
    torch.testing.assert_close(bias, twins[1], rtol=0, atol=1e-6)
    assert (weight[~mask] != start[~mask]).all()
    assert torch.equal(ours.isolation_mask(weight), mask)
    assert not ours.isolation_mask(bias).any()
    assert "frozen" not in ours.state[bias]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_frozen_entry_survives_a_gradient_that_is_not_finite(bad: float) -> None:
    weight = Parameter(torch.tensor([1.0, 1.0]))
    optimizer = MaskedAdamW([weight], frozen={weight: torch.tensor([True, False])})
    weight.grad = torch.tensor([bad, bad])
    optimizer.step()
    assert weight[0] == 1.0
    assert weight[1].isnan()


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({"wieght": torch.ones(4, dtype=torch.bool)}, "unknown name 'wieght'; the nearest names are weight"),
        ({"weight": torch.ones(4)}, r"frozen\['weight'\] is torch.float32; pass a bool tensor"),
        ({"weight": torch.ones(5, dtype=torch.bool)}, r"frozen\['weight'\] has shape \(5,\), the parameter \(4,\)"),
        ({Parameter(torch.ones(3)): torch.ones(3, dtype=torch.bool)}, r"shape \(3,\) that is not a parameter here"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(frozen: dict[Any, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedAdamW([("weight", Parameter(torch.ones(4)))], frozen=frozen)


def test_a_mask_by_name_and_by_parameter_is_one_too_many() -> None:
    weight, mask = Parameter(torch.ones(4)), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="frozen has 'weight' by name and by Parameter"):
        MaskedAdamW([("weight", weight)], frozen={"weight": mask, weight: ~mask})


def test_a_name_is_whatever_torch_takes_for_one() -> None:
    optimizer = MaskedAdamW([(7, weight := Parameter(torch.ones(2)))], frozen={7: torch.tensor([True, False])})
    assert optimizer.isolation_mask(weight).tolist() == [True, False]


def test_names_need_an_optimizer_that_knows_names() -> None:
    with pytest.raises(ValueError, match=r"unknown name 'weight'; pass model.named_parameters\(\)"):
        MaskedAdamW([Parameter(torch.ones(1))], frozen={"weight": torch.ones(1, dtype=torch.bool)})
