"""The mean of a few paired differences, with its 95% interval by Student's t."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# the 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Interval(NamedTuple):
    """A mean and half of its 95% interval, over `count` values."""

    mean: float
    half: float
    count: int


def quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t, beyond 9 degrees of freedom with an error below 1%."""
    return QUANTILES[degrees - 1] if degrees <= len(QUANTILES) else 1.96 + 2.5 / degrees


def count_that_tells(values: Sequence[float], most: int) -> int:
    """Return how many values would have an interval without 0, if mean and deviation stayed; at most `most`.

    >>> count_that_tells([1.0, 2.0, 3.0], most=100)
    4
    """
    mean, deviation = abs(statistics.fmean(values)), statistics.stdev(values)
    count = len(values)
    while count < most and quantile(count - 1) * deviation / math.sqrt(count) >= mean:
        count += 1
    return count


def interval(values: Sequence[float]) -> Interval:
    """Return the interval of at most 10 values; with one value half of it is infinite, with none the mean is NaN.

    >>> mean, half, count = interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 2), count
    (2.0, 2.48, 3)
    """
    if len(values) < 2:
        return Interval(values[0] if values else math.nan, math.inf, len(values))
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), QUANTILES[len(values) - 2] * spread, len(values))
