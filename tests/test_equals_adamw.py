"""With nothing protected, the optimizers are torch.optim.AdamW.

- float64: STEP_FLOAT64 over a whole run, every option of AdamW on.
- float32: STEP_ULPS in each step (more where a step exceeds the parameter, or torch's square root is off), against
  torch's fused version, and its loop and foreach with and without AMSGrad; a learning rate wrong by one part in 100,000
  fails the same bounds (negative control).
- bfloat16 and float16: the parameters are those of a float32 step, rounded once.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from tolerances import LARGE_STEP_ULPS, ROUGH_ROOT_ULPS, STEP_FLOAT64, STEP_ULPS, step_ulps
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW

# an interpreted kernel takes its time for each tile
ENTRIES = 5_003 if INTERPRETED else 50_003
SHAPES = [(), (1,), (0, 3), (4099,), (3, 5, 7), (64, 33)]
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "large decay": {"lr": 0.1, "weight_decay": 0.5},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "amsgrad": {"amsgrad": True},
    "betas": {"betas": (0.5, 0.9), "eps": 1e-3},
    "beta1 = 0": {"betas": (0.0, 0.99)},
    "tensor lr": {"lr": torch.tensor(0.01, dtype=torch.float64)},
}


def both(
    params: list[Tensor], ours: str, options: dict[str, Any], backend: str = "auto", **torchs: Any
) -> tuple[Any, Any]:
    """Return our optimizer on `params` and torch's on a copy of them."""
    theirs = torch.optim.AdamW([Parameter(p.detach().clone()) for p in params], **options, **torchs)
    if ours == "EPIAdamW":
        return EPIAdamW(params, isolation_ratio=0.0, layers="tensor", backend=backend, **options), theirs
    return MaskedAdamW(params, frozen={}, backend=backend, **options), theirs


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["EPIAdamW", "MaskedAdamW"])
def test_float64_run(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = both([Parameter(torch.randn(s, dtype=torch.float64)) for s in SHAPES], kind, options)
    for step in range(20):
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            p.grad = None if step == 7 and p.dim() == 1 else torch.randn_like(p)
            q.grad = p.grad
        ours.step()
        theirs.step()
        for p, q in zip(params_of(ours), params_of(theirs), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=STEP_FLOAT64)
            assert ours.state[p]["step"] == theirs.state[q]["step"]


def worst_step(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> tuple[float, float]:
    """Return the worst step_ulps of 12 steps of two optimizers of one parameter, each step from the same point."""
    generator = torch.Generator().manual_seed(1)
    (p,), (q,) = params_of(ours), params_of(theirs)
    size = 10 ** torch.empty_like(p).uniform_(-6, 3, generator=generator)
    worst = (0.0, 0.0)
    for _ in range(12):
        before = p.detach().clone()
        q.data.copy_(p)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if name in ours.state[p]:
                theirs.state[q][name].copy_(ours.state[p][name])
        p.grad = torch.randn(p.shape, generator=generator) * size
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        step = step_ulps(p.detach(), q.detach(), before)
        worst = (max(worst[0], step[0]), max(worst[1], step[1]))
    return worst


@pytest.mark.parametrize(
    ("name", "version"),
    [
        *[(name, {"fused": True}) for name in ("defaults", "large decay", "maximize", "amsgrad", "betas", "beta1 = 0")],
        *[(name, {"foreach": foreach}) for name in ("defaults", "amsgrad") for foreach in (False, True)],
    ],
    ids=str,
)
def test_float32_steps(version: dict[str, bool], name: str, backend: str) -> None:
    options = {"lr": 1e-2, **OPTIONS[name]}
    ours, theirs = both([Parameter(torch.randn(ENTRIES) * 0.1)], "EPIAdamW", options, backend, **version)
    small, large = worst_step(ours, theirs)
    assert small <= (STEP_ULPS if version.get("fused") else ROUGH_ROOT_ULPS)
    assert large <= LARGE_STEP_ULPS


def test_float32_bounds_see_a_wrong_learning_rate(backend: str) -> None:
    ours, theirs = both([Parameter(torch.randn(ENTRIES) * 0.1)], "EPIAdamW", {"lr": 1e-2}, backend)
    ours.param_groups[0]["lr"] *= 1 + 1e-5
    small, large = worst_step(ours, theirs)
    assert small > 2 * STEP_ULPS
    assert large > 2 * LARGE_STEP_ULPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, None], ids=["float32 gradient", "same dtype"])
def test_half_precision_is_a_float32_step_rounded_once(dtype: torch.dtype, grad_dtype: torch.dtype | None) -> None:
    half = Parameter(torch.randn(1000).to(dtype))
    if grad_dtype is not None:
        if not hasattr(half, "grad_dtype"):
            pytest.skip("this torch refuses a gradient of another dtype than its parameter's")
        half.grad_dtype = grad_dtype
    ours = EPIAdamW([half], lr=0.1, isolation_ratio=0.0, layers="tensor")
    single = Parameter(half.detach().float())
    wide = EPIAdamW([single], lr=0.1, isolation_ratio=0.0, layers="tensor")
    for _ in range(5):
        before = half.detach().clone()
        single.data.copy_(half)
        half.grad = torch.randn(1000).to(grad_dtype or dtype)
        single.grad = half.grad.float()
        ours.step()
        wide.step()
        assert torch.equal(half, single.to(dtype))
        assert (half != before).float().mean() > 0.9
    assert ours.state[half]["exp_avg"].dtype == torch.float32


def test_strides_of_parameter_and_gradient_may_differ_and_neighbours_stay() -> None:
    storage = torch.randn(6, 10)
    view = storage[:, ::2].t().requires_grad_()
    neighbours = storage[:, 1::2].clone()
    twin = Parameter(view.detach().clone(memory_format=torch.contiguous_format))
    ours, theirs = EPIAdamW([view], isolation_ratio=0.0, layers="tensor"), torch.optim.AdamW([twin])
    for _ in range(3):
        twin.grad = torch.randn(5, 6)
        view.grad = twin.grad.clone(memory_format=torch.contiguous_format)
        ours.step()
        theirs.step()
    torch.testing.assert_close(view, twin, rtol=0, atol=1e-7)
    assert torch.equal(storage[:, 1::2], neighbours)


def test_no_gradient_no_state_and_no_step() -> None:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    ours = EPIAdamW(params, layers="tensor")
    params[0].grad = torch.ones(2)
    assert ours.step(lambda: 7.0) == 7.0
    assert params[1] not in ours.state
    assert params[1].tolist() == [1.0, 1.0]
    assert set(ours.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "importance"}


def test_a_compiled_step_is_the_step() -> None:
    results = []
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        param = Parameter(torch.randn(100, generator=generator))
        optimizer = EPIAdamW([("layer.weight", param)], isolation_ratio=0.1, mask_interval=2)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(4):
            param.grad = torch.randn(100, generator=generator)
            step()
        results.append((param.detach(), optimizer.isolation_mask(param)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_step_keeps_no_gradient_alive(backend: str) -> None:
    params = [Parameter(torch.randn(30, 40)), Parameter(torch.randn(40, 30).t())]
    optimizer = EPIAdamW(params, layers="tensor", mask_interval=2, backend=backend)
    for _ in range(3):
        grads = []
        for param in params:
            param.grad = torch.randn(param.shape)
            grads.append(weakref.ref(param.grad))
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert all(grad() is None for grad in grads)
