"""Lists of tensors as one table in the memory of a device, so that one launch serves them all.

A row of 64-bit words describes a tensor: its size, addresses, and whatever a kernel wants to know about it
(`epi_kernels.schema`). A launch has a program for each *chunk*, a run of entries of one tensor; a second table says
which. Both go up from pinned memory without waiting, and only when they differ from what is there already.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from epi_kernels.schema import CHUNK_BITS

# the alignment, in bytes, from which kernels read and write 128 bits at a time
ALIGNMENT = 16


class Table:
    """The rows and chunks of a list of tensors on `device`.

    Args:
        fields: the names of the words of a row, in order. "size" is filled here, and so is "aligned": 1 where every
            address of the row is a multiple of ALIGNMENT. `set` gives the others.
        sizes: the number of entries of each tensor.
        chunk: entries of a chunk, the last of a tensor excepted.
        device: where the table is read.

    Example:
        >>> table = Table(("size", "layer"), sizes=[5, 0, 2], chunk=4, device=torch.device("cpu"))
        >>> table.set("layer", [1, 1, 2])
        >>> table.rows().tolist(), [(int(p) >> 40, int(p) & 1) for p in table.chunks]
        ([[5, 1], [0, 1], [2, 2]], [(0, 0), (0, 1), (2, 0)])
    """

    def __init__(self, fields: Sequence[str], sizes: Sequence[int], chunk: int, device: torch.device) -> None:
        self.chunks = _chunks_of(tuple(sizes), chunk, device)
        self._columns = {name: i for i, name in enumerate(fields)}
        self._host = np.zeros((len(sizes), len(fields)), np.int64)
        self._addresses: set[int] = set()  # columns
        self._device = device
        self._there: Tensor | None = None
        self.set("size", sizes)

    def set(self, field: str, words: Sequence[int]) -> None:
        """Write one word of every row."""
        column = self._host[:, self._columns[field]]
        if not np.array_equal(column, words):
            column[:] = words
            self._there = None

    def point(self, field: str, tensors: Sequence[Tensor | None]) -> None:
        """Write the address of each tensor into its row, 0 for None. The tensors must outlive the launch."""
        self._addresses.add(self._columns[field])
        self.set(field, [0 if tensor is None else tensor.data_ptr() for tensor in tensors])

    def rows(self, due: Tensor | None = None) -> Tensor:
        """Return the rows on the device, int64 [tensors, fields]; sent there if anything has changed since.

        Where `due`, float32 of one value on the device, is 0, every tensor has size 0: a launch finds nothing to do.
        """
        if self._there is None:
            if "aligned" in self._columns:
                addresses = self._host[:, sorted(self._addresses)]
                self._host[:, self._columns["aligned"]] = (addresses % ALIGNMENT == 0).all(1)
            values = torch.from_numpy(self._host)
            uploads = None if self._device.type == "cpu" else Uploads.current()
            self._there = on_device(values, self._device) if uploads is None else uploads.of(values, self._device)
        uploads = Uploads.current()
        if uploads is not None:  # they may have been sent up in a step long before
            uploads.keep((self.chunks, self._there))
        if due is None:
            return self._there
        rows = self._there.clone()
        rows[:, self._columns["size"]] *= (due != 0).to(rows.dtype)
        return rows


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy on `device` of values on the CPU; an accelerator is not waited for."""
    if device.type == "cpu":
        return values.clone()
    uploads = Uploads.current()
    if uploads is not None:
        return uploads.of(values, device).clone()
    # the pinned memory is freed at once: its allocator keeps it until the copy is over
    return values.pin_memory().to(device, non_blocking=True)


class Uploads:
    """What went up to devices in the steps of one optimizer, for steps that a graph may capture.

    A replayed graph reads the same device memory, and copies into it again from the same pinned memory where the copy
    was captured. So both must live as long as the graph: what a captured step has used is kept for good. What is
    equal to something of the last step is not sent again.
    """

    def __init__(self) -> None:
        self._now: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._before: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._used: list[object] = []
        self._captured: list[object] = []

    @staticmethod
    def current() -> "Uploads | None":
        """Return the uploads of the optimizer that steps in this thread; None where none keeps any."""
        return _stepping.uploads

    @contextmanager
    def step(self, capturing: bool) -> Iterator[None]:
        """Return a context in which all that `on_device` and `Table` send up is kept here."""
        self._before, self._now, self._used = self._now, {}, []
        outer, _stepping.uploads = _stepping.uploads, self
        try:
            yield
        finally:
            _stepping.uploads = outer
            if capturing:
                self._captured += [self._now, self._used]

    def keep(self, thing: object) -> None:
        """Keep what the device reads in this step, if the step is captured."""
        self._used.append(thing)

    def of(self, values: Tensor, device: torch.device) -> Tensor:
        """Return values of the CPU on `device`, to be read alone."""
        key = (device, values.dtype, values.shape, values.numpy().tobytes())
        if key not in self._now:
            known = self._before.get(key)
            if known is None:
                pinned = values.pin_memory()
                known = pinned, pinned.to(device, non_blocking=True)
            self._now[key] = known
        return self._now[key][1]


class _Stepping(threading.local):
    """The optimizer that steps: one in each thread, for optimizers may step at once in several."""

    uploads: Uploads | None = None


_stepping = _Stepping()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which launches go to `device`, and not to the one that the process last chose."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros on `device`, brought there by a copy: a refresh is counted in launches, and a fill is one."""
    if device.type == "cpu" or Uploads.current() is not None:
        with torch.inference_mode(False):  # they may be counted on outside of it
            return torch.zeros(shape, dtype=dtype, device=device)
    return _pinned_zeros(shape, dtype).to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _pinned_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=True)


def _chunks_of(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """Return int64 [chunks], tensor << CHUNK_BITS | number, for the chunks of every tensor in order.

    Tables of the same sizes share it, within a stream: another may run ahead of the copy. While a graph is captured
    nothing is copied yet, and what is shared would stay unfilled for those that have no part in the graph.
    """
    if device.type != "cuda":
        return _chunks(sizes, chunk, device, 0)
    stream = torch.cuda.current_stream(device).cuda_stream
    make = _chunks.__wrapped__ if torch.cuda.is_current_stream_capturing() else _chunks
    return make(sizes, chunk, device, stream)


@functools.lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device, stream: int) -> Tensor:
    counts = -(-np.asarray(sizes, np.int64) // chunk)
    ends = counts.cumsum()
    tensors = np.repeat(np.arange(len(sizes), dtype=np.int64), counts)
    numbers = np.arange(len(tensors), dtype=np.int64) - np.repeat(ends - counts, counts)
    return on_device(torch.from_numpy(tensors << CHUNK_BITS | numbers), device)
