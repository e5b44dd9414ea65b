"""A GPU for the backend triton, on a machine without one: what Triton compiles for it is interpreted by `ptx`.

Tensors on the CPU stand for those on the device. All else is as on a GPU: the optimizer's own code makes the tables and
launches the kernels, and Triton specialises and compiles them. A launch may access the tensors among its arguments, and
those to which a table among them points.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from ptx import Kernel, ProcessMemory
from torch import Tensor
from triton import runtime
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from epi_kernels.backends import registry, triton
from epi_kernels.backends.support import Support
from epi_kernels.ops.table import Table


class Launch(NamedTuple):
    """What one launch has done."""

    kernel: str
    constants: dict[str, Any]  # the compile-time arguments
    entries: dict[str, int]  # tensor to which a table points -> bits of one entry
    widths: dict[str, dict[str, set[int]]]  # tensor -> "load", "store" or "update" -> bits of the accesses


class Device:
    """Triton's driver of the device, and a record of its launches.

    Args:
        architecture: for which Triton compiles, such as "sm_90".
    """

    def __init__(self, architecture: str) -> None:
        self.launches: list[Launch] = []
        self._capability = int(architecture.removeprefix("sm_"))
        self._tensors: dict[int, tuple[int, int]] = {}  # address -> bytes, bits of an entry
        self._fields: dict[int, tuple[str, ...]] = {}  # address of a table's rows -> the names of their words
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 1 << 17},
            load_binary=lambda *_: (None, None, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        """Return what Triton compiles for."""
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """Return the key under which Triton keeps its compiled kernels."""
        return self._capability

    def get_current_stream(self, _: int) -> int:
        """Return the stream of a device."""
        return 0

    def note(self, tensor: Tensor) -> None:
        """Remember a tensor to which a table points."""
        if tensor.numel():
            self._tensors[tensor.data_ptr()] = _bytes(tensor), 8 * tensor.element_size()

    def note_rows(self, rows: Tensor, fields: Iterable[str]) -> None:
        """Remember the rows of a table and the names of their words."""
        self._fields[rows.data_ptr()] = tuple(fields)

    def launch(self, kernel: Kernel, programs: int, arguments: dict[str, Any], constants: Any, shared: int) -> None:
        """Run a kernel; it may access the tensors among its arguments, and those to which its rows point."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        pointed = self._pointed(tensors["rows"]) if "rows" in tensors else {}
        ranges = [(name, tensor.data_ptr(), _bytes(tensor)) for name, tensor in tensors.items()]
        ranges += [(name, address, self._tensors[address][0]) for name, address in pointed.items()]
        memory = ProcessMemory(ranges)
        given = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments.values()]
        kernel.run(programs, given, memory, shared)
        memory.write_back()
        entries = {name: self._tensors[address][1] for name, address in pointed.items()}
        self.launches.append(Launch(kernel.name, constants, entries, memory.widths()))

    def _pointed(self, rows: Tensor) -> dict[str, int]:
        """Return the addresses of the tensors to which rows point, by names such as "grad of tensor 0"."""
        fields = self._fields[rows.data_ptr()]
        return {
            f"{field} of tensor {i}": word
            for i, row in enumerate(rows.tolist())
            for field, word in zip(fields, row, strict=True)
            if word in self._tensors
        }


class _Launcher:
    """Launches one compiled kernel on the active device."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._types, self._shared = source.signature, metadata.shared
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        self._kernel = Kernel(Path(path).read_text())

    def __call__(self, programs: int, _y: int, _z: int, *more: Any) -> None:
        arguments: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        for (name, kind), value in zip(self._types.items(), more[-len(self._types) :], strict=True):
            (constants if kind == "constexpr" else arguments)[name] = value
        runtime.driver.active.launch(self._kernel, programs, arguments, constants, self._shared)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes from the first entry of a tensor to its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@contextmanager
def interpreted(architecture: str) -> Iterator[Device]:
    """Return a context in which backend="triton" runs on the device of an architecture, with tensors on the CPU."""
    device, point, rows_of = Device(architecture), Table.point, Table.rows

    def pointed(self: Table, field: str, tensors: Any) -> None:
        for tensor in tensors:
            if tensor is not None:
                device.note(tensor)
        point(self, field, tensors)

    def rows(self: Table) -> Tensor:
        found = rows_of(self)
        device.note_rows(found, self._columns)
        return found

    with (
        mock.patch.object(runtime.driver, "_active", device),
        mock.patch.object(triton, "_runs_on", return_value=Support.yes()),
        mock.patch.multiple(Table, point=pointed, rows=rows),
        mock.patch.object(registry, "_choose", functools.cache(registry._choose.__wrapped__)),
    ):
        yield device
