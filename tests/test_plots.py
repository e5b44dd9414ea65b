"""Claims about `epi_kernels.plots`.

Axes carry labels with units, the legend names every method, there is one bar for each task and method and one line for
each method, at the values given; undefined values leave a gap; both pictures give a method the same colour. Nothing of
pyplot changes, and without matplotlib the error says what to install.
"""

import sys
from itertools import pairwise

import pytest

from epi_kernels import plots

pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency (epi-kernels[plots])")

RATIOS = {"AdamW": [20.0, 5.0], "EPI 1%": [18.0, float("nan")], "EPI 10%": [12.0, -1.0]}
OVERLAPS = {"EPI 1%": {10: 1.0, 20: 0.5, 40: 0.25}, "EPI 10%": {10: 1.0, 20: 0.75}}
TASKS = {"prose": 0, "code": 20}


def legend_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_forgetting_has_a_bar_for_each_task_and_method() -> None:
    figure = plots.forgetting(RATIOS, ["prose", "code"], "What is forgotten")
    (axes,) = figure.axes
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    assert heights == [pytest.approx(values, nan_ok=True) for values in RATIOS.values()]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["prose", "code"]
    assert legend_of(axes) == list(RATIOS)
    assert "%" in axes.get_ylabel()
    assert figure.get_suptitle() == "What is forgotten"


def test_bars_of_a_task_do_not_overlap() -> None:
    (axes,) = plots.forgetting(RATIOS, ["prose", "code"], "").axes
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(right[0] >= left[1] - 1e-9 for left, right in pairwise(spans))


def test_mask_overlap_has_a_line_for_each_method_and_a_mark_for_each_switch() -> None:
    figure = plots.mask_overlap(OVERLAPS, TASKS, "What is protected")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    for method, overlap in OVERLAPS.items():
        assert dict(zip(*lines[method].get_data(), strict=True)) == overlap
    marks = [line for name, line in lines.items() if name not in OVERLAPS]
    assert [mark.get_xdata()[0] for mark in marks] == [20]
    assert [text.get_text() for text in axes.texts] == list(TASKS)
    assert legend_of(axes) == list(OVERLAPS)
    assert axes.get_xlabel() == "optimizer step"
    assert "Jaccard" in axes.get_ylabel()
    assert axes.get_ylim()[0] == 0


def test_a_method_has_the_same_colour_in_both_pictures() -> None:
    (bars,), (lines,) = (
        plots.forgetting(RATIOS, ["prose", "code"], "").axes,
        plots.mask_overlap(OVERLAPS, TASKS, "").axes,
    )
    by_bar = {container.get_label(): container[0].get_facecolor() for container in bars.containers}
    from matplotlib.colors import to_rgba

    by_line = {line.get_label(): to_rgba(line.get_color()) for line in lines.get_lines()}
    assert {method: by_bar[method] for method in OVERLAPS} == {method: by_line[method] for method in OVERLAPS}


def test_wrong_number_of_ratios_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'EPI' has 1 ratios for 2 tasks"):
        plots.forgetting({"EPI": [1.0]}, ["prose", "code"], "")


def test_nothing_of_pyplot_is_left_behind(tmp_path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    for name, figure in [
        ("a.png", plots.forgetting(RATIOS, ["prose", "code"], "")),
        ("b.png", plots.mask_overlap(OVERLAPS, TASKS, "")),
    ]:
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    assert pyplot.get_fignums() == before


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install epi-kernels\[plots\]"):
        plots.forgetting({"EPI": [1.0]}, ["prose"], "")
