"""A float32 weight in two tensors: a bfloat16 parameter, and the rest in 16 or 8 bits.

The parameter is the weight rounded to nearest, ties away from zero, ``(bits + 0x8000) >> 16``; the rest is the
difference of the bits, which fits a signed integer. With 16 bits the weight is exact; with 8 it has 24 bits, and what
follows is rounded to nearest or stochastically. The weight is what stands in the parameter plus the rest, so that a
write into the parameter takes hold by construction.
"""

import torch
from torch import Tensor

# bits of the weight -> dtype of the rest
RESTS = {32: torch.int16, 24: torch.int8}


def joined(param: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 weight of a bfloat16 parameter and its rest, int16 or int8.

    A rest counts as 0 where the sum is NaN: it cannot belong to its parameter. It would take a parameter of 0 across
    zero, or one of infinity beyond. A program that writes 0 or infinity into a parameter leaves such a rest.
    """
    high = param.view(torch.int16).to(torch.int64) << 16
    weight = _float_of(high + (rest.to(torch.int64) << (0 if rest.dtype == torch.int16 else 8)))
    return torch.where(weight.isnan(), _float_of(high), weight)


def split(value: Tensor, param: Tensor, rest: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (parameter, rest) of float32 weights.

    Args:
        value: float32, the shape of the parameter.
        param: bfloat16, the parameter so far: where weight and parameter are NaN, both tensors stay as they are.
        rest: int16 or int8, the rest so far; its dtype says how many bits are kept.
        noise: int64 from 0 to 2^16 - 1, to round to 24 bits stochastically; None: to nearest.

    Example:
        >>> weight = torch.tensor([1.001])
        >>> param, rest = split(weight, torch.zeros(1).bfloat16(), torch.zeros(1, dtype=torch.int16), None)
        >>> param, torch.equal(joined(param, rest), weight)
        (tensor([1.], dtype=torch.bfloat16), True)
    """
    bits = value.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    shift = 0 if rest.dtype == torch.int16 else 8
    if shift:
        bits = torch.where(value.isfinite(), bits + (0x80 if noise is None else noise >> 8), bits) & ~0xFF
    high = (bits + 0x8000 >> 16) & 0xFFFF
    low = bits - (high << 16)
    nan, was = value.isnan(), param.isnan()
    high = torch.where(nan, bits >> 16 | 0x40, high)
    low = torch.where(nan, 0, low)
    high = high.to(torch.int16).view(torch.bfloat16)  # the conversion keeps the low 16 bits
    low = (low >> shift).to(rest.dtype)
    return torch.where(nan & was, param, high), torch.where(nan & was, rest, low)


def _float_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)
