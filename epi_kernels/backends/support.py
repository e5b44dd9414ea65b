"""What a backend is asked, a `Spec`, and what it answers, a `Support`."""

from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch

FLOAT32 = frozenset({torch.float32})


@dataclass(frozen=True)
class Support:
    """The answer of a backend: yes, or no with the reason. In a condition, yes counts as True.

    ``first and second`` is therefore the first answer that is no, or yes if both are yes.

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
        """Return the answer of a backend that can run the spec."""
        return cls(True, "")

    @classmethod
    def no(cls, reason: str) -> "Support":
        """Return the answer of a backend that cannot run the spec; `reason` is a clause that calls the backend "it"."""
        return cls(False, reason)

    @classmethod
    def unless(cls, obstacle: str) -> "Support":
        """Return yes if the obstacle is empty, else no with the obstacle as the reason."""
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
        """Return whether the spec has only these dtypes: `values` for its values and `states` for its states."""
        if not self.values <= values:
            return Support.no(f"it takes {_names(values)} and not {_names(self.values - values)}")
        if not self.states <= states:
            names = _names(self.states - states)
            return Support.no(f"its moments and importance are {_names(states)} and not {names}")
        return Support.yes()


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
