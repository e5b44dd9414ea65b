"""What an update rule is: the tensors it keeps, the numbers it needs, and how it moves an entry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Slot(NamedTuple):
    """A tensor that a rule keeps for each parameter, with a value for each entry.

    Attributes:
        name: its key in an optimizer's state.
        nonnegative: whether its values are never below 0, so that it needs no sign.
        option: the flag of a parameter group that asks for it; None: every parameter has it. Optional slots come last,
            and a parameter has all of its rule's or none.
    """

    name: str
    nonnegative: bool = False
    option: str | None = None

    def wanted(self, group: Mapping[str, Any]) -> bool:
        """Return whether the parameters of a group have this slot."""
        return self.option is None or bool(group[self.option])


@dataclass(frozen=True)
class Rule:
    """How one optimizer moves an entry. A rule knows no dtype, no mask and no memory.

    It has a twin in Triton, the function `update` of ``epi_kernels/rules/<name>_triton.py``, and one in C++,
    ``csrc/rules/<name>.h``. Each takes the same values and gives the same bits.

    Attributes:
        name: of the rule and of its files.
        title: what messages call an optimizer of this rule.
        settings: the settings of a parameter group without which there is no step.
        slots: what it keeps, in the order in which `update` has it.
        scalars: a NamedTuple of the numbers of one step, with a class method ``of(group, step)`` that computes them
            from a parameter group: from floats in double, or from float64 tensors.
        update: ``update(param, grad, slots, scalars, given)`` returns (the parameter after the step, the slots after
            it). Tensors are float32 or float64, of one dtype and shape, and none is written. An optional slot that the
            parameter lacks is None, and stays it. With ``given=True`` the slot named by `importance_slot` has this
            step's gradient in it already, and the rule takes it as it is.
        importance_slot: the slot that can serve as the importance of its parameter, or None. It is nonnegative, and its
            sign bits then carry the lock. Where it does not serve, bits may be left from a time when it did: whoever
            loads the slot clears them.
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
        """Return the number of slots that every parameter has; those behind them are optional."""
        return sum(slot.option is None for slot in self.slots)
