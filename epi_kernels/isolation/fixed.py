"""A mask that does not change: which entries are frozen (static isolation)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.distributed import is_dtensor, local, shard_of
from epi_kernels.engine.checkpoint import placed_alike
from epi_kernels.engine.groups import digest_of, masks_of, name_of, position_of
from epi_kernels.engine.method import Owner
from epi_kernels.engine.places import Following, Place, check_shape

_WAY_OUT = (
    "If you replaced or resized the parameter, put its mask in the new shape into optimizer.state[parameter]['frozen'] "
    "(int8, -1 where frozen, else 0) with the moments, or construct MaskedAdamW again"
)


@dataclass(frozen=True, slots=True)
class _Mask:
    """The mask of a parameter; for a DTensor also a digest, which is equal on ranks whose masks are equal."""

    lock: Tensor
    digest: int | None


class FixedMask(Following):
    """Frozen entries keep their bits; the others move.

    The locks of a parameter are ``state["frozen"]``. A program may clear the state, or load a state without masks:
    `places` keeps the last mask of each parameter and gives that mask to the next state.
    """

    state_keys = ("frozen",)

    def freeze(self, owner: Owner, frozen: Mapping[str | Tensor, Tensor]) -> None:
        """Store the masks that the user gives; see `epi_kernels.MaskedAdamW`.

        Raises:
            ValueError, TypeError, NotImplementedError: as `engine.groups.masks_of` raises them.
        """
        masks = masks_of(frozen, owner.param_groups, "frozen", partitioned=owner._process_group is not None)
        for param, mask in masks.items():
            digest = digest_of(mask) if is_dtensor(param) else None
            self.places.put(param, _Mask(shard_of(lock.static_lock(mask).to(param.device), param), digest))

    def mask(self, owner: Owner, param: Tensor) -> Tensor:
        """Return which entries of a parameter, or of the shard of a DTensor, are frozen."""
        self.follow_to(owner, param)
        position_of(param, owner.param_groups)  # raises if the optimizer does not have the parameter
        signed = self._signed(owner, param)
        if signed is None:
            return torch.zeros_like(local(param), dtype=torch.bool)
        return lock.is_locked(local(signed))

    def _signed(self, owner: Owner, param: Tensor) -> Tensor | None:
        """Return the locks of a parameter: from its state, where a program may have written, else from `places`."""
        mask: _Mask | None = self.places.get(param)
        signed: Tensor | None = owner.state.get(param, {}).get("frozen", mask and mask.lock)
        return signed

    def lock_in(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> str:
        """Return "static" for a parameter with a mask."""
        return "none" if self._signed(owner, param) is None else "static"

    def new_lock(self, owner: Owner, param: Tensor) -> Tensor:
        """Return the mask that `places` keeps for a parameter."""
        mask: _Mask = self.places.get(param)
        return mask.lock

    def before_check(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check that a parameter has the shape of its mask."""
        signed = self._signed(owner, param)
        if signed is not None:
            check_shape(param, name_of(param, owner.param_groups), "frozen", signed.shape, _WAY_OUT)

    def state_made(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Keep the mask that is in the state."""
        self._keep(owner, param)

    def _keep(self, owner: Owner, param: Tensor) -> None:
        """Keep the mask from the state of a parameter, so that the mask outlives the state."""
        mask, signed = self.places.get(param), owner.state.get(param, {}).get("frozen")
        if signed is not None and (mask is None or mask.lock is not signed):
            self.places.put(param, _Mask(signed, None))

    def loaded(self, owner: Owner) -> None:
        """Keep the masks that were loaded from a checkpoint."""
        for param in owner.state:
            self._keep(owner, param)

    def digest(self, belongs: Any) -> int | None:
        """Return the digest of a mask."""
        mask: _Mask = belongs
        return mask.digest

    def moved_to(self, owner: Owner, place: Place, param: Tensor) -> tuple[_Mask, None]:
        """Return the mask for a parameter that has taken the place of another."""
        signed: Tensor | None = owner.state.get(param, {}).get("frozen")
        if signed is not None:  # the code that replaced the parameter has given it a mask
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
