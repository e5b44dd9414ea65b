"""Pages in Markdown whose tables and figures are written from results, between two marks."""

from collections.abc import Iterable, Sequence
from pathlib import Path

Marks = tuple[str, str]  # lines of a page, each once: what is written stands between them


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a row may be short.

    >>> print(table(["step", "time"], [["AdamW", "1"], ["EPI"]]))
    | step | time |
    | --- | --- |
    | AdamW | 1 |
    | EPI |  |
    """
    filled = ([*row, *[""] * (len(titles) - len(row))] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *filled))


def between(marks: Marks, text: str) -> str:
    """Return a text with its marks around it, as it stands in a page."""
    begin, end = marks
    return f"{begin}\n\n{text}\n\n{end}"


def write_between(page: Path, marks: Marks, text: str) -> None:
    """Replace what stands between the marks of a page."""
    begin, end = marks
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{between(marks, text)}{after}")
