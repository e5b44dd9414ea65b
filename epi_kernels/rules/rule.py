"""What an update rule is: the tensors it keeps, the numbers it needs, and how it moves an entry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Slot(NamedTuple):
    """A tensor that a rule keeps for each parameter, with one value for each entry of the parameter.

    Attributes:
        name: the slot's key in an optimizer's state.
        option: the flag in a parameter group that asks for the slot; None: every parameter has the slot. Optional slots
            come last, and a parameter has all optional slots of its rule or none.
    """

    name: str
    option: str | None = None

    def wanted(self, group: Mapping[str, Any]) -> bool:
        """Return whether the parameters of a group have this slot."""
        return self.option is None or bool(group[self.option])


@dataclass(frozen=True)
class Rule:
    """How one optimizer moves an entry. A rule knows nothing about dtypes, masks or memory layouts.

    A rule has a twin in Triton, the function `update` in ``epi_kernels/rules/<name>_triton.py``, and a twin in C++,
    ``csrc/rules/<name>.h``. All three return the same bits for the same values.

    Attributes:
        name: the name of the rule and of its files.
        title: what messages call an optimizer of this rule.
        settings: the settings that a parameter group needs for a step.
        slots: the tensors that the rule keeps, in the order in which `update` takes them.
        scalars: a NamedTuple of the numbers that one step needs, with a class method ``of(group, step)`` that computes
            them from a parameter group: from floats in double, or from float64 tensors.
        update: ``update(param, grad, slots, scalars, given)`` returns (the parameter after the step, the slots after
            the step). All tensors have one shape and one dtype, float32 or float64, and none is written. An optional
            slot that the parameter lacks is None, and stays None. With ``given=True`` the slot named by
            `importance_slot` already includes this step's gradient, and the rule uses that slot unchanged.
        importance_slot: the slot that can serve as the importance of its parameter, or None. Its values are never
            below 0, and while it serves as the importance, its sign bits carry the lock. When it no longer serves, old
            lock bits may be left: code that loads the slot clears them.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    slots: tuple[Slot, ...]
    scalars: Any
    update: Callable[[Tensor, Tensor, list[Tensor | None], Any, bool], tuple[Tensor, list[Tensor | None]]]
    importance_slot: str | None = None

    @property
    def importance_index(self) -> int:
        """Return the position of the importance slot, or -1."""
        return next((i for i, slot in enumerate(self.slots) if slot.name == self.importance_slot), -1)

    @property
    def required(self) -> int:
        """Return the number of slots that every parameter has; the optional slots follow them."""
        return sum(slot.option is None for slot in self.slots)
