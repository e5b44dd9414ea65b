"""What every optimizer with evolving isolation has: masks, importance, a refresh on demand, telemetry."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epi_kernels.isolation.isolation import Isolation


class Isolating:
    """Mixed into an optimizer that has an `Isolation`: what users ask of it."""

    @property
    def _isolation(self) -> Isolation:
        raise NotImplementedError

    _take_written: Callable[[], None]  # of the optimizer: what a program has written into the groups

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` are protected: a new bool tensor of its shape, True = protected.

        Of a DTensor: of the shard that this rank holds.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        return self._isolation.mask(self, param)  # type: ignore[arg-type]

    def importance(self, param: Tensor) -> Tensor:
        """Return the importance S of each entry of `param`: a new tensor of its shape, >= 0, in squared gradient units.

        Of a DTensor: of the shard that this rank holds.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        return self._isolation.importance(self, param)  # type: ignore[arg-type]

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the protected entries now, from the importance as it is; nothing else changes.

        Where parameters are sharded, every rank must call it at the same step.

        Raises:
            ValueError: a setting that was written into the groups is out of its range, or not in all of them.

        For task boundaries. With beta = 0.99 the importance remembers about 100 steps: what is protected is what the
        task just trained uses.
        """
        self._take_written()
        self._isolation.refresh(self)  # type: ignore[arg-type]

    def telemetry(self) -> list[dict[str, Any]]:
        """Return what the last refreshes of this object did, oldest first, 256 of them at most (telemetry.RECORDS).

        Reading waits for the device, stepping does not. pickle and deepcopy of the optimizer keep the records.

        With ``capturable``, or ``fused`` and a scaler on a GPU, the device alone knows which steps refreshed, and the
        list has the last one. A record is a dict of plain numbers and names, over all ranks but for ``nonfinite``:

        - ``step``: the clock at the refresh; ``protected_share``: protected / eligible.
        - ``eligible``, ``budget``, ``protected``: entries that compete, k, and entries protected; `protected` is below
          `budget` only for want of scores above 0, and above it only by ties at the threshold.
        - ``nonfinite``: NaN or infinite squared gradients so far, over all parameters, as far as this rank holds them.
        - ``budgets``: for each, ``scope`` ("global" or the layer's name), ``isolation_ratio``, ``eligible``,
          ``budget``, ``threshold`` (tau) and ``protected``.
        - ``layers``: for each, ``layer``, ``eligible``, ``protected``, ``locked`` (newly), ``released``, and the range
          of its importance, ``minimum`` and ``maximum``.
        """
        return self._isolation.telemetry(self)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        """Return torch's text and the grouping and backend in force."""
        return f"{super().__repr__()}\n{self._isolation.text(self)}"  # type: ignore[arg-type]
