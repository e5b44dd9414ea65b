"""What runs on a machine with a GPU loses no result: tests and benchmark both run, and each writes what it has.

Without a GPU: the recipes run with a Python that only writes down how it was called, and cases that are small.
"""

import json
import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import gpu
import pytest
import test_gpu
import torch

ROOT = Path(__file__).parent.parent

STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 3;; esac
echo ran
"""


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def made(folder: Path, *targets: str, fails: str = "nothing") -> tuple[int, list[str]]:
    """Return the exit status of make in a copy of what it needs, and how Python was called so far.

    Args:
        folder: for the copy.
        targets: as make takes them.
        fails: a part of the command line of the calls that fail.
    """
    for name in ("Makefile", "setup.py"):
        shutil.copy2(ROOT / name, folder)
    stub, calls = folder / "python", folder / "calls"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "CALLS": str(calls), "FAILS": fails}
    command = ["make", *targets, f"GPU_PYTHON={stub}", "RESULTS=results"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, calls.read_text().splitlines()


@needs_make
@pytest.mark.parametrize(
    ("fails", "status"), [("nothing", 0), ("pytest", 2), ("bench/gpu.py", 2), ("setup.py", 0), ("-c import", 2)]
)
def test_what_fails_does_not_keep_the_rest_from_running(fails: str, status: int, tmp_path: Path) -> None:
    found, calls = made(tmp_path, "gpu", fails=fails)
    assert found == status
    without_gpu = fails == "-c import"
    assert any("-m pytest tests/test_gpu.py" in call for call in calls) is not without_gpu
    assert ("-u bench/gpu.py --json results" in calls) is not without_gpu
    logs = set() if without_gpu else {"gpu-test.log", "gpu-bench.log"}
    assert {path.name for path in tmp_path.glob("results/*")} == logs


@needs_make
def test_the_libraries_are_built_where_they_are_out_of_date(tmp_path: Path) -> None:
    def builds() -> int:
        return sum("setup.py" in call for call in made(tmp_path, "gpu")[1])

    assert builds() == 1
    assert builds() == 1
    os.utime(tmp_path / "build/.libraries", (0, 0))
    assert builds() == 2


@needs_make
def test_a_build_that_failed_is_tried_again(tmp_path: Path) -> None:
    made(tmp_path, "gpu-test", fails="setup.py")
    _, calls = made(tmp_path, "gpu-bench")
    assert sum("setup.py" in call for call in calls) == 2


def test_only_the_tests_of_a_gpu_are_collected_there() -> None:
    recipe = (ROOT / "Makefile").read_text()
    assert "-m pytest tests/test_gpu.py" in recipe
    assert "pytest -m gpu" not in recipe


def test_without_expecttest_what_needs_it_is_skipped_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "expecttest", None)
    with pytest.raises(pytest.skip.Exception) as skipped:
        runpy.run_path(str(ROOT / "tests/test_torch_suite.py"))
    assert skipped.value.allow_module_level


SANITIZER = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" > "$CALLS"
echo done
exit $STATUS
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_is_called_with_a_tool_and_what_it_says_counts(
    tool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub, calls = tmp_path / "compute-sanitizer", tmp_path / "calls"
    stub.write_text(SANITIZER)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("STATUS", "0")
    test_gpu.test_compute_sanitizer_finds_nothing(tool)
    options = f"--tool {tool} --report-api-errors no --error-exitcode 9 --target-processes application-only"
    assert calls.read_text().startswith(f"1 {options} {sys.executable} -c ")
    monkeypatch.setenv("STATUS", "9")
    with pytest.raises(AssertionError):
        test_gpu.test_compute_sanitizer_finds_nothing(tool)


def test_facts_of_a_machine_without_git_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cases.machine()["commit"] == "unknown"
    assert cases.said_by("nvidia-smi", "--query-gpu=driver_version") == "unknown"


def test_a_case_that_fails_is_written_down_and_the_next_one_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def candidates(shapes: Any, **settings: Any) -> Any:
        if shapes == [(7,)]:
            raise torch.OutOfMemoryError("no memory for 7")
        return cases.candidates(shapes, **settings)

    three = [(title, [(size,)], torch.float32, gpu.LARGE) for title, size in (("one", 5), ("bad", 7), ("two", 9))]
    monkeypatch.setattr(gpu, "cases", lambda _: three)
    monkeypatch.setattr(gpu, "candidates", candidates)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--json", str(tmp_path)])
    with pytest.raises(SystemExit) as status:
        gpu.main()
    assert status.value.code == 1
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())["results"]
    assert [result["case"] for result in results] == ["one", "bad", "two"]
    assert results[1]["error"] == "OutOfMemoryError: no memory for 7"
    assert all(result["steps"] for result in (results[0], results[2]))
    assert "not measured: bad" in capsys.readouterr().out


def test_a_run_that_is_cut_short_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(title: str, *_: Any) -> dict[str, Any]:
        if title == "second":
            raise KeyboardInterrupt
        return {"entries": 1, "steps": []}

    monkeypatch.setattr(gpu, "cases", lambda _: [(title, [], torch.float32, ()) for title in ("first", "second")])
    monkeypatch.setattr(gpu, "measured", measured)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--json", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    (path,) = tmp_path.iterdir()
    assert [result["case"] for result in json.loads(path.read_text())["results"]] == ["first"]
