"""Compact storages in Triton against the reference, bit for bit.

- The step of both rules: parameters, rests, slots and importances in every storage, and every place of the lock.
- Rows of whole blocks and ragged rows; shards whose entries do not lie side by side; offsets around 2^32.
- Values that are not finite, zeros with signs, subnormals and huge values.
- Strided parameters, and output memory that was NaN before.
- Selected entries; importance, ranges, histogram and lock of lists that mix storages.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from agreement import GROUP, SPECIAL
from conftest import AVAILABLE
from torch import Tensor

from epi_kernels import lock, ops
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.ops import Tensors
from epi_kernels.rules import ADAMW, LION, Rule
from epi_kernels.storage import block8
from epi_kernels.storage.noise import Place, key_of

BF16, FP16, FP32, BLOCKS = torch.bfloat16, torch.float16, torch.float32, torch.uint8
Lists = dict[str, list[Tensor | None]]

SHAPES = ((70, 64), (3, 1000), (2, 2, 50), (2, 7))


def bits_of(tensor: Tensor, signs: bool = True) -> Tensor:
    """Return the bits of a tensor, the same for all NaNs; with `signs` but for their sign bits, which may be locks."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    bits = tensor.contiguous().view(views[tensor.element_size()])
    if tensor.dtype == BLOCKS:
        return bits if signs else torch.where(bits == 255, 127, bits)
    if not tensor.is_floating_point():
        return bits
    sign = torch.signbit(tensor) if signs else torch.zeros_like(tensor, dtype=torch.bool)
    return torch.where(tensor.isnan(), torch.where(sign, -1, -2).to(bits.dtype), bits)


def assert_same_bits(left: Lists, right: Lists, locks: str = "") -> None:
    """Compare all bits, but of NaNs only that they are, and in the list `locks` their signs."""
    for name in left:
        for i, (ours, theirs) in enumerate(zip(left[name], right[name], strict=True)):
            if ours is None or theirs is None:
                assert ours is theirs
                continue
            where = (bits_of(ours, name == locks) != bits_of(theirs, name == locks)).nonzero()
            assert not len(where), (
                f"{name}[{i}]: {len(where)} of {ours.numel()}, first {where[0].tolist()}: "
                f"{ours[tuple(where[0])]} and {theirs[tuple(where[0])]}"
            )


def stored(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return (a state in a storage, its scales) of float32 values."""
    if dtype != BLOCKS:
        return values.to(dtype), None
    codes, scales = block8.encoded(values.contiguous(), torch.randint(0, 1 << 16, values.shape), positive=False)
    return codes, scales


def places_of(shapes: Sequence[Sequence[int]], first: int = 0, run: int = 0, gap: int = 0) -> list[Place]:
    """Return places; a run of 0 is the whole tensor."""
    return [
        Place(key_of(i, f"w{i}"), first, run or math.prod(shape), gap, math.prod(shape[1:]))
        for i, shape in enumerate(shapes)
    ]


def values_of(shape: Sequence[int], special: bool) -> Tensor:
    values = torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-4, 1)
    chosen = torch.rand(shape) < (0.2 if special else 0.0)
    return torch.where(chosen, SPECIAL[torch.randint(0, len(SPECIAL), shape)], values)


def tensors_of(
    rule: Rule,
    *,
    param: torch.dtype = FP32,
    grad: torch.dtype = FP32,
    slots: Sequence[torch.dtype] = (FP32, FP32),
    lock_in: str = "none",
    lock_dtype: torch.dtype = FP32,
    rest: torch.dtype | None = None,
    stochastic: bool = False,
    shapes: Sequence[Sequence[int]] = SHAPES,
    places: list[Place] | None = None,
    special: bool = False,
    strided: bool = False,
    amsgrad: bool = False,
) -> Tensors:
    """Return the tensors of a step in the middle of a run."""
    params = [values_of(shape, special).to(param) for shape in shapes]
    if strided:
        params = [p.transpose(0, 1).contiguous().transpose(0, 1) for p in params]
    grads = [values_of(shape, special).to(grad) for shape in shapes]
    named: dict[str, list[Tensor | None]] = {}
    scales: dict[str, list[Tensor | None]] = {}
    for k, (slot, dtype) in enumerate(zip(rule.slots, slots, strict=False)):
        pairs = []
        for shape in shapes:
            values = values_of(shape, special)
            if k:
                values = values.abs()
                if lock_in == rule.importance_slot and k == rule.importance_index:
                    values = lock.with_lock(values, torch.rand(shape) < 0.3)
            pairs.append(stored(values, dtype))
        named[slot.name] = [tensor for tensor, _ in pairs]
        if dtype == BLOCKS:
            scales[slot.name] = [own for _, own in pairs]
    locks: list[Tensor | None] = []
    lock_scales: list[Tensor | None] = []
    if lock_in == "static":
        locks = [lock.static_lock(torch.rand(shape) < 0.3) for shape in shapes]
    elif lock_in == "importance":
        both = [
            stored(lock.with_lock(values_of(shape, special).abs(), torch.rand(shape) < 0.3), lock_dtype)
            for shape in shapes
        ]
        locks = [tensor for tensor, _ in both]
        lock_scales = [own for _, own in both] if lock_dtype == BLOCKS else []
    rests: list[Tensor | None] = []
    if rest is not None:
        limits = torch.iinfo(rest)
        rests = [torch.randint(limits.min, limits.max + 1, shape).to(rest) for shape in shapes]
    places = places if places is not None else places_of(shapes)
    return Tensors(params, grads, named, locks, scales, lock_scales, rests, places, stochastic)  # type: ignore[arg-type]


def copied(tensors: Tensors) -> Tensors:
    def copies(list_: Sequence[Tensor | None]) -> list[Any]:
        return [None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in list_]

    return Tensors(
        copies(tensors.params),
        tensors.grads,
        {name: copies(of) for name, of in tensors.slots.items()},
        copies(tensors.locks),
        {name: copies(of) for name, of in tensors.scales.items()},
        copies(tensors.lock_scales),
        copies(tensors.rests),
        tensors.places,
        tensors.stochastic,
    )


def lists_of(tensors: Tensors) -> dict[str, list[Tensor | None]]:
    return {
        "params": tensors.params,  # type: ignore[dict-item]
        "rests": tensors.rests,
        **tensors.slots,
        **{f"scales of {name}": own for name, own in tensors.scales.items()},
        "locks": tensors.locks,
        "lock_scales": tensors.lock_scales,
    }


def assert_steps_agree(
    backend: str,
    rule: Rule,
    lock_in: str,
    *,
    advanced: bool | Tensor = False,
    step: int = 3,
    grad_factor: Tensor | None = None,
    lockable: Sequence[bool] | None = None,
    **of: Any,
) -> None:
    tensors = tensors_of(rule, lock_in=lock_in, **of)
    can = list(lockable) if lockable else [lock_in != "none"] * len(tensors.params)
    if lockable and tensors.locks:
        tensors.locks = [t if c else None for t, c in zip(tensors.locks, can, strict=True)]
        if tensors.lock_scales:
            tensors.lock_scales = [t if c else None for t, c in zip(tensors.lock_scales, can, strict=True)]
    importance = {"importance": lock_in} if lock_in == rule.importance_slot else {}
    row = torch.tensor([scalars_of(rule, {**GROUP, **importance}, step)], dtype=torch.float64)
    results = []
    for name in (backend, "reference"):
        mine = copied(tensors)
        nonfinite = torch.zeros(len(mine.params), dtype=torch.int64)
        sweep = ops.prepared_sweep(rule, mine, lock_in, can, name)
        sweep.step_(mine, nonfinite, row, [0] * len(mine.params), advanced, grad_factor, None, False)
        results.append({**lists_of(mine), "nonfinite": [nonfinite.int()]})
    before = lists_of(tensors)
    assert not torch.equal(bits_of(before["params"][0]), bits_of(results[0]["params"][0]))  # type: ignore[arg-type]
    assert_same_bits(*results)


NOT_HERE = pytest.mark.skipif(
    "triton" not in AVAILABLE, reason="Triton's kernels run here with TRITON_INTERPRET=1 alone"
)


@pytest.fixture(params=[pytest.param("triton", marks=NOT_HERE)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


LOCKS = [("none", FP32), ("importance", BLOCKS), ("importance", BF16), ("exp_avg_sq", FP32), ("static", FP32)]
STATES = [(BF16, BF16), (BLOCKS, BLOCKS), (BLOCKS, BF16), (BF16, FP32)]


@pytest.mark.parametrize(("lock_in", "lock_dtype"), LOCKS)
@pytest.mark.parametrize("slots", STATES)
@pytest.mark.parametrize("special", [False, True])
def test_step(backend: str, lock_in: str, lock_dtype: torch.dtype, slots: Any, special: bool) -> None:
    # the other choices are dealt out over these cases
    number = LOCKS.index((lock_in, lock_dtype)) + STATES.index(slots) + special
    advanced = (False, True, torch.tensor(0.0), torch.tensor(1.0))[number % 4]
    param = (FP32, BF16, FP16)[number % 3]
    assert_steps_agree(
        backend, ADAMW, lock_in, slots=slots, lock_dtype=lock_dtype, special=special, advanced=advanced, param=param,
        grad=(FP32, BF16)[number % 2], stochastic=number % 2 == 0,
    )  # fmt: skip


@pytest.mark.parametrize("advanced", [False, True, 0.0, 1.0])
@pytest.mark.parametrize(("lock_in", "state"), [*itertools.product(["importance", "exp_avg_sq"], [BF16, BLOCKS])])
def test_an_importance_that_a_refresh_has_advanced(
    backend: str, lock_in: str, state: torch.dtype, advanced: bool | float
) -> None:
    known = advanced if isinstance(advanced, bool) else torch.tensor(advanced)
    assert_steps_agree(
        backend, ADAMW, lock_in, slots=(state, state), lock_dtype=state, advanced=known, special=True,
        shapes=((4, 64), (3, 10), (2, 100)), lockable=(True, False, True), grad_factor=torch.tensor(0.5),
    )  # fmt: skip


@pytest.mark.parametrize("lock_in", ["none", "importance"])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("param", "rest", "stochastic"),
    [
        (BF16, torch.int16, False),
        (BF16, torch.int16, True),
        (BF16, torch.int8, False),
        (BF16, torch.int8, True),
        (BF16, None, True),
        (FP16, None, True),
        (FP32, None, True),
    ],
)
def test_weights(
    backend: str, param: torch.dtype, rest: torch.dtype | None, stochastic: bool, lock_in: str, special: bool
) -> None:
    slots = (FP32, FP32) if special else (BF16, BLOCKS)
    for rule in (ADAMW, LION):
        assert_steps_agree(
            backend, rule, lock_in, slots=slots, lock_dtype=BF16, param=param, rest=rest, stochastic=stochastic,
            special=special, shapes=((70, 64), (5, 99)),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_16_bit_weight(backend: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, -1)
    tensors = tensors_of(LION, param=dtype, slots=(FP32,), shapes=(every.shape,), stochastic=True)
    tensors.params = [every]
    row = torch.tensor([scalars_of(LION, {**GROUP, "weight_decay": 0.31, "lr": 1e-7}, 7)], dtype=torch.float64)
    results = []
    for name in (backend, "reference"):
        mine = copied(tensors)
        sweep = ops.prepared_sweep(LION, mine, "none", [False], name)
        sweep.step_(mine, torch.zeros(1, dtype=torch.int64), row, [0], False, None, None, False)
        results.append(lists_of(mine))
    assert_same_bits(*results)


@pytest.mark.parametrize("lock_in", ["none", "importance", "static"])
@pytest.mark.parametrize("state", [BF16, BLOCKS])
def test_lion(backend: str, lock_in: str, state: torch.dtype) -> None:
    assert_steps_agree(backend, LION, lock_in, slots=(state,), lock_dtype=state, special=True)


@pytest.mark.parametrize("state", [BF16, BLOCKS])
def test_amsgrad(backend: str, state: torch.dtype) -> None:
    assert_steps_agree(backend, ADAMW, "importance", slots=(state, state, state), lock_dtype=state)


@pytest.mark.parametrize("first", [0, (1 << 32) - 5000, (1 << 32) + 123, (1 << 45) - 8192])
@pytest.mark.parametrize(("run", "gap"), [(0, 0), (1, 7), (100, 900), (5000, (1 << 32) + 3), (1 << 40, 5)])
def test_places(backend: str, first: int, run: int, gap: int) -> None:
    shapes = ((140, 64), (30, 100)) if run < 5000 else ((180, 100),)
    places = places_of(shapes, first, run, gap)
    assert_steps_agree(
        backend, LION, "none", slots=(BLOCKS if first % 2 else BF16,), param=BF16, stochastic=True, shapes=shapes,
        places=places, step=1 << 25,
    )  # fmt: skip


@pytest.mark.parametrize("row", [1, 63, 64, 65, 100, 4095, 4097, 9000])
def test_rows(backend: str, row: int) -> None:
    shapes = ((max(2, min(30, 9000 // row)), row), (1, row), (7, row), (0, row))
    assert_steps_agree(
        backend, ADAMW, "importance", slots=(BLOCKS, BLOCKS), lock_dtype=BLOCKS, shapes=shapes, special=True
    )


@pytest.mark.parametrize("state", [BF16, BLOCKS])
def test_strided_parameters(backend: str, state: torch.dtype) -> None:
    assert_steps_agree(
        backend, ADAMW, "importance", slots=(state, state), lock_dtype=state, param=BF16, rest=torch.int8,
        stochastic=True, strided=True, shapes=((64, 66), (9, 30)),
    )  # fmt: skip


def test_without_places_bfloat16_is_rounded_to_nearest(backend: str) -> None:
    for lock_in in ("none", "importance", "exp_avg_sq"):
        assert_steps_agree(
            backend, ADAMW, lock_in, slots=(BF16, BF16), lock_dtype=BF16, param=BF16, places=[], special=True
        )


# selected entries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [ADAMW, LION], ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    ("param", "rest", "stochastic", "state"),
    [
        (FP32, None, False, BF16),
        (BF16, None, True, BF16),
        (FP16, None, True, FP32),
        (BF16, torch.int8, True, BF16),
        (BF16, torch.int8, False, FP32),
        (BF16, torch.int16, False, BF16),
    ],
)
@pytest.mark.parametrize(("first", "gap"), [(0, 0), ((1 << 32) - 300, 0), (5, 1 << 33)])
def test_selected_entries(
    backend: str, rule: Rule, param: torch.dtype, rest: Any, stochastic: bool, state: torch.dtype, first: int, gap: int
) -> None:
    shapes = ((70, 64), (9, 50))
    tensors = tensors_of(
        rule, param=param, slots=(state, state), rest=rest, stochastic=stochastic, shapes=shapes, strided=True,
        places=places_of(shapes, first, 100 if gap else 0, gap),
    )  # fmt: skip
    tensors.grads[1] = tensors.grads[1].t().contiguous().t()
    indices = [torch.randperm(math.prod(shape))[:400].sort().values for shape in shapes]
    for name, of_slot in tensors.slots.items():
        tensors.slots[name] = [t.take(i) for t, i in zip(of_slot, indices, strict=True)]  # type: ignore[union-attr]
    tensors.rests = [t.take(i) for t, i in zip(tensors.rests, indices, strict=False)]  # type: ignore[union-attr]
    row = torch.tensor([scalars_of(rule, GROUP, 5)], dtype=torch.float64)
    results = []
    for name in (backend, "reference"):
        mine = copied(tensors)
        ops.prepared_gather(rule, mine, indices, name).step_(mine, indices, row, [0, 0])
        results.append(lists_of(mine))
    assert_same_bits(*results)


# importance and threshold --------------------------------------------------------------------------------------------


def mixed_importances() -> tuple[list[Tensor], list[Tensor | None]]:
    dtypes = (FP32, BLOCKS, BF16, BLOCKS, BF16, FP32)
    shapes = ((70, 64), (3, 100), (9000,), (75, 128), (3, 5), ())
    pairs = [
        stored(lock.with_lock(values_of(shape, True).abs(), torch.rand(shape) < 0.3), dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    return [tensor for tensor, _ in pairs], [own for _, own in pairs]


@pytest.mark.parametrize("keep_finite", [True, False])
@pytest.mark.parametrize("due", [None, 1.0, 0.0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_importance(backend: str, keep_finite: bool, due: float | None, dtype: torch.dtype) -> None:
    importances, scales = mixed_importances()
    grads = [None if i == 4 else values_of(s.shape, True).to(dtype) for i, s in enumerate(importances)]
    count = len(importances)
    betas = torch.tensor([(beta, 1 - beta) for beta in torch.rand(count).tolist()], dtype=torch.float64)
    layers = [i % 3 for i in range(count)]
    places = [
        Place(key_of(0, str(i)), 7 * i, 50, i % 2 * 11, max(1, s.shape[1:].numel())) for i, s in enumerate(importances)
    ]
    steps = torch.arange(1, count + 1, dtype=torch.float32)
    factor = torch.tensor(0.3) if dtype == BF16 else None
    results = []
    for name in (backend, "reference"):
        mine, own = ([None if t is None else t.clone() for t in ts] for ts in (importances, scales))
        ranges = torch.tensor([[math.inf, -math.inf]] * 3)
        nonfinite = torch.zeros(count, dtype=torch.int64)
        device = torch.device("cpu")
        prepared = ops.prepared_importance(mine, grads, betas, layers, 3, keep_finite, device, name, own, places)
        flag = None if due is None else torch.tensor(due)
        prepared.advance_(mine, grads, ranges, nonfinite, factor, flag, own, steps)
        results.append({"S": mine, "scales": own, "ranges": [ranges], "nonfinite": [nonfinite.int()]})
    assert_same_bits(*results, locks="S")


@pytest.mark.parametrize("normalize", [True, False])
def test_histogram_and_lock(backend: str, normalize: bool) -> None:
    importances, scales = mixed_importances()
    count = len(importances)
    layers, budgets = [i % 3 for i in range(count)], [i % 2 for i in range(count)]
    ranges = torch.tensor([[0.0, 9.0], [1e-4, 1.0], [0.0, 4.0]]) if normalize else None
    rows = None if ranges is None else 3
    device = torch.device("cpu")
    results = []
    for name in (backend, "reference"):
        mine = [t.clone() for t in importances]
        histogram = ops.prepared_histogram(mine, layers, rows, budgets, 2, device, name, scales)
        selection = torch.tensor([[0, 5], [0, 100]])
        digits = histogram.count(mine, ranges, selection, 19, 4096, None, scales).sum(0)
        locking = ops.prepared_lock(mine, layers, rows, budgets, 2, device, name, scales)
        counts = locking.lock_(mine, ranges, torch.tensor([1e-3, 0.01]), None, scales)
        results.append({"S": mine, "digits": [digits.int()], "counts": [counts.int()]})
    assert_same_bits(*results, locks="S")
    assert results[0]["counts"][0].sum(0).min() > 0
