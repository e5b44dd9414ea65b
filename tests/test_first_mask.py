"""The overlap with the first mask equals that of masks kept on the host, in every layout of ranks, and resumes.

A parameter that joins or leaves counts with its protected entries. What does not fit is refused, and changes nothing.
"""

import copy
from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharding import every_layout, loss_of, mask_of, pairs
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW
from epi_kernels.first_mask import FirstMask
from epi_kernels.metrics import mask_jaccard

SHAPES = {"layers.0.w": (6, 4), "layers.1.w": (3, 7), "head.w": (9,)}
EPI: dict[str, Any] = {"isolation_ratio": 0.3, "mask_interval": 2, "importance_beta": 0.2}


def made(kind: str) -> tuple[Any, dict[str, Parameter]]:
    params = {name: Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    if kind == "EPIAdamW":
        return EPIAdamW(params.items(), **EPI), params
    return IsolatedOptimizer(torch.optim.SGD(params.items(), lr=0.1), **EPI), params


def step(optimizer: Any, params: dict[str, Parameter], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    return {name: optimizer.isolation_mask(param) for name, param in params.items()}


@pytest.mark.parametrize("kind", ["EPIAdamW", "IsolatedOptimizer"])
def test_the_overlap_is_that_of_masks_that_were_kept(kind: str) -> None:
    optimizer, params = made(kind)
    first, masks = FirstMask(optimizer), []
    for seed in range(9):
        now = step(optimizer, params, seed)
        overlap = first.overlap()
        if seed == 0:
            assert overlap is None
            assert first.state_dict() == {}
            continue
        masks.append(now)
        assert overlap == mask_jaccard(masks[0], now)
        assert (overlap == 1.0) == (seed in (1, 2))


def test_a_run_that_goes_on_elsewhere_compares_with_the_same_mask() -> None:
    optimizer, params = made("EPIAdamW")
    first = FirstMask(optimizer)
    for seed in range(2):
        step(optimizer, params, seed)
        first.overlap()
    state, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(first.state_dict())
    other, twins = made("EPIAdamW")
    other.load_state_dict(state)
    resumed = FirstMask(other)
    resumed.load_state_dict(saved)
    for seed in range(2, 6):
        step(optimizer, params, seed)
        step(other, twins, seed)
        overlap = first.overlap()
        assert resumed.overlap() == overlap
    assert overlap is not None
    assert overlap < 1


def test_parameters_that_join_or_leave_count_with_what_is_protected() -> None:
    optimizer, params = made("EPIAdamW")
    first = FirstMask(optimizer)
    for seed in range(2):
        before = step(optimizer, params, seed)
    assert first.overlap() == 1.0
    gone = optimizer.param_groups[0]["params"].pop(0)
    optimizer.param_groups[0]["param_names"].pop(0)
    del optimizer.state[gone], params["layers.0.w"]
    params["new.w"] = Parameter(torch.ones(5, 5))
    optimizer.add_param_group({"params": [("new.w", params["new.w"])]})
    for seed in range(2, 4):
        now = step(optimizer, params, seed)
    zeros = {"layers.0.w": torch.zeros(6, 4, dtype=torch.bool), "new.w": torch.zeros(5, 5, dtype=torch.bool)}
    assert first.overlap() == mask_jaccard({**zeros, **before}, {**zeros, **now})
    assert before["layers.0.w"].any()
    assert now["new.w"].any()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"tail.w": torch.zeros(9, dtype=torch.bool)}, "has tail.w, which is no parameter that the optimizer protects"),
        ({"head.w": torch.zeros(9)}, r"of head.w is torch.float32 of shape \(9,\); the parameter needs torch.bool"),
        ({"head.w": torch.zeros(3, dtype=torch.bool)}, r"is torch.bool of shape \(3,\); .* of shape \(9,\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(state: dict[str, Tensor], message: str) -> None:
    optimizer, params = made("EPIAdamW")
    first = FirstMask(optimizer)
    for seed in range(2):
        masks = step(optimizer, params, seed)
    first.overlap()
    with pytest.raises(ValueError, match=message):
        first.load_state_dict(state)
    assert all(torch.equal(first.masks[name], mask) for name, mask in masks.items())


def test_a_parameter_of_another_shape_is_refused() -> None:
    optimizer, params = made("EPIAdamW")
    first = FirstMask(optimizer)
    for seed in range(2):
        step(optimizer, params, seed)
    first.overlap()
    first.masks["head.w"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"head.w has shape \(9,\) now and \(3,\) in the first mask"):
        first.overlap()


def test_an_optimizer_whose_masks_do_not_evolve_is_refused() -> None:
    with pytest.raises(TypeError, match="a MaskedAdamW, whose masks do not evolve"):
        FirstMask(MaskedAdamW([Parameter(torch.ones(3))], frozen={}))  # type: ignore[arg-type]


@every_layout
@on_ranks()
def test_every_rank_has_the_overlap_of_whole_masks(rank: int, size: int, layout: str) -> None:
    model, _, width = pairs(layout)
    settings = {"lr": 0.02, "isolation_ratio": 0.15, "mask_interval": 1, "importance_beta": 0.0}
    optimizer = EPIAdamW(model.named_parameters(), **settings)
    first, kept = FirstMask(optimizer), []
    for seed in range(3):
        loss_of(model, seed, width).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append({name: mask_of(optimizer, param) for name, param in model.named_parameters()})
        overlap = first.overlap()
        assert overlap == mask_jaccard(kept[0], kept[-1])
    assert overlap is not None
    assert overlap < 1
    resumed = FirstMask(optimizer)
    resumed.load_state_dict(kept[0])  # whole masks: each rank takes its shard
    assert resumed.overlap() == overlap
