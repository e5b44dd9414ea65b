"""Checkpoints: a run that stops, saves, loads and goes on is the run that never stopped, bit for bit.

In the middle of a mask interval, in every mode and dtype, through ``torch.save`` and ``torch.load(weights_only=True)``.
A state of torch.optim.AdamW loads, and ours loads into torch.optim.AdamW. pickle and deepcopy keep everything.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW

SHAPES = {"blocks.0.weight": (30, 7), "blocks.0.bias": (30,), "head.weight": (11, 5), "head.scale": ()}
MODES: dict[str, dict[str, Any]] = {
    "ema": {},
    "exp_avg_sq": {"importance": "exp_avg_sq"},
    "tensor": {"layers": "tensor"},
    "per layer": {"scope": "layer"},
    "amsgrad": {"amsgrad": True},
    "off": {"isolation_ratio": 0.0},
}


def epi(params: dict[str, Parameter], **settings: Any) -> EPIAdamW:
    return EPIAdamW(params.items(), **{"lr": 1e-2, "isolation_ratio": 0.2, "mask_interval": 4, **settings})


def masked(params: dict[str, Parameter], **settings: Any) -> MaskedAdamW:
    frozen = {"head.weight": torch.arange(55).view(11, 5) % 3 == 0}
    return MaskedAdamW(params.items(), lr=1e-2, frozen=frozen)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def train(params: dict[str, Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Take steps first .. last, whose gradients depend on the step alone; all but the first parameter miss some."""
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params.values()):
            grad = torch.randn(param.shape, generator=generator) * 10.0**-i
            param.grad = None if (step + i) % 5 == 0 and i else grad.to(param.dtype)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def masks(optimizer: Any, params: dict[str, Parameter]) -> list[Tensor]:
    return [optimizer.isolation_mask(p) for p in params.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("build", "settings"), [*((epi, mode) for mode in MODES.values()), (masked, {})], ids=[*MODES, "MaskedAdamW"]
)
def test_resumed_is_uninterrupted(build: Callable[..., Any], settings: dict[str, Any], dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    train(straight, build(straight, **settings), 1, 22)

    first = parameters(dtype)
    before = build(first, **settings)
    train(first, before, 1, 10)  # step 8 refreshed; 10 is in the middle of an interval
    saved = through_a_file(before.state_dict())

    second = {n: Parameter(p.detach().clone()) for n, p in first.items()}
    after = build(second, **settings)
    after.load_state_dict(saved)
    for one, other in zip(masks(before, first), masks(after, second), strict=True):
        assert torch.equal(one, other)
    train(second, after, 11, 22)
    for name in SHAPES:
        assert torch.equal(second[name], straight[name]), name


@pytest.mark.parametrize("kind", [pickle, copy], ids=["pickle", "deepcopy"])
def test_pickle_and_deepcopy_go_on_as_the_original(kind: Any) -> None:
    params = parameters()
    optimizer = epi(params)
    train(params, optimizer, 1, 10)
    twin = copy.deepcopy(optimizer) if kind is copy else pickle.loads(pickle.dumps(optimizer))
    twins = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    assert twin.telemetry() == optimizer.telemetry()
    train(params, optimizer, 11, 20)
    train(twins, twin, 11, 20)
    assert len(twin.telemetry()) == 5
    for name in SHAPES:
        assert torch.equal(params[name], twins[name]), name


def test_settings_come_from_the_state_as_with_torch() -> None:
    params = parameters()
    optimizer = epi(params, isolation_ratio=0.3, mask_interval=3)
    train(params, optimizer, 1, 2)
    other = epi(parameters(), isolation_ratio=0.1, mask_interval=500)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["isolation_ratio"], other.param_groups[0]["mask_interval"]) == (0.3, 3)


def test_a_state_of_another_grouping_is_refused_and_changes_nothing() -> None:
    params = parameters()
    optimizer = epi(params, layers="tensor")
    train(params, optimizer, 1, 5)
    other = epi(parameters(), layers="block")
    with pytest.raises(ValueError, match="saved with layers='tensor' and this optimizer has layers='block'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_a_state_of_torch_loads_and_goes_on(importance: str) -> None:
    params = parameters()
    torchs = torch.optim.AdamW(params.values(), lr=1e-2)
    train(params, torchs, 1, 6)
    twins = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    ours = epi(twins, importance=importance, isolation_ratio=0.25)
    ours.load_state_dict(through_a_file(torchs.state_dict()))
    assert ours.param_groups[0]["isolation_ratio"] == 0.25
    train(params, torchs, 7, 7)
    train(twins, ours, 7, 7)  # no refresh before 8
    for name in SHAPES:
        torch.testing.assert_close(params[name], twins[name], rtol=0, atol=1e-7)
    train(twins, ours, 8, 8)
    assert ours.telemetry()[-1]["step"] == 8


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_our_state_loads_into_torch_and_goes_on(importance: str) -> None:
    params = parameters()
    ours = epi(params, importance=importance)
    train(params, ours, 1, 10)
    assert any(mask.any() for mask in masks(ours, params))
    state = through_a_file(ours.state_dict())
    assert all((entry["exp_avg_sq"] >= 0).all() for entry in state["state"].values())
    twins = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    torchs = torch.optim.AdamW(twins.values(), lr=1e-2)
    torchs.load_state_dict(state)
    free = [~mask for mask in masks(ours, params)]
    train(params, ours, 11, 11)
    train(twins, torchs, 11, 11)
    for name, moving in zip(SHAPES, free, strict=True):
        torch.testing.assert_close(params[name][moving], twins[name][moving], rtol=0, atol=1e-7)


def test_states_keep_their_dtypes_under_bfloat16_parameters() -> None:
    params = parameters(torch.bfloat16)
    optimizer = epi(params)
    train(params, optimizer, 1, 5)
    other = epi(parameters(torch.bfloat16))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for state in other.state.values():
        assert {name: tensor.dtype for name, tensor in state.items()} == {
            "step": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "importance": torch.float32,
        }
