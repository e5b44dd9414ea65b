"""Storages: the ways to keep values in memory that compiled backends know. A file has one, or two similar ones."""

from epi_kernels.storage.float32 import FLOAT32
from epi_kernels.storage.half import BFLOAT16, FLOAT16
from epi_kernels.storage.kind import Storage

__all__ = ["BFLOAT16", "DTYPES", "FLOAT16", "FLOAT32", "STORAGES", "Storage"]

# a storage's position is its number in compiled code
STORAGES: list[Storage] = [FLOAT32, BFLOAT16, FLOAT16]

# dtype of a parameter or gradient -> the storage's number in compiled code
DTYPES = {storage.dtype: code for code, storage in enumerate(STORAGES)}
