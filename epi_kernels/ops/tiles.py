"""How every Triton kernel finds its piece of a table and reads and writes it, tile by tile.

A program takes one piece (`epi_kernels.ops.table`): TILES tiles of BLOCK entries, 4 for each thread. Four is what keeps
all dtypes in one layout at the widest access: 128 bits of float32, 64 of bfloat16. With 8, layouts differ, and the
compiler moves tiles between them through shared memory.

A tile is full or ends with its tensor. Full ones of aligned tensors are read without a mask: a mask whose length is not
known to divide by 4 makes every access scalar. A program decides that once, for all its tiles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops.table import ALIGNMENT, PIECE_BITS, current

_INTERPRETED = bool(triton.knobs.runtime.interpret)

# interpreted, a program costs 20 ms whatever its size; TILES stays above 1 so that the loop is held too
BLOCK, TILES = (4096, 2) if _INTERPRETED else (512, 8)
PIECE = BLOCK * TILES

# the launch options of every kernel: 4 warps are 4 entries of a block for each thread
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


class Variant(NamedTuple):
    """A specialisation of a kernel and what its machine code may cost at most; `bench/aot.py` compiles it and looks.

    A kernel without a spill, with these widths and below these counts is left to wait for memory alone: its module
    lists the variants that decide the time of a step or of a refresh.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]  # of the kernel but BLOCK and TILES: a type such as "*fp32" or "i32", or a constant
    bytes: float  # that it moves for each entry
    instructions: int | None  # of a thread for each entry, in the loop over full tiles; None: there is no such loop
    reads: dict[int, int]  # bits of one access in that loop -> number of tensors read so
    writes: dict[int, int]  # {}: no promise
    registers: int = 64  # of a thread: with 64 half of the threads that a processor can hold are there


# of parameters and gradients
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_PIECE_BITS = tl.constexpr(PIECE_BITS)
_PIECE_MASK = tl.constexpr((1 << PIECE_BITS) - 1)
_ALIGNMENT = tl.constexpr(ALIGNMENT)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: object) -> None:
    """Launch a kernel on `device`, a program for each piece; nothing, where there is none."""
    if programs:
        with current(device):
            kernel[(programs,)](*arguments, **OPTIONS)


def dtype_codes(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the code by which `read_as_float32` knows the dtype of each tensor; None has any."""
    return [0 if tensor is None else list(DTYPES).index(tensor.dtype) for tensor in tensors]


@triton.jit
def located(pieces, PIECE: tl.constexpr):
    """Return (tensor, first entry) of this program's piece, both int64."""
    piece = tl.load(pieces + tl.program_id(0))
    return piece >> _PIECE_BITS, (piece & _PIECE_MASK) * PIECE


@triton.jit
def entries_left(size, start, PIECE: tl.constexpr):
    """Return how many entries of a piece that begins at `start` a tensor of `size` has, int32: 0 to PIECE.

    Where nothing is due the size is 0, and a piece begins far behind the end: 32 bits do not hold how far.
    """
    return tl.maximum(tl.minimum(size - start, PIECE), 0).to(tl.int32)


@triton.jit
def pointer(word, start, DTYPE: tl.constexpr):
    """Return the pointer to entry `start` of the tensor whose address is at `word`.

    It promises an alignment that only a full tile of an aligned tensor may use: see `read`.
    """
    # the promise must be on the address itself: behind the addition it is not seen
    return tl.multiple_of(tl.load(word).to(tl.pointer_type(DTYPE)), _ALIGNMENT) + start


@triton.jit
def scattered(word, start, DTYPE: tl.constexpr):
    """Return the pointer to entry `start` of the tensor whose address is at `word`, without a promise.

    The entries of a thread are then not side by side, but as far apart as there are threads. That is how an atomic, a
    gather and a scatter want them: with neighbours, the compiler moves each tile from one layout into the other.
    """
    return tl.load(word).to(tl.pointer_type(DTYPE)) + start


@triton.jit
def read(at, offsets, left, FULL: tl.constexpr):
    """Return the entries at `offsets`; beyond `left` zeros, and no memory is read."""
    if FULL:
        value = tl.load(at + offsets)
    else:
        value = tl.load(at + offsets, mask=offsets < left, other=0)
    return value


@triton.jit
def write(at, offsets, value, left, FULL: tl.constexpr):
    """Write the entries at `offsets` that are below `left`."""
    if FULL:
        tl.store(at + offsets, value)
    else:
        tl.store(at + offsets, value, mask=offsets < left)


@triton.jit
def read_as_float32(word, code, start, offsets, left, FULL: tl.constexpr):
    """Return entries of a tensor whose dtype is known at run time alone (`dtype_codes`), as float32."""
    if code == 0:
        value = read(pointer(word, start, tl.float32), offsets, left, FULL)
    elif code == 1:
        value = read(pointer(word, start, tl.bfloat16), offsets, left, FULL).to(tl.float32)
    else:
        value = read(pointer(word, start, tl.float16), offsets, left, FULL).to(tl.float32)
    return value
