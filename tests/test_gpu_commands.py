"""`make gpu` and bench/gpu.py, as far as they run without a GPU: nothing that was measured is lost.

- The benchmarks run whatever the tests did, the exit status says both, and the log and the JSON are in RESULTS.
- bench/gpu.py runs where there is neither git nor nvidia-smi, and a case that raises leaves the others and their JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# in place of Python on a GPU machine: notes what it is asked to run, and fails where it is told to
STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
echo "output of $@"
case "$*" in
  *tests/test_gpu*.py*) exit "$OF_TESTS" ;;
  *bench/gpu.py*) exit "$OF_BENCH" ;;
  *setup.py*) exit "$OF_BUILD" ;;
esac
"""


def made(folder: Path, target: str, tests: int = 0, bench: int = 0, build: int = 0) -> tuple[int, list[str]]:
    """Run make with the stub; return its exit status and what it started, without the look for a GPU."""
    if shutil.which("make") is None:
        pytest.skip("make is not on PATH")
    stub, calls = folder / "python", folder / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    codes = {"OF_TESTS": str(tests), "OF_BENCH": str(bench), "OF_BUILD": str(build)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(
        ["make", target, f"GPU_PYTHON={stub}", f"RESULTS={folder / 'found here'}"],
        cwd=ROOT,
        env={**inherited, **codes, "CALLS": str(calls)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return run.returncode, [line for line in calls.read_text().splitlines() if not line.startswith("-c ")]


BUILD = "setup.py --quiet build_ext --inplace"
TESTS = "-m pytest tests/test_gpu.py"


@pytest.mark.parametrize(("tests", "bench"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_the_benchmarks_run_whatever_the_tests_did_and_the_status_says_both(
    tmp_path: Path, tests: int, bench: int
) -> None:
    status, calls = made(tmp_path, "gpu", tests=tests, bench=bench)
    assert calls == [BUILD, TESTS, f"bench/gpu.py --json {tmp_path / 'found here'}"]
    assert (status == 0) == (tests == bench == 0)
    assert f"output of {TESTS}" in (tmp_path / "found here/gpu-test.log").read_text()


@pytest.mark.parametrize("target", ["gpu-test", "gpu-sanitize"])
def test_the_status_of_a_part_is_that_of_pytest_and_not_of_the_log(tmp_path: Path, target: str) -> None:
    assert made(tmp_path, target)[0] == 0
    assert made(tmp_path, target, tests=1)[0] != 0


def test_nothing_runs_after_a_build_that_failed(tmp_path: Path) -> None:
    status, calls = made(tmp_path, "gpu", build=1)
    assert status != 0
    assert set(calls) == {BUILD}


# bench/gpu.py with small cases, in a process without PATH; the second case raises where it is told to
REHEARSAL = """
import sys
sys.path[:0] = [{root!r}, {bench!r}]
import gpu, torch
small = [(8,)] * 2
cases = [("first", small, torch.float32, gpu.ALL), ("second", small, torch.float32, gpu.ALL)]
gpu.cases = lambda rehearsal: [*cases, ("third", small, torch.bfloat16, gpu.ALL)]
candidates = gpu.candidates
calls = []
def raising(*arguments, **settings):
    calls.append(1)
    if {raises!r} and len(calls) == 2:
        raise {error}("no memory for the second")
    return candidates(*arguments, **settings)
gpu.candidates = raising
sys.argv = ["gpu.py", "--device", "cpu", "--json", {folder!r}]
gpu.main()
"""


def rehearsed(folder: Path, raises: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    script = REHEARSAL.format(
        root=str(ROOT),
        bench=str(ROOT / "bench"),
        folder=str(folder / "json"),
        raises=raises,
        error=raises or "OSError",
    )
    environment = {**os.environ, "PATH": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    (path,) = (folder / "json").glob("*.json")
    return run, json.loads(path.read_text())


def test_the_benchmark_runs_where_there_is_no_git(tmp_path: Path) -> None:
    run, found = rehearsed(tmp_path, raises="")
    assert run.returncode == 0, run.stderr
    assert found["machine"]["commit"] == ""
    assert [result["case"] for result in found["results"]] == ["first", "second", "third"]
    assert all(result["steps"] for result in found["results"])


def test_a_case_that_raises_is_recorded_and_the_others_are_measured(tmp_path: Path) -> None:
    run, found = rehearsed(tmp_path, raises="torch.OutOfMemoryError")
    assert run.returncode == 1
    assert "second: FAILED" in run.stdout
    assert "no memory for the second" in run.stdout
    first, second, third = found["results"]
    assert second == {"case": "second", "error": "OutOfMemoryError: no memory for the second"}
    assert first["steps"]
    assert third["steps"]


def test_what_was_measured_is_on_disk_when_the_run_is_stopped(tmp_path: Path) -> None:
    run, found = rehearsed(tmp_path, raises="KeyboardInterrupt")
    assert run.returncode != 0
    assert [result["case"] for result in found["results"]] == ["first"]
