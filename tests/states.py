"""Equality of optimizer states, bit for bit."""

from typing import Any

import torch
from torch import Tensor


def same_state(left: Any, right: Any) -> bool:
    """Return whether two state_dicts, or parts of them, hold the same keys and bits."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_state, left, right))
    if isinstance(left, Tensor):
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
    return bool(left == right)
