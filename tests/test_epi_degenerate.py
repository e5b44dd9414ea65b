"""Every degenerate case of the specification, one test each, that fails without its rule.

The scores are made by hand: beta = 0 makes S the last squared gradient, so a gradient of sqrt(x) is an importance x.
"""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW


def optimizer_of(params: dict[str, Parameter], **settings: Any) -> EPIAdamW:
    """Return an optimizer in which each parameter is a layer, S is the last g^2, and each step refreshes."""
    settings = {
        "lr": 0.1,
        "weight_decay": 0.1,
        "isolation_ratio": 0.5,
        "importance_beta": 0.0,
        "mask_interval": 1,
        "layers": "tensor",
        **settings,
    }
    groups = settings.pop("groups", None)
    return EPIAdamW(groups or params.items(), **settings)


def step(optimizer: EPIAdamW, grads: dict[Parameter, Any]) -> None:
    for param, grad in grads.items():
        param.grad = None if grad is None else torch.as_tensor(grad, dtype=param.dtype)
    optimizer.step()


def mask(optimizer: EPIAdamW, param: Tensor) -> list[bool]:
    return optimizer.isolation_mask(param).tolist()


def test_fewer_positive_scores_than_k_protects_only_those() -> None:
    param = Parameter(torch.ones(8))
    optimizer = optimizer_of({"w": param}, isolation_ratio=0.75)
    step(optimizer, {param: [0, 0, 0, 1, 0, 2, 0, 0]})
    assert mask(optimizer, param) == [False, False, False, True, False, True, False, False]
    assert (optimizer.telemetry()[-1]["budget"], optimizer.telemetry()[-1]["protected"]) == (6, 2)


def test_untouched_embedding_rows_do_not_freeze_the_model() -> None:
    table, head = Parameter(torch.ones(100, 4)), Parameter(torch.ones(10))
    optimizer = optimizer_of({"table": table, "head": head}, isolation_ratio=0.2)
    rows = torch.zeros(100, 4)
    rows[3] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    step(optimizer, {table: rows, head: torch.arange(10.0)})
    assert optimizer.isolation_mask(table).sum() == 4
    assert optimizer.isolation_mask(head).sum() == 9


def test_ties_at_the_threshold_are_all_protected() -> None:
    param = Parameter(torch.ones(6))
    optimizer = optimizer_of({"w": param}, isolation_ratio=0.34)  # k = 2
    step(optimizer, {param: [0, 1, 3, 2, -2, 2]})
    assert mask(optimizer, param) == [False, False, True, True, True, True]
    assert (optimizer.telemetry()[-1]["budget"], optimizer.telemetry()[-1]["protected"]) == (2, 4)


def test_constant_layer_is_never_protected() -> None:
    flat, other = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = optimizer_of({"flat": flat, "other": other})
    step(optimizer, {flat: [5.0, 5.0, 5.0], other: [0.1, 0.2, 0.3]})
    assert mask(optimizer, flat) == [False] * 3
    assert mask(optimizer, other) == [False, True, True]


def test_layer_of_one_entry_is_never_protected() -> None:
    scalar, one, other = Parameter(torch.tensor(1.0)), Parameter(torch.ones(1)), Parameter(torch.ones(2))
    optimizer = optimizer_of({"scalar": scalar, "one": one, "other": other})
    step(optimizer, {scalar: 9.0, one: [9.0], other: [0.0, 0.1]})
    assert (mask(optimizer, scalar), mask(optimizer, one), mask(optimizer, other)) == (False, [False], [False, True])


def test_empty_tensor_takes_part_and_changes_nothing() -> None:
    empty, other = Parameter(torch.ones(0, 4)), Parameter(torch.ones(2))
    optimizer = optimizer_of({"empty": empty, "other": other})
    step(optimizer, {empty: torch.zeros(0, 4), other: [0.0, 0.1]})
    assert optimizer.isolation_mask(empty).shape == (0, 4)
    assert mask(optimizer, other) == [False, True]
    assert optimizer.telemetry()[-1]["eligible"] == 2


@pytest.mark.parametrize("size", [1e-10, 1e-14, 1e-17], ids=str)
def test_tiny_squared_gradients_are_normalised_like_any_other(size: float) -> None:
    # with eps = 1e-8 in Eq. 8 every score of `small` would be about 0, and `large` would take the whole budget
    small, large = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = optimizer_of({"small": small, "large": large}, isolation_ratio=0.25)
    step(optimizer, {small: [size * x for x in (0, 1, 2, 3)], large: [0, 1, 2, 3]})
    assert mask(optimizer, small) == mask(optimizer, large) == [False, False, False, True]


def test_subnormal_importance_counts_as_zero() -> None:
    param = Parameter(torch.ones(4))
    optimizer = optimizer_of({"w": param}, isolation_ratio=0.75)
    step(optimizer, {param: [0.0, 1e-20, 2e-20, 1e-18]})  # squares 1e-40 and 4e-40 are subnormal
    assert mask(optimizer, param) == [False, False, False, True]
    assert optimizer.telemetry()[-1]["layers"][0]["minimum"] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30], ids=str)
def test_a_gradient_that_is_not_finite_leaves_its_importance_and_is_counted(bad: float) -> None:
    param, other = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = optimizer_of({"w": param, "other": other}, importance_beta=0.5, isolation_ratio=0.25)
    step(optimizer, {param: [1.0, 2.0, 3.0, 4.0], other: [4.0, 3.0, 2.0, 1.0]})
    before = param.detach().clone()
    with pytest.warns(RuntimeWarning, match="w: 2 squared gradients were NaN or infinite"):
        step(optimizer, {param: [1.0, bad, 3.0, bad], other: [4.0, 3.0, 2.0, 1.0]})
    assert optimizer.importance(param).tolist() == [0.75, 2.0, 6.75, 8.0]
    assert mask(optimizer, param) == [False, False, False, True]
    assert mask(optimizer, other) == [True, False, False, False]
    assert param[3] == before[3]  # protected: 0 * NaN would have moved it
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for each parameter
        step(optimizer, {param: [1.0, bad, 3.0, 4.0], other: [4.0, 3.0, 2.0, 1.0]})
    assert optimizer.telemetry()[-1]["nonfinite"] == 3


def test_nan_in_the_second_moment_protects_nothing_of_its_own_and_all_of_the_others() -> None:
    param, other = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = optimizer_of({"a.w": param, "a.b": other}, importance="exp_avg_sq", layers="block")
    with pytest.warns(RuntimeWarning, match=r"a\.w: 1 squared gradients"):
        step(optimizer, {param: [math.nan, 2.0, 3.0, 4.0], other: [4.0, 3.0, 2.0, 1.0]})
    assert mask(optimizer, param) == [False, False, True, True]
    assert mask(optimizer, other) == [True, True, False, False]


def test_group_with_ratio_zero_is_exempt_and_costs_nothing() -> None:
    free, held = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    groups = [{"params": [("free", free)], "isolation_ratio": 0.0}, {"params": [("held", held)]}]
    optimizer = optimizer_of({}, groups=groups)
    step(optimizer, {free: [10.0, 20.0, 30.0, 40.0], held: [1.0, 2.0, 3.0, 4.0]})
    assert mask(optimizer, free) == [False] * 4
    assert mask(optimizer, held) == [False, False, True, True]
    assert "importance" not in optimizer.state[free]
    assert optimizer.telemetry()[-1]["eligible"] == 4


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_a_group_exempted_while_training_moves_on_as_adamw(importance: str) -> None:
    param, twin = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = optimizer_of({"w": param}, importance=importance, isolation_ratio=0.75)
    free = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.1)
    for exempted in (False, True, True):
        optimizer.param_groups[0]["isolation_ratio"] = 0.0 if exempted else 0.75
        twin.data.copy_(param)
        step(optimizer, {param: [1.0, 2.0, 3.0, 4.0]})
        twin.grad = param.grad.clone()
        free.step()
        assert mask(optimizer, param) == [False] + [not exempted] * 3
    torch.testing.assert_close(param, twin, rtol=0, atol=1e-6)


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_a_parameter_frozen_with_its_gradient_left_steps_as_torch_steps_it(importance: str) -> None:
    fixed, other, twin = (Parameter(torch.ones(4)) for _ in range(3))
    optimizer = optimizer_of({"fixed": fixed, "other": other}, importance=importance)
    free = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.1)
    fixed.requires_grad_(False)
    for _ in range(3):
        step(optimizer, {fixed: [1.0, 2.0, 3.0, 4.0], other: [1.0, 2.0, 3.0, 4.0]})
        twin.grad = fixed.grad.clone()
        free.step()
    assert not optimizer.isolation_mask(fixed).any()
    torch.testing.assert_close(fixed, twin, rtol=0, atol=1e-6)
    # the other one was refreshed in the same steps: its squares count once
    squares = optimizer.state[other]["exp_avg_sq"].abs()
    torch.testing.assert_close(squares, free.state[twin]["exp_avg_sq"], rtol=1e-6, atol=0)


def test_each_ratio_is_a_budget_of_its_own_over_its_groups() -> None:
    a, b, c = (Parameter(torch.ones(4)) for _ in range(3))
    groups = [
        {"params": [("a", a)], "isolation_ratio": 0.25},
        {"params": [("b", b)], "isolation_ratio": 0.5},
        {"params": [("c", c)], "isolation_ratio": 0.25},
    ]
    optimizer = optimizer_of({}, groups=groups)
    step(optimizer, {a: [0, 8, 9, 10], b: [0, 1, 2, 3], c: [0, 1, 2, 10]})
    # 0.25 of a and c together is 2: one each (both reach 1); 0.5 of b alone is 2
    assert mask(optimizer, a) == [False, False, False, True]
    assert mask(optimizer, b) == [False, False, True, True]
    assert mask(optimizer, c) == [False, False, False, True]
    budgets = optimizer.telemetry()[-1]["budgets"]
    assert [(b["isolation_ratio"], b["eligible"], b["budget"]) for b in budgets] == [(0.25, 8, 2), (0.5, 4, 2)]


def test_groups_of_different_ratios_share_the_range_of_their_layer() -> None:
    a, b = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    groups = [
        {"params": [("block.0.a", a)], "isolation_ratio": 0.34},
        {"params": [("block.0.b", b)], "isolation_ratio": 0.67},
    ]
    optimizer = optimizer_of({}, groups=groups, layers="block")
    step(optimizer, {a: [1.0, 1.5, 2.0], b: [1.0, 3.0, 4.0]})
    layer = optimizer.telemetry()[-1]["layers"][0]
    assert (layer["minimum"], layer["maximum"]) == (1.0, 16.0)
    assert (mask(optimizer, a), mask(optimizer, b)) == ([False, False, True], [False, True, True])


def test_two_parameters_of_one_name_are_two() -> None:
    params = [Parameter(torch.randn(10)), Parameter(torch.randn(30))]
    optimizer = optimizer_of({}, groups=[{"params": [("w", p)]} for p in params])  # torch takes a name twice
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.telemetry()[-1]["eligible"] == 40
    assert optimizer.telemetry()[-1]["protected"] == 20 == sum(int(optimizer.isolation_mask(p).sum()) for p in params)


def test_tied_weights_count_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(4, 2)
            self.head = torch.nn.Linear(2, 4, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    optimizer = EPIAdamW(model.named_parameters(), isolation_ratio=0.5, mask_interval=1)
    model.head(model.embedding(torch.arange(4))).square().sum().backward()
    optimizer.step()
    assert (optimizer.telemetry()[-1]["eligible"], optimizer.telemetry()[-1]["protected"]) == (8, 4)


def test_a_parameter_listed_twice_takes_part_once() -> None:
    param, twin = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = EPIAdamW([param, param], isolation_ratio=0.5, mask_interval=1, layers="tensor")
    step(optimizer, {param: [1.0, 2.0, 3.0, 4.0]})
    other = EPIAdamW([twin], isolation_ratio=0.5, mask_interval=1, layers="tensor")
    step(other, {twin: [1.0, 2.0, 3.0, 4.0]})
    assert optimizer.telemetry()[-1]["eligible"] == 4
    assert torch.equal(param, twin)


def test_mask_interval_none_refreshes_only_when_told() -> None:
    param = Parameter(torch.ones(4))
    optimizer = optimizer_of({"w": param}, mask_interval=None)
    for _ in range(5):
        step(optimizer, {param: [1.0, 2.0, 3.0, 4.0]})
    assert mask(optimizer, param) == [False] * 4
    before = param.detach().clone()
    optimizer.refresh()
    assert mask(optimizer, param) == [False, False, True, True]
    assert torch.equal(param, before)
    assert optimizer.telemetry()[0]["step"] == 5


def test_a_clock_that_stands_still_does_not_refresh_again() -> None:
    steady, late = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = optimizer_of({"steady": steady, "late": late}, mask_interval=2)
    for _ in range(2):
        step(optimizer, {steady: [1.0, 2.0, 3.0, 4.0], late: None})
    step(optimizer, {steady: None, late: [1.0, 2.0, 3.0, 4.0]})  # its own first step; the largest clock is still 2
    assert [record["step"] for record in optimizer.telemetry()] == [2]


def test_refresh_before_any_step_does_nothing() -> None:
    param = Parameter(torch.ones(4))
    optimizer = optimizer_of({"w": param})
    optimizer.refresh()
    assert mask(optimizer, param) == [False] * 4
    assert optimizer.telemetry() == []


def test_parameter_without_gradient_keeps_its_state_and_its_place() -> None:
    sometimes, always = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = optimizer_of({"sometimes": sometimes, "always": always}, isolation_ratio=0.25, importance_beta=0.5)
    step(optimizer, {sometimes: [0.0, 0.0, 0.0, 2.0], always: [0.0, 1.0, 2.0, 3.0]})
    importance, before = optimizer.importance(sometimes), sometimes.detach().clone()
    step(optimizer, {sometimes: None, always: [0.0, 1.0, 2.0, 3.0]})
    assert torch.equal(optimizer.importance(sometimes), importance)
    assert torch.equal(sometimes, before)
    assert optimizer.state[sometimes]["step"] == 1
    assert mask(optimizer, sometimes) == mask(optimizer, always) == [False, False, False, True]
    assert [record["eligible"] for record in optimizer.telemetry()] == [8, 8]


def test_parameter_that_never_had_a_gradient_counts_with_importance_zero() -> None:
    never, always = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = optimizer_of({"b.0.never": never, "b.0.always": always}, isolation_ratio=0.5, layers="block")
    step(optimizer, {always: [1.0, 2.0, 3.0, 4.0]})
    record = optimizer.telemetry()[-1]
    assert (record["eligible"], record["budget"], record["protected"]) == (8, 4, 4)  # k is a share of all 8
    assert (record["layers"][0]["minimum"], record["layers"][0]["maximum"]) == (0.0, 16.0)
    assert mask(optimizer, never) == [False] * 4
    assert never not in optimizer.state


def test_frozen_parameter_is_not_eligible() -> None:
    fixed, free = Parameter(torch.ones(4), requires_grad=False), Parameter(torch.ones(4))
    optimizer = optimizer_of({"fixed": fixed, "free": free})
    step(optimizer, {free: [1.0, 2.0, 3.0, 4.0]})
    assert optimizer.telemetry()[-1]["eligible"] == 4


def test_all_zero_step_protects_nothing() -> None:
    param = Parameter(torch.ones(4))
    optimizer = optimizer_of({"w": param}, lr=0.0)
    step(optimizer, {param: [0.0] * 4})  # what a checkpoint library does to create the state
    assert mask(optimizer, param) == [False] * 4
    assert optimizer.importance(param).tolist() == [0.0] * 4
    assert param.tolist() == [1.0] * 4


def test_a_protected_entry_of_value_zero_and_negative_zero_keeps_its_bits() -> None:
    param = Parameter(torch.tensor([-0.0, 0.0, 1.0, 1.0]))
    optimizer = optimizer_of({"w": param})
    step(optimizer, {param: [3.0, 4.0, 0.0, 0.1]})
    assert torch.signbit(param).tolist() == [True, False, False, False]
    assert param[:2].abs().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("fused", [None, True])
def test_skipped_step_of_a_gradient_scaler_moves_nothing(fused: bool | None) -> None:
    param = Parameter(torch.ones(4))
    optimizer = optimizer_of({"w": param}, isolation_ratio=0.25, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def train(scale: list[float]) -> None:
        optimizer.zero_grad()
        scaler.scale((param * torch.tensor(scale)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    train([1.0, 2.0, 3.0, 4.0])
    assert optimizer.importance(param).tolist() == [1.0, 4.0, 9.0, 16.0]  # unscaled
    before = {k: v.clone() for k, v in optimizer.state[param].items()}, param.detach().clone()
    train([1.0, 2.0, math.inf, 40.0])
    assert all(torch.equal(optimizer.state[param][k], v) for k, v in before[0].items())
    assert torch.equal(param, before[1])
    assert len(optimizer.telemetry()) == 1
