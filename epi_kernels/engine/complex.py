"""Complex parameters: steps take them as pairs of reals, locks and importance go by complex entry."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import lock, ops
from epi_kernels.distributed import local


def as_real(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor: real as it is, complex as a view of its pairs, [..., 2].

    Kernels read memory, where a lazily conjugated or negated tensor has other values: it is copied.
    """
    tensor = local(tensor)
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).resolve_neg()


def squared_by_importance(grad: Tensor) -> Tensor:
    """Return what an importance squares: g, or |g| of a complex one."""
    return grad.abs() if grad.is_complex() else grad


class PairLocks:
    """The locks of complex parameters, repeated for both parts of each entry, so that a step of the parts obeys them.

    Args:
        signed: for each parameter the signed importance or static lock, or None if it has no lock.
        advances: whether `signed` are importances, which every step advances.
    """

    def __init__(self, signed: Sequence[Tensor | None], advances: bool) -> None:
        self._signed = {i: tensor for i, tensor in enumerate(signed) if tensor is not None}
        self._advances = advances
        self.pairs = [
            None if s is None else torch.zeros(*s.shape, 2, dtype=torch.int8, device=s.device) for s in signed
        ]

    def advance_(
        self,
        grads: Sequence[Tensor],
        nonfinite: Tensor,
        betas: Sequence[float],
        grad_factor: Tensor | None,
        backend: str,
    ) -> None:
        """Advance the importances by the complex `grads` of all parameters; see `epi_kernels.ops.importance_`."""
        where = list(self._signed)
        if not (self._advances and where):
            return
        found = torch.zeros(len(where), dtype=torch.int64, device=nonfinite.device)
        ops.importance_(
            list(self._signed.values()),
            [squared_by_importance(grads[i]) for i in where],
            torch.zeros(
                1, 2, dtype=torch.float32, device=nonfinite.device
            ),  # nobody asks for a range between two refreshes
            found,
            torch.tensor([(betas[i], 1.0 - betas[i]) for i in where], dtype=torch.float64, device="cpu"),
            [0] * len(where),
            True,
            grad_factor,
            None,
            backend,
        )
        nonfinite[where] += found

    def repeat_(self) -> None:
        """Take over the locks as they are now."""
        for i, signed in self._signed.items():
            self.pairs[i].copy_(lock.static_lock(lock.is_locked(signed)).unsqueeze(-1))  # type: ignore[union-attr]
