"""Which backend runs an operation, and why: the only place where that is decided.

A backend of an operation is a module ``epi_kernels/ops/<stem>/<backend>.py`` that has a class which
keeps its tables from call to call (Sweep, Gather, Importance, Histogram, Lock), or, for gradient_sums_ and
select_digit_, a function of the operation's name. Modules are imported when first chosen, so that a missing
compiler or GPU costs nothing.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch

from epi_kernels.backends import native
from epi_kernels.contract import arithmetic_dtype
from epi_kernels.notices import warn
from epi_kernels.storage import DTYPES

# "auto" takes the first that can run; the order is by speed, and by what is tried most
BACKENDS = ("triton", "cuda", "native", "reference")

# what csrc/cuda has: the histogram, which Triton cannot keep in shared memory
_CUDA = ("score_histogram",)

# what "auto" tries before the others
_FIRST = {"score_histogram": "cuda"}

# operation -> the folder of epi_kernels/ops that holds it
STEMS = {
    "sweep_": "sweep",
    "importance_": "importance",
    "gradient_sums_": "importance",
    "score_histogram": "threshold",
    "select_digit_": "threshold",
    "lock_": "threshold",
    "gather_": "gather",
}

FLOAT32 = frozenset({torch.float32})

# the oldest GPUs whose code is compiled and looked at in the tests: A100
OLDEST_GPU = (8, 0)

# interpreted, ten thousand times slower: whoever debugs kernels of his own must not get it by accident
_ON_REQUEST = ("triton", "cpu")


class Choice(NamedTuple):
    """The backend that runs an operation on a device."""

    backend: str
    reason: str
    module: ModuleType


@functools.cache
def choose(
    operation: str,
    device: torch.device | str,
    requested: str,
    values: frozenset[torch.dtype] = FLOAT32,
    states: frozenset[torch.dtype] = FLOAT32,
) -> Choice:
    """Return the backend that runs `operation`, one of STEMS, on tensors of `device`.

    Args:
        operation: a key of STEMS.
        device: the tensors' own, or its type: GPUs of one machine differ, and "cuda" is the current one at the first
            call.
        requested: "auto", or one of BACKENDS, which then runs or raises: never a quiet fallback.
        values: the dtypes of the parameters and gradients.
        states: the dtypes of the moments and importances.

    Raises:
        ValueError: `requested` is unknown.
        NotImplementedError: the requested backend does not have the operation.
        RuntimeError: the requested backend cannot run this here; the message says why and what to do.
    """
    check(requested, operation)
    device = torch.device(device)
    order = sorted(BACKENDS, key=lambda backend: backend != _FIRST.get(operation))
    for backend in order if requested == "auto" else (requested,):
        if not _is_built(operation, backend) or (requested == "auto" and (backend, device.type) == _ON_REQUEST):
            continue
        obstacle = _obstacle(backend, device, values, states)
        if not obstacle:
            module = importlib.import_module(f"epi_kernels.ops.{STEMS[operation]}.{backend}")
            # what it finds by itself, on the device
            obstacle = module.obstacle(device) if hasattr(module, "obstacle") else ""
        if not obstacle:
            reason = "requested" if requested == backend else f"the fastest here for {device.type}"
            return Choice(backend, reason, module)
        if requested == backend:
            raise RuntimeError(
                f"backend={backend!r} cannot run {operation} here: {obstacle}; or use backend='auto' or 'reference'"
            )
    raise AssertionError(f"{operation} has no reference backend")  # held by a test


def check(requested: str, *operations: str) -> None:
    """Check that a backend can be asked for by that name.

    Args:
        requested: "auto" or the name of a backend.
        operations: what it is to run; all there are, if none is given.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the backend does not have an operation.
    """
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"Invalid backend: {requested!r}; choose one of {('auto', *BACKENDS)}")
    missing = [name for name in operations or STEMS if requested != "auto" and not _is_built(name, requested)]
    if missing:
        raise NotImplementedError(f"backend={requested!r} has no {', '.join(missing)}; use backend='auto'")


def explain(device: torch.device, requested: str, dtype: torch.dtype = torch.float32) -> str:
    """Return one line that names the backend of each operation on parameters of `dtype` on `device`.

    Raises:
        RuntimeError: the requested backend cannot run there; see `choose`.
    """
    values, states = frozenset({dtype}), frozenset({arithmetic_dtype(dtype)})
    choices = {operation: choose(operation, device, requested, values, states).backend for operation in STEMS}
    if len(set(choices.values())) == 1:
        return next(iter(choices.values()))
    return ", ".join(f"{operation} {backend}" for operation, backend in choices.items())


def say_if_slow(device: torch.device) -> None:
    """Warn, once for each process, where the native library would run on the CPU and is missing."""
    if device.type == "cpu" and native.obstacle():
        _say_slow()


@functools.cache
def _say_slow() -> None:
    warn(
        f"the native library of epi_kernels is missing, and every step on the CPU runs on plain torch, about 4 times "
        f"slower: {native.obstacle()}. backend='reference' asks for plain torch and is silent"
    )


def _obstacle(
    backend: str, device: torch.device, values: frozenset[torch.dtype], states: frozenset[torch.dtype]
) -> str:
    """Return why a backend cannot run on these tensors; empty if it can."""
    if backend == "reference":
        return ""
    if not values <= DTYPES.keys():
        return f"it takes {_names(DTYPES)} and not {_names(values - DTYPES.keys())}"
    if not states <= FLOAT32:
        return f"its moments and importance are float32 and not {_names(states - FLOAT32)}"
    if backend == "triton":
        return _triton_obstacle(device)
    if backend == "cuda":
        return _gpu_obstacle(device)
    if device.type != "cpu":
        return f"it runs on the CPU and the tensors are on {device.type}"
    return native.obstacle()


def _triton_obstacle(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else "it runs on a GPU, and on the CPU only with TRITON_INTERPRET=1, for tests"
    return _gpu_obstacle(device)


def _gpu_obstacle(device: torch.device) -> str:
    if device.type != "cuda":
        return f"it runs on CUDA GPUs and the tensors are on {device.type}"
    if torch.version.hip is not None:  # where torch calls AMD's GPUs "cuda" too
        return f"it runs on CUDA GPUs and this torch is built for ROCm {torch.version.hip}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        found, needed = (".".join(map(str, version)) for version in (capability, OLDEST_GPU))
        return f"it needs compute capability {needed} and this GPU has {found}"
    return ""


def _names(dtypes: Any) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _is_built(operation: str, backend: str) -> bool:
    # every operation has the other backends
    return backend != "cuda" or operation in _CUDA
