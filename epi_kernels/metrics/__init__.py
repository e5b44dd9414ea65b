"""Measures of forgetting, of masks and of scores. Definitions are from arXiv 2604.14010 unless PIECE is named.

A mask is a bool tensor of any shape, True = protected (or, of PIECE, selected), or a mapping name -> bool tensor for a
whole model; the entries of a mapping count together, as one long mask. So do those of a gradient.
"""

from epi_kernels.metrics.gradients import conflict_matrix, gradient_conflict
from epi_kernels.metrics.masks import (
    Place,
    flip_rate,
    flip_rates,
    mask_hamming,
    mask_jaccard,
    overlap_matrix,
    placement,
)
from epi_kernels.metrics.results import (
    average_performance,
    backward_transfer,
    forgetting_ratio,
    overall_performance,
)
from epi_kernels.metrics.validity import Validity, importance_validity, pearson, spearman

__all__ = [
    "Place",
    "Validity",
    "average_performance",
    "backward_transfer",
    "conflict_matrix",
    "flip_rate",
    "flip_rates",
    "forgetting_ratio",
    "gradient_conflict",
    "importance_validity",
    "mask_hamming",
    "mask_jaccard",
    "overall_performance",
    "overlap_matrix",
    "pearson",
    "placement",
    "spearman",
]
