"""A report is one page that needs nothing else, says what the run says, and comes out the same again.

- It loads nothing: every picture is within the page, once for a light ground and once for a dark one.
- Every picture and table has a sentence that says what to see; text of the user's cannot become part of the page.
- Its numbers are those of the results and records.
- The command line writes it from JSON, from a folder and from a checkpoint, and says what is wrong with other files.
"""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from epi_kernels import EPIAdamW, report
from epi_kernels.__main__ import main

pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency (epi-kernels[plots])")

RESULTS = {"AdamW": [[80.0, 10.0], [40.0, 75.0]], "EPI": [[60.0, 10.0], [57.0, 74.0]]}
TASKS = ["prose", "code"]


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.text += data


def trained(steps: int = 3) -> EPIAdamW:
    params = {f"blocks.{i}.w": Parameter(torch.ones(6, 4)) for i in range(3)}
    optimizer = EPIAdamW(params.items(), mask_interval=1, isolation_ratio=0.25, importance_beta=0.5)
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.fixture
def records() -> list[dict[str, Any]]:
    return trained().telemetry()


def page_of(folder: Path, **given: Any) -> Page:
    page = Page(report.write(folder / "new" / "report.html", "A run", **given).read_text("utf-8"))
    assert not page.open
    return page


def test_a_page_loads_nothing_and_every_picture_has_two_grounds_and_a_sentence(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    page = page_of(tmp_path, tasks=TASKS, results=RESULTS, telemetry={"EPI": records})
    addresses = [value for _, attributes in page.tags for key, value in attributes.items() if key in _ADDRESSES]
    assert all(str(address).startswith("data:") for address in addresses)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in page.text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 3 + 2  # forgetting and a matrix of each method; protection and layers
    assert all(str(of["alt"]).endswith(".") for of in pictures)
    dark = [attributes for tag, attributes in page.tags if tag == "source"]
    assert len(dark) == len(pictures)
    for light, on_dark in zip(pictures, dark, strict=True):
        drawn = [base64.b64decode(str(of).split(",")[1]).decode() for of in (light["src"], on_dark["srcset"])]
        assert drawn[0] != drawn[1]
        assert all("<svg" in of and "#14181c" in drawn[1] for of in drawn)
    assert all(of["media"] == "(prefers-color-scheme: dark)" for of in dark)


_ADDRESSES = ("src", "srcset", "href")


def test_the_numbers_are_those_of_the_results(tmp_path: Path) -> None:
    rows = page_of(tmp_path, tasks=TASKS, results=RESULTS).rows
    columns = ["method", "learned (AP)", "at the end (OP)", "change by later tasks (BWT)", "forgotten (average FR)"]
    assert rows[0] == columns
    assert rows[1] == ["AdamW", "77.5", "57.5", "-20.0", "50.0%"]
    assert rows[2] == ["EPI", "67.0", "65.5", "-1.5", "5.0%"]


def test_a_task_that_was_never_learned_has_no_forgetting(tmp_path: Path) -> None:
    rows = page_of(tmp_path, tasks=TASKS, results={"none": [[0.0, 1.0], [0.0, 2.0]]}).rows
    assert rows[1][-1] == "-"


def test_the_numbers_are_those_of_the_records(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    page = page_of(tmp_path, telemetry={"EPI": records}, facts={"seed": 7})
    last = records[-1]
    cells = {row[0]: row[1:] for row in page.rows}
    assert cells["refreshes recorded"] == ["3"]
    assert cells["entries protected in the last"] == ["18 of 72"]
    assert cells["overlap of the last mask with the one before (1 = same entries)"] == [f"{last['jaccard']:.2f}"]
    for layer in last["layers"]:
        counts = [str(layer[key]) for key in ("eligible", "protected", "locked", "released")]
        assert cells[layer["layer"]][:4] == counts
    assert "seed" in page.text
    assert "7" in page.text


def test_a_run_without_a_refresh_says_so(tmp_path: Path) -> None:
    assert "shorter than mask_interval" in page_of(tmp_path, telemetry={"EPI": []}).text


def test_pictures_and_tables_of_ones_own_come_last(tmp_path: Path) -> None:
    from epi_kernels import plots

    more = [
        report.Picture("Look here.", lambda dark: plots.forgetting({"AdamW": [1.0]}, ["a"], "Title", dark=dark)),
        report.Table("Read this.", ("name", "bytes"), [(f"row {i}", i) for i in range(20)]),
    ]
    page = page_of(tmp_path, more=more, note="No evidence.")
    assert page.rows[20] == ["row 19", "19"]
    assert "details" in {tag for tag, _ in page.tags}  # a long table is folded
    assert page.text.index("Look here.") < page.text.index("Read this.") < page.text.index("No evidence.")


def test_text_cannot_become_part_of_the_page(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    evil = '"><script>alert(1)</script>'
    table = report.Table(evil, (evil,), [(evil,)])
    path = report.write(
        tmp_path / "report.html", evil, facts={evil: evil}, telemetry={evil: records}, more=[table], note=evil
    )
    page = Page(path.read_text("utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 8


def test_the_same_run_gives_the_same_page(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    given: dict[str, Any] = {"telemetry": {"EPI": records}}
    pages = [report.write(tmp_path / name, "A run", **given).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_results_that_are_no_square_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results of 'AdamW' have rows of \[2, 2\] for 1 tasks; pass a square"):
        report.write(tmp_path / "report.html", "A run", tasks=["prose"], results=RESULTS)
    assert not (tmp_path / "report.html").exists()


# the command line ----------------------------------------------------------------------------------------------------


FORMS = ["json", "folder", "trainer", "finetune", "earlier", "checkpoint", "checkpoint of more"]


@pytest.mark.parametrize("form", FORMS)
def test_the_command_writes_a_page_of_a_file(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = trained()
    path = tmp_path / "run"
    if form == "json":
        path.write_text(json.dumps(optimizer.telemetry()))
    elif form == "earlier":  # without what is computed from the other numbers
        told = [{k: v for k, v in of.items() if k not in ("jaccard", "kept")} for of in optimizer.telemetry()]
        path.write_text(json.dumps(told))
    elif form in ("folder", "trainer", "finetune"):
        path.mkdir()
        records = optimizer.telemetry()
        name, told = {
            "folder": ("telemetry.json", records),
            "trainer": ("trainer_state.json", {"stateful_callbacks": {"IsolationCallback": {"telemetry": records}}}),
            "finetune": ("progress.json", {"task": 1, "telemetry": records}),
        }[form]
        (path / name).write_text(json.dumps(told))
    else:
        state = optimizer.state_dict(telemetry=True)
        torch.save(state if form == "checkpoint" else {"model": {}, "optimizer": state}, path)
    main(["report", str(path), "--out", str(tmp_path / "page.html"), "--title", "My run"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<h1>My run</h1>" in page
    assert "18 of 72" in page


BAD = {
    "missing": (None, "does not exist; give a telemetry.json"),
    "text": (b"hello", "is neither JSON nor a checkpoint"),
    "another json": (b'{"loss": 1}', "has no records of refreshes: save optimizer.state_dict"),
    "a changed record": (b'[{"step": 1}]', "telemetry record 0 has no 'layers'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_the_command_says_what_is_wrong_with_a_file(
    bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD[bad]
    path = tmp_path / "run"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        main(["report", str(path), "--out", str(tmp_path / "page.html")])
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "page.html").exists()


def test_a_checkpoint_without_records_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(trained().state_dict(), tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run")])
    assert "has no records of refreshes" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_doctor_is_what_is_said_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for arguments in ([], ["doctor"]):
        main(arguments)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "native library" in said[0]
