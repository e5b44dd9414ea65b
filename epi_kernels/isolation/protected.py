"""The protected entries of parameters that something else moves: where they are, and what they were."""

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


class Kept(NamedTuple):
    """Protected entries of a parameter, as they were."""

    param: Tensor
    positions: Tensor  # int64, in row-major order of this rank's shard
    values: Tensor


class _Positions(NamedTuple):
    """Where the protected entries of a parameter are, and what tells that they still are there."""

    signed: weakref.ref[Tensor]  # weak: the program may move a state away, and wants its memory then
    seen: tuple[int, int]  # address and version of its memory
    positions: Tensor


class Protected:
    """Where the protected entries of an optimizer's parameters are, looked up again only where a mask has changed."""

    def __init__(self) -> None:
        self._positions: dict[int, _Positions] = {}  # by id of the parameter

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: nothing, a copy looks."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__init__()  # type: ignore[misc]

    def forget(self) -> None:
        """Look everything up again, for masks or parameters are others now."""
        self._positions.clear()

    def nothing(self, param: Tensor, signed: Tensor) -> None:
        """Say that no entry of a new importance is protected: no need to ask the device."""
        seen = _seen(signed)
        if seen is not None:
            nothing = torch.empty(0, dtype=torch.int64, device=param.device)
            self._positions[id(param)] = _Positions(weakref.ref(signed), seen, nothing)

    @torch.no_grad()
    def keep(self, owner: Owner) -> list[Kept]:
        """Return the protected entries of all parameters; it waits for no device where no mask has changed."""
        kept = []
        for group in owner.param_groups:
            for param in group["params"]:
                signed = signed_importance(owner, param, group)
                if signed is not None and signed.shape == param.shape:
                    positions = self._positions_of(param, signed)
                    if positions.numel():
                        kept.append(Kept(param, positions, torch.take(local(param), positions)))
        return kept

    def _positions_of(self, param: Tensor, signed: Tensor) -> Tensor:
        """Return where the protected entries of a parameter are."""
        known, seen = self._positions.get(id(param)), _seen(signed)
        if known is None or seen is None or known.signed() is not signed or known.seen != seen:
            found = lock.is_locked(local(signed)).flatten().nonzero().squeeze(1)
            if seen is None:
                return found
            known = self._positions[id(param)] = _Positions(weakref.ref(signed), seen, found)
        return known.positions

    def same_masks(self, param: Tensor, signed: Tensor) -> None:
        """Say that we have written the importance of a parameter, and no sign of it."""
        known, seen = self._positions.get(id(param)), _seen(signed)
        if known is not None and seen is not None and known.signed() is signed:
            self._positions[id(param)] = known._replace(seen=seen)


def _seen(signed: Tensor) -> tuple[int, int] | None:
    """Return the address and version of the memory of an importance; None: nobody counts its versions."""
    held = local(signed)
    return None if held.is_inference() else (held.data_ptr(), held._version)


@torch.no_grad()
def put_back(kept: Sequence[Kept]) -> None:
    """Write entries back, into whatever memory their parameters have now."""
    for param, positions, values in kept:
        put_(local(param), positions, values)


def lock_again(owner: Owner, before: Sequence[Kept]) -> None:
    """Let these entries be protected again, and no others."""
    positions = {param: where for param, where, _ in before}
    for group in owner.param_groups:
        for param in group["params"]:
            signed = signed_importance(owner, param, group)
            if signed is not None:
                held = local(signed)
                locked = torch.zeros_like(held, dtype=torch.bool)
                if param in positions:
                    ones = torch.ones(len(positions[param]), dtype=torch.bool, device=held.device)
                    put_(locked, positions[param], ones)
                held.copy_(lock.with_lock(held, locked))
