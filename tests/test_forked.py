"""Processes that `forked` and `ranks` start report what fails in them, and are fresh, whatever went before."""

import os
import time
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def fails(number: int, folder: Path, failing: int) -> None:
    (folder / str(number)).touch()
    print(f"{number} has printed this")
    assert number != failing


def test_what_a_process_that_fails_has_printed_is_shown() -> None:
    with pytest.raises(AssertionError, match="process 1 ended with 1:\n1 has printed this\nTraceback") as found:
        forked.run(fails, 3, 1)
    assert "process 0" not in str(found.value)
    assert "process 2" not in str(found.value)
    forked.run(fails, 3, 3)  # none of them


def ends(number: int, folder: Path) -> None:
    os._exit(number)


def test_a_process_that_ends_early_has_failed() -> None:
    with pytest.raises(AssertionError) as found:
        forked.run(ends, 2)
    assert "process 0 ended with 0" in str(found.value)
    assert "process 1 ended with 1" in str(found.value)


def hangs(number: int, folder: Path) -> None:
    time.sleep(1000 * number)


def test_a_process_that_hangs_is_killed_and_has_failed() -> None:
    with pytest.raises(AssertionError, match="process 1 ended with -9") as found:
        forked.run(hangs, 2, seconds=0.5)
    assert "process 0" not in str(found.value)


def changes_everything(number: int, folder: Path) -> None:
    assert not list(folder.iterdir())
    assert torch.get_default_dtype() == torch.float32
    assert torch.initial_seed() == 0
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    (folder / "file").touch()


def test_processes_are_fresh() -> None:
    forked.run(changes_everything, 1)
    forked.run(changes_everything, 1)


def test_a_server_that_was_killed_is_started_again() -> None:
    forked.run(ends_well, 1)
    forked.server().process.kill()
    forked.server().process.wait()
    forked.run(ends_well, 1)


def ends_well(number: int, folder: Path) -> None:
    pass


@on_ranks(1, 3)
def test_every_rank_runs_the_test(rank: int, size: int) -> None:
    ranks = torch.zeros(size)
    ranks[rank] = 1.0
    dist.all_reduce(ranks)
    assert torch.equal(ranks, torch.ones(size))


def waits_for_a_rank_that_fails(rank: int, size: int) -> None:
    assert rank != 1, "rank 1 fails"
    dist.barrier()


def test_a_rank_that_fails_fails_the_test_before_the_others_have_waited_for_it() -> None:
    with pytest.raises(AssertionError, match="rank 1 fails"):
        run(waits_for_a_rank_that_fails, 2)
