"""One step of a rule over trainable entries in Triton: gather, step and scatter, one launch for all tensors."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops import tiles
from epi_kernels.ops.equations_triton import magnitude
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.gather.offsets import Offsets
from epi_kernels.ops.slots import (
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
    twin_of,
    write_slots,
)
from epi_kernels.ops.stored import stored_weight
from epi_kernels.ops.table import Table, on_device
from epi_kernels.ops.tensors import Tensors
from epi_kernels.ops.tiles import Budget, Variant, left_of, located, read, scattered, words, write
from epi_kernels.rules import RULES, Rule
from epi_kernels.schema import GATHER
from epi_kernels.storage import CODES, STORAGES
from epi_kernels.storage.noise_triton import mixed_at
from epi_kernels.storage.split_triton import joined

_WIDTH = tl.constexpr(len(GATHER.words))
_PARAM, _GRAD, _PARAM_OFFSETS, _GRAD_OFFSETS, _FIRST_SLOT, _SCALARS = words(
    GATHER, "param", "grad", "param_offsets", "grad_offsets", "slots", "scalars"
)
_REST, _POSITIONS, _PLACE = words(GATHER, "rest", "positions", "key")

# A tile waits for its offsets, then for the entries at these offsets. A chunk of several tiles would wait for one tile
# after the other, and few entries would then leave most of a GPU idle.
TILES = 1


@triton.jit
def gather_kernel(
    rows,
    chunks,
    scalars,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    OFFSET: tl.constexpr,
    UPDATE: tl.constexpr,
    STORAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    REQUIRED: tl.constexpr,
    OPTIONAL: tl.constexpr,
    IMPORTANCE_SLOT: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    REST: tl.constexpr = 0,
    STOCHASTIC: tl.constexpr = False,
    NOISE: tl.constexpr = False,
):
    """Step one chunk of the trainable entries of one tensor.

    rows: int64 [tensors, words of GATHER]. scalars: float32 [.., m], see `epi_kernels.schema`. OFFSET: int32 or
    int64. UPDATE to SCALARS: from `constants_of`. REST to NOISE: as in the sweep.
    """
    tensor, start = located(chunks, tl.program_id(0), BLOCK * TILES)
    row = rows + tensor * _WIDTH
    s = row_of(scalars, tl.load(row + _SCALARS), SCALARS)
    left = left_of(row, start, BLOCK * TILES)
    param_at = tl.load(row + _PARAM).to(tl.pointer_type(PARAM))
    grad_at = tl.load(row + _GRAD).to(tl.pointer_type(GRAD))
    param_offsets, grad_offsets = tl.load(row + _PARAM_OFFSETS), tl.load(row + _GRAD_OFFSETS)
    for tile in range(tl.cdiv(left, BLOCK)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        here = param_at + read(scattered(param_offsets, start, OFFSET), at, left, False)
        there = grad_at + read(scattered(grad_offsets, start, OFFSET), at, left, False)
        grad = tl.load(there, mask=at < left, other=0).to(tl.float32) * tl.load(s + SIGN)
        param = tl.load(here, mask=at < left, other=0)
        rest = None
        if REST == 0:
            weight = param.to(tl.float32)
        else:
            rest_at = scattered(tl.load(row + _REST), start, tl.int16 if REST == 16 else tl.int8)
            rest = read(rest_at, at, left, False)
            weight = joined(param, rest, REST)
        where = (start, at, left, start, 0)  # no storage here is in blocks
        kept = read_slots(
            addresses_of(row + _FIRST_SLOT, SLOTS), row, where, STORAGES, SLOTS, REQUIRED, OPTIONAL, BLOCK, False, True
        )
        slots = ()
        for k in tl.static_range(SLOTS):
            slots = slots + (magnitude(kept[k]) if k == IMPORTANCE_SLOT else kept[k],)
        shared = None
        if NOISE:
            positions = read(scattered(tl.load(row + _POSITIONS), start, OFFSET), at, left, False)
            shared = mixed_at(row + _PLACE, tl.load(s + STEP), positions)
        theta, slots = UPDATE(weight, grad, slots, rule_scalars(s, SCALARS), None, OPTIONAL)
        write_slots(
            addresses_of(row + _FIRST_SLOT, SLOTS), row, where, slots, shared, None, STORAGES, SLOTS, REQUIRED,
            OPTIONAL, IMPORTANCE_SLOT, BLOCK, False, True,
        )  # fmt: skip
        theta, left_over = stored_weight(theta, param, rest, shared, PARAM, REST, STOCHASTIC)
        if REST != 0:
            write(rest_at, at, left_over, left, False)
        tl.store(here, theta, mask=at < left)


def _variant(rule: Rule, budget: Budget) -> Variant:
    """Return a variant that reads p, g, the slots and an offset, and writes p and the slots.

    A gradient with the same strides as its parameter uses the parameter's offsets.
    """
    param, grad = getattr(tl, budget.param), getattr(tl, budget.grad)
    slots = len(rule.slots) if budget.optional else rule.required
    state = next(storage for storage in STORAGES if storage.name == budget.state)
    storages = sum(CODES[state.dtype] << 4 * k for k in range(slots))
    noise = budget.stochastic or storages != 0
    arguments = {
        "rows": "*i64",
        "chunks": "*i64",
        "scalars": "*fp32",
        "PARAM": param,
        "GRAD": grad,
        "OFFSET": tl.int32,
        **constants_of(rule, budget.optional, storages),
        "REST": budget.rest,
        "STOCHASTIC": budget.stochastic,
        "NOISE": noise,
        **budget.changes,
    }
    offset = arguments["OFFSET"].primitive_bitwidth * (1 + noise)
    size = (2 * param.primitive_bitwidth + grad.primitive_bitwidth + offset + 2 * budget.rest) / 8
    size += 2 * state.bytes * slots
    # a scatter: each entry of p and g takes its own sector of 32 bytes, so wider accesses do not help
    return Variant(budget.name, gather_kernel, arguments, size, budget.instructions, {}, {})


def _as_launched(budget: Budget) -> Budget:
    """Return the budget for programs of one tile: the same code without the loop in which instructions are counted."""
    return budget._replace(name=f"{budget.name}, as launched", instructions=None, changes={"TILES": TILES})


VARIANTS = tuple(
    _variant(rule, budget)
    for rule in RULES
    for budget in (_as_launched(twin_of(rule).GATHERS[0]), *twin_of(rule).GATHERS)
)


class Gather:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_gather`."""

    def __init__(self, rule: Rule, tensors: Tensors, indices: Sequence[Tensor]) -> None:
        params, grads = tensors.params, tensors.grads
        flat = Flat(written=[*tensors.slots.values(), tensors.rests])
        self._strided = flat.strided
        storages = packed(rule, tensors.slots)
        rest_bits, stochastic, noise = rounding_of(tensors, storages)
        offsets = Offsets(params, grads, indices, noisy=noise)
        self._device = params[0].device
        self._table = Table(GATHER.words, [chosen.numel() for chosen in indices], tiles.BLOCK * TILES, self._device)
        self._words = {slot.name: f"slots[{i}]" for i, slot in enumerate(rule.slots)}
        self._table.point("param", params)
        self._table.point("param_offsets", offsets.of_params)
        self._table.point("grad_offsets", offsets.of_grads)
        if noise:
            self._table.point("positions", offsets.positions)
            place_in(self._table, tensors.places)
        self._point(tensors, flat)
        self._constants = {
            "PARAM": tiles.DTYPES[params[0].dtype],
            "GRAD": tiles.DTYPES[grads[0].dtype],
            "OFFSET": tl.int64 if offsets.wide else tl.int32,
            **constants_of(rule, tensors.has_optional(rule), storages),
            "BLOCK": tiles.BLOCK,
            "TILES": TILES,
            "REST": rest_bits,
            "STOCHASTIC": stochastic,
            "NOISE": noise,
        }
        self._offsets = offsets.kept()

    def step_(self, tensors: Tensors, indices: Sequence[Tensor], scalars: Tensor, rows: Sequence[int]) -> None:
        """Take the step."""
        flat = Flat(written=[*tensors.slots.values(), tensors.rests], strided=self._strided)
        if self._strided:  # the copies have new addresses in each step
            self._point(tensors, flat)
        self._table.point("grad", tensors.grads)
        self._table.set("scalars", rows)
        if self._table.chunks.numel():
            tiles.launch(
                gather_kernel,
                self._table.chunks.numel(),
                self._device,
                self._table.rows(),
                self._table.chunks,
                on_device(scalars.float(), self._device),
                **self._constants,
            )
        flat.write_back()

    def _point(self, tensors: Tensors, flat: Flat) -> None:
        """Write the addresses of the slots and the rests."""
        *slots, rests = flat.written
        for name, of_slot in zip(tensors.slots, slots, strict=True):
            self._table.point(self._words[name], of_slot)
        if rests:
            self._table.point("rest", rests)
