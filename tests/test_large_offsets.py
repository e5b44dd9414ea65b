"""Triton's kernels reach entries beyond 2^31 of a tensor, without such a tensor: interpreted, by construction.

The address in the table lies 2^31 entries below real memory, and the only piece is the one whose entries are real. A
kernel that computes an offset in 32 bits reads somewhere else.

Where nothing is due, every size is 0, and a piece behind 2^31 does nothing. The one looked at begins a piece before
2^32: a kernel that computes in 32 bits how many entries are left finds a full piece there, of real memory.
"""

import math

import pytest
import torch
from torch import Tensor

from epi_kernels.contract import Scalars
from epi_kernels.ops.table import PIECE_BITS, Table

BEYOND = 1 << 31
ROW = Scalars(1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0)  # beta 0: m = g, v = S = g^2, theta - 1


@pytest.fixture(autouse=True)
def only_triton(backend: str) -> None:
    if backend != "triton":
        pytest.skip("native has such a tensor in test_native")


def displaced(fields: tuple[str, ...], entries: int, tensors: dict[str, Tensor], beyond: int = BEYOND) -> Table:
    """Return a table of one tensor of `beyond` + `entries` entries, of which only the last `entries` have memory."""
    from epi_kernels.ops import tiles

    table = Table(fields, [beyond + entries], tiles.PIECE, torch.device("cpu"))
    for field, tensor in tensors.items():
        table.set(field, [tensor.data_ptr() - beyond * tensor.element_size()])
    assert table.pieces[-1] == beyond // tiles.PIECE
    assert int(table.pieces[-1]) >> PIECE_BITS == 0
    table.pieces = table.pieces[-1:]
    return table


@pytest.fixture(params=["last tile", "full tiles"])
def entries(request: pytest.FixtureRequest) -> int:
    from epi_kernels.ops import tiles

    return 37 if request.param == "last tile" else tiles.PIECE


def test_step(entries: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.masked_adamw import triton as kernels

    grad = torch.randint(1, 9, (entries,)).float()
    names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "lock")
    tensors = {name: torch.zeros(entries) for name in names}
    table = displaced(kernels.FIELDS, entries, {"grad": grad, **tensors})
    table.set("aligned", [1])
    scalars, nonfinite = torch.tensor([ROW]), torch.zeros(1, dtype=torch.int64)
    kernels.masked_adamw_kernel[(1,)](
        table.rows(), table.pieces, scalars, nonfinite, None, None, None,
        tiles.DTYPES[torch.float32], tiles.DTYPES[torch.float32], 1, True, False, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert torch.equal(tensors["exp_avg"], grad)
    for name in ("exp_avg_sq", "max_exp_avg_sq", "lock"):
        assert torch.equal(tensors[name], grad.square()), name
    assert torch.equal(tensors["param"], torch.full((entries,), -1.0))


def test_importance_and_sums(entries: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.importance import triton as kernels

    importance, grad = torch.zeros(entries), torch.randint(1, 9, (entries,)).half()
    table = displaced(kernels.FIELDS, entries, {"importance": importance, "grad": grad})
    table.set("grad_dtype", [2])
    table.set("aligned", [1])
    ranges, nonfinite = torch.tensor([[math.inf, -math.inf]]), torch.zeros(1, dtype=torch.int64)
    kernels.importance_kernel[(1,)](
        table.rows(), table.pieces, torch.tensor([[0.0, 1.0]]), ranges.view(torch.int32), nonfinite, None,
        True, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert torch.equal(importance, grad.float().square())
    assert ranges.tolist() == [[importance.min(), importance.max()]]

    total, squares = torch.zeros(entries), torch.zeros(entries)
    table = displaced(kernels.SUMS_FIELDS, entries, {"sum": total, "square_sum": squares, "grad": grad})
    table.set("grad_dtype", [2])
    table.set("aligned", [1])
    kernels.gradient_sums_kernel[(1,)](table.rows(), table.pieces, tiles.BLOCK, tiles.TILES)
    assert torch.equal(total, grad.float())
    assert torch.equal(squares, importance)


def test_histogram_and_lock(entries: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.threshold import triton as kernels

    importance = torch.rand(entries) + 1
    table = displaced(kernels.FIELDS, entries, {"importance": importance})
    table.set("aligned", [1])
    counts = torch.zeros(kernels.COPIES, 1, 4096, dtype=torch.int64)
    kernels.score_histogram_kernel[(1,)](
        table.rows(), table.pieces, None, torch.tensor([[0, 1]]), counts, 1,
        kernels.COPIES, 19, 12, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert counts.sum() == entries
    locked = torch.zeros(1, 3, dtype=torch.int64)
    expected = int((importance >= 1.5).sum())
    kernels.lock_kernel[(1,)](
        table.rows(), table.pieces, None, torch.tensor([1.5]), locked, tiles.BLOCK, tiles.TILES
    )  # fmt: skip
    assert locked.tolist() == [[expected, expected, 0]]
    assert torch.equal(importance < 0, importance.abs() >= 1.5)


def test_selected_entries() -> None:
    import triton.language as tl

    from epi_kernels.ops import tiles
    from epi_kernels.ops.sparse_adamw import triton as kernels

    param, grad = torch.zeros(5), torch.arange(5.0)
    offsets = torch.tensor([1, 4]) + BEYOND
    exp_avg, exp_avg_sq = torch.zeros(2), torch.zeros(2)
    table = Table(kernels.FIELDS, [2], tiles.PIECE, torch.device("cpu"))
    for field, tensor in {"param": param, "grad": grad}.items():
        table.set(field, [tensor.data_ptr() - BEYOND * tensor.element_size()])
    for field, tensor in {"param_offsets": offsets, "grad_offsets": offsets}.items():
        table.point(field, [tensor])
    table.point("exp_avg", [exp_avg])
    table.point("exp_avg_sq", [exp_avg_sq])
    kernels.sparse_adamw_kernel[(1,)](
        table.rows(), table.pieces, torch.tensor([ROW]),
        tiles.DTYPES[torch.float32], tiles.DTYPES[torch.float32], tl.int64, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert param.tolist() == [0.0, -1.0, 0.0, 0.0, -1.0]
    assert exp_avg.tolist() == [1.0, 4.0]


@pytest.fixture(params=[0, 1], ids=["masked", "aligned"])
def aligned(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def not_due(fields: tuple[str, ...], tensors: dict[str, Tensor], aligned: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the rows and the piece of a tensor that would wrap, where nothing is due."""
    from epi_kernels.ops import tiles

    table = displaced(fields, tiles.PIECE, tensors, (1 << 32) - tiles.PIECE)
    if aligned is not None:
        table.set("aligned", [aligned])
    return table.rows(torch.zeros(1)), table.pieces


def test_a_step_that_is_not_due_does_nothing(aligned: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.masked_adamw import triton as kernels

    names = ("param", "grad", "exp_avg", "exp_avg_sq", "lock")
    tensors = {name: torch.ones(tiles.PIECE) for name in names}
    nonfinite = torch.zeros(1, dtype=torch.int64)
    kernels.masked_adamw_kernel[(1,)](
        *not_due(kernels.FIELDS, tensors, aligned), torch.tensor([ROW]), nonfinite, None, torch.tensor(math.nan), None,
        tiles.DTYPES[torch.float32], tiles.DTYPES[torch.float32], 1, False, False, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert all(torch.equal(tensor, torch.ones(tiles.PIECE)) for tensor in tensors.values())
    assert nonfinite.tolist() == [0]


def test_importance_and_sums_that_are_not_due_do_nothing(aligned: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.importance import triton as kernels

    tensors = {name: torch.ones(tiles.PIECE) for name in ("importance", "grad")}
    ranges, nonfinite = torch.tensor([[math.inf, -math.inf]]), torch.zeros(1, dtype=torch.int64)
    kernels.importance_kernel[(1,)](
        *not_due(kernels.FIELDS, tensors, aligned), torch.tensor([[0.5, 1.0]]), ranges.view(torch.int32), nonfinite,
        torch.tensor(math.nan), False, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert torch.equal(tensors["importance"], torch.ones(tiles.PIECE))
    assert (ranges.tolist(), nonfinite.tolist()) == ([[math.inf, -math.inf]], [0])

    tensors = {name: torch.ones(tiles.PIECE) for name in ("sum", "square_sum", "grad")}
    kernels.gradient_sums_kernel[(1,)](*not_due(kernels.SUMS_FIELDS, tensors, aligned), tiles.BLOCK, tiles.TILES)
    assert all(torch.equal(tensor, torch.ones(tiles.PIECE)) for tensor in tensors.values())


def test_histogram_and_lock_that_are_not_due_do_nothing(aligned: int) -> None:
    from epi_kernels.ops import tiles
    from epi_kernels.ops.threshold import triton as kernels

    importance = torch.ones(tiles.PIECE)
    rows = not_due(kernels.FIELDS, {"importance": importance}, aligned)
    counts = torch.zeros(kernels.COPIES, 1, 4096, dtype=torch.int64)
    kernels.score_histogram_kernel[(1,)](
        *rows, None, torch.tensor([[0, 1]]), counts, 1, kernels.COPIES, 19, 12, tiles.BLOCK, tiles.TILES
    )
    assert counts.sum() == 0
    locked = torch.zeros(1, 3, dtype=torch.int64)
    kernels.lock_kernel[(1,)](*rows, None, torch.tensor([0.5]), locked, tiles.BLOCK, tiles.TILES)
    assert locked.tolist() == [[0, 0, 0]]
    assert torch.equal(importance, torch.ones(tiles.PIECE))


def test_selected_entries_that_are_not_due_do_not_move() -> None:
    import triton.language as tl

    from epi_kernels.ops import tiles
    from epi_kernels.ops.sparse_adamw import triton as kernels

    param, grad = torch.zeros(tiles.PIECE), torch.ones(tiles.PIECE)
    offsets = torch.arange(tiles.PIECE)
    tensors = {
        "param_offsets": offsets,
        "grad_offsets": offsets,
        "exp_avg": torch.zeros(tiles.PIECE),
        "exp_avg_sq": torch.zeros(tiles.PIECE),
    }
    rows, pieces = not_due(kernels.FIELDS, tensors)
    for field, tensor in {"param": param, "grad": grad}.items():
        rows[:, kernels.FIELDS.index(field)] = tensor.data_ptr()
    kernels.sparse_adamw_kernel[(1,)](
        rows, pieces, torch.tensor([ROW]),
        tiles.DTYPES[torch.float32], tiles.DTYPES[torch.float32], tl.int64, tiles.BLOCK, tiles.TILES,
    )  # fmt: skip
    assert param.count_nonzero() == tensors["exp_avg"].count_nonzero() == 0
