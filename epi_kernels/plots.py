"""Pictures of what isolation does, as matplotlib figures. Needs `pip install epi-kernels[plots]`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# grey and Okabe-Ito colours: colour-blind readers can tell them apart, and in print their lightness differs
_BASELINE = "#9a9a9a"
_COLOURS = ("#56b4e9", "#00517d", "#e69f00", "#009e73", "#cc79a7")
_TEXT = "#333333"
_FAINT = "#d9d9d9"


def forgetting(ratios: Mapping[str, Sequence[float]], tasks: Sequence[str], title: str) -> "Figure":
    """Draw the forgetting ratio of each task as a group of bars, one for each method.

    Args:
        ratios: method -> forgetting ratio of each task, percent (`metrics.forgetting_ratio`); NaN, undefined, leaves a
            gap. The first method is the baseline, in grey; the others have the colours of `mask_overlap`.
        tasks: a label for each group, in the order of the ratios; it may have several lines.
        title: what is seen.

    Returns:
        A figure that belongs to nobody: save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a method has more or fewer ratios than there are tasks.

    >>> figure = forgetting({"AdamW": [12.0, 3.0], "EPI": [9.0, 2.5]}, ["prose", "code"], "Forgetting")
    >>> len(figure.axes[0].patches)
    4
    """
    figure, axes = _canvas(title, width=8.0)
    colours = (_BASELINE, *_COLOURS)
    width = 0.8 / len(ratios)
    for index, (method, values) in enumerate(ratios.items()):
        if len(values) != len(tasks):
            raise ValueError(f"method {method!r} has {len(values)} ratios for {len(tasks)} tasks")
        places = [group + (index - (len(ratios) - 1) / 2) * width for group in range(len(tasks))]
        bars = axes.bar(places, values, width=0.92 * width, color=colours[index % len(colours)], label=method)
        labels = ["" if value != value else f"{value:.1f}" for value in values]  # NaN differs from itself
        axes.bar_label(bars, labels, padding=2, fontsize=9, color=_TEXT)
    axes.axhline(0, color=_TEXT, linewidth=0.8)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    axes.set_ylabel("forgetting ratio (% of accuracy right after learning)")
    axes.legend(frameon=False, ncols=len(ratios), loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2)
    return figure


def mask_overlap(overlaps: Mapping[str, Mapping[int, float]], tasks: Mapping[str, int], title: str) -> "Figure":
    """Draw how much of the first mask is left as training goes on, one line for each method.

    Args:
        overlaps: method -> optimizer step of a refresh -> overlap of its mask with the first one, in [0, 1]
            (`metrics.mask_jaccard`).
        tasks: name of a task -> optimizer steps made before it starts, in the order learned.
        title: what is seen.

    Returns:
        A figure that belongs to nobody: save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is not installed.

    >>> figure = mask_overlap({"EPI": {25: 1.0, 50: 0.6}}, {"prose": 0, "code": 25}, "Mask drift")
    >>> figure.axes[0].get_xlabel()
    'optimizer step'
    """
    figure, axes = _canvas(title, width=8.0)
    for index, (method, overlap) in enumerate(overlaps.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(list(overlap), list(overlap.values()), "o-", color=colour, markersize=4, linewidth=2, label=method)
    starts = list(tasks.values())
    end = max([*starts, *(step for overlap in overlaps.values() for step in overlap)])
    for name, start, stop in zip(tasks, starts, [*starts[1:], end], strict=True):
        if start > 0:
            axes.axvline(start, color=_TEXT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            name,
            ((start + stop) / 2, 1.0),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color=_TEXT,
        )
    axes.set_xlim(0, end * 1.01)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("Jaccard overlap with the first mask (1 = same entries)")
    axes.legend(frameon=False, loc="lower left")
    return figure


def _canvas(title: str, width: float) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plots need matplotlib: pip install epi-kernels[plots]") from error
    # a Figure of its own, not one of pyplot's: nothing global changes and nothing has to be closed
    figure = Figure(figsize=(width, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_TEXT)
    return figure, axes
