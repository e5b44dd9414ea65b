"""The operations under the optimizers: fused passes over lists of tensors, each with several backends.

``ops/<stem>/<backend>.py`` holds one operation on one backend, `equations` the mathematics in plain torch, and
`functional` what callers use.
"""

from epi_kernels.ops.functional import (
    find_threshold,
    gradient_sums_,
    importance_,
    lock_,
    prepared_digit,
    prepared_histogram,
    prepared_importance,
    prepared_lock,
    score_histogram,
    select_digit_,
)
from epi_kernels.ops.steps import gather_, prepared_gather, prepared_sweep, sweep_
from epi_kernels.ops.tensors import Tensors

__all__ = [
    "Tensors",
    "find_threshold",
    "gather_",
    "gradient_sums_",
    "importance_",
    "lock_",
    "prepared_digit",
    "prepared_gather",
    "prepared_histogram",
    "prepared_importance",
    "prepared_lock",
    "prepared_sweep",
    "score_histogram",
    "select_digit_",
    "sweep_",
]
