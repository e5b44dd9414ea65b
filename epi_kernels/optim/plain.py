"""Settings as plain Python values, so that a checkpoint of them loads under ``torch.load(weights_only=True)``."""

from numbers import Integral, Real
from typing import Any

import numpy as np


def is_number(value: object) -> bool:
    """Return whether a value is a real number of Python's or of numpy's; a flag is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any, first: int, end: float) -> bool:
    """Return whether a value is an integer of Python's or of numpy's with first <= value < end; a flag is none."""
    return is_number(value) and isinstance(value, Integral) and first <= int(value) < end


def plain(value: Any) -> Any:
    """Return a number, flag or string of numpy's as Python's, in a tuple or list too; anything else as it is."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a group, or those of all groups, as plain values; parameters and their names are kept."""
    return {key: value if key in ("params", "param_names") else plain(value) for key, value in settings.items()}
