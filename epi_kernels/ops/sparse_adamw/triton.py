"""One AdamW step of selected entries in Triton: gather, step and scatter, one launch for all tensors."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import first_moment, moved, second_moment
from epi_kernels.ops.flat import Flat, offsets_of
from epi_kernels.ops.table import Table, on_device
from epi_kernels.ops.tiles import Variant, located, read, scattered, write

# the words of a row; `size` counts the selected entries, offsets are int64
FIELDS = ("size", "param", "grad", "param_offsets", "grad_offsets", "exp_avg", "exp_avg_sq", "scalars")
_WIDTH = tl.constexpr(len(FIELDS))


@triton.jit
def sparse_adamw_kernel(
    rows, pieces, scalars, PARAM: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Step one piece of the selected entries of one tensor.

    rows: int64 [tensors, FIELDS]. scalars: float32 [.., 11], contract.Scalars.
    """
    tensor, start = located(pieces, BLOCK * TILES)
    row = rows + tensor * _WIDTH
    s = scalars + tl.load(row + 7) * 11
    left = tl.minimum(tl.load(row) - start, BLOCK * TILES).to(tl.int32)
    param_at = tl.load(row + 1).to(tl.pointer_type(PARAM))
    grad_at = tl.load(row + 2).to(tl.pointer_type(GRAD))
    exp_avg_at = scattered(row + 5, start, tl.float32)
    exp_avg_sq_at = scattered(row + 6, start, tl.float32)
    for tile in range(tl.cdiv(left, BLOCK)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        here = param_at + read(scattered(row + 3, start, tl.int64), at, left, False)
        there = grad_at + read(scattered(row + 4, start, tl.int64), at, left, False)
        grad = tl.load(there, mask=at < left, other=0).to(tl.float32) * tl.load(s)
        param = tl.load(here, mask=at < left, other=0).to(tl.float32)
        m = first_moment(read(exp_avg_at, at, left, False), grad, tl.load(s + 3))
        v = second_moment(read(exp_avg_sq_at, at, left, False), grad, tl.load(s + 4), tl.load(s + 5))
        theta = moved(param, m, v, tl.load(s + 1), tl.load(s + 6), tl.load(s + 7), tl.load(s + 8))
        write(exp_avg_at, at, m, left, False)
        write(exp_avg_sq_at, at, v, left, False)
        tl.store(here, theta.to(PARAM), mask=at < left)


def _variant(name: str, dtype: Any, size: int) -> Variant:
    arguments = {"rows": "*i64", "pieces": "*i64", "scalars": "*fp32", "PARAM": dtype, "GRAD": dtype}
    # a scatter: each entry of p and g is a sector of 32 bytes, which no width helps
    return Variant(name, sparse_adamw_kernel, arguments, size, 108, {}, {})


VARIANTS = (
    _variant("selected entries, float32", tl.float32, 44),
    _variant("selected entries, bfloat16", tl.bfloat16, 38),
)


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
    rows: Sequence[int],
) -> None:
    """Step the selected entries in place; contract: `epi_kernels.ops.sparse_adamw_`."""
    flat = Flat(written=[exp_avgs, exp_avg_sqs])
    # kept until the launch is queued: the table holds their addresses alone
    param_offsets = [offsets_of(param, chosen, torch.int64) for param, chosen in zip(params, indices, strict=True)]
    grad_offsets = [
        known if grad.stride() == param.stride() else offsets_of(grad, chosen, torch.int64)
        for param, grad, chosen, known in zip(params, grads, indices, param_offsets, strict=True)
    ]
    device = params[0].device
    table = Table(FIELDS, [chosen.numel() for chosen in indices], tiles.PIECE, device)
    for field, tensors in (
        ("param", params),
        ("grad", grads),
        ("param_offsets", param_offsets),
        ("grad_offsets", grad_offsets),
        ("exp_avg", flat.written[0]),
        ("exp_avg_sq", flat.written[1]),
    ):
        table.point(field, tensors)
    table.set("scalars", rows)
    tiles.launch(
        sparse_adamw_kernel,
        table.pieces.numel(),
        device,
        table.rows(),
        table.pieces,
        on_device(scalars.float(), device),
        tiles.DTYPES[params[0].dtype],
        tiles.DTYPES[grads[0].dtype],
        tiles.BLOCK,
        tiles.TILES,
    )
    flat.write_back()
