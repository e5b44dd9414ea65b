"""One AdamW step of selected entries in C++ on the CPU; kernel: csrc/cpu/sparse_adamw.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import native
from epi_kernels.ops.flat import Flat, offsets_of


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
    # strides can carry an offset beyond int32, an index alone cannot
    wide = any(chosen.dtype == torch.int64 for chosen in indices) or not all(
        tensor.is_contiguous() for tensor in (*params, *grads)
    )
    dtype = torch.int64 if wide else torch.int32
    # kept until the call is over: the table holds their addresses alone
    param_offsets = [offsets_of(param, chosen, dtype) for param, chosen in zip(params, indices, strict=True)]
    grad_offsets = [
        known if grad.stride() == param.stride() else offsets_of(grad, chosen, dtype)
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
    table["scalars"] = scalars.float().numpy()[rows]
    native.call("epi_sparse_adamw", table)
    flat.write_back()
