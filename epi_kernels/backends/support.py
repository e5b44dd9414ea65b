"""What a backend is asked, a `Spec`, and what it answers, a `Support`."""

from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch

FLOAT32 = frozenset({torch.float32})


@dataclass(frozen=True)
class Support:
    """The answer of a backend: yes, or no with the reason. True in a condition where it is yes.

    ``first and second`` is therefore the first no of both, and yes where neither is a no.

    Raises:
        ValueError: a no has no reason, or a yes has one.

    Example:
        >>> Support.yes() and Support.no("it runs on the CPU and the tensors are on meta")
        Support(supported=False, reason='it runs on the CPU and the tensors are on meta')
    """

    supported: bool
    reason: str

    def __post_init__(self) -> None:
        if self.supported == bool(self.reason):
            raise ValueError(f"supported is {self.supported} and the reason {self.reason!r}; only a no has a reason")

    def __bool__(self) -> bool:
        return self.supported

    @classmethod
    def yes(cls) -> "Support":
        """Return the answer of a backend that can run what it was asked."""
        return cls(True, "")

    @classmethod
    def no(cls, reason: str) -> "Support":
        """Return the answer of a backend that cannot, with the reason: a clause whose subject is the backend, "it"."""
        return cls(False, reason)

    @classmethod
    def unless(cls, obstacle: str) -> "Support":
        """Return yes where the obstacle is empty, and else no with the obstacle as its reason."""
        return cls(not obstacle, obstacle)


@dataclass(frozen=True)
class Spec:
    """What a backend is asked to run, as far as that does not depend on the device.

    Args:
        operation: a key of `epi_kernels.backends.registry.STEMS`.
        values: the dtypes of the parameters and gradients.
        states: the dtypes of the moments and importances.
    """

    operation: str
    values: frozenset[torch.dtype] = FLOAT32
    states: frozenset[torch.dtype] = FLOAT32

    def within(self, values: Set[torch.dtype], states: Set[torch.dtype]) -> Support:
        """Return whether a backend that takes these dtypes of values and of states takes those of the spec."""
        if not self.values <= values:
            return Support.no(f"it takes {_names(values)} and not {_names(self.values - values)}")
        if not self.states <= states:
            names = _names(self.states - states)
            return Support.no(f"its moments and importance are {_names(states)} and not {names}")
        return Support.yes()


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
