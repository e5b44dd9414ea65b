"""The operations `score_histogram` and `lock_`, every backend, and `find_threshold` on top of them.

- exact: the k-th largest score, to the bit, on any distribution, ties and zeros included, for several budgets at once.
- histogram: at most the exact threshold, above it divided by 1 + 1/16.
- Histograms add over parts: the threshold of shards is the threshold of the whole.
- No working memory of the size of the scores.
- torch's `opcheck` accepts the registrations.
"""

import math
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from epi_kernels import lock, ops
from epi_kernels.ops.threshold import reference


def threshold(
    backend: str, tensors: list[Tensor], ranks: list[int], budgets: list[int] | None = None, *, exact: bool
) -> Tensor:
    """Return the threshold of raw scores."""
    budgets = budgets or [0] * len(tensors)

    def histogram(selection: Tensor, shift: int, bins: int) -> Tensor:
        return ops.score_histogram(tensors, [0] * len(tensors), None, budgets, selection, shift, bins, None, backend)

    return ops.find_threshold(histogram, ranks, exact=exact, backend=backend)


DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "squared normal": lambda: torch.randn(20_011).square(),
    "32 decades": lambda: 10 ** torch.empty(20_011).uniform_(-32, 0),
    "neighbouring floats": lambda: (torch.arange(20_011) + 0x3F000000).int().view(torch.float32),
    "nearly all zero": lambda: torch.where(torch.rand(20_011) < 0.99, 0.0, torch.rand(20_011)),
    "few values": lambda: torch.randint(0, 5, (20_011,)).float() / 4,
    "one value": lambda: torch.full((20_011,), 0.3),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [1, 2, 200, 10_005, 20_010, 20_011])
def test_exact_is_the_kth_largest(backend: str, name: str, k: int) -> None:
    scores = DISTRIBUTIONS[name]()
    expected = scores.sort(descending=True).values[k - 1]
    parts = list(scores.split([7000, 0, 13_011]))
    assert threshold(backend, [parts[0], parts[1], parts[2].view(-1, 1)], [k], exact=True).item() == expected


@hypothesis.given(st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=1), st.data())
def test_exact_on_any_scores(backend: str, scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    assert threshold(backend, [torch.tensor(scores)], [k], exact=True).item() == sorted(scores, reverse=True)[k - 1]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("k", [1, 200, 10_005])
def test_histogram_keeps_its_bound(backend: str, name: str, k: int) -> None:
    scores = DISTRIBUTIONS[name]()
    exact = threshold(backend, [scores], [k], exact=True).item()
    approximate = threshold(backend, [scores], [k], exact=False).item()
    assert approximate <= exact
    assert exact == 0 or approximate > exact / (1 + 1 / 16)


def test_histogram_is_not_exact(backend: str) -> None:
    scores = DISTRIBUTIONS["squared normal"]()
    exact, approximate = (threshold(backend, [scores], [200], exact=exact).item() for exact in (True, False))
    assert approximate != exact


def test_budgets_are_found_at_once_and_apart(backend: str) -> None:
    first, second, third = torch.rand(1000), torch.rand(999) * 1e-9, torch.rand(50)
    found = threshold(backend, [first, second, third], [30, 0, 77], [0, 1, 2], exact=True)
    assert found.tolist() == [first.sort(descending=True).values[29].item(), math.inf, 0.0]  # k = 0; k > entries


def test_tau_of_fewer_positive_scores_than_k_is_zero(backend: str) -> None:
    assert threshold(backend, [torch.tensor([0.0, 0.0, 0.5])], [2], exact=True).item() == 0.0


def test_histograms_of_parts_add_up_to_that_of_the_whole(backend: str) -> None:
    scores = torch.randn(5000).square()
    arguments = ([0], None, [0], torch.tensor([[0, 1]]), 19, 4096, None, backend)
    whole = ops.score_histogram([scores], *arguments).sum(0)
    parts = sum(ops.score_histogram([part], *arguments).sum(0) for part in scores.split(777))
    assert torch.equal(whole, parts)
    assert whole.sum() == 5000


def test_the_working_memory_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = reference.score

    def watched(importance: Tensor, layer_range: Tensor | None) -> Tensor:
        nonlocal largest
        largest = max(largest, importance.numel())
        return original(importance, layer_range)

    monkeypatch.setattr(reference, "score", watched)
    model = torch.rand(3000, 2000)
    found = threshold("reference", [model], [60_000], exact=True).item()
    assert found == model.flatten().kthvalue(6_000_000 - 59_999).values
    assert 0 < largest <= reference.CHUNK < model.numel()


def test_scores_are_normalised_by_layer_with_ieee_operations(backend: str) -> None:
    importances = [torch.tensor([3.0, 5.0, 9.0]), torch.tensor([7.0, -7.0])]
    ranges = torch.tensor([[3.0, 9.0], [7.0, 7.0]])
    counts = ops.lock_(importances, [0, 1], ranges, [0, 1], torch.tensor([2.0 / 6.0, 0.0]), None, backend)
    assert importances[0].tolist() == [3.0, -5.0, -9.0]
    assert importances[1].tolist() == [7.0, 7.0]  # constant layer: every score is 0
    assert counts.tolist() == [[2, 2, 0], [0, 0, 1]]


def test_an_importance_next_to_the_minimum_scores_zero_whether_subnormals_are_flushed_or_not(backend: str) -> None:
    # the range is a normal number and the first distance from the minimum is none: as hardware sees it that flushes
    smallest = torch.finfo(torch.float32).tiny
    importances = [torch.tensor([4.0, 4.5, 5.0]) * smallest]
    counts = ops.lock_(importances, [0], importances[0][[0, 2]].view(1, 2), [0], torch.tensor([0.0]), None, backend)
    assert lock.is_locked(importances[0]).tolist() == [False, False, True]
    assert counts.tolist() == [[1, 1, 0]]


def test_locks_are_set_and_released_on_any_strides(backend: str) -> None:
    storage = torch.zeros(4, 6)
    view = storage[:, ::2].t()
    view.copy_(torch.arange(12.0).view(3, 4))
    ops.lock_([view], [0], None, [0], torch.tensor([10.0]), None, backend)
    assert lock.is_locked(view).nonzero().tolist() == [[2, 2], [2, 3]]
    counts = ops.lock_([view], [0], None, [0], torch.tensor([11.0]), None, backend)
    assert counts.tolist() == [[1, 0, 1]]
    assert not storage[:, 1::2].any()
    assert torch.equal(lock.magnitude(view), torch.arange(12.0).view(3, 4))


def test_opcheck(backend: str) -> None:
    importances = [torch.rand(4), torch.rand(2, 3)]
    ranges = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    torch.library.opcheck(
        torch.ops.epi_kernels.score_histogram.default,
        (importances, [0, 1], ranges, [0, 0], torch.tensor([[0, 1]]), 19, 4096, None, backend),
    )
    counts = torch.ones(2, 1, 4096, dtype=torch.int64)
    counts[:, :, 2000:] = 0  # above them is the infinite
    torch.library.opcheck(torch.ops.epi_kernels.select_digit_.default, (counts, torch.tensor([[0, 7]]), 19, backend))
    torch.library.opcheck(
        torch.ops.epi_kernels.lock_.default,
        (importances, [0, 1], ranges, [0, 0], torch.tensor([0.5]), None, backend),
    )


def test_nothing_is_counted_and_no_lock_moves_where_it_is_not_due(backend: str) -> None:
    importances = [torch.tensor([1.0, -2.0, 4.0])]
    due = torch.tensor(0.0)
    selection = torch.tensor([[0, 1]])
    assert not ops.score_histogram(importances, [0], None, [0], selection, 19, 4096, due, backend).any()
    assert not ops.lock_(importances, [0], None, [0], torch.tensor([3.0]), due, backend).any()
    assert importances[0].tolist() == [1.0, -2.0, 4.0]
    due += 1.0
    assert ops.score_histogram(importances, [0], None, [0], selection, 19, 4096, due, backend).sum() == 3
    assert ops.lock_(importances, [0], None, [0], torch.tensor([3.0]), due, backend).tolist() == [[1, 1, 1]]
    assert importances[0].tolist() == [1.0, 2.0, -4.0]
