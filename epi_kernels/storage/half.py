"""bfloat16 and float16: values rounded to nearest even. Parameters and gradients may be kept so."""

import torch

from epi_kernels.storage.kind import Storage

BFLOAT16 = Storage("bfloat16", torch.bfloat16)
FLOAT16 = Storage("float16", torch.float16)
