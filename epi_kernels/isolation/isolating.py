"""What every optimizer with evolving isolation offers: masks, importance, a refresh on demand, telemetry."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epi_kernels.isolation.isolation import Isolation


class Isolating:
    """A mixin for an optimizer that has an `Isolation`: the methods that users call."""

    @property
    def _isolation(self) -> Isolation:
        raise NotImplementedError

    _take_written: Callable[[], None]  # the optimizer's: takes over settings that a program wrote into the groups

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` are protected: a new bool tensor of its shape, True = protected.

        For a DTensor, the result covers this rank's shard.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        return self._isolation.mask(self, param)  # type: ignore[arg-type]

    def importance(self, param: Tensor) -> Tensor:
        """Return the importance S of each entry of `param`: a new tensor of its shape, >= 0, in squared gradient units.

        For a DTensor, the result covers this rank's shard.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        return self._isolation.importance(self, param)  # type: ignore[arg-type]

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the protected entries now, from the current importance; nothing else changes.

        If parameters are sharded, every rank must call `refresh` at the same step.

        Raises:
            ValueError: a setting that a program wrote into the groups is out of its range, or not in all groups.

        Call this at the end of a task. With beta = 0.99 the importance remembers about 100 steps, so the entries that
        this task uses get protected.
        """
        self._take_written()
        self._isolation.refresh(self)  # type: ignore[arg-type]

    def telemetry(self) -> list[dict[str, Any]]:
        """Return what the last refreshes of this object did, oldest first, 256 of them at most (telemetry.RECORDS).

        Reading the records waits for the device, a step does not. pickle and deepcopy of the optimizer keep them.

        With ``capturable``, or ``fused`` and a scaler on a GPU, only the device knows which steps refreshed, and the
        list has only the last record. A record is a dict of numbers and names, over all ranks but for ``nonfinite``:

        - ``step``: the clock at the refresh; ``protected_share``: protected / eligible.
        - ``eligible``, ``budget``, ``protected``: entries that compete, k, and protected entries; `protected` is below
          `budget` only if too few scores are above 0, and above `budget` only by ties at the threshold.
        - ``nonfinite``: NaN or infinite squared gradients so far, over this rank's shards of all parameters.
        - ``budgets``: for each, ``scope`` ("global" or the layer's name), ``isolation_ratio``, ``eligible``,
          ``budget``, ``threshold`` (tau) and ``protected``.
        - ``layers``: for each, ``layer``, ``eligible``, ``protected``, ``locked`` (newly), ``released``, and
          ``minimum`` and ``maximum`` of its importance.
        """
        return self._isolation.telemetry(self)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        """Return torch's text and the grouping and backend in force."""
        return f"{super().__repr__()}\n{self._isolation.text(self)}"  # type: ignore[arg-type]
