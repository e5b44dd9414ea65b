"""MaskedAdamW: AdamW with a fixed set of entries that never move (static isolation)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.distributed import is_dtensor, local, shard_of
from epi_kernels.optim.base import LockedAdamW
from epi_kernels.optim.checkpoint import placed_alike
from epi_kernels.optim.groups import digest_of, masks_of, position_of
from epi_kernels.optim.places import Following, Place, Places, check_shape

_WAY_OUT = (
    "If you replaced or resized the parameter, put its mask in the new shape into optimizer.state[parameter]['frozen'] "
    "(int8, -1 where frozen, else 0) with the moments, or construct MaskedAdamW again"
)


@dataclass(frozen=True, slots=True)
class _Mask:
    """What is frozen of a parameter: the lock, and of a DTensor a number that is equal on ranks of equal masks."""

    lock: Tensor
    digest: int | None


class MaskedAdamW(Following, LockedAdamW):
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

    State of a parameter with a mask: torch's, and ``frozen``, int8, -1 where frozen. The mask outlives its state
    (``state.clear()``, a checkpoint without one), and a mask that a checkpoint has replaces it. Where a wrapper puts
    other objects into `param_groups`, a mask follows by name, else by position, to the shard where that is a DTensor.

    Raises:
        ValueError: a name or Parameter is unknown, or its mask is not bool or has another shape; or, at the first step
            and on every rank that holds a part of the parameters, settings or masks of the ranks differ; or a wrapper
            has put other tensors into `param_groups` to which a mask cannot go, as DeepSpeed ZeRO does.

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
        self._places = Places()
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
        for param, mask in masks.items():
            digest = digest_of(mask) if is_dtensor(param) else None
            self._places.put(param, _Mask(shard_of(lock.static_lock(mask).to(param.device), param), digest))

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` are frozen: a new bool tensor of its shape, or of the shard of a DTensor.

        Raises:
            ValueError: `param` is not a parameter of this optimizer, or its mask cannot follow to it.
        """
        self._follow_to(param)
        position_of(param, self.param_groups)  # raises where it has none
        signed = self._signed(param)
        if signed is None:
            return torch.zeros_like(local(param), dtype=torch.bool)
        return lock.is_locked(local(signed))

    def _signed(self, param: Tensor) -> Tensor | None:
        """Return the lock of `param`: that of its state where it has one, which a program may have written."""
        mask: _Mask | None = self._places.get(param)
        signed: Tensor | None = self.state.get(param, {}).get("frozen", mask and mask.lock)
        return signed

    def _run_step(self) -> None:
        self._follow()
        self._compare_masks()
        super()._run_step()

    def _lock_in(self, param: Tensor, group: dict[str, Any]) -> str:
        return "none" if self._signed(param) is None else "static"

    def _new_lock(self, param: Tensor) -> Tensor:
        lock_of_it: Tensor = self._places.get(param).lock
        return lock_of_it

    def _check_layout(self, param: Tensor, group: dict[str, Any]) -> None:
        signed = self._signed(param)
        if signed is not None:
            check_shape(param, self._name(param), "frozen", signed.shape, _WAY_OUT)
        super()._check_layout(param, group)

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
        super()._ensure_state(param, group)
        self._keep(param)

    def _keep(self, param: Tensor) -> None:
        """Keep the mask that the state of a parameter has, so that it is there when the state is cleared."""
        mask, signed = self._places.get(param), self.state.get(param, {}).get("frozen")
        if signed is not None and (mask is None or mask.lock is not signed):
            self._places.put(param, _Mask(signed, None))

    def _after_load(self) -> None:
        for param in self.state:
            self._keep(param)

    def _moved_to(self, place: Place, param: Tensor) -> tuple[_Mask, None]:
        signed: Tensor | None = self.state.get(param, {}).get("frozen")
        if signed is not None:  # whoever has replaced the parameter has seen to its mask
            return _Mask(signed, None), None
        mask: _Mask = place.belongs
        check_shape(param, str(place), "frozen", mask.lock.shape, _WAY_OUT)
        if not is_dtensor(mask.lock):
            digest = digest_of(mask.lock) if is_dtensor(param) else None
            return _Mask(shard_of(mask.lock.to(param.device), param), digest), None
        if not placed_alike(mask.lock, param):
            raise ValueError(
                f"{place} was a DTensor, and another that is placed otherwise has its place: this rank has a shard of "
                "its frozen mask alone. Construct MaskedAdamW again, with a mask of the whole parameter"
            )
        return mask, None

    _STATE = (*LockedAdamW._STATE, "frozen")
    _KEPT = (*LockedAdamW._KEPT, *Following._KEPT)
