"""How Triton kernels find the entries of a tile, and read and write them in whatever storage they are kept.

A tile's place is a tuple ``where = (start, at, left, position, first, end)``. Entry ``start + at`` of the tensor is
read, where ``at < left``. For blocks of 8 bits, the table, the chunks and the tiles count every row as whole blocks:
`position` and `first` are where the chunk and the tile in it start in this count, and `end` is what the chunk has. For
other tensors both counts are the same.
"""

import torch
import triton
import triton.language as tl

from epi_kernels.ops.tiles import pointer, read, scattered, write
from epi_kernels.storage import CODES
from epi_kernels.storage.block8 import BLOCK as BLOCK_OF_SCALE
from epi_kernels.storage.block8_triton import decoded, encoded, read_scales, write_scales
from epi_kernels.storage.half_triton import nearest, of_bfloat16, stochastic
from epi_kernels.storage.noise_triton import noise_of

FLOAT32, BFLOAT16, BLOCK8 = (tl.constexpr(CODES[dtype]) for dtype in (torch.float32, torch.bfloat16, torch.uint8))

_BLOCK_OF_SCALE = tl.constexpr(BLOCK_OF_SCALE)
# beyond every entry of a chunk; odd, so that the compiler does not take neighbours to be masked alike
_NOWHERE = tl.constexpr((1 << 30) + 1)


@triton.constexpr_function
def storage_of(storages, k):
    """Return the storage of slot k; see `epi_kernels.ops.slots_triton.packed`."""
    return (storages >> 4 * k) & 15


@triton.constexpr_function
def has_blocks(storages):
    """Return whether any slot is in blocks of 8 bits."""
    return any((storages >> 4 * k) & 15 == BLOCK8.value for k in range(8))


@triton.jit
def padding_of(length):
    """Return how many entries a row lacks to whole blocks. length: int64, its entries."""
    return -length & (_BLOCK_OF_SCALE - 1)


@triton.jit
def entry_of(length, position, BLOCKS: tl.constexpr):
    """Return the entry at a position, both int64. length: a pointer to the entries of a row. BLOCKS: see `tile_at`."""
    if BLOCKS:
        padding = padding_of(tl.load(length))
        if padding != 0:
            position -= position // (tl.load(length) + padding) * padding
    return position


@triton.jit
def tile_at(
    length, position, first, end, BLOCK: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr
):
    """Return the place of a tile. BLOCKS: whether the launch has blocks of 8 bits, so that rows count as whole blocks.

    length: a pointer to the entries of a row.
    """
    start, at, left = position, first + tl.arange(0, BLOCK), end
    if BLOCKS and not FULL:
        row = tl.load(length)
        padding = padding_of(row)
        if padding != 0:
            # one division of 64 bits finds the row of the chunk; those of the entries are of 32 bits
            padded = row + padding
            number = position // padded
            column = position - number * padded
            here = tl.minimum(padded - column, BLOCK * TILES).to(tl.int32)
            further = tl.where(at < here, 0, 1 + (at - here) // tl.minimum(padded, BLOCK * TILES).to(tl.int32))
            inside = (at < end) & (column + at - further * padded < row)
            # the layout of a tile follows from the neighbours that a thread is said to have. At the end of a row they
            # are not there, but under a mask of single entries none is read or written together with another
            at = tl.where(inside, at - further * padding.to(tl.int32), _NOWHERE)
            at = tl.max_contiguous(tl.multiple_of(at, 4), 4)
            start = position - number * padding
            left = tl.zeros_like(end) + _NOWHERE
    return start, at, left, position, first, end


@triton.jit
def _first(address, start, DTYPE: tl.constexpr, SCATTERED: tl.constexpr):
    return scattered(address, start, DTYPE) if SCATTERED else pointer(address, start, DTYPE)


@triton.jit
def read_stored(
    address, scales, where, STORAGE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, SCATTERED: tl.constexpr
):
    """Return a tile of a tensor as float32, with sign bits.

    address: of the tensor. scales: a pointer to the address of its scales, read for blocks of 8 bits only. SCATTERED:
    see `epi_kernels.ops.tiles.scattered`.
    """
    start, at, left, position, first, end = where
    if STORAGE == FLOAT32:
        value = read(_first(address, start, tl.float32, SCATTERED), at, left, FULL)
    elif STORAGE == BFLOAT16:
        value = of_bfloat16(read(_first(address, start, tl.bfloat16, SCATTERED), at, left, FULL))
    else:
        codes = read(_first(address, start, tl.uint8, SCATTERED), at, left, FULL)
        value = decoded(codes, read_scales(tl.load(scales), position, first, end, BLOCK, FULL))
    return value


@triton.jit
def write_stored(
    address, scales, where, value, shared, STORAGE: tl.constexpr, SLOT: tl.constexpr, POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    """Write a tile and return it as it was stored, float32; arguments as in `read_stored`.

    shared: what the words of noise share (`noise_triton.mixed`), or None: nothing is rounded stochastically. SLOT:
    whose noise it is. POSITIVE: see `epi_kernels.storage.block8.encoded`.
    """
    start, at, left, position, first, end = where
    if STORAGE == FLOAT32:
        write(_first(address, start, tl.float32, SCATTERED), at, value, left, FULL)
    elif STORAGE == BFLOAT16:
        if shared is None:
            rounded = nearest(value)
        else:
            rounded = stochastic(value, noise_of(shared, SLOT), tl.bfloat16)
        write(_first(address, start, tl.bfloat16, SCATTERED), at, rounded, left, FULL)
        value = of_bfloat16(rounded)
    else:
        codes, of_blocks, of_entries = encoded(value, noise_of(shared, SLOT), left, at, POSITIVE, BLOCK, FULL)
        write(_first(address, start, tl.uint8, SCATTERED), at, codes, left, FULL)
        write_scales(tl.load(scales), position, first, of_blocks, end, BLOCK, FULL)
        value = decoded(codes, of_entries)
    return value
