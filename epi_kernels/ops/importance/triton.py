"""Importance in Triton: the EMA of squared gradients with each layer's range, and the sums that PIECE needs."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import (
    INFINITE,
    MINUS_INFINITE,
    advanced_importance,
    bits_of,
    is_finite,
    noticed,
    usable_bits,
)
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.slots import place_in
from epi_kernels.ops.stored import (
    BLOCK8,
    FLOAT32,
    is_ragged,
    read_stored,
    tile_at,
    write_stored,
)
from epi_kernels.ops.table import Table, on_device, row_length, table_sizes
from epi_kernels.ops.tiles import Variant, chunks_due, left_of, located, pointer, read, read_as_float32, words, write
from epi_kernels.schema import IMPORTANCE, SUMS
from epi_kernels.storage import BFLOAT16, CODES, Storage
from epi_kernels.storage import BLOCK8 as OF_BLOCK8
from epi_kernels.storage.noise import Place
from epi_kernels.storage.noise_triton import OF_IMPORTANCE, begun, has_gaps, mixed, of_slot

_WIDTH, _SUMS_WIDTH = tl.constexpr(len(IMPORTANCE.words)), tl.constexpr(len(SUMS.words))
_IMPORTANCE, _GRAD, _GRAD_DTYPE, _LAYER, _ALIGNED = words(
    IMPORTANCE, "importance", "grad", "grad_dtype", "layer", "aligned"
)
_SCALES, _PLACE, _ROW = words(IMPORTANCE, "scales", "key", "row")
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
    steps=None,
    STORAGE: tl.constexpr = FLOAT32,
    due=None,
    CHUNKS=None,
):
    """Advance every chunk of every tensor, and merge its range into its layer's.

    rows: int64 [tensors, words of IMPORTANCE]. betas: float32 [tensors, 2]. ranges: the bits of float32 [layers, 2] as
    int32, which have the same order as the values; they start from (inf, -inf). nonfinite: int64 [tensors].
    grad_factor: float32, or None. steps: float32 [tensors], the clocks, if the importances are rounded stochastically;
    or None. STORAGE: of the importances. due, CHUNKS: see `epi_kernels.ops.tiles.launch_where_due`.
    """
    if due is None:
        _advance_chunk(
            rows, chunks, tl.program_id(0), betas, ranges, nonfinite, grad_factor, steps,
            KEEP_FINITE, STORAGE, BLOCK, TILES,
        )  # fmt: skip
    else:
        for number in range(tl.program_id(0), chunks_due(due, CHUNKS), tl.num_programs(0)):
            _advance_chunk(
                rows, chunks, number, betas, ranges, nonfinite, grad_factor, steps, KEEP_FINITE, STORAGE, BLOCK, TILES
            )


@triton.jit
def _advance_chunk(
    rows, chunks, number, betas, ranges, nonfinite, grad_factor, steps,
    KEEP_FINITE: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Advance one chunk of one tensor."""
    tensor, start = located(chunks, number, BLOCK * TILES)
    row = rows + tensor * _WIDTH
    left = left_of(row, start, BLOCK * TILES)
    beta, one_minus_beta = tl.load(betas + 2 * tensor), tl.load(betas + 2 * tensor + 1)
    bad = tl.zeros([BLOCK], tl.int32)
    low = tl.full([BLOCK], INFINITE, tl.int32)
    high = tl.full([BLOCK], MINUS_INFINITE, tl.int32)
    full = (left == BLOCK * TILES) & (tl.load(row + _ALIGNED) != 0)
    blocks: tl.constexpr = STORAGE == BLOCK8
    if blocks:
        full = full & (is_ragged(row + _ROW) == 0)
    step, noise = None, None
    if steps is not None:
        step = tl.load(steps + tensor)
        full = full & (has_gaps(row + _PLACE) == 0)
        noise = begun(row + _PLACE, step, start)
    if full:
        for tile in range(TILES):
            bad, low, high = _advance_tile(
                row, beta, one_minus_beta, grad_factor, start, tile * BLOCK, left, bad, low, high, step, noise,
                KEEP_FINITE, STORAGE, BLOCK, TILES, True,
            )  # fmt: skip
    else:
        for tile in range(tl.cdiv(left, BLOCK)):
            bad, low, high = _advance_tile(
                row, beta, one_minus_beta, grad_factor, start, tile * BLOCK, left, bad, low, high, step, noise,
                KEEP_FINITE, STORAGE, BLOCK, TILES, False,
            )  # fmt: skip
    lowest = tl.min(low)
    if lowest < INFINITE:  # there is a valid entry: without one the range stays as it is
        layer = ranges + 2 * tl.load(row + _LAYER)
        tl.atomic_min(layer, lowest, sem="relaxed")
        tl.atomic_max(layer + 1, tl.max(high), sem="relaxed")
    count = tl.sum(bad)
    if count > 0:
        # read again: keeping the number through the loops took a register more than there are
        tensor, start = located(chunks, number, BLOCK * TILES)
        tl.atomic_add(nonfinite + tensor, count.to(tl.int64), sem="relaxed")


@triton.jit
def _advance_tile(
    row, beta, one_minus_beta, grad_factor, start, first, left, bad, low, high, step, noise,
    KEEP_FINITE: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Advance the tile at position `first` of the chunk; return the counts and bounds updated with it."""
    where = tile_at(row + _ROW, start, first, left, BLOCK, FULL, STORAGE == BLOCK8)
    start, at, left, _block, _blocks = where
    importance = read_stored(tl.load(row + _IMPORTANCE), row + _SCALES, where, STORAGE, BLOCK, FULL, False)
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
        shared = None
        if noise is not None:
            shared = mixed(noise, row + _PLACE, step, start, at, left, bits_of(grad), BLOCK * TILES, FULL)
        importance = write_stored(
            tl.load(row + _IMPORTANCE), row + _SCALES, where, importance, shared, STORAGE,
            OF_IMPORTANCE if KEEP_FINITE else of_slot(1), not KEEP_FINITE, BLOCK, FULL, False,
        )  # fmt: skip
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
    tensor, start = located(chunks, tl.program_id(0), BLOCK * TILES)
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
    sum_at = pointer(tl.load(row + _SUM), start, tl.float32)
    summed = tl.load(row + _SUM) != 0
    # both before the gradient, whose dtype decides a branch in which it is waited for, and before the first write
    total = read(sum_at, at, left, FULL, summed)
    square_total = read(square_sum_at, at, left, FULL)
    grad = read_as_float32(tl.load(row + _SUMS_GRAD), tl.load(row + _SUMS_GRAD_DTYPE), start, at, left, FULL)
    if summed:
        write(sum_at, at, total + grad, left, FULL)
    write(square_sum_at, at, square_total + noticed(grad * grad), left, FULL)


def _compact(name: str, storage: Storage, instructions: int, **changes: Any) -> Variant:
    """Return a variant with importances in a compact storage, rounded stochastically."""
    arguments = {**_ARGUMENTS, "KEEP_FINITE": True, "steps": "*fp32", "STORAGE": CODES[storage.dtype], **changes}
    # the code reads float32 gradients 128 bits at a time; a scale is a write of its own
    writes = {32: 2} if storage is OF_BLOCK8 else {64: 1}
    return Variant(name, importance_kernel, arguments, 4 + 2 * storage.bytes, instructions, {128: 1}, writes, 72)


_TABLES = {"rows": "*i64", "chunks": "*i64"}
_ARGUMENTS = {
    **_TABLES,
    "betas": "*fp32",
    "ranges": "*i32",
    "nonfinite": "*i64",
    "grad_factor": None,
    "steps": None,
    "STORAGE": FLOAT32.value,
    "due": None,
    "CHUNKS": None,
}
VARIANTS = (
    # the code reads all three dtypes of a gradient: 128 bits at a time for float32, 64 for the others
    Variant("importance", importance_kernel, {**_ARGUMENTS, "KEEP_FINITE": True}, 12, 40, {128: 2}, {128: 1}),
    Variant(
        "importance with a factor",
        importance_kernel,
        {**_ARGUMENTS, "KEEP_FINITE": True, "grad_factor": "*fp32"},
        12,
        40,
        {128: 2},
        {128: 1},
    ),
    Variant(
        "importance where it may be due",
        importance_kernel,
        {**_ARGUMENTS, "KEEP_FINITE": True, "due": "*fp32", "CHUNKS": "i32"},
        12,
        40,
        {128: 2},
        {128: 1},
    ),
    Variant("importance in v", importance_kernel, {**_ARGUMENTS, "KEEP_FINITE": False}, 12, 38, {128: 2}, {128: 1}),
    _compact("importance in bfloat16", BFLOAT16, 60),
    _compact("importance in blocks of 8 bits", OF_BLOCK8, 108),
    _compact("importance in v, in blocks of 8 bits", OF_BLOCK8, 108, KEEP_FINITE=False),
    # the code waits for a gradient of one 16-bit dtype before it reads one of the other
    Variant("gradient sums", gradient_sums_kernel, _TABLES, 20, 20, {128: 3}, {128: 2}, late_reads=1),
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
        scales: Sequence[Tensor | None],
        places: Sequence[Place],
    ) -> None:
        self._row_major = bool(places)
        flat = Flat(written=[importances], read=[grads], row_major=self._row_major)
        self._strided, self._keep_finite, self._betas = flat.strided, keep_finite, betas.float()
        self._device, self._layers = device, max(layers, default=0) + 1
        kinds = tiles.dtype_codes(importances)
        self._table = Table(IMPORTANCE.words, table_sizes(importances, tiles.BLOCK), tiles.CHUNK, device, kinds)
        self._table.point("importance", flat.written[0])
        self._table.set("grad_dtype", tiles.dtype_codes(grads))
        self._table.set("layer", layers)
        self._table.set("row", [row_length(importance) for importance in importances])
        if places:
            place_in(self._table, places)
        if scales:
            self._table.point("scales", scales)

    def advance_(
        self,
        importances: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        ranges: Tensor | None,
        nonfinite: Tensor,
        grad_factor: Tensor | None,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
        steps: Tensor | None,
    ) -> None:
        """Advance where there is a gradient, extend the ranges if they are wanted."""
        if ranges is None:  # the kernel always extends some
            ranges = torch.zeros(self._layers, 2, dtype=torch.float32, device=self._device)
        table, flat = self._table, None
        if self._strided:  # the copies have new addresses in each refresh
            flat = Flat(written=[importances], read=[grads], strided=self._strided, row_major=self._row_major)
            table.point("importance", flat.written[0])
            grads = flat.read[0]
        table.point("grad", grads)
        rows, betas = table.rows(), on_device(self._betas, ranges.device)
        for kind, chunks in table.chunks_of.items():
            rounded = kind != FLOAT32.value and self._row_major
            tiles.launch_where_due(
                importance_kernel,
                chunks.numel(),
                ranges.device,
                due,
                rows,
                chunks,
                betas,
                ranges.view(torch.int32),
                nonfinite,
                grad_factor,
                self._keep_finite,
                tiles.BLOCK,
                tiles.TILES,
                steps if rounded else None,
                kind,
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
