"""The operations under the optimizers: fused passes over lists of tensors, each with several backends.

``ops/<stem>/<backend>.py`` holds one operation on one backend, `equations` the mathematics in plain torch, and
`functional` what callers use.
"""

from epi_kernels.ops.functional import (
    find_threshold,
    gradient_sums_,
    importance_,
    lock_,
    masked_adamw_,
    score_histogram,
    sparse_adamw_,
)

__all__ = [
    "find_threshold",
    "gradient_sums_",
    "importance_",
    "lock_",
    "masked_adamw_",
    "score_histogram",
    "sparse_adamw_",
]
