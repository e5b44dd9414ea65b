"""The optimizers."""

from epi_kernels.optim.epi import EPIAdamW
from epi_kernels.optim.export import torch_state_dict
from epi_kernels.optim.isolated import IsolatedOptimizer
from epi_kernels.optim.lion import EPILion
from epi_kernels.optim.masked import MaskedAdamW
from epi_kernels.optim.release import release_gradients
from epi_kernels.optim.sparse import SparseAdamW

__all__ = [
    "EPIAdamW",
    "EPILion",
    "IsolatedOptimizer",
    "MaskedAdamW",
    "SparseAdamW",
    "release_gradients",
    "torch_state_dict",
]
