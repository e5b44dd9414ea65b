"""Random programs of `fuzzer`: a fixed number of seeds, the same in every run; `make fuzz` draws new ones.

A seed that fails is repeated by ``python tests/fuzzer.py --seed N``, and shortened by ``--shrink``.
"""

from typing import Any

import fuzzer
import pytest
import torch

from epi_kernels import EPIAdamW

# each range in a process of its own
RANGES = [(first, first + 50) for first in range(0, 100, 50)]


@pytest.mark.parametrize(("first", "last"), RANGES)
def test_programs_show_nothing(first: int, last: int) -> None:
    found = fuzzer.run_seeds(first, last)
    assert not found, fuzzer.report(found)


def test_a_seed_is_a_program() -> None:
    assert fuzzer.program_of(7).lines() == fuzzer.program_of(7).lines()
    assert fuzzer.program_of(7).lines() != fuzzer.program_of(8).lines()


def shows(seeds: range) -> list[str]:
    programs = [fuzzer.program_of(seed) for seed in seeds]
    # those of DTensors would leave a process group to the tests that follow
    return [text for program in programs if not program.case["dtensor"] for text in program.run()]


def test_a_step_that_moves_what_is_protected_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    step = EPIAdamW.step

    def wrong(optimizer: EPIAdamW, closure: Any = None) -> Any:
        value = step(optimizer, closure)
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            with torch.no_grad():
                param.add_(optimizer.isolation_mask(param))
        return value

    monkeypatch.setattr(EPIAdamW, "step", wrong)
    assert any("must keep their bits" in text for text in shows(range(40)))


def test_a_load_that_takes_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EPIAdamW, "load_state_dict", lambda optimizer, state: None)
    assert any("save_and_load" in text and "the twin's" in text for text in shows(range(40)))


def test_a_process_that_ends_shows_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzer, "environment", lambda: {"PATH": "", "PYTHONPATH": "", "PYTHONHOME": "/nowhere"})
    assert list(fuzzer.run_seeds(3, 5)) == [3, 4]
