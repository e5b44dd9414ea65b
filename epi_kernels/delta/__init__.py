"""A task as a file: the entries that an optimizer has changed, written into the base model and taken out again.

`SparseAdamW.delta` makes it. Positions and values are exact, so the model comes back bit for bit. See docs/delta.md.
"""

from epi_kernels.delta.entries import Delta, rename
from epi_kernels.delta.file import load, save
from epi_kernels.delta.life import apply, combine, digest, undo

# the names of earlier versions
apply_delta, load_delta, save_delta = apply, load, save

__all__ = [
    "Delta",
    "apply",
    "apply_delta",
    "combine",
    "digest",
    "load",
    "load_delta",
    "rename",
    "save",
    "save_delta",
    "undo",
]
