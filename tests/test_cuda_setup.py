"""How setup.py calls nvcc: an old one builds what it knows, and one on PATH is found whatever CUDA_HOME is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# knows some architectures, refuses the others as nvcc does, and writes what it is told to
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then
  for name in {known}; do echo compute_$name; done
  exit 0
fi
echo "$@" >> "{folder}/calls"
for word in "$@"; do
  if [ "$last" = -o ]; then : > "$word"; fi
  last=$word
done
"""


def built(folder: Path, known: str, **environment: str) -> tuple[list[str], str]:
    """Build with a stub; return the calls of nvcc that compile, and what setup.py said."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "nvcc").write_text(NVCC.format(known=known, folder=folder))
    (tools / "nvcc").chmod(0o755)
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    run = subprocess.run(
        [*command, "--build-lib", str(folder / "library"), "--build-temp", str(folder / "objects")],
        cwd=ROOT,
        env={**os.environ, "CXX": "false", "CUDA_HOME": "", "PATH": f"{tools}:/usr/bin:/bin", **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    calls = folder / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line for line in lines if " -c " in line], run.stdout


@pytest.mark.parametrize(
    ("known", "codes"),
    [
        ("75 80 86 89 90 100 120", ["80,code=sm_80", "90,code=sm_90", "100,code=[sm_100,compute_100]"]),
        ("70 75 80 86 89 90", ["80,code=sm_80", "90,code=[sm_90,compute_90]"]),
        ("70 75 80", ["80,code=[sm_80,compute_80]"]),
    ],
    ids=["12.8 and later", "12.0 to 12.6", "11.0"],
)
def test_an_nvcc_builds_the_architectures_that_it_knows(tmp_path: Path, known: str, codes: list[str]) -> None:
    calls, said = built(tmp_path, known)
    assert len(calls) == 1
    for call in calls:
        assert re.findall(r"-gencode arch=compute_(\S+)", call) == codes
    assert "no CUDA kernels" not in said
    assert (tmp_path / "library/epi_kernels/_cuda.so").exists()


def test_an_nvcc_that_knows_none_is_named(tmp_path: Path) -> None:
    calls, said = built(tmp_path, "52 60 70")
    assert not calls
    assert "no CUDA kernels" in said
    assert "knows none of the architectures 80, 90, 100" in said


def test_a_cuda_home_without_nvcc_does_not_hide_that_of_path(tmp_path: Path) -> None:
    calls, _ = built(tmp_path, "80 90 100", CUDA_HOME=str(tmp_path / "nothing here"))
    assert len(calls) == 1
