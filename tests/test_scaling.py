"""Loss scaling and gradient clipping inside the sweep.

- With fused=True a torch.amp.GradScaler leaves the gradients alone: the step divides by the scale, to the bits of a
  step on unscaled gradients, importance included; where an infinite gradient was found nothing moves, clock and
  importance included.
- clip_grad_norm=x is torch.nn.utils.clip_grad_norm_(x) before the step, without writing the gradients.
- A step that ignores scale or factor fails the same comparisons (negative control).
"""

import copy
from typing import Any

import pytest
import torch
from states import same_state
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW

SHAPES = {"h.0.weight": (30, 7), "h.0.bias": (30,), "head.weight": (11, 5), "head.scale": ()}
KINDS: dict[str, Any] = {
    "off": lambda p, **k: EPIAdamW(p.items(), lr=0.01, isolation_ratio=0.0, **k),
    "ema": lambda p, **k: EPIAdamW(p.items(), lr=0.01, isolation_ratio=0.2, mask_interval=2, **k),
    "exp_avg_sq": lambda p, **k: EPIAdamW(
        p.items(), lr=0.01, isolation_ratio=0.2, mask_interval=2, importance="exp_avg_sq", **k
    ),
    "masked": lambda p, **k: MaskedAdamW(p.items(), lr=0.01, frozen={"h.0.bias": torch.arange(30) % 2 == 0}, **k),
}
each_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def gradients(params: dict[str, Parameter], step: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(p.shape, generator=generator) * size).to(p.dtype) for p in params.values()]


def give(params: dict[str, Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params.values(), grads, strict=True):
        param.grad = grad


def same_run(params: dict[str, Parameter], optimizer: Any, twins: dict[str, Parameter], twin: Any) -> bool:
    states = [dict(enumerate(o.state_dict()["state"].values())) for o in (optimizer, twin)]
    return same_state([p.detach() for p in params.values()], [q.detach() for q in twins.values()]) and same_state(
        *states
    )


@each_kind
@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_a_scaler_that_leaves_the_gradients_alone(build: Any, scale: float, backend: str) -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = build(params, fused=True, backend=backend), build(twins, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(1, 6):
        scaled = gradients(params, step, 10.0)
        # as the scaler's own unscale_ has it
        give(twins, [grad * torch.tensor(1.0 / scale, dtype=torch.float32) for grad in scaled])
        give(params, scaled)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update(scale)
        twin.step()
        assert same_run(params, optimizer, twins, twin)
        for param, grad in zip(params.values(), gradients(params, step, 10.0), strict=True):
            assert torch.equal(param.grad, grad)


def test_a_step_that_ignored_the_scale_would_be_seen() -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = KINDS["ema"](params), KINDS["ema"](twins)
    give(params, gradients(params, 1, 1024.0))
    give(twins, gradients(twins, 1, 1.0))
    optimizer.step()
    twin.step()
    assert not same_run(params, optimizer, twins, twin)


@each_kind
@pytest.mark.parametrize("fused", [True, None])
def test_an_infinite_gradient_moves_nothing_at_all(build: Any, fused: bool | None) -> None:
    params = parameters()
    optimizer = build(params, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(1, 8):
        grads = gradients(params, step)
        if step in (1, 4):  # the step before the refresh at 2 and the one at 4 counts
            grads[2].view(-1)[3] = float("inf")
        before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params.values()]
        give(params, grads)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update(16.0)
        moved = not same_state([p.detach() for p in params.values()], before[1])
        assert moved == (step not in (1, 4))
        if step == 4:
            assert same_state(optimizer.state_dict()["state"], before[0])
    assert optimizer.state[params["h.0.bias"]]["step"].item() == 5.0
    if hasattr(optimizer, "telemetry") and optimizer.param_groups[0]["isolation_ratio"]:
        assert [record["step"] for record in optimizer.telemetry()] == [2, 4]


def test_unscaling_by_hand_before_the_step_is_no_second_division() -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = KINDS["ema"](params, fused=True), KINDS["ema"](twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    give(params, gradients(params, 1, 8.0))
    give(twins, gradients(twins, 1))
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    twin.step()
    assert same_run(params, optimizer, twins, twin)
    assert not hasattr(optimizer, "found_inf")


@each_kind
@pytest.mark.parametrize(
    ("norm", "interval"),
    [(0.5, 1), (0.5, 2), (1e6, 2)],
    ids=["clips, refreshes always", "clips", "does not clip"],
)
def test_clipping_is_that_of_torch_before_the_step(build: Any, norm: float, interval: int, backend: str) -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = build(params, clip_grad_norm=norm, backend=backend), build(twins, backend=backend)
    for o in (optimizer, twin):
        if "mask_interval" in o.param_groups[0]:
            o.param_groups[0]["mask_interval"] = interval
    for step in range(1, 6):
        give(params, gradients(params, step))
        give(twins, gradients(twins, step))
        untouched = [p.grad.clone() for p in params.values()]
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(twins.values(), norm)
        twin.step()
        assert same_run(params, optimizer, twins, twin)
        assert all(torch.equal(p.grad, g) for p, g in zip(params.values(), untouched, strict=True))


def test_clipping_that_was_left_out_would_be_seen() -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = KINDS["ema"](params, clip_grad_norm=0.5), KINDS["ema"](twins)
    give(params, gradients(params, 1))
    give(twins, gradients(twins, 1))
    optimizer.step()
    twin.step()
    assert not same_run(params, optimizer, twins, twin)


def test_the_norm_is_that_of_the_unscaled_gradients() -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = KINDS["ema"](params, fused=True, clip_grad_norm=0.5), KINDS["ema"](twins, clip_grad_norm=0.5)
    give(params, gradients(params, 1, 1024.0))
    give(twins, gradients(twins, 1))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    twin.step()
    assert same_run(params, optimizer, twins, twin)


def test_the_norm_of_16_bit_gradients_is_taken_in_float32() -> None:
    # 3000 ones: torch's norm of a bfloat16 tensor is 54.75, rounded to 8 bits, and not 54.7723
    param = Parameter(torch.ones(3000, dtype=torch.bfloat16))
    optimizer = EPIAdamW([("w", param)], betas=(0.0, 0.0), clip_grad_norm=1.0)
    param.grad = torch.ones(3000, dtype=torch.bfloat16)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full((3000,), 3000**-0.5), rtol=1e-6, atol=0)


def test_the_norm_is_that_of_gradients_of_all_dtypes_together() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = [Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
    optimizer = EPIAdamW([(f"w.{i}", p) for i, p in enumerate(params)], betas=(0.0, 0.0), clip_grad_norm=2.0)
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, i + 1)
    optimizer.step()
    for i, param in enumerate(params):
        expected = torch.full((4,), (i + 1) * 2.0 / 120**0.5)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected, check_dtype=False)


@pytest.mark.parametrize("isolation_ratio", [0.0, 0.3])
def test_a_differentiable_step_clips_as_the_other(isolation_ratio: float) -> None:
    found = []
    for differentiable in (False, True):
        leaf = Parameter(torch.linspace(-1, 1, 20))
        param = leaf.clone() if differentiable else leaf  # autograd writes into no leaf that requires a gradient
        optimizer = EPIAdamW(
            [("w", param)],
            isolation_ratio=isolation_ratio,
            mask_interval=2,
            clip_grad_norm=0.1,
            differentiable=differentiable,
        )
        for step in range(3):
            param.grad = torch.linspace(1, 2 + step, 20)
            optimizer.step()
        found.append((param.detach(), optimizer.state[param]["exp_avg"], optimizer.importance(param)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_norm_that_makes_no_sense_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="Invalid clip_grad_norm"):
        EPIAdamW(parameters().items(), clip_grad_norm=value)
    with pytest.raises(ValueError, match="Invalid clip_grad_norm"):
        MaskedAdamW(parameters().items(), frozen={}, clip_grad_norm=value)


def test_a_norm_is_one_for_all_groups_and_is_in_a_checkpoint() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="clip_grad_norm=2.0 in a parameter group; the optimizer has 1.0"):
        EPIAdamW([{"params": list(params.items()), "clip_grad_norm": 2.0}], clip_grad_norm=1.0)
    optimizer, other = KINDS["ema"](params, clip_grad_norm=1.0), KINDS["ema"](parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["clip_grad_norm"] == other.defaults["clip_grad_norm"] == 1.0
