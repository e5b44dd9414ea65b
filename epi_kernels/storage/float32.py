"""float32: values are kept unchanged."""

import torch

from epi_kernels.storage.kind import Storage

FLOAT32 = Storage("float32", torch.float32, 4)
