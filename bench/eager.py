"""EPI as one would write it around torch's own AdamW, to compare with the fused step."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EagerEPI:
    """AdamW, with the importance from two foreach calls, and protected entries saved before a step and restored after.

    The mask is fixed here: only the steps between two refreshes are compared.
    """

    def __init__(self, params: Sequence[Tensor], protected: Sequence[Tensor], *, compiled: bool) -> None:
        """Take params with gradients, and for each parameter the positions (int64) of its protected entries."""
        self.params = list(params)
        self.protected = list(protected)
        self.importance = [torch.zeros_like(p) for p in params]
        self.adamw = torch.optim.AdamW(params, foreach=True)
        self._step = torch.compile(self._whole_step) if compiled else self._whole_step

    def step(self) -> None:
        """Take one step."""
        with torch.no_grad():
            self._step()

    def _whole_step(self) -> None:
        grads = [p.grad for p in self.params]
        torch._foreach_mul_(self.importance, 0.99)
        torch._foreach_addcmul_(self.importance, grads, grads, 0.01)
        saved = [p.view(-1)[where] for p, where in zip(self.params, self.protected, strict=True)]
        self.adamw.step()
        for p, where, values in zip(self.params, self.protected, saved, strict=True):
            p.view(-1)[where] = values
