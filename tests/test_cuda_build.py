"""The library of the CUDA kernels, where nvcc built it: no GPU is needed to load it and to look at its code.

- It loads without a driver, and every function returns an error then.
- Its rows are the words that the tables write.
- For A100, H100 and B200: nothing spills, float32 moves 128 bits at a time, equal bins of a warp are added up first.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from epi_kernels.backends import cuda, native
from epi_kernels.ops.masked_adamw.sweep import FIELDS as ADAMW_FIELDS
from epi_kernels.ops.threshold.rows import FIELDS as SCORE_FIELDS

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


def test_the_words_of_a_row_are_those_of_the_tables() -> None:
    sizes = (ctypes.c_int64 * 2).in_dll(LIBRARY, "epi_cuda_row_sizes")
    assert list(sizes) == [8 * len(ADAMW_FIELDS), 8 * len(SCORE_FIELDS)]
    header = (Path(__file__).parents[1] / "csrc/epi_cuda.h").read_text()
    for struct, fields in (("epi_cuda_adamw_row", ADAMW_FIELDS), ("epi_cuda_score_row", SCORE_FIELDS)):
        body = re.search(r"typedef struct \{([^}]*)\} " + struct, header)
        assert tuple(re.findall(r"int64_t (\w+);", body[1])) == fields


def test_what_it_says_of_itself() -> None:
    assert re.fullmatch(r"nvcc \d+\.\d+\.\d+", cuda.compiler())
    assert cuda.sweep_piece() % 4 == cuda.histogram_piece() % 4 == 0
    assert native.LOCK_IN.keys() == {"none", "importance", "exp_avg_sq", "static"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_every_call_is_refused_and_none_crashes() -> None:
    assert "CUDA error" in cuda.obstacle()
    for shift in (19, 40):
        assert LIBRARY.epi_cuda_score_histogram(1, 1, 1, None, 1, shift, 12, 1, None) != 0
    for dtype in (0, 9):
        assert LIBRARY.epi_cuda_masked_adamw(1, 1, 1, 1, 1, None, None, None, dtype, 0, 0, 0, None) != 0
    assert LIBRARY.epi_cuda_masked_adamw(1, 1, 0, 1, 1, None, None, None, 0, 0, 0, 0, None) == 0  # nothing to do


def test_nothing_spills() -> None:
    usage = dumped("-res-usage")
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) == len(ARCHITECTURES) * (9 + 1)
    for name, registers, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 64, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_are_wide_and_equal_bins_are_added_up_first(architecture: str) -> None:
    code = code_of(architecture)
    sweeps = {name: "\n".join(lines) for name, lines in code.items() if "masked_adamw_kernel" in name}
    histogram = next("\n".join(lines) for name, lines in code.items() if "score_histogram_kernel" in name)
    assert len(sweeps) == 9
    wide = next(text for name, text in sweeps.items() if name.count("Float32") == 1 and "Float16" not in name)
    # p g m v S and AMSGrad's, of which all but g are written
    assert len(re.findall(r"LDG\S*\.128", wide)) >= 6
    assert len(re.findall(r"STG\S*\.128", wide)) >= 5
    for text in sweeps.values():
        assert len(re.findall(r"LDG\S*\.128", text)) >= 4
    assert "LDG" in histogram
    assert re.search(r"LDG\S*\.128", histogram)
    assert "ATOMS.POPC.INC" in histogram
