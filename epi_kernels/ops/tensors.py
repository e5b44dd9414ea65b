"""The tensors of a step, in the form in which every backend gets them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epi_kernels.rules import Rule
from epi_kernels.storage.noise import Place


@dataclass(slots=True)
class TensorsOf:
    """The tensors of one parameter in a step; the attributes are those of `Tensors`."""

    param: Tensor
    slots: list[Tensor | None]  # one for each slot of the rule
    scales: list[Tensor | None]  # likewise
    lock: Tensor | None
    lock_scales: Tensor | None
    rest: Tensor | None
    place: Place | None
    stochastic: bool


@dataclass(slots=True)
class Tensors:
    """The tensors of a step; entry i of each list belongs to parameter i.

    Attributes:
        params: theta.
        grads: their gradients.
        slots: name -> tensors, the slots of a rule in the rule's order. An optional slot that no parameter has may be
            left out; a parameter that lacks an optional slot has None there.
        locks: if locks are in tensors of their own: for each parameter that can be locked, the signed importance or the
            int8 tensor of a static lock; None for the other parameters. Otherwise empty.
        scales: name of a slot -> the scales of the tensors of that slot that are in blocks of 8 bits (uint8, see
            `epi_kernels.storage.block8`), None for the others; a slot without any may be left out.
        lock_scales: likewise for `locks`; or empty.
        rests: for bfloat16 parameters whose weights have more bits, the rest of each weight (see
            `epi_kernels.storage.split`), None for the others; or empty.
        places: where the entries of each parameter lie in the whole tensor, for the noise of stochastic rounding; empty
            if nothing is rounded stochastically.
        stochastic: whether the parameters are rounded stochastically, or their weights if they have rests.
    """

    params: list[Tensor]
    grads: list[Tensor]
    slots: dict[str, list[Tensor | None]]
    locks: list[Tensor | None] = field(default_factory=list)
    scales: dict[str, list[Tensor | None]] = field(default_factory=dict)
    lock_scales: list[Tensor | None] = field(default_factory=list)
    rests: list[Tensor | None] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    stochastic: bool = False

    def written(self) -> Iterator[list[Tensor | None]]:
        """Yield the lists of the parameters' shapes that a step writes: parameters, slots, locks, rests."""
        yield self.params  # type: ignore[misc]
        yield from self.slots.values()
        yield self.locks
        yield self.rests

    def all_written(self) -> Iterator[list[Tensor | None]]:
        """Yield all lists that a step writes: those of `written`, and scales."""
        yield from self.written()
        yield from self.scales.values()
        yield self.lock_scales

    def of(self, i: int, rule: Rule) -> TensorsOf:
        """Return the tensors of parameter i."""
        names = [slot.name for slot in rule.slots]
        slots, scales = (
            [lists[name][i] if lists.get(name) else None for name in names] for lists in (self.slots, self.scales)
        )
        lock, lock_scales, rest = (
            tensors[i] if tensors else None for tensors in (self.locks, self.lock_scales, self.rests)
        )
        place = self.places[i] if self.places else None
        return TensorsOf(self.params[i], slots, scales, lock, lock_scales, rest, place, self.stochastic)

    def has_optional(self, rule: Rule) -> bool:
        """Return whether any parameter has the optional slots of a rule."""
        optional = [self.slots.get(slot.name, []) for slot in rule.slots[rule.required :]]
        return any(tensor is not None for of_slot in optional for tensor in of_slot)


def dtypes_of(*lists: Sequence[Tensor | None]) -> frozenset[torch.dtype]:
    """Return the dtypes of the tensors in some lists; None entries are skipped."""
    return frozenset(tensor.dtype for tensors in lists for tensor in tensors if tensor is not None)
