"""The native backend against the reference.

- Every result bit for bit, parameters and moments too, for any dtypes, strides, sizes, number of threads and SIMD
  level. NaN stays NaN.
- Special values: NaN, infinity, -0.0, subnormals, rounding ties and overflow of 16-bit parameters.
- Memory around a view is never touched; results never depend on what output memory held before.
- Entries beyond 2^31.
- The comparison sees one unit in the last place.
"""

import ctypes
import math
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from epi_kernels import lock, native, ops
from epi_kernels.contract import Scalars

pytestmark = pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle() or "it is built")

HALVES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.1, "importance_beta": 0.99}

# a vector and its neighbours, a block of the kernel and its neighbours, a chunk of the threads and one entry more
SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1023, 1025, 2049, 65_537)

Lists = dict[str, list[Tensor]]


@pytest.fixture(params=(1, 3, 4), ids="level {}".format)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run on one SIMD level."""
    if native.limit_simd_level(request.param) != request.param:
        native.limit_simd_level(4)
        pytest.skip("this machine or platform does not have it")
    yield request.param
    native.limit_simd_level(4)


@pytest.fixture(params=(1, 2, 3, 4), ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def differing(left: Tensor, right: Tensor) -> int:
    """Return how many entries differ in a bit; two NaNs do not."""
    bytes_of = [t.contiguous().view(-1, 1).view(torch.uint8).view(-1, t.element_size()) for t in (left, right)]
    return int(((bytes_of[0] != bytes_of[1]).any(1) & ~(left.isnan() & right.isnan()).reshape(-1)).sum())


def assert_same(left: Lists, right: Lists) -> None:
    for name in left:
        for i, (ours, theirs) in enumerate(zip(left[name], right[name], strict=True)):
            assert not differing(ours, theirs), f"{name}[{i}]: {differing(ours, theirs)} of {ours.numel()}"


def clones(lists: Lists) -> Lists:
    """Return copies with the same strides, in memory that held NaN before."""
    return {
        name: [torch.full_like(t, math.nan if t.is_floating_point() else 77).copy_(t) for t in tensors]
        for name, tensors in lists.items()
    }


def step_lists(params: list[Tensor], grads: list[Tensor], lock_in: str, amsgrad: bool) -> Lists:
    """Return the tensors of a step in the middle of a run; three in ten entries locked."""

    def like(values: Any) -> list[Tensor]:
        return [torch.empty_like(p, dtype=torch.float32).copy_(values(p)) for p in params]

    locked = [torch.rand(p.shape) < 0.3 for p in params]
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": like(lambda p: torch.randn(p.shape) * 0.1),
        "exp_avg_sqs": like(lambda p: torch.rand(p.shape) * 0.1),
        "max_exp_avg_sqs": like(lambda p: torch.rand(p.shape) * 0.1) if amsgrad else [],
        "locks": [],
    }
    if lock_in == "importance":
        lists["locks"] = [
            lock.with_lock(s, where) for s, where in zip(like(lambda p: torch.rand(p.shape)), locked, strict=True)
        ]
    elif lock_in == "static":
        lists["locks"] = [lock.static_lock(where) for where in locked]
    elif lock_in == "exp_avg_sq":
        lists["exp_avg_sqs"] = [lock.with_lock(v, where) for v, where in zip(lists["exp_avg_sqs"], locked, strict=True)]
    return lists


def gradient(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return gradients over ten decades; in the 16-bit dtypes some overflow when squared, some vanish."""
    return (torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-7, 3)).to(dtype)


def step(lists: Lists, backend: str, lock_in: str, *, advanced: bool = False, **group: Any) -> Lists:
    """Return the tensors after one step, the counts with them."""
    lists = clones(lists)
    row = Scalars.of({**GROUP, "betas": (0.9, 0.999), "maximize": False, **group}, 3)
    count = len(lists["params"])
    nonfinite = torch.zeros(count, dtype=torch.int64)
    scalars = torch.tensor([row] * count, dtype=torch.float64).view(count, len(row))
    ops.masked_adamw_(
        **lists, nonfinite=nonfinite, scalars=scalars, lock_in=lock_in, advanced=advanced, backend=backend
    )
    return {**lists, "nonfinite": [nonfinite]}


def assert_steps_agree(lists: Lists, lock_in: str, **options: Any) -> None:
    assert_same(step(lists, "native", lock_in, **options), step(lists, "reference", lock_in, **options))


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("advanced", [False, True])
def test_step_of_every_size_and_kind(lock_in: str, amsgrad: bool, advanced: bool, level: int) -> None:
    params, grads = [torch.randn(size) for size in SIZES], [gradient((size,)) for size in SIZES]
    lists = step_lists(params, grads, lock_in, amsgrad)
    assert_steps_agree(lists, lock_in, advanced=advanced)
    assert_steps_agree(lists, lock_in, advanced=advanced, betas=(0.3, 0.9), maximize=True)
    assert_steps_agree(lists, lock_in, advanced=advanced, betas=(0.0, 0.999), eps=0.0, weight_decay=0.0)


@pytest.mark.parametrize("param_dtype", HALVES)
@pytest.mark.parametrize("grad_dtype", HALVES)
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
def test_step_of_every_pair_of_dtypes(
    lock_in: str, param_dtype: torch.dtype, grad_dtype: torch.dtype, level: int
) -> None:
    params = [torch.randn(size).to(param_dtype) for size in SIZES[:-1]]
    grads = [gradient((size,), grad_dtype) for size in SIZES[:-1]]
    assert_steps_agree(step_lists(params, grads, lock_in, False), lock_in)


SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 3e38, -1e20, 1e-20, 65504.0, 1.0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_step_of_special_values(lock_in: str, amsgrad: bool, dtype: torch.dtype, level: int) -> None:
    p, g, m = (t.reshape(-1) for t in torch.meshgrid(SPECIAL, SPECIAL, SPECIAL, indexing="ij"))
    lists = step_lists([p.to(dtype)], [g.to(dtype)], lock_in, amsgrad)
    lists["exp_avgs"] = [m.clone()]
    lists["exp_avg_sqs"][0] = torch.copysign(m, lists["exp_avg_sqs"][0])
    assert_steps_agree(lists, lock_in)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(dtype: torch.dtype, level: int) -> None:
    # p * decay is the result where the moments stay zero: every 16-bit value, scaled to ties, carries and overflow
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    zero = torch.zeros(every.shape)
    lists = {"params": [every], "grads": [zero], "exp_avgs": [zero], "exp_avg_sqs": [zero]}
    lists |= {"max_exp_avg_sqs": [], "locks": []}
    for decay in (1.0, 0.5, 1 + 2**-8, 1 - 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 2**-7, 0.3, 2.0):
        assert_steps_agree(lists, "none", lr=1.0, weight_decay=1 - decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_locked_nan_keeps_its_payload(dtype: torch.dtype, level: int) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    param = every.view(dtype).clone()
    lists = step_lists([param], [gradient(param.shape)], "static", False)
    lists["locks"] = [torch.full(param.shape, -1, dtype=torch.int8)]
    assert torch.equal(step(lists, "native", "static")["params"][0].view(torch.int16), every)


def layouts() -> dict[str, Tensor]:
    """Return views of shape [2, 3, 4, 5] with different strides."""
    shape = (2, 3, 4, 5)
    return {
        "contiguous": torch.randn(shape),
        "channels last": torch.randn(shape).to(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0),
        "sliced": torch.randn(4, 3, 4, 10)[::2, :, :, 1::2],
        "expanded": torch.randn(2, 3, 4, 1).expand(shape),
    }


@pytest.mark.parametrize("param_layout", ["contiguous", "channels last", "transposed", "sliced"])
@pytest.mark.parametrize("grad_layout", layouts())
@pytest.mark.parametrize("state_layout", ["like the parameter", "contiguous"])
@pytest.mark.parametrize("lock_in", ["importance", "static"])
def test_step_of_any_strides(param_layout: str, grad_layout: str, state_layout: str, lock_in: str) -> None:
    param, grad = layouts()[param_layout], layouts()[grad_layout]
    lists = step_lists([param], [grad], lock_in, True)
    if state_layout == "contiguous":
        lists |= {name: [t.contiguous() for t in lists[name]] for name in ("exp_avgs", "max_exp_avg_sqs", "locks")}
    assert_steps_agree(lists, lock_in)


def test_the_neighbours_of_a_view_stay() -> None:
    storage = torch.full((40, 50), math.nan)
    view = storage[5:35:2, 7:47:3].t()
    view.copy_(torch.randn(view.shape))
    before = storage.clone()
    lists = step_lists([view], [torch.randn(view.shape)], "importance", False)
    nonfinite, row = (
        torch.zeros(1, dtype=torch.int64),
        Scalars.of({**GROUP, "betas": (0.9, 0.99), "maximize": False}, 1),
    )
    scalars = torch.tensor([row], dtype=torch.float64)
    locked = lock.is_locked(lists["locks"][0])
    ops.masked_adamw_(
        **lists, nonfinite=nonfinite, scalars=scalars, lock_in="importance", advanced=False, backend="native"
    )
    moved = storage.view(torch.int32) != before.view(torch.int32)
    assert torch.equal(moved[5:35:2, 7:47:3].t(), ~locked)
    assert moved.sum() == (~locked).sum()


@pytest.mark.parametrize("lock_in", ["none", "importance"])
def test_many_tensors_on_any_number_of_threads(lock_in: str, threads: int) -> None:
    shapes = [(int(n),) for n in torch.randint(0, 200, (2000,))] + [(300_007,), (), (3, 5)]
    params, grads = [torch.randn(s) for s in shapes], [gradient(s) for s in shapes]
    assert_steps_agree(step_lists(params, grads, lock_in, False), lock_in)


def test_empty_lists() -> None:
    none: list[Tensor] = []
    scalars, counts = torch.empty(0, 11, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    ops.masked_adamw_(none, none, none, none, none, none, counts, scalars, "importance", False, "native")
    ops.sparse_adamw_(none, none, none, none, none, scalars, "native")
    ops.gradient_sums_(none, none, none, "native")
    ranges = ops.importance_(none, none, counts, torch.empty(0, 2, dtype=torch.float64), [], 2, True, "native")
    assert ranges.tolist() == [[math.inf, -math.inf]] * 2
    assert not ops.score_histogram(none, [], None, [], torch.zeros(2, dtype=torch.int64), 19, 4096, "native").any()
    assert ops.lock_(none, [], None, [], torch.zeros(2), "native").shape == (0, 3)


# Importance and threshold --------------------------------------------------------------------------------------------


def signed(shape: tuple[int, ...]) -> Tensor:
    """Return an importance over forty decades, subnormals, zeros and values that are not finite included."""
    values = 10 ** torch.empty(shape).uniform_(-42, 3)
    values = torch.where(torch.rand(shape) < 0.1, SPECIAL[torch.randint(0, len(SPECIAL), shape)].abs(), values)
    return lock.with_lock(values, torch.rand(shape) < 0.3)


SHAPES = [(size,) for size in SIZES] + [(), (300, 301)]
LAYERS = [i % 3 for i in range(len(SHAPES))]


@pytest.mark.parametrize("keep_finite", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_importance_and_ranges(dtype: torch.dtype, keep_finite: bool, level: int) -> None:
    importances = [signed(shape) for shape in SHAPES]
    grads = [None if i % 4 == 2 else gradient(shape, dtype) for i, shape in enumerate(SHAPES)]
    betas = torch.tensor([(beta, 1 - beta) for beta in torch.rand(len(SHAPES)).tolist()], dtype=torch.float64)
    results = []
    for backend in ("native", "reference"):
        mine = [s.clone() for s in importances]
        nonfinite = torch.zeros(len(SHAPES), dtype=torch.int64)
        # a fourth layer without entries
        ranges = ops.importance_(mine, grads, nonfinite, betas, LAYERS, 4, keep_finite, backend)
        results.append({"importances": mine, "ranges": [ranges], "nonfinite": [nonfinite]})
    assert_same(*results)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("shift", "bins"), [(19, 4096), (9, 1024), (0, 512)])
def test_histograms(normalize: bool, shift: int, bins: int, threads: int) -> None:
    importances = [signed(shape) for shape in SHAPES]
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [2.0, 2.0]]) if normalize else None
    digits = 31 - shift - (bins.bit_length() - 1)
    prefixes = torch.tensor([0x3F000000, 0]) >> (31 - digits)
    budgets = [i % 2 for i in range(len(SHAPES))]
    arguments = (importances, LAYERS, ranges, budgets, prefixes, shift, bins)
    ours, theirs = (ops.score_histogram(*arguments, backend) for backend in ("native", "reference"))
    assert torch.equal(ours, theirs)
    assert ours.sum() > 0


@pytest.mark.parametrize("normalize", [True, False])
def test_locks_and_counts(normalize: bool, level: int, threads: int) -> None:
    importances = [signed(shape) for shape in SHAPES]
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [2.0, 2.0]]) if normalize else None
    budgets = [i % 3 for i in range(len(SHAPES))]
    results = []
    for backend in ("native", "reference"):
        mine = [s.clone() for s in importances]
        counts = ops.lock_(mine, LAYERS, ranges, budgets, torch.tensor([1e-3, 0.0, math.inf]), backend)
        results.append({"importances": mine, "counts": [counts]})
    assert_same(*results)
    assert results[0]["counts"][0].sum(0).min() > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_gradient_sums(dtype: torch.dtype, level: int) -> None:
    lists = {"sums": [torch.randn(s) for s in SIZES], "square_sums": [torch.rand(s) for s in SIZES]}
    grads = [gradient((size,), dtype) for size in SIZES]
    results = [clones(lists), clones(lists)]
    for result, backend in zip(results, ("native", "reference"), strict=True):
        ops.gradient_sums_(**result, grads=grads, backend=backend)
    assert_same(*results)


# Selected entries ----------------------------------------------------------------------------------------------------


def test_entries_beyond_two_to_the_31(level: int) -> None:
    size = (1 << 31) + 5
    param, grad = untouched_zeros(size), untouched_zeros(size)
    indices = torch.tensor([0, 77, (1 << 31) - 1, 1 << 31, size - 1])
    param[indices], grad[indices] = torch.ones(5, dtype=torch.bfloat16), torch.full((5,), 2.0, dtype=torch.bfloat16)
    moments, squares = [torch.zeros(5)], [torch.zeros(5)]
    row = Scalars.of({**GROUP, "lr": 0.5, "weight_decay": 0.0, "betas": (0.9, 0.999), "maximize": False}, 1)
    scalars = torch.tensor([row], dtype=torch.float64)
    ops.sparse_adamw_([param], [grad], [indices], moments, squares, scalars, "native")
    assert param[indices].tolist() == [0.5] * 5
    assert param[indices - 1].tolist()[1:4] == [0.0, 0.0, 0.5]
    assert param[[1, 78, size - 2]].tolist() == [0.0] * 3


def untouched_zeros(size: int) -> Tensor:
    """Return bfloat16 zeros whose pages are given memory when touched."""
    pages = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    return torch.frombuffer(pages, dtype=torch.bfloat16)


# The library and the comparison --------------------------------------------------------------------------------------


def test_the_structs_have_the_sizes_that_the_compiler_gives_them() -> None:
    sizes = (ctypes.c_int64 * 5).in_dll(native._library(), "epi_struct_sizes")
    structs = (
        native.ADAMW_TENSOR,
        native.IMPORTANCE_TENSOR,
        native.SUMS_TENSOR,
        native.SCORE_TENSOR,
        native.SPARSE_TENSOR,
    )
    assert [struct.itemsize for struct in structs] == list(sizes)


def test_the_comparison_sees_one_ulp() -> None:
    values = torch.randn(100)
    planted = values.clone()
    planted.view(torch.int32)[37] += 1
    assert differing(values, planted) == 1
    with pytest.raises(AssertionError, match=r"params\[0\]: 1 of 100"):
        assert_same({"params": [values]}, {"params": [planted]})
    assert differing(torch.tensor([0.0, math.nan]), torch.tensor([-0.0, -math.nan])) == 1
