"""How a Triton kernel receives a rule, and how it reads and writes the rule's slots and scalars."""

import functools
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epi_kernels.ops.stored import FLOAT32, read_stored, storage_of, write_stored
from epi_kernels.ops.table import Table
from epi_kernels.ops.tensors import Tensors, dtypes_of
from epi_kernels.rules import Rule
from epi_kernels.schema import SweepScalars
from epi_kernels.storage import CODES
from epi_kernels.storage.noise import Place
from epi_kernels.storage.noise_triton import of_slot

_OWN = tl.constexpr(len(SweepScalars._fields))
SIGN, IMPORTANCE_BETA, ONE_MINUS_IMPORTANCE_BETA, STEP = (tl.constexpr(i) for i in range(len(SweepScalars._fields)))


def twin_of(rule: Rule) -> ModuleType:
    """Return the Triton module of a rule: its `update`, and the budgets of its machine code."""
    return importlib.import_module(f"epi_kernels.rules.{rule.name}_triton")


def storage(*lists: Sequence[Tensor | None]) -> int:
    """Return the number of the storage that all tensors in some lists have; that of float32 without tensors."""
    dtypes = dtypes_of(*lists)
    assert len(dtypes) <= 1, "the tensors of a launch differ in their storages"
    return CODES[next(iter(dtypes), torch.float32)]


def packed(rule: Rule, slots: Mapping[str, Sequence[Tensor | None]]) -> int:
    """Return the storages of a rule's slots as one number, with 4 bits for each; see `stored.storage_of`."""
    return sum(storage(slots.get(slot.name, ())) << 4 * k for k, slot in enumerate(rule.slots))


def rounding_of(tensors: Tensors, storages: int) -> tuple[int, bool, bool]:
    """Return (bits of the rests, whether weights are rounded stochastically, whether anything is).

    Args:
        tensors: of a launch. Their weights have rests of the same number of bits, or none.
        storages: 0 if all that has a storage is float32.
    """
    (bits,) = {0 if rest is None else 8 * rest.element_size() for rest in tensors.rests} or {0}
    rounded = bits == 8 if bits else tensors.params[0].dtype != torch.float32
    stochastic = bool(tensors.places) and tensors.stochastic and rounded
    return bits, stochastic, stochastic or (bool(tensors.places) and storages != 0)


def place_in(table: Table, places: Sequence[Place]) -> None:
    """Write into a table where the entries of each tensor lie in the whole tensor."""
    for word in ("key", "first", "run", "gap"):
        table.set(word, [getattr(place, word) for place in places])


@functools.cache
def constants_of(rule: Rule, optional: bool, storages: int = 0) -> dict[str, Any]:
    """Return the compile-time arguments that tell a kernel its rule, and how the rule's slots are stored.

    Args:
        rule: the rule.
        optional: whether any tensor has the rule's optional slots.
        storages: of the slots, from `packed`; 0: all are float32.
    """
    return {
        "UPDATE": twin_of(rule).update,
        "STORAGES": storages,
        "SLOTS": len(rule.slots),
        "REQUIRED": rule.required,
        "OPTIONAL": optional,
        "IMPORTANCE_SLOT": rule.importance_index,
        "SCALARS": len(rule.scalars._fields),
    }


@triton.jit
def row_of(scalars, number, SCALARS: tl.constexpr):
    """Return the pointer to a row of scalars."""
    return scalars + number * (_OWN + SCALARS)


@triton.jit
def rule_scalars(row, SCALARS: tl.constexpr):
    """Return the rule's scalars in a row, as a tuple."""
    found = ()
    for i in tl.static_range(SCALARS):
        found = found + (tl.load(row + _OWN + i),)
    return found


@triton.jit
def addresses_of(words, SLOTS: tl.constexpr):
    """Return the addresses of the slots as a tuple."""
    found = ()
    for k in tl.static_range(SLOTS):
        found = found + (tl.load(words + k),)
    return found


@triton.jit
def read_slots(
    addresses, scales, where, STORAGES: tl.constexpr, SLOTS: tl.constexpr, REQUIRED: tl.constexpr,
    OPTIONAL: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    """Return a tile of every slot as a tuple, 0 for one that the tensor lacks.

    addresses: from `addresses_of`. scales: a pointer to the addresses of the slots' scales. where: see
    `epi_kernels.ops.stored`.
    """
    found = ()
    for k in tl.static_range(SLOTS):
        if k < REQUIRED:
            value = read_stored(addresses[k], scales + k, where, storage_of(STORAGES, k), BLOCK, FULL, SCATTERED)
        else:
            value = tl.zeros([BLOCK], tl.float32)
            if OPTIONAL:
                if addresses[k] != 0:
                    value = read_stored(
                        addresses[k], scales + k, where, storage_of(STORAGES, k), BLOCK, FULL, SCATTERED
                    )
        found = found + (value,)
    return found


@triton.jit
def write_slots(
    addresses, scales, where, slots, shared, keeps, STORAGES: tl.constexpr, SLOTS: tl.constexpr, REQUIRED: tl.constexpr,
    OPTIONAL: tl.constexpr, IMPORTANCE_SLOT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    SCATTERED: tl.constexpr,
):  # fmt: skip
    """Write a tile of every slot that the tensor has.

    shared: see `epi_kernels.ops.stored.write_stored`. keeps: whether the importance slot stays as it is, which
    would be rounded a second time; or None. float32 is then written with what it was.
    """
    for k in tl.static_range(SLOTS):
        if k < REQUIRED:
            if k == IMPORTANCE_SLOT and keeps is not None and storage_of(STORAGES, k) != FLOAT32:
                if keeps == 0:
                    write_stored(
                        addresses[k], scales + k, where, slots[k], shared,
                        storage_of(STORAGES, k), of_slot(k), True, BLOCK, FULL, SCATTERED,
                    )  # fmt: skip
            else:
                write_stored(
                    addresses[k], scales + k, where, slots[k], shared,
                    storage_of(STORAGES, k), of_slot(k), k == IMPORTANCE_SLOT, BLOCK, FULL, SCATTERED,
                )  # fmt: skip
        elif OPTIONAL:
            if addresses[k] != 0:
                write_stored(
                    addresses[k], scales + k, where, slots[k], shared,
                    storage_of(STORAGES, k), of_slot(k), False, BLOCK, FULL, SCATTERED,
                )  # fmt: skip
