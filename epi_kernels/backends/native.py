"""The backend native: the compiled CPU library, loaded once with ctypes; its interface is csrc/epi_native.h.

An array of structs describes the tensors of a call: see `epi_kernels.schema`.
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epi_kernels.backends import library
from epi_kernels.backends.support import FLOAT32, Spec, Support
from epi_kernels.backends.target import Target
from epi_kernels.schema import VERSION
from epi_kernels.storage import CODES, STATES, VALUES
from epi_kernels.storage.noise import Place

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

_SIMD = {1: "the compiler's baseline", 3: "AVX2 and FMA (x86-64-v3)", 4: "AVX-512 (x86-64-v4)"}

# function -> its arguments between (tensors, count) and the number of threads
_FUNCTIONS = {
    "epi_sweep": (_INT32, _INT32),
    "epi_importance": (_POINTER, _INT64, ctypes.c_float, _INT32),
    "epi_gradient_sums": (),
    "epi_score_histogram": (_POINTER, _INT32, _INT32, _POINTER),
    "epi_lock": (_POINTER,),
    "epi_gather": (_INT32,),
    "epi_take": (),
    "epi_put": (),
}


def supports(spec: Spec, target: Target) -> Support:
    """Return whether the library runs what `spec` says on `target`."""
    states = FLOAT32 if spec.operation == "gradient_sums_" else STATES
    return spec.within(VALUES, states) and _runs_on(target) and Support.unless(obstacle())


def _runs_on(target: Target) -> Support:
    return Support.unless("" if target.vendor == "cpu" else f"it runs on the CPU and the tensors are on {target}")


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or why there is no library."""
    functions: dict[str, tuple[Any, tuple[Any, ...]]] = {
        name: (None, (_POINTER, _INT64, *arguments, _INT32)) for name, arguments in _FUNCTIONS.items()
    }
    functions["epi_compiler"] = (ctypes.c_char_p, ())
    functions["epi_select_digit"] = (None, (_POINTER, _INT64, _POINTER, _INT64, _INT64, _INT32, _POINTER))
    return library.load("_native", "epi_abi_version", VERSION, functions, "a C++ compiler")


def obstacle() -> str:
    """Return why the library cannot be used here and what to do about it; empty if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else ""


def compiler() -> str:
    """Return the compiler that built the library, and its version."""
    return str(_library().epi_compiler().decode())


def simd_level() -> int:
    """Return the instruction set in use: 1 is the baseline, 3 is x86-64-v3 (AVX2), 4 is x86-64-v4 (AVX-512)."""
    return int(_library().epi_simd_level())


def simd() -> str:
    """Return the name of the instruction set in use."""
    return _SIMD[simd_level()]


def function(name: str) -> Any:
    """Return a function of the library, for callers that call the function many times."""
    return getattr(_library(), name)


def call(function: str, table: "np.ndarray[Any, Any]", *arguments: float) -> None:
    """Run a function of the library on a table of tensors, with as many threads as torch uses; the GIL is released."""
    getattr(_library(), function)(table.ctypes.data, len(table), *arguments, torch.get_num_threads())


def table_of(struct: "np.dtype[Any]", **columns: Sequence[Tensor | None]) -> "np.ndarray[Any, Any]":
    """Return a table with the pointers of tensors, a row for each position, and zero elsewhere.

    Args:
        struct: the struct of a row, from `epi_kernels.schema`.
        columns: field -> flat tensors. The first gives the sizes. A None in a list, or an empty list, is NULL. If the
            struct has a field ``<name>_dtype``, that field is also filled.
    """
    first = next(iter(columns.values()))
    table = np.zeros(len(first), struct)
    table["size"] = [0 if tensor is None else tensor.numel() for tensor in first]
    for name, tensors in columns.items():
        if tensors:
            table[name] = addresses(tensors)
            if f"{name}_dtype" in struct.fields:  # type: ignore[operator]
                table[f"{name}_dtype"] = codes(tensors)
    return table


def describe(
    table: "np.ndarray[Any, Any]",
    names: Sequence[str],
    slots: Mapping[str, Sequence[Tensor | None]],
    rests: Sequence[Tensor | None],
    stochastic: bool,
) -> None:
    """Write into a table of a sweep or a gather how slots and rests are kept.

    Args:
        table: written.
        names: of all slots of the rule, in its order.
        slots: those of `epi_kernels.ops.Tensors`.
        rests: likewise.
        stochastic: likewise.
    """
    for name, of_slot in slots.items():
        if of_slot:
            table["slot_dtypes"][:, names.index(name)] = codes(of_slot)
    if rests:
        table["rest_bits"] = [0 if rest is None else 8 * rest.element_size() for rest in rests]
    table["stochastic"] = stochastic


def place(table: "np.ndarray[Any, Any]", places: Sequence[Place]) -> None:
    """Write into a table where the entries of each tensor lie in the whole tensor; nothing without places."""
    for i, own in enumerate(places):
        table["key"][i], table["first"][i], table["run"][i], table["gap"][i] = own[:4]


def codes(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the number in compiled code of the dtype of each tensor, 0 for None."""
    return [0 if tensor is None else CODES[tensor.dtype] for tensor in tensors]


def rows_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the number of entries of a row of each tensor, which is one index of dimension 0; at least 1."""
    return [1 if tensor is None or tensor.dim() == 0 else max(1, tensor.shape[1:].numel()) for tensor in tensors]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the address of each tensor, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(f"the native backend cannot run: {loaded}")
    return loaded
