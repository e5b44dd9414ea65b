"""Drop-in AdamW that protects what a model already knows: EPI and PIECE as fused optimizer steps."""

from epi_kernels._version import __version__
from epi_kernels.optim import EPIAdamW, MaskedAdamW

__all__ = ["EPIAdamW", "MaskedAdamW", "__version__"]
