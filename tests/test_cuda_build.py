"""The library of the CUDA kernels, where nvcc built it: no GPU is needed to load it and to look at its code.

- It loads without a driver, and every function returns an error then.
- For A100, H100 and B200: nothing spills, float32 moves 128 bits at a time, equal bins of a warp are added up first.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from epi_kernels.backends import cuda

LIBRARY = cuda.load()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=str(LIBRARY))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def cuobjdump() -> str:
    """Return nvcc's tool, or the copy that triton brings along."""
    beside = [Path(found).parent / "cuobjdump" for found in [shutil.which("nvcc")] if found]
    try:
        import triton

        beside.append(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    except ImportError:
        pass
    for path in beside:
        if path.exists():
            return str(path)
    pytest.skip("no cuobjdump, neither nvcc's nor triton's")


def dumped(*options: str) -> str:
    path = Path(cuda.__file__).parents[1] / "_cuda.so"
    run = subprocess.run([cuobjdump(), *options, str(path)], check=True, capture_output=True, text=True)
    return run.stdout + run.stderr


def code_of(architecture: str) -> dict[str, list[str]]:
    """Return the instructions of each kernel."""
    parts = re.split(r"Function : (\S+)", dumped("-sass", "-arch", architecture))[1:]
    return {
        name: re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.M)
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def test_what_it_says_of_itself() -> None:
    assert re.fullmatch(r"nvcc \d+\.\d+\.\d+", cuda.compiler())
    assert cuda.histogram_chunk() % 4 == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_every_call_is_refused_and_none_crashes() -> None:
    assert "CUDA error" in cuda.obstacle()
    for shift in (19, 40):
        assert LIBRARY.epi_cuda_score_histogram(1, 1, 1, None, 1, None, shift, 12, 1, None) != 0
    assert LIBRARY.epi_cuda_score_histogram(1, 1, 0, None, 1, None, 19, 12, 1, None) == 0  # nothing to do


def test_nothing_spills() -> None:
    usage = dumped("-res-usage")
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) == len(ARCHITECTURES)
    for name, registers, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 64, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_are_wide_and_equal_bins_are_added_up_first(architecture: str) -> None:
    histogram = next(
        "\n".join(lines) for name, lines in code_of(architecture).items() if "score_histogram_kernel" in name
    )
    assert re.search(r"LDG\S*\.128", histogram)
    assert "ATOMS.POPC.INC" in histogram
