# mypy: allow-untyped-defs, allow-incomplete-defs
"""Blocks of 8 bits in Triton: the codes and scales of block8.py.

A tile has whole blocks, and its entries are a matrix with a block in each row. With 4 entries for each thread, a block
belongs to 16 threads of one warp: its maximum takes shuffles, and no entry goes through shared memory.
"""

import triton
import triton.language as tl

from epi_kernels.contract import NEGLIGIBLE
from epi_kernels.ops.equations_triton import INFINITE, bits_of, float_of
from epi_kernels.storage import block8

BLOCK8 = tl.constexpr(block8.BLOCK)
_LARGEST = tl.constexpr(block8.LARGEST)
_SQUARE = tl.constexpr(float(block8.LARGEST**2))
_NEGLIGIBLE = tl.constexpr(NEGLIGIBLE)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_NAN = tl.constexpr(0x7FC00000)

# the sum of a small number and 2^23 has the number, rounded to a whole one, in its low bits; 1.5 * 2^23 takes numbers
# just below 0 too
_WHOLE, _AROUND = tl.constexpr(float(1 << 23)), tl.constexpr(float(3 << 22))
_WHOLE_BITS, _AROUND_BITS = tl.constexpr(0x4B000000), tl.constexpr(0x4B400000)
_ONE_BITS = tl.constexpr(0x3F800000)


@triton.jit
def decoded(codes, scale):
    """Return float32 values of a tile of uint8 codes. scale: that of each entry."""
    bits = codes.to(tl.int32)
    code = bits & 127
    whole = float_of(code | _WHOLE_BITS) - _WHOLE
    value = bits_of(whole * whole * scale)
    return float_of(tl.where(code > _LARGEST, _NAN, value) | ((bits & 128) << 24))


@triton.jit
def encoded(value, noise, left, at, POSITIVE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Return (codes, scales, scales of entries) of a tile; contract: `epi_kernels.storage.block8.encoded`.

    noise: uint32. Entries of `at` from `left` on count as 0.
    """
    bits = bits_of(value)
    size = bits & _MAGNITUDE
    finite = size < INFINITE
    counted = finite
    if not FULL:
        counted = counted & (at < left)
    # as integers, magnitudes have the same order
    largest = tl.max(tl.reshape(tl.where(counted, size, 0), [BLOCK // BLOCK8, BLOCK8]), 1)
    scales = _divided(float_of(largest))
    scales = tl.where(scales < _NEGLIGIBLE, 0.0, scales)
    inverse = tl.where(scales > 0, tl.div_rn(tl.full([BLOCK // BLOCK8], 1.0, tl.float32), scales), 0.0)
    units = float_of(size) * of_entries(inverse, BLOCK)
    # the root rounded down, as the last bits of a float32. It may be approximate: with a relative error of 2^-23 it is
    # the wrong whole number only next to a square, where both have the same code
    root = (tl.sqrt(units) - 0.5) + _AROUND
    below = root - _AROUND
    share = float_of(((noise.to(tl.int32) >> 1) << 8) | (_ONE_BITS | 0x80)) - 1.0
    # all of this is exact
    root += tl.where(tl.fma(-below, below, units) > share * tl.fma(below, 2.0, 1.0), 1.0, 0.0)
    # at most LARGEST: the largest value has LARGEST^2 units and 3 roundings, the next code is further. What is not
    # finite has a root that is infinite or NaN, whose bits are above all others, whatever the sign
    whole = tl.minimum(root.to(tl.uint32, bitcast=True), _AROUND_BITS + 127).to(tl.int32) & 127
    if POSITIVE:
        whole = tl.maximum(whole, tl.minimum(size, 1))
    return (whole | ((bits >> 24) & 128)).to(tl.uint8), scales, of_entries(scales, BLOCK)


@triton.jit
def _divided(largest):
    """Return the quotient by 126^2, rounded correctly for every quotient from `NEGLIGIBLE` up."""
    inverse = 1.0 / _SQUARE
    near = largest * inverse
    return tl.fma(tl.fma(-near, _SQUARE, largest), inverse, near)


@triton.jit
def of_entries(of_blocks, BLOCK: tl.constexpr):
    """Return the value of its block for each entry of a tile."""
    return tl.reshape(tl.broadcast_to(of_blocks[:, None], [BLOCK // BLOCK8, BLOCK8]), [BLOCK])


@triton.jit
def read_scales(address, block, blocks, BLOCK: tl.constexpr, FULL: tl.constexpr, present=None):
    """Return the scale of each entry of a tile.

    block: int64, the first scale. blocks: the tile has so many. present: whether the tensor is there, one
    value for the whole program; without it, zeros are returned. None: it is.
    """
    at = address.to(tl.pointer_type(tl.float32)) + block
    of_entry = tl.arange(0, BLOCK) // BLOCK8
    if FULL:
        scale = tl.load(at + of_entry, mask=present, other=None if present is None else 0)
    else:
        mask = of_entry < blocks
        if present is not None:
            mask = mask & present
        scale = tl.load(at + of_entry, mask=mask, other=0)
    return scale


@triton.jit
def write_scales(address, block, scales, blocks, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Write the scales of a tile; arguments as in `read_scales`."""
    # as a tile of entries of which one in a block is written: a tile of scales alone would get a layout of its own, to
    # which the compiler would move the scales through shared memory
    entry = tl.arange(0, BLOCK)
    at = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + block
    chosen = entry % BLOCK8 == 0
    if not FULL:
        chosen = chosen & (entry // BLOCK8 < blocks)
    # the layout of a tile follows from the neighbours that a thread is said to have. They are not there, but the mask
    # chooses single entries, so that none is written together with another
    of_entry = tl.max_contiguous(tl.multiple_of(entry // BLOCK8, 4), 4)
    tl.store(at + of_entry, of_entries(scales, BLOCK), mask=chosen)
