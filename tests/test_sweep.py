"""The operation `sweep_`, every backend.

- A step computed by hand, to the float64 digits.
- float64: torch.optim.AdamW to STEP_FLOAT64 where nothing is locked.
- Locked entries: parameter bit-identical whatever the gradient, moments as if free.
- The lock bit stays as it is; `advanced` takes no second square.
- torch's `opcheck` accepts the registration.
"""

import math
from typing import Any

import pytest
import torch
from conftest import skip_unless_it_takes
from tolerances import STEP_FLOAT64
from torch import Tensor

from epi_kernels import lock, ops
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.rules import ADAMW

GROUP: dict[str, Any] = {
    "lr": 0.1,
    "betas": (0.9, 0.99),
    "eps": 1e-3,
    "weight_decay": 0.5,
    "maximize": False,
    "importance_beta": 0.75,
}


def arguments(
    backend: str,
    params: list[Tensor],
    grads: list[Tensor],
    locks: list[Tensor],
    lock_in: str,
    step: int = 1,
    **group: Any,
) -> dict[str, Any]:
    """Return the arguments of a first step: moments zero."""
    state = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    importance = {"importance": lock_in} if lock_in == "exp_avg_sq" else {}
    return {
        "rule": "adamw",
        "params": params,
        "grads": grads,
        "slots": [*(s.clone() for s in state), *(s.clone() for s in state)],
        "locks": locks,
        "nonfinite": torch.zeros(len(params), dtype=torch.int64),
        "scalars": torch.tensor([scalars_of(ADAMW, {**GROUP, **importance, **group}, step)], dtype=torch.float64),
        "rows": [0] * len(params),
        "lock_in": lock_in,
        "lockable": [lock_in != "none"] * len(params),
        "advanced": False,
        "grad_factor": None,
        "found_inf": None,
        "backend": backend,
    }


def test_a_step_computed_by_hand() -> None:
    # g = 2: m = 0.2, v = 0.04, S = 0.25 * 4 = 1; both corrections make m 2 and sqrt(v) 2:
    # theta = 3 * (1 - 0.05) - 0.1 * 2 / (2 + 0.001)
    param = torch.tensor([3.0, 3.0], dtype=torch.float64)
    call = arguments("reference", [param], [torch.full_like(param, 2.0)], [torch.tensor([0.0, -0.0])], "importance")
    ops.sweep_(**call)
    assert param[0].item() == pytest.approx(2.85 - 0.2 / 2.001, abs=1e-15)
    assert param[1].item() == 3.0
    assert call["slots"][0].tolist() == pytest.approx([0.2, 0.2], abs=1e-15)
    assert call["slots"][1].tolist() == pytest.approx([0.04, 0.04], abs=1e-15)
    assert call["locks"][0].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_float64_step_is_torchs(amsgrad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    params, grads = (
        [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((), (0,), (17,), (4, 5, 6))] for _ in "pg"
    )
    twins = [p.clone().requires_grad_() for p in params]
    options = {key: value for key, value in GROUP.items() if key != "importance_beta"}
    torchs = torch.optim.AdamW(twins, **options, amsgrad=amsgrad)
    call = arguments("reference", params, grads, [], "none")
    if amsgrad:
        call["slots"] += [torch.zeros_like(p) for p in params]
    for step in (1, 2, 3):
        call["scalars"][:] = torch.tensor(scalars_of(ADAMW, GROUP, step), dtype=torch.float64)
        for twin, grad in zip(twins, grads, strict=True):
            grad.mul_(-0.7)
            twin.grad = grad.clone()
        torchs.step()
        ops.sweep_(**call)
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param, twin.detach(), rtol=0, atol=STEP_FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lock_in", ["importance", "exp_avg_sq", "static"])
def test_locked_entries_keep_their_bits_under_any_gradient(backend: str, lock_in: str, dtype: torch.dtype) -> None:
    skip_unless_it_takes(backend, dtype)
    special = torch.tensor([1.0, -2.0, 0.0, math.nan, math.inf, -math.inf, 1e30])
    grad = special.repeat(2).to(dtype)
    param = torch.tensor([0.0, -0.0, 1.0, math.nan, -3.0, 1e-8, 7.0]).repeat(2).to(dtype)
    locked = torch.arange(14) < 7
    before = param.clone()
    state = torch.zeros(14, dtype=torch.promote_types(dtype, torch.float32))
    locks = {"importance": [lock.with_lock(torch.zeros(14), locked)], "static": [lock.static_lock(locked)]}
    call = arguments(backend, [param], [grad], locks.get(lock_in, []), lock_in)
    if lock_in == "exp_avg_sq":
        call["slots"][1] = lock.with_lock(state, locked)
    ops.sweep_(**call)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(param[:7].view(integers), before[:7].view(integers))
    finite = before[7:].isfinite() & special.to(dtype).isfinite() & (special != 0)
    assert (param[7:][finite] != before[7:][finite]).all()
    signed = call["slots"][1] if lock_in == "exp_avg_sq" else call["locks"][0]
    assert torch.equal(lock.is_locked(signed), locked)
    # moments do not know of the lock
    torch.testing.assert_close(call["slots"][0][:7], call["slots"][0][7:], equal_nan=True, rtol=0, atol=0)


def test_maximize_moves_the_other_way_and_leaves_the_importance(backend: str) -> None:
    results = []
    for maximize in (False, True):
        param, signed = torch.zeros(1), torch.zeros(1)
        ops.sweep_(**arguments(backend, [param], [torch.ones(1)], [signed], "importance", maximize=maximize))
        results.append((param.item(), signed.item()))
    assert results[0][0] == -results[1][0] != 0
    assert results[0][1] == results[1][1] == 0.25


@pytest.mark.parametrize("lock_in", ["importance", "exp_avg_sq"])
def test_advanced_takes_no_second_square(backend: str, lock_in: str) -> None:
    param, grad = torch.ones(3), torch.full((3,), 2.0)
    locks = [torch.full((3,), 5.0)] if lock_in == "importance" else []
    call = arguments(backend, [param], [grad], locks, lock_in)
    call["slots"][1] = torch.full((3,), 5.0)
    call["advanced"] = True
    ops.sweep_(**call)
    signed = call["locks"][0] if lock_in == "importance" else call["slots"][1]
    assert signed.tolist() == [5.0] * 3
    assert call["slots"][0].tolist() == pytest.approx([0.2] * 3)


def test_arguments_that_do_not_belong_together() -> None:
    call = arguments("auto", [torch.ones(2)], [torch.ones(2)], [], "none")
    with pytest.raises(ValueError, match="Invalid lock_in: 'sign'"):
        ops.sweep_(**{**call, "lock_in": "sign"})
    with pytest.raises(ValueError, match="grads has 0 tensors but params has 1"):
        ops.sweep_(**{**call, "grads": []})
    static = {**call, "lock_in": "static", "lockable": [True]}
    with pytest.raises(ValueError, match=r"locks\[0\] is None with lock_in='static', lockable=True"):
        ops.sweep_(**static)
    with pytest.raises(ValueError, match=r"locks\[0\] is a tensor with lock_in='static', lockable=False"):
        ops.sweep_(**{**static, "locks": [torch.zeros(2).char()], "lockable": [False]})
    with pytest.raises(ValueError, match="lockable has 2 values for 1 params"):
        ops.sweep_(**{**static, "lockable": [True, True]})
    with pytest.raises(TypeError, match=r"locks\[0\] is torch.float32; with lock_in='static' pass int8"):
        ops.sweep_(**{**static, "locks": [torch.zeros(2)]})
    with pytest.raises(ValueError, match=r"scalars has shape \(1, 11\), not \[n, 12\]"):
        ops.sweep_(**{**call, "scalars": call["scalars"][:, 1:]})
    with pytest.raises(ValueError, match=r"rows is \[1\]; pass for each of 1 tensors one of 1 rows"):
        ops.sweep_(**{**call, "rows": [1]})
    two = arguments("auto", [torch.ones(2), torch.ones(2).half()], [torch.ones(2)] * 2, [], "none")
    with pytest.raises(TypeError, match="params are torch.float16 and torch.float32; call the operation once for each"):
        ops.sweep_(**two)


@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
def test_opcheck(backend: str, lock_in: str) -> None:
    locks = {"importance": [torch.zeros(4), torch.zeros(2, 3)], "static": [torch.zeros(s).char() for s in (4, (2, 3))]}
    params, grads = ([torch.ones(4), torch.ones(2, 3)] for _ in "pg")
    call = arguments(backend, params, grads, locks.get(lock_in, []), lock_in)
    torch.library.opcheck(torch.ops.epi_kernels.sweep_.default, (), call)
