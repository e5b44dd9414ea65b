"""One AdamW step in which locked entries do not move, in Triton: one launch for all tensors of a pair of dtypes."""

from collections import Counter
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.backends.native import LOCK_IN as LOCK_IN_CODES
from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import (
    advanced_importance,
    first_moment,
    is_finite,
    is_locked,
    magnitude,
    maximum,
    moved,
    second_moment,
)
from epi_kernels.ops.masked_adamw.sweep import FIELDS, TableSweep
from epi_kernels.ops.tiles import Variant, left_of, located, pointer, read, write

_WIDTH = tl.constexpr(len(FIELDS))

NONE, IMPORTANCE, EXP_AVG_SQ, STATIC = (
    tl.constexpr(LOCK_IN_CODES[name]) for name in ("none", "importance", "exp_avg_sq", "static")
)


@triton.jit
def masked_adamw_kernel(
    rows,
    pieces,
    scalars,
    nonfinite,
    refreshed,
    grad_factor,
    found_inf,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    LOCK_IN: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ADVANCED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Step one piece of one tensor.

    rows: int64 [tensors, FIELDS]. scalars: float32 [.., 11], contract.Scalars. nonfinite: int64 [tensors].
    refreshed, grad_factor, found_inf: float32, or None. Where refreshed is not 0 it stands for ADVANCED.
    """
    tensor, start = located(pieces, BLOCK * TILES)
    row = rows + tensor * _WIDTH
    left = left_of(row, start, BLOCK * TILES)
    full = (left == BLOCK * TILES) & (tl.load(row + 8) != 0)
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) == 0, left, 0)
    tiles = tl.cdiv(left, BLOCK)
    bad = tl.zeros([BLOCK], tl.int32)
    if full:
        for tile in range(tiles):
            bad += _step_tile(
                row, scalars, refreshed, grad_factor, start, tile * BLOCK, left,
                PARAM, GRAD, LOCK_IN, AMSGRAD, ADVANCED, BLOCK, True,
            )  # fmt: skip
    else:
        for tile in range(tiles):
            bad += _step_tile(
                row, scalars, refreshed, grad_factor, start, tile * BLOCK, left,
                PARAM, GRAD, LOCK_IN, AMSGRAD, ADVANCED, BLOCK, False,
            )  # fmt: skip
    if (LOCK_IN == IMPORTANCE or LOCK_IN == EXP_AVG_SQ) and not ADVANCED:
        count = tl.sum(bad)
        if count > 0:
            tl.atomic_add(nonfinite + tensor, count.to(tl.int64), sem="relaxed")


@triton.jit
def _step_tile(
    row,
    scalars,
    refreshed,
    grad_factor,
    start,
    first,
    left,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    LOCK_IN: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ADVANCED: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Step the tile at entry `first` of the piece; return where the squared gradient is not finite, int32 0 or 1."""
    s = scalars + tl.load(row + 7) * 11
    at = first + tl.arange(0, BLOCK)
    param_at = pointer(row + 1, start, PARAM)
    exp_avg_at = pointer(row + 3, start, tl.float32)
    exp_avg_sq_at = pointer(row + 4, start, tl.float32)
    max_exp_avg_sq_at = pointer(row + 5, start, tl.float32)
    importance_at = pointer(row + 6, start, tl.float32)
    lockable = tl.load(row + 6) != 0
    amsgrad = tl.load(row + 5) != 0

    # all reads before the first write, or the later ones would wait for the arithmetic
    param = read(param_at, at, left, FULL)
    grad = read(pointer(row + 2, start, GRAD), at, left, FULL).to(tl.float32)
    m = read(exp_avg_at, at, left, FULL)
    v = read(exp_avg_sq_at, at, left, FULL)
    importance = tl.zeros([BLOCK], tl.float32)
    locked = tl.zeros([BLOCK], tl.int1)
    largest = tl.zeros([BLOCK], tl.float32)
    if LOCK_IN == IMPORTANCE:
        if lockable:
            importance = read(importance_at, at, left, FULL)
    if LOCK_IN == STATIC:
        if lockable:
            locked = read(pointer(row + 6, start, tl.int8), at, left, FULL) < 0
    if AMSGRAD:
        if amsgrad:
            largest = read(max_exp_avg_sq_at, at, left, FULL)

    factor = tl.load(s)
    if grad_factor is not None:
        factor *= tl.load(grad_factor)
    grad *= factor
    if not FULL and grad_factor is not None:
        # beyond the end zeros are read, and 0 times a factor that is not finite is NaN, which would be counted
        grad = tl.where(at < left, grad, 0.0)
    bad = tl.zeros([BLOCK], tl.int32)
    if (LOCK_IN == IMPORTANCE or LOCK_IN == EXP_AVG_SQ) and not ADVANCED:
        counted = lockable
        if refreshed is not None:
            counted = lockable & (tl.load(refreshed) == 0)
        bad += tl.where(counted & (is_finite(grad * grad) == 0), 1, 0)

    m = first_moment(m, grad, tl.load(s + 3))
    write(exp_avg_at, at, m, left, FULL)

    beta2, one_minus_beta2 = tl.load(s + 4), tl.load(s + 5)
    plain = second_moment(magnitude(v), grad, beta2, one_minus_beta2)
    if LOCK_IN == EXP_AVG_SQ:
        if not ADVANCED:
            after = advanced_importance(v, grad, beta2, one_minus_beta2, False)
            if refreshed is not None:
                after = tl.where(tl.load(refreshed) == 0, after, v)
            v = after
        v = tl.where(lockable, v, plain)
        locked = lockable & is_locked(v)
    else:
        v = plain
    write(exp_avg_sq_at, at, v, left, FULL)

    if LOCK_IN == IMPORTANCE:
        locked = is_locked(importance)
        if not ADVANCED:
            after = advanced_importance(importance, grad, tl.load(s + 9), tl.load(s + 10), True)
            if refreshed is not None:
                after = tl.where(tl.load(refreshed) == 0, after, importance)
            importance = after
            if lockable:
                write(importance_at, at, importance, left, FULL)

    v = magnitude(v)
    if AMSGRAD:
        v = maximum(largest, v)  # where there is none it is 0
        if amsgrad:
            write(max_exp_avg_sq_at, at, v, left, FULL)

    theta = moved(
        param.to(tl.float32), m, v, tl.load(s + 1), tl.load(s + 6), tl.load(s + 7), tl.load(s + 8)
    ).to(PARAM)  # fmt: skip
    if LOCK_IN != NONE:
        # a selection of bits, never a product with 0: 0 * inf is NaN
        theta = tl.where(locked, param, theta)
    write(param_at, at, theta, left, FULL)
    return bad


def _variant(
    name: str, param: Any, grad: Any, lock_in: str, instructions: int, amsgrad: bool = False, **changes: object
) -> Variant:
    """Return a variant: p, g, m and v are read, p, m and v written, and what `lock_in` and AMSGrad add."""
    advanced = changes.get("ADVANCED", False)
    param_bits, grad_bits = (min(128, 4 * dtype.primitive_bitwidth) for dtype in (param, grad))
    reads, writes = Counter([param_bits, grad_bits, 128, 128]), Counter([param_bits, 128, 128])
    size = param_bits / 16 + grad_bits / 32 + 16
    if lock_in == "importance":
        reads[128] += 1
        writes[128] += not advanced
        size += 4 if advanced else 8
    if lock_in == "static":
        reads[32] += 1
        size += 1
    if amsgrad:
        reads[128] += 1
        writes[128] += 1
        size += 8
    arguments = {
        "rows": "*i64",
        "pieces": "*i64",
        "scalars": "*fp32",
        "nonfinite": "*i64",
        "refreshed": None,
        "grad_factor": None,
        "found_inf": None,
        "PARAM": param,
        "GRAD": grad,
        "LOCK_IN": LOCK_IN_CODES[lock_in],
        "AMSGRAD": amsgrad,
        "ADVANCED": False,
        **changes,
    }
    return Variant(name, masked_adamw_kernel, arguments, size, instructions, reads, writes)


VARIANTS = (
    _variant("AdamW, float32", tl.float32, tl.float32, "none", 73),
    _variant("EPI, float32", tl.float32, tl.float32, "importance", 95),
    _variant("EPI after a refresh, float32", tl.float32, tl.float32, "importance", 74, ADVANCED=True),
    _variant(
        "EPI, float32, factor and found_inf",
        tl.float32,
        tl.float32,
        "importance",
        95,
        grad_factor="*fp32",
        found_inf="*fp32",
    ),
    _variant("EPI in a graph, float32", tl.float32, tl.float32, "importance", 97, refreshed="*fp32"),
    _variant("EPI, float32, AMSGrad", tl.float32, tl.float32, "importance", 99, amsgrad=True),
    _variant("EPI, bfloat16", tl.bfloat16, tl.bfloat16, "importance", 101),
    _variant("EPI, bfloat16 with float32 gradients", tl.bfloat16, tl.float32, "importance", 99),
    _variant("EPI, S = exp_avg_sq, float32", tl.float32, tl.float32, "exp_avg_sq", 91),
    _variant("EPI, S = exp_avg_sq, bfloat16", tl.bfloat16, tl.bfloat16, "exp_avg_sq", 96),
    _variant("fixed mask, float32", tl.float32, tl.float32, "static", 77),
    _variant("fixed mask, bfloat16", tl.bfloat16, tl.bfloat16, "static", 83),
)


class Sweep(TableSweep):
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.Sweep`."""

    def _piece(self) -> int:
        return tiles.PIECE

    def _launch(
        self,
        scalars: Tensor,
        nonfinite: Tensor,
        advanced: bool,
        refreshed: Tensor | None,
        grad_factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        tiles.launch(
            masked_adamw_kernel,
            self._table.pieces.numel(),
            self._device,
            self._table.rows(),
            self._table.pieces,
            scalars,
            nonfinite,
            refreshed,
            grad_factor,
            found_inf,
            tiles.DTYPES[self._param_dtype],
            tiles.DTYPES[self._grad_dtype],
            LOCK_IN_CODES[self._lock_in],
            self._amsgrad,
            advanced,
            tiles.BLOCK,
            tiles.TILES,
        )
