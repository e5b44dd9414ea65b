"""The clocks of the parameters, ``state["step"]``: counted together, and the scalars of a step that follow from them.

The clocks of all bundles of a step are elements of a few vectors, so that one addition counts them all: 291 tensors of
their own took 0.8 ms to count, as long as the rest of the step's Python.

On the host, counting gives numbers. On the device (``capturable``, or under a scaler that knows only there whether a
step is skipped) it gives tensors, and nothing waits for them: a captured step goes on counting with every replay.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.ops import scalars_of
from epi_kernels.rules import Rule

Groups = Sequence[dict[str, Any]]


class HostClocks:
    """Clocks on the CPU.

    Args:
        bundles: for each bundle the steps of its parameters.
    """

    home = None  # the device where they are read

    def __init__(self, bundles: Sequence[Sequence[Tensor]]) -> None:
        self._vector = _vector_of([step for bundle in bundles for step in bundle], torch.device("cpu"))
        self._sizes = [len(bundle) for bundle in bundles]
        self._values: list[float] = []

    def elements(self) -> list[Tensor]:
        """Return the clock of each parameter, bundle by bundle: what ``state["step"]`` shall be."""
        return list(self._vector)

    def count(self, found_inf: dict[torch.device, Tensor]) -> bool:
        """Count a step, and return True; or, where an infinite gradient was found, do nothing and return False."""
        if any(found.item() for found in found_inf.values()):
            return False
        self._values = self._vector.add_(1).tolist()
        return True

    def scalars(self, rule: Rule, bundle: int, members: Sequence[int], groups: Groups) -> tuple[Tensor, list[int]]:
        """Return (rows of scalars of `rule`, the row of each parameter); `members` are the parameters' groups."""
        first = sum(self._sizes[:bundle])
        keys = list(zip(members, self._values[first : first + len(members)], strict=True))
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        table = [scalars_of(rule, groups[i], clock) for i, clock in row_of]
        return torch.tensor(table, dtype=torch.float64, device="cpu"), list(map(row_of.__getitem__, keys))


class DeviceClocks:
    """Clocks where the parameters are.

    Args:
        bundles: for each bundle the steps of its parameters; at least one bundle.
        devices: the device of each bundle.
    """

    def __init__(self, bundles: Sequence[Sequence[Tensor]], devices: Sequence[torch.device]) -> None:
        self._vectors = [_vector_of(steps, device) for steps, device in zip(bundles, devices, strict=True)]
        self.home = devices[0]

    def elements(self) -> list[Tensor]:
        """Return the clock of each parameter, bundle by bundle: what ``state["step"]`` shall be."""
        return [step for vector in self._vectors for step in vector]

    def count(self, found_inf: dict[torch.device, Tensor]) -> bool:
        """Count a step where no infinite gradient was found; return True."""
        for vector in self._vectors:
            found = found_inf.get(vector.device)
            vector.add_(1 if found is None else (found == 0).to(vector.dtype))
        return True

    def scalars(self, rule: Rule, bundle: int, members: Sequence[int], groups: Groups) -> tuple[Tensor, list[int]]:
        """Return (rows of scalars of `rule`, the row of each parameter), the rows computed and left on the device.

        A tensor among lr, betas, eps and weight_decay is read there, so that a schedule that writes into it reaches a
        captured step; a number is a constant of the graph, as with torch.
        """
        clocks = self._vectors[bundle]
        rows: list[list[Tensor]] = []
        for i in dict.fromkeys(members):
            where = [j for j, member in enumerate(members) if member == i]
            # the parameters of a group lie side by side in a bundle
            steps = clocks[where[0] : where[-1] + 1].double()
            of_group = scalars_of(rule, _on_device(groups[i], clocks.device), steps)
            rows.append(
                [
                    value.expand_as(steps) if isinstance(value, Tensor) else torch.full_like(steps, value)
                    for value in of_group
                ]
            )
        columns = [torch.cat(column) for column in zip(*rows, strict=True)]
        return torch.stack(columns, 1).float(), list(range(len(members)))


def _vector_of(steps: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return one vector of the values of `steps`: the one they are elements of already, if they are all of it.

    A captured step has its address: it must stay where it is over a change elsewhere and over a load.
    """
    if not steps:
        return torch.zeros(0, dtype=torch.float32, device=device)
    base = steps[0]._base
    if base is not None and base.dim() == 1 and len(base) == len(steps) and base.device == device:
        size = base.element_size()
        if all(step.data_ptr() == base.data_ptr() + i * size for i, step in enumerate(steps)):
            return base
    with torch.inference_mode(False):  # the clocks may be counted outside of it
        return torch.stack([step.detach().to(device=device, dtype=steps[0].dtype) for step in steps])


def _on_device(group: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the group with those of its numbers that are tensors as float64 of no dimension on `device`."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # a tensor on the CPU is a number: a graph cannot read it
        return (
            float(value) if value.device.type == "cpu" != device.type else value.to(device, torch.float64).reshape(())
        )

    numbers = {key: moved(group[key]) for key in ("lr", "eps", "weight_decay")}
    return {**group, **numbers, "betas": tuple(map(moved, group["betas"]))}
