"""The lock: one sign bit per entry says whether it is protected.

An importance is never negative (S >= 0), so its sign bit is free. A protected entry stores ``-S``, ``-0.0`` included;
a free entry stores ``+S``. In blocks of 8 bits the lock is the top bit of the byte. The mask therefore needs no tensor
of its own, has the parameter's shape, and is sharded, saved and resharded together with the importance. A static mask
has no importance and keeps the same rule in one byte.

Python code reads and writes the bit only here, kernels in csrc/importance.h and ops/equations_triton.py. The *bit*
counts, not ``S < 0``: -0.0 and NaN carry it too.
"""

import torch
from torch import Tensor


def is_locked(lock: Tensor) -> Tensor:
    """Return which entries are protected: a bool tensor of the same shape, True = protected."""
    return lock > 127 if lock.dtype == torch.uint8 else torch.signbit(lock)


def magnitude(lock: Tensor) -> Tensor:
    """Return the importance that `lock` carries, or its codes: the same values with the sign bit cleared."""
    return lock & 127 if lock.dtype == torch.uint8 else lock.abs()


def with_lock(importance: Tensor, locked: Tensor) -> Tensor:
    """Return `importance` with the sign bit of each entry set where `locked` and cleared elsewhere.

    Args:
        importance: floating point, or codes of 8 bits (`epi_kernels.storage.block8`); its own sign bits are ignored.
        locked: bool, same shape; True = protected.

    Example:
        >>> with_lock(torch.tensor([0.0, 2.0, 3.0]), torch.tensor([True, False, True]))
        tensor([-0., 2., -3.])
    """
    if importance.dtype == torch.uint8:
        return importance & 127 | locked.to(torch.uint8) << 7
    if importance.dtype == torch.bfloat16:
        # torch computes in float32 here, and its way back gives a NaN any sign
        bits = importance.view(torch.int16) & 0x7FFF
        return (bits | locked.to(torch.int16) << 15).view(torch.bfloat16)
    # copysign, not a product with -1: the product of a NaN has an unspecified sign
    minus = torch.full((), -1.0, dtype=importance.dtype, device=importance.device)
    return torch.copysign(importance, torch.where(locked, minus, -minus))


def static_lock(locked: Tensor) -> Tensor:
    """Return a one-byte lock without importance: int8, -1 where `locked` (bool, any shape), else 0."""
    return -locked.to(torch.int8)
