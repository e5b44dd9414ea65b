"""Compact storages in every compiled backend against the reference, bit for bit.

- Steps with moments, importances and weights in any mixture of storages: every rule, lock, rounding and dtype.
- Rows with short blocks, tensors of several chunks, strided tensors, one thread and two.
- Noise is that of the entry in the whole tensor: beyond 2^32, across it, and with gaps between runs.
- Special values in gradients, states, scales, parameters and rests.
- The importance, the histogram and the lock over every storage.
- The comparison sees noise of other entries.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from agreement import GROUP, SPECIAL, differing, gradient, placed, signed
from levels import CHALLENGERS, chosen
from torch import Tensor

from epi_kernels import lock, ops
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.ops import Tensors
from epi_kernels.rules import Rule, rule_of
from epi_kernels.storage import block8
from epi_kernels.storage.noise import Place, key_of, whole

# the backends that have the compact storages
BACKENDS = [challenger for challenger in CHALLENGERS if challenger[0] != "triton"]

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8

# whole blocks, short blocks, rows of one short block, rows of one entry; the last two are of several chunks
SHAPES = [(3, 64), (5, 100), (2, 4133), (1, 1), (7, 1), (40, 9, 3), (0, 4), (1030, 65), (1100, 64)]
SMALL = SHAPES[:-2]


@pytest.fixture(params=BACKENDS, ids=lambda c: f"{c[0]} {c[1]}")
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run on one backend, native on one of its SIMD levels."""
    return chosen(request.param, monkeypatch)


@dataclass(frozen=True)
class Kind:
    """How the tensors of a step are kept."""

    param: torch.dtype = F32
    grad: torch.dtype = F32
    slots: tuple[torch.dtype, ...] = (F32, F32, F32)
    lock: torch.dtype = F32
    rest: torch.dtype | None = None
    stochastic: bool = False


KINDS = {
    "importance in bfloat16": Kind(lock=BF16),
    "importance in blocks": Kind(lock=U8),
    "moments in bfloat16": Kind(slots=(BF16, BF16, BF16), lock=BF16),
    "moments in blocks": Kind(grad=BF16, slots=(U8, U8, U8), lock=U8),
    "mixed moments": Kind(grad=F16, slots=(U8, F32, BF16), lock=BF16),
    "other mixed moments": Kind(slots=(BF16, U8, F32), lock=U8),
    "rest of 16 bits": Kind(param=BF16, rest=torch.int16, slots=(U8, U8, BF16), lock=U8),
    "rest of 8 bits": Kind(param=BF16, grad=BF16, rest=torch.int8, slots=(U8, U8, U8), lock=U8),
    "rest of 8 bits, stochastic": Kind(param=BF16, rest=torch.int8, slots=(BF16, BF16, BF16), stochastic=True),
    "bfloat16": Kind(param=BF16, grad=BF16, slots=(BF16, BF16, BF16), lock=BF16),
    "bfloat16, stochastic": Kind(param=BF16, grad=F16, slots=(U8, BF16, F32), lock=BF16, stochastic=True),
    "float16, stochastic": Kind(param=F16, grad=F16, slots=(F32, F32, F32), lock=F32, stochastic=True),
    "float32, stochastic": Kind(stochastic=True),
}


# The tensors of a step -----------------------------------------------------------------------------------------------


def special(values: Tensor, share: float = 0.03) -> Tensor:
    """Return values, some of them replaced by special ones."""
    drawn = SPECIAL[torch.randint(0, len(SPECIAL), values.shape)]
    return torch.where(torch.rand(values.shape) < share, drawn, values)


def kept(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return float32 values in a storage, and the scales of one in blocks."""
    if dtype != U8:
        return values.to(dtype), None
    return block8.encoded(values, torch.randint(0, 1 << 16, values.shape), positive=False)


def tensors_of(
    rule: Rule, kind: Kind, lock_in: str, shapes: list[tuple[int, ...]], *, amsgrad: bool = False, odd: bool = False
) -> Tensors:
    """Return the tensors of a step in the middle of a run; three in ten entries locked. `odd`: with special values."""
    change = special if odd else lambda values: values
    tensors = Tensors([], [], {}, stochastic=kind.stochastic)
    names = [slot.name for slot in rule.slots if not slot.option or amsgrad]
    for name in names:
        tensors.slots[name], tensors.scales[name] = [], []
    for i, shape in enumerate(shapes):
        tensors.params.append(change(torch.randn(shape)).to(kind.param))
        tensors.grads.append(change(gradient(shape, kind.grad).float()).to(kind.grad))
        locked = torch.rand(shape) < 0.3
        for name, dtype in zip(names, kind.slots, strict=False):
            values = change(torch.randn(shape) * 0.1 * 10 ** torch.empty(shape).uniform_(-3, 0))
            values = lock.with_lock(values**2, locked) if name == lock_in else values
            slot, scales = kept(values if "sq" not in name or name == lock_in else values**2, dtype)
            tensors.slots[name].append(slot)
            tensors.scales[name].append(scales)
        if lock_in == "static":
            tensors.locks.append(lock.static_lock(locked))
        elif lock_in == "importance":
            own, scales = kept(lock.with_lock(change(torch.rand(shape)).abs(), locked), kind.lock)
            tensors.locks.append(own)
            tensors.lock_scales.append(scales)
        if kind.rest is not None:
            limits = torch.iinfo(kind.rest)
            tensors.rests.append(torch.randint(limits.min, limits.max + 1, shape, dtype=kind.rest))
        tensors.places.append(whole(key_of(7, f"layer{i}.weight"), torch.Size(shape)))
    return tensors


def copied(tensors: Tensors) -> Tensors:
    """Return copies with the same strides."""

    def of(own: list[Tensor | None]) -> list[Tensor | None]:
        return [None if tensor is None else placed(tensor) for tensor in own]

    return Tensors(
        of(tensors.params),
        tensors.grads,
        {name: of(own) for name, own in tensors.slots.items()},
        of(tensors.locks),
        {name: of(own) for name, own in tensors.scales.items()},
        of(tensors.lock_scales),
        of(tensors.rests),
        tensors.places,
        tensors.stochastic,
    )


def stepped(tensors: Tensors, backend: str, lock_in: str, rule: Rule, **changes: Any) -> tuple[Tensors, Tensor]:
    """Return the tensors after one step, and the counts of squares that are not finite."""
    tensors, count = copied(tensors), len(tensors.params)
    nonfinite = torch.zeros(count, dtype=torch.int64)
    group = {**GROUP, **({"importance": lock_in} if lock_in == rule.importance_slot else {})}
    scalars = torch.tensor([scalars_of(rule, group, step) for step in (3, 70_001)], dtype=torch.float64)
    lockable = [lock_in != "none"] * count
    sweep = ops.prepared_sweep(rule, tensors, lock_in, lockable, backend)
    call = {"advanced": False, "grad_factor": None, "found_inf": None, "moved": False, **changes}
    sweep.step_(tensors, nonfinite, scalars, [i % 2 for i in range(count)], *call.values())
    return tensors, nonfinite


def unequal(left: Tensor | None, right: Tensor | None, *, locks: bool) -> int:
    """Return how many entries differ in a bit. Two NaNs differ only in their locks, if their sign bits are locks."""
    if left is None or right is None:
        return int(left is not right)
    if left.dtype == U8:
        nan = (left & 127 == 127) & (right & 127 == 127)
        different = ((left != right) & ~nan).sum()
    else:
        different = torch.tensor(differing(left, right))
    if locks:
        different = different.maximum((lock.is_locked(left) != lock.is_locked(right)).sum())
    return int(different)


def differences(left: Tensors, right: Tensors, lock_in: str) -> dict[str, int]:
    """Return the lists that differ, and in how many entries."""
    pairs = {"params": (left.params, right.params), "locks": (left.locks, right.locks)}
    pairs |= {"rests": (left.rests, right.rests), "lock_scales": (left.lock_scales, right.lock_scales)}
    pairs |= {name: (own, right.slots[name]) for name, own in left.slots.items()}
    pairs |= {f"scales of {name}": (own, right.scales[name]) for name, own in left.scales.items()}
    found = {}
    for name, (ours, theirs) in pairs.items():
        locks = name in ("locks", lock_in)
        found[name] = sum(unequal(one, other, locks=locks) for one, other in zip(ours, theirs, strict=True))
    return {name: count for name, count in found.items() if count}


def assert_agree(tensors: Tensors, backend: str, lock_in: str, rule: str = "adamw", **changes: Any) -> None:
    ours, counted = stepped(tensors, backend, lock_in, rule_of(rule), **changes)
    theirs, expected = stepped(tensors, "reference", lock_in, rule_of(rule), **changes)
    assert not differences(ours, theirs, lock_in)
    assert torch.equal(counted, expected)
    assert differences(ours, tensors, lock_in)  # something has moved


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize("advanced", [False, True])
def test_adamw(backend: str, kind: Kind, lock_in: str, advanced: bool) -> None:
    tensors = tensors_of(rule_of("adamw"), kind, lock_in, SMALL, amsgrad=advanced)
    assert_agree(tensors, backend, lock_in, advanced=advanced)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lock_in", ["none", "importance", "static"])
def test_lion(backend: str, kind: Kind, lock_in: str) -> None:
    assert_agree(tensors_of(rule_of("lion"), kind, lock_in, SMALL), backend, lock_in, "lion")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
def test_special_values(backend: str, kind: Kind, lock_in: str) -> None:
    tensors = tensors_of(rule_of("adamw"), kind, lock_in, SMALL, amsgrad=True, odd=True)
    tensors.places = [place._replace(key=key_of(i, "other")) for i, place in enumerate(tensors.places)]
    assert_agree(tensors, backend, lock_in, grad_factor=torch.tensor(3.7))


@pytest.mark.parametrize("name", ["moments in blocks", "rest of 8 bits", "rest of 16 bits", "bfloat16, stochastic"])
@pytest.mark.parametrize("threads", [1, 2])
def test_several_chunks_and_threads(backend: str, name: str, threads: int) -> None:
    before = torch.get_num_threads()
    tensors = tensors_of(rule_of("adamw"), KINDS[name], "importance", SHAPES)
    try:
        torch.set_num_threads(threads)
        assert_agree(tensors, backend, "importance")
    finally:
        torch.set_num_threads(before)


def test_any_codes_and_scales(backend: str) -> None:
    tensors = tensors_of(rule_of("adamw"), KINDS["moments in blocks"], "exp_avg_sq", SMALL)
    for name, of_slot in tensors.slots.items():
        for i, codes in enumerate(of_slot):
            codes.copy_(torch.randint(0, 256, codes.shape, dtype=U8))
            scales = tensors.scales[name][i]
            scales.copy_(10 ** torch.empty(scales.shape).uniform_(-40, 30))
            scales.masked_fill_(torch.rand(scales.shape) < 0.05, math.nan)
    assert_agree(tensors, backend, "exp_avg_sq")


@pytest.mark.parametrize("rest", [torch.int16, torch.int8])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
def test_every_parameter_with_every_rest(backend: str, rest: torch.dtype, stochastic: bool, lock_in: str) -> None:
    limits = torch.iinfo(rest)
    values = torch.arange(limits.min, limits.max + 1, 1 if rest == torch.int8 else 257, dtype=rest)
    halves = torch.tensor([0, 1, 127, 128, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF], dtype=torch.int16)
    halves = torch.cat([halves, halves | -0x8000])
    shape = (2 * len(halves), len(values))
    kind = replace(KINDS["rest of 8 bits"], rest=rest, stochastic=stochastic)
    tensors = tensors_of(rule_of("adamw"), kind, lock_in, [shape])
    tensors.params[0] = halves.repeat(2)[:, None].expand(shape).contiguous().view(BF16)
    tensors.rests[0] = values.expand(shape).contiguous()
    tensors.grads[0][: len(halves)] = 0
    for name in ("exp_avg",):
        tensors.slots[name][0][: len(halves)] = 0  # where nothing moves a weight
    assert_agree(tensors, backend, lock_in)


@pytest.mark.parametrize("strides", ["transposed", "cut", "channels last"])
def test_strided_tensors(backend: str, strides: str) -> None:
    shape = (6, 10, 4, 5)
    tensors = tensors_of(rule_of("adamw"), KINDS["rest of 8 bits"], "importance", [shape, (3, 100)])

    def strided(tensor: Tensor) -> Tensor:
        if strides == "channels last":
            return tensor.contiguous(memory_format=torch.channels_last)
        if strides == "cut":
            return torch.cat([tensor, tensor], 3)[..., :5]
        return tensor.transpose(0, 3).contiguous().transpose(0, 3)

    for own in (tensors.params, tensors.grads, tensors.rests, tensors.locks, *tensors.slots.values()):
        own[0] = strided(own[0])
    assert not tensors.params[0].is_contiguous()
    assert_agree(tensors, backend, "importance")


def test_memory_around_a_tensor_stays(backend: str) -> None:
    tensors = tensors_of(rule_of("adamw"), KINDS["rest of 8 bits"], "importance", [(5, 100)])
    memories = []

    def within(tensor: Tensor) -> Tensor:
        memory = torch.full((tensor.numel() + 96,), 77, dtype=tensor.dtype)
        memories.append((memory, memory.clone(), tensor.numel()))
        memory[48:-48] = tensor.reshape(-1)
        return memory[48:-48].view(tensor.shape)

    lists = (tensors.params, tensors.rests, tensors.locks, tensors.lock_scales)
    for own in (*lists, *tensors.slots.values(), *tensors.scales.values()):
        own[0] = within(own[0])
    sweep = ops.prepared_sweep(rule_of("adamw"), tensors, "importance", [True], backend)
    scalars = torch.tensor([scalars_of(rule_of("adamw"), GROUP, 3)], dtype=torch.float64)
    sweep.step_(tensors, torch.zeros(1, dtype=torch.int64), scalars, [0], False, None, None, False)
    for memory, before, size in memories:
        assert torch.equal(memory[:48], before[:48])
        assert torch.equal(memory[48 + size :], before[48 + size :])


def test_without_places_bfloat16_is_rounded_to_nearest(backend: str) -> None:
    tensors = tensors_of(rule_of("adamw"), KINDS["bfloat16"], "importance", SMALL)
    noisy = stepped(tensors, backend, "importance", rule_of("adamw"))[0]
    tensors.places = []
    assert_agree(tensors, backend, "importance")
    nearest = stepped(tensors, backend, "importance", rule_of("adamw"))[0]
    assert set(differences(noisy, nearest, "importance")) == {"exp_avg", "exp_avg_sq", "locks"}


# Places --------------------------------------------------------------------------------------------------------------

BEYOND = 1 << 32

PLACES = {
    "beyond 2^32": (5 * BEYOND + 123, 1 << 40, 0),
    "across 2^32": (BEYOND - 150, 1 << 40, 0),
    "across 2^32 at a run's end": (3 * BEYOND - 2500, 2500, 7),
    "short runs": (17, 3, 5),
    "long runs": (BEYOND - 20_000, 1500, 700),
    "runs farther apart than 2^32": (0, 700, 3 * BEYOND + 1),
}


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", ["moments in blocks", "rest of 8 bits, stochastic", "float16, stochastic"])
def test_places(backend: str, name: str, where: tuple[int, int, int]) -> None:
    tensors = tensors_of(rule_of("adamw"), KINDS[name], "exp_avg_sq", SMALL)
    first, run, gap = where
    tensors.places = [place._replace(first=first, run=run, gap=gap) for place in tensors.places]
    assert_agree(tensors, backend, "exp_avg_sq")


@pytest.mark.parametrize("change", [{"first": 0}, {"run": 501}, {"gap": 8}, {"key": 1}], ids=str)
def test_the_comparison_sees_another_place(backend: str, change: dict[str, int]) -> None:
    rule, shape = rule_of("adamw"), (20, 100)
    tensors = tensors_of(rule, KINDS["rest of 8 bits, stochastic"], "importance", [shape])
    tensors.lock_scales = []
    place = Place(key_of(0, "w"), 1000, 500, 7, 100)
    tensors.places = [place._replace(**change)]
    ours = stepped(tensors, backend, "importance", rule)[0]
    tensors.places = [place]
    assert set(differences(ours, stepped(tensors, "reference", "importance", rule)[0], "importance")) >= {
        "exp_avg", "exp_avg_sq", "rests",
    }  # fmt: skip


# Trainable entries ---------------------------------------------------------------------------------------------------

GATHERED = {
    name: kind for name, kind in KINDS.items() if U8 not in kind.slots or name in ("rest of 16 bits", "rest of 8 bits")
}


@pytest.mark.parametrize("kind", GATHERED.values(), ids=GATHERED)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
@pytest.mark.parametrize("width", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("odd", [False, True])
def test_gather(backend: str, kind: Kind, rule: str, width: torch.dtype, layout: str, odd: bool) -> None:
    of, shapes = rule_of(rule), [(3, 64), (50, 40), (100, 33)]
    kind = replace(kind, slots=tuple(BF16 if dtype == U8 else dtype for dtype in kind.slots))
    tensors = tensors_of(of, kind, "none", shapes, amsgrad=True, odd=odd)
    indices = [torch.rand(math.prod(shape)).lt(0.6).nonzero()[:, 0].to(width) for shape in shapes]
    for own in (*tensors.slots.values(), tensors.rests):
        own[:] = [tensor.view(-1)[chosen.long()].clone() for tensor, chosen in zip(own, indices, strict=False)]
    if layout == "transposed":
        tensors.params = [param.t().contiguous().t() for param in tensors.params]
    tensors.places = [
        place._replace(first=BEYOND - 700, run=run, gap=gap)
        for place, run, gap in zip(tensors.places, (1 << 30, 64, 1000), (0, 5, BEYOND), strict=True)
    ]
    scalars = torch.tensor([scalars_of(of, GROUP, step) for step in (3, 70_001)], dtype=torch.float64)
    after = {}
    for name in (backend, "reference"):
        after[name] = copied(tensors)
        ops.prepared_gather(of, after[name], indices, name).step_(after[name], indices, scalars, [0, 1, 0])
    assert not differences(after[backend], after["reference"], "none")
    assert differences(after[backend], tensors, "none")


# Importance and lock -------------------------------------------------------------------------------------------------


def importances(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return signed importances over forty decades, and their scales."""
    own = [kept(signed(shape), dtype) for shape in shapes]
    if dtype == U8:  # the scales of blocks over all decades, too
        for _, scales in own:
            scales.mul_(10 ** torch.empty(scales.shape).uniform_(-10, 3))
    return [tensor for tensor, _ in own], [scales for _, scales in own]


@pytest.mark.parametrize("dtype", [F32, BF16, U8], ids=str)
@pytest.mark.parametrize("keep_finite", [False, True])
@pytest.mark.parametrize("clocks", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ranged", [False, True])
def test_importance(
    backend: str, dtype: torch.dtype, keep_finite: bool, clocks: bool, threads: int, ranged: bool
) -> None:
    if dtype == U8 and not clocks:
        pytest.skip("blocks are always rounded stochastically")
    own, scales = importances(dtype, SHAPES)
    grads = [special(gradient(shape)).to((F32, BF16, F16)[i % 3]) for i, shape in enumerate(SHAPES)]
    grads[1] = None
    places = [whole(key_of(i, "w"), torch.Size(shape)) for i, shape in enumerate(SHAPES)]
    places[2] = places[2]._replace(first=BEYOND - 900, run=4133, gap=1 << 33)
    layers = [i % 4 for i in range(len(SHAPES))]
    betas = torch.tensor([[0.9 + i / 100, 0.1 - i / 100] for i in range(len(SHAPES))], dtype=torch.float64)
    steps = 3.0 + torch.arange(len(SHAPES)) if clocks else None
    results = {}
    before = torch.get_num_threads()
    for name in (backend, "reference"):
        torch.set_num_threads(threads)
        copies = [placed(tensor) for tensor in own], [None if t is None else placed(t) for t in scales]
        ranges = torch.tensor([[math.inf, -math.inf]] * 4)
        wanted = ranges if ranged or name == "reference" else None
        nonfinite = torch.zeros(len(SHAPES), dtype=torch.int64)
        advance = ops.prepared_importance(
            copies[0], grads, betas, layers, 4, keep_finite, torch.device("cpu"), name, copies[1], places
        )
        for _ in range(2):
            advance.advance_(copies[0], grads, wanted, nonfinite, torch.tensor(0.7), None, copies[1], steps)
        results[name] = (*copies, ranges, nonfinite)
        torch.set_num_threads(before)
    ours, theirs = results[backend], results["reference"]
    for i in range(len(SHAPES)):
        assert not unequal(ours[0][i], theirs[0][i], locks=True), SHAPES[i]
        assert not unequal(ours[1][i], theirs[1][i], locks=False), SHAPES[i]
    assert not ranged or not differing(ours[2], theirs[2])
    assert torch.equal(ours[3], theirs[3])


@pytest.mark.parametrize("dtype", [F32, BF16, U8], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_histogram_and_lock(backend: str, dtype: torch.dtype, normalize: bool, layout: str) -> None:
    own, scales = importances(dtype, SHAPES)
    if layout == "transposed":
        own = [t.transpose(0, t.dim() - 1).contiguous().transpose(0, t.dim() - 1) for t in own]
    layers, budgets = ([i % n for i in range(len(SHAPES))] for n in (3, 2))
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [0.5, 0.5]]) if normalize else None
    selection = torch.tensor([[0, 500], [0, 20]])
    device, rows = torch.device("cpu"), None if ranges is None else 3
    counts = {}

    for name in (backend, "reference"):
        histogram = ops.prepared_histogram(own, layers, rows, budgets, 2, device, name, scales)
        found, counts[name] = selection.clone(), []
        for shift, bins in ((19, 4096), (9, 1024), (0, 512)):
            one = histogram.count(own, ranges, found, shift, bins, None, scales)
            thresholds = ops.select_digit_(one, found, shift, "reference")
            counts[name].append(one.sum(0))
    assert all(torch.equal(one, other) for one, other in zip(counts[backend], counts["reference"], strict=True))
    assert counts[backend][2].sum() > 0

    after = {}
    for name in (backend, "reference"):
        copies = [placed(tensor) for tensor in own]
        locks = ops.prepared_lock(copies, layers, rows, budgets, 2, device, name, scales)
        after[name] = copies, locks.lock_(copies, ranges, thresholds, None, scales)
    assert torch.equal(after[backend][1], after["reference"][1])
    assert after[backend][1][:, 0].sum() >= 20
    for one, other, was in zip(after[backend][0], after["reference"][0], own, strict=True):
        assert not unequal(one, other, locks=True)
        assert not unequal(lock.magnitude(one), lock.magnitude(was), locks=False)
