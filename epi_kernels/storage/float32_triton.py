# mypy: allow-untyped-defs, allow-incomplete-defs
"""float32 in Triton: how a tile of a slot is loaded and stored."""

import triton
import triton.language as tl

from epi_kernels.ops.tiles import pointer, read, scattered, write


@triton.jit
def load(address, start, at, left, FULL: tl.constexpr, SCATTERED: tl.constexpr):
    """Return entries as float32; arguments as in `epi_kernels.ops.tiles.read`, after `scattered` or after `pointer`."""
    first = scattered(address, start, tl.float32) if SCATTERED else pointer(address, start, tl.float32)
    return read(first, at, left, FULL)


@triton.jit
def store(address, start, at, value, left, FULL: tl.constexpr, SCATTERED: tl.constexpr):
    """Write entries; arguments as in `load`."""
    first = scattered(address, start, tl.float32) if SCATTERED else pointer(address, start, tl.float32)
    write(first, at, value, left, FULL)
