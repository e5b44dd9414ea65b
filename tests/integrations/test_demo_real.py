"""`examples/demo_real.py`: a real encoder, three tasks in a row, all from packages. Two steps of a task.

No text is in both parts of a task, and the sizes are those that the docstring names. The encoder is the real one: of a
quiz it finds more answers than chance, before any training. Kept runs are used again. All numbers are in the report.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo_real(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo_real

    yield demo_real
    sys.modules.pop("demo_real", None)


def test_the_tasks_are_what_the_docstring_says(demo_real: ModuleType) -> None:
    told = {int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", demo_real.__doc__)}
    for task in demo_real.make_tasks():
        train, held_out = ({text for text, _ in part} for part in (task.train, task.held_out))
        assert not train & held_out
        assert len(train) == len(task.train) == pytest.approx(7 * len(held_out), rel=0.06)
        for part in (task.train, task.held_out):
            assert {label for _, label in part} == set(range(len(task.labels)))
        if task.name == "docstrings":  # each Python has others
            assert 1000 < len(train | held_out) < 2500
        else:
            assert len(train | held_out) in told
    general = demo_real.quiz()
    assert {len(general.questions), len(general.answers)} <= told


def test_the_demo_runs_and_keeps_its_runs(
    demo_real: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_real, "EXAMINED", 4)
    monkeypatch.setattr(demo_real, "RATES", (1e-4,))
    arguments = ["--steps", "2", "--mask-interval", "2", "--isolation-ratio", "0.1", "--out", str(tmp_path)]
    demo_real.main(arguments)
    printed = capsys.readouterr().out
    # every run is kept: none may start again
    monkeypatch.setattr(demo_real, "pretrained", lambda: pytest.fail("a kept run was made again"))
    demo_real.main(arguments)
    assert capsys.readouterr().out == printed

    for name in ("real_forgetting.png", "real_mask_overlap.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report-real.html").read_text()
    for method in ("AdamW", "EPI, p = 10%", "random"):
        lines = printed.partition(f"\n{method}\n")[2].splitlines()
        original, last = (lines[place].split() for place in (1, 4))
        assert original[:4] == ["original", "-", "-", "-"]
        assert original[4:6] == ["1.000", "0.000"]
        assert float(original[6]) > 20  # of 250 answers, chance finds 0.4%
        assert last[:2] == ["after", "languages"]
        assert float(last[5]) < 1 < 1000 * float(last[6])  # the encoder has moved
        assert f"<td>{last[5]}</td>" in page
    assert "three small tasks" in page
    assert "All at the learning rate 0.0001." in printed
