"""Importance in Triton: the EMA of squared gradients with each layer's range, and the sums that PIECE needs."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import (
    INFINITE,
    MINUS_INFINITE,
    advanced_importance,
    is_finite,
    noticed,
    usable_bits,
)
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.table import Table, on_device
from epi_kernels.ops.tiles import Variant, left_of, located, pointer, read, read_as_float32, words, write
from epi_kernels.schema import IMPORTANCE, SUMS

_WIDTH, _SUMS_WIDTH = tl.constexpr(len(IMPORTANCE.words)), tl.constexpr(len(SUMS.words))
_IMPORTANCE, _GRAD, _GRAD_DTYPE, _LAYER, _ALIGNED = words(
    IMPORTANCE, "importance", "grad", "grad_dtype", "layer", "aligned"
)
_SUM, _SQUARE_SUM, _SUMS_GRAD, _SUMS_GRAD_DTYPE, _SUMS_ALIGNED = words(
    SUMS, "sum", "square_sum", "grad", "grad_dtype", "aligned"
)


@triton.jit
def importance_kernel(
    rows,
    chunks,
    betas,
    ranges,
    nonfinite,
    grad_factor,
    KEEP_FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Advance one chunk of one tensor and merge its range into its layer's.

    rows: int64 [tensors, words of IMPORTANCE]. betas: float32 [tensors, 2]. ranges: the bits of float32 [layers, 2] as
    int32, which have the same order as the values; they start from (inf, -inf). nonfinite: int64 [tensors].
    grad_factor: float32, or None.
    """
    tensor, start = located(chunks, BLOCK * TILES)
    row = rows + tensor * _WIDTH
    left = left_of(row, start, BLOCK * TILES)
    beta, one_minus_beta = tl.load(betas + 2 * tensor), tl.load(betas + 2 * tensor + 1)
    bad = tl.zeros([BLOCK], tl.int32)
    low = tl.full([BLOCK], INFINITE, tl.int32)
    high = tl.full([BLOCK], MINUS_INFINITE, tl.int32)
    if (left == BLOCK * TILES) & (tl.load(row + _ALIGNED) != 0):
        for tile in range(TILES):
            bad, low, high = _advance_tile(
                row, beta, one_minus_beta, grad_factor, start, tile * BLOCK, left, bad, low, high,
                KEEP_FINITE, BLOCK, True,
            )  # fmt: skip
    else:
        for tile in range(tl.cdiv(left, BLOCK)):
            bad, low, high = _advance_tile(
                row, beta, one_minus_beta, grad_factor, start, tile * BLOCK, left, bad, low, high,
                KEEP_FINITE, BLOCK, False,
            )  # fmt: skip
    layer = ranges + 2 * tl.load(row + _LAYER)
    tl.atomic_min(layer, tl.min(low), sem="relaxed")
    tl.atomic_max(layer + 1, tl.max(high), sem="relaxed")
    count = tl.sum(bad)
    if count > 0:
        tl.atomic_add(nonfinite + tensor, count.to(tl.int64), sem="relaxed")


@triton.jit
def _advance_tile(
    row, beta, one_minus_beta, grad_factor, start, first, left, bad, low, high,
    KEEP_FINITE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Advance the tile at entry `first` of the chunk; return the counts and bounds updated with it, entry by entry."""
    at = first + tl.arange(0, BLOCK)
    importance_at = pointer(tl.load(row + _IMPORTANCE), start, tl.float32)
    importance = read(importance_at, at, left, FULL)
    if tl.load(row + _GRAD) != 0:
        grad = read_as_float32(tl.load(row + _GRAD), tl.load(row + _GRAD_DTYPE), start, at, left, FULL)
        if grad_factor is not None:
            grad *= tl.load(grad_factor)
        importance = advanced_importance(importance, grad, beta, one_minus_beta, KEEP_FINITE)
        counted = is_finite(grad * grad) == 0
        if not FULL:
            # past the end of the tensor zeros are read, and 0 times a factor that is not finite is NaN
            counted = counted & (at < left)
        bad += tl.where(counted, 1, 0)
        write(importance_at, at, importance, left, FULL)
    bits = usable_bits(importance)
    valid = bits < INFINITE
    if not FULL:
        valid = valid & (at < left)
    return (
        bad,
        tl.minimum(low, tl.where(valid, bits, INFINITE)),
        tl.maximum(high, tl.where(valid, bits, MINUS_INFINITE)),
    )


@triton.jit
def gradient_sums_kernel(rows, chunks, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Add g and g^2 of one chunk of one tensor. rows: int64 [tensors, words of SUMS]."""
    tensor, start = located(chunks, BLOCK * TILES)
    row = rows + tensor * _SUMS_WIDTH
    left = left_of(row, start, BLOCK * TILES)
    if (left == BLOCK * TILES) & (tl.load(row + _SUMS_ALIGNED) != 0):
        for tile in range(TILES):
            _add_tile(row, start, tile * BLOCK, left, BLOCK, True)
    else:
        for tile in range(tl.cdiv(left, BLOCK)):
            _add_tile(row, start, tile * BLOCK, left, BLOCK, False)


@triton.jit
def _add_tile(row, start, first, left, BLOCK: tl.constexpr, FULL: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    square_sum_at = pointer(tl.load(row + _SQUARE_SUM), start, tl.float32)
    grad = read_as_float32(tl.load(row + _SUMS_GRAD), tl.load(row + _SUMS_GRAD_DTYPE), start, at, left, FULL)
    if tl.load(row + _SUM) != 0:
        sum_at = pointer(tl.load(row + _SUM), start, tl.float32)
        write(sum_at, at, read(sum_at, at, left, FULL) + grad, left, FULL)
    write(square_sum_at, at, read(square_sum_at, at, left, FULL) + noticed(grad * grad), left, FULL)


_TABLES = {"rows": "*i64", "chunks": "*i64"}
_ARGUMENTS = {**_TABLES, "betas": "*fp32", "ranges": "*i32", "nonfinite": "*i64", "grad_factor": None}
VARIANTS = (
    # the code reads all three dtypes of a gradient: 128 bits at a time for float32, 64 for the others
    Variant("importance", importance_kernel, {**_ARGUMENTS, "KEEP_FINITE": True}, 12, 39, {128: 2}, {128: 1}),
    Variant(
        "importance with a factor",
        importance_kernel,
        {**_ARGUMENTS, "KEEP_FINITE": True, "grad_factor": "*fp32"},
        12,
        40,
        {128: 2},
        {128: 1},
    ),
    Variant("importance in v", importance_kernel, {**_ARGUMENTS, "KEEP_FINITE": False}, 12, 38, {128: 2}, {128: 1}),
    Variant("gradient sums", gradient_sums_kernel, _TABLES, 20, 19, {128: 3}, {128: 2}),
)


class Importance:
    """The advance of a fixed list of importances; contract: `epi_kernels.ops.prepared_importance`."""

    def __init__(
        self,
        importances: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        betas: Tensor,
        layers: Sequence[int],
        keep_finite: bool,
        device: torch.device,
    ) -> None:
        flat = Flat(written=[importances], read=[grads])
        self._strided, self._keep_finite, self._betas = flat.strided, keep_finite, betas.float()
        self._table = Table(IMPORTANCE.words, [importance.numel() for importance in importances], tiles.CHUNK, device)
        self._table.point("importance", flat.written[0])
        self._table.set("grad_dtype", tiles.dtype_codes(grads))
        self._table.set("layer", layers)

    def advance_(
        self,
        importances: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        ranges: Tensor,
        nonfinite: Tensor,
        grad_factor: Tensor | None,
        due: Tensor | None,
    ) -> None:
        """Advance where there is a gradient, extend the ranges."""
        table, flat = self._table, None
        if self._strided:  # the copies have new addresses in each refresh
            flat = Flat(written=[importances], read=[grads], strided=self._strided)
            table.point("importance", flat.written[0])
            grads = flat.read[0]
        table.point("grad", grads)
        tiles.launch(
            importance_kernel,
            table.chunks.numel(),
            ranges.device,
            table.rows(due),
            table.chunks,
            on_device(self._betas, ranges.device),
            ranges.view(torch.int32),
            nonfinite,
            grad_factor,
            self._keep_finite,
            tiles.BLOCK,
            tiles.TILES,
        )
        if flat is not None:
            flat.write_back()


def gradient_sums_(sums: Sequence[Tensor], square_sums: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add g and g^2 in place; contract: `epi_kernels.ops.gradient_sums_`."""
    flat = Flat(written=[sums, square_sums], read=[grads])
    table = Table(SUMS.words, [grad.numel() for grad in grads], tiles.CHUNK, grads[0].device)
    if sums:
        table.point("sum", flat.written[0])
    table.point("square_sum", flat.written[1])
    table.point("grad", flat.read[0])
    table.set("grad_dtype", tiles.dtype_codes(grads))
    device = grads[0].device
    tiles.launch(
        gradient_sums_kernel, table.chunks.numel(), device, table.rows(), table.chunks, tiles.BLOCK, tiles.TILES
    )
    flat.write_back()
