"""The operations under the optimizers: fused passes over lists of tensors, each with several backends.

``ops/<stem>/<backend>.py`` holds one operation on one backend, `equations` the mathematics in plain torch, and
`functional` what callers use.
"""

from epi_kernels.ops.functional import (
    Gather,
    Sweep,
    find_threshold,
    gather_,
    gradient_sums_,
    importance_,
    lock_,
    score_histogram,
    select_digit_,
    sweep_,
)
from epi_kernels.ops.scalars import scalars_of
from epi_kernels.ops.tensors import Tensors

__all__ = [
    "Gather",
    "Sweep",
    "Tensors",
    "find_threshold",
    "gather_",
    "gradient_sums_",
    "importance_",
    "lock_",
    "scalars_of",
    "score_histogram",
    "select_digit_",
    "sweep_",
]
