"""The operations under the optimizers: fused passes over lists of tensors, each with several backends.

``ops/<stem>/<backend>.py`` holds one operation on one backend, `equations` the mathematics in plain torch, and
`functional` what callers use.
"""

from epi_kernels.ops.functional import (
    SparseSweep,
    Sweep,
    find_threshold,
    gradient_sums_,
    importance_,
    lock_,
    masked_adamw_,
    score_histogram,
    select_digit_,
    sparse_adamw_,
)

__all__ = [
    "SparseSweep",
    "Sweep",
    "find_threshold",
    "gradient_sums_",
    "importance_",
    "lock_",
    "masked_adamw_",
    "score_histogram",
    "select_digit_",
    "sparse_adamw_",
]
