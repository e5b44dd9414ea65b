"""The operations `importance_`, Eq. 5 and 7 in one pass, and `gradient_sums_`; every backend.

- Computed by hand, ranges over the whole layer, across tensors.
- float64 to one rounding of float32; locks stay; what is not finite is kept out and counted.
- torch's `opcheck` accepts the registration.
"""

import math
from typing import Any

import pytest
import torch
from conftest import skip_unless_it_takes
from torch import Tensor

from epi_kernels import lock, ops
from epi_kernels.importance import fisher


def run(backend: str, importances: list[Tensor], grads: list[Tensor | None], **changes: Any) -> tuple[Tensor, Tensor]:
    """Return (ranges, nonfinite); one layer for all unless told otherwise, beta 0.75."""
    call = {
        "importances": importances,
        "grads": grads,
        "ranges": torch.tensor([[math.inf, -math.inf]]).repeat(max(changes.get("layers", [0])) + 1, 1),
        "nonfinite": torch.zeros(len(importances), dtype=torch.int64),
        "betas": torch.tensor([[0.75, 0.25]] * len(importances), dtype=torch.float64),
        "layers": [0] * len(importances),
        "keep_finite": True,
        "grad_factor": None,
        "due": None,
        "backend": backend,
        **changes,
    }
    ops.importance_(**call)
    return call["ranges"], call["nonfinite"]


def test_by_hand_over_two_layers_with_and_without_gradient(backend: str) -> None:
    importances = [torch.tensor([4.0, -8.0]), torch.tensor([[1.0], [100.0]]), torch.tensor(3.0), torch.empty(0, 2)]
    grads = [torch.tensor([2.0, 4.0]), None, torch.tensor(6.0), torch.empty(0, 2)]
    ranges, nonfinite = run(backend, importances, grads, layers=[0, 1, 0, 2])
    assert importances[0].tolist() == [4.0, -10.0]  # 3/4 * 4 + 1/4 * 4, and 3/4 * 8 + 1/4 * 16, still locked
    assert importances[1].flatten().tolist() == [1.0, 100.0]
    assert importances[2].item() == 11.25
    assert ranges.tolist() == [[4.0, 11.25], [1.0, 100.0], [math.inf, -math.inf]]
    assert nonfinite.tolist() == [0, 0, 0, 0]


def test_without_ranges_the_rest_is_the_same(backend: str) -> None:
    before = [torch.randn(3, 700), torch.randn(6, 700).t(), torch.empty(0), torch.randn(())]
    grads = [torch.randn(one.shape) for one in before]
    grads[0][1, 5] = math.inf
    betas, results = torch.tensor([[0.75, 0.25]] * 4, dtype=torch.float64), []
    for ranges in (torch.tensor([[math.inf, -math.inf]] * 3), None):
        own = [one.clone() for one in before]
        nonfinite = torch.zeros(4, dtype=torch.int64)
        prepared = ops.prepared_importance(own, grads, betas, [0, 1, 0, 2], 3, True, own[0].device, backend)
        prepared.advance_(own, grads, ranges, nonfinite, None, None, (), None)
        results.append((*own, nonfinite))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(results[1][0], before[0])
    assert results[1][-1].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_float64_to_the_roundings_of_float32(backend: str, dtype: torch.dtype) -> None:
    skip_unless_it_takes(backend, dtype)
    before = torch.rand(10_007)
    grad = (torch.randn(10_007) * 10 ** torch.empty(10_007).uniform_(-3, 2)).to(dtype)
    importance = before.clone()
    run(backend, [importance], [grad])
    exact = 0.75 * before.double() + 0.25 * grad.double() ** 2
    # two products, two sums: at most three roundings of 2^-24 reach the result
    torch.testing.assert_close(importance.double(), exact, rtol=3 * 2**-24, atol=0)
    assert not torch.allclose(before.double(), exact, rtol=3 * 2**-24, atol=0)


def test_beta_zero_is_the_last_square(backend: str) -> None:
    importance = torch.tensor([7.0, math.ulp(0.0)])
    run(backend, [importance], [torch.tensor([3.0, 0.5])], betas=torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert importance.tolist() == [9.0, 0.25]


@pytest.mark.parametrize("keep_finite", [True, False])
def test_squares_that_are_not_finite(backend: str, keep_finite: bool) -> None:
    importance = lock.with_lock(torch.full((6,), 4.0), torch.arange(6) % 2 == 0)
    grad = torch.tensor([math.nan, math.inf, -math.inf, 1e20, 2.0, 4.0])
    ranges, nonfinite = run(backend, [importance], [grad], keep_finite=keep_finite)
    assert nonfinite.tolist() == [4]
    assert lock.is_locked(importance).tolist() == [True, False] * 3
    assert lock.magnitude(importance)[4:].tolist() == [4.0, 7.0]
    if keep_finite:
        assert lock.magnitude(importance)[:4].tolist() == [4.0] * 4
    else:
        assert not importance[:3].isfinite().any()
    assert ranges.tolist() == [[4.0, 7.0]]


def test_subnormal_counts_as_zero_in_the_range(backend: str) -> None:
    importances = [torch.tensor([1e-40, 2.0]), torch.tensor([1e-41])]
    ranges, _ = run(backend, importances, [None, None], layers=[0, 1])
    assert ranges.tolist() == [[0.0, 2.0], [0.0, 0.0]]


def test_a_layer_of_nothing_finite_has_no_range(backend: str) -> None:
    importances = [torch.tensor([math.inf, math.nan, -math.inf]), torch.tensor([1.0])]
    ranges, _ = run(backend, importances, [None, None], layers=[0, 1])
    assert ranges.tolist() == [[math.inf, -math.inf], [1.0, 1.0]]


def test_ranges_are_extended(backend: str) -> None:
    ranges, _ = run(backend, [torch.tensor([2.0, 3.0])], [None], ranges=torch.tensor([[0.0, 2.5]]))
    assert ranges.tolist() == [[0.0, 3.0]]


def test_opcheck(backend: str) -> None:
    call = {
        "importances": [torch.rand(4), torch.rand(2, 3)],
        "grads": [torch.randn(4), None],
        "ranges": torch.tensor([[math.inf, -math.inf]] * 2),
        "nonfinite": torch.zeros(2, dtype=torch.int64),
        "betas": torch.tensor([[0.9, 0.1]] * 2, dtype=torch.float64),
        "layers": [0, 1],
        "keep_finite": True,
        "grad_factor": None,
        "due": None,
        "backend": backend,
    }
    torch.library.opcheck(torch.ops.epi_kernels.importance_.default, (), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradient_sums_by_hand(backend: str, dtype: torch.dtype) -> None:
    skip_unless_it_takes(backend, dtype)
    sums, square_sums = [torch.tensor([1.0, -2.0]), torch.empty(0)], [torch.tensor([0.5, 0.0]), torch.empty(0)]
    for _ in range(2):
        grads = [torch.tensor([3.0, -0.25], dtype=dtype), torch.empty(0, dtype=dtype)]
        ops.gradient_sums_(sums, square_sums, grads, backend)
    assert sums[0].tolist() == [7.0, -2.5]
    assert square_sums[0].tolist() == [18.5, 0.125]


def test_squares_alone_are_summed_where_there_are_no_sums(backend: str) -> None:
    square_sums = [torch.tensor([0.5, 0.0])]
    ops.gradient_sums_([], square_sums, [torch.tensor([3.0, -0.25])], backend)
    assert square_sums[0].tolist() == [9.5, 0.0625]


@pytest.mark.parametrize("missing", ["square_sums", "grads", "some sums"])
def test_gradient_sums_without_a_list_that_it_needs_is_refused(backend: str, missing: str) -> None:
    lists = {name: [torch.ones(2), torch.ones(2)] for name in ("sums", "square_sums", "grads")}
    lists = {name: tensors if name != missing else [] for name, tensors in lists.items()}
    if missing == "some sums":
        lists["sums"].pop()
    with pytest.raises(ValueError, match=r"(grads|sums) has [01] tensors but square_sums has 2|grads has 2 .* has 0"):
        ops.gradient_sums_(**lists, backend=backend)
    assert all(torch.equal(tensor, torch.ones(2)) for tensors in lists.values() for tensor in tensors)


def test_importance_without_a_list_of_gradients_is_refused(backend: str) -> None:
    importances = [torch.ones(2)]
    with pytest.raises(ValueError, match="grads has 0 tensors but importances has 1"):
        run(backend, importances, [])
    assert torch.equal(importances[0], torch.ones(2))


def test_gradient_sums_opcheck(backend: str) -> None:
    lists = [[torch.rand(4), torch.rand(2, 3)] for _ in range(3)]
    torch.library.opcheck(torch.ops.epi_kernels.gradient_sums_.default, (*lists, backend))


def test_a_factor_multiplies_the_gradient_first_as_in_the_sweep(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(5000, generator=generator)
    ours, theirs = torch.zeros(5000), torch.zeros(5000)
    run(backend, [ours], [grad], grad_factor=torch.tensor(1.0 / 3.0))
    run(backend, [theirs], [grad * torch.tensor(1.0 / 3.0)])
    assert torch.equal(ours, theirs)
    assert ours.count_nonzero() > 4990
    overflowing, counts = torch.ones(2), run(backend, [torch.ones(2)], [torch.full((2,), 1e19)])[1]
    assert counts.tolist() == [0]
    assert run(backend, [overflowing], [torch.full((2,), 1e19)], grad_factor=torch.tensor(10.0))[1].tolist() == [2]
    assert overflowing.tolist() == [1.0, 1.0]


def test_nothing_changes_where_it_is_not_due(backend: str) -> None:
    importances = [torch.tensor([1.0, -2.0]), torch.tensor(3.0)]
    grads = [torch.tensor([math.nan, 1.0]), None]
    ranges, counts = run(backend, importances, grads, due=torch.tensor(0.0))
    assert [s.tolist() for s in importances] == [[1.0, -2.0], 3.0]
    assert (ranges.tolist(), counts.tolist()) == ([[math.inf, -math.inf]], [0, 0])
    ranges, counts = run(backend, importances, grads, due=torch.tensor(1.0))
    assert (importances[0].tolist(), counts.tolist()) == ([1.0, -1.75], [1, 0])
    assert ranges.tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_under_a_factor_that_is_not_finite_the_entries_of_a_tensor_are_counted_and_no_more(
    backend: str, factor: float
) -> None:
    sizes = (1, 5, 4096, 4097, 8192, 8195, 3)  # tiles and chunks that end with their tensor, and that do not
    grads: list[Tensor | None] = [torch.randn(size) for size in sizes]
    grads[-1] = None
    importances = [torch.rand(size) for size in sizes]
    before = [importance.clone() for importance in importances]
    counts = run(backend, importances, grads, grad_factor=torch.tensor(factor))[1]
    assert counts.tolist() == [*sizes[:-1], 0]
    assert all(map(torch.equal, importances, before))


@pytest.mark.parametrize(("microbatch", "entries"), [(1, 0), (2, 10)])
@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_fisher_keeps_a_sum_of_gradients_only_for_the_correction_of_micro_batches(
    monkeypatch: pytest.MonkeyPatch, method: Any, microbatch: int, entries: int
) -> None:
    kept: list[int] = []
    gradient_sums_ = ops.gradient_sums_

    def spy(sums: list[Tensor], square_sums: list[Tensor], *others: Any) -> None:
        kept.append(sum(total.numel() for total in sums))
        gradient_sums_(sums, square_sums, *others)

    monkeypatch.setattr(ops, "gradient_sums_", spy)
    model, batches = torch.nn.Linear(4, 2), [torch.randn(16, 4)]
    fisher(
        model,
        batches,
        lambda model, batch: model(batch).square().mean(),
        method=method,
        microbatch=microbatch,
        progress=False,
    )
    gradients = 16 // microbatch
    assert sum(kept) == gradients * entries
    assert kept


def test_a_square_of_a_gradient_that_some_hardware_flushes_adds_nothing(backend: str) -> None:
    below, above = 2.0**-63, 2.0**-62  # squares of 2^-126, the smallest normal number, and of 2^-124
    grad = torch.tensor([below, above, -below])
    sums, squares = [torch.zeros(3)], [torch.zeros(3)]
    ops.gradient_sums_(sums, squares, [grad], backend)
    assert torch.equal(sums[0], grad)
    assert squares[0].tolist() == [0.0, above * above, 0.0]
