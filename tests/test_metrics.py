"""Claims about `epi_kernels.metrics`.

Every value equals a case computed by hand. Jaccard and flip rate are symmetric, lie in [0, 1] and are 1 and 0 for equal
masks, empty ones included; the Hamming distance counts differing entries; a mapping counts as one long mask. Wrong
names, shapes, dtypes and lengths are errors that name what is wrong.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from epi_kernels.metrics import (
    average_performance,
    backward_transfer,
    flip_rate,
    forgetting_ratio,
    mask_hamming,
    mask_jaccard,
    overall_performance,
)

MEASURES = (mask_jaccard, mask_hamming, flip_rate)
PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40)


def bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)


@pytest.mark.parametrize(
    ("initial", "after", "expected"),
    [(0.8, 0.6, 25.0), (50, 50, 0.0), (0.5, 0.0, 100.0), (0.5, 0.75, -50.0), ([0.5, 0.4], [0.25, 0.5], [50.0, -25.0])],
)
def test_forgetting_ratio_by_hand(initial, after, expected) -> None:
    assert forgetting_ratio(initial, after) == pytest.approx(expected)


@pytest.mark.parametrize("initial", [0.0, -1.0, float("nan")])
def test_nothing_to_forget_is_an_error(initial: float) -> None:
    with pytest.raises(ValueError, match="needs one above 0"):
        forgetting_ratio(initial, 0.5)
    with pytest.raises(ValueError, match="needs one above 0"):
        forgetting_ratio([0.5, initial], [0.5, 0.5])


@pytest.mark.parametrize(("initial", "after"), [([0.5], [0.5, 0.4]), (0.5, [0.5]), ([0.5], 0.5)])
def test_forgetting_ratio_needs_equal_lengths(initial, after) -> None:
    with pytest.raises(ValueError, match="as many numbers"):
        forgetting_ratio(initial, after)


@pytest.mark.parametrize(
    ("a", "b", "jaccard", "hamming", "flips"),
    [
        ("1100", "1100", 1.0, 0, 0.0),
        ("1100", "0011", 0.0, 4, 1.0),
        ("1110", "0111", 1 / 2, 2, 1 / 3),
        ("1000", "1111", 1 / 4, 3, 3 / 5),
        ("0000", "0100", 0.0, 1, 1.0),
        ("0000", "0000", 1.0, 0, 0.0),
        ("", "", 1.0, 0, 0.0),
    ],
)
def test_masks_by_hand(a: str, b: str, jaccard: float, hamming: int, flips: float) -> None:
    measured = [measure(bits(a), bits(b)) for measure in MEASURES]
    assert measured == pytest.approx([jaccard, hamming, flips])


@given(PAIRS, st.integers(0, 40))
def test_properties_of_masks(pairs: list[tuple[bool, bool]], cut: int) -> None:
    a, b = (torch.tensor([pair[side] for pair in pairs], dtype=torch.bool) for side in (0, 1))
    assert 0 <= mask_jaccard(a, b) <= 1
    assert 0 <= flip_rate(a, b) <= 1
    assert mask_hamming(a, b) == sum(left != right for left, right in pairs)
    assert (mask_jaccard(a, b) == 1) == (flip_rate(a, b) == 0) == (mask_hamming(a, b) == 0) == torch.equal(a, b)
    for measure in MEASURES:
        assert measure(a, b) == measure(b, a)
        # reordering the names must not pair the wrong tensors
        whole = measure({"x": a[:cut], "y": a[cut:]}, {"y": b[cut:], "x": b[:cut]})
        assert whole == measure(a, b)


@pytest.mark.parametrize("measure", MEASURES)
def test_masks_that_do_not_match_are_errors(measure) -> None:
    with pytest.raises(ValueError, match=r"\['bias'\]"):
        measure({"weight": bits("1"), "bias": bits("1")}, {"weight": bits("1")})
    with pytest.raises(ValueError, match=r"'weight' has shape \(2,\) in one and \(1,\)"):
        measure({"weight": bits("11")}, {"weight": bits("1")})
    with pytest.raises(ValueError, match=r"'weight' is torch.uint8"):
        measure({"weight": bits("1")}, {"weight": torch.ones(1, dtype=torch.uint8)})


def test_measures_of_a_sequence_of_tasks_by_hand() -> None:
    results = [[80.0, 10.0, 0.0], [60.0, 90.0, 5.0], [50.0, 95.0, 70.0]]
    assert overall_performance(results) == pytest.approx((50 + 95 + 70) / 3)
    assert backward_transfer(results) == pytest.approx((-30 + 5) / 3)
    assert average_performance(results) == pytest.approx((80 + 90 + 70) / 3)
    # of one task nothing can be forgotten
    assert (overall_performance([[4.0]]), backward_transfer([[4.0]]), average_performance([[4.0]])) == (4.0, 0.0, 4.0)


@pytest.mark.parametrize("measure", [overall_performance, backward_transfer, average_performance])
@pytest.mark.parametrize("results", [[], [[1.0, 2.0]], [[1.0, 2.0], [1.0]]])
def test_results_that_are_no_square_are_errors(measure, results) -> None:
    with pytest.raises(ValueError, match="pass a square"):
        measure(results)
