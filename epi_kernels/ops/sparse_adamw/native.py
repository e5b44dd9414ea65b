"""One AdamW step of selected entries in C++ on the CPU; kernel: csrc/cpu/sparse_adamw.cpp."""

from collections.abc import Sequence

from torch import Tensor

from epi_kernels import native
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.sparse_adamw.offsets import Offsets


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
        self._flat = Flat(written=[exp_avgs, exp_avg_sqs])
        offsets = Offsets(params, grads, indices)
        self._table = native.table_of(
            native.SPARSE_TENSOR,
            exp_avg=self._flat.written[0],
            exp_avg_sq=self._flat.written[1],
            param=params,
            grad=grads,
            param_offsets=offsets.of_params,
            grad_offsets=offsets.of_grads,
        )
        self._table["wide_offsets"] = offsets.wide
        self._kept = (list(params), offsets)  # the table holds their addresses alone

    def step_(self, grads: Sequence[Tensor], scalars: Tensor, rows: Sequence[int]) -> None:
        """Take the step."""
        self._flat.load([])
        self._table["grad"] = native.addresses(grads)
        self._table["scalars"] = scalars.float().numpy()[rows]
        native.call("epi_sparse_adamw", self._table)
        self._flat.write_back()
