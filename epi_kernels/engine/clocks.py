"""The clocks of the parameters, ``state["step"]``: counted together, and the scalars of a step that follow from them.

Clocks that were made together are elements of one vector, so that one addition counts them all: 291 separate tensors
took 0.8 ms to count, as long as the rest of the step's Python. An element stays where it is when other parameters have
gradients, so that a clock to which a program has a reference goes on counting, as torch's does.

On the host, counting gives numbers. On the device (``capturable``, or under a scaler that knows only there whether a
step is skipped) it gives tensors, and nothing waits for them: a captured step goes on counting with every replay.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from epi_kernels.engine.settings import Groups
from epi_kernels.rules import Rule
from epi_kernels.schema import SweepScalars

# the clocks of a plan may lie in this many vectors, each an addition; from more they move into a new one
_MOST_VECTORS = 4


# the vectors that were made here, each as long as one of its clocks lives; a program's own vectors are not touched
_made = WeakTensorKeyDictionary()


class _Elements(NamedTuple):
    """Clocks that are elements of one vector."""

    vector: Tensor
    where: Tensor | None  # int64 positions in the vector; None: all of it, in order

    def add_(self, amount: Tensor | int) -> None:
        """Add to these clocks, and to no others of the vector."""
        if self.where is None:
            self.vector.add_(amount)
        else:
            self.vector[self.where] = self.vector[self.where] + amount

    def values(self) -> Tensor:
        """Return the values of these clocks."""
        return self.vector if self.where is None else self.vector[self.where]


class _Clocks:
    """Clocks that are counted together."""

    home: torch.device | None = None  # the device where they are read; None: the host reads them
    _elements: list[Tensor]

    def hand_out(self) -> list[Tensor]:
        """Return, once, the clock of each parameter, bundle by bundle: what ``state["step"]`` shall be.

        They are not kept here, so that clearing a state frees its clock at once.
        """
        elements, self._elements = self._elements, []
        return elements


class HostClocks(_Clocks):
    """Clocks on the CPU.

    Args:
        bundles: for each bundle, ``state["step"]`` of each of its parameters.
    """

    def __init__(self, bundles: Sequence[Sequence[Tensor]]) -> None:
        steps = [step for bundle in bundles for step in bundle]
        self._vectors, self._elements, order = _vectors_of(steps, torch.device("cpu"))
        self._order = order if order != sorted(order) else None
        self._sizes = [len(bundle) for bundle in bundles]
        self._values: list[float] = []

    def count(self, found_inf: dict[torch.device, Tensor]) -> bool:
        """Count a step, and return True; or, where an infinite gradient was found, do nothing and return False.

        Under a GradScaler whose flags are on a device, the host waits for the device here, once in a step.
        """
        if found_inf and any(found.item() for found in found_inf.values()):
            return False
        values: list[float] = []
        for elements in self._vectors:
            elements.add_(1)
            values += elements.values().tolist()
        self._values = values
        if self._order is not None:
            self._values = [0.0] * len(values)
            for value, i in zip(values, self._order, strict=True):
                self._values[i] = value
        return True

    def values(self, bundle: int) -> list[float]:
        """Return the clock of each parameter of a bundle."""
        first = sum(self._sizes[:bundle])
        return self._values[first : first + self._sizes[bundle]]

    def scalars(self, bundle: int, members: Sequence[int], groups: Groups, rule: Rule) -> tuple[Tensor, list[int]]:
        """Return (rows of scalars, the row of each parameter); `members` are the parameters' groups."""
        values = self.values(bundle)
        if values.count(values[0]) == len(values) and len(set(members)) == 1:
            table = [scalars_of(rule, groups[members[0]], values[0])]
            return torch.tensor(table, dtype=torch.float64, device="cpu"), [0] * len(members)
        keys = list(zip(members, values, strict=True))
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        table = [scalars_of(rule, groups[i], clock) for i, clock in row_of]
        return torch.tensor(table, dtype=torch.float64, device="cpu"), list(map(row_of.__getitem__, keys))


class DeviceClocks(_Clocks):
    """Clocks on the devices of the parameters.

    Args:
        bundles: for each bundle, ``state["step"]`` of each of its parameters; at least one bundle.
        devices: the device of each bundle.
    """

    def __init__(self, bundles: Sequence[Sequence[Tensor]], devices: Sequence[torch.device]) -> None:
        self._elements: list[Tensor] = []
        self._bundles: list[tuple[list[_Elements], Tensor | None]] = []
        for steps, device in zip(bundles, devices, strict=True):
            vectors, elements, order = _vectors_of(steps, device)
            self._elements += elements
            back = [0] * len(order)
            for position, i in enumerate(order):
                back[i] = position
            unordered = order != sorted(order)
            self._bundles.append((vectors, torch.tensor(back, dtype=torch.int64, device=device) if unordered else None))
        self.home = devices[0]

    def count(self, found_inf: dict[torch.device, Tensor]) -> bool:
        """Count a step where no infinite gradient was found; return True."""
        for vectors, _ in self._bundles:
            for elements in vectors:
                found = found_inf.get(elements.vector.device)
                elements.add_(1 if found is None else (found == 0).to(elements.vector.dtype))
        return True

    def scalars(self, bundle: int, members: Sequence[int], groups: Groups, rule: Rule) -> tuple[Tensor, list[int]]:
        """Return (rows of scalars, the row of each parameter), the rows computed and left on the device.

        If lr, a beta, eps or weight_decay is a tensor, the device reads it, so that a schedule that writes into it
        reaches a captured step; a number is a constant of the graph, as with torch.
        """
        vectors, back = self._bundles[bundle]
        clocks = vectors[0].values() if len(vectors) == 1 else torch.cat([elements.values() for elements in vectors])
        clocks = clocks if back is None else clocks[back]
        parts: list[Tensor] = []
        for i in dict.fromkeys(members):
            where = [j for j, member in enumerate(members) if member == i]
            # the parameters of a group lie side by side in a bundle
            steps = clocks[where[0] : where[-1] + 1].double()
            row = scalars_of(rule, _on_device(groups[i], clocks.device), steps)
            columns = [
                value.expand_as(steps) if isinstance(value, Tensor) else torch.full_like(steps, value) for value in row
            ]
            parts.append(torch.stack(columns, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float(), list(range(len(members)))


def scalars_of(rule: Rule, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
    """Return a row of scalars: `SweepScalars`, then the rule's.

    Args:
        rule: the update rule.
        group: a parameter group of torch with the settings that the rule reads, maximize, and importance_beta if the
            importance is a tensor of its own. If ``group["importance"]`` names the rule's importance slot, the
            importance has the beta of that slot, ``group["betas"][1]``.
        step: the parameter's clock, this step included: a float, or a tensor of float64 clocks. In the second case
            each scalar that depends on the clock, or on a setting that is a tensor, is a tensor.

    Example:
        >>> from epi_kernels.rules import ADAMW
        >>> group = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0.0, "weight_decay": 0.0, "maximize": False}
        >>> scalars_of(ADAMW, group, 1)
        (1.0, 0.0, 1.0, 1, 1.0, 0.5, 0.5, 0.75, 0.25, 1.0, 0.5, 0.0)
    """
    in_slot = rule.importance_slot is not None and group.get("importance") == rule.importance_slot
    beta = group["betas"][1] if in_slot else group.get("importance_beta", 0.0)
    if not isinstance(step, Tensor):
        beta = float(beta)
    own = SweepScalars(-1.0 if group["maximize"] else 1.0, beta, 1.0 - beta, step)
    return (*own, *rule.scalars.of(group, step))


def _vectors_of(steps: Sequence[Tensor], device: torch.device) -> tuple[list[_Elements], list[Tensor], list[int]]:
    """Return (vectors, the clocks as elements of them, the position in `steps` of each element).

    A clock that is an element of a vector of ours on `device` stays there. The others become elements of a new vector.
    The positions are in the order of the vectors, and within each in the order of its elements.
    """
    found: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}  # id of a vector -> it and its clocks
    strange, met = [], set()
    for position, step in enumerate(steps):
        vector = step._base
        known = id(step) in met  # two parameters share a clock: each gets one of its own
        met.add(id(step))
        if known or vector is None or vector not in _made or vector.device != device:
            strange.append(position)
        else:
            element = (step.data_ptr() - vector.data_ptr()) // vector.element_size()
            found.setdefault(id(vector), (vector, []))[1].append((element, position))
    if len(found) + bool(strange) > _MOST_VECTORS:
        found, strange = {}, list(range(len(steps)))
    elements = list(steps)
    vectors, order = [], []
    for vector, members in found.values():
        members.sort()
        where = [element for element, _ in members]
        whole = where == list(range(len(vector)))
        index = None if whole else torch.tensor(where, dtype=torch.int64, device="cpu").to(device)
        vectors.append(_Elements(vector, index))
        order += [position for _, position in members]
    if strange:
        with torch.inference_mode(False):  # else they could not be counted outside of it
            dtype = steps[strange[0]].dtype
            vector = torch.stack([steps[i].detach().to(device=device, dtype=dtype) for i in strange])
            _made[vector] = True
            for i, own in zip(strange, vector.unbind(), strict=True):
                elements[i] = own
        vectors.append(_Elements(vector, None))
        order += strange
    return vectors, elements, order


def _on_device(group: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the group with each setting that is a tensor as a 0-d float64 tensor on `device`, or as a float."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # a graph cannot read a tensor on the CPU: it becomes a number
        return (
            float(value) if value.device.type == "cpu" != device.type else value.to(device, torch.float64).reshape(())
        )

    numbers: dict[str, Any] = {key: moved(group[key]) for key in ("lr", "eps", "weight_decay") if key in group}
    return {**group, **numbers, "betas": tuple(map(moved, group["betas"]))}
