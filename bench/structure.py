"""The structure of the package in numbers: the calls of a step, repeated code, the depth of classes, long files.

    python bench/structure.py
    python bench/structure.py --json structure.json

Each number is printed beside its goal. Nothing is timed, so one run is enough.

- A step is a step of EPIAdamW over two plain float32 tensors on the CPU, with the native backend. Only calls of Python
  functions defined in the package are counted: the number of calls, the number of files, how often a call enters
  another file than the call before, and the largest number of such calls on the stack at once. A comprehension counts
  as a part of the function that contains it.
- Repeated code ("dup8") is the share of the lines of epi_kernels/*.py that lie in a window of 8 lines which occurs more
  than once. Comments, docstrings and blank lines are left out before windows are taken; whitespace inside a line counts
  as one space, and whitespace at the ends of a line is ignored. A window lies in one file. Other occurrences of a
  window may be anywhere, and may overlap the window.
- The classes "above" a class are those of the package that it inherits from, directly or not. A method is repeated if
  its name is defined more than once in the class and the classes above; names with two underscores at both ends count
  as well.
- The lines of a file are all of its lines. Files of epi_kernels (.py) and of csrc are counted.
"""

import argparse
import ast
import gc
import importlib
import inspect
import io
import itertools
import json
import pkgutil
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from cases import machine
from torch.nn import Parameter

import epi_kernels
from epi_kernels import EPIAdamW

PACKAGE = Path(epi_kernels.__file__).parent
WINDOW = 8
# these are parts of the functions that contain them, but Python before 3.12 calls them as functions of their own
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")

# the goals of the package
STEADY_FILES, STEADY_CHANGES = 7, 15
REFRESH_FILES, REFRESH_CHANGES = 12, 50
CLASSES_ABOVE = 2
LINES = 500
REPEATED = 0.05


def traced(run: Callable[[], object]) -> dict[str, Any]:
    """Run and count the calls inside the package: "calls", "files", "changes" of file, and "deepest" stack."""
    called: list[str] = []
    depth = deepest = 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth, deepest
        file = frame.f_code.co_filename
        outside = not file.startswith(str(PACKAGE)) or frame.f_code.co_name in COMPREHENSIONS
        if outside or event not in ("call", "return"):
            return
        if event == "return":
            depth -= 1
            return
        depth += 1
        deepest = max(deepest, depth)
        called.append(str(Path(file).relative_to(PACKAGE)))

    before = sys.getprofile()
    gc.disable()  # a collection may call weak references of the package
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    changes = sum(before != after for before, after in itertools.pairwise(called))
    return {"calls": len(called), "files": len(set(called)), "changes": changes, "deepest": deepest}


def steps() -> dict[str, dict[str, Any]]:
    """Return the counts of a step between two refreshes and of a step that refreshes, by name."""
    named = [(f"layers.{i}.weight", Parameter(torch.randn(8, 8))) for i in range(2)]
    for _, param in named:
        param.grad = torch.randn(8, 8)
    optimizer = EPIAdamW(named, isolation_ratio=0.1, mask_interval=4, backend="native")
    for _ in range(5):  # then the masks exist, and the sixth step prepares nothing new
        optimizer.step()
    steady = traced(optimizer.step)
    optimizer.step()
    return {"steady step": steady, "step with refresh": traced(optimizer.step)}


def code_of(text: str) -> list[str]:
    """Return the lines of a module without comments, docstrings and blank lines, and with single spaces."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None:
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    numbered = ((number, " ".join(line.split())) for number, line in enumerate(lines, 1))
    return [line for number, line in numbered if line and number not in docstrings]


def repeated() -> dict[str, tuple[int, int]]:
    """Return, for each file of the package, (lines in a window that occurs more than once, all lines)."""
    files = {name_of(path): code_of(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    windows = Counter(window for lines in files.values() for _, window in windows_of(lines))
    found = {}
    for name, lines in files.items():
        inside = {n for start, w in windows_of(lines) if windows[w] > 1 for n in range(start, start + WINDOW)}
        found[name] = (len(inside), len(lines))
    return found


def windows_of(lines: list[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the number of each window's first line, and the window."""
    for start in range(len(lines) - WINDOW + 1):
        yield start, tuple(lines[start : start + WINDOW])


def name_of(path: Path) -> str:
    """Return a file's path from the root of the repository."""
    return str(path.relative_to(PACKAGE.parent))


def classes() -> dict[str, dict[str, list[str]]]:
    """Return the classes "above" and the "repeated" methods for each class that inherits from a class of the package.

    Modules that need a package that is not installed are left out.
    """
    ours: dict[str, type] = {}
    for module in pkgutil.walk_packages([str(PACKAGE)], "epi_kernels."):
        if module.name.endswith("__main__"):
            continue
        try:
            members = vars(importlib.import_module(module.name)).values()
        except ImportError:
            continue
        ours.update({each.__qualname__: each for each in members if isinstance(each, type) and is_ours(each)})
    found = {}
    for name, each in sorted(ours.items()):
        above = [one for one in each.__mro__[1:] if is_ours(one)]
        if above:
            counts = Counter(method for one in (each, *above) for method in methods_of(one))
            found[name] = {
                "above": [one.__qualname__ for one in above],
                "repeated": sorted(method for method, count in counts.items() if count > 1),
            }
    return found


def is_ours(kind: type) -> bool:
    """Return whether a class is defined in the package."""
    return kind.__module__.partition(".")[0] == "epi_kernels"


def methods_of(kind: type) -> list[str]:
    """Return the names of the methods and properties that a class defines itself."""
    kinds = (staticmethod, classmethod, property)
    return [name for name, value in vars(kind).items() if inspect.isfunction(value) or isinstance(value, kinds)]


def lengths() -> dict[str, int]:
    """Return the number of lines of each file of the package and of csrc, longest first."""
    sources = [*PACKAGE.rglob("*.py"), *(path for path in (PACKAGE.parent / "csrc").rglob("*") if path.is_file())]
    found = {name_of(path): len(path.read_text().splitlines()) for path in sources}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def main() -> None:
    """Count and print all numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"steps": steps(), "repeated": repeated(), "classes": classes(), "lines": lengths()}

    goals = {"steady step": (STEADY_FILES, STEADY_CHANGES), "step with refresh": (REFRESH_FILES, REFRESH_CHANGES)}
    print(f"What a step of two tensors calls\n  {'':<20}{'calls':>7}{'files':>7}{'goal':>6}{'changes':>9}", end="")
    print(f"{'goal':>6}{'deepest':>9}")
    for name, step in found["steps"].items():
        files, changes = goals[name]
        print(f"  {name:<20}{step['calls']:>7}{step['files']:>7}{files:>6}{step['changes']:>9}{changes:>6}", end="")
        print(f"{step['deepest']:>9}")

    inside, all_lines = (sum(column) for column in zip(*found["repeated"].values(), strict=True))
    found["share of repeated lines"] = inside / all_lines
    print(f"\nRepeated code: {inside / all_lines:.1%} of {all_lines} lines, goal below {REPEATED:.0%}; the most in")
    for name, (count, of) in sorted(found["repeated"].items(), key=lambda item: -item[1][0])[:8]:
        if count:
            print(f"  {count:>4} of {of:>4}  {name}")

    print(f"\nClasses that stand on others of the package, goal at most {CLASSES_ABOVE} above")
    for name, of_class in sorted(found["classes"].items(), key=lambda item: (-len(item[1]["above"]), item[0])):
        print(f"  {name}: {len(of_class['above'])} above ({', '.join(of_class['above'])})")
        if of_class["repeated"]:
            print(f"    {len(of_class['repeated'])} methods in more than one: {', '.join(of_class['repeated'])}")

    total = sum(found["lines"].values())
    longest = next(iter(found["lines"].items()))
    print(
        f"\nFiles: {len(found['lines'])} with {total} lines, the longest {longest[0]} with {longest[1]}; above {LINES}:"
    )
    for name, count in found["lines"].items():
        if count > LINES:
            print(f"  {count:>4}  {name}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        commit = {key: value for key, value in machine().items() if key in ("commit", "date", "torch", "python")}
        arguments.json.write_text(json.dumps({**commit, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
