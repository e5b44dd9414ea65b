"""The backend cuda: the library of the CUDA kernels, found and loaded once, with ctypes; interface: csrc/epi_cuda.h.

That header's structs are the rows of `epi_kernels.ops.masked_adamw.sweep` and `epi_kernels.ops.threshold.rows`.
"""

import ctypes
import functools

import torch
from torch import Tensor

from epi_kernels.backends import library, nvidia
from epi_kernels.backends.native import DTYPES
from epi_kernels.backends.support import FLOAT32, Spec, Support
from epi_kernels.backends.target import Target

ABI_VERSION = 2

# the histogram, which Triton cannot keep in shared memory, and the step, for want of Triton
OPERATIONS = ("masked_adamw_", "score_histogram")

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

# rows, pieces, number of pieces
_PIECES = (_POINTER, _POINTER, _INT64)

# function -> its result and arguments; those that launch end with the stream
_FUNCTIONS = {
    "epi_cuda_compiler": (ctypes.c_char_p, ()),
    "epi_cuda_sweep_piece": (_INT64, ()),
    "epi_cuda_histogram_piece": (_INT64, ()),
    "epi_cuda_device_error": (_INT32, ()),
    "epi_cuda_masked_adamw": (_INT32, (*_PIECES, *(_POINTER,) * 5, *(_INT32,) * 4, _POINTER)),
    "epi_cuda_score_histogram": (_INT32, (*_PIECES, *(_POINTER,) * 2, _INT32, _INT32, _POINTER, _POINTER)),
}


def supports(spec: Spec, target: Target) -> Support:
    """Return whether the library runs what `spec` says on `target`. It does not ask the device: see `obstacle`."""
    if spec.operation not in OPERATIONS:
        return Support.no(f"it has no {spec.operation}")
    loaded = load()
    library_there = Support.unless(loaded if isinstance(loaded, str) else "")
    return spec.within(DTYPES.keys(), FLOAT32) and nvidia.runs_on(target) and library_there


@functools.cache
def load() -> ctypes.CDLL | str:
    """Return the library, or why there is none. Needs neither a driver nor a device."""
    return library.load("_cuda", "epi_cuda_abi_version", ABI_VERSION, _FUNCTIONS, "nvcc")


def obstacle(device: torch.device | None = None) -> str:
    """Return why the kernels cannot run on a device and what to do about it; empty if they can.

    Asks each device once, which makes its context if there was none. Without one it asks the current one, every time.
    """
    loaded = load()
    if isinstance(loaded, str):
        return loaded
    error = loaded.epi_cuda_device_error() if device is None else _error_of(device)
    return f"CUDA error {error}: it needs a driver and a GPU of compute capability 8.0 or later" if error else ""


def compiler() -> str:
    """Return the compiler that built the library, and its version."""
    return str(_library().epi_cuda_compiler().decode())


def sweep_piece() -> int:
    """Return the entries of a piece of epi_cuda_masked_adamw."""
    return int(_library().epi_cuda_sweep_piece())


def histogram_piece() -> int:
    """Return the entries of a piece of epi_cuda_score_histogram."""
    return int(_library().epi_cuda_histogram_piece())


def call(function: str, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Launch a kernel on the current stream of a device, and do not wait for it.

    Args:
        function: one of the functions of csrc/epi_cuda.h that launch.
        device: where it runs.
        arguments: its arguments but the stream. A tensor stands for its address, and lives until the kernel is
            launched: an allocator may give its memory away before that. None is NULL.

    Raises:
        RuntimeError: there is no library, or the kernel was not launched.
    """
    plain = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    with torch.cuda.device(device):
        error = getattr(_library(), function)(*plain, torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"{function} was not launched: CUDA error {error}")


def _library() -> ctypes.CDLL:
    loaded = load()
    if isinstance(loaded, str):
        raise RuntimeError(f"the CUDA kernels cannot run: {loaded}")
    return loaded


@functools.cache
def _error_of(device: torch.device) -> int:
    with torch.cuda.device(device):
        return int(_library().epi_cuda_device_error())
