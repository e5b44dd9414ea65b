"""One AdamW step of selected entries in C++ on the CPU; kernel: csrc/cpu/sparse_adamw.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import native
from epi_kernels.ops.flat import Flat


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
) -> None:
    """Step the selected entries in place; contract: `epi_kernels.ops.sparse_adamw_`."""
    flat = Flat(written=[exp_avgs, exp_avg_sqs])
    # strides can carry an offset beyond int32, an index alone cannot
    wide = any(chosen.dtype == torch.int64 for chosen in indices) or not all(
        tensor.is_contiguous() for tensor in (*params, *grads)
    )
    # kept until the call is over: the table holds their addresses alone
    param_offsets = [_offsets(param, chosen, wide) for param, chosen in zip(params, indices, strict=True)]
    grad_offsets = [
        known if grad.stride() == param.stride() else _offsets(grad, chosen, wide)
        for param, grad, chosen, known in zip(params, grads, indices, param_offsets, strict=True)
    ]
    table = native.table_of(
        native.SPARSE_TENSOR,
        exp_avg=flat.written[0],
        exp_avg_sq=flat.written[1],
        param=params,
        grad=grads,
        param_offsets=param_offsets,
        grad_offsets=grad_offsets,
    )
    table["wide_offsets"] = wide
    table["scalars"] = scalars.float().numpy()
    native.call("epi_sparse_adamw", table)
    flat.write_back()


def _offsets(tensor: Tensor, indices: Tensor, wide: bool) -> Tensor:
    """Return where the entries at row-major positions of `tensor` lie, in entries from its first."""
    if tensor.is_contiguous():
        return indices.to(torch.int64 if wide else torch.int32).contiguous()
    rest = indices.long()
    offsets = torch.zeros_like(rest)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        offsets += rest % size * stride
        rest = rest // size
    return offsets
