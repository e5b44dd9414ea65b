"""How every Triton kernel finds its chunk of a table and reads and writes it, tile by tile.

A program takes one chunk (`epi_kernels.ops.table`): TILES tiles of BLOCK entries, 4 for each thread. Four is what keeps
all dtypes in one layout at the widest access: 128 bits of float32, 64 of bfloat16. With 8, layouts differ, and the
compiler moves tiles between them through shared memory.

A tile is full or ends with its tensor. Full ones of aligned tensors are read without a mask: a mask whose length is not
known to divide by 4 makes every access scalar. A program decides that once, for all its tiles.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops.table import ALIGNMENT, current
from epi_kernels.schema import CHUNK_BITS, Row
from epi_kernels.storage import DTYPES as CODES
from epi_kernels.storage import STORAGES

_INTERPRETED = bool(triton.knobs.runtime.interpret)

# interpreted, a program costs 20 ms whatever its size; TILES stays above 1 so that the loop is held too
BLOCK, TILES = (4096, 2) if _INTERPRETED else (512, 8)
CHUNK = BLOCK * TILES

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


class Budget(NamedTuple):
    """What the machine code of a rule may cost in one kind of launch.

    The Triton file of a rule lists those of its sweeps (SWEEPS) and of its gathers (GATHERS); the modules of the two
    operations make a `Variant` of each.
    """

    name: str
    instructions: int | None  # as of `Variant`
    param: str = "float32"
    grad: str = "float32"
    lock_in: str = "none"  # of a sweep: one of `epi_kernels.ops.schema.LOCK_IN`
    optional: bool = False  # with the rule's optional slots
    changes: Mapping[str, Any] = {}  # arguments of the kernel that are others than usual


# of parameters and gradients
DTYPES = {storage.dtype: getattr(tl, storage.name) for storage in STORAGES}

_CHUNK_BITS = tl.constexpr(CHUNK_BITS)
_CHUNK_MASK = tl.constexpr((1 << CHUNK_BITS) - 1)
_ALIGNMENT = tl.constexpr(ALIGNMENT)


_FLOAT32, _BFLOAT16 = (tl.constexpr(CODES[dtype]) for dtype in (torch.float32, torch.bfloat16))
_SIZE = tl.constexpr(0)  # the first word of every row


def words(row: Row, *names: str) -> list[Any]:
    """Return the positions of words of a row, as a kernel may use them."""
    return [tl.constexpr(row.word(name)) for name in names]


def launch(kernel: Any, programs: int, device: torch.device, *arguments: object, **constants: object) -> None:
    """Launch a kernel on `device`, a program for each chunk; nothing, where there is none."""
    if programs:
        with current(device):
            kernel[(programs,)](*arguments, **constants, **OPTIONS)


def dtype_codes(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the number by which `read_as_float32` knows the dtype of each tensor; None has any."""
    return [0 if tensor is None else CODES[tensor.dtype] for tensor in tensors]


@triton.jit
def located(chunks, CHUNK: tl.constexpr):
    """Return (tensor, first entry) of this program's chunk, both int64."""
    chunk = tl.load(chunks + tl.program_id(0))
    return chunk >> _CHUNK_BITS, (chunk & _CHUNK_MASK) * CHUNK


@triton.jit
def left_of(row, start, CHUNK: tl.constexpr):
    """Return how many of a chunk's entries the tensor of this row has, int32: 0 where it ends before them.

    A row has size 0 where a refresh is not due, and `start` may be beyond 2^31: the difference fits no int32 then.
    """
    return tl.maximum(tl.minimum(tl.load(row + _SIZE) - start, CHUNK), 0).to(tl.int32)


@triton.jit
def pointer(address, start, DTYPE: tl.constexpr):
    """Return the pointer to entry `start` of the tensor at an address.

    It promises an alignment that only a full tile of an aligned tensor may use: see `read`.
    """
    # the promise must be on the address itself: behind the addition it is not seen
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), _ALIGNMENT) + start


@triton.jit
def scattered(address, start, DTYPE: tl.constexpr):
    """Return the pointer to entry `start` of the tensor at an address, without a promise.

    The entries of a thread are then not side by side, but as far apart as there are threads. That is how an atomic, a
    gather and a scatter want them: with neighbours, the compiler moves each tile from one layout into the other.
    """
    return address.to(tl.pointer_type(DTYPE)) + start


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
def read_as_float32(address, code, start, offsets, left, FULL: tl.constexpr):
    """Return entries of a tensor whose dtype is known at run time alone (`dtype_codes`), as float32."""
    if code == _FLOAT32:
        value = read(pointer(address, start, tl.float32), offsets, left, FULL)
    elif code == _BFLOAT16:
        value = read(pointer(address, start, tl.bfloat16), offsets, left, FULL).to(tl.float32)
    else:
        value = read(pointer(address, start, tl.float16), offsets, left, FULL).to(tl.float32)
    return value
