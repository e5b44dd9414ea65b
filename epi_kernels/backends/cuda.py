"""The backend cuda: the library of CUDA kernels, loaded once with ctypes; its interface is csrc/epi_cuda.h.

The library reads rows as `epi_kernels.schema` describes them.
"""

import ctypes
import functools

import torch
from torch import Tensor

from epi_kernels.backends import library, nvidia
from epi_kernels.backends.support import FLOAT32, Spec, Support
from epi_kernels.backends.target import Target
from epi_kernels.schema import VERSION
from epi_kernels.storage import VALUES

# only the histogram, which Triton cannot keep in shared memory
OPERATIONS = ("score_histogram",)

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

# rows, chunks, number of chunks
_CHUNKS = (_POINTER, _POINTER, _INT64)

# function -> its result and arguments; the last argument of a function that launches is the stream
_FUNCTIONS = {
    "epi_cuda_compiler": (ctypes.c_char_p, ()),
    "epi_cuda_histogram_chunk": (_INT64, ()),
    "epi_cuda_device_error": (_INT32, ()),
    "epi_cuda_score_histogram": (_INT32, (*_CHUNKS, *(_POINTER,) * 3, _INT32, _INT32, _POINTER, _POINTER)),
}


def supports(spec: Spec, target: Target) -> Support:
    """Return whether the library runs what `spec` says on `target`. The device itself is not asked: see `obstacle`."""
    if spec.operation not in OPERATIONS:
        return Support.no(f"it has no {spec.operation}")
    loaded = load()
    library_there = Support.unless(loaded if isinstance(loaded, str) else "")
    return spec.within(VALUES, FLOAT32) and nvidia.runs_on(target) and library_there


@functools.cache
def load() -> ctypes.CDLL | str:
    """Return the library, or why there is no library. Needs neither a driver nor a device."""
    return library.load("_cuda", "epi_cuda_abi_version", VERSION, _FUNCTIONS, "nvcc")


def obstacle(device: torch.device | None = None) -> str:
    """Return why the kernels cannot run on a device and what to do about it; empty if they can.

    Each device is asked once, which creates a CUDA context on the device if it had none. Without the argument `device`,
    the current device is asked, on every call.
    """
    loaded = load()
    if isinstance(loaded, str):
        return loaded
    error = loaded.epi_cuda_device_error() if device is None else _error_of(device)
    return f"CUDA error {error}: it needs a driver and a GPU of compute capability 8.0 or later" if error else ""


def compiler() -> str:
    """Return the compiler that built the library, and its version."""
    return str(_library().epi_cuda_compiler().decode())


def histogram_chunk() -> int:
    """Return the number of entries in a chunk of epi_cuda_score_histogram."""
    return int(_library().epi_cuda_histogram_chunk())


def call(function: str, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Launch a kernel on the current stream of a device, without waiting for the kernel.

    Args:
        function: one of the functions of csrc/epi_cuda.h that launch.
        device: where it runs.
        arguments: the function's arguments without the stream. A tensor stands for its address and is kept alive until
            the launch, so that the allocator cannot reuse its memory earlier. None is NULL.

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
