"""MaskedAdamW: AdamW with a fixed set of entries that never move (static isolation)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.distributed import is_dtensor, local, shard_of
from epi_kernels.optim.base import LockedAdamW
from epi_kernels.optim.groups import digest_of, masks_of, position_of


class MaskedAdamW(LockedAdamW):
    """AdamW that never moves the entries of a fixed mask.

    ::

        theta <- theta where frozen, else the AdamW update          EPI (arXiv 2604.14010) Eq. 12-13 with a constant m

    The static isolation of CPI-FT, and the static baselines of EPI (Table 2). A frozen entry gets no update and no
    weight decay: it keeps its bits, under NaN gradients too. Its moments advance.

    Args:
        params: as torch.optim.AdamW takes them; ``model.named_parameters()`` for a mask by names.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, fused, capturable, differentiable: as in
            torch.optim.AdamW; see `EPIAdamW`.
        frozen: {name or Parameter: bool tensor of the parameter's shape}, True = never moves. Parameters that it does
            not name are free.
        clip_grad_norm: as in `EPIAdamW`.
        process_group: the ranks that share the parameters out; None is the default group where a parameter is a
            DTensor, and no communication otherwise. Given with plain parameters that have no names, as inside of
            ZeroRedundancyOptimizer, each rank's parameters are its own, and masks of others are left to other ranks.
        backend: "auto", or the name of one, which then runs or raises.

    State of a parameter with a mask: torch's, and ``frozen``, int8, -1 where frozen.

    Raises:
        ValueError: a name or Parameter is unknown, or its mask is not bool or has another shape; or, at the first step
            and on every rank that holds a part of the parameters, settings or masks of the ranks differ.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = MaskedAdamW([weight], lr=0.1, frozen={weight: torch.tensor([True, False])})
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> weight.data
        tensor([1.0000, 0.8990])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        frozen: Mapping[str | Tensor, Tensor],
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: Any = None,
        clip_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        self._process_group = process_group
        self._frozen: dict[Tensor, Tensor] = {}
        self._digests: dict[Tensor, int] = {}
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            clip_grad_norm=clip_grad_norm,
            backend=backend,
            settings={},
        )
        masks = masks_of(frozen, self.param_groups, "frozen", partitioned=process_group is not None)
        self._digests = {p: digest_of(mask) for p, mask in masks.items() if is_dtensor(p)}
        self._frozen = {p: shard_of(lock.static_lock(mask).to(p.device), p) for p, mask in masks.items()}

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` are frozen: a new bool tensor of its shape, or of the shard of a DTensor.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        position_of(param, self.param_groups)  # raises where it has none
        signed = self.state.get(param, {}).get("frozen", self._frozen.get(param))
        if signed is None:
            return torch.zeros_like(local(param), dtype=torch.bool)
        return lock.is_locked(local(signed))

    def _run_step(self) -> None:
        self._compare_ranks(self._digests)
        super()._run_step()

    def _lock_in(self, param: Tensor, group: dict[str, Any]) -> str:
        return "static" if param in self._frozen or "frozen" in self.state.get(param, ()) else "none"

    def _new_lock(self, param: Tensor) -> Tensor:
        return self._frozen[param]

    _STATE = (*LockedAdamW._STATE, "frozen")
    _KEPT = (*LockedAdamW._KEPT, "_frozen", "_digests")
