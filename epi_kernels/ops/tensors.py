"""The tensors of a step, in the form in which every backend gets them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epi_kernels.rules import Rule


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
    """

    params: list[Tensor]
    grads: list[Tensor]
    slots: dict[str, list[Tensor | None]]
    locks: list[Tensor | None] = field(default_factory=list)

    def written(self) -> Iterator[list[Tensor | None]]:
        """Yield the lists that a step writes: parameters, slots, locks."""
        yield self.params  # type: ignore[misc]
        yield from self.slots.values()
        yield self.locks

    def has_optional(self, rule: Rule) -> bool:
        """Return whether any parameter has the optional slots of a rule."""
        optional = [self.slots.get(slot.name, []) for slot in rule.slots[rule.required :]]
        return any(tensor is not None for of_slot in optional for tensor in of_slot)


def dtypes_of(*lists: Sequence[Tensor | None]) -> frozenset[torch.dtype]:
    """Return the dtypes of the tensors in some lists; None entries are skipped."""
    return frozenset(tensor.dtype for tensors in lists for tensor in tensors if tensor is not None)
