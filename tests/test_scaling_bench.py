"""Claims about `bench/measure.py`, `bench/cpu.py` and `bench/scaling.py`.

A step that takes memory for a moment has that memory as its peak, also where the process has free memory left over; a
share of a copy's bandwidth is that within rounds. Steps are timed together where their states fit into memory, else
one by one, and one that does not fit is left out with the reason: its place in the table and in the picture is empty.
Growth is 1 where it is linear. The collectives of a refresh are those that docs/sharded.md names, however many ranks.
"""

from pathlib import Path

import cases
import cpu
import measure
import pytest
import scaling
import torch

MIB = 1 << 20
needs_peaks = pytest.mark.skipif(measure.peak_bytes(int) is None, reason="this system does not count peak memory")


@needs_peaks
@pytest.mark.parametrize("mib", [0, 64, 256])
def test_the_peak_is_what_a_run_takes_for_a_moment(mib: int) -> None:
    def run() -> None:
        torch.ones(mib * MIB // 4)

    run()  # leaves free memory to the process perhaps
    found = measure.peak_bytes(run)
    assert found is not None
    assert found == pytest.approx(mib * MIB, abs=4 * MIB)


def test_a_share_of_a_copy_is_taken_within_rounds() -> None:
    timings = {
        cases.BASELINE: measure.Timing(wall=[2.0, 4.0, 4.0], cpu=[1.0] * 3),
        cpu.COPY: measure.Timing(wall=[1.0, 1.0, 2.0], cpu=[1.0] * 3),
    }
    row = cpu.row(cases.BASELINE, cases.Candidate(lambda: None, []), timings, 1, "wall")
    # 28 bytes against 8
    assert (row["share_of_copy"], row["share_of_copy_least"], row["share_of_copy_greatest"]) == (1.75, 0.875, 1.75)


def test_a_candidate_whose_bytes_nobody_counts_has_no_share_of_a_copy() -> None:
    timing = measure.Timing(wall=[1.0], cpu=[1.0])
    timings = {name: timing for name in (cases.BASELINE, cases.EAGER, cpu.COPY)}
    row = cpu.row(cases.EAGER, cases.Candidate(lambda: None, []), timings, 1, "wall")
    assert row["share_of_copy"] is None


def test_steps_take_turns_where_their_states_do_not_fit_together() -> None:
    together = scaling.SHARED + sum(scaling.KEPT.values())
    everyone = list(scaling.KEPT)
    assert scaling.turns(1000, 1000 * together / scaling.ROOM + 1) == ([everyone], {})
    assert scaling.turns(1000, 1000 * together / scaling.ROOM - 1) == ([[name] for name in everyone], {})
    groups, left_out = scaling.turns(1 << 30, (scaling.SHARED + 9) * 2**30 / scaling.ROOM)
    assert groups == [[cases.BASELINE], [cases.SPARSE]]
    assert left_out == {name: "it takes 20.0 GiB, and steps may take 17.0" for name in (cases.EPI, cases.REFRESH)}
    assert scaling.turns(1 << 30, 0)[0] == []


def test_a_step_that_is_left_out_is_an_empty_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def only_small(entries: int, free: float) -> tuple[list[list[str]], dict[str, str]]:
        return ([[cases.BASELINE]], {}) if entries < 512 else ([], {cases.BASELINE: "why"})

    monkeypatch.setattr(scaling, "turns", only_small)
    found = scaling.over_parameters("entries", [(256, 256, 1), (512, 512, 1)], rounds=2)
    found["growth"] = scaling.growth(found)
    assert found["growth"] == {cases.BASELINE: [1.0, None]}
    assert f"left out: {cases.BASELINE}, 512: why" in scaling.text(found)
    scaling.draw({"results": {"entries": found}}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size


def test_linear_growth_is_one() -> None:
    found = {"linear": [2.0, 4.0, 8.0], "ms": {"linear": [3.0, 6.0, 12.0], "square": [1.0, 4.0, 16.0]}}
    assert scaling.growth(found) == {"linear": [1.0, 1.0, 1.0], "square": [1.0, 2.0, 4.0]}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="there is no torch.distributed")
def test_more_ranks_have_no_more_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "RANKS", (1, 2))
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 1)
    found = scaling.ranks_grow(rounds=1)
    assert found["linear"] == [1.0, 2.0]
    assert found["collectives"] == [5, 5]
    # ranges of 16 layers, whether to agree again, settings and clock twice; three digits; three counts of each layer
    assert found["bytes"] == [8 * (2 * 16 + 5 + 4096 + 1024 + 512 + 3 * 16)] * 2
    assert set(found["ms"]) == {cases.BASELINE, cases.EPI, cases.REFRESH, scaling.COLLECTIVES}
