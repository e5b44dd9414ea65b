"""The clock of the masks where only a device knows which steps count."""

import torch
from torch import Tensor

from epi_kernels.ops.table import Uploads, on_device


class MaskClock:
    """The number of steps that counted, on a device, and bounds of that number on the host.

    The host waits for nothing. It knows that the clock is at least what was read last, and at most as many more as
    steps have been taken since. So it knows of nearly every step that no refresh is due, and starts to read the clock
    where one may be. Replays of a graph count without the host: from the first capture on, every step may be due.

    Args:
        start: the clock so far.
        device: the device that counts from now on.

    Attributes:
        value: int64, no dimensions, on the device. It is written in place: a captured step has its address.

    Example:
        >>> clock = MaskClock(498, torch.device("cpu"))
        >>> skipped, taken = torch.tensor(False), torch.tensor(True)
        >>> [clock.count(counted) or clock.may_be_due(500) for counted in (skipped, taken, taken, taken)]
        [False, True, True, False]
    """

    def __init__(self, start: int, device: torch.device) -> None:
        self.value = on_device(torch.tensor(start, dtype=torch.int64, device="cpu"), device)
        self._least, self._steps = start, 0  # the clock that is known, and the steps taken since
        self._unseen = False  # whether a graph may count too
        # a copy of the clock, when it has arrived (None: it has), and how many of the steps it includes
        self._reading: tuple[Tensor, torch.Event | None, int] | None = None

    def set(self, clock: int) -> None:
        """Set the clock."""
        self.value.fill_(clock)
        self._least, self._steps, self._reading = clock, 0, None

    def count(self, counted: Tensor) -> None:
        """Count a step if `counted`, a bool scalar on the device, is True."""
        self.value += counted
        self._steps += 1
        uploads = Uploads.current()
        if uploads is not None:  # a graph counts on, whatever becomes of this clock
            uploads.keep(self.value)
            self._unseen = self._unseen or uploads.capturing

    def may_be_due(self, interval: int) -> bool:
        """Return whether the step that was counted last may have brought the clock to a multiple of `interval`."""
        if self._unseen:
            return True
        self._learn()
        may_be = (self._least + self._steps) // interval != self._least // interval
        if may_be and self._reading is None:
            self._read()
        return may_be

    def _read(self) -> None:
        """Begin to read the clock."""
        device, event = self.value.device, None
        arriving = self.value.to("cpu", non_blocking=True, copy=True)
        if device.type != "cpu":
            event = torch.Event(device)
            event.record(torch.accelerator.current_stream(device))
        self._reading = arriving, event, self._steps

    def _learn(self) -> None:
        """Take what was read, if it has arrived."""
        if self._reading is not None and (self._reading[1] is None or self._reading[1].query()):
            arrived, _, included = self._reading
            self._least, self._steps, self._reading = int(arrived), self._steps - included, None
