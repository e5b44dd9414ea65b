"""EPILion: Lion's step against a loop in float64 and a case by hand, EPI's masks, checkpoints, and what it refuses.

The rule on every backend against the reference: tests/test_sweep.py and tests/test_backends_agree.py run all rules.
"""

import copy
from typing import Any

import pytest
import torch
from states import same_state
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, EPILion, lock

EPI: dict[str, Any] = {"isolation_ratio": 0.2, "mask_interval": 2, "importance_beta": 0.5}
SHAPES = {"layers.0.w": (5, 7), "layers.0.b": (7,), "layers.1.w": (3, 11), "head.w": (4,)}


def model(dtype: torch.dtype) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def give(params: dict[str, Parameter], step: int) -> None:
    for name, grad in gradients(step).items():
        params[name].grad = grad.to(params[name].dtype)


def loop(
    params: dict[str, Tensor], steps: int, lr: float, betas: tuple[float, float], decay: float, masks: list[Any]
) -> None:
    """Take steps of Lion, line by line as the paper has them, that leave the entries of `masks[step]` alone."""
    moments = {name: torch.zeros_like(param) for name, param in params.items()}
    for step in range(steps):
        for name, grad in gradients(step).items():
            theta, m = params[name], moments[name]
            update = torch.sign(betas[0] * m + (1 - betas[0]) * grad)
            moved = theta - lr * (update + decay * theta)
            params[name] = torch.where(masks[step][name], theta, moved)
            moments[name] = betas[1] * m + (1 - betas[1]) * grad


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("isolated", [False, True])
def test_float64_steps_are_those_of_a_loop(isolated: bool, weight_decay: float) -> None:
    settings = EPI if isolated else {"isolation_ratio": 0.0}
    params = model(torch.float64)
    expected: dict[str, Tensor] = {name: param.detach().clone() for name, param in params.items()}
    optimizer = EPILion(params.items(), lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay, **settings)
    masks = []
    for step in range(7):
        give(params, step)
        optimizer.step()
        masks.append({name: optimizer.isolation_mask(param) for name, param in params.items()})
    assert any(mask.any() for mask in masks[-1].values()) == isolated
    loop(expected, 7, 0.01, (0.8, 0.95), weight_decay, masks)
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), expected[name], rtol=1e-13, atol=1e-15)
    still = model(torch.float64)  # the bound sees an optimizer that does nothing
    assert not torch.allclose(still["layers.0.w"], expected["layers.0.w"], rtol=1e-13, atol=1e-15)


def test_one_step_by_hand(backend: str) -> None:
    weight = Parameter(torch.tensor([2.0, 2.0, 2.0]))
    optimizer = EPILion(
        [weight], lr=0.25, betas=(0.5, 0.75), weight_decay=0.5, isolation_ratio=0.0, layers="tensor", backend=backend
    )
    weight.grad = torch.tensor([4.0, -4.0, 0.0])
    optimizer.step()
    # decayed to 1.75, then by 0.25 against the gradient's sign; the sign of 0 is 0
    assert weight.tolist() == [1.5, 2.0, 1.75]
    assert optimizer.state[weight]["exp_avg"].tolist() == [1.0, -1.0, 0.0]
    weight.grad = torch.tensor([-1.0, -1.0, 0.0])
    optimizer.step()  # c = 0.5 - 0.5 = 0 for the first: decay alone
    assert weight.tolist() == [1.5 * 0.875, 2.0 * 0.875 + 0.25, 1.75 * 0.875]


def test_a_gradient_that_is_nan_damages_its_entry_alone(backend: str) -> None:
    weight = Parameter(torch.ones(3))
    optimizer = EPILion([weight], lr=0.25, isolation_ratio=0.0, layers="tensor", backend=backend)
    weight.grad = torch.tensor([1.0, float("nan"), -1.0])
    optimizer.step()
    assert weight.isnan().tolist() == [False, True, False]
    assert weight[[0, 2]].tolist() == [0.75, 1.25]


@pytest.mark.parametrize("settings", [{}, {"scope": "layer"}, {"normalize": "none"}, {"threshold": "histogram"}])
def test_masks_and_importance_are_those_of_epiadamw_for_the_same_gradients(
    settings: dict[str, Any], backend: str
) -> None:
    ours, theirs = model(torch.float32), model(torch.float32)
    lion = EPILion(ours.items(), backend=backend, **EPI, **settings)
    adamw = EPIAdamW(theirs.items(), backend=backend, **EPI, **settings)
    for step in range(6):
        give(ours, step)
        give(theirs, step)
        lion.step()
        adamw.step()
        for name in SHAPES:
            assert torch.equal(lion.isolation_mask(ours[name]), adamw.isolation_mask(theirs[name]))
            assert torch.equal(lion.importance(ours[name]), adamw.importance(theirs[name]))
    assert sum(int(lion.isolation_mask(param).sum()) for param in ours.values()) > 0
    assert lion.telemetry() == adamw.telemetry()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_protected_entry_keeps_its_bits_and_its_moment_advances(dtype: torch.dtype, backend: str) -> None:
    params = model(dtype)
    optimizer = EPILion(params.items(), lr=0.1, weight_decay=0.5, backend=backend, **EPI)
    for step in range(2):
        give(params, step)
        optimizer.step()
    masks = {name: optimizer.isolation_mask(param) for name, param in params.items()}
    before = {name: param.detach().clone() for name, param in params.items()}
    moments = {name: optimizer.state[param]["exp_avg"].clone() for name, param in params.items()}
    give(params, 2)
    optimizer.step()
    for name, param in params.items():
        assert torch.equal(param[masks[name]], before[name][masks[name]])
        assert not torch.equal(param[~masks[name]], before[name][~masks[name]])
        assert (optimizer.state[param]["exp_avg"] != moments[name]).all()


def test_a_checkpoint_goes_on_bit_for_bit(backend: str) -> None:
    params = model(torch.float32)
    optimizer = EPILion(params.items(), lr=0.01, backend=backend, **EPI)
    for step in range(3):
        give(params, step)
        optimizer.step()
    assert set(optimizer.state[params["head.w"]]) == {"step", "exp_avg", "importance"}
    other = {name: Parameter(param.detach().clone()) for name, param in params.items()}
    twin = EPILion(other.items(), lr=0.5, backend=backend, **EPI)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for one in (params, other):
            give(one, step)
        optimizer.step()
        twin.step()
    assert same_state(list(params.values()), list(other.values()))
    assert same_state(optimizer.state_dict()["state"], twin.state_dict()["state"])


def test_a_state_of_another_rule_is_refused_and_nothing_has_changed() -> None:
    ours, theirs = model(torch.float32), model(torch.float32)
    lion, adamw = EPILion(ours.items(), **EPI), EPIAdamW(theirs.items(), **EPI)
    for params, optimizer in ((ours, lion), (theirs, adamw)):
        give(params, 0)
        optimizer.step()
    before = copy.deepcopy(lion.state_dict())
    with pytest.raises(ValueError, match="exp_avg_sq, which this optimizer has not"):
        lion.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="has no eps, amsgrad: it is not AdamW's"):
        adamw.load_state_dict(lion.state_dict())
    assert same_state(lion.state_dict()["state"], before["state"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.5)}, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"isolation_ratio": 1.0}, "Invalid isolation_ratio: 1.0"),
        ({"clip_grad_norm": 0.0}, "Invalid clip_grad_norm: 0.0"),
    ],
)
def test_arguments_are_checked_by_name_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPILion([Parameter(torch.ones(2))], **arguments, layers="tensor")


def test_the_second_moment_that_lion_has_not_cannot_be_the_importance() -> None:
    optimizer = EPILion([("w", Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match="Invalid importance: 'exp_avg_sq'"):
        optimizer.add_param_group({"params": [("v", Parameter(torch.ones(2)))], "importance": "exp_avg_sq"})
    assert len(optimizer.param_groups) == 1


def test_a_scaler_a_schedule_and_a_copy_take_it_as_they_take_an_optimizer_of_torch() -> None:
    params = model(torch.float32)
    optimizer = EPILion(params.items(), lr=0.1, fused=True, **EPI)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(2):
        scaler.scale(sum(param.square().sum() for param in params.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    twin = copy.deepcopy(optimizer)
    assert torch.equal(
        lock.is_locked(next(iter(twin.state.values()))["importance"]),
        lock.is_locked(next(iter(optimizer.state.values()))["importance"]),
    )
