# mypy: allow-untyped-defs, allow-incomplete-defs
"""bfloat16 and float16 in Triton: the roundings of half.py."""

import triton
import triton.language as tl

from epi_kernels.ops.equations_triton import INFINITE, bits_of, float_of, is_finite

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SMALL = tl.constexpr(2.0**-14)


@triton.jit
def of_bfloat16(value):
    """Return bfloat16 values as float32, with the sign bits of NaNs."""
    return float_of(value.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def nearest(value):
    """Return float32 values in bfloat16, rounded to nearest even, with the sign bits of NaNs."""
    bits = bits_of(value)
    nan = (bits & _MAGNITUDE) > INFINITE
    rounded = tl.where(nan, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def stochastic(value, noise, DTYPE: tl.constexpr):
    """Return float32 values in bfloat16 or float16; contract: `epi_kernels.storage.half.stochastic`. noise: uint32."""
    return _to_bfloat16(value, noise) if DTYPE == tl.bfloat16 else _to_float16(value, noise)


@triton.jit
def _to_bfloat16(value, noise):
    bits = bits_of(value)
    # infinity ends in zeros and keeps them; a NaN stays one, whichever bits it has, and keeps its sign bit
    nan = (bits & _MAGNITUDE) > INFINITE
    rounded = tl.where(nan, bits | 0x400000, bits + noise.to(tl.int32))
    return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _to_float16(value, noise):
    bits = bits_of(value)
    low = (noise >> 3).to(tl.int32)
    rounded = tl.where(is_finite(value), float_of((bits + low) & -8192), value).to(tl.float16)
    # below 2^-14 a unit of float16 is 2^-24, whatever the exponent
    size = float_of(bits & _MAGNITUDE)
    units = size * 16777216.0
    below = tl.floor(units)
    small = below + tl.where((units - below) * 8192.0 > low.to(tl.float32), 1.0, 0.0)
    small = float_of(bits_of(small * 5.9604644775390625e-08) | (bits & ~_MAGNITUDE)).to(tl.float16)
    return tl.where(size < _SMALL, small, rounded)
