"""Claims about `epi_kernels.plots`.

Axes carry labels with units, the legend names every method, there is one bar for each task and method and one line for
each method, at the values given; undefined values leave a gap; both pictures give a method the same colour. A heat map
has the values given in its cells, a label for each row and column that has room, and the unit beside its scale.
Telemetry's records give the shares and the flip rates of the masks themselves. Every picture has a dark form, in which
all of its text can be read. Nothing of pyplot changes, and without matplotlib the error says what to install.
"""

import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from epi_kernels import EPIAdamW, metrics, plots
from epi_kernels.metrics import Place, Validity

pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency (epi-kernels[plots])")

RATIOS = {"AdamW": [20.0, 5.0], "EPI 1%": [18.0, float("nan")], "EPI 10%": [12.0, -1.0]}
OVERLAPS = {"EPI 1%": {10: 1.0, 20: 0.5, 40: 0.25}, "EPI 10%": {10: 1.0, 20: 0.75}}
TASKS = {"prose": 0, "code": 20}
RESULTS = [[80.0, 10.0], [60.0, 90.0]]
PAIRS = {"prose": {"prose": 1.0, "code": 0.25}, "code": {"prose": 0.25, "code": 1.0}}
RATES = {
    "early": {"blocks.0": 0.1, "blocks.1": 0.5, "head": 0.0},
    "late": {"blocks.0": 0.2, "blocks.1": 0.4, "head": 1},
}
PLACES = [
    Place("model.layers.0", "query.weight", 8, 2, 0.25, 0.2),
    Place("model.layers.0", "mlp.weight", 8, 0, 0.0, 0.0),
    Place("model.layers.1", "query.weight", 8, 4, 0.5, 0.4),
    Place("lm_head", "lm_head.weight", 4, 4, 1.0, 0.4),
]
VALIDITY = Validity(0.72, 0.68, [0.0, 1e-8, 1e-6, 1e-5], [-1e-7, 0.0, 1e-5, 1e-4])
RECORDS = [
    {
        "step": 10 * (number + 1),
        "eligible": 40,
        "budget": 4,
        "protected_share": 0.1,
        "layers": [
            {"layer": "blocks.0", "eligible": 20, "protected": number, "locked": number > 0, "released": 0},
            {
                "layer": "blocks.1",
                "eligible": 20,
                "protected": 4 - number,
                "locked": 4 * (number < 1),
                "released": number > 0,
            },
        ],
    }
    for number in range(3)
]
EVERY: dict[str, Callable] = {
    "forgetting": lambda **options: plots.forgetting(RATIOS, ["prose", "code"], "Title", **options),
    "mask_overlap": lambda **options: plots.mask_overlap(OVERLAPS, TASKS, "Title", **options),
    "results_matrix": lambda **options: plots.results_matrix(RESULTS, ["prose", "code"], "Title", **options),
    "overlap_matrix": lambda **options: plots.overlap_matrix(PAIRS, "Title", **options),
    "conflict_matrix": lambda **options: plots.conflict_matrix(PAIRS, "Title", **options),
    "flip_rates": lambda **options: plots.flip_rates(RATES, "Title", **options),
    "placement": lambda **options: plots.placement(PLACES, "Title", **options),
    "validity": lambda **options: plots.validity(VALIDITY, "Title", **options),
    "protection": lambda **options: plots.protection(RECORDS, "Title", **options),
    "layers_over_time": lambda **options: plots.layers_over_time(RECORDS, "Title", **options),
}


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


def labels_of(axes, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(axes, f"get_{axis}ticklabels")()]


def cells_of(axes) -> list[list[float]]:
    (image,) = axes.get_images()
    return np.ma.filled(image.get_array(), np.nan).tolist()


def numbers_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_results_matrix_has_the_numbers_and_frames_what_was_just_learned() -> None:
    axes, scale = plots.results_matrix(RESULTS, ["prose", "code"], "", measure="accuracy (%)").axes
    assert cells_of(axes) == RESULTS
    assert numbers_of(axes) == ["80.0", "10.0", "60.0", "90.0"]
    assert labels_of(axes, "y") == ["after prose", "after code"]
    assert labels_of(axes, "x") == ["prose", "code"]
    assert [(*frame.get_xy(), frame.get_width()) for frame in axes.patches] == [(-0.5, -0.5, 1), (0.5, 0.5, 1)]
    assert legend_of(axes) == ["right after learning"]
    assert scale.get_ylabel() == "accuracy (%)"


@pytest.mark.parametrize("results", [[], [[1.0]], [[1.0, 2.0], [1.0]]])
def test_results_that_are_no_square_are_an_error(results) -> None:
    with pytest.raises(ValueError, match="for 2 tasks; pass a square"):
        plots.results_matrix(results, ["prose", "code"], "")


@pytest.mark.parametrize(("draw", "unit"), [(plots.overlap_matrix, "Jaccard"), (plots.conflict_matrix, "cosine")])
def test_pairs_have_their_values_on_a_scale_from_0_to_1(draw, unit: str) -> None:
    values = {
        "a": {"b": 0.25, "a": 0.5, "c": 0.0},
        "b": {"a": 0.25, "b": 0.5, "c": 0.1},
        "c": {"a": 0, "b": 0.1, "c": 0},
    }
    axes, scale = draw(values, "").axes
    assert cells_of(axes) == [[0.5, 0.25, 0.0], [0.25, 0.5, 0.1], [0.0, 0.1, 0.0]]
    assert numbers_of(axes) == ["0.50", "0.25", "0.00", "0.25", "0.50", "0.10", "0.00", "0.10", "0.00"]
    assert labels_of(axes, "x") == labels_of(axes, "y") == ["a", "b", "c"]
    assert axes.get_images()[0].get_clim() == (0.0, 1.0)
    assert unit in scale.get_ylabel()
    with pytest.raises(ValueError, match=r"row 'a' and the rows has \['b'\]"):
        draw({"a": {"a": 1.0, "b": 0.5}}, "")
    with pytest.raises(ValueError, match="there are no tasks"):
        draw({}, "")


def test_flip_rates_have_a_line_for_each_method_over_the_layers() -> None:
    (axes,) = plots.flip_rates(RATES, "").axes
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[10.0, 50.0, 0.0], [20.0, 40.0, 100.0]]
    assert labels_of(axes, "x") == ["0", "1", "head"]
    assert legend_of(axes) == list(RATES)
    assert "%" in axes.get_ylabel()
    with pytest.raises(ValueError, match=r"first method and 'late' has \['blocks.1'\]"):
        plots.flip_rates({"early": {"blocks.0": 0.1, "blocks.1": 0.1}, "late": {"blocks.0": 0.1}}, "")
    with pytest.raises(ValueError, match="there are no rates"):
        plots.flip_rates({}, "")


@pytest.mark.parametrize(
    ("share", "cells"),
    [
        ("entries", [[25.0, 50.0, np.nan], [0.0, np.nan, np.nan], [np.nan, np.nan, 100.0]]),
        ("mask", [[20.0, 40.0, np.nan], [0.0, np.nan, np.nan], [np.nan, np.nan, 40.0]]),
    ],
)
def test_placement_has_a_cell_for_each_kind_and_layer(share, cells) -> None:
    axes, scale = plots.placement(PLACES, "", share=share).axes
    assert cells_of(axes) == [pytest.approx(row, nan_ok=True) for row in cells]
    assert numbers_of(axes) == [f"{cell:.1f}" for row in cells for cell in row if cell == cell]
    assert labels_of(axes, "y") == ["query.weight", "mlp.weight", "lm_head.weight"]
    assert labels_of(axes, "x") == ["0", "1", "-"]
    assert legend_of(axes) == ["no such parameter"]
    assert "%" in scale.get_ylabel()


def test_layers_of_two_stacks_keep_their_names() -> None:
    rows = [Place(f"{stack}.layers.0", "weight", 1, 1, 1.0, 0.5) for stack in ("encoder", "decoder")]
    axes = plots.placement(rows, "").axes[0]
    assert labels_of(axes, "x") == ["encoder.layers.0", "decoder.layers.0"]
    assert axes.get_legend() is None
    with pytest.raises(ValueError, match="Invalid share: 'all'"):
        plots.placement(rows, "", share="all")
    with pytest.raises(ValueError, match="there are no places"):
        plots.placement([], "")


@pytest.mark.parametrize("layers", [11, 12, 32, 80])
def test_a_large_model_has_as_many_labels_as_there_is_room_for(layers: int) -> None:
    rows = [Place(f"layers.{layer}", "weight", 1, 0, 0.0, 0.0) for layer in range(layers)]
    axes = plots.placement(rows, "").axes[0]
    places, labels = axes.get_xticks(), labels_of(axes, "x")
    assert labels == [str(int(place)) for place in places]
    assert len(labels) <= 12
    assert (places[0], places[-1]) == (0, layers - 1)
    assert numbers_of(axes) == []
    assert axes.get_images()[0].get_clim()[1] > 0


def test_validity_has_a_point_for_each_entry_and_both_correlations() -> None:
    (axes,) = plots.validity(VALIDITY, "").axes
    points = axes.collections[0].get_offsets().tolist()
    assert points == [list(pair) for pair in zip(VALIDITY.scores, VALIDITY.changes, strict=True)]
    assert legend_of(axes) == ["4 entries, Pearson r = 0.72, Spearman rho = 0.68"]
    assert axes.get_xticks().tolist() == pytest.approx([0, 1e-6, 1e-5])
    assert axes.get_yticks().tolist() == pytest.approx([0, 1e-5, 1e-4])
    assert "squared gradient" in axes.get_xlabel()
    assert "units of the loss" in axes.get_ylabel()
    plots.validity(Validity(0.0, 0.0, [0.0, 0.0], [0.0, 0.0]), "")


def test_protection_has_shares_and_flip_rates() -> None:
    above, below = plots.protection(RECORDS, "").axes
    lines = {line.get_label(): line for axes in (above, below) for line in axes.get_lines()}
    assert all(line.get_xdata().tolist() == [10, 20, 30] for line in lines.values())
    assert lines["protected"].get_ydata().tolist() == lines["budget"].get_ydata().tolist() == [10.0, 10.0, 10.0]
    # of 4 protected entries before and 4 after one was released and one locked; before the first there were none
    assert lines["flip rate"].get_ydata().tolist() == pytest.approx([np.nan, 25.0, 25.0], nan_ok=True)
    assert [*legend_of(above), *legend_of(below)] == ["protected", "budget", "flip rate"]
    assert "%" in above.get_ylabel()
    assert below.get_xlabel() == "optimizer step"


def test_layers_over_time_has_a_cell_for_each_layer_and_refresh() -> None:
    later = [{"layer": "head", "eligible": 10, "protected": 1}]
    axes, scale = plots.layers_over_time([*RECORDS, {"step": 40, "layers": later}], "").axes
    expected = [[0, 5, 10, np.nan], [20, 15, 10, np.nan], [np.nan, np.nan, np.nan, 10]]
    assert cells_of(axes) == [pytest.approx(row, nan_ok=True) for row in expected]
    assert labels_of(axes, "x") == ["10", "20", "30", "40"]
    assert labels_of(axes, "y") == ["0", "1", "head"]
    assert "%" in scale.get_ylabel()


@pytest.mark.parametrize("draw", [plots.protection, plots.layers_over_time])
def test_no_records_are_an_error(draw) -> None:
    with pytest.raises(ValueError, match="there are no records"):
        draw([], "")


def test_records_of_an_optimizer_give_the_numbers_of_its_masks() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    optimizer = EPIAdamW(model.named_parameters(), isolation_ratio=0.2, importance_beta=0.5, mask_interval=2)
    masks = []
    for step in range(1, 9):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        if step % 2 == 0:
            masks.append({name: optimizer.isolation_mask(param).clone() for name, param in model.named_parameters()})
    records = optimizer.telemetry()
    rates = plots.protection(records, "").axes[1].get_lines()[0].get_ydata()
    assert rates[1:].tolist() == pytest.approx([100 * metrics.flip_rate(*pair) for pair in pairwise(masks)])
    cells = np.array(cells_of(plots.layers_over_time(records, "").axes[0]))
    for number, mask in enumerate(masks):
        counts = [sum(int(mask[f"{layer}.{kind}"].sum()) for kind in ("weight", "bias")) for layer in range(3)]
        assert cells[:, number].tolist() == pytest.approx([100 * count / 72 for count in counts])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dark", [False, True])
def test_all_text_stands_out_from_the_ground(name: str, dark: bool) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.text import Text

    def lightness(colour) -> float:
        """Return the relative luminance, by WCAG 2."""
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    figure = EVERY[name](dark=dark)
    assert figure.get_suptitle() == "Title"
    figure.draw_without_rendering()
    ground = lightness(figure.get_facecolor())
    assert (ground < 0.05) == dark
    in_cells = {text for axes in figure.axes if axes.get_images() for text in axes.texts}
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and text not in in_cells:
            light, dim = sorted([lightness(text.get_color()), ground], reverse=True)
            assert (light + 0.05) / (dim + 0.05) > 7, text
            assert text.get_fontsize() >= 10, text
    for axes in figure.axes:
        for text in axes.texts if axes.get_images() else ():
            column, row = (int(place) for place in text.get_position())
            (image,) = axes.get_images()
            cell = lightness(image.to_rgba(np.asarray(image.get_array()))[row, column])
            light, dim = sorted([lightness(text.get_color()), cell], reverse=True)
            assert (light + 0.05) / (dim + 0.05) > 3, text


def test_a_long_title_is_broken() -> None:
    figure = plots.overlap_matrix(PAIRS, "word " * 20)
    assert max(map(len, figure.get_suptitle().splitlines())) <= 56


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_of_pyplot_is_left_behind(dark: bool, tmp_path) -> None:
    from matplotlib import pyplot, rcParams

    before, settings = pyplot.get_fignums(), dict(rcParams)
    for name, draw in EVERY.items():
        draw(dark=dark).savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert pyplot.get_fignums() == before
    assert dict(rcParams) == settings


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install epi-kernels\[plots\]"):
        plots.forgetting({"EPI": [1.0]}, ["prose"], "")
