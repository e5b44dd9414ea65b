"""One AdamW step in which locked entries do not move, in C++ on the CPU; kernel: csrc/cpu/masked_adamw.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import native
from epi_kernels.ops.flat import Flat


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
        self._flat = Flat(written=[params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks], read=[grads])
        self._table = native.table_of(
            native.ADAMW_TENSOR,
            param=self._flat.written[0],
            grad=self._flat.read[0],
            exp_avg=self._flat.written[1],
            exp_avg_sq=self._flat.written[2],
            max_exp_avg_sq=self._flat.written[3],
            lock=self._flat.written[4],
        )
        self._table["lock_in"] = [native.LOCK_IN[lock_in] if can else 0 for can in lockable]

    def step_(
        self,
        grads: Sequence[Tensor],
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
        (flat,) = self._flat.load([grads])
        self._table["grad"] = native.addresses(flat)
        values = scalars.float().numpy()
        if grad_factor is not None:
            values[:, 0] *= grad_factor.item()  # the sign of the gradient, which multiplies it wherever it is used
        self._table["scalars"] = values[rows]
        self._table["nonfinite"] = 0
        native.call("epi_masked_adamw", self._table, bool(advanced))
        nonfinite += torch.from_numpy(self._table["nonfinite"].copy())
        self._flat.write_back()
