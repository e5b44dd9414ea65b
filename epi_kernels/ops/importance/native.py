"""Importance in C++ on the CPU; kernels: csrc/cpu/importance.cpp."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from epi_kernels import schema
from epi_kernels.backends import native
from epi_kernels.ops.flat import Flat
from epi_kernels.storage.noise import Place


class Importance:
    """The advance of a fixed list of importances; contract: `epi_kernels.ops.prepared_importance`."""

    def __init__(
        self,
        importances: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        betas: Tensor,
        layers: Sequence[int],
        keep_finite: bool,
        device: torch.device,
        scales: Sequence[Tensor | None],
        places: Sequence[Place],
    ) -> None:
        self._run, self._keep_finite = native.function("epi_importance"), keep_finite
        self._places = bool(places)
        flat = Flat(written=[importances], read=[grads], row_major=self._places)
        self._strided = flat.strided
        self._table = native.table_of(schema.IMPORTANCE.struct, importance=flat.written[0], grad=flat.read[0])
        self._table["beta"], self._table["one_minus_beta"] = betas.float().numpy().T
        self._table["layer"] = np.asarray(layers, np.int32)
        self._table["row"] = native.rows_of(importances)
        native.place(self._table, places)
        self._runs = self._table["run"].copy()
        if scales:
            self._table["scales"] = native.addresses(scales)

    def advance_(
        self,
        importances: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        ranges: Tensor | None,
        nonfinite: Tensor,
        grad_factor: Tensor | None,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
        steps: Tensor | None,
    ) -> None:
        """Advance where there is a gradient, extend the ranges if they are wanted."""
        if due is not None and not due:
            return
        table, flat = self._table, None
        if self._strided:  # the copies have new addresses in each refresh
            flat = Flat(written=[importances], read=[grads], strided=self._strided)
            table["importance"], grads = native.addresses(flat.written[0]), flat.read[0]
        table["grad"] = [0 if grad is None else grad.data_ptr() for grad in grads]
        if self._places:
            table["run"] = 0 if steps is None else self._runs  # without clocks there is no noise
            table["step"] = 0.0 if steps is None else steps.numpy()
        table["nonfinite"] = 0
        found = None if ranges is None else torch.empty(len(ranges), 2, dtype=torch.float32, device="cpu")
        address, layers = (None, 0) if found is None else (found.data_ptr(), len(found))
        factor, threads = 1.0 if grad_factor is None else grad_factor.item(), torch.get_num_threads()
        self._run(table.ctypes.data, len(table), address, layers, factor, self._keep_finite, threads)
        if ranges is not None and found is not None:
            ranges[:, 0].clamp_(max=found[:, 0])
            ranges[:, 1].clamp_(min=found[:, 1])
        if table["nonfinite"].any():
            nonfinite += torch.from_numpy(table["nonfinite"].copy())
        if flat is not None:
            flat.write_back()


def gradient_sums_(sums: Sequence[Tensor], square_sums: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add g and g^2 in place; contract: `epi_kernels.ops.gradient_sums_`."""
    flat = Flat(written=[sums, square_sums], read=[grads])
    table = native.table_of(schema.SUMS.struct, square_sum=flat.written[1], sum=flat.written[0], grad=flat.read[0])
    native.call("epi_gradient_sums", table)
    flat.write_back()
