"""float32: values as they are."""

import torch

from epi_kernels.storage.kind import Storage

FLOAT32 = Storage("float32", torch.float32)
