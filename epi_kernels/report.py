"""A run as one page of HTML that a person reads in a minute: tables and pictures, light and dark, without a network.

Needs `pip install epi-kernels[plots]`.
"""

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from epi_kernels import plots
from epi_kernels._version import __version__
from epi_kernels.isolation.telemetry import numbers_of_all
from epi_kernels.metrics import average_performance, backward_transfer, forgetting_ratio, overall_performance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
Results = Sequence[Sequence[float]]


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
        caption: a sentence that says what to see.
        draw: called as ``draw(dark=False)`` and ``draw(dark=True)``; returns a matplotlib figure, such as one of
            `epi_kernels.plots`. Its title is that of the picture.
    """

    caption: str
    draw: Callable[..., Any]


class Table(NamedTuple):
    """A table of a page.

    Attributes:
        caption: a sentence that says what to see.
        columns: their titles, with units; the first is that of the rows' names.
        rows: cells, as many as columns; numbers are aligned to the right.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def write(
    path: str | Path,
    title: str,
    *,
    facts: Mapping[str, object] | None = None,
    tasks: Sequence[str] = (),
    results: Mapping[str, Results] | None = None,
    measure: str = "performance (more is better)",
    telemetry: Mapping[str, Records] | None = None,
    more: Iterable[Picture | Table] = (),
    note: str = "",
) -> Path:
    """Write a page, and return its path.

    Args:
        path: of the file; its folder is made if it is missing.
        title: of the page.
        facts: what else to know of the run, such as the model, its size, the seed: name -> value.
        tasks: names of the tasks, in the order learned.
        results: method -> R: row t has the performance on every task after learning task t
            (`metrics.overall_performance`). The first method is the baseline.
        measure: what the numbers in `results` are, with the unit.
        telemetry: method -> records of ``optimizer.telemetry()``.
        more: pictures and tables of one's own, which come last.
        note: a last paragraph, such as what the run does not show.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a matrix of results is not a square of the tasks, or a record is none; nothing is written.

    Example:
        >>> import tempfile
        >>> results = {"AdamW": [[80.0, 10.0], [40.0, 75.0]], "EPI": [[79.0, 10.0], [60.0, 74.0]]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write(f"{folder}/report.html", "Two tasks", tasks=["prose", "code"], results=results)
        ...     page.read_text().count("<picture>")
        3
    """
    parts = [*_of_results(results or {}, tasks, measure), *_of_telemetry(telemetry or {}), *more]
    body = [f"<h1>{_text(title)}</h1>", _cards(facts or {}), *map(_part, parts)]
    body += [f'<p class="note">{_text(note)}</p>'] if note else []
    page = _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(filter(None, body)), version=__version__)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


# What is shown of a run ----------------------------------------------------------------------------------------------


def _of_results(results: Mapping[str, Results], tasks: Sequence[str], measure: str) -> list[Picture | Table | str]:
    """Return what is shown of results: learned and forgotten by each method, then task by task."""
    if not results:
        return []
    for method, matrix in results.items():
        if not tasks or len(matrix) != len(tasks) or any(len(row) != len(tasks) for row in matrix):
            raise ValueError(
                f"the results of {method!r} have rows of {[len(row) for row in matrix]} for {len(tasks)} tasks; pass a "
                "square: row t has the performance on every task after learning task t"
            )
    lost = {method: _forgetting(matrix) for method, matrix in results.items()}
    rows = [
        (
            method,
            f"{average_performance(matrix):.1f}",
            f"{overall_performance(matrix):.1f}",
            f"{backward_transfer(matrix):+.1f}",
            _percent(_mean(lost[method])),
        )
        for method, matrix in results.items()
    ]
    columns = ("method", "learned (AP)", "at the end (OP)", "change by later tasks (BWT)", "forgotten (average FR)")
    found: list[Picture | Table | str] = [
        "What was learned, and what was lost",
        Table(
            f"Mean over tasks of: {measure}. AP: on each task right after learning it. OP: on all tasks at the end. A "
            "method that learns less has less to forget: read the two together.",
            columns,
            rows,
        ),
    ]
    if len(tasks) > 1:
        ratios = {method: [*of_tasks, _mean(of_tasks)] for method, of_tasks in lost.items()}
        title = "Share of what was learned that is lost at the end"
        labels = [*tasks[:-1], "average"]
        caption = "A lower bar is less forgetting. The last task has nothing after it that could make it forgotten."
        found.append(Picture(caption, partial(plots.forgetting, ratios, labels, title)))
        caption = "Read a column downwards: the frame is what was learned, below it is what later tasks left of it."
        for method, matrix in results.items():
            drawn = partial(plots.results_matrix, matrix, tasks, method, measure=measure)
            found.append(Picture(caption, drawn))
    return found


def _of_telemetry(telemetry: Mapping[str, Records]) -> list[Picture | Table | str]:
    """Return what is shown of records of refreshes."""
    found: list[Picture | Table | str] = []
    for method, given in telemetry.items():
        # one of an earlier version, kept as JSON, lacks what is computed from its other numbers
        records = [numbers.as_dict() for numbers in numbers_of_all(given)]
        found.append(f"What was protected: {method}" if method else "What was protected")
        if not records:
            caption = "No refresh has taken place, so nothing was protected: the run was shorter than mask_interval."
            found.append(Table(caption, (), ()))
            continue
        last = records[-1]
        rows = [
            ("refreshes recorded", f"{len(records):,}"),
            ("entries protected in the last", f"{last['protected']:,} of {last['eligible']:,}"),
            ("as a share", _percent(100 * last["protected_share"])),
            ("overlap of the last mask with the one before (1 = same entries)", f"{last['jaccard']:.2f}"),
            ("squared gradients that were not finite", f"{last['nonfinite']:,}"),
        ]
        found.append(Table("The last refresh.", ("", method or "run"), rows))
        caption = "Above: the share that is protected, which ties may lift over the budget. Below: how much it changes."
        found.append(Picture(caption, partial(plots.protection, records, "Protected entries, refresh by refresh")))
        caption = "A dark row is a layer that is protected more than others; a row that changes is one whose use does."
        found.append(Picture(caption, partial(plots.layers_over_time, records, "Where in the model they are")))
        layers = [
            (
                of["layer"] or "(no name)",
                *(f"{of[key]:,}" for key in ("eligible", "protected", "locked", "released")),
                _percent(100 * of["protected"] / of["eligible"]),
            )
            for of in last["layers"]
        ]
        columns = ("layer", "entries", "protected", "newly", "released", "share")
        found.append(Table(f"Every layer at the last refresh, step {last['step']:,}.", columns, layers))
    return found


def _forgetting(matrix: Results) -> list[float]:
    """Return the forgetting ratio of each task but the last, percent; NaN where nothing had been learned."""
    pairs = [(matrix[task][task], matrix[-1][task]) for task in range(len(matrix) - 1)]
    return [forgetting_ratio(initial, after) if initial > 0 else math.nan for initial, after in pairs]


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are defined; NaN where none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}%" if abs(value) < 1 else f"{value:.1f}%"


# HTML ----------------------------------------------------------------------------------------------------------------


def _part(part: Picture | Table | str) -> str:
    if isinstance(part, str):
        return f"<h2>{_text(part)}</h2>"
    return _picture(part) if isinstance(part, Picture) else _table(part)


def _picture(picture: Picture) -> str:
    light, dark = (_data(picture.draw(dark=is_dark)) for is_dark in (False, True))
    caption = _text(picture.caption)
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{caption}"></picture><figcaption>{caption}</figcaption></figure>'
    )


def _data(figure: "Figure") -> str:
    """Return a figure as an address that holds it: an image of its own, whose names cannot meet those of another."""
    from matplotlib import rc_context

    drawn = io.BytesIO()
    with rc_context({"svg.hashsalt": "epi_kernels"}):  # the same figure gives the same bytes
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"


def _table(table: Table) -> str:
    caption = f"<p>{_text(table.caption)}</p>"
    if not table.rows:
        return caption
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    drawn = f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if len(table.rows) > _LONG:
        return f"<details><summary>{_text(table.caption)}</summary>{drawn}</details>"
    return caption + drawn


def _cards(facts: Mapping[str, object]) -> str:
    cards = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{cards}</dl>' if cards else ""


def _text(value: object) -> str:
    return html.escape(str(value))


# rows from which on a table is folded
_LONG = 12

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #333333; --faint: #d9d9d9; --card: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181c; --text: #e4e4e4; --faint: #3d444b; --card: #1d2329 }
}
body { margin: 0 auto; padding: 1rem; max-width: 46rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25 }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--faint); padding-top: 1rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.5rem; margin: 1rem 0 }
.facts div { background: var(--card); border-radius: 0.4rem; padding: 0.5rem 0.75rem }
.facts dt { font-size: 0.8rem; opacity: 0.8 }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere }
figure { margin: 1.5rem 0 }
figure img { display: block; width: 100%; height: auto }
figcaption, .note, footer { font-size: 0.9rem; opacity: 0.85 }
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.25rem 0.75rem; text-align: right; border-bottom: 1px solid var(--faint) }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 7rem }
summary { cursor: pointer }
footer { margin-top: 3rem }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
<footer>Written by epi_kernels {version}.</footer>
</body>
</html>
"""
