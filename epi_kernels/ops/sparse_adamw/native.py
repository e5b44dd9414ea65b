"""One AdamW step of selected entries in C++ on the CPU; kernel: csrc/cpu/sparse_adamw.cpp."""

from collections.abc import Sequence

from torch import Tensor

from epi_kernels.backends import native
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
        flat = Flat(written=[exp_avgs, exp_avg_sqs])
        self._strided = flat.strided
        offsets = Offsets(params, grads, indices)
        self._table = native.table_of(
            native.SPARSE_TENSOR,
            exp_avg=flat.written[0],
            exp_avg_sq=flat.written[1],
            param=params,
            grad=grads,
            param_offsets=offsets.of_params,
            grad_offsets=offsets.of_grads,
        )
        self._table["wide_offsets"] = offsets.wide
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
                self._table[field] = native.addresses(tensors)
        self._table["grad"] = native.addresses(grads)
        self._table["scalars"] = scalars.float().numpy()[rows]
        native.call("epi_sparse_adamw", self._table)
        flat.write_back()
