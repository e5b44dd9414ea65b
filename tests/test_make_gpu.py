"""What runs on a machine with a GPU loses no result: tests and benchmark both run, and each writes what it has.

Without a GPU: the recipes run with a Python that only writes down how it was called, and cases that are small.
"""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import cases
import gpu
import pytest
import torch

ROOT = Path(__file__).parent.parent

STUB = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 3;; esac
echo ran
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize(
    ("fails", "good"), [("nothing", True), ("pytest", False), ("bench/gpu.py", False)], ids=["all", "tests", "bench"]
)
def test_tests_that_fail_do_not_keep_the_benchmark_from_running(fails: str, good: bool, tmp_path: Path) -> None:
    stub, calls, results = tmp_path / "python", tmp_path / "calls", tmp_path / "results"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "CALLS": str(calls), "FAILS": fails}
    command = ["make", "gpu", f"GPU_PYTHON={stub}", f"RESULTS={results}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) is good, done.stdout + done.stderr
    said = calls.read_text()
    assert "-m pytest tests/test_gpu.py" in said
    assert f"bench/gpu.py --json {results}" in said
    assert {path.name for path in results.iterdir()} == {"gpu-test.log", "gpu-bench.log"}


def test_only_the_tests_of_a_gpu_are_collected_there() -> None:
    recipe = (ROOT / "Makefile").read_text()
    assert "-m pytest tests/test_gpu.py" in recipe
    assert "pytest -m gpu" not in recipe


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
