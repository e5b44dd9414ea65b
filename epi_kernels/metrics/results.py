"""How well a sequence of tasks was learned, and how much of it was forgotten."""

from collections.abc import Sequence
from typing import TypeAlias, overload

# row t: the performance on every task after learning task t
Results: TypeAlias = Sequence[Sequence[float]]


@overload
def forgetting_ratio(initial: float, after: float) -> float: ...
@overload
def forgetting_ratio(initial: Sequence[float], after: Sequence[float]) -> list[float]: ...
def forgetting_ratio(initial: float | Sequence[float], after: float | Sequence[float]) -> float | list[float]:
    """Return how much of a task's performance was lost, in percent: negative where it improved.

    ::

        FR = 100 (initial - after) / initial                 Eq. 14

    Args:
        initial: performance right after learning the task, in any unit where more is better; a number, or one per task.
        after: performance once later tasks have been learned, in the same unit; as many numbers.

    Raises:
        ValueError: an initial performance is not above 0 (there is nothing to forget), or the lengths differ.

    >>> forgetting_ratio(0.5, 0.375)
    25.0
    >>> forgetting_ratio([0.5, 0.25], [0.25, 0.5])
    [50.0, -100.0]
    """
    if not isinstance(initial, Sequence) and not isinstance(after, Sequence):
        return _forgetting_ratio(initial, after)
    if not isinstance(initial, Sequence) or not isinstance(after, Sequence) or len(initial) != len(after):
        raise ValueError(f"initial and after must be two numbers or as many numbers each, not {initial} and {after}")
    return [_forgetting_ratio(*pair) for pair in zip(initial, after, strict=True)]


def overall_performance(results: Results) -> float:
    """Return the mean performance on all tasks once all are learned.

    ::

        OP = 1/T sum_i R[T, i]                               PIECE (arXiv 2511.15375) Eq. 26

    Args:
        results: R: row t has the performance on every task after learning task t, in any unit where more is better;
            as many rows as tasks.

    Raises:
        ValueError: there are not as many columns as rows, or there are none.

    >>> overall_performance([[0.5, 0.25], [0.25, 0.75]])
    0.5
    """
    last = _square(results)[-1]
    return sum(last) / len(last)


def backward_transfer(results: Results) -> float:
    """Return how learning later tasks has changed the performance on earlier ones: below 0 is forgetting.

    ::

        BWT = 1/T sum_{i<T} (R[T, i] - R[i, i])              PIECE Eq. 27, which divides by T, and not by T - 1

    Args:
        results: as in `overall_performance`.

    Raises:
        ValueError: as `overall_performance`.

    >>> backward_transfer([[0.5, 0.25], [0.25, 0.75]])
    -0.125
    """
    rows = _square(results)
    return sum(rows[-1][i] - rows[i][i] for i in range(len(rows) - 1)) / len(rows)


def average_performance(results: Results) -> float:
    """Return the mean performance on each task right after learning it: how well the method learns.

    ::

        AP = 1/T sum_i R[i, i]                               PIECE Fig. 7

    Args:
        results: as in `overall_performance`.

    Raises:
        ValueError: as `overall_performance`.

    >>> average_performance([[0.5, 0.25], [0.25, 0.75]])
    0.625
    """
    rows = _square(results)
    return sum(rows[i][i] for i in range(len(rows))) / len(rows)


def _forgetting_ratio(initial: float, after: float) -> float:
    if not initial > 0:
        raise ValueError(f"the initial performance is {initial}; the forgetting ratio needs one above 0")
    return 100.0 * (initial - after) / initial


def _square(results: Results) -> Results:
    if not results or any(len(row) != len(results) for row in results):
        raise ValueError(f"results has rows of {[len(row) for row in results]} for {len(results)} tasks; pass a square")
    return results
