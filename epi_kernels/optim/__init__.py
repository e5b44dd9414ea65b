"""The optimizers."""

from epi_kernels.optim.epi import EPIAdamW
from epi_kernels.optim.isolated import IsolatedOptimizer
from epi_kernels.optim.masked import MaskedAdamW
from epi_kernels.optim.release import release_gradients

__all__ = ["EPIAdamW", "IsolatedOptimizer", "MaskedAdamW", "release_gradients"]
