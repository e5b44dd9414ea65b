"""bfloat16 and float16: parameters and gradients may be kept this way, and moments and importances in bfloat16.

A parameter is rounded to nearest even, or stochastically. Moments and importances in bfloat16 are always rounded
stochastically: an average with beta 0.999 moves by less than half a unit of bfloat16 at a time, so that rounded to
nearest it would stay where it is.
"""

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.storage.kind import Storage

BFLOAT16 = Storage("bfloat16", torch.bfloat16, 2)
FLOAT16 = Storage("float16", torch.float16, 2)


def stochastic(value: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Return float32 values in bfloat16 or float16, each rounded up with the probability of its distance from below.

    "Up" is away from zero. A value that `dtype` can represent, an infinity and a NaN are kept.

    Args:
        value: float32, any shape.
        dtype: torch.bfloat16 or torch.float16.
        noise: int64, same shape, from 0 to 2^16 - 1.

    Example:
        >>> stochastic(torch.tensor([1.0, 1.0 + 2**-9]), torch.bfloat16, torch.tensor([65535, 65535]))
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    bits = value.view(torch.int32)
    dropped = 16 if dtype == torch.bfloat16 else 13
    noise = (noise >> (16 - dropped)).to(torch.int32)
    rounded = (bits + noise & -(1 << dropped)).view(torch.float32)
    rounded = torch.where(value.isfinite(), rounded, value).to(dtype)
    if dtype == torch.float16:
        # below 2^-14 a unit of float16 is 2^-24, whatever the exponent
        units = value.abs() * 2.0**24
        below = units.floor()
        small = below + ((units - below) * 8192 > noise)
        small = torch.copysign(small * 2.0**-24, value).to(dtype)
        rounded = torch.where(value.abs() < 2.0**-14, small, rounded)
    return lock.with_lock(rounded, lock.is_locked(value))


def nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 values in bfloat16 or float16, rounded to nearest even; a NaN keeps its sign, which may be a lock.

    torch's conversion, alone, makes every NaN positive.
    """
    return lock.with_lock(value.to(dtype), lock.is_locked(value))
