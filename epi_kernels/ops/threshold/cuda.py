"""Histograms of score keys in CUDA, in the shared memory of a block; kernel: csrc/cuda/threshold.cu.

Triton has no shared memory of its own: its atomics go to global memory, and its `histogram` is even slower.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.backends import cuda
from epi_kernels.ops.equations import score
from epi_kernels.ops.table import zeros
from epi_kernels.ops.threshold.rows import Scored


class Histogram(Scored):
    """The histograms of a fixed list of importances; contract: `epi_kernels.ops.prepared_histogram`."""

    def chunk(self) -> int:
        """Return the number of entries in a chunk."""
        return cuda.histogram_chunk()

    def count(
        self,
        importances: Sequence[Tensor],
        ranges: Tensor | None,
        selection: Tensor,
        shift: int,
        bins: int,
        due: Tensor | None,
        scales: Sequence[Tensor | None] = (),  # it takes float32 alone, which has none
    ) -> Tensor:
        """Count the scores of each budget by one digit of their bits."""
        table, flat = self.table, self.placed(importances)
        counts = zeros((1, len(selection), bins), torch.int64, selection.device)
        cuda.call(
            "epi_cuda_score_histogram",
            selection.device,
            table.rows(),
            table.chunks,
            table.chunks.numel(),
            ranges,
            selection,
            due,
            shift,
            bins.bit_length() - 1,
            counts,
        )
        del flat  # the copies that it holds had to live until now
        return counts


@functools.cache
def obstacle(device: torch.device) -> str:
    """Return why the kernel cannot be used on a GPU; empty if it can. Tries the kernel on a few scores, once."""
    if cuda.obstacle(device):
        return cuda.obstacle(device)
    values = 10 ** torch.linspace(-12, 0, 3 * cuda.histogram_chunk() // 2, dtype=torch.float32, device="cpu")
    values[: values.numel() // 3] = 0.0
    layer_range = torch.tensor([[0.0, 0.7]], dtype=torch.float32, device="cpu")
    keys = score(values, layer_range[0]).view(torch.int32)
    there = values.to(device)
    histogram = Histogram([there], [0], [0], device)
    for prefix, shift, bins in ((0, 19, 4096), (int(keys[-1]) >> 19, 9, 1024)):
        counted = keys[keys >> shift >> (bins.bit_length() - 1) == prefix]
        expected = torch.bincount((counted >> shift) % bins, minlength=bins)
        selection = torch.tensor([[prefix, 1]], dtype=torch.int64, device=device)
        found = histogram.count([there], layer_range.to(device), selection, shift, bins, None)
        if not torch.equal(found[0, 0].cpu(), expected):
            return "on this GPU its counts differ from the reference's; please report it"
    return ""
