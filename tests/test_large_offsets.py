"""Triton's kernels reach entries beyond 2^31 of a tensor, without such a tensor: interpreted, by construction.

The address in the table lies 2^31 entries below real memory, and the only chunk is the one whose entries are real. A
kernel that computes an offset in 32 bits reads somewhere else.

Where a tensor has no entries, or a refresh is not due, a chunk behind 2^31 does nothing. The one looked at begins a
chunk before 2^32: a kernel that computes in 32 bits how many entries are left finds a full chunk there, of real memory.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from epi_kernels.ops.table import Table
from epi_kernels.rules import ADAMW
from epi_kernels.schema import CHUNK_BITS, GATHER, IMPORTANCE, LOCK_IN, SCORE, SUMS, SWEEP, SweepScalars

BEYOND = 1 << 31
# beta 0: m = g, v = S = g^2, theta - 1
ROW = (*SweepScalars(1.0, 0.0, 1.0, 1.0), *ADAMW.scalars(1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0))
SLOTS = {"exp_avg": "slots[0]", "exp_avg_sq": "slots[1]", "max_exp_avg_sq": "slots[2]"}


def step_constants() -> dict[str, Any]:
    """Return the compile-time arguments of a step of float32 with locks in an importance."""
    from epi_kernels.ops import tiles

    float32 = tiles.DTYPES[torch.float32]
    lock = {"LOCK_IN": LOCK_IN.index("importance"), "ADVANCED": False}
    return {"PARAM": float32, "GRAD": float32, **lock, "BLOCK": tiles.BLOCK, "TILES": tiles.TILES}


@pytest.fixture(autouse=True)
def only_triton(backend: str) -> None:
    if backend != "triton":
        pytest.skip("native has such a tensor in test_native")


def displaced(fields: tuple[str, ...], entries: int, tensors: dict[str, Tensor], beyond: int = BEYOND) -> Table:
    """Return a table of one tensor of `beyond` + `entries` entries, of which only the last `entries` have memory."""
    from epi_kernels.ops import tiles

    table = Table(fields, [beyond + entries], tiles.CHUNK, torch.device("cpu"))
    for field, tensor in tensors.items():
        table.set(field, [tensor.data_ptr() - beyond * tensor.element_size()])
    assert table.chunks[-1] == beyond // tiles.CHUNK
    assert int(table.chunks[-1]) >> CHUNK_BITS == 0
    table.chunks = table.chunks[-1:]
    return table


@pytest.fixture(params=["last tile", "full tiles"])
def entries(request: pytest.FixtureRequest) -> int:
    from epi_kernels.ops import tiles

    return 37 if request.param == "last tile" else tiles.CHUNK


def test_step(entries: int) -> None:
    from epi_kernels.ops.slots import constants_of
    from epi_kernels.ops.sweep import triton as kernels

    grad = torch.randint(1, 9, (entries,)).float()
    names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "lock")
    tensors = {name: torch.zeros(entries) for name in names}
    words = {SLOTS.get(name, name): tensor for name, tensor in tensors.items()}
    table = displaced(SWEEP.words, entries, {"grad": grad, **words})
    table.set("aligned", [1])
    scalars, nonfinite = torch.tensor([ROW]), torch.zeros(1, dtype=torch.int64)
    kernels.sweep_kernel[(1,)](
        table.rows(),
        table.chunks,
        scalars,
        nonfinite,
        None,
        None,
        None,
        **step_constants(),
        **constants_of(ADAMW, True),
    )
    assert torch.equal(tensors["exp_avg"], grad)
    for name in ("exp_avg_sq", "max_exp_avg_sq", "lock"):
        assert torch.equal(tensors[name], grad.square()), name
    assert torch.equal(tensors["param"], torch.full((entries,), -1.0))


def test_importance_and_sums(entries: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.importance import triton as kernels

    importance, grad = torch.zeros(entries), torch.randint(1, 9, (entries,)).half()
    table = displaced(IMPORTANCE.words, entries, {"importance": importance, "grad": grad})
    table.set("grad_dtype", [2])
    table.set("aligned", [1])
    ranges, nonfinite = torch.tensor([[math.inf, -math.inf]]), torch.zeros(1, dtype=torch.int64)
    kernels.importance_kernel[(1,)](
        table.rows(), table.chunks, torch.tensor([[0.0, 1.0]]), ranges.view(torch.int32), nonfinite, None,
        True, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert torch.equal(importance, grad.float().square())
    assert ranges.tolist() == [[importance.min(), importance.max()]]

    total, squares = torch.zeros(entries), torch.zeros(entries)
    table = displaced(SUMS.words, entries, {"sum": total, "square_sum": squares, "grad": grad})
    table.set("grad_dtype", [2])
    table.set("aligned", [1])
    kernels.gradient_sums_kernel[(1,)](table.rows(), table.chunks, tiles.BLOCK, tiles.TILES)
    assert torch.equal(total, grad.float())
    assert torch.equal(squares, importance)


def test_histogram_and_lock(entries: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.threshold import triton as kernels

    importance = torch.rand(entries) + 1
    table = displaced(SCORE.words, entries, {"importance": importance})
    table.set("aligned", [1])
    counts = torch.zeros(kernels.COPIES, 1, 4096, dtype=torch.int64)
    kernels.score_histogram_kernel[(1,)](
        table.rows(), table.chunks, None, torch.tensor([[0, 1]]), counts, 1,
        kernels.COPIES, 19, 12, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert counts.sum() == entries
    locked = torch.zeros(1, 3, dtype=torch.int64)
    expected = int((importance >= 1.5).sum())
    kernels.lock_kernel[(1,)](
        table.rows(), table.chunks, None, torch.tensor([1.5]), locked, tiles.BLOCK, tiles.TILES
    )  # fmt: skip
    assert locked.tolist() == [[expected, expected, 0]]
    assert torch.equal(importance < 0, importance.abs() >= 1.5)


def test_selected_entries() -> None:
    import triton.language as tl

    from epi_kernels.ops import tiles
    from epi_kernels.ops.gather import triton as kernels
    from epi_kernels.ops.slots import constants_of

    param, grad = torch.zeros(5), torch.arange(5.0)
    offsets = torch.tensor([1, 4]) + BEYOND
    exp_avg, exp_avg_sq = torch.zeros(2), torch.zeros(2)
    table = Table(GATHER.words, [2], tiles.CHUNK, torch.device("cpu"))
    for field, tensor in {"param": param, "grad": grad}.items():
        table.set(field, [tensor.data_ptr() - BEYOND * tensor.element_size()])
    for field, tensor in {"param_offsets": offsets, "grad_offsets": offsets}.items():
        table.point(field, [tensor])
    table.point("slots[0]", [exp_avg])
    table.point("slots[1]", [exp_avg_sq])
    kernels.gather_kernel[(1,)](
        table.rows(), table.chunks, torch.tensor([ROW]),
        tiles.DTYPES[torch.float32], tiles.DTYPES[torch.float32], tl.int64,
        **constants_of(ADAMW, False), BLOCK=tiles.BLOCK, TILES=tiles.TILES,
    )  # fmt: skip
    assert param.tolist() == [0.0, -1.0, 0.0, 0.0, -1.0]
    assert exp_avg.tolist() == [1.0, 4.0]


@pytest.fixture(params=[0, 1], ids=["masked", "aligned"])
def aligned(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def far(
    fields: tuple[str, ...], tensors: dict[str, Tensor], aligned: int | None = None, *, empty: bool
) -> tuple[Tensor, Tensor]:
    """Return the rows of a tensor and its chunk before 2^32. empty: whether the rows say that it has no entries."""
    from epi_kernels.ops import tiles

    table = displaced(fields, tiles.CHUNK, tensors, (1 << 32) - tiles.CHUNK)
    if aligned is not None:
        table.set("aligned", [aligned])
    if empty:
        table.set("size", [0])
    return table.rows(), table.chunks


def test_a_step_without_entries_does_nothing(aligned: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.slots import constants_of
    from epi_kernels.ops.sweep import triton as kernels

    names = ("param", "grad", "slots[0]", "slots[1]", "lock")
    tensors = {name: torch.ones(tiles.CHUNK) for name in names}
    nonfinite = torch.zeros(1, dtype=torch.int64)
    kernels.sweep_kernel[(1,)](
        *far(SWEEP.words, tensors, aligned, empty=True), torch.tensor([ROW]), nonfinite, None, torch.tensor(math.nan),
        None, **step_constants(), **constants_of(ADAMW, False),
    )  # fmt: skip
    assert all(torch.equal(tensor, torch.ones(tiles.CHUNK)) for tensor in tensors.values())
    assert nonfinite.tolist() == [0]


def test_importance_that_is_not_due_and_sums_without_entries_do_nothing(aligned: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.importance import triton as kernels

    tensors = {name: torch.ones(tiles.CHUNK) for name in ("importance", "grad")}
    ranges, nonfinite = torch.tensor([[math.inf, -math.inf]]), torch.zeros(1, dtype=torch.int64)
    kernels.importance_kernel[(1,)](
        *far(IMPORTANCE.words, tensors, aligned, empty=False), torch.tensor([[0.5, 1.0]]), ranges.view(torch.int32),
        nonfinite, torch.tensor(math.nan), False, tiles.BLOCK, tiles.TILES, due=torch.zeros(1), CHUNKS=1,
    )  # fmt: skip
    assert torch.equal(tensors["importance"], torch.ones(tiles.CHUNK))
    assert (ranges.tolist(), nonfinite.tolist()) == ([[math.inf, -math.inf]], [0])

    tensors = {name: torch.ones(tiles.CHUNK) for name in ("sum", "square_sum", "grad")}
    kernels.gradient_sums_kernel[(1,)](*far(SUMS.words, tensors, aligned, empty=True), tiles.BLOCK, tiles.TILES)
    assert all(torch.equal(tensor, torch.ones(tiles.CHUNK)) for tensor in tensors.values())


def test_histogram_and_lock_that_are_not_due_do_nothing(aligned: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.threshold import triton as kernels

    importance = torch.ones(tiles.CHUNK)
    rows, due = far(SCORE.words, {"importance": importance}, aligned, empty=False), torch.zeros(1)
    counts = torch.zeros(kernels.COPIES, 1, 4096, dtype=torch.int64)
    kernels.score_histogram_kernel[(1,)](
        *rows, None, torch.tensor([[0, 1]]), counts, 1, kernels.COPIES, 19, 12, tiles.BLOCK, tiles.TILES,
        due=due, CHUNKS=1,
    )  # fmt: skip
    assert counts.sum() == 0
    locked = torch.zeros(1, 3, dtype=torch.int64)
    kernels.lock_kernel[(1,)](*rows, None, torch.tensor([0.5]), locked, tiles.BLOCK, tiles.TILES, due=due, CHUNKS=1)
    assert locked.tolist() == [[0, 0, 0]]
    assert torch.equal(importance, torch.ones(tiles.CHUNK))


def test_a_step_of_no_selected_entries_does_nothing() -> None:
    import triton.language as tl

    from epi_kernels.ops import tiles
    from epi_kernels.ops.gather import triton as kernels
    from epi_kernels.ops.slots import constants_of

    param, grad = torch.zeros(tiles.CHUNK), torch.ones(tiles.CHUNK)
    offsets = torch.arange(tiles.CHUNK)
    tensors = {
        "param_offsets": offsets,
        "grad_offsets": offsets,
        "slots[0]": torch.zeros(tiles.CHUNK),
        "slots[1]": torch.zeros(tiles.CHUNK),
    }
    rows, chunks = far(GATHER.words, tensors, empty=True)
    for field, tensor in {"param": param, "grad": grad}.items():
        rows[:, GATHER.words.index(field)] = tensor.data_ptr()
    kernels.gather_kernel[(1,)](
        rows, chunks, torch.tensor([ROW]),
        tiles.DTYPES[torch.float32], tiles.DTYPES[torch.float32], tl.int64,
        **constants_of(ADAMW, False), BLOCK=tiles.BLOCK, TILES=tiles.TILES,
    )  # fmt: skip
    assert param.count_nonzero() == tensors["slots[0]"].count_nonzero() == 0
