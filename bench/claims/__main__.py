"""Run what is missing of the papers' claims, then write the page.

    cd bench; ../.venv/bin/python -m claims            # goes on where it stopped; every run is kept when it ends
    make claims                                        # the same, from a fresh clone

First it prints what is left, and for how long. `--smoke` runs every system for two steps and keeps nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from claims import page
from claims.language import ROOT
from claims.plan import BUDGETS, SMOKE_TABLES, TABLES
from claims.running import go
from claims.world import SMOKE

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.jsonl"


def main(arguments: list[str] | None = None) -> None:
    """Run with these command-line arguments."""
    options = parse(arguments)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder, "results.jsonl")
            go(SMOKE_TABLES, {"XS": SMOKE}, results, Path(folder), options)
            page.write(results, Path(folder, "README.md"))
        return
    sizes = options.size or ["S", "M", "E"]
    go([table for table in TABLES if table.size in sizes], BUDGETS, RESULTS, FOLDER / "weights", options)
    page.write(RESULTS, FOLDER / "README.md")
    page.write_summary(RESULTS, ROOT / "README.md")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="every system two steps, nothing kept")
    add("--plan", action="store_true", help="only print what is left")
    add(
        "--size",
        action="append",
        choices=("S", "M", "E", "L"),
        help="only tables of this size; may be repeated; L: for a GPU",
    )
    add("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    add("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each [%(default)s]")
    add("--device", default="cpu", help="where the models are [%(default)s]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
