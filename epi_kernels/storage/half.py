"""bfloat16 and float16: values are rounded to nearest even. Parameters and gradients may be kept this way."""

import torch

from epi_kernels.storage.kind import Storage

BFLOAT16 = Storage("bfloat16", torch.bfloat16)
FLOAT16 = Storage("float16", torch.float16)
