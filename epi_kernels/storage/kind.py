"""What a storage is: a way to keep the values of a tensor in memory."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Storage:
    """A way to keep values in memory; all arithmetic on these values is done in float32.

    Twins convert the values to float32 and back: ``csrc/storage`` and ``epi_kernels/storage/<name>_triton.py``.

    Attributes:
        name: the name that Triton and csrc/schema.h use.
        dtype: the dtype of the tensor.
        bytes: of an entry; a scale that several entries share counts in proportion.
    """

    name: str
    dtype: torch.dtype
    bytes: float
