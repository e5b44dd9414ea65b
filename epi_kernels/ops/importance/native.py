"""Importance in C++ on the CPU; kernels: csrc/cpu/importance.cpp."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from epi_kernels.backends import native
from epi_kernels.ops.flat import Flat


def importance_(
    importances: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    ranges: Tensor,
    nonfinite: Tensor,
    betas: Tensor,
    layers: Sequence[int],
    keep_finite: bool,
    grad_factor: Tensor | None,
    due: Tensor | None,
) -> None:
    """Advance where there is a gradient, extend the ranges; contract: `epi_kernels.ops.importance_`."""
    if due is not None and not due:
        return
    flat = Flat(written=[importances], read=[grads])
    table = native.table_of(native.IMPORTANCE_TENSOR, importance=flat.written[0], grad=flat.read[0])
    table["betas"] = betas.float().numpy()
    table["layer"] = np.asarray(layers, np.int32)
    found = torch.empty(len(ranges), 2, dtype=torch.float32, device="cpu")
    factor = 1.0 if grad_factor is None else grad_factor.item()
    native.call("epi_importance", table, found.data_ptr(), len(ranges), factor, keep_finite)
    ranges[:, 0].clamp_(max=found[:, 0])
    ranges[:, 1].clamp_(min=found[:, 1])
    nonfinite += torch.from_numpy(table["nonfinite"].copy())
    flat.write_back()


def gradient_sums_(sums: Sequence[Tensor], square_sums: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add g and g^2 in place; contract: `epi_kernels.ops.gradient_sums_`."""
    flat = Flat(written=[sums, square_sums], read=[grads])
    table = native.table_of(native.SUMS_TENSOR, sum=flat.written[0], square_sum=flat.written[1], grad=flat.read[0])
    native.call("epi_gradient_sums", table)
    flat.write_back()
