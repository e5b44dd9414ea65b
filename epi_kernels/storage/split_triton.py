# mypy: allow-untyped-defs, allow-incomplete-defs
"""A float32 weight as a bfloat16 parameter and a rest in Triton: the bits of split.py."""

import triton
import triton.language as tl

from epi_kernels.ops.equations_triton import INFINITE, bits_of, float_of


@triton.jit
def joined(param, rest, REST: tl.constexpr):
    """Return float32 weights; contract: `epi_kernels.storage.split.joined`. REST: the bits of the rest, 16 or 8."""
    high = param.to(tl.int16, bitcast=True).to(tl.int32)
    weight = (high << 16) + (rest.to(tl.int32) << (16 - REST))
    return float_of(tl.where((weight & 0x7FFFFFFF) > INFINITE, high << 16, weight))


@triton.jit
def split(value, param, rest, noise, REST: tl.constexpr):
    """Return (parameter, rest); contract: `epi_kernels.storage.split.split`. noise: uint32, or None."""
    bits = bits_of(value)
    rounded = bits
    if REST == 8:
        more = tl.full(bits.shape, 0x80, tl.int32)
        if noise is not None:
            more = (noise >> 8).to(tl.int32)
        # infinity ends in zeros and keeps them, NaN is replaced below
        rounded = (bits + more) & -256
    nan = (bits & 0x7FFFFFFF) > INFINITE
    high = tl.where(nan, (bits >> 16) | 0x40, (rounded + 0x8000) >> 16)
    # what is taken from the high half has zeros in the low one
    low = tl.where(nan, 0, rounded)
    stays = nan & ((param.to(tl.int16, bitcast=True) & 0x7FFF) > 0x7F80)
    new_param = tl.where(stays, param, high.to(tl.int16).to(tl.bfloat16, bitcast=True))
    if REST == 8:
        new_rest = (low >> 8).to(tl.int8)
    else:
        new_rest = low.to(tl.int16)
    return new_param, tl.where(stays, rest, new_rest)
