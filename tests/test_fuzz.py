"""Random programs of `fuzzer`: a fixed number of seeds, the same in every run; `make fuzz` draws new ones.

A seed that fails is repeated by ``python tests/fuzzer.py --seed N``, and shortened by ``--shrink``.
"""

import fuzzer
import pytest

# some 12 a second; each range in a process of its own
RANGES = [(first, first + 75) for first in range(0, 600, 75)]


@pytest.mark.parametrize(("first", "last"), RANGES)
def test_programs_show_nothing(first: int, last: int) -> None:
    found = fuzzer.run_seeds(first, last)
    assert not found, fuzzer.report(found)


def test_a_seed_is_a_program() -> None:
    assert fuzzer.program_of(7).lines() == fuzzer.program_of(7).lines()
    assert fuzzer.program_of(7).lines() != fuzzer.program_of(8).lines()
