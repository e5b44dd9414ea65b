"""One AdamW step in which locked entries do not move, in C++ on the CPU; kernel: csrc/cpu/masked_adamw.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import native
from epi_kernels.ops.flat import Flat

_LOCK_IN = {"none": 0, "importance": 1, "exp_avg_sq": 2, "static": 3}  # enum epi_lock_in


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    locks: Sequence[Tensor],
    nonfinite: Tensor,
    scalars: Tensor,
    lock_in: str,
    advanced: bool,
) -> None:
    """Step every tensor of the lists in place; contract: `epi_kernels.ops.masked_adamw_`."""
    flat = Flat(written=[params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks], read=[grads])
    table = native.table_of(
        native.ADAMW_TENSOR,
        param=flat.written[0],
        grad=flat.read[0],
        exp_avg=flat.written[1],
        exp_avg_sq=flat.written[2],
        max_exp_avg_sq=flat.written[3],
        lock=flat.written[4],
    )
    table["scalars"] = scalars.float().numpy()
    native.call("epi_masked_adamw", table, _LOCK_IN[lock_in], advanced)
    nonfinite += torch.from_numpy(table["nonfinite"].copy())
    flat.write_back()
