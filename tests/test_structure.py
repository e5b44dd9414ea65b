"""What `bench/structure.py` counts, against cases counted by hand."""

import sys
import textwrap
from pathlib import Path

import pytest
import structure


def test_code_is_left_without_comments_docstrings_and_blank_lines() -> None:
    text = textwrap.dedent(
        '''
        """A docstring
        of two lines."""
        import  os  # why

        def f(a,   b):
            """Another."""
            # a comment
            return "# no comment"
        '''
    )
    assert structure.code_of(text) == ["import os", "def f(a, b):", 'return "# no comment"']


def test_repeated_lines_are_those_in_a_window_that_occurs_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "PACKAGE", tmp_path)
    shared = [f"a{i} = {i}" for i in range(9)]
    (tmp_path / "one.py").write_text("\n".join(["x = 1", *shared, "y = 1"]))
    (tmp_path / "two.py").write_text("\n".join(["z = 1", "# a comment", *shared]))
    (tmp_path / "three.py").write_text("\n".join(shared[:7]))  # one line short of a window
    found = {Path(name).name: counts for name, counts in structure.repeated().items()}
    assert found == {"one.py": (9, 11), "two.py": (9, 10), "three.py": (0, 7)}


def test_calls_files_and_changes_of_file_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner_file.py").write_text("def inner(n):\n    return [n for _ in range(2)]\n")
    (tmp_path / "outer_file.py").write_text(
        "from inner_file import inner\n\ndef outer():\n    inner(1)\n    inner(2)\n    last()\n\ndef last(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(structure, "PACKAGE", tmp_path)
    import outer_file  # type: ignore[import-not-found]

    before = sys.getprofile()
    assert structure.traced(outer_file.outer) == {"calls": 4, "files": 2, "changes": 2, "deepest": 2}
    assert sys.getprofile() is before
