"""Claims about `bench/storages.py`, which measures what a storage costs in quality.

It runs from end to end and draws its picture; a second run finds everything there, and one with a run less runs that
one again, to the same numbers. Results of other settings are refused. Differences are paired by seed, with the interval
of Student's t, and the bar is what the docstring says. The storages are what their names say. The tables in
bench/README.md are those that the committed results give.
"""

import json
import math
from pathlib import Path

import pytest
import storages
import torch

pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency (epi-kernels[plots])")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a quick run's results."""
    folder = tmp_path_factory.mktemp("storages")
    main(folder)
    return folder / "quick.json"


def main(folder: Path, *more: str) -> None:
    threads = torch.get_num_threads()
    try:
        storages.main(["--quick", "--out", str(folder), *more])
    finally:
        torch.set_num_threads(threads)


def test_it_runs_and_writes_what_the_tables_read(quick: Path) -> None:
    results = json.loads(quick.read_text())
    assert len(results["runs"]) == len(storages.STORAGES) * len(storages.RATES) * 2
    assert {"device", "torch", "threads"} <= results["machine"].keys()
    text = storages.report(results)
    named = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")}
    compared = (storages.STORAGES.keys() | storages.MASKS.keys()) - {storages.FLOAT32, storages.IN_SECOND_MOMENT}
    assert compared <= named
    assert not named & {storages.FLOAT32, storages.IN_SECOND_MOMENT}
    assert "nan" not in text
    assert quick.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_at_least_four_fifths_of_the_model_are_in_the_storage(quick: Path) -> None:
    runs = json.loads(quick.read_text())["runs"]
    assert all(run["share"] >= 0.8 for run in runs)
    # by hand: weights, and of the states two moments and the importance
    held = {run["storage"]: run["bytes_per_entry"] for run in runs}
    assert held[storages.FLOAT32] == 4 * 4
    assert held[storages.IN_SECOND_MOMENT] == 4 + 2 * 4
    assert held["32-bit weights, bf16 states"] == 2 + 2 + 3 * 2
    assert held["24-bit weights, 8-bit states"] == pytest.approx(2 + 1 + 3 * (1 + 4 / 64), rel=0.01)


def test_a_storage_in_which_too_little_lies_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = storages.Storage(torch.bfloat16, {}, (torch.uint8,) * 3 + (None,), storages.FLOAT32)
    monkeypatch.setitem(storages.STORAGES, "wrong", wrong)
    settings = storages.QUICK
    weights = {name: value.detach() for name, value in storages.ByteTransformer(storages.CONTEXT).named_parameters()}
    threads = torch.get_num_threads()
    try:
        with pytest.raises(RuntimeError, match="wrong: only 0.0% of the entries"):
            storages.learned("wrong", 0, 1e-4, settings, weights)
    finally:
        torch.set_num_threads(threads)


def test_an_interrupted_program_runs_what_is_missing(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(quick.read_text())
    less = {**whole, "runs": whole["runs"][:-1]}
    quick.write_text(json.dumps(less))
    main(quick.parent)
    again = json.loads(quick.read_text())
    again["runs"][-1]["cpu_seconds"] = whole["runs"][-1]["cpu_seconds"]
    assert again == whole
    written = quick.stat().st_mtime_ns
    capsys.readouterr()
    main(quick.parent)
    assert quick.stat().st_mtime_ns == written
    assert capsys.readouterr().out == storages.report(whole) + "\n"


def test_results_of_other_settings_are_refused(quick: Path) -> None:
    with pytest.raises(ValueError, match="results of other settings"):
        main(quick.parent, "--steps", "3")


def run(name: str, seed: int, loss: float) -> dict[str, object]:
    return {
        "storage": name,
        "seed": seed,
        "lr": 1e-5,
        "loss": loss,
        "held_out": loss,
        "bytes_per_entry": 1.0,
        "excess": 0.0,
    }


def test_differences_are_paired_and_the_bar_is_a_tenth_of_nearest() -> None:
    name = "24-bit weights, 8-bit states"
    runs = [run(storages.FLOAT32, seed, 2.0 + seed) for seed in range(3)]
    runs += [run(storages.NEAREST, seed, 2.5 + seed) for seed in range(3)]
    runs += [run(name, seed, 2.0 + seed + extra) for seed, extra in enumerate((0.01, 0.02, 0.03))]
    # t of 2 degrees of freedom, and a standard deviation of 0.01
    half = 4.303 * 0.01 / math.sqrt(3)
    found = {row["storage"]: row for row in storages.rows({"runs": runs}, 1e-5)}
    assert found.keys() == {storages.NEAREST, name}
    assert (found[name]["mean"], found[name]["half"]) == pytest.approx((0.02, half))
    assert found[name]["of_nearest"] == pytest.approx(0.04)
    assert found[name]["met"] is (0.02 + half < 0.05) is True
    above = [{**one, "loss": one["loss"] + 0.01} if one["storage"] == name else one for one in runs]
    assert {row["storage"]: row["met"] for row in storages.rows({"runs": above}, 1e-5)} == {
        storages.NEAREST: None,
        name: False,
    }


def test_one_seed_decides_nothing() -> None:
    name = "32-bit weights, float32 states"
    runs = [run(storages.FLOAT32, 0, 2.0), run(storages.NEAREST, 0, 3.0), run(name, 0, 2.0)]
    assert [row["met"] for row in storages.rows({"runs": runs}, 1e-5)] == [None, None]


def test_the_quantiles_are_those_of_students_t() -> None:
    # the density's integral over the interval, by Simpson's rule
    for degrees, quantile in enumerate(storages.QUANTILES, 1):
        scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
        x = torch.linspace(-quantile, quantile, 20_001, dtype=torch.float64)
        density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        weights = torch.ones_like(x)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        assert float((weights * density).sum() * (x[1] - x[0]) / 3) == pytest.approx(0.95, abs=1e-4)


def test_the_tables_in_the_readme_are_those_of_the_committed_results() -> None:
    results = json.loads(storages.RESULTS.read_text())
    assert storages.report(results) in storages.README.read_text()
    assert storages.RESULTS.with_suffix(".png").exists()
