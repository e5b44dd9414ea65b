"""Every backend against the reference, which the other tests hold to the papers.

- Every result bit for bit, parameters and moments too, for any dtypes, strides and sizes, on every SIMD level. NaN
  stays NaN.
- Tensors with and without lock or AMSGrad, of several parameter groups, in one call.
- A gradient factor, and a step that found_inf skips.
- Special values: NaN, infinity, -0.0, subnormals, rounding ties and overflow of 16-bit parameters.
- Memory around a view is never touched; results never depend on what output memory held before.
- The comparison sees one unit in the last place.
"""

import math
from typing import Any

import pytest
import torch
from agreement import (
    HALVES,
    SIZES,
    SPECIAL,
    assert_same,
    assert_steps_agree,
    clones,
    differing,
    gradient,
    signed,
    step,
    step_arguments,
    step_lists,
    tensors_of,
)
from levels import CHALLENGERS, chosen
from torch import Tensor

from epi_kernels import lock, ops
from epi_kernels.rules import ADAMW
from epi_kernels.schema import width_of


@pytest.fixture(params=CHALLENGERS, ids=lambda c: f"{c[0]} {c[1]}")
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run on one backend, native on one of its SIMD levels."""
    return chosen(request.param, monkeypatch)


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("advanced", [False, True])
def test_step_of_every_size_and_kind(backend: str, lock_in: str, amsgrad: bool, advanced: bool) -> None:
    params, grads = [torch.randn(size) for size in SIZES], [gradient((size,)) for size in SIZES]
    lists = step_lists(params, grads, lock_in, amsgrad)
    assert_steps_agree(backend, lists, lock_in, {"advanced": advanced})


@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize(
    "settings", [{"betas": (0.3, 0.9), "maximize": True}, {"betas": (0.0, 0.999), "eps": 0.0, "weight_decay": 0.0}]
)
def test_step_of_other_settings(backend: str, lock_in: str, settings: dict[str, Any]) -> None:
    params, grads = [torch.randn(size) for size in SIZES[:-1]], [gradient((size,)) for size in SIZES[:-1]]
    assert_steps_agree(backend, step_lists(params, grads, lock_in, True), lock_in, **settings)


@pytest.mark.parametrize("param_dtype", HALVES)
@pytest.mark.parametrize("grad_dtype", HALVES)
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
def test_step_of_every_pair_of_dtypes(
    backend: str,
    lock_in: str,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> None:
    params = [torch.randn(size).to(param_dtype) for size in SIZES[:-1]]
    grads = [gradient((size,), grad_dtype) for size in SIZES[:-1]]
    assert_steps_agree(backend, step_lists(params, grads, lock_in, False), lock_in)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_step_of_special_values(backend: str, lock_in: str, amsgrad: bool, dtype: torch.dtype) -> None:
    p, g, m = (t.reshape(-1) for t in torch.meshgrid(SPECIAL, SPECIAL, SPECIAL, indexing="ij"))
    lists = step_lists([p.to(dtype)], [g.to(dtype)], lock_in, amsgrad)
    lists["exp_avg"] = [m.clone()]
    lists["exp_avg_sq"][0] = torch.copysign(m, lists["exp_avg_sq"][0])
    if amsgrad:
        lists["max_exp_avg_sq"][0] = p.abs()
    assert_steps_agree(backend, lists, lock_in)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(backend: str, dtype: torch.dtype) -> None:
    # p * decay is the result where the moments stay zero: every 16-bit value, scaled to ties, carries and overflow
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    zero = torch.zeros(every.shape)
    lists = {"params": [every], "grads": [zero], "exp_avg": [zero], "exp_avg_sq": [zero]}
    lists |= {"max_exp_avg_sq": [], "locks": []}
    for decay in (1.0, 0.5, 1 + 2**-8, 1 - 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 2**-7, 0.3, 2.0):
        assert_steps_agree(backend, lists, "none", lr=1.0, weight_decay=1 - decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_locked_nan_keeps_its_payload(backend: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    param = every.view(dtype).clone()
    lists = step_lists([param], [gradient(param.shape)], "static", False)
    lists["locks"] = [torch.full(param.shape, -1, dtype=torch.int8)]
    assert torch.equal(step(lists, backend, "static")["params"][0].view(torch.int16), every)


def layouts() -> dict[str, Tensor]:
    """Return views of shape [2, 3, 4, 5] with different strides."""
    shape = (2, 3, 4, 5)
    return {
        "contiguous": torch.randn(shape),
        "channels last": torch.randn(shape).to(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0),
        "sliced": torch.randn(4, 3, 4, 10)[::2, :, :, 1::2],
        "expanded": torch.randn(2, 3, 4, 1).expand(shape),
    }


@pytest.mark.parametrize("param_layout", ["contiguous", "channels last", "transposed", "sliced"])
@pytest.mark.parametrize("grad_layout", layouts())
@pytest.mark.parametrize("state_layout", ["like the parameter", "contiguous"])
@pytest.mark.parametrize("lock_in", ["importance", "static"])
def test_step_of_any_strides(
    backend: str, param_layout: str, grad_layout: str, state_layout: str, lock_in: str
) -> None:
    param, grad = layouts()[param_layout], layouts()[grad_layout]
    lists = step_lists([param], [grad], lock_in, True)
    if state_layout == "contiguous":
        lists |= {name: [t.contiguous() for t in lists[name]] for name in ("exp_avg", "max_exp_avg_sq", "locks")}
    assert_steps_agree(backend, lists, lock_in)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_views_at_any_alignment(backend: str, offset: int) -> None:
    storage, grad = torch.randn(20_000), gradient((20_000,))
    here = slice(offset, offset + 9_000)
    lists = step_lists([storage[here]], [grad[3 - offset :][:9_000]], "importance", True)
    expected = step(lists, "reference", "importance")
    around = storage.clone()
    mine = {**clones(lists), "params": [around[here]]}
    ops.sweep_(**step_arguments(mine, "importance"), backend=backend)
    assert_same(mine, {name: expected[name] for name in mine})
    around[here] = storage[here]
    assert torch.equal(around, storage)


def test_the_neighbours_of_a_view_stay(backend: str) -> None:
    storage = torch.full((40, 50), math.nan)
    view = storage[5:35:2, 7:47:3].t()
    view.copy_(torch.randn(view.shape))
    before = storage.clone()
    lists = step_lists([view], [torch.randn(view.shape)], "importance", False)
    locked = lock.is_locked(lists["locks"][0])
    ops.sweep_(**step_arguments(lists, "importance"), backend=backend)
    moved = storage.view(torch.int32) != before.view(torch.int32)
    assert torch.equal(moved[5:35:2, 7:47:3].t(), ~locked)
    assert moved.sum() == (~locked).sum()


@pytest.mark.parametrize("lock_in", ["importance", "exp_avg_sq", "static"])
def test_groups_of_different_settings_in_one_call(backend: str, lock_in: str) -> None:
    params, grads = [torch.randn(size) for size in SIZES], [gradient((size,)) for size in SIZES]
    for grad in grads:
        grad[:1] = math.inf
        grad[1:2] = torch.copysign(torch.tensor(math.nan), torch.tensor(-1.0))  # its sign is no lock
    lists = step_lists(params, grads, lock_in, True)
    lockable = [i % 3 != 1 for i in range(len(SIZES))]
    lists["max_exp_avg_sq"] = [m if i % 2 else None for i, m in enumerate(lists["max_exp_avg_sq"])]
    lists["locks"] = [held if can else None for held, can in zip(lists["locks"], lockable, strict=False)]
    rows = [i % 4 for i in range(len(SIZES))]
    groups = ({"betas": (0.5, 0.9)}, {"lr": 1.0, "maximize": True}, {"weight_decay": 0.0}, {"importance_beta": 0.3})
    scalars = [step_arguments(lists, lock_in, **group, step=i + 1)["scalars"] for i, group in enumerate(groups)]
    changes = {"lockable": lockable, "rows": rows, "scalars": torch.cat(scalars)}
    assert_steps_agree(backend, lists, lock_in, changes)


@pytest.mark.parametrize("grad_dtype", HALVES)
@pytest.mark.parametrize("lock_in", ["importance", "exp_avg_sq"])
def test_gradient_factor(backend: str, lock_in: str, grad_dtype: torch.dtype) -> None:
    params = [torch.randn(size) for size in SIZES[:-1]]
    grads = [gradient((size,), grad_dtype) for size in SIZES[:-1]]
    lists = step_lists(params, grads, lock_in, False)
    plain, scaled = (step(lists, backend, lock_in, {"grad_factor": f}) for f in (None, torch.tensor(0.3)))
    assert differing(plain["exp_avg"][-1], scaled["exp_avg"][-1]) > 1900  # of 2049
    assert_same(scaled, step(lists, "reference", lock_in, {"grad_factor": torch.tensor(0.3)}))
    assert_steps_agree(backend, lists, lock_in, {"grad_factor": torch.tensor(2.0**-16)}, maximize=True)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("all_lockable", [True, False])
@pytest.mark.parametrize("lock_in", ["importance", "exp_avg_sq"])
def test_under_a_factor_that_is_not_finite_the_entries_of_a_tensor_are_counted_and_no_more(
    backend: str, lock_in: str, all_lockable: bool, factor: float
) -> None:
    sizes = (1, 5, 4096, 4097, 8192, 8195)  # tiles and chunks that end with their tensor, and that do not
    params, grads = ([torch.randn(size) for size in sizes] for _ in range(2))
    lists = step_lists(params, grads, lock_in, False)
    changes: dict[str, Any] = {"grad_factor": torch.tensor(factor)}
    if not all_lockable:
        changes["lockable"] = [i != 1 for i in range(len(sizes))]
        lists["locks"] = [held if i != 1 else None for i, held in enumerate(lists["locks"])]
    counted = step(lists, backend, lock_in, changes)["nonfinite"][0].tolist()
    assert counted == [0 if i == 1 and not all_lockable else size for i, size in enumerate(sizes)]


@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
def test_found_inf_changes_nothing_at_all(backend: str, lock_in: str) -> None:
    params, grads = [torch.randn(size) for size in SIZES], [torch.full((size,), math.nan) for size in SIZES]
    lists = step_lists(params, grads, lock_in, True)
    skipped = step(lists, backend, lock_in, {"found_inf": torch.tensor(1.0)})
    assert_same(lists, {name: skipped[name] for name in lists})
    assert not skipped["nonfinite"][0].any()
    assert_steps_agree(backend, lists, lock_in, {"found_inf": torch.tensor(0.0)})


def test_empty_lists(backend: str) -> None:
    none: list[Tensor] = []
    scalars, counts = torch.empty(0, width_of(ADAMW), dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    ops.sweep_("adamw", none, none, none, none, counts, scalars, [], "importance", [], False, None, None, backend)
    ops.gather_("adamw", none, none, none, none, scalars, [], backend)
    ops.gradient_sums_(none, none, none, backend)
    ranges = torch.tensor([[math.inf, -math.inf]] * 2)
    ops.importance_(none, none, ranges, counts, torch.empty(0, 2, dtype=torch.float64), [], True, None, None, backend)
    assert ranges.tolist() == [[math.inf, -math.inf]] * 2
    assert not ops.score_histogram(
        none, [], None, [], torch.zeros(2, 2, dtype=torch.int64), 19, 4096, None, backend
    ).any()
    assert ops.lock_(none, [], None, [], torch.zeros(2), None, backend).shape == (0, 3)


# Importance and threshold ---------------------------------------------------------------


SHAPES = [(size,) for size in SIZES] + [(), (300, 301)]
LAYERS = [i % 3 for i in range(len(SHAPES))]


@pytest.mark.parametrize("keep_finite", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_importance_and_ranges(backend: str, dtype: torch.dtype, keep_finite: bool) -> None:
    importances = [signed(shape) for shape in SHAPES]
    grads = [None if i % 4 == 2 else gradient(shape, dtype) for i, shape in enumerate(SHAPES)]
    betas = torch.tensor([(beta, 1 - beta) for beta in torch.rand(len(SHAPES)).tolist()], dtype=torch.float64)
    results = []
    for name in (backend, "reference"):
        mine = [s.clone() for s in importances]
        nonfinite = torch.zeros(len(SHAPES), dtype=torch.int64)
        # a fourth layer without entries, and a second that has zeros elsewhere
        ranges = torch.tensor([[math.inf, -math.inf]]).repeat(4, 1)
        ranges[1] = 0.0
        ops.importance_(mine, grads, ranges, nonfinite, betas, LAYERS, keep_finite, None, None, name)
        results.append({"importances": mine, "ranges": [ranges], "nonfinite": [nonfinite]})
    assert_same(*results)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("shift", "bins"), [(19, 4096), (9, 1024), (0, 512)])
def test_histograms(backend: str, normalize: bool, shift: int, bins: int) -> None:
    importances = [signed(shape) for shape in SHAPES]
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [2.0, 2.0]]) if normalize else None
    digits = 31 - shift - (bins.bit_length() - 1)
    selection = torch.tensor([[0x3F000000 >> (31 - digits), 5], [0, 100]])
    budgets = [i % 2 for i in range(len(SHAPES))]
    arguments = (importances, LAYERS, ranges, budgets, selection, shift, bins, None)
    ours, theirs = (ops.score_histogram(*arguments, name).sum(0) for name in (backend, "reference"))
    assert torch.equal(ours, theirs)
    assert ours.sum() > 0


@pytest.mark.parametrize("parts", [1, 3])
def test_the_digit_that_has_a_rank(backend: str, parts: int) -> None:
    counts = torch.randint(0, 3, (parts, 6, 1024))
    counts[0, 1, 700] = 1 << 33
    counts[:, 5] = 0
    ranks = torch.tensor([1, 1 << 31, 0, 10**12, 77, 3])
    results = []
    for name in (backend, "reference"):
        selection = torch.stack([torch.tensor([0, 0, 0, 0, 5, 0]), ranks], 1)
        thresholds = ops.select_digit_(counts, selection, 9, name)
        results.append({"selection": [selection], "thresholds": [thresholds]})
    assert_same(*results)
    assert results[0]["thresholds"][0].tolist()[2:4] == [math.inf, 0.0]
    assert results[0]["selection"][0][1, 0] == 700


@pytest.mark.parametrize("normalize", [True, False])
def test_locks_and_counts(backend: str, normalize: bool) -> None:
    importances = [signed(shape) for shape in SHAPES]
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [2.0, 2.0]]) if normalize else None
    budgets = [i % 3 for i in range(len(SHAPES))]
    results = []
    for name in (backend, "reference"):
        mine = [s.clone() for s in importances]
        counts = ops.lock_(mine, LAYERS, ranges, budgets, torch.tensor([1e-3, 0.0, math.inf]), None, name)
        results.append({"importances": mine, "counts": [counts]})
    assert_same(*results)
    assert results[0]["counts"][0].sum(0).min() > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_sums(backend: str, dtype: torch.dtype) -> None:
    lists = {"sums": [torch.randn(s) for s in SIZES], "square_sums": [torch.rand(s) for s in SIZES]}
    grads = [gradient((size,), dtype) for size in SIZES]
    results = [clones(lists), clones(lists)]
    for result, name in zip(results, (backend, "reference"), strict=True):
        ops.gradient_sums_(**result, grads=grads, backend=name)
    assert_same(*results)
    squares = clones(lists)["square_sums"]
    ops.gradient_sums_([], squares, grads, backend)
    assert_same({"squares alone": squares}, {"squares alone": results[1]["square_sums"]})


def test_the_comparison_sees_one_ulp() -> None:
    values = torch.randn(100)
    planted = values.clone()
    planted.view(torch.int32)[37] += 1
    assert differing(values, planted) == 1
    with pytest.raises(AssertionError, match=r"params\[0\]: 1 of 100"):
        assert_same({"params": [values]}, {"params": [planted]})
    assert differing(torch.tensor([0.0, math.nan]), torch.tensor([-0.0, -math.nan])) == 1


@pytest.mark.parametrize("lock_in", ["importance", "exp_avg_sq"])
def test_advanced_may_be_known_to_the_device_alone(backend: str, lock_in: str) -> None:
    for advanced in (True, False):
        results = []
        for flag in (advanced, torch.tensor(float(advanced))):
            torch.manual_seed(0)
            lists = step_lists([torch.randn(9000)], [torch.randn(9000)], lock_in, amsgrad=False)
            lists["grads"][0][7] = torch.inf
            call = step_arguments(lists, lock_in)
            tensors = tensors_of(lists)
            sweep = ops.prepared_sweep(ADAMW, tensors, lock_in, [True], backend)
            sweep.step_(tensors, call["nonfinite"], call["scalars"], [0], flag, None, None, False)
            results.append({**lists, "nonfinite": [call["nonfinite"]]})
        assert_same(*results)
        assert results[0]["nonfinite"][0].item() == (not advanced)
