"""The list of backends, and the only place that decides which backend runs an operation.

A backend of an operation is a module ``epi_kernels/ops/<stem>/<backend>.py`` that has a class which
keeps its tables from call to call (Sweep, Gather, Importance, Histogram, Lock), or, for gradient_sums_ and
select_digit_, a function of the operation's name. Modules are imported when first chosen, so that a missing
compiler or GPU costs nothing.
"""

import functools
import importlib
from types import ModuleType
from typing import NamedTuple, Protocol

import torch

from epi_kernels.backends import cuda, native, reference, triton
from epi_kernels.backends.support import Spec, Support
from epi_kernels.backends.target import Target, target_of, with_index
from epi_kernels.contract import arithmetic_dtype
from epi_kernels.notices import warn


class Backend(Protocol):
    """What a module epi_kernels/backends/<backend>.py provides."""

    def supports(self, spec: Spec, target: Target) -> Support:
        """Return whether the backend runs what `spec` says on `target`, and if not, why."""


# "auto" takes the first backend that can run; faster and better tested backends come first
BACKENDS: dict[str, Backend] = {"triton": triton, "cuda": cuda, "native": native, "reference": reference}

# the backends that "auto" tries first
_FIRST = {"score_histogram": "cuda"}

# operation -> the folder of epi_kernels/ops that contains the operation
STEMS = {
    "sweep_": "sweep",
    "importance_": "importance",
    "gradient_sums_": "importance",
    "score_histogram": "threshold",
    "select_digit_": "threshold",
    "lock_": "threshold",
    "gather_": "gather",
}

# Triton's interpreter is ten thousand times slower: a user who debugs other kernels with it must not get it here
_ON_REQUEST = ("triton", "cpu")


class Choice(NamedTuple):
    """The backend that runs an operation on a device, and the backend's module for that operation."""

    backend: str
    module: ModuleType


def choose(spec: Spec, device: torch.device, requested: str) -> Choice:
    """Return the backend that runs what `spec` says on tensors of `device`.

    Args:
        spec: the operation and the dtypes.
        device: the device of the tensors: the GPUs in one machine may differ.
        requested: "auto", or one of BACKENDS; a backend requested by name runs or raises, and no other is chosen
            silently.

    Raises:
        ValueError: `requested` is unknown.
        NotImplementedError: the requested backend does not have the operation.
        RuntimeError: the requested backend cannot run `spec` on `device`; the message says why and what to do.

    Example:
        >>> choose(Spec("lock_"), torch.device("cpu"), "reference").backend
        'reference'
    """
    return _choose(spec, with_index(device), requested, triton.interpreted())


@functools.cache
def _choose(spec: Spec, device: torch.device, requested: str, interpreted: bool) -> Choice:
    # `interpreted` is only part of the cache's key: the answer of triton depends on it, and a program may change it
    check(requested, spec.operation)
    target = target_of(device)
    order = sorted(BACKENDS, key=lambda backend: backend != _FIRST.get(spec.operation))
    for backend in order if requested == "auto" else (requested,):
        if requested == "auto" and (backend, target.vendor) == _ON_REQUEST:
            continue
        support = BACKENDS[backend].supports(spec, target)
        if support:
            module = importlib.import_module(f"epi_kernels.ops.{STEMS[spec.operation]}.{backend}")
            # what the operation itself finds when it tries the device
            support = Support.unless(module.obstacle(device) if hasattr(module, "obstacle") else "")
        if support:
            return Choice(backend, module)
        if requested == backend:
            raise RuntimeError(
                f"backend={backend!r} cannot run {spec.operation} here: {support.reason}; or use backend='auto' or "
                "'reference'"
            )
    raise AssertionError(f"{spec.operation} has no reference backend")  # a test checks this


def check(requested: str, *operations: str) -> None:
    """Check that a backend can be requested by this name.

    Args:
        requested: "auto" or the name of a backend.
        operations: the operations that the backend must have; without any, all operations.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the backend does not have an operation.
    """
    if requested not in (names := ("auto", *BACKENDS)):
        raise ValueError(f"Invalid backend: {requested!r}; choose one of {names}")
    missing = [name for name in operations or STEMS if requested != "auto" and not _is_built(name, requested)]
    if missing:
        raise NotImplementedError(f"backend={requested!r} has no {', '.join(missing)}; use backend='auto'")


def explain(device: torch.device, requested: str, dtype: torch.dtype = torch.float32) -> str:
    """Return one line that names the backend of each operation on parameters of `dtype` on `device`.

    Raises:
        RuntimeError: the requested backend cannot run there; see `choose`.
    """
    dtypes = frozenset({dtype}), frozenset({arithmetic_dtype(dtype)})
    choices = {operation: choose(Spec(operation, *dtypes), device, requested).backend for operation in STEMS}
    if len(set(choices.values())) == 1:
        return next(iter(choices.values()))
    return ", ".join(f"{operation} {backend}" for operation, backend in choices.items())


def path_of(spec: Spec, device: torch.device, requested: str) -> str:
    """Return one line on how an operation runs on `device`: by which backend, with which instructions, or why slowly.

    Where the backend that was requested cannot run there, the line is what `choose` would say.

    Example:
        >>> path_of(Spec("sweep_"), torch.device("cpu"), "reference")
        'reference, as requested'
    """
    try:
        backend = choose(spec, device, requested).backend
    except RuntimeError as error:
        return str(error)
    if backend == "native":
        return f"native with {native.simd()}"
    if backend != "reference":
        return backend
    if requested == backend:
        return "reference, as requested"
    faster = "native" if device.type == "cpu" else "triton"
    return f"reference, since {faster} cannot: {BACKENDS[faster].supports(spec, target_of(device)).reason}"


def say_if_slow(device: torch.device) -> None:
    """Warn, once for each process, if "auto" finds only plain torch for a device that a user expects to be fast.

    Such devices are the CPU without the native library, and the GPUs of AMD.
    """
    vendor = target_of(device).vendor
    if vendor == "cpu" and native.obstacle():
        _say_slow(
            "the native library of epi_kernels is missing, and every step on the CPU runs on plain torch, about 4 "
            f"times slower: {native.obstacle()}"
        )
    elif vendor == "amd":
        _say_slow(
            "epi_kernels has no kernels for AMD GPUs yet (this torch is built for ROCm), and every step there runs on "
            "plain torch, which is slower"
        )


@functools.cache
def _say_slow(why: str) -> None:
    warn(f"{why}. backend='reference' asks for plain torch and is silent")


def _is_built(operation: str, backend: str) -> bool:
    # the other backends have every operation
    return backend != "cuda" or operation in cuda.OPERATIONS
