"""Refreshes go by the steps that the optimizer has taken, whichever parameters have a gradient in them.

- Parameters that stand still, frozen or without gradients, a finished task or an idle expert, stop no refresh.
- Every call of `step` counts, without gradients too; a step that a scaler skips does not.
- A wrapper that calls `step` for one group after the other, as DeepSpeed does, counts once for all of them.
- The clock is saved, is one for all groups, and starts at the largest ``state["step"]`` of a state of torch's.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import same_state
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer
from epi_kernels.engine import state as engine_state
from epi_kernels.optim import release_gradients

INTERVAL = 4
SETTINGS: dict[str, Any] = {"isolation_ratio": 0.25, "mask_interval": INTERVAL}

BUILD: dict[str, Callable[..., Any]] = {
    "ema": lambda named, **k: EPIAdamW(named, **{**SETTINGS, **k}),
    "exp_avg_sq": lambda named, **k: EPIAdamW(named, importance="exp_avg_sq", **{**SETTINGS, **k}),
    "around AdamW": lambda named, **k: IsolatedOptimizer(torch.optim.AdamW(named), **{**SETTINGS, **k}),
    "around SGD": lambda named, **k: IsolatedOptimizer(torch.optim.SGD(named, lr=0.1), **{**SETTINGS, **k}),
}
each_class = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


def named_parameters(*names: str) -> list[tuple[str, Parameter]]:
    return [(name, Parameter(torch.linspace(-1.0, 1.0, 16))) for name in names]


def give(param: Tensor, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    param.grad = torch.randn(param.shape, generator=generator)


def train(optimizer: Any, param: Tensor, steps: range) -> None:
    """Take steps in which `param` alone has a gradient."""
    for step in steps:
        give(param, step)
        optimizer.step()
        optimizer.zero_grad()


def refreshes(optimizer: Any) -> list[int]:
    return [record["step"] for record in optimizer.telemetry()]


@each_class
@pytest.mark.parametrize("how", ["no gradients", "frozen", "joined later", "thawed later"])
def test_parameters_that_stand_still_stop_no_refresh(build: Callable[..., Any], how: str) -> None:
    (first, a), (second, b) = named_parameters("blocks.0.weight", "blocks.1.weight")
    both = [(first, a), (second, b)]
    b.requires_grad_(how != "thawed later")
    optimizer = build(both[:1] if how == "joined later" else both)
    train(optimizer, a, range(9))
    if how == "joined later":
        optimizer.add_param_group({"params": both[1:]})
    if how in ("frozen", "joined later"):
        a.requires_grad_(False)
    b.requires_grad_(True)
    before = len(refreshes(optimizer))
    train(optimizer, b, range(9, 25))
    assert refreshes(optimizer)[before:] == [12, 16, 20, 24]
    assert optimizer.isolation_mask(b).any()  # what trains now is protected
    assert {group["isolation_clock"] for group in optimizer.param_groups} == {25}


@each_class
def test_an_expert_whose_turn_comes_late_is_protected_at_the_next_refresh(build: Callable[..., Any]) -> None:
    experts = named_parameters("experts.0.w", "experts.1.w", "experts.2.w")
    optimizer = build(experts)
    for step in range(12):
        train(optimizer, experts[step % 3][1], range(step, step + 1))
    assert refreshes(optimizer) == [4, 8, 12]
    assert all(optimizer.isolation_mask(param).any() for _, param in experts)


@each_class
def test_a_step_without_any_gradient_counts_and_refreshes_from_the_importance_as_it_is(
    build: Callable[..., Any], backend: str
) -> None:
    named = named_parameters("blocks.0.weight")
    param = named[0][1]
    optimizer = build(named, backend=backend)
    train(optimizer, param, range(2))
    importance, moments = optimizer.importance(param), copy.deepcopy(optimizer.state[param].get("exp_avg"))
    before = param.detach().clone()
    for _ in range(2):
        optimizer.step()
    assert refreshes(optimizer) == [4]
    assert int(optimizer.isolation_mask(param).sum()) == 4
    assert torch.equal(optimizer.importance(param), importance)
    assert same_state(optimizer.state[param].get("exp_avg"), moments)
    assert torch.equal(param, before)


@pytest.mark.parametrize("fused", [None, True])
def test_a_step_that_a_scaler_skips_does_not_count(fused: bool | None) -> None:
    param = Parameter(torch.ones(16))
    optimizer = EPIAdamW([("w", param)], fused=fused, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))  # which makes its scale
    for step in range(9):
        give(param, step)
        if step in (2, 5):
            param.grad[3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.param_groups[0]["isolation_clock"] == 7
    assert int(optimizer.state[param]["step"]) == 7
    assert refreshes(optimizer) == [4]


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_a_clock_on_the_device_is_that_of_the_host(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_state, "_get_capturable_supported_devices", lambda: ["cpu"])  # which stands in for a GPU
    pairs = []
    for capturable in (True, False):
        (first, a), (second, b) = named_parameters("blocks.0.weight", "blocks.1.weight")
        optimizer = EPIAdamW([(first, a), (second, b)], capturable=capturable, importance=importance, **SETTINGS)
        train(optimizer, a, range(5))
        optimizer.step()  # no gradient at all
        train(optimizer, b, range(6, 11))
        saved = copy.deepcopy(optimizer.state_dict())
        other = EPIAdamW([(first, a), (second, b)], capturable=capturable, importance=importance, **SETTINGS)
        other.load_state_dict(saved)
        train(other, b, range(11, 13))
        assert [group["isolation_clock"] for group in saved["param_groups"]] == [11]
        assert copy.deepcopy(optimizer).state_dict()["param_groups"][0]["isolation_clock"] == 11
        assert refreshes(other) == [12]
        pairs.append((a, b, other.isolation_mask(a), other.isolation_mask(b)))
    assert all(map(torch.equal, *pairs))


@each_class
@pytest.mark.parametrize("named", [True, False])
def test_calls_for_one_group_after_the_other_are_one_step(build: Callable[..., Any], named: bool) -> None:
    params = named_parameters("blocks.0.weight", "blocks.1.weight", "head.weight")
    groups: list[Any] = [{"params": [one if named else one[1]]} for one in params]
    optimizer = build(groups, layers="tensor")
    every = list(optimizer.param_groups)
    for step in range(INTERVAL):
        for i, group in enumerate(every):
            target = optimizer.base if isinstance(optimizer, IsolatedOptimizer) else optimizer
            target.param_groups = [group]
            give(params[i][1], step)
            optimizer.step()
            optimizer.zero_grad()
        target.param_groups = every
    assert {group["isolation_clock"] for group in optimizer.param_groups} == {INTERVAL}
    assert refreshes(optimizer) == [INTERVAL] * 3  # each group's own
    assert all(int(optimizer.isolation_mask(param).sum()) == 4 for _, param in params)


def test_calls_for_sub_groups_in_turn_are_one_step() -> None:
    # as DeepSpeed's third stage: all groups stay, and one after the other has one tensor while the others have none
    params = [param for _, param in named_parameters(*"abcd")]
    optimizer = EPIAdamW([{"params": params[:2]}, {"params": params[2:]}], layers="tensor", **SETTINGS)
    for step in range(2 * INTERVAL):
        for i, param in enumerate(params):
            optimizer.param_groups[i // 2]["params"] = [param]
            optimizer.param_groups[1 - i // 2]["params"] = []
            give(param, step)
            optimizer.step()
            param.grad = None
    assert {group["isolation_clock"] for group in optimizer.param_groups} == {2 * INTERVAL}


@each_class
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_parameters_that_a_wrapper_replaces_step_on(build: Callable[..., Any], after: int) -> None:
    named = named_parameters("blocks.0.weight", "blocks.1.weight")
    optimizer = build(named)
    params = [param for _, param in named]
    for step in range(2 * INTERVAL):
        if step == after:  # all of them, and their states
            for i, param in enumerate(params):
                params[i] = Parameter(param.detach().clone())
                if param in optimizer.state:
                    optimizer.state[params[i]] = optimizer.state.pop(param)
            optimizer.param_groups[0]["params"] = list(params)
        for param in params:
            give(param, step)
        optimizer.step()
    assert optimizer.param_groups[0]["isolation_clock"] == 2 * INTERVAL
    assert refreshes(optimizer) == [INTERVAL, 2 * INTERVAL]


def test_a_differentiable_step_counts_like_any_other() -> None:
    named = [(name, param.clone()) for name, param in named_parameters("blocks.0.weight", "blocks.1.weight")]
    for _, param in named:
        param.retain_grad()
    optimizer = EPIAdamW(named, differentiable=True, **SETTINGS)
    train(optimizer, named[0][1], range(2))
    optimizer.step()
    train(optimizer, named[1][1], range(2, 7))
    assert refreshes(optimizer) == [4, 8]


def test_released_gradients_refresh_at_the_same_steps() -> None:
    clocks = []
    for released in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        optimizer = EPIAdamW(model.named_parameters(), **SETTINGS)
        if released:
            release_gradients(model, optimizer)
        for step in range(12):
            part = model[0] if step < 5 else model[1]  # the first stands still from then on
            part(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        clocks.append(refreshes(optimizer))
    assert clocks == [[4, 8, 12], [4, 8, 12]]


@each_class
def test_the_clock_is_saved_and_one_for_all_groups(build: Callable[..., Any]) -> None:
    named = named_parameters("blocks.0.weight", "blocks.1.weight")
    optimizer = build(named[:1])
    train(optimizer, named[0][1], range(3))
    optimizer.add_param_group({"params": named[1:]})
    saved = copy.deepcopy(optimizer.state_dict())
    assert [group["isolation_clock"] for group in saved["param_groups"]] == [3, 3]
    other = build(named[:1])
    other.add_param_group({"params": named[1:]})
    other.load_state_dict(saved)
    train(other, named[1][1], range(3, 4))
    assert refreshes(other) == [4]


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "around AdamW"])
def test_a_state_of_torchs_starts_the_clock_at_its_largest_step(kind: str) -> None:
    named = named_parameters("blocks.0.weight", "blocks.1.weight")
    theirs = torch.optim.AdamW(named)
    train(theirs, named[0][1], range(3))
    train(theirs, named[1][1], range(1))
    ours = BUILD[kind](named)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["isolation_clock"] == 3
    train(ours, named[1][1], range(3, 8))
    assert refreshes(ours) == [4, 8]


@each_class
def test_a_clock_that_the_program_sets_counts_from_there(build: Callable[..., Any]) -> None:
    named = named_parameters("w")
    optimizer = build(named)
    train(optimizer, named[0][1], range(6))
    for group in optimizer.param_groups:
        group["isolation_clock"] = 0
    train(optimizer, named[0][1], range(6, 10))
    assert refreshes(optimizer) == [4, 4]
