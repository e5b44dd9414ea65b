"""What is to run on a GPU runs here first: every test of tests/test_gpu.py that the CPU can take, in one variant."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent

# the first variant of each test, and of each backend and kind of optimizer
RUN = """
import sys, pytest

class First:
    def pytest_collection_modifyitems(self, items):
        first = {}
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            first.setdefault((item.originalname, params.get("backend"), params.get("kind")), item)
        items[:] = first.values()

sys.exit(pytest.main(sys.argv[1:], plugins=[First()]))
"""


def rehearsed(*arguments: str, **environment: str) -> list[tuple[str, str, str]]:
    """Return (name, variant, outcome) of the tests of tests/test_gpu.py on the CPU; none may fail."""
    command = [sys.executable, "-c", RUN, "tests/test_gpu.py", "-v", "-p", "no:cacheprovider", *arguments]
    there = {**os.environ, "EPI_GPU_TESTS_ON": "cpu", "TRITON_INTERPRET": "1", **environment}
    run = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return re.findall(r"::(test_\w+)(?:\[(.*)\])? (PASSED|SKIPPED)", run.stdout)


def test_every_test_for_a_gpu_passes_on_the_cpu_with_interpreted_kernels() -> None:
    found = rehearsed()
    written = set(re.findall(r"^def (test_\w+)", (ROOT / "tests/test_gpu.py").read_text(), re.M))
    passed = {name for name, _, outcome in found if outcome == "PASSED"}
    assert written - passed == {"test_compute_sanitizer_finds_nothing"}
    # the histogram has two kernels, and neither runs on the CPU but interpreted
    histograms = {variant.rpartition("-")[2]: outcome for name, variant, outcome in found if "histograms" in name}
    assert histograms == {"triton": "PASSED", "cuda": "SKIPPED"}


def test_moments_are_not_compared_with_those_of_a_cpu_that_rounds_otherwise() -> None:
    found = rehearsed("-k", "of_views", ATEN_CPU_CAPABILITY="default")
    assert [(name, outcome) for name, _, outcome in found] == [
        ("test_step_of_views_and_of_groups_of_different_settings", "SKIPPED")
    ]
