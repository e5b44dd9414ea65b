"""One step of a rule in which locked entries do not move, in Triton: one launch for all tensors of a pair of dtypes."""

from collections import Counter
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import advanced_importance, bits_of, is_finite, is_locked, magnitude, with_lock
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.slots import (
    IMPORTANCE_BETA,
    ONE_MINUS_IMPORTANCE_BETA,
    SIGN,
    STEP,
    addresses_of,
    constants_of,
    packed,
    place_in,
    read_slots,
    rounding_of,
    row_of,
    rule_scalars,
    storage,
    twin_of,
    write_slots,
)
from epi_kernels.ops.stored import (
    BLOCK8,
    FLOAT32,
    has_blocks,
    is_ragged,
    read_stored,
    stored_weight,
    tile_at,
    write_stored,
)
from epi_kernels.ops.table import Table, on_device, row_length, size_in_tiles
from epi_kernels.ops.tensors import Tensors
from epi_kernels.ops.tiles import Budget, Variant, left_of, located, pointer, read, words, write
from epi_kernels.rules import RULES, Rule
from epi_kernels.schema import LOCK_IN as LOCKS
from epi_kernels.schema import SWEEP
from epi_kernels.storage import CODES, STORAGES
from epi_kernels.storage.block8 import BLOCK8 as OF_BLOCK8
from epi_kernels.storage.noise_triton import OF_IMPORTANCE, begun, has_gaps, mixed
from epi_kernels.storage.split_triton import joined

_WIDTH = tl.constexpr(len(SWEEP.words))
_PARAM, _GRAD, _FIRST_SLOT, _LOCK, _SCALARS, _ALIGNED = words(
    SWEEP, "param", "grad", "slots", "lock", "scalars", "aligned"
)
_FIRST_SCALES, _LOCK_SCALES, _REST, _PLACE, _ROW = words(SWEEP, "scales", "lock_scales", "rest", "key", "row")

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
    STORAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    REQUIRED: tl.constexpr,
    OPTIONAL: tl.constexpr,
    IMPORTANCE_SLOT: tl.constexpr,
    SCALARS: tl.constexpr,
    LOCK_IN: tl.constexpr,
    ADVANCED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LOCK_STORAGE: tl.constexpr = FLOAT32,
    REST: tl.constexpr = 0,
    STOCHASTIC: tl.constexpr = False,
    NOISE: tl.constexpr = False,
):
    """Step one chunk of one tensor.

    rows: int64 [tensors, words of SWEEP]. scalars: float32 [.., m], see `epi_kernels.schema`. nonfinite: int64
    [tensors]. refreshed, grad_factor, found_inf: float32, or None. If refreshed is given, it replaces ADVANCED: not 0
    means True. UPDATE to SCALARS: from `constants_of`. LOCK_STORAGE: that of importances in tensors of their own. REST:
    the bits of the rests of the weights, 16 or 8, or 0. STOCHASTIC: whether weights are rounded stochastically, NOISE:
    whether anything is.
    """
    tensor, start = located(chunks, tl.program_id(0), BLOCK * TILES)
    row = rows + tensor * _WIDTH
    s = row_of(scalars, tl.load(row + _SCALARS), SCALARS)
    left = left_of(row, start, BLOCK * TILES)
    full = (left == BLOCK * TILES) & (tl.load(row + _ALIGNED) != 0)
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) == 0, left, 0)
    tiles = tl.cdiv(left, BLOCK)
    blocks: tl.constexpr = has_blocks(STORAGES) or LOCK_STORAGE == BLOCK8
    if blocks:
        full = full & (is_ragged(row + _ROW) == 0)
    noise = None
    if NOISE:
        step = tl.load(s + STEP)
        full = full & (has_gaps(row + _PLACE) == 0)
        noise = begun(row + _PLACE, step, start)
    bad = tl.zeros([BLOCK // 4], tl.int32)
    if full:
        held = None
        if not (OPTIONAL or NOISE):
            # with more slots, or with noise, there are no registers left to hold them
            held = _addresses(row, SLOTS)
        for tile in range(tiles):
            bad += _step_tile(
                row, s, held, refreshed, grad_factor, start, tile * BLOCK, left, noise, PARAM, GRAD, UPDATE, STORAGES,
                SLOTS, REQUIRED, OPTIONAL, IMPORTANCE_SLOT, SCALARS, LOCK_IN, ADVANCED, LOCK_STORAGE, REST, STOCHASTIC,
                blocks, BLOCK, TILES, True,
            )  # fmt: skip
    else:
        for tile in range(tiles):
            bad += _step_tile(
                row, s, None, refreshed, grad_factor, start, tile * BLOCK, left, noise, PARAM, GRAD, UPDATE, STORAGES,
                SLOTS, REQUIRED, OPTIONAL, IMPORTANCE_SLOT, SCALARS, LOCK_IN, ADVANCED, LOCK_STORAGE, REST, STOCHASTIC,
                blocks, BLOCK, TILES, False,
            )  # fmt: skip
    if (LOCK_IN == _IMPORTANCE or LOCK_IN == _SLOT) and not ADVANCED:
        count = tl.sum(bad)
        if count > 0:
            if not NOISE:
                # read again: keeping the number through the loops took a register more than there are. With noise,
                # which needs others there, it is the other way round
                tensor, start = located(chunks, tl.program_id(0), BLOCK * TILES)
            tl.atomic_add(nonfinite + tensor, count.to(tl.int64), sem="relaxed")


@triton.jit
def _addresses(row, SLOTS: tl.constexpr):
    """Return the addresses of parameter, gradient, lock and rest, and those of the slots as a tuple."""
    return (
        tl.load(row + _PARAM),
        tl.load(row + _GRAD),
        tl.load(row + _LOCK),
        tl.load(row + _REST),
        addresses_of(row + _FIRST_SLOT, SLOTS),
    )


@triton.jit
def _scaled(grad, s, grad_factor, at, left, FULL: tl.constexpr):
    """Return a tile of gradients times their sign and factor, float32."""
    factor = tl.load(s + SIGN)
    if grad_factor is not None:
        factor *= tl.load(grad_factor)
    grad = grad.to(tl.float32) * factor
    if grad_factor is not None and not FULL:
        # past the end zeros are read, and 0 times a factor that is not finite is NaN, which would be counted
        grad = tl.where(at < left, grad, 0.0)
    return grad


@triton.jit
def _step_tile(
    row, s, held, refreshed, grad_factor, start, first, left, noise,
    PARAM: tl.constexpr, GRAD: tl.constexpr, UPDATE: tl.constexpr, STORAGES: tl.constexpr,
    SLOTS: tl.constexpr, REQUIRED: tl.constexpr, OPTIONAL: tl.constexpr, IMPORTANCE_SLOT: tl.constexpr,
    SCALARS: tl.constexpr, LOCK_IN: tl.constexpr, ADVANCED: tl.constexpr, LOCK_STORAGE: tl.constexpr,
    REST: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Step the tile at position `first` of the chunk; return how many squared gradients are not finite.

    row, s: pointers to the rows of the table and of the scalars. held: the addresses, or None: they are read from the
    table for each tile. The counts are int32 [BLOCK // 4], each of the 4 entries of a thread: a count for each entry
    takes 3 registers more.
    """
    addresses = held
    if held is None:
        addresses = _addresses(row, SLOTS)
    param_address, grad_address, lock, rest_address, slot_addresses = addresses
    where = tile_at(row + _ROW, start, first, left, BLOCK, FULL, BLOCKS)
    start, at, left, _block, _blocks = where
    lockable = lock != 0

    # all reads come before the first branch or write, or later reads would wait for the arithmetic
    param, rest = read(pointer(param_address, start, PARAM), at, left, FULL), None
    if REST != 0:
        rest = read(pointer(rest_address, start, tl.int16 if REST == 16 else tl.int8), at, left, FULL)
    stored_grad = read(pointer(grad_address, start, GRAD), at, left, FULL)
    kept = read_slots(
        slot_addresses, row + _FIRST_SCALES, where, STORAGES, SLOTS, REQUIRED, OPTIONAL, BLOCK, FULL, False
    )
    importance = tl.zeros([BLOCK], tl.float32)
    locked = tl.zeros([BLOCK], tl.int1)
    if LOCK_IN == _IMPORTANCE:
        importance = read_stored(lock, row + _LOCK_SCALES, where, LOCK_STORAGE, BLOCK, FULL, False, lockable)
    if LOCK_IN == _STATIC:
        if lockable:
            locked = read(pointer(lock, start, tl.int8), at, left, FULL) < 0

    # an importance that does not advance is not written either: it would be rounded a second time
    advances = lockable
    if refreshed is not None:
        advances = lockable & (tl.load(refreshed) == 0)
    bad = tl.zeros([BLOCK], tl.int32)
    shared = None
    if noise is not None:
        grad = _scaled(stored_grad, s, grad_factor, at, left, FULL)
        shared = mixed(noise, row + _PLACE, tl.load(s + STEP), start, at, left, bits_of(grad), BLOCK * TILES, FULL)

    # advance the importance, which is in a tensor of its own or in a slot
    beta, one_minus_beta = tl.load(s + IMPORTANCE_BETA), tl.load(s + ONE_MINUS_IMPORTANCE_BETA)
    if LOCK_IN == _IMPORTANCE:
        if not ADVANCED:
            if advances:
                if noise is None:
                    # multiplied here and once more below: before this branch, the product would wait for the gradient
                    # while not all reads were issued
                    grad = _scaled(stored_grad, s, grad_factor, at, left, FULL)
                bad += tl.where(is_finite(grad * grad) == 0, 1, 0)
                write_stored(
                    lock,
                    row + _LOCK_SCALES,
                    where,
                    advanced_importance(importance, grad, beta, one_minus_beta, True),
                    shared,
                    LOCK_STORAGE,
                    OF_IMPORTANCE,
                    False,
                    BLOCK,
                    FULL,
                    False,
                )
        locked = is_locked(importance)
    if noise is None:
        grad = _scaled(stored_grad, s, grad_factor, at, left, FULL)
    if LOCK_IN == _SLOT and not ADVANCED:
        bad += tl.where(advances & (is_finite(grad * grad) == 0), 1, 0)
    slots = ()
    for k in tl.static_range(SLOTS):
        value = kept[k]
        if k == IMPORTANCE_SLOT:
            if LOCK_IN == _SLOT:
                locked = lockable & is_locked(value)
                if not ADVANCED:
                    value = tl.where(advances, advanced_importance(value, grad, beta, one_minus_beta, False), value)
            # a slot that does not serve as the importance may have lock bits from a time when it did
            value = magnitude(value)
        slots = slots + (value,)

    given = None
    if LOCK_IN == _SLOT:
        given = lockable
    if REST == 0:
        weight = param.to(tl.float32)
    else:
        weight = joined(param, rest, REST)
    theta, slots = UPDATE(weight, grad, slots, rule_scalars(s, SCALARS), given, OPTIONAL)

    # a choice between bits, never a product with 0: 0 * inf is NaN
    theta, left_over = stored_weight(theta, param, rest, shared, PARAM, REST, STOCHASTIC)
    if held is None:
        # read again: keeping them since the reads took up to 7 registers more than allowed
        param_address, _grad, _lock, rest_address, slot_addresses = _addresses(row, SLOTS)
    if REST != 0:
        if LOCK_IN != _NONE:
            left_over = tl.where(locked, rest, left_over)
        write(pointer(rest_address, start, tl.int16 if REST == 16 else tl.int8), at, left_over, left, FULL)
    if LOCK_IN != _NONE:
        theta = tl.where(locked, param, theta)
    write(pointer(param_address, start, PARAM), at, theta, left, FULL)
    stored = ()
    for k in tl.static_range(SLOTS):
        value = slots[k]
        if LOCK_IN == _SLOT and k == IMPORTANCE_SLOT:
            value = with_lock(value, locked)
        stored = stored + (value,)
    keeps = None
    if LOCK_IN == _SLOT and ADVANCED:
        keeps = lockable
    elif LOCK_IN == _SLOT and refreshed is not None:
        keeps = lockable & (tl.load(refreshed) != 0)
    write_slots(
        slot_addresses, row + _FIRST_SCALES, where, stored, shared, keeps, STORAGES, SLOTS, REQUIRED, OPTIONAL,
        IMPORTANCE_SLOT, BLOCK, FULL, False,
    )  # fmt: skip
    return tl.sum(tl.reshape(bad, [BLOCK // 4, 4]), 1)


def _variant(rule: Rule, budget: Budget) -> Variant:
    """Return a variant that reads p, g and the slots and writes p and the slots, plus the accesses for the lock."""
    advanced = budget.changes.get("ADVANCED", False)
    param, grad = getattr(tl, budget.param), getattr(tl, budget.grad)
    param_bits, grad_bits = (min(128, 4 * dtype.primitive_bitwidth) for dtype in (param, grad))
    reads, writes = Counter([param_bits, grad_bits]), Counter([param_bits])
    size = param_bits / 16 + grad_bits / 32 + budget.rest / 4
    if budget.rest:
        reads[4 * budget.rest] += 1
        writes[4 * budget.rest] += 1
    state = next(storage for storage in STORAGES if storage.name == budget.state)
    # a scale is an access of its own, for one thread in 16
    of_state = [32, 32] if state is OF_BLOCK8 else [32 * int(state.bytes)]
    states = len(rule.slots) if budget.optional else rule.required
    for _ in range(states):
        reads.update(of_state)
        writes.update(of_state)
        size += 2 * state.bytes
    if budget.lock_in == "importance":
        reads.update(of_state)
        writes.update([] if advanced else of_state)
        size += state.bytes * (1 if advanced else 2)
    if budget.lock_in == "static":
        reads[32] += 1
        size += 1
    storages = sum(CODES[state.dtype] << 4 * k for k in range(states))
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
        **constants_of(rule, budget.optional, storages),
        "LOCK_IN": LOCKS.index(budget.lock_in),
        "ADVANCED": False,
        "LOCK_STORAGE": CODES[state.dtype],
        "REST": budget.rest,
        "STOCHASTIC": budget.stochastic,
        "NOISE": budget.stochastic or storages != 0,
        **budget.changes,
    }
    return Variant(
        budget.name, sweep_kernel, arguments, size, budget.instructions, reads, writes, budget.registers,
        budget.late_reads,
    )  # fmt: skip


VARIANTS = tuple(_variant(rule, budget) for rule in RULES for budget in twin_of(rule).SWEEPS)


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_sweep`."""

    def __init__(self, rule: Rule, tensors: Tensors, lock_in: str, lockable: Sequence[bool]) -> None:
        params, grads = tensors.params, tensors.grads
        storages, lock_storage = packed(rule, tensors.slots), storage([] if lock_in == "static" else tensors.locks)
        rest_bits, stochastic, noise = rounding_of(tensors, storages | lock_storage)
        blocks = has_blocks(storages) or lock_storage == BLOCK8.value
        self._row_major = noise or blocks
        flat = Flat(written=list(tensors.written()), read=[grads], row_major=self._row_major)
        self._strided = flat.strided
        self._device = params[0].device
        sizes = [size_in_tiles(param, tiles.BLOCK) if blocks else param.numel() for param in params]
        self.table = Table(SWEEP.words, sizes, tiles.CHUNK, self._device)
        self._words = {slot.name: f"slots[{i}]" for i, slot in enumerate(rule.slots)}
        self._scales = {slot.name: f"scales[{i}]" for i, slot in enumerate(rule.slots)}
        self._point(tensors, flat)
        if lock_in == "slot":
            self.table.set("lock", lockable)
        if noise:
            place_in(self.table, tensors.places)
        if blocks:
            self.table.set("row", [row_length(param) for param in params])
        self._constants = {
            "PARAM": tiles.DTYPES[params[0].dtype],
            "GRAD": tiles.DTYPES[grads[0].dtype],
            **constants_of(rule, tensors.has_optional(rule), storages),
            "LOCK_IN": LOCKS.index(lock_in),
            "BLOCK": tiles.BLOCK,
            "TILES": tiles.TILES,
            "LOCK_STORAGE": lock_storage,
            "REST": rest_bits,
            "STOCHASTIC": stochastic,
            "NOISE": noise,
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
        table, flat, grads = self.table, None, tensors.grads
        if moved or self._strided:  # the copies have new addresses in each step
            written = list(tensors.written())
            flat = Flat(written=written, read=[grads], strided=self._strided, row_major=self._row_major)
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
        params, *slots, locks, rests = flat.written
        columns = {"param": params, "lock": locks, "rest": rests, "lock_scales": tensors.lock_scales}
        columns |= {self._words[name]: of_slot for name, of_slot in zip(tensors.slots, slots, strict=True)}
        columns |= {self._scales[name]: of_slot for name, of_slot in tensors.scales.items()}
        for word, of_word in columns.items():
            if any(tensor is not None for tensor in of_word):
                self.table.point(word, of_word)
