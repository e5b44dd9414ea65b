"""The threshold in C++ on the CPU; kernels: csrc/cpu/threshold.cpp."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epi_kernels.backends import native
from epi_kernels.ops.equations import selected
from epi_kernels.ops.flat import Flat


def score_histogram(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    selection: Tensor,
    shift: int,
    bins: int,
    due: Tensor | None,
) -> Tensor:
    """Count the scores of each budget by one digit of their bits; contract: `epi_kernels.ops.score_histogram`."""
    counts = torch.zeros(1, len(selection), bins, dtype=torch.int64, device="cpu")
    if due is not None and not due:
        return counts
    flat = Flat(written=[], read=[importances])
    table = _table(flat.read[0], layers, ranges, budgets)
    prefixes = selection[:, 0].contiguous()
    digit_bits = bins.bit_length() - 1
    native.call("epi_score_histogram", table, prefixes.data_ptr(), shift, digit_bits, counts.data_ptr())
    return counts


def select_digit_(counts: Tensor, selection: Tensor, shift: int) -> Tensor:
    """Find the digit that holds each rank; contract: `epi_kernels.ops.select_digit_`."""
    # in torch: a few thousand numbers, once in a refresh
    found, thresholds = selected(counts, selection, shift)
    selection.copy_(found)
    return thresholds


def lock_(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    thresholds: Tensor,
    due: Tensor | None,
) -> Tensor:
    """Lock every entry whose score reaches its budget's threshold; contract: `epi_kernels.ops.lock_`."""
    if due is not None and not due:
        return torch.zeros(len(importances), 3, dtype=torch.int64, device="cpu")
    flat = Flat(written=[importances])
    table = _table(flat.written[0], layers, ranges, budgets)
    thresholds = thresholds.contiguous()
    native.call("epi_lock", table, thresholds.data_ptr())
    flat.write_back()
    return torch.from_numpy(table["counts"].copy())


def _table(
    importances: Sequence[Tensor | None], layers: Sequence[int], ranges: Tensor | None, budgets: Sequence[int]
) -> "np.ndarray[Any, Any]":
    table = native.table_of(native.SCORE_TENSOR, importance=importances)
    table["budget"] = np.asarray(budgets, np.int32)
    table["normalized"] = ranges is not None
    if ranges is not None:
        table["range"] = ranges.numpy()[np.asarray(layers, np.intp)]
    return table
