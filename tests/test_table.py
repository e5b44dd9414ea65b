"""Tables of tensors: chunks cover every entry once, rows go up when they change, alignment is that of every address."""

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from epi_kernels.ops import Tensors
from epi_kernels.ops import table as table_module
from epi_kernels.ops.table import Table, Uploads, zeros
from epi_kernels.rules import ADAMW
from epi_kernels.schema import CHUNK_BITS, LOCK_IN, SWEEP

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [[], [0], [1], [4], [5, 0, 0, 9], [0, 8, 3]])
def test_chunks_cover_every_entry_once(sizes: list[int]) -> None:
    table = Table(("size",), sizes, 4, CPU)
    covered = [[0] * size for size in sizes]
    for chunk in table.chunks.tolist():
        tensor, number = chunk >> CHUNK_BITS, chunk & ((1 << CHUNK_BITS) - 1)
        for entry in range(4 * number, min(4 * number + 4, sizes[tensor])):
            covered[tensor][entry] += 1
    assert all(count == 1 for tensor in covered for count in tensor)


def test_a_size_beyond_2_to_the_31() -> None:
    table = Table(("size",), [7, (1 << 35) + 1], 1 << 30, CPU)
    assert table.chunks.tolist() == [0, *[1 << CHUNK_BITS | i for i in range(33)]]
    assert table.rows().tolist() == [[7], [(1 << 35) + 1]]


def test_rows_stay_where_they_are_until_a_word_changes() -> None:
    table = Table(("size", "layer"), [1, 1], 4, CPU)
    table.set("layer", [3, 4])
    before = table.rows()
    table.set("layer", [3, 4])
    assert table.rows() is before
    table.set("layer", [3, 5])
    assert table.rows().tolist() == [[1, 3], [1, 5]]
    assert before.tolist() == [[1, 3], [1, 4]]  # a launch under way may still read it


def test_aligned_needs_every_address_to_be() -> None:
    tensor = torch.zeros(64)
    assert tensor.data_ptr() % 16 == 0
    table = Table(("size", "first", "second", "number", "aligned"), [8] * 4, 4, CPU)
    table.set("number", [1] * 4)  # not an address
    table.point("first", [tensor, tensor[4:], tensor[1:], tensor])
    table.point("second", [None, tensor, tensor, tensor.half()[1:]])
    assert table.rows()[:, 4].tolist() == [1, 1, 0, 0]
    table.point("first", [tensor[2:], tensor, tensor, tensor])
    assert table.rows()[:, 4].tolist() == [0, 1, 1, 0]


def test_entries_of_unaligned_tensors_are_counted() -> None:
    tensor = torch.zeros(64)
    table = Table(("size", "first", "second", "aligned"), [3, 5, 7], 4, CPU)
    table.point("first", [tensor, tensor[1:], tensor[4:]])
    assert (table.unaligned(), table.entries()) == (5, 15)
    table.point("second", [tensor[1:], tensor, None])  # not sent yet
    assert (table.unaligned(), table.entries()) == (8, 15)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("lock_in", LOCK_IN)
def test_a_step_of_aligned_tensors_is_aligned_wherever_the_lock_is(
    lock_in: str, amsgrad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from epi_kernels.ops import tiles
    from epi_kernels.ops.sweep.triton import Sweep

    launched: list[Tensor] = []
    monkeypatch.setattr(tiles, "launch", lambda kernel, programs, device, rows, *_, **__: launched.append(rows))

    def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        memory = [torch.zeros(9, dtype=dtype, device="cpu") for _ in range(3)]
        return [memory[0][:8], memory[1][1:], memory[2][:8]]  # the second is not aligned

    lockable = [lock_in != "none", True, False]
    locks: list[Tensor | None] = []
    if lock_in in ("importance", "static"):
        states = tensors(torch.int8 if lock_in == "static" else torch.float32)
        locks = [state if can else None for state, can in zip(states, lockable, strict=True)]
    names = [slot.name for slot in ADAMW.slots if amsgrad or slot.option is None]
    given = Tensors(tensors(), tensors(), {name: tensors() for name in names}, locks)
    sweep = Sweep(ADAMW, given, lock_in, lockable)
    count, scalars = torch.zeros(3, dtype=torch.int64, device="cpu"), torch.zeros(1, 11, dtype=torch.float32)
    for moved in (False, True):
        sweep.step_(given, count, scalars, [0] * 3, False, None, None, moved)
        assert launched[-1][:, SWEEP.word("aligned")].tolist() == [1, 0, 1]
    if lock_in != "none":
        assert [word != 0 for word in launched[-1][:, SWEEP.word("lock")].tolist()] == lockable


def test_zeros_are_new_each_time() -> None:
    first = zeros((2, 3), torch.int64, CPU)
    first += 1
    assert not zeros((2, 3), torch.int64, CPU).any()


def test_steps_in_two_threads_keep_what_each_has_sent() -> None:
    steps = [Uploads(), Uploads()]
    turn = threading.Barrier(2, timeout=60)

    def first() -> None:
        with steps[0].step(capturing=False):
            turn.wait()
            turn.wait()  # the second has begun
            assert Uploads.current() is steps[0]
            Table(("size",), [1], 4, CPU).rows()
        assert Uploads.current() is None
        turn.wait()  # and goes on when this one has ended

    def second() -> None:
        turn.wait()
        assert Uploads.current() is None
        with steps[1].step(capturing=False):
            turn.wait()
            turn.wait()
            assert Uploads.current() is steps[1]
            Table(("size",), [2], 4, CPU).rows()
            Table(("size",), [3], 4, CPU).rows()
        assert Uploads.current() is None

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
    assert Uploads.current() is None
    assert [len(step._used) for step in steps] == [1, 2]


def test_a_step_that_raises_inside_of_another_gives_back_the_outer_one() -> None:
    outer, inner = Uploads(), Uploads()
    with outer.step(capturing=False):
        with pytest.raises(ZeroDivisionError), inner.step(capturing=False):
            raise ZeroDivisionError
        assert Uploads.current() is outer
    assert Uploads.current() is None


class Device:
    """A GPU for tables and uploads, in the memory of the host; counts copies, knows a stream and a capture.

    As on a GPU, a captured copy arrives when the graph is replayed, not before.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = torch.device("cuda", 0)
        self.stream, self.capturing = 0, False
        self.pinned, self.copies = 0, 0
        self._captured: list[tuple[Tensor, Tensor]] = []
        to = Tensor.to

        def pin_memory(values: Tensor) -> Tensor:
            self.pinned += 1
            return values.clone()

        def sent(values: Tensor, *arguments: Any, **others: Any) -> Tensor:
            if arguments != (self.device,):
                return to(values, *arguments, **others)
            self.copies += 1
            if not self.capturing:
                return values.clone()
            there = torch.full_like(values, -1)
            self._captured.append((there, values))
            return there

        monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(Tensor, "to", sent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=self.stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        table_module._chunks.cache_clear()

    def replay(self) -> None:
        """Replay all copies that were captured."""
        for there, values in self._captured:
            there.copy_(values)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    yield Device(monkeypatch)
    table_module._chunks.cache_clear()


def test_what_a_captured_step_reads_lives_on_after_an_eager_step_with_other_gradients(gpu: Device) -> None:
    uploads = Uploads()
    with uploads.step(capturing=False):
        table = Table(("size", "grad"), [3], 4, gpu.device)
        table.set("grad", [1])
        table.rows()
    for capturing in (False, True):  # the second has nothing to send
        with uploads.step(capturing=capturing):
            table.rows()
    read = weakref.ref(table._there), weakref.ref(table.chunks)
    for address in (2, 3):
        with uploads.step(capturing=False):
            table.set("grad", [address])
            table.rows()
    del table
    table_module._chunks.cache_clear()
    gc.collect()
    assert all(tensor() is not None for tensor in read)


def test_what_the_step_before_has_sent_is_neither_pinned_nor_sent_again(gpu: Device) -> None:
    uploads, values = Uploads(), torch.arange(5, dtype=torch.float32, device="cpu")
    for _ in range(3):
        with uploads.step(capturing=False):
            assert uploads.of(values.clone(), gpu.device).tolist() == values.tolist()
    assert (gpu.pinned, gpu.copies) == (1, 1)
    with uploads.step(capturing=False):
        uploads.of(values + 1, gpu.device)
    assert (gpu.pinned, gpu.copies) == (2, 2)


def test_chunks_are_shared_within_a_stream_alone_and_not_out_of_a_capture(gpu: Device) -> None:
    def chunks() -> Tensor:
        return Table(("size",), [9], 4, gpu.device).chunks

    first = chunks()
    assert chunks() is first
    gpu.stream = 1
    other = chunks()
    assert other is not first
    assert other.tolist() == first.tolist()
    gpu.stream, gpu.capturing = 2, True
    captured = chunks()
    gpu.capturing = False
    assert chunks() is not captured


@pytest.mark.parametrize("again", [False, True], ids=["eager", "captured"])
def test_what_a_captured_step_has_sent_is_taken_by_no_later_step(gpu: Device, again: bool) -> None:
    uploads, values = Uploads(), torch.arange(5, dtype=torch.float32, device="cpu")
    table = Table(("size", "grad"), [3], 4, gpu.device)
    with uploads.step(capturing=False):
        table.rows()
        uploads.of(values, gpu.device)
    with uploads.step(capturing=True):
        gpu.capturing = True
        table.set("grad", [7])
        captured = [table.rows(), uploads.of(values + 1, gpu.device)]
        assert table.rows() is captured[0]
        assert uploads.of(values, gpu.device).tolist() == values.tolist()  # sent before
    with uploads.step(capturing=again):
        gpu.capturing = again
        later = [table.rows(), uploads.of(values + 1, gpu.device), uploads.of(values, gpu.device)]
    assert all(one is not other for one, other in zip(captured, later, strict=False))
    if not again:
        assert [found.tolist() for found in later] == [[[3, 7]], (values + 1).tolist(), values.tolist()]
    gpu.replay()
    assert [found.tolist() for found in captured] == [[[3, 7]], (values + 1).tolist()]


@pytest.mark.parametrize(("version", "sends"), [("2.10.1+cu130", False), ("2.11.0a0", False), ("2.11.0", True)])
def test_a_capture_sends_nothing_where_torch_cannot_pin_in_it(
    version: str, sends: bool, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    uploads, values = Uploads(), torch.arange(5, dtype=torch.float32, device="cpu")
    with uploads.step(capturing=False):
        uploads.of(values, gpu.device)
    with uploads.step(capturing=True):
        assert uploads.of(values, gpu.device).tolist() == values.tolist()
        if sends:
            uploads.of(values + 1, gpu.device)
        else:
            with pytest.raises(RuntimeError, match=r"torch 2\.1.* cannot send it: install torch 2\.11 or newer"):
                uploads.of(values + 1, gpu.device)
