"""Storages: the ways to keep values in memory that compiled backends know. A file has one, or two similar ones."""

from epi_kernels.storage.block8 import BLOCK8
from epi_kernels.storage.float32 import FLOAT32
from epi_kernels.storage.half import BFLOAT16, FLOAT16
from epi_kernels.storage.kind import Storage

__all__ = ["BFLOAT16", "BLOCK8", "FLOAT16", "FLOAT32", "STATES", "STORAGES", "VALUES", "Storage"]

# a storage's position is its number in compiled code
STORAGES: list[Storage] = [FLOAT32, BFLOAT16, FLOAT16, BLOCK8]

# dtype of a tensor -> the storage's number in compiled code
CODES = {storage.dtype: code for code, storage in enumerate(STORAGES)}

# the dtypes of parameters and gradients, and those of moments and importances, that compiled backends take
VALUES = frozenset({FLOAT32.dtype, BFLOAT16.dtype, FLOAT16.dtype})
STATES = frozenset({FLOAT32.dtype, BFLOAT16.dtype, BLOCK8.dtype})
