"""Tests whose body runs on every rank of a gloo process group, each rank in a process of its own on the CPU."""

import functools
import inspect
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
import pytest
import torch.distributed as dist

needs_ranks = pytest.mark.skipif(
    not (dist.is_available() and hasattr(os, "fork")), reason="there is no torch.distributed or no fork here"
)


def on_ranks(*sizes: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a function of ``(rank, size)``: it is called on all ranks of a process group of each of `sizes`.

    Without `sizes` the test has parameters of its own that say the size. Further arguments of the function are those of
    the test: parameters, and fixtures that can be pickled.

    >>> @on_ranks(2, 3)
    ... def test_the_ranks_agree_on_their_number(rank: int, size: int) -> None:
    ...     total = torch.ones(())
    ...     torch.distributed.all_reduce(total)
    ...     assert total == size
    """

    def decorate(claim: Callable[..., None]) -> Callable[..., None]:
        @needs_ranks
        @functools.wraps(claim)
        def test(size: int, **arguments: Any) -> None:
            run(claim, size, **arguments)

        signature = inspect.signature(claim)
        asked = [parameter for name, parameter in signature.parameters.items() if name != "rank"]
        test.__signature__ = signature.replace(parameters=asked)  # type: ignore[attr-defined]
        return pytest.mark.parametrize("size", sizes, ids=ranks_of)(test) if sizes else test

    return decorate


def ranks_of(size: int) -> str:
    return f"{size} ranks"


def run(claim: Callable[..., None], size: int, **arguments: Any) -> None:
    """Call ``claim(rank, size, **arguments)`` on every rank of a process group of `size` ranks."""
    forked.run(enter_and_call, size, size, forked.name_of(claim), arguments)


def enter_and_call(rank: int, folder: Path, size: int, claim: forked.Name, arguments: dict[str, Any]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    forked.find(claim)(rank, size, **arguments)
