"""What every optimizer with evolving isolation offers: masks, importance, a refresh on demand, telemetry."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from epi_kernels.isolation.isolation import Isolation
from epi_kernels.isolation.telemetry import RECORDS, numbers_of_all


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

    @overload
    def telemetry(self, *, last: Literal[False] = False) -> list[dict[str, Any]]: ...
    @overload
    def telemetry(self, *, last: Literal[True]) -> dict[str, Any] | None: ...
    def telemetry(self, *, last: bool = False) -> list[dict[str, Any]] | dict[str, Any] | None:
        """Return what the last refreshes of this object did, oldest first, 256 of them at most.

        Reading the records waits for the device, a step does not. pickle and deepcopy of the optimizer keep them, and
        so does a checkpoint that is asked for them: ``optimizer.state_dict(telemetry=True)``.

        Args:
            last: return only the last record, or None before the first refresh.

        With ``capturable``, or ``fused`` and a scaler on a GPU, only the device knows which steps refreshed, and the
        list has only the last record. A record is a dict of numbers and names, over all ranks but for ``nonfinite``:

        - ``step``: the clock at the refresh; ``protected_share``: protected / eligible.
        - ``eligible``, ``budget``, ``protected``: entries that compete, k, and protected entries; `protected` is below
          `budget` only if too few scores are above 0, and above `budget` only by ties at the threshold.
        - ``locked``, ``released``, ``kept``: entries protected now and not before the refresh, before and not now, and
          both times. From these: ``hamming``, in how many entries the two masks differ (Eq. 4), and ``jaccard``, their
          overlap: 1 for the same entries, 0 for none in common.
        - ``nonfinite``: NaN or infinite squared gradients so far, over this rank's shards of all parameters.
        - ``budgets``: for each, ``scope`` ("global" or the layer's name), ``isolation_ratio``, ``eligible``,
          ``budget``, ``threshold`` (tau) and ``protected``.
        - ``layers``: for each, ``layer``, ``eligible``, ``protected``, ``locked``, ``released``, ``kept``, and
          ``minimum`` and ``maximum`` of its importance.
        """
        records = self._isolation.telemetry(self, at_most=1 if last else RECORDS)  # type: ignore[arg-type]
        if last:
            return records[0] if records else None
        return records

    def load_telemetry(self, records: Sequence[object]) -> None:
        """Let these be the records of the last refreshes: a run that goes on elsewhere brings its records along.

        ``nonfinite`` is counted on from the last of them.

        Args:
            records: as `telemetry` returned them, or as JSON has kept them.

        Raises:
            ValueError: one is not such a record; nothing has changed.

        Example:
            >>> import json
            >>> import torch
            >>> from epi_kernels import EPIAdamW
            >>> weight = torch.nn.Parameter(torch.ones(4))
            >>> optimizer = EPIAdamW([("weight", weight)], mask_interval=1, isolation_ratio=0.5)
            >>> weight.grad = torch.arange(4.0)
            >>> optimizer.step()
            >>> other = EPIAdamW([("weight", weight)], mask_interval=1, isolation_ratio=0.5)
            >>> other.load_telemetry(json.loads(json.dumps(optimizer.telemetry())))
            >>> other.telemetry(last=True)["kept"], other.telemetry() == optimizer.telemetry()
            (0, True)
        """
        self._isolation.take_records(numbers_of_all(records))

    def state_dict(self, *, telemetry: bool = False) -> dict[str, Any]:
        """Return the state in torch's form.

        Args:
            telemetry: add the records of the last refreshes under "telemetry", from where `load_state_dict` takes them.
                torch's optimizers ignore them.

        Raises:
            ValueError: a program has written a setting into one group that must be equal in all, or cannot change.
        """
        packed = super().state_dict()  # type: ignore[misc]
        return {**packed, "telemetry": self.telemetry()} if telemetry else packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, its records of refreshes included if it has any; see the class that this one extends.

        Raises:
            ValueError: the state is of another optimizer, of other shapes, or incomplete, or a record of a refresh is
                none; the message names the entry, and the optimizer is as it was.
        """
        rest = dict(state_dict)
        records = numbers_of_all(rest.pop("telemetry", ()))
        super().load_state_dict(rest)  # type: ignore[misc]
        if "telemetry" in state_dict:
            self._isolation.take_records(records)

    def __repr__(self) -> str:
        """Return torch's text and the grouping and backend in force."""
        return f"{super().__repr__()}\n{self._isolation.text(self)}"  # type: ignore[arg-type]
