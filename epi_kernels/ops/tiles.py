"""How every Triton kernel finds its chunk in a table, and reads and writes the chunk tile by tile.

A program takes one chunk (`epi_kernels.ops.table`): TILES tiles of BLOCK entries, 4 for each thread. With 4, all dtypes
have the same layout at their widest access: 128 bits for float32, 64 for bfloat16. With 8, the layouts differ, and the
compiler moves tiles between layouts through shared memory.

A tile is full or ends with its tensor. Full tiles of aligned tensors are read without a mask: a mask whose length is
not known to be a multiple of 4 makes every access scalar. A program decides once, for all its tiles, whether to use
masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.backends.target import processors
from epi_kernels.ops.table import ALIGNMENT, current
from epi_kernels.schema import CHUNK_BITS, Row
from epi_kernels.storage import CODES, STORAGES, VALUES

_INTERPRETED = bool(triton.knobs.runtime.interpret)

# when interpreted, a program costs 20 ms whatever its size; TILES stays above 1 so that tests run the loop too
BLOCK, TILES = (4096, 2) if _INTERPRETED else (512, 8)
CHUNK = BLOCK * TILES

# programs that a processor holds at once: 65,536 registers for 128 threads of 64 each
_AT_ONCE = 8

# the launch options of every kernel: with 4 warps, each thread has 4 entries of a block
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


class Variant(NamedTuple):
    """A specialisation of a kernel and the limits for its machine code, which `bench/aot.py` compiles and checks.

    A kernel that has no spill, has these widths and stays within these counts waits only for memory. Its module lists
    the variants that decide the time of a step or of a refresh.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]  # all but BLOCK and TILES: a type such as "*fp32" or "i32", or a constant
    bytes: float  # bytes moved for each entry
    instructions: int | None  # per thread and entry in the loop over full tiles; None: no such loop
    reads: dict[int, int]  # bits of one access in that loop -> number of tensors read that way
    writes: dict[int, int]  # the same for writes; {}: not checked
    registers: int = 64  # per thread; with 64, a processor holds half of the threads that it could
    late_reads: int | None = None  # reads of tensors in that loop after the first wait for one; None: not checked


class Budget(NamedTuple):
    """The limits for the machine code of a rule in one kind of launch.

    The Triton file of a rule lists the budgets of its sweeps (SWEEPS) and its gathers (GATHERS); the modules of the two
    operations make a `Variant` of each budget.
    """

    name: str
    instructions: int | None  # as in `Variant`
    param: str = "float32"
    grad: str = "float32"
    lock_in: str = "none"  # for a sweep: one of `epi_kernels.schema.LOCK_IN`
    optional: bool = False  # with the rule's optional slots
    state: str = "float32"  # the storage of the slots, and of an importance of its own
    rest: int = 0  # bits of the rest of a weight
    stochastic: bool = False  # whether weights are rounded stochastically
    registers: int = 64  # as in `Variant`
    late_reads: int = 0  # of a sweep, as in `Variant`
    changes: Mapping[str, Any] = {}  # arguments of the kernel that differ from the usual ones


# the dtypes of parameters and gradients
DTYPES = {storage.dtype: getattr(tl, storage.name) for storage in STORAGES if storage.dtype in VALUES}

_CHUNK_BITS = tl.constexpr(CHUNK_BITS)
_CHUNK_MASK = tl.constexpr((1 << CHUNK_BITS) - 1)
_ALIGNMENT = tl.constexpr(ALIGNMENT)


_FLOAT32, _BFLOAT16 = (tl.constexpr(CODES[dtype]) for dtype in (torch.float32, torch.bfloat16))
_SIZE = tl.constexpr(0)  # the first word of every row


def words(row: Row, *names: str) -> list[Any]:
    """Return the positions of words in a row, as constants for a kernel."""
    return [tl.constexpr(row.word(name)) for name in names]


def launch(kernel: Any, programs: int, device: torch.device, *arguments: object, **constants: object) -> None:
    """Launch a kernel on `device` with a program for each chunk; without chunks, do nothing."""
    if programs:
        with current(device):
            kernel[(programs,)](*arguments, **constants, **OPTIONS)


def launch_where_due(
    kernel: Any, chunks: int, device: torch.device, due: Tensor | None, *arguments: object, **constants: object
) -> None:
    """Launch a kernel of a refresh on `device`, which decides whether the refresh is due.

    Args:
        kernel: it takes `due` and CHUNKS behind the other arguments. Where `due` is given, its programs take the chunks
            in turns, and as many run as the device holds at once: where nothing is due, millions of programs would
            start only to end.
        chunks: how many there are.
        device: where the kernel runs.
        due: one float32 value on the device, 0 if the refresh is not due; None: it is due.
        arguments: of the kernel.
        constants: of the kernel.
    """
    if due is None:
        launch(kernel, chunks, device, *arguments, **constants)
    else:
        programs = min(chunks, _programs_at_once(device))
        launch(kernel, programs, device, *arguments, due=due, CHUNKS=chunks, **constants)


def _programs_at_once(device: torch.device) -> int:
    """Return how many programs of 64 registers a device runs at once; interpreted, few, so that tests take turns."""
    return _AT_ONCE * processors(device) if device.type == "cuda" else 3


def dtype_codes(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the number that stands for the dtype of each tensor in `read_as_float32`; None gets any number."""
    return [0 if tensor is None else CODES[tensor.dtype] for tensor in tensors]


@triton.jit
def located(chunks, number, CHUNK: tl.constexpr):
    """Return (tensor, first entry) of the chunk at position `number` of the table, both int64."""
    chunk = tl.load(chunks + number)
    return chunk >> _CHUNK_BITS, (chunk & _CHUNK_MASK) * CHUNK


@triton.jit
def chunks_due(due, CHUNKS):
    """Return how many chunks a launch of `launch_where_due` takes: all, or none where nothing is due."""
    return tl.where(tl.load(due) != 0, CHUNKS, 0)


@triton.jit
def left_of(row, start, CHUNK: tl.constexpr):
    """Return how many entries of a chunk the tensor of this row has, int32: 0 if the tensor ends before the chunk."""
    # in 64 bits: `start` may be beyond 2^31 where the size is 0
    return tl.maximum(tl.minimum(tl.load(row + _SIZE) - start, CHUNK), 0).to(tl.int32)


@triton.jit
def pointer(address, start, DTYPE: tl.constexpr):
    """Return the pointer to entry `start` of the tensor at an address.

    It promises the compiler an alignment that only a full tile of an aligned tensor has: see `read`.
    """
    # the promise must be on the address itself: after the addition the compiler does not see it
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), _ALIGNMENT) + start


@triton.jit
def scattered(address, start, DTYPE: tl.constexpr):
    """Return the pointer to entry `start` of the tensor at an address, without a promise of alignment.

    The entries of a thread are then not side by side; their distance is the number of threads. An atomic, a gather and
    a scatter need this layout: if a thread had neighbours, the compiler would move each tile from one layout to the
    other.
    """
    return address.to(tl.pointer_type(DTYPE)) + start


@triton.jit
def read(at, offsets, left, FULL: tl.constexpr, present=None):
    """Return the entries at `offsets`; for offsets from `left` on, return zeros and read no memory.

    present: whether the tensor is there, one value for the whole program; without it, zeros are returned. None: it is.
    """
    if FULL:
        value = tl.load(at + offsets, mask=present, other=None if present is None else 0)
    else:
        mask = offsets < left
        if present is not None:
            mask = mask & present
        value = tl.load(at + offsets, mask=mask, other=0)
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
    """Return entries of a tensor whose dtype is known only at run time (`dtype_codes`), as float32."""
    if code == _FLOAT32:
        value = read(pointer(address, start, tl.float32), offsets, left, FULL)
    elif code == _BFLOAT16:
        value = read(pointer(address, start, tl.bfloat16), offsets, left, FULL).to(tl.float32)
    else:
        value = read(pointer(address, start, tl.float16), offsets, left, FULL).to(tl.float32)
    return value
