"""Drop-in AdamW that protects what a model already knows: EPI and PIECE as fused optimizer steps."""

from epi_kernels._version import __version__
from epi_kernels.optim import EPIAdamW, EPILion, IsolatedOptimizer, MaskedAdamW, SparseAdamW

__all__ = ["EPIAdamW", "EPILion", "IsolatedOptimizer", "MaskedAdamW", "SparseAdamW", "__version__"]
