"""Four tasks from what every Python carries: English prose, Python source, JSON, arithmetic. Nothing is downloaded.

A task is two byte strings, training and held-out, with no piece (paragraph, record, doubling) in common, and a way to
cut windows of `CONTEXT + 1` bytes from them. Everything is fixed by the Python installation: no random numbers
beyond seeded ones.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CONTEXT = 60  # five doublings of twelve bytes
IGNORED = -100  # torch's mark for a target that neither trains nor scores
_NOT_SOURCE = {"__pycache__", "dist-packages", "encodings", "pydoc_data", "site-packages", "test"}


@dataclass(frozen=True)
class Task:
    r"""Training and held-out text, uint8 [bytes], scored in units.

    `unit=1`: running text; every byte is predicted and counts on its own.
    `unit=n`: lines of n bytes, `question=answer\n`; windows start at a line, only answers are predicted, and a line
    counts when its whole answer is right.
    """

    name: str
    train: Tensor
    held_out: Tensor
    unit: int = 1

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw training windows: inputs and targets, int64 [size, CONTEXT] each."""
        starts = (len(self.train) - CONTEXT - 1) // self.unit + 1
        return self._windows(self.train, self.unit * torch.randint(starts, (size,), generator=generator))

    def examination(self, size: int) -> tuple[Tensor, Tensor]:
        """Return at most `size` held-out windows, spread evenly and not overlapping: always the same ones."""
        available = (len(self.held_out) - 1) // CONTEXT
        size = min(size, available)
        return self._windows(self.held_out, CONTEXT * (torch.arange(size) * available // size))

    def accuracy(self, logits: Tensor, targets: Tensor) -> float:
        """Share of the units, in [0, 1], in which every scored byte is the most likely one.

        For arithmetic this is exact match under greedy decoding: decoding reproduces an answer if and only if each of
        its bytes is the most likely one after the bytes before it. logits: [n, CONTEXT, 256]; targets: [n, CONTEXT].
        """
        right = (logits.argmax(-1) == targets) | (targets == IGNORED)
        return right.unflatten(-1, (-1, self.unit)).all(-1).double().mean().item()

    def _windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        window = text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
        targets = window[:, 1:]
        if self.unit > 1:
            lines = targets.unflatten(-1, (-1, self.unit))
            equals = lines == ord("=")
            answer = (equals.cumsum(-1) > 0) & ~equals
            targets = lines.masked_fill(~answer, IGNORED).flatten(1)
        return window[:, :-1], targets


def make_tasks() -> list[Task]:
    """Return the tasks in the order in which they are learned."""
    return [
        _task("English prose", language_reference(), "\n\n"),
        _task("Python source", library_source(), "\n\n"),
        _task("Unicode as JSON", _records(), "\n"),
        _task("doubling", _doublings(), "\n", unit=12),
    ]


def docstrings() -> Tensor:
    """English for the pre-training, uint8 [bytes]: the docstrings of the standard library's plain modules.

    The source task reads the packages, so the two have no file in common.
    """
    found: dict[str, None] = {}
    for file in sorted(_library().glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[ast.get_docstring(node) or ""] = None
    return _bytes("\n\n".join(found))


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def _task(name: str, pieces: Iterable[str], end: str, unit: int = 1) -> Task:
    # paragraphs repeat, in the language reference above all, some with another indentation or blank line around them:
    # without this a held-out one could stand in the training text too
    distinct = {piece.strip(): piece.strip("\n") for piece in pieces if piece.strip()}
    unique = list(distinct.values())
    train = [piece for index, piece in enumerate(unique) if index % 8]
    # the leading newline: the first line of a window follows one, as every other line does
    return Task(name, _bytes("\n" + end.join(train) + end), _bytes("\n" + end.join(unique[::8]) + end), unit)


def language_reference() -> Iterable[str]:
    """Return the paragraphs of the language reference."""
    from pydoc_data.topics import topics  # 0.5 MB, the language reference behind help("if")

    return (paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))


def library_source() -> Iterable[str]:
    """Return the paragraphs of the standard library's packages, which hold Python source."""
    files = (file for file in sorted(_library().glob("*/*.py")) if file.parent.name not in _NOT_SOURCE)
    return (paragraph for file in files for paragraph in file.read_text("utf-8").split("\n\n"))


def _doublings() -> list[str]:
    # no digit above 4, so no carry: with carries the model needs twice the steps to learn it
    doublings = [f"{number}={2 * number}" for number in range(10_000, 50_000) if max(str(number)) < "5"]
    random.Random(0).shuffle(doublings)
    return doublings


def _records() -> Iterable[str]:
    # below U+3000: beyond it come tens of thousands of ideographs, whose names are their numbers
    for character in map(chr, range(0x3000)):
        if name := unicodedata.name(character, ""):
            fields = {"char": character, "name": name.capitalize(), "category": unicodedata.category(character)}
            yield json.dumps(fields | {"bidirectional": unicodedata.bidirectional(character)})
