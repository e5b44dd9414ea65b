"""What is of the native backend alone: its threads, and tensors beyond 2^31 entries.

Its results are in test_backends_agree.
"""

import mmap
from collections.abc import Iterator

import pytest
import torch
from agreement import assert_steps_agree, gradient, scalars, signed, step_lists
from torch import Tensor

from epi_kernels import ops
from epi_kernels.backends import native

pytestmark = pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle() or "it is built")


@pytest.fixture(params=(1, 2, 3, 4), ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("lock_in", ["none", "importance"])
def test_many_tensors_on_any_number_of_threads(lock_in: str, threads: int) -> None:
    shapes = [(int(n),) for n in torch.randint(0, 200, (400,))] + [(300_007,), (), (3, 5)]
    params, grads = [torch.randn(s) for s in shapes], [gradient(s) for s in shapes]
    assert_steps_agree("native", step_lists(params, grads, lock_in, False), lock_in)


def test_histograms_and_locks_on_any_number_of_threads(threads: int) -> None:
    importances = [signed((size,)) for size in (300_007, 0, 5, 70_000)]
    arguments = (importances, [0] * 4, None, [0, 0, 1, 1])
    selection = torch.tensor([[0, 1], [0, 1]])
    histograms = [ops.score_histogram(*arguments, selection, 19, 4096, None, name) for name in ("native", "reference")]
    assert torch.equal(*histograms)
    locks = [
        ops.lock_([s.clone() for s in importances], *arguments[1:], torch.tensor([1e-9, 1e-3]), None, name)
        for name in ("native", "reference")
    ]
    assert torch.equal(*locks)
    assert locks[0].sum() > 0


def test_entries_beyond_two_to_the_31() -> None:
    size = (1 << 31) + 5
    param, grad = untouched_zeros(size), untouched_zeros(size)
    indices = torch.tensor([0, 77, (1 << 31) - 1, 1 << 31, size - 1])
    param[indices], grad[indices] = torch.ones(5, dtype=torch.bfloat16), torch.full((5,), 2.0, dtype=torch.bfloat16)
    slots, row = [torch.zeros(5), torch.zeros(5)], scalars("none", 1, lr=0.5, weight_decay=0.0)
    ops.gather_("adamw", [param], [grad], [indices], slots, row, [0], "native")
    assert param[indices].tolist() == [0.5] * 5
    assert param[indices - 1].tolist()[1:4] == [0.0, 0.0, 0.5]
    assert param[[1, 78, size - 2]].tolist() == [0.0] * 3


def untouched_zeros(size: int) -> Tensor:
    """Return bfloat16 zeros whose pages are given memory when touched."""
    pages = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    return torch.frombuffer(pages, dtype=torch.bfloat16)
