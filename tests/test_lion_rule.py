"""The rule Lion on every backend: the bits of the reference, in sweeps and in gathers, under every kind of lock."""

from typing import Any

import pytest
import torch
from agreement import HALVES, SIZES, SPECIAL, assert_same, clones, gradient

from epi_kernels import lock, ops
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.rules import LION

GROUP = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "maximize": False, "importance_beta": 0.95}


def lists_of(params: Any, grads: Any, lock_in: str) -> Any:
    locked = [torch.rand(p.shape) < 0.3 for p in params]
    lists = {"params": params, "grads": grads, "exp_avg": [torch.randn(p.shape) for p in params], "locks": []}
    if lock_in == "importance":
        lists["locks"] = [lock.with_lock(torch.rand(p.shape), w) for p, w in zip(params, locked, strict=True)]
    if lock_in == "static":
        lists["locks"] = [lock.static_lock(w) for w in locked]
    return lists


def step(lists: Any, backend: str, lock_in: str, **group: Any) -> Any:
    lists = clones(lists)
    n = len(lists["params"])
    nonfinite = torch.zeros(n, dtype=torch.int64)
    scalars = torch.tensor([scalars_of(LION, {**GROUP, **group}, 1.0)], dtype=torch.float64)
    ops.sweep_(
        "lion",
        lists["params"],
        lists["grads"],
        lists["exp_avg"],
        lists["locks"],
        nonfinite,
        scalars,
        [0] * n,
        lock_in,
        [lock_in != "none"] * n,
        False,
        None,
        None,
        backend,
    )
    return {**lists, "nonfinite": [nonfinite]}


@pytest.mark.parametrize("lock_in", ["none", "importance", "static"])
@pytest.mark.parametrize("param_dtype", HALVES)
@pytest.mark.parametrize("grad_dtype", HALVES)
def test_a_sweep_has_the_bits_of_the_reference(
    backend: str, lock_in: str, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    params = [torch.randn(s).to(param_dtype) for s in SIZES]
    lists = lists_of(params, [gradient((s,), grad_dtype) for s in SIZES], lock_in)
    for group in ({}, {"maximize": True}, {"betas": (0.0, 0.5)}):
        assert_same(step(lists, backend, lock_in, **group), step(lists, "reference", lock_in, **group))


def test_special_values_have_the_bits_of_the_reference(backend: str) -> None:
    p, g, m = (t.reshape(-1) for t in torch.meshgrid(SPECIAL, SPECIAL, SPECIAL, indexing="ij"))
    lists = lists_of([p.clone()], [g.clone()], "importance")
    lists["exp_avg"] = [m.clone()]
    assert_same(step(lists, backend, "importance"), step(lists, "reference", "importance"))


def test_one_sweep_by_hand(backend: str) -> None:
    nan = float("nan")
    p, g, m = torch.full((6,), 2.0), torch.tensor([1.0, -1.0, 0.0, nan, 1.0, 1.0]), torch.tensor([0.0, 0, 0, 0, -1, -1])
    lists = {"params": [p], "grads": [g], "exp_avg": [m], "locks": [torch.tensor([0.0, 0, 0, 0, 0, -0.0])]}
    found = step(lists, backend, "importance", lr=0.5, betas=(0.5, 0.75), weight_decay=0.5)
    # decay 0.75: 1.5 -+ 0.5; sign(0) = 0; NaN; c = 0; locked
    torch.testing.assert_close(
        found["params"][0], torch.tensor([1.0, 2.0, 1.5, nan, 1.5, 2.0]), equal_nan=True, rtol=0, atol=0
    )
    torch.testing.assert_close(
        found["exp_avg"][0], torch.tensor([0.25, -0.25, 0, nan, -0.5, -0.5]), equal_nan=True, rtol=0, atol=0
    )
    assert torch.signbit(found["locks"][0]).tolist() == [False] * 5 + [True]
    assert found["nonfinite"][0].tolist() == [1]


def test_a_gather_has_the_bits_of_the_reference_and_moves_no_other_entry(backend: str) -> None:
    param, grad, indices = torch.randn(3000), torch.randn(3000), torch.arange(0, 3000, 7)
    m = torch.randn(len(indices))
    results = []
    for name in (backend, "reference"):
        mine, state = param.clone(), m.clone()
        scalars = torch.tensor([scalars_of(LION, GROUP, 1.0)], dtype=torch.float64)
        ops.gather_("lion", [mine], [grad], [indices], [state], scalars, [0], name)
        results.append({"p": [mine], "m": [state]})
    assert_same(*results)
    assert (results[0]["p"][0] != param).sum() == len(indices)


def test_no_slot_of_lion_can_carry_the_lock() -> None:
    with pytest.raises(
        ValueError, match=r"Invalid lock_in: 'exp_avg_sq'; choose one of \('none', 'importance', 'static'\)"
    ):
        step(lists_of([torch.ones(2)], [torch.ones(2)], "none"), "auto", "exp_avg_sq")
