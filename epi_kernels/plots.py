"""Pictures of what isolation does, as matplotlib figures. Needs `pip install epi-kernels[plots]`.

Each function returns a figure that belongs to nobody: save it with ``figure.savefig(path)``. With ``dark=True`` it has
light lines on a dark ground. All of them raise ImportError if matplotlib is not installed.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from epi_kernels.metrics import Place, Validity
from epi_kernels.metrics.masks import is_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Theme(NamedTuple):
    """The colours of a picture."""

    ground: str
    text: str
    faint: str  # grid, and cells without a value
    baseline: str
    colours: tuple[str, ...]  # of methods, in order
    heat: tuple[str, ...]  # from the lowest to the highest value


# grey and Okabe-Ito colours: colour-blind readers can tell them apart, and in print their lightness differs
_LIGHT = _Theme(
    "#ffffff",
    "#333333",
    "#d9d9d9",
    "#9a9a9a",
    ("#56b4e9", "#00517d", "#e69f00", "#009e73", "#cc79a7"),
    ("#f4f9fd", "#56b4e9", "#00304a"),
)
# on a dark ground dark blue cannot be seen: yellow has its place
_DARK = _Theme(
    "#14181c",
    "#e4e4e4",
    "#3d444b",
    "#9a9a9a",
    ("#56b4e9", "#f0e442", "#e69f00", "#009e73", "#cc79a7"),
    ("#1c2a36", "#2f86ba", "#e6f4fc"),
)

# cells in a row of a heat map that still have room for a number each, and labels along an axis
_NUMBERED = 10
_LABELLED = 11


def forgetting(
    ratios: Mapping[str, Sequence[float]], tasks: Sequence[str], title: str, *, dark: bool = False
) -> "Figure":
    """Draw the forgetting ratio of each task as a group of bars, one for each method.

    Args:
        ratios: method -> forgetting ratio of each task, percent (`metrics.forgetting_ratio`); NaN, undefined, leaves a
            gap. The first method is the baseline, in grey; the others have the colours of `mask_overlap`.
        tasks: a label for each group, in the order of the ratios; it may have several lines.
        title: what is seen.
        dark: whether the ground is dark.

    Raises:
        ValueError: a method has more or fewer ratios than there are tasks.

    >>> figure = forgetting({"AdamW": [12.0, 3.0], "EPI": [9.0, 2.5]}, ["prose", "code"], "Forgetting")
    >>> len(figure.axes[0].patches)
    4
    """
    figure, (axes,), theme = _canvas(title, dark)
    colours = (theme.baseline, *theme.colours)
    width = 0.8 / len(ratios)
    for index, (method, values) in enumerate(ratios.items()):
        if len(values) != len(tasks):
            raise ValueError(f"method {method!r} has {len(values)} ratios for {len(tasks)} tasks")
        places = [group + (index - (len(ratios) - 1) / 2) * width for group in range(len(tasks))]
        bars = axes.bar(places, values, width=0.92 * width, color=colours[index % len(colours)], label=method)
        labels = ["" if value != value else f"{value:.1f}" for value in values]  # NaN differs from itself
        axes.bar_label(bars, labels, padding=2, fontsize=10, color=theme.text)
    axes.axhline(0, color=theme.text, linewidth=0.8)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    axes.set_ylabel("forgetting ratio\n(% of accuracy right after learning)")
    _legend(axes, theme)
    return figure


def mask_overlap(
    overlaps: Mapping[str, Mapping[int, float]], tasks: Mapping[str, int], title: str, *, dark: bool = False
) -> "Figure":
    """Draw how much of the first mask is left as training goes on, one line for each method.

    Args:
        overlaps: method -> optimizer step of a refresh -> overlap of its mask with the first one, in [0, 1]
            (`metrics.mask_jaccard`).
        tasks: name of a task -> optimizer steps made before it starts, in the order learned.
        title: what is seen.
        dark: whether the ground is dark.

    >>> figure = mask_overlap({"EPI": {25: 1.0, 50: 0.6}}, {"prose": 0, "code": 25}, "Mask drift")
    >>> figure.axes[0].get_xlabel()
    'optimizer step'
    """
    figure, (axes,), theme = _canvas(title, dark)
    for index, (method, overlap) in enumerate(overlaps.items()):
        _line(axes, theme, index, list(overlap), list(overlap.values()), method)
    starts = list(tasks.values())
    end = max([*starts, *(step for overlap in overlaps.values() for step in overlap)])
    for name, start, stop in zip(tasks, starts, [*starts[1:], end], strict=True):
        if start > 0:
            axes.axvline(start, color=theme.text, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            name,
            ((start + stop) / 2, 1.0),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=11,
            color=theme.text,
        )
    axes.set_xlim(0, end * 1.01)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("Jaccard overlap with the first mask\n(1 = same entries)")
    _legend(axes, theme, loc="lower left")
    return figure


def results_matrix(
    results: Sequence[Sequence[float]],
    tasks: Sequence[str],
    title: str,
    *,
    measure: str = "performance (more is better)",
    dark: bool = False,
) -> "Figure":
    """Draw the performance on every task after learning each of them, with a frame where a task was just learned.

    Below the frames is what was forgotten, above them what was known before it was learned.

    Args:
        results: R: row t has the performance on every task after learning task t, as in `metrics.overall_performance`.
        tasks: names, in the order learned.
        title: what is seen.
        measure: what the numbers are, with the unit.
        dark: whether the ground is dark.

    Raises:
        ValueError: there are not as many rows and columns as tasks, or none.

    >>> figure = results_matrix([[81.0, 12.0], [64.0, 77.0]], ["prose", "code"], "Results", measure="accuracy (%)")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['81.0', '12.0', '64.0', '77.0']
    """
    if not tasks or len(results) != len(tasks) or any(len(row) != len(tasks) for row in results):
        raise ValueError(f"results has rows of {[len(row) for row in results]} for {len(tasks)} tasks; pass a square")
    figure, (axes,), theme = _canvas(title, dark, grid=False)
    _heat(axes, theme, np.array(results), [f"after {task}" for task in tasks], tasks, measure, numbers="{:.1f}")
    axes.set_xlabel("performance on")
    from matplotlib.patches import Rectangle

    for place in range(len(tasks)):
        corner = (place - 0.5, place - 0.5)
        frame = Rectangle(corner, 1, 1, fill=False, edgecolor=theme.colours[2], linewidth=3)
        axes.add_patch(frame).set_label("right after learning")
    _legend(axes, theme, handles=axes.patches[:1])
    return figure


def overlap_matrix(overlaps: Mapping[str, Mapping[str, float]], title: str, *, dark: bool = False) -> "Figure":
    """Draw how much the masks of each pair of tasks have in common.

    Args:
        overlaps: task -> other task -> overlap in [0, 1] (`metrics.overlap_matrix`).
        title: what is seen.
        dark: whether the ground is dark.

    Raises:
        ValueError: there are no tasks, or a row has others than there are rows.

    >>> figure = overlap_matrix({"a": {"a": 1.0, "b": 0.3}, "b": {"a": 0.3, "b": 1.0}}, "Overlap")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['1.00', '0.30', '0.30', '1.00']
    """
    return _pairs(overlaps, title, "Jaccard overlap (1 = same entries)", dark)


def conflict_matrix(conflicts: Mapping[str, Mapping[str, float]], title: str, *, dark: bool = False) -> "Figure":
    """Draw how far the gradients of each pair of tasks point against each other.

    Args:
        conflicts: task -> other task -> conflict in [0, 1] (`metrics.conflict_matrix`).
        title: what is seen.
        dark: whether the ground is dark.

    Raises:
        ValueError: there are no tasks, or a row has others than there are rows.

    >>> figure = conflict_matrix({"a": {"a": 0.0, "b": 0.6}, "b": {"a": 0.6, "b": 0.0}}, "Conflict")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0.00', '0.60', '0.60', '0.00']
    """
    return _pairs(conflicts, title, "gradient conflict, max(0, -cosine)\n(1 = opposite directions)", dark)


def flip_rates(rates: Mapping[str, Mapping[str, float]], title: str, *, dark: bool = False) -> "Figure":
    """Draw how much of each layer's mask changed, one line for each method or pair of refreshes.

    Args:
        rates: method -> layer, in order of depth -> flip rate in [0, 1] (`metrics.flip_rates`); all have the layers of
            the first.
        title: what is seen.
        dark: whether the ground is dark.

    Raises:
        ValueError: there is no method, or one has other layers than the first.

    >>> figure = flip_rates({"EPI": {"blocks.0": 0.1, "blocks.1": 0.25}}, "Upper layers change more")
    >>> [float(y) for y in figure.axes[0].get_lines()[0].get_ydata()]
    [10.0, 25.0]
    """
    if not rates:
        raise ValueError("there are no rates; pass {method: metrics.flip_rates(before, after)}")
    layers = list(next(iter(rates.values())))
    figure, (axes,), theme = _canvas(title, dark)
    for index, (method, rate) in enumerate(rates.items()):
        if rate.keys() != set(layers):
            raise ValueError(f"only one of the first method and {method!r} has {sorted(rate.keys() ^ set(layers))}")
        _line(axes, theme, index, list(range(len(layers))), [100 * rate[layer] for layer in layers], method)
    _label(axes, "x", _short(layers))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer, from the first to the last")
    axes.set_ylabel("flip rate (% of protected entries)")
    _legend(axes, theme)
    return figure


def placement(
    places: Sequence[Place], title: str, *, share: Literal["entries", "mask"] = "entries", dark: bool = False
) -> "Figure":
    """Draw where in a model a mask lies, as a heat map of kinds of modules and layers.

    Parameters in no block have a column of their own, the last.

    Args:
        places: rows of `metrics.placement`.
        title: what is seen.
        share: of what a cell is the share, in percent: "entries" of the cell's parameters, or the whole "mask".
        dark: whether the ground is dark.

    Raises:
        ValueError: there are no places, or `share` is none of these.

    >>> mask_places = [Place("blocks.0", "query.weight", 16, 4, 0.25, 1.0)]
    >>> [text.get_text() for text in placement(mask_places, "Where").axes[0].texts]
    ['25.0']
    """
    if share not in ("entries", "mask"):
        raise ValueError(f"Invalid share: {share!r}; choose one of ('entries', 'mask')")
    if not places:
        raise ValueError("there are no places; pass the rows of metrics.placement")
    columns = list(dict.fromkeys(place.layer for place in places if is_block(place.layer)))
    rows = list(dict.fromkeys(place.kind for place in places))
    labels = _short(columns)
    if any(not is_block(place.layer) for place in places):
        labels.append("-")
    values = np.full((len(rows), len(labels)), np.nan)
    for place in places:
        column = columns.index(place.layer) if is_block(place.layer) else len(columns)
        values[rows.index(place.kind), column] = 100 * (
            place.share_of_entries if share == "entries" else place.share_of_mask
        )
    figure, (axes,), theme = _canvas(title, dark, height=_height(len(rows)), grid=False)
    from matplotlib.patches import Patch

    measure = "selected (% of these entries)" if share == "entries" else "share of all selected entries (%)"
    _heat(axes, theme, values, rows, labels, measure, numbers="{:.1f}")
    axes.set_xlabel("layer (number of the block; - is none)")
    if np.isnan(values).any():
        _legend(axes, theme, handles=[Patch(color=theme.faint, label="no such parameter")])
    return figure


def validity(found: Validity, title: str, *, dark: bool = False) -> "Figure":
    """Draw the score of each entry and what a perturbation of it did to the loss, with both correlations.

    Both axes are logarithmic beyond the smallest tenth of their values, and linear around 0, which has no logarithm.

    Args:
        found: of `metrics.importance_validity`.
        title: what is seen.
        dark: whether the ground is dark.

    >>> figure = validity(Validity(0.72, 0.68, [0.1, 0.2, 0.5], [1e-4, 3e-4, 4e-4]), "Score and sensitivity")
    >>> figure.axes[0].get_legend().get_texts()[0].get_text()
    '3 entries, Pearson r = 0.72, Spearman rho = 0.68'
    """
    figure, (axes,), theme = _canvas(title, dark)
    label = f"{len(found.scores)} entries, Pearson r = {found.pearson:.2f}, Spearman rho = {found.spearman:.2f}"
    axes.scatter(found.scores, found.changes, s=22, color=theme.colours[0], alpha=0.7, linewidths=0, label=label)
    from matplotlib.ticker import FixedLocator

    for axis, values, scale in (
        (axes.xaxis, found.scores, axes.set_xscale),
        (axes.yaxis, found.changes, axes.set_yscale),
    ):
        sizes = np.abs(values)
        smallest = np.quantile(sizes[sizes > 0], 0.1) if sizes.any() else 1.0
        # a power of ten, at which there is a label
        threshold = 10.0 ** np.ceil(np.log10(smallest))
        scale("symlog", linthresh=threshold)
        # matplotlib's own choice of labels runs into each other around 0
        axis.set_major_locator(FixedLocator(_decades(values, threshold)))
    axes.axhline(0, color=theme.text, linewidth=0.8)
    axes.set_xlabel("importance score (squared gradient)")
    axes.set_ylabel("expected change of the loss\n(units of the loss)")
    _legend(axes, theme)
    return figure


def protection(records: Sequence[Mapping[str, Any]], title: str, *, dark: bool = False) -> "Figure":
    """Draw how much is protected from refresh to refresh, and how much of that changes.

    The flip rate is that of `metrics.flip_rate`, from the layers' counts; the first refresh, before which nothing was
    protected, has none.

    Args:
        records: of ``optimizer.telemetry()``, oldest first.
        title: what is seen.
        dark: whether the ground is dark.

    Raises:
        ValueError: there are no records.

    >>> layer = {"layer": "", "eligible": 10, "protected": 2, "locked": 1, "released": 1}
    >>> record = {"step": 5, "eligible": 10, "budget": 2, "protected_share": 0.2, "layers": [layer]}
    >>> figure = protection([record], "Protection")
    >>> [float(axes.get_lines()[0].get_ydata()[0]) for axes in figure.axes]
    [20.0, 50.0]
    """
    _check_records(records)
    steps = [record["step"] for record in records]
    figure, (above, below), theme = _canvas(title, dark, panels=2, height=6.0)
    _line(above, theme, 0, steps, [100 * record["protected_share"] for record in records], "protected")
    budget = [100 * record["budget"] / max(1, record["eligible"]) for record in records]
    above.plot(steps, budget, "--", color=theme.text, linewidth=1, label="budget")
    _line(below, theme, 2, steps, [100 * _flip_rate(record["layers"]) for record in records], "flip rate")
    above.set_ylabel("protected\n(% of eligible entries)")
    below.set_ylabel("changed since the last\nrefresh (% of protected)")
    below.set_xlabel("optimizer step")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        _legend(axes, theme, loc="lower right")
    return figure


def layers_over_time(records: Sequence[Mapping[str, Any]], title: str, *, dark: bool = False) -> "Figure":
    """Draw how much of each layer is protected after each refresh, as a heat map.

    Args:
        records: of ``optimizer.telemetry()``, oldest first.
        title: what is seen.
        dark: whether the ground is dark.

    Raises:
        ValueError: there are no records.

    >>> layers = [{"layer": f"blocks.{i}", "eligible": 10, "protected": i} for i in range(2)]
    >>> figure = layers_over_time([{"step": 5, "layers": layers}], "Layers")
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['0', '1']
    """
    _check_records(records)
    names = list(dict.fromkeys(layer["layer"] for record in records for layer in record["layers"]))
    values = np.full((len(names), len(records)), np.nan)
    for column, record in enumerate(records):
        for layer in record["layers"]:
            values[names.index(layer["layer"]), column] = 100 * layer["protected"] / layer["eligible"]
    figure, (axes,), theme = _canvas(title, dark, height=_height(len(names)), grid=False)
    steps = [str(record["step"]) for record in records]
    _heat(axes, theme, values, _short(names), steps, "protected (% of the layer's entries)", numbers="{:.1f}")
    axes.set_xlabel("optimizer step of the refresh")
    axes.set_ylabel("layer")
    return figure


def _pairs(values: Mapping[str, Mapping[str, float]], title: str, measure: str, dark: bool) -> "Figure":
    """Draw a measure in [0, 1] of each pair of tasks."""
    tasks = list(values)
    if not tasks:
        raise ValueError("there are no tasks; pass {task: {task: value}}")
    for task, row in values.items():
        if row.keys() != values.keys():
            raise ValueError(f"only one of the row {task!r} and the rows has {sorted(row.keys() ^ values.keys())}")
    figure, (axes,), theme = _canvas(title, dark, height=_height(len(tasks)), grid=False)
    table = np.array([[values[task][other] for other in tasks] for task in tasks])
    _heat(axes, theme, table, tasks, tasks, measure, numbers="{:.2f}", highest=1.0)
    return figure


def _check_records(records: Sequence[Mapping[str, Any]]) -> None:
    if not records:
        raise ValueError(
            "there are no records; telemetry() has one for each refresh, the first after mask_interval steps"
        )


def _flip_rate(layers: Sequence[Mapping[str, Any]]) -> float:
    """Return `metrics.flip_rate` of a refresh from its counts; NaN if nothing was protected before."""
    after, locked, released = (sum(layer[key] for layer in layers) for key in ("protected", "locked", "released"))
    before = after - locked + released
    return (locked + released) / (before + after) if before else float("nan")


def _short(layers: Sequence[str]) -> list[str]:
    """Return a label for each layer: the number of a block, where all blocks are of one stack, else the whole name."""
    stacks = {layer.rpartition(".")[0] for layer in layers if is_block(layer)}
    return [layer.rpartition(".")[2] if is_block(layer) and len(stacks) == 1 else layer for layer in layers]


def _height(rows: int) -> float:
    """Return the height of a heat map, in inches: room for a label at each row, up to 21."""
    return min(max(4.8, 1.6 + 0.3 * rows), 8.0)


def _heat(
    axes: "Axes",
    theme: _Theme,
    values: "np.ndarray[Any, Any]",
    rows: Sequence[str],
    columns: Sequence[str],
    measure: str,
    *,
    numbers: str,
    highest: float | None = None,
) -> None:
    """Draw a table as coloured cells with a scale, and with numbers where there is room; NaN is a faint cell."""
    from matplotlib.colors import LinearSegmentedColormap

    known = values[~np.isnan(values)]
    if highest is None:
        highest = known.max(initial=0.0) or 1.0  # a scale needs an extent where all is 0
    colours = LinearSegmentedColormap.from_list("heat", theme.heat).with_extremes(bad=theme.faint)
    image = axes.imshow(values, cmap=colours, vmin=known.min(initial=0.0), vmax=highest, aspect="auto")
    if len(columns) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                red, green, blue, _ = colours(image.norm(value))
                # the eye's weights; white on dark cells and black on light ones, whatever the theme
                ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#111111"
                axes.text(column, row, numbers.format(value), ha="center", va="center", fontsize=11, color=ink)
    _label(axes, "x", columns, _LABELLED)
    _label(axes, "y", rows, 2 * _LABELLED)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    scale = axes.figure.colorbar(image, ax=axes, pad=0.02)
    scale.set_label(measure, fontsize=11, color=theme.text)
    scale.outline.set_visible(False)
    scale.ax.tick_params(colors=theme.text, labelsize=11)


def _label(axes: "Axes", axis: Literal["x", "y"], labels: Sequence[str], most: int = _LABELLED) -> None:
    """Label the whole numbers of an axis: all of them, or every second, third, ... and the last, at most `most`."""
    last, every = len(labels) - 1, -(-len(labels) // most)
    places = [*range(0, last - every // 2, every), last]
    shown = [labels[place] for place in places]
    if axis == "y":
        axes.set_yticks(places, shown)
    elif sum(map(len, shown)) > 48:
        axes.set_xticks(places, shown, rotation=30, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(places, shown)


def _decades(values: Sequence[float], threshold: float) -> list[float]:
    """Return 0 and at most four powers of ten on each side of it that has values, from the largest value down."""
    ticks = [0.0]
    for sign in (-1.0, 1.0):
        largest = max((sign * value for value in values), default=0.0)
        if largest >= threshold:
            top, bottom = int(np.floor(np.log10(largest))), int(np.round(np.log10(threshold)))
            every = -(-(top - bottom + 1) // 4)
            ticks += [sign * 10.0**exponent for exponent in range(top, bottom - 1, -every)]
    return sorted(ticks)


def _line(axes: "Axes", theme: _Theme, index: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    colour = theme.colours[index % len(theme.colours)]
    axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=2, label=label)


def _legend(axes: "Axes", theme: _Theme, **place: Any) -> None:
    """Add a legend; without a place above the axes, where it hides nothing."""
    if "loc" not in place:
        place |= {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.2, "ncols": 3}
    axes.legend(frameon=False, fontsize=11, labelcolor=theme.text, **place)


def _canvas(
    title: str, dark: bool, *, panels: int = 1, height: float = 4.8, grid: bool = True
) -> "tuple[Figure, list[Axes], _Theme]":
    """Return an empty figure, its axes one below the other with a common x axis, and its colours.

    The sizes are for a phone: shown 7 cm wide, labels of 11 points still have 4.7.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plots need matplotlib: pip install epi-kernels[plots]") from error
    theme = _DARK if dark else _LIGHT
    # a Figure of its own, not one of pyplot's: nothing global changes and nothing has to be closed
    figure = Figure(figsize=(6.4, height), dpi=150, layout="constrained", facecolor=theme.ground)
    every = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
    for axes in every:
        axes.set_facecolor(theme.ground)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(theme.text)
        axes.tick_params(colors=theme.text, labelsize=11)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=theme.text, fontsize=11)
        if grid:
            axes.grid(axis="y", color=theme.faint, linewidth=0.8)
        axes.set_axisbelow(True)
    wrapped = textwrap.fill(title, 56)
    figure.suptitle(wrapped, x=0.01, ha="left", fontsize=13, fontweight="bold", color=theme.text)
    return figure, every, theme
