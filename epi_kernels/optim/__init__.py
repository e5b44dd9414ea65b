"""The optimizers."""

from epi_kernels.optim.epi import EPIAdamW
from epi_kernels.optim.masked import MaskedAdamW

__all__ = ["EPIAdamW", "MaskedAdamW"]
