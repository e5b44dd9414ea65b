"""Tables in device memory that describe lists of tensors, so that one launch serves them all.

A row of 64-bit words describes a tensor: its size, its addresses, and whatever else a kernel needs to know about the
tensor (`epi_kernels.schema`). A launch has a program for each *chunk*, a run of entries of one tensor; a second table
lists the chunks. Both tables are sent from pinned memory without waiting, and only when they differ from what the
device already has.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epi_kernels.schema import CHUNK_BITS
from epi_kernels.storage.block8 import BLOCK

# from this version on, torch allocates pinned memory in a capture; before, only by luck
_PINS_IN_CAPTURES = "2.11"

# the alignment, in bytes, that lets kernels read and write 128 bits at a time
ALIGNMENT = 16


class Table:
    """The rows and chunks of a list of tensors on `device`.

    Args:
        fields: the names of the words of a row, in order. The table fills "size" and "aligned" itself; "aligned" is 1
            where every address in the row is a multiple of ALIGNMENT. `set` and `point` fill the others.
        sizes: the number of entries of each tensor.
        chunk: the number of entries in a chunk; the last chunk of a tensor may have fewer.
        device: the device that reads the table.
        kinds: the kind of each tensor; a launch for one kind takes its chunks from `chunks_of`. Without, all have
            kind 0.

    Example:
        >>> table = Table(("size", "layer"), sizes=[5, 0, 2], chunk=4, device=torch.device("cpu"))
        >>> table.set("layer", [1, 1, 2])
        >>> table.rows().tolist(), [(int(p) >> 40, int(p) & 1) for p in table.chunks]
        ([[5, 1], [0, 1], [2, 2]], [(0, 0), (0, 1), (2, 0)])
    """

    def __init__(
        self,
        fields: Sequence[str],
        sizes: Sequence[int],
        chunk: int,
        device: torch.device,
        kinds: Sequence[int] = (),
    ) -> None:
        self.chunks = _chunks_of(tuple(sizes), chunk, device)
        self.chunks_of = {0: self.chunks}
        if any(kinds):
            self.chunks_of = {
                kind: _chunks_of(
                    tuple(size if own == kind else 0 for size, own in zip(sizes, kinds, strict=True)), chunk, device
                )
                for kind in sorted(set(kinds))
            }
        self._columns = {name: i for i, name in enumerate(fields)}
        self._host = np.zeros((len(sizes), len(fields)), np.int64)
        self._addresses: set[int] = set()  # columns
        self._device = device
        self._there: Tensor | None = None
        self.set("size", sizes)

    def set(self, field: str, words: Sequence[int]) -> None:
        """Write the word `field` of every row."""
        column = self._host[:, self._columns[field]]
        if not np.array_equal(column, words):
            column[:] = words
            self._there = None

    def point(self, field: str, tensors: Sequence[Tensor | None]) -> None:
        """Write the address of each tensor into its row, 0 for None. The tensors must outlive the launch."""
        self._addresses.add(self._columns[field])
        self.set(field, [0 if tensor is None else tensor.data_ptr() for tensor in tensors])

    def rows(self) -> Tensor:
        """Return the rows on the device, int64 [tensors, fields]; they are sent only if they have changed."""
        rows = self._there
        uploads = Uploads.current()
        if rows is None:
            if "aligned" in self._columns:
                self._host[:, self._columns["aligned"]] = self._aligned()
            values = torch.from_numpy(self._host)
            if uploads is None or self._device.type == "cpu":
                rows = on_device(values, self._device)
            else:
                rows = uploads.of(values, self._device)
            if uploads is None or not uploads.capturing:  # what a capture sends is there only in replays
                self._there = rows
        if uploads is not None:  # the rows may have been sent in a step long before
            uploads.keep((self.chunks, self.chunks_of, rows))
        return rows

    def entries(self) -> int:
        """Return the number of entries of all tensors."""
        return int(self._host[:, self._columns["size"]].sum())

    def unaligned(self) -> int:
        """Return the number of entries in tensors with an address in their row that is no multiple of ALIGNMENT."""
        return int(self._host[~self._aligned(), self._columns["size"]].sum())

    def _aligned(self) -> "np.ndarray[Any, Any]":
        """Return for each row whether every address in it is a multiple of ALIGNMENT."""
        addresses = self._host[:, sorted(self._addresses)]
        return np.asarray((addresses % ALIGNMENT == 0).all(1))


def row_length(tensor: Tensor) -> int:
    """Return the entries of a row of a tensor, which is one index of dimension 0; at least 1."""
    return max(1, tensor.shape[1:].numel()) if tensor.dim() else 1


def size_in_tiles(tensor: Tensor, tile: int) -> int:
    """Return the size of a tensor with blocks of 8 bits in a table: rows that are not whole blocks are whole tiles."""
    length = row_length(tensor)
    return tensor.numel() // length * (length + (-length % tile if length % BLOCK else 0))


def table_sizes(tensors: Sequence[Tensor | None], tile: int) -> list[int]:
    """Return the size of each tensor in a table; see `size_in_tiles`. None has no entries."""
    return [
        0 if tensor is None else size_in_tiles(tensor, tile) if tensor.dtype == torch.uint8 else tensor.numel()
        for tensor in tensors
    ]


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy on `device` of values on the CPU, without waiting for an accelerator."""
    if device.type == "cpu":
        return values.clone()
    uploads = Uploads.current()
    if uploads is not None:
        return uploads.of(values, device).clone()
    # the pinned memory may be freed at once: its allocator does not reuse it until the copy is over
    return values.pin_memory().to(device, non_blocking=True)


class Uploads:
    """What one optimizer's steps have sent to devices, for steps that a graph may capture.

    A replayed graph reads the same device memory and, if the copy was captured, copies into it again from the same
    pinned memory. So both must live as long as the graph: whatever a captured step has used is kept for good. Values
    equal to values sent in the last step are not sent again. A capture copies nothing, only its replays do: no later
    step takes what a captured step has sent.

    Attributes:
        capturing: whether the step is captured.
    """

    def __init__(self) -> None:
        self.capturing = False
        self._now: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._before: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._used: list[object] = []
        self._captured: list[object] = []

    @staticmethod
    def current() -> "Uploads | None":
        """Return the uploads of the optimizer that is stepping in this thread; None if no optimizer keeps uploads."""
        return _stepping.uploads

    @contextmanager
    def step(self, capturing: bool) -> Iterator[None]:
        """Return a context in which everything that `on_device` and `Table` send is kept here."""
        self._before, self._now, self._used = self._now, {}, []
        self.capturing = capturing
        outer, _stepping.uploads = _stepping.uploads, self
        try:
            yield
        finally:
            _stepping.uploads = outer
            if capturing:
                self._captured += [self._now, self._used]
                self._now = self._before

    def keep(self, thing: object) -> None:
        """Keep what the device reads in this step, if the step is captured."""
        self._used.append(thing)

    def of(self, values: Tensor, device: torch.device) -> Tensor:
        """Return a copy on `device` of values on the CPU; the caller must not write the copy.

        Raises:
            RuntimeError: the step is captured, the values have not been sent before, and this version of torch cannot
                allocate pinned memory in a capture.
        """
        key = (device, values.dtype, values.shape, values.numpy().tobytes())
        if key not in self._now:
            known = self._before.get(key)
            if known is None:
                if self.capturing and torch.torch_version.TorchVersion(torch.__version__) < _PINS_IN_CAPTURES:
                    raise RuntimeError(
                        "step() is being captured, and what kernels read has changed since the step before, such as "
                        f"the address of a gradient. torch {torch.__version__} cannot send it: install torch "
                        f"{_PINS_IN_CAPTURES} or newer, or first take a step with the same tensors outside of the graph"
                    )
                pinned = values.pin_memory()
                known = pinned, pinned.to(device, non_blocking=True)
            self._now[key] = known
        return self._now[key][1]


class _Stepping(threading.local):
    """The optimizer that is stepping, for each thread: several threads may step optimizers at once."""

    uploads: Uploads | None = None


_stepping = _Stepping()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which launches go to `device`, not to the device that the process last chose."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros on `device`, sent as a copy: a refresh must need few launches, and a fill would be one more."""
    if device.type == "cpu" or Uploads.current() is not None:
        with torch.inference_mode(False):  # counts may be added to them outside inference mode
            return torch.zeros(shape, dtype=dtype, device=device)
    return _pinned_zeros(shape, dtype).to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _pinned_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=True)


def _chunks_of(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """Return int64 [chunks], tensor << CHUNK_BITS | number, for the chunks of every tensor in order.

    Tables of the same sizes share the result within a stream; another stream could read it before the copy is over.
    Nothing is shared while a graph is captured: nothing is copied then, and tables outside the graph would find the
    result unfilled.
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
