"""A measure of two things, taken of every pair of several."""

from collections.abc import Callable, Mapping
from typing import TypeVar

Thing = TypeVar("Thing")


def matrix(things: Mapping[str, Thing], measure: Callable[[Thing, Thing], float]) -> dict[str, dict[str, float]]:
    """Return the measure of each pair, by both names; the measure is symmetric, and taken once of a pair.

    Raises:
        ValueError: the measure refuses a pair; the message names both.

    >>> matrix({"x": 3, "y": 5}, lambda a, b: a * b)
    {'x': {'x': 9, 'y': 15}, 'y': {'x': 15, 'y': 25}}
    """
    names = list(things)
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for i, first in enumerate(names):
        for second in names[i:]:
            try:
                value = measure(things[first], things[second])
            except ValueError as error:
                raise ValueError(f"{first} and {second}: {error}") from error
            found[first][second] = found[second][first] = value
    return found
