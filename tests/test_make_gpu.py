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
from measure import Timing

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
@pytest.mark.parametrize("fails", ["nothing", "import xdist"])
def test_tests_run_in_several_processes_where_that_is_possible(fails: str, tmp_path: Path) -> None:
    status, calls = made(tmp_path, "gpu-test", fails=fails)
    assert status == 0
    options = "" if fails == "import xdist" else "--numprocesses 8 "
    assert f"-m pytest tests/test_gpu.py {options}-v -k not sanitizer_finds" in calls


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


def bench(monkeypatch: pytest.MonkeyPatch, folder: Path, cases: list[Any] | None = None, **replaced: Any) -> int:
    """Run bench/gpu.py on the CPU, some of its functions replaced, and return its exit status."""
    usual = {"copy_bandwidth": lambda _: 1e9, "launches": lambda _: {}}
    if cases is not None:
        usual["cases"] = lambda _: cases
    for name, function in {**usual, **replaced}.items():
        monkeypatch.setattr(gpu, name, function)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--json", str(folder)])
    with pytest.raises(SystemExit) as status:
        gpu.main()
    return int(status.value.code or 0)


def written(folder: Path) -> dict[str, Any]:
    """Return what the only JSON file in a folder holds."""
    (path,) = folder.glob("*.json")
    return dict(json.loads(path.read_text()))


def small(*names: str) -> list[Any]:
    """Return cases of these names that take no time."""
    return [(name, [(5 + i,)], torch.float32, gpu.LARGE) for i, name in enumerate(names)]


def test_a_case_that_fails_is_written_down_and_the_next_one_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def candidates(shapes: Any, **settings: Any) -> Any:
        if shapes == [(6,)]:
            raise torch.OutOfMemoryError("no memory for 6")
        return cases.candidates(shapes, **settings)

    assert bench(monkeypatch, tmp_path, small("one", "bad", "two"), candidates=candidates) == 1
    results = written(tmp_path)["results"]
    assert [result["case"] for result in results] == ["one", "bad", "two"]
    assert results[1]["error"] == "OutOfMemoryError: no memory for 6"
    assert all(result["steps"] for result in (results[0], results[2]))
    assert "not measured: bad" in capsys.readouterr().out


def test_a_run_that_is_cut_short_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(title: str, *_: Any) -> dict[str, Any]:
        if title == "second":
            raise KeyboardInterrupt
        return {"entries": 1, "steps": []}

    with pytest.raises(KeyboardInterrupt):
        bench(monkeypatch, tmp_path, small("first", "second"), measured=measured)
    assert [result["case"] for result in written(tmp_path)["results"]] == ["first"]


def test_a_run_that_is_cut_short_while_it_writes_keeps_what_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = Path.write_text

    def cut_short(path: Path, text: str) -> int:
        if "second" in text:
            write(path, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(KeyboardInterrupt):
        bench(monkeypatch, tmp_path, small("first", "second"), measured=lambda *_: {"entries": 1, "steps": []})
    assert [result["case"] for result in written(tmp_path)["results"]] == ["first"]


def test_launches_are_counted_once_and_when_all_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = []

    def launches(_: str) -> dict[str, int]:
        done.append("launches")
        return {"EPI": 1}

    def measured(title: str, *_: Any) -> dict[str, Any]:
        done.append(title)
        return {"entries": 1, "steps": []}

    assert bench(monkeypatch, tmp_path, small("first", "second"), launches=launches, measured=measured) == 0
    assert done == ["first", "second", "launches"]
    assert written(tmp_path)["launches"] == {"EPI": 1}


def test_times_are_written_where_launches_cannot_be_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def launches(_: str) -> dict[str, int]:
        raise RuntimeError("no profiler")

    assert bench(monkeypatch, tmp_path, small("one"), launches=launches) == 1
    assert written(tmp_path)["results"][0]["steps"]


def test_launches_are_those_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cases", lambda _: small("other", gpu.LLAMA))
    assert gpu.launches("cpu") == dict.fromkeys(gpu.LARGE)


def test_one_fast_copy_does_not_decide_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(wall=[1.0, 2.0, 2.0, 2.0, 4.0])
    monkeypatch.setattr(gpu, "interleave", lambda *_, **__: {"copy": timing})
    assert gpu.copy_bandwidth("cpu") == 2 * 4 * (1 << 20) / 2.0


def test_compact_states_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = [case for case in gpu.cases(True) if "compact" in case[0]]
    assert bench(monkeypatch, tmp_path, chosen) == 0
    steps = {step["step"]: step for step in written(tmp_path)["results"][0]["steps"]}
    assert steps.keys() == {cases.BASELINE, cases.EPI, *cases.COMPACT}
    for name in cases.COMPACT:
        assert steps[name]["state_bytes_per_entry"] < steps[cases.EPI]["state_bytes_per_entry"]
        assert steps[name]["gb_per_s"] > 0
