"""One AdamW step in which locked entries do not move, in C++ on the CPU; kernel: csrc/cpu/masked_adamw.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.backends import native
from epi_kernels.ops.flat import Flat

_WRITTEN = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "lock")


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.Sweep`."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        locks: Sequence[Tensor | None],
        lock_in: str,
        lockable: Sequence[bool],
    ) -> None:
        flat = Flat(written=[params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks], read=[grads])
        written = dict(zip(_WRITTEN, flat.written, strict=True))
        self._table = native.table_of(native.ADAMW_TENSOR, **written, grad=flat.read[0])
        self._strided = flat.strided
        self._table["lock_in"] = [native.LOCK_IN[lock_in] if can else 0 for can in lockable]

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        locks: Sequence[Tensor | None],
        moved: bool,
        nonfinite: Tensor,
        scalars: Tensor,
        rows: Sequence[int],
        advanced: bool | Tensor,
        grad_factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take the step."""
        if found_inf is not None and found_inf.item():
            return
        written = [params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks]
        flat = Flat(written=written, read=[grads], strided=self._strided)
        if moved or self._strided:  # copies are somewhere else in each step
            for field, tensors in zip(_WRITTEN, flat.written, strict=True):
                self._table[field] = native.addresses(tensors)
        self._table["grad"] = native.addresses(flat.read[0])
        values = scalars.float().numpy()
        if grad_factor is not None:
            values[:, 0] *= grad_factor.item()  # the sign of the gradient, which multiplies it wherever it is used
        self._table["scalars"] = values[rows]
        self._table["nonfinite"] = 0
        native.call("epi_masked_adamw", self._table, bool(advanced))
        nonfinite += torch.from_numpy(self._table["nonfinite"].copy())
        flat.write_back()
