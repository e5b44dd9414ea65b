"""The threshold in Triton: histograms of score keys, the digit that they decide, and the locks, without the host."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import bits_of, float_of, is_locked, score, with_lock
from epi_kernels.ops.stored import BFLOAT16, BLOCK8, FLOAT32, is_ragged, read_stored, tile_at
from epi_kernels.ops.table import zeros
from epi_kernels.ops.threshold.rows import Scored
from epi_kernels.ops.tiles import Variant, chunks_due, left_of, located, pointer, read, words, write
from epi_kernels.schema import SCORE
from epi_kernels.storage import BFLOAT16 as OF_BFLOAT16
from epi_kernels.storage import BLOCK8 as OF_BLOCK8
from epi_kernels.storage import CODES, Storage
from epi_kernels.storage import FLOAT32 as OF_FLOAT32
from epi_kernels.storage.block8_triton import decoded, read_scales
from epi_kernels.storage.half_triton import of_bfloat16

_WIDTH = tl.constexpr(len(SCORE.words))
_IMPORTANCE, _LAYER, _BUDGET, _ALIGNED = words(SCORE, "importance", "layer", "budget", "aligned")
_SCALES, _ROW = words(SCORE, "scales", "row")

# The number of histograms for each budget, among which the programs are divided: atomics on equal scores go to one
# address and wait for one another. `select_kernel` adds the histograms up, not the host.
COPIES = 32


@triton.jit
def score_histogram_kernel(
    rows,
    chunks,
    ranges,
    selection,
    counts,
    BUDGETS,
    COPIES: tl.constexpr,
    SHIFT: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    STORAGE: tl.constexpr = FLOAT32,
    due=None,
    CHUNKS=None,
):
    """Count the digits of every chunk of every tensor.

    rows: int64 [tensors, words of SCORE]. ranges: float32 [layers, 2], or None. selection: int64 [budgets, 2]. counts:
    int64 [COPIES, budgets, 1 << DIGIT_BITS]. STORAGE: of the importances. due, CHUNKS: see
    `epi_kernels.ops.tiles.launch_where_due`.
    """
    if due is None:
        _count_chunk(
            rows, chunks, tl.program_id(0), ranges, selection, counts, BUDGETS,
            COPIES, SHIFT, DIGIT_BITS, BLOCK, TILES, STORAGE,
        )  # fmt: skip
    else:
        for number in range(tl.program_id(0), chunks_due(due, CHUNKS), tl.num_programs(0)):
            _count_chunk(
                rows, chunks, number, ranges, selection, counts, BUDGETS,
                COPIES, SHIFT, DIGIT_BITS, BLOCK, TILES, STORAGE,
            )  # fmt: skip


@triton.jit
def _count_chunk(
    rows, chunks, number, ranges, selection, counts, BUDGETS,
    COPIES: tl.constexpr, SHIFT: tl.constexpr, DIGIT_BITS: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, STORAGE: tl.constexpr,
):  # fmt: skip
    """Count the digits of one chunk of one tensor."""
    tensor, start = located(chunks, number, BLOCK * TILES)
    row = rows + tensor * _WIDTH
    left = left_of(row, start, BLOCK * TILES)
    budget = tl.load(row + _BUDGET)
    prefix = tl.load(selection + 2 * budget).to(tl.int32)
    histogram = counts + ((tl.program_id(0) % COPIES) * BUDGETS + budget) * (1 << DIGIT_BITS)
    address = tl.load(row + _IMPORTANCE)
    low, high = _range(ranges, tl.load(row + _LAYER))
    # most scores may be 0, and in a constant layer all are: they are counted apart, not to queue for one address
    zeros = tl.zeros([BLOCK], tl.int32)
    one = tl.full([BLOCK], 1, tl.int64)
    for tile in range(tl.cdiv(left, BLOCK)):
        where = tile_at(row + _ROW, start, tile * BLOCK, left, BLOCK, False, STORAGE == BLOCK8)
        _start, at, end, _block, _blocks = where
        inside = at < end
        # an entry at a time: with 128 bits, the compiler moved each tile through shared memory for the atomics, with 11
        # barriers
        importance = read_stored(address, row + _SCALES, where, STORAGE, BLOCK, False, True)
        key = bits_of(score(importance, low, high, ranges is not None))
        counted = ((key >> (SHIFT + DIGIT_BITS)) == prefix) & (key != 0)
        zeros += ((key == 0) & inside).to(tl.int32)
        digit = (key >> SHIFT) & ((1 << DIGIT_BITS) - 1)
        tl.atomic_add(histogram + digit, one, mask=counted & inside, sem="relaxed")
    count = tl.sum(zeros)
    if (prefix == 0) & (count > 0):
        tl.atomic_add(histogram, count.to(tl.int64), sem="relaxed")


@triton.jit
def _range(ranges, layer):
    """Return (low, high) of a layer; without ranges, two numbers that are not used."""
    if ranges is None:
        low, high = 0.0, 0.0
    else:
        low, high = tl.load(ranges + 2 * layer), tl.load(ranges + 2 * layer + 1)
    return low, high


@triton.jit
def select_kernel(counts, selection, thresholds, BUDGETS, COPIES, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """Find the digit of one budget. counts: int64 [COPIES, budgets, BINS]; selection, thresholds: written."""
    budget = tl.program_id(0)
    bins = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int64)
    copy = counts + budget * BINS
    for _ in range(COPIES):
        count += tl.load(copy + bins)
        copy += BUDGETS * BINS
    reached = tl.cumsum(count, 0, reverse=True)  # number of scores in this bin and above
    prefix = tl.load(selection + 2 * budget)
    remaining = tl.load(selection + 2 * budget + 1)
    skipped = tl.minimum(tl.sum((reached < remaining).to(tl.int32)), BINS - 1)
    above = tl.sum(tl.where(bins == BINS - skipped, reached, 0))
    prefix = prefix * BINS + (BINS - 1 - skipped)
    tl.store(selection + 2 * budget, prefix)
    tl.store(selection + 2 * budget + 1, remaining - above)
    threshold = float_of((prefix << SHIFT).to(tl.int32))
    tl.store(thresholds + budget, tl.where(remaining > 0, threshold, float("inf")))


@triton.jit
def lock_kernel(
    rows,
    chunks,
    ranges,
    thresholds,
    counts,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    STORAGE: tl.constexpr = FLOAT32,
    due=None,
    CHUNKS=None,
):
    """Lock every chunk of every tensor.

    rows: int64 [tensors, words of SCORE]. ranges: float32 [layers, 2], or None. thresholds: float32 [budgets]. counts:
    int64 [tensors, 3]; the kernel adds to them. STORAGE: of the importances. due, CHUNKS: see
    `epi_kernels.ops.tiles.launch_where_due`.
    """
    if due is None:
        _lock_chunk(rows, chunks, tl.program_id(0), ranges, thresholds, counts, BLOCK, TILES, STORAGE)
    else:
        for number in range(tl.program_id(0), chunks_due(due, CHUNKS), tl.num_programs(0)):
            _lock_chunk(rows, chunks, number, ranges, thresholds, counts, BLOCK, TILES, STORAGE)


@triton.jit
def _lock_chunk(
    rows, chunks, number, ranges, thresholds, counts,
    BLOCK: tl.constexpr, TILES: tl.constexpr, STORAGE: tl.constexpr,
):  # fmt: skip
    """Lock one chunk of one tensor."""
    tensor, start = located(chunks, number, BLOCK * TILES)
    row = rows + tensor * _WIDTH
    left = left_of(row, start, BLOCK * TILES)
    address = tl.load(row + _IMPORTANCE)
    low, high = _range(ranges, tl.load(row + _LAYER))
    threshold = tl.load(thresholds + tl.load(row + _BUDGET))
    locked = tl.zeros([BLOCK], tl.int32)
    newly = tl.zeros([BLOCK], tl.int32)
    released = tl.zeros([BLOCK], tl.int32)
    full = (left == BLOCK * TILES) & (tl.load(row + _ALIGNED) != 0)
    if STORAGE == BLOCK8:
        full = full & (is_ragged(row + _ROW) == 0)
    if full:
        for tile in range(TILES):
            locked, newly, released = _lock_tile(
                row, address, low, high, threshold, start, tile * BLOCK, left, locked, newly, released,
                ranges is not None, STORAGE, BLOCK, TILES, True,
            )  # fmt: skip
    else:
        for tile in range(tl.cdiv(left, BLOCK)):
            locked, newly, released = _lock_tile(
                row, address, low, high, threshold, start, tile * BLOCK, left, locked, newly, released,
                ranges is not None, STORAGE, BLOCK, TILES, False,
            )  # fmt: skip
    # most chunks have nothing to add: else all would queue for three words
    _add(counts + 3 * tensor, tl.sum(locked))
    _add(counts + 3 * tensor + 1, tl.sum(newly))
    _add(counts + 3 * tensor + 2, tl.sum(released))


@triton.jit
def _add(count, more):
    """Add to a count on the device, if there is anything to add."""
    if more > 0:
        tl.atomic_add(count, more.to(tl.int64), sem="relaxed")


@triton.jit
def _lock_tile(
    row, address, low, high, threshold, start, first, left, locked, newly, released,
    NORMALIZED: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Lock one tile; return the counts updated with it, entry by entry."""
    where = tile_at(row + _ROW, start, first, left, BLOCK, FULL, STORAGE == BLOCK8)
    start, at, left, block, blocks = where
    # past the end zeros are read: they were not locked before, and their score of 0 is not locked now
    if STORAGE == FLOAT32:
        stored_at = pointer(address, start, tl.float32)
        stored = read(stored_at, at, left, FULL)
        importance = stored
    elif STORAGE == BFLOAT16:
        stored_at = pointer(address, start, tl.int16)
        stored = read(stored_at, at, left, FULL)
        importance = of_bfloat16(stored)
    else:
        stored_at = pointer(address, start, tl.uint8)
        stored = read(stored_at, at, left, FULL)
        importance = decoded(stored, read_scales(tl.load(row + _SCALES), block, blocks, BLOCK, FULL))
    value = score(importance, low, high, NORMALIZED)
    before = is_locked(importance)
    after = (value >= threshold) & (value > 0)
    # only the bit of the lock changes, in whatever storage
    if STORAGE == FLOAT32:
        stored = with_lock(stored, after)
    elif STORAGE == BFLOAT16:
        stored = (stored & 0x7FFF) | tl.where(after, -0x8000, 0).to(tl.int16)
    else:
        stored = (stored & 127) | tl.where(after, 128, 0).to(tl.uint8)
    write(stored_at, at, stored, left, FULL)
    locked += after.to(tl.int32)
    newly += (after & (before == 0)).to(tl.int32)
    released += (before & (after == 0)).to(tl.int32)
    return locked, newly, released


_TABLES = {"rows": "*i64", "chunks": "*i64", "ranges": "*fp32", "due": None, "CHUNKS": None}


def _histogram(
    name: str, shift: int, bits: int, storage: Storage = OF_FLOAT32, limit: int = 57, **more: Any
) -> Variant:
    changes = {"STORAGE": CODES[storage.dtype], **more}
    arguments = {**_TABLES, "selection": "*i64", "counts": "*i64", "BUDGETS": "i32", "COPIES": COPIES, **changes}
    # 32 bits at a time, see the kernel. A division and an atomic for each entry take 1.3 to 1.4 times as long as
    # reading its 4 bytes (51 instructions with Triton 3.7, 56 with 3.6). The histogram in csrc/cuda does not exceed
    # that time
    arguments |= {"SHIFT": shift, "DIGIT_BITS": bits}
    return Variant(name, score_histogram_kernel, arguments, storage.bytes, limit, {}, {})


def _select(bins: int, registers: int) -> Variant:
    arguments = {"counts": "*i64", "selection": "*i64", "thresholds": "*fp32", "BUDGETS": "i32", "COPIES": "i32"}
    # one program for each budget, which reads a few thousand numbers
    return Variant(
        f"digit of {bins}", select_kernel, {**arguments, "SHIFT": 0, "BINS": bins}, 0, None, {}, {}, registers
    )


def _lock(name: str, instructions: int, storage: Storage = OF_FLOAT32, **changes: Any) -> Variant:
    arguments = {**_TABLES, "thresholds": "*fp32", "counts": "*i64", "STORAGE": CODES[storage.dtype], **changes}
    bits = 32 * int(storage.bytes)
    return Variant(name, lock_kernel, arguments, storage.bytes + int(storage.bytes), instructions, {bits: 1}, {bits: 1})


VARIANTS = (
    _histogram("histogram, first digit", 19, 12),
    _histogram("histogram where it may be due", 19, 12, due="*fp32", CHUNKS="i32"),
    _histogram("histogram, second digit", 9, 10),
    _histogram("histogram, third digit", 0, 9),
    _histogram("histogram of S itself", 19, 12, ranges=None),
    _select(4096, 128),
    _select(1024, 64),
    _select(512, 64),
    _lock("lock", 46),
    # with 67 on sm_100, a processor holds 7 programs and not 8: nobody waits for a refresh in a graph
    _lock("lock where it may be due", 46, due="*fp32", CHUNKS="i32")._replace(registers=72),
    _lock("lock by S itself", 25, ranges=None),
    _histogram("histogram of bfloat16", 19, 12, OF_BFLOAT16, 61),
    _histogram("histogram of blocks of 8 bits", 19, 12, OF_BLOCK8, 95),
    _lock("lock in bfloat16", 50, OF_BFLOAT16),
    _lock("lock in blocks of 8 bits", 60, OF_BLOCK8),
)


class Histogram(Scored):
    """The histograms of a fixed list of importances; contract: `epi_kernels.ops.prepared_histogram`."""

    tile = tiles.BLOCK

    def chunk(self) -> int:
        """Return the number of entries in a chunk."""
        return tiles.CHUNK

    def count(
        self,
        importances: Sequence[Tensor],
        ranges: Tensor | None,
        selection: Tensor,
        shift: int,
        bins: int,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
    ) -> Tensor:
        """Count the scores of each budget by one digit of their bits."""
        table, flat = self.table, self.placed(importances)
        # several budgets already spread the entries over addresses, and each copy costs 32 KiB for each budget
        copies = max(1, COPIES // max(1, len(selection)))
        counts = zeros((copies, len(selection), bins), torch.int64, selection.device)
        rows = table.rows()
        for kind, chunks in table.chunks_of.items():
            tiles.launch_where_due(
                score_histogram_kernel,
                chunks.numel(),
                selection.device,
                due,
                rows,
                chunks,
                ranges,
                selection,
                counts,
                len(selection),
                copies,
                shift,
                bins.bit_length() - 1,
                tiles.BLOCK,
                tiles.TILES,
                kind,
            )
        del flat  # the copies that it holds had to live until now
        return counts


def select_digit_(counts: Tensor, selection: Tensor, shift: int) -> Tensor:
    """Find one digit of each k-th largest score; contract: `epi_kernels.ops.select_digit_`."""
    copies, budgets, bins = counts.shape
    thresholds = torch.empty(budgets, dtype=torch.float32, device=counts.device)
    tiles.launch(select_kernel, budgets, counts.device, counts, selection, thresholds, budgets, copies, shift, bins)
    return thresholds


class Lock(Scored):
    """The lock of a fixed list of importances; contract: `epi_kernels.ops.prepared_lock`."""

    tile = tiles.BLOCK

    def chunk(self) -> int:
        """Return the number of entries in a chunk."""
        return tiles.CHUNK

    def lock_(
        self,
        importances: Sequence[Tensor],
        ranges: Tensor | None,
        thresholds: Tensor,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
    ) -> Tensor:
        """Lock every entry whose score reaches its budget's threshold."""
        table, flat = self.table, self.placed(importances)
        counts = zeros((len(importances), 3), torch.int64, thresholds.device)
        rows = table.rows()
        for kind, chunks in table.chunks_of.items():
            tiles.launch_where_due(
                lock_kernel,
                chunks.numel(),
                thresholds.device,
                due,
                rows,
                chunks,
                ranges,
                thresholds,
                counts,
                tiles.BLOCK,
                tiles.TILES,
                kind,
            )
        if flat is not None:
            flat.write_back()
        return counts
