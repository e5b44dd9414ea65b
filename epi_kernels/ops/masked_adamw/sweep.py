"""The step on a GPU but for the launch: the table of a list of tensors, kept from step to step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.ops.flat import Flat
from epi_kernels.ops.table import Table, on_device

# the words of a row. `lock` 0: this tensor cannot be locked; with lock_in="exp_avg_sq" any other number says it can.
# `scalars` is a row of the scalars
FIELDS = ("size", "param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "lock", "scalars", "aligned")

_WRITTEN = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "lock")


class TableSweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.Sweep`. A backend says how it is launched."""

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
        self._strided = flat.strided
        self._device = params[0].device
        self._table = Table(FIELDS, [param.numel() for param in params], self._piece(), self._device)
        self._point(flat)
        if lock_in == "exp_avg_sq":
            self._table.set("lock", lockable)
        self._param_dtype, self._grad_dtype = params[0].dtype, grads[0].dtype
        self._lock_in = lock_in
        self._amsgrad = any(tensor is not None for tensor in max_exp_avg_sqs)

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
        written = [params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks]
        flat = Flat(written=written, read=[grads], strided=self._strided)
        if moved or self._strided:  # copies are somewhere else in each step
            self._point(flat)
        self._table.point("grad", flat.read[0])
        self._table.set("scalars", rows)
        if self._table.pieces.numel():
            # float32: computed on the device, where the clocks are
            there = scalars if scalars.dtype == torch.float32 else on_device(scalars.float(), self._device)
            known, flag = (advanced, None) if isinstance(advanced, bool) else (False, advanced)
            self._launch(there, nonfinite, known, flag, grad_factor, found_inf)
        flat.write_back()

    def _point(self, flat: Flat) -> None:
        for field, tensors in zip(_WRITTEN, flat.written, strict=True):
            if any(tensor is not None for tensor in tensors):
                self._table.point(field, tensors)

    def _piece(self) -> int:
        """Return the number of entries that a program takes."""
        raise NotImplementedError

    def _launch(
        self,
        scalars: Tensor,
        nonfinite: Tensor,
        advanced: bool,
        refreshed: Tensor | None,
        grad_factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Launch the kernel over `_table`; scalars are float32 on the device.

        `refreshed`, one value on the device, stands for `advanced` where it is not 0.
        """
        raise NotImplementedError
