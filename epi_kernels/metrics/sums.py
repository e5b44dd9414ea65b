"""Sums over all ranks."""

from torch import Tensor

from epi_kernels.distributed import is_dtensor


def total(values: Tensor) -> Tensor:
    """Return the sum of all entries, 0-d; of a DTensor that of the whole tensor, for which every rank must call."""
    found = values.sum()
    # a number made of a DTensor's sum would be that of this rank's shard, without a word
    return found.full_tensor() if is_dtensor(found) else found  # type: ignore[attr-defined]
