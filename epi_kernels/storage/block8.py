"""8 bits for each entry: a sign, 7 bits of a magnitude on a square-root scale, and a float32 scale for each block.

A block is 64 entries of a row, or what a row's end leaves; a row is one index of dimension 0, flattened. With code c
from 0 to 126::

    scale <- (largest finite magnitude of the block) / 126^2
    value <- c^2 scale

The top bit of a byte is the sign of a moment, or the lock of an importance. Code 127 stands for a value that is not
finite, and reads as NaN: it damages its own entry alone. Codes are rounded stochastically, so that the expected value
is the value itself. Sums, products, quotients and square roots alone, each rounded once, so that all backends agree.

Companding and block scales are techniques of 8-bit optimizers (arXiv 2110.02861) and FlashOptim (arXiv 2602.23349).
"""

import torch
from torch import Tensor

from epi_kernels.contract import NEGLIGIBLE
from epi_kernels.storage.kind import Storage

BLOCK = 64  # entries that share a scale
LARGEST = 126  # the largest code of a finite magnitude; the next code is that of NaN

BLOCK8 = Storage("block8", torch.uint8, 1 + 4 / BLOCK)


def scales_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the shape of the scales of a tensor with at least 2 dimensions: [rows, blocks of a row]."""
    return shape[0], -(-shape[1:].numel() // BLOCK)


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values of codes, with their sign bits; NaN for code 127.

    Args:
        codes: uint8, contiguous, at least 2 dimensions.
        scales: float32, of `scales_shape`.

    Example:
        >>> codes = torch.zeros(1, 64, dtype=torch.uint8)
        >>> codes[0, :3] = torch.tensor([126, 2, 128 + 63])
        >>> decoded(codes, torch.tensor([[2.0**-14]]))[0, :3]
        tensor([ 9.6899e-01,  2.4414e-04, -2.4225e-01])
    """
    code = (codes & 127).to(torch.float32)
    value = code * code * _of_entries(scales, codes.shape)
    value = torch.where(code > LARGEST, torch.nan, value)
    return torch.copysign(value, 0.5 - (codes >> 7).to(torch.float32))


def encoded(value: Tensor, noise: Tensor, *, positive: bool) -> tuple[Tensor, Tensor]:
    """Return (codes, scales) of values, rounded stochastically; a value that its block's scale can represent is kept.

    A scale below `NEGLIGIBLE` is 0, so that results do not depend on whether subnormals are flushed.

    Args:
        value: float32, contiguous, at least 2 dimensions; its sign bits become those of the codes.
        noise: int64, same shape, from 0 to 2^16 - 1; 15 bits of it are used.
        positive: no value but 0 gets code 0; a second moment of 0 would make an entry's step unbounded.
    """
    finite = value.isfinite()
    largest = _largest(torch.where(finite, value.abs(), 0.0))
    # a tensor: by a number, torch divides on a GPU as it multiplies, by the rounded reciprocal
    scales = largest / torch.full_like(largest, LARGEST * LARGEST)
    scales = torch.where(scales < NEGLIGIBLE, 0.0, scales)
    inverse = torch.where(scales > 0, scales.reciprocal(), 0.0)
    units = value.abs() * _of_entries(inverse, value.shape)
    # the largest whole number whose square is not above: exact, since a double has room for the square
    below = torch.where(finite, units, 0.0).double().sqrt().floor().float()
    share = ((noise >> 1).to(torch.float32) + 0.5) * 2.0**-15
    # the difference and the product are exact
    code = below + (units - below * below > share * (2.0 * below + 1.0))
    code = code.clamp(max=LARGEST)
    if positive:
        code = torch.maximum(code, (value != 0).to(torch.float32))
    code = torch.where(finite, code, 127.0).to(torch.uint8)
    return code | (torch.signbit(value).to(torch.uint8) << 7), scales


def _largest(magnitudes: Tensor) -> Tensor:
    """Return the largest value of each block."""
    rows, blocks = scales_shape(magnitudes.shape)
    flat = magnitudes.reshape(rows, magnitudes.shape[1:].numel())  # a shard may have no rows, and -1 no value then
    flat = torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.shape[1]))
    return flat.view(rows, blocks, BLOCK).amax(2) if flat.numel() else flat.new_zeros(rows, blocks)


def _of_entries(of_blocks: Tensor, shape: torch.Size) -> Tensor:
    """Return a value of each block for each of its entries."""
    length = shape[1:].numel()
    return of_blocks.repeat_interleave(BLOCK, 1)[:, :length].reshape(shape)
