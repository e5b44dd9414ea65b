"""The protected entries of parameters that another optimizer moves: their positions and their values before."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.distributed import local
from epi_kernels.engine.method import Owner
from epi_kernels.isolation.isolation import signed_importance
from epi_kernels.ops.flat import put_
from epi_kernels.ops.positions import put_all_, take_all


class Kept(NamedTuple):
    """The protected entries of a parameter: positions, and values before the step."""

    param: Tensor
    positions: Tensor  # int64, in row-major order of this rank's shard
    values: Tensor


class _Positions(NamedTuple):
    """The positions of a parameter's protected entries, and what shows that they are still up to date."""

    signed: weakref.ref[Tensor]  # weak: if the program drops the tensor, its memory must be freed
    seen: tuple[int, int]  # address and version of the memory of `signed`
    positions: Tensor


class Protected:
    """The positions of the protected entries of all parameters, looked up again only where a mask has changed."""

    def __init__(self) -> None:
        self._positions: dict[int, _Positions] = {}  # by id of the parameter

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: nothing; a copy looks the positions up."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__init__()  # type: ignore[misc]

    def forget(self) -> None:
        """Forget all positions, since masks or parameters have changed: they are looked up again."""
        self._positions.clear()

    def nothing(self, param: Tensor, signed: Tensor) -> None:
        """Record that a new importance protects no entry, so that no device is asked."""
        seen = _seen(signed)
        if seen is not None:
            nothing = torch.empty(0, dtype=torch.int64, device=param.device)
            self._positions[id(param)] = _Positions(weakref.ref(signed), seen, nothing)

    @torch.no_grad()
    def keep(self, owner: Owner) -> list[Kept]:
        """Return the protected entries of all parameters; this waits for no device if no mask has changed."""
        params, positions = [], []
        for group in owner.param_groups:
            for param in group["params"]:
                signed = signed_importance(owner, param, group)
                if signed is not None and signed.shape == param.shape:
                    found = self._positions_of(param, signed)
                    if found.numel():
                        params.append(param)
                        positions.append(found)
        values = take_all([local(param) for param in params], positions)
        return [Kept(*one) for one in zip(params, positions, values, strict=True)]

    def _positions_of(self, param: Tensor, signed: Tensor) -> Tensor:
        """Return the positions of the protected entries of a parameter."""
        known, seen = self._positions.get(id(param)), _seen(signed)
        if known is None or seen is None or known.signed() is not signed or known.seen != seen:
            found = lock.is_locked(local(signed)).flatten().nonzero().squeeze(1)
            if seen is None:
                return found
            known = self._positions[id(param)] = _Positions(weakref.ref(signed), seen, found)
        return known.positions

    def same_masks(self, param: Tensor, signed: Tensor) -> None:
        """Record that we have written the importance of a parameter without changing any sign bit."""
        known, seen = self._positions.get(id(param)), _seen(signed)
        if known is not None and seen is not None and known.signed() is signed:
            self._positions[id(param)] = known._replace(seen=seen)


def _seen(signed: Tensor) -> tuple[int, int] | None:
    """Return the address and version of the memory of an importance; None: torch does not count its versions."""
    shard = local(signed)
    return None if shard.is_inference() else (shard.data_ptr(), shard._version)


@torch.no_grad()
def put_back(kept: Sequence[Kept]) -> None:
    """Write the values back, into the memory that their parameters have now."""
    put_all_([local(one.param) for one in kept], [one.positions for one in kept], [one.values for one in kept])


def lock_again(owner: Owner, before: Sequence[Kept]) -> None:
    """Protect these entries again, and no others."""
    positions = {param: where for param, where, _ in before}
    for group in owner.param_groups:
        for param in group["params"]:
            signed = signed_importance(owner, param, group)
            if signed is not None:
                shard = local(signed)
                locked = torch.zeros_like(shard, dtype=torch.bool)
                if param in positions:
                    ones = torch.ones(len(positions[param]), dtype=torch.bool, device=shard.device)
                    put_(locked, positions[param], ones)
                shard.copy_(lock.with_lock(shard, locked))
