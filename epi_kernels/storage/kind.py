"""What a storage is: a way to keep the values of a tensor in memory."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Storage:
    """A way to keep values of which arithmetic is done in float32.

    How values are loaded to float32 and stored from it is in twins: ``csrc/storage``, and for slots the functions
    `load` and `store` of ``epi_kernels/storage/<name>_triton.py``.

    Attributes:
        name: as Triton and csrc/schema.h have it.
        dtype: of the tensor.
    """

    name: str
    dtype: torch.dtype

    @property
    def bytes(self) -> float:
        """Return the bytes of an entry."""
        return self.dtype.itemsize
