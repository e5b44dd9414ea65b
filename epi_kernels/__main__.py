"""``python -m epi_kernels``: what runs on this machine, and why."""

import platform
from importlib.metadata import version
from importlib.util import find_spec

import torch

from epi_kernels import __version__
from epi_kernels.backends import cuda, native, registry

_SIMD = {1: "the compiler's baseline", 3: "AVX2 and FMA (x86-64-v3)", 4: "AVX-512 (x86-64-v4)"}


def loaded() -> str:
    """Return which compiler has built the native library, and which instruction set it uses."""
    return f"loaded, built by {native.compiler()}, uses {_SIMD[native.simd_level()]}"


def main() -> None:
    """Print versions, the machine, and the backend of each operation."""
    obstacle = native.obstacle()
    rows = [
        ("epi_kernels", __version__),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("python", f"{platform.python_version()} on {platform.platform(terse=True)} {platform.machine()}"),
        ("native library", f"none: {obstacle}" if obstacle else loaded()),
        ("CUDA library", f"not used: {cuda.obstacle()}" if cuda.obstacle() else f"loaded, built by {cuda.compiler()}"),
        ("triton", version("triton") if find_spec("triton") else "not installed"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"),
    ]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            backends = registry.explain(torch.device(device), "auto", dtype)
            rows.append((f"{device}, {str(dtype).removeprefix('torch.')}", backends))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
