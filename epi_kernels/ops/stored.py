# mypy: allow-untyped-defs, allow-incomplete-defs
"""How Triton kernels find the entries of a tile, and read and write them in whatever storage they are kept.

A tile's place is a tuple ``where = (start, at, left, block, blocks)``. Entry ``start + at`` of the tensor is read,
where ``at < left``; the scales of its blocks of 8 bits are `blocks` numbers from `block` on. If the rows of a tensor
are not whole blocks, its table, chunks and tiles count every row as whole tiles, so that a tile has entries of one row.
"""

import torch
import triton
import triton.language as tl

from epi_kernels.ops.tiles import pointer, read, scattered, write
from epi_kernels.storage import CODES
from epi_kernels.storage.block8 import BLOCK as BLOCK_OF_SCALE
from epi_kernels.storage.block8_triton import decoded, encoded, read_scales, write_scales
from epi_kernels.storage.half_triton import nearest, of_bfloat16, stochastic
from epi_kernels.storage.noise_triton import OF_PARAM, noise_of
from epi_kernels.storage.split_triton import split

FLOAT32, BFLOAT16, BLOCK8 = (tl.constexpr(CODES[dtype]) for dtype in (torch.float32, torch.bfloat16, torch.uint8))

_BLOCK_OF_SCALE = tl.constexpr(BLOCK_OF_SCALE)


@triton.constexpr_function
def storage_of(storages, k):
    """Return the storage of slot k; see `epi_kernels.ops.slots.packed`."""
    return (storages >> 4 * k) & 15


@triton.constexpr_function
def has_blocks(storages):
    """Return whether any slot is in blocks of 8 bits."""
    return any((storages >> 4 * k) & 15 == BLOCK8.value for k in range(8))


@triton.jit
def is_ragged(length):
    """Return whether rows are not whole blocks of 8 bits. length: a pointer to the entries of a row."""
    return tl.load(length) % _BLOCK_OF_SCALE != 0


@triton.jit
def tile_at(length, position, first, end, BLOCK: tl.constexpr, FULL: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the place of the tile at `first` of the chunk from `position` on, of which the tensor has `end`.

    length: a pointer to the entries of a row. BLOCKS: whether the launch has blocks of 8 bits. FULL: if so, rows are
    whole blocks.
    """
    start, left, offset = position, end, first
    block, blocks = (position + first) // _BLOCK_OF_SCALE, tl.cdiv(end - first, _BLOCK_OF_SCALE)
    if BLOCKS and not FULL:
        if is_ragged(length):
            row = tl.load(length)
            tiles = tl.cdiv(row, BLOCK)
            tile = (position + first) // BLOCK
            number = tile // tiles
            column = (tile - number * tiles) * BLOCK
            # neither is so, but it gives all reads and writes the layout of full tiles: see
            # `epi_kernels.ops.tiles.pointer`
            start = tl.multiple_of(number * row + column, 16)
            left = tl.minimum(row - column, BLOCK).to(tl.int32)
            offset = first * 0
            block = tl.multiple_of(number * tl.cdiv(row, _BLOCK_OF_SCALE) + column // _BLOCK_OF_SCALE, 4)
            blocks = tl.cdiv(left, _BLOCK_OF_SCALE)
    at = offset + tl.arange(0, BLOCK)
    return start, at, left, block, blocks


@triton.jit
def _first(address, start, DTYPE: tl.constexpr, SCATTERED: tl.constexpr):
    return scattered(address, start, DTYPE) if SCATTERED else pointer(address, start, DTYPE)


@triton.jit
def read_stored(
    address, scales, where, STORAGE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, SCATTERED: tl.constexpr,
    present=None,
):  # fmt: skip
    """Return a tile of a tensor as float32, with sign bits.

    address: of the tensor. scales: a pointer to the address of its scales, read for blocks of 8 bits only. SCATTERED:
    see `epi_kernels.ops.tiles.scattered`. present: see `epi_kernels.ops.tiles.read`.
    """
    start, at, left, block, blocks = where
    if STORAGE == FLOAT32:
        value = read(_first(address, start, tl.float32, SCATTERED), at, left, FULL, present)
    elif STORAGE == BFLOAT16:
        value = of_bfloat16(read(_first(address, start, tl.bfloat16, SCATTERED), at, left, FULL, present))
    else:
        codes = read(_first(address, start, tl.uint8, SCATTERED), at, left, FULL, present)
        value = decoded(codes, read_scales(tl.load(scales), block, blocks, BLOCK, FULL, present))
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
    start, at, left, block, blocks = where
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
        write_scales(tl.load(scales), block, of_blocks, blocks, BLOCK, FULL)
        value = decoded(codes, of_entries)
    return value


@triton.jit
def stored_weight(value, param, rest, shared, PARAM: tl.constexpr, REST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Return (parameter, rest) as they are stored after a step; see `epi_kernels.ops.storages.stored_weight`.

    value: the weights, float32. param, rest: before the step; without rests, `rest` is None, and what is returned for
    it means nothing (the compiler returns no None). shared: the noise's words; None: nothing is rounded stochastically.
    REST: the bits of a rest, 16 or 8, or 0: there is none.
    """
    drawn = None
    if STOCHASTIC:
        drawn = noise_of(shared, OF_PARAM)
    left_over = param
    if REST != 0:
        stored, left_over = split(value, param, rest, drawn, REST)
    elif STOCHASTIC:
        stored = stochastic(value, drawn, PARAM)
    else:
        stored = value.to(PARAM)
    return stored, left_over
