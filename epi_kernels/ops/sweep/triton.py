"""One step of a rule in which locked entries do not move, in Triton: one launch for all tensors of a pair of dtypes."""

from collections import Counter
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import advanced_importance, is_finite, is_locked, magnitude, with_lock
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.slots_triton import (
    IMPORTANCE_BETA,
    ONE_MINUS_IMPORTANCE_BETA,
    SIGN,
    constants_of,
    read_slots,
    row_of,
    rule_scalars,
    twin_of,
    write_slots,
)
from epi_kernels.ops.table import Table, on_device
from epi_kernels.ops.tensors import Tensors
from epi_kernels.ops.tiles import Budget, Variant, left_of, located, pointer, read, words, write
from epi_kernels.rules import RULES, Rule
from epi_kernels.schema import LOCK_IN as LOCKS
from epi_kernels.schema import SWEEP
from epi_kernels.storage import FLOAT32

_WIDTH = tl.constexpr(len(SWEEP.words))
_PARAM, _GRAD, _FIRST_SLOT, _LOCK, _SCALARS, _ALIGNED = words(
    SWEEP, "param", "grad", "slots", "lock", "scalars", "aligned"
)

_NONE, _IMPORTANCE, _SLOT, _STATIC = (
    tl.constexpr(LOCKS.index(name)) for name in ("none", "importance", "slot", "static")
)


@triton.jit
def sweep_kernel(
    rows,
    chunks,
    scalars,
    nonfinite,
    refreshed,
    grad_factor,
    found_inf,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    UPDATE: tl.constexpr,
    LOAD: tl.constexpr,
    STORE: tl.constexpr,
    SLOTS: tl.constexpr,
    REQUIRED: tl.constexpr,
    OPTIONAL: tl.constexpr,
    IMPORTANCE_SLOT: tl.constexpr,
    SCALARS: tl.constexpr,
    LOCK_IN: tl.constexpr,
    ADVANCED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Step one chunk of one tensor.

    rows: int64 [tensors, words of SWEEP]. scalars: float32 [.., m], see `epi_kernels.schema`. nonfinite: int64
    [tensors]. refreshed, grad_factor, found_inf: float32, or None. If refreshed is given, it replaces ADVANCED: not 0
    means True. UPDATE to SCALARS: from `constants_of`.
    """
    tensor, start = located(chunks, BLOCK * TILES)
    row = rows + tensor * _WIDTH
    left = left_of(row, start, BLOCK * TILES)
    full = (left == BLOCK * TILES) & (tl.load(row + _ALIGNED) != 0)
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) == 0, left, 0)
    tiles = tl.cdiv(left, BLOCK)
    bad = tl.zeros([BLOCK], tl.int32)
    if full:
        for tile in range(tiles):
            bad += _step_tile(
                row, scalars, refreshed, grad_factor, start, tile * BLOCK, left, PARAM, GRAD, UPDATE, LOAD, STORE,
                SLOTS, REQUIRED, OPTIONAL, IMPORTANCE_SLOT, SCALARS, LOCK_IN, ADVANCED, BLOCK, True,
            )  # fmt: skip
    else:
        for tile in range(tiles):
            bad += _step_tile(
                row, scalars, refreshed, grad_factor, start, tile * BLOCK, left, PARAM, GRAD, UPDATE, LOAD, STORE,
                SLOTS, REQUIRED, OPTIONAL, IMPORTANCE_SLOT, SCALARS, LOCK_IN, ADVANCED, BLOCK, False,
            )  # fmt: skip
    if (LOCK_IN == _IMPORTANCE or LOCK_IN == _SLOT) and not ADVANCED:
        count = tl.sum(bad)
        if count > 0:
            tl.atomic_add(nonfinite + tensor, count.to(tl.int64), sem="relaxed")


@triton.jit
def _step_tile(
    row, scalars, refreshed, grad_factor, start, first, left,
    PARAM: tl.constexpr, GRAD: tl.constexpr, UPDATE: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr,
    SLOTS: tl.constexpr, REQUIRED: tl.constexpr, OPTIONAL: tl.constexpr, IMPORTANCE_SLOT: tl.constexpr,
    SCALARS: tl.constexpr, LOCK_IN: tl.constexpr, ADVANCED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Step the tile at entry `first` of the chunk; return where the squared gradient is not finite, int32 0 or 1."""
    s = row_of(scalars, tl.load(row + _SCALARS), SCALARS)
    at = first + tl.arange(0, BLOCK)
    param_at = pointer(tl.load(row + _PARAM), start, PARAM)
    lock = tl.load(row + _LOCK)
    importance_at = pointer(lock, start, tl.float32)
    lockable = lock != 0

    # all reads come before the first write, or later reads would wait for the arithmetic
    param = read(param_at, at, left, FULL)
    grad = read(pointer(tl.load(row + _GRAD), start, GRAD), at, left, FULL).to(tl.float32)
    kept = read_slots(row + _FIRST_SLOT, start, at, left, LOAD, SLOTS, REQUIRED, OPTIONAL, BLOCK, FULL, False)
    importance = tl.zeros([BLOCK], tl.float32)
    locked = tl.zeros([BLOCK], tl.int1)
    if LOCK_IN == _IMPORTANCE:
        if lockable:
            importance = read(importance_at, at, left, FULL)
    if LOCK_IN == _STATIC:
        if lockable:
            locked = read(pointer(lock, start, tl.int8), at, left, FULL) < 0

    factor = tl.load(s + SIGN)
    if grad_factor is not None:
        factor *= tl.load(grad_factor)
    grad *= factor
    if not FULL and grad_factor is not None:
        # past the end zeros are read, and 0 times a factor that is not finite is NaN, which would be counted
        grad = tl.where(at < left, grad, 0.0)
    bad = tl.zeros([BLOCK], tl.int32)
    if (LOCK_IN == _IMPORTANCE or LOCK_IN == _SLOT) and not ADVANCED:
        counted = lockable
        if refreshed is not None:
            counted = lockable & (tl.load(refreshed) == 0)
        bad += tl.where(counted & (is_finite(grad * grad) == 0), 1, 0)

    # advance the importance, which is in a tensor of its own or in a slot
    beta, one_minus_beta = tl.load(s + IMPORTANCE_BETA), tl.load(s + ONE_MINUS_IMPORTANCE_BETA)
    if LOCK_IN == _IMPORTANCE:
        locked = is_locked(importance)
        if not ADVANCED:
            after = advanced_importance(importance, grad, beta, one_minus_beta, True)
            if refreshed is not None:
                after = tl.where(tl.load(refreshed) == 0, after, importance)
            if lockable:
                write(importance_at, at, after, left, FULL)
    slots = ()
    for k in tl.static_range(SLOTS):
        value = kept[k]
        if k == IMPORTANCE_SLOT:
            if LOCK_IN == _SLOT:
                locked = lockable & is_locked(value)
                if not ADVANCED:
                    after = advanced_importance(value, grad, beta, one_minus_beta, False)
                    if refreshed is not None:
                        after = tl.where(tl.load(refreshed) == 0, after, value)
                    value = tl.where(lockable, after, value)
            # a slot that does not serve as the importance may have lock bits from a time when it did
            value = magnitude(value)
        slots = slots + (value,)

    given = None
    if LOCK_IN == _SLOT:
        given = lockable
    theta, slots = UPDATE(param.to(tl.float32), grad, slots, rule_scalars(s, SCALARS), given, OPTIONAL)
    theta = theta.to(PARAM)

    if LOCK_IN != _NONE:
        # a choice between bits, never a product with 0: 0 * inf is NaN
        theta = tl.where(locked, param, theta)
    write(param_at, at, theta, left, FULL)
    stored = ()
    for k in tl.static_range(SLOTS):
        value = slots[k]
        if LOCK_IN == _SLOT and k == IMPORTANCE_SLOT:
            value = with_lock(value, locked)
        stored = stored + (value,)
    write_slots(row + _FIRST_SLOT, start, at, stored, left, STORE, SLOTS, REQUIRED, OPTIONAL, FULL, False)
    return bad


def _variant(rule: Rule, budget: Budget) -> Variant:
    """Return a variant that reads p, g and the slots and writes p and the slots, plus the accesses for the lock."""
    advanced = budget.changes.get("ADVANCED", False)
    param, grad = getattr(tl, budget.param), getattr(tl, budget.grad)
    param_bits, grad_bits = (min(128, 4 * dtype.primitive_bitwidth) for dtype in (param, grad))
    slots = len(rule.slots) if budget.optional else rule.required
    reads, writes = Counter([param_bits, grad_bits, *[128] * slots]), Counter([param_bits, *[128] * slots])
    size = param_bits / 16 + grad_bits / 32 + 2 * FLOAT32.bytes * slots
    if budget.lock_in == "importance":
        reads[128] += 1
        writes[128] += not advanced
        size += 4 if advanced else 8
    if budget.lock_in == "static":
        reads[32] += 1
        size += 1
    arguments = {
        "rows": "*i64",
        "chunks": "*i64",
        "scalars": "*fp32",
        "nonfinite": "*i64",
        "refreshed": None,
        "grad_factor": None,
        "found_inf": None,
        "PARAM": param,
        "GRAD": grad,
        **constants_of(rule, budget.optional),
        "LOCK_IN": LOCKS.index(budget.lock_in),
        "ADVANCED": False,
        **budget.changes,
    }
    return Variant(budget.name, sweep_kernel, arguments, size, budget.instructions, reads, writes)


VARIANTS = tuple(_variant(rule, budget) for rule in RULES for budget in twin_of(rule).SWEEPS)


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_sweep`."""

    def __init__(self, rule: Rule, tensors: Tensors, lock_in: str, lockable: Sequence[bool]) -> None:
        params, grads = tensors.params, tensors.grads
        flat = Flat(written=list(tensors.written()), read=[grads])
        self._strided = flat.strided
        self._device = params[0].device
        self._table = Table(SWEEP.words, [param.numel() for param in params], tiles.CHUNK, self._device)
        self._words = {slot.name: f"slots[{i}]" for i, slot in enumerate(rule.slots)}
        self._point(tensors, flat)
        if lock_in == "slot":
            self._table.set("lock", lockable)
        self._constants = {
            "PARAM": tiles.DTYPES[params[0].dtype],
            "GRAD": tiles.DTYPES[grads[0].dtype],
            **constants_of(rule, tensors.has_optional(rule)),
            "LOCK_IN": LOCKS.index(lock_in),
            "BLOCK": tiles.BLOCK,
            "TILES": tiles.TILES,
        }

    def step_(
        self,
        tensors: Tensors,
        nonfinite: Tensor,
        scalars: Tensor,
        rows: Sequence[int],
        advanced: bool | Tensor,
        grad_factor: Tensor | None,
        found_inf: Tensor | None,
        moved: bool,
    ) -> bool:
        """Take the step."""
        table, flat, grads = self._table, None, tensors.grads
        if moved or self._strided:  # the copies have new addresses in each step
            flat = Flat(written=list(tensors.written()), read=[grads], strided=self._strided)
            self._point(tensors, flat)
            grads = flat.read[0]
        table.point("grad", grads)
        table.set("scalars", rows)
        if table.chunks.numel():
            # float32: the scalars were computed on the device, where the clocks are
            there = scalars if scalars.dtype == torch.float32 else on_device(scalars.float(), self._device)
            known, refreshed = (advanced, None) if isinstance(advanced, bool) else (False, advanced)
            tiles.launch(
                sweep_kernel,
                table.chunks.numel(),
                self._device,
                table.rows(),
                table.chunks,
                there,
                nonfinite,
                refreshed,
                grad_factor,
                found_inf,
                ADVANCED=known,
                **self._constants,
            )
        if flat is not None:
            flat.write_back()
        return True  # only the device knows

    def _point(self, tensors: Tensors, flat: Flat) -> None:
        """Write into the table the addresses of the tensors that a step writes."""
        params, *slots, locks = flat.written
        columns = {"param": params, "lock": locks}
        columns |= {self._words[name]: of_slot for name, of_slot in zip(tensors.slots, slots, strict=True)}
        for word, of_word in columns.items():
            if any(tensor is not None for tensor in of_word):
                self._table.point(word, of_word)
