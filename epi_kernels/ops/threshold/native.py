"""The threshold in C++ on the CPU; kernels: csrc/cpu/threshold.cpp."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epi_kernels import schema
from epi_kernels.backends import native
from epi_kernels.ops.flat import Flat


class _Scored:
    """A fixed list of importances as a table."""

    _function: str  # the name of the library's function

    def __init__(
        self,
        importances: Sequence[Tensor],
        layers: Sequence[int],
        budgets: Sequence[int],
        device: torch.device,
        scales: Sequence[Tensor | None],
    ) -> None:
        # scales are those of blocks in row-major order
        self._run = native.function(self._function)
        flat = Flat(written=[importances], row_major=any(own is not None for own in scales))
        self._strided = flat.strided
        self._layers = np.asarray(layers, np.intp)
        self._table = native.table_of(schema.SCORE.struct, importance=flat.written[0])
        self._table["budget"] = np.asarray(budgets, np.int32)
        self._table["row"] = native.rows_of(importances)
        if scales:
            self._table["scales"] = native.addresses(scales)

    def _placed(self, importances: Sequence[Tensor], ranges: Tensor | None) -> Flat | None:
        """Write into the table what changes from call to call; return the copies that it points to, or None."""
        table, flat = self._table, None
        table["normalized"] = ranges is not None
        if ranges is not None:
            table["low"], table["high"] = ranges.numpy()[self._layers].T
        if self._strided:
            flat = Flat(written=[importances], strided=self._strided)
            table["importance"] = native.addresses(flat.written[0])
        return flat


class Histogram(_Scored):
    """The histograms of a fixed list of importances; contract: `epi_kernels.ops.prepared_histogram`."""

    _function = "epi_score_histogram"

    def count(
        self,
        importances: Sequence[Tensor],
        ranges: Tensor | None,
        selection: Tensor,
        shift: int,
        bins: int,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
    ) -> Tensor:
        """Count the scores of each budget by one digit of their bits."""
        counts = torch.zeros(1, len(selection), bins, dtype=torch.int64, device="cpu")
        if due is not None and not due:
            return counts
        flat = self._placed(importances, ranges)
        table, prefixes, threads = self._table, selection[:, 0].contiguous(), torch.get_num_threads()
        digit_bits = bins.bit_length() - 1
        self._run(table.ctypes.data, len(table), prefixes.data_ptr(), shift, digit_bits, counts.data_ptr(), threads)
        del flat  # the copies that it holds had to live until now
        return counts


def select_digit_(counts: Tensor, selection: Tensor, shift: int) -> Tensor:
    """Find one digit of each k-th largest score; contract: `epi_kernels.ops.select_digit_`."""
    parts, budgets, bins = counts.shape
    thresholds = torch.empty(budgets, dtype=torch.float32, device="cpu")
    _select()(selection.data_ptr(), budgets, counts.data_ptr(), parts, bins, shift, thresholds.data_ptr())
    return thresholds


@functools.cache
def _select() -> Any:
    return native.function("epi_select_digit")


class Lock(_Scored):
    """The lock of a fixed list of importances; contract: `epi_kernels.ops.prepared_lock`."""

    _function = "epi_lock"

    def lock_(
        self,
        importances: Sequence[Tensor],
        ranges: Tensor | None,
        thresholds: Tensor,
        due: Tensor | None,
        scales: Sequence[Tensor | None],
    ) -> Tensor:
        """Lock every entry whose score reaches its budget's threshold."""
        if due is not None and not due:
            return torch.zeros(len(importances), 3, dtype=torch.int64, device="cpu")
        table, flat, thresholds = self._table, self._placed(importances, ranges), thresholds.contiguous()
        for name in _COUNTS:
            table[name] = 0
        self._run(table.ctypes.data, len(table), thresholds.data_ptr(), torch.get_num_threads())
        if flat is not None:
            flat.write_back()
        return torch.from_numpy(np.stack([table[name] for name in _COUNTS], 1))


# the fields with the results of a lock
_COUNTS = ("locked", "newly_locked", "released")
