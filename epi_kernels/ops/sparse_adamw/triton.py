"""One AdamW step of selected entries in Triton: gather, step and scatter, one launch for all tensors."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import first_moment, moved, second_moment
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.sparse_adamw.offsets import Offsets
from epi_kernels.ops.table import Table, on_device
from epi_kernels.ops.tiles import Variant, left_of, located, read, scattered, write

# the words of a row; `size` counts the selected entries
FIELDS = ("size", "param", "grad", "param_offsets", "grad_offsets", "exp_avg", "exp_avg_sq", "scalars")
_WIDTH = tl.constexpr(len(FIELDS))

# A tile waits for its offsets, then for what lies there: pieces of several tiles would do that one after the other,
# and of few entries leave most of a GPU idle.
TILES = 1


@triton.jit
def sparse_adamw_kernel(
    rows,
    pieces,
    scalars,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Step one piece of the selected entries of one tensor.

    rows: int64 [tensors, FIELDS]. scalars: float32 [.., 11], contract.Scalars. OFFSET: int32 or int64.
    """
    tensor, start = located(pieces, BLOCK * TILES)
    row = rows + tensor * _WIDTH
    s = scalars + tl.load(row + 7) * 11
    left = left_of(row, start, BLOCK * TILES)
    param_at = tl.load(row + 1).to(tl.pointer_type(PARAM))
    grad_at = tl.load(row + 2).to(tl.pointer_type(GRAD))
    exp_avg_at = scattered(row + 5, start, tl.float32)
    exp_avg_sq_at = scattered(row + 6, start, tl.float32)
    for tile in range(tl.cdiv(left, BLOCK)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        here = param_at + read(scattered(row + 3, start, OFFSET), at, left, False)
        there = grad_at + read(scattered(row + 4, start, OFFSET), at, left, False)
        grad = tl.load(there, mask=at < left, other=0).to(tl.float32) * tl.load(s)
        param = tl.load(here, mask=at < left, other=0).to(tl.float32)
        m = first_moment(read(exp_avg_at, at, left, False), grad, tl.load(s + 3))
        v = second_moment(read(exp_avg_sq_at, at, left, False), grad, tl.load(s + 4), tl.load(s + 5))
        theta = moved(param, m, v, tl.load(s + 1), tl.load(s + 6), tl.load(s + 7), tl.load(s + 8))
        write(exp_avg_at, at, m, left, False)
        write(exp_avg_sq_at, at, v, left, False)
        tl.store(here, theta.to(PARAM), mask=at < left)


def _variant(name: str, dtype: Any, offset: Any, size: int, instructions: int | None = 108, **changes: Any) -> Variant:
    dtypes = {"PARAM": dtype, "GRAD": dtype, "OFFSET": offset}
    arguments = {"rows": "*i64", "pieces": "*i64", "scalars": "*fp32", **dtypes, **changes}
    # a scatter: each entry of p and g is a sector of 32 bytes, which no width helps
    return Variant(name, sparse_adamw_kernel, arguments, size, instructions, {}, {})


# bytes: p g m v and an offset, p m v; a gradient of the parameter's strides has the parameter's offsets. Instructions
# are counted in a loop, and one tile leaves none: it is the same code, once
VARIANTS = (
    _variant("selected entries, float32, as launched", tl.float32, tl.int32, 32, None, TILES=TILES),
    _variant("selected entries, float32", tl.float32, tl.int32, 32),
    _variant("selected entries, bfloat16", tl.bfloat16, tl.int32, 26),
    _variant("selected entries beyond 2^31, float32", tl.float32, tl.int64, 36),
)


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.SparseSweep`."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        indices: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
    ) -> None:
        flat = Flat(written=[exp_avgs, exp_avg_sqs])
        self._strided = flat.strided
        offsets = Offsets(params, grads, indices)
        self._device = params[0].device
        self._table = Table(FIELDS, [chosen.numel() for chosen in indices], tiles.BLOCK * TILES, self._device)
        for field, tensors in (
            ("param", params),
            ("param_offsets", offsets.of_params),
            ("grad_offsets", offsets.of_grads),
            ("exp_avg", flat.written[0]),
            ("exp_avg_sq", flat.written[1]),
        ):
            self._table.point(field, tensors)
        self._dtypes = (
            tiles.DTYPES[params[0].dtype],
            tiles.DTYPES[grads[0].dtype],
            tl.int64 if offsets.wide else tl.int32,
        )
        self._offsets = offsets.kept()

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        indices: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        scalars: Tensor,
        rows: Sequence[int],
    ) -> None:
        """Take the step."""
        flat = Flat(written=[exp_avgs, exp_avg_sqs], strided=self._strided)
        if self._strided:  # copies are somewhere else in each step
            for field, tensors in zip(("exp_avg", "exp_avg_sq"), flat.written, strict=True):
                self._table.point(field, tensors)
        self._table.point("grad", grads)
        self._table.set("scalars", rows)
        if self._table.pieces.numel():
            tiles.launch(
                sparse_adamw_kernel,
                self._table.pieces.numel(),
                self._device,
                self._table.rows(),
                self._table.pieces,
                on_device(scalars.float(), self._device),
                *self._dtypes,
                tiles.BLOCK,
                TILES,
            )
        flat.write_back()
