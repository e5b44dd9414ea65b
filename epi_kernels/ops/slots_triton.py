"""How a Triton kernel receives a rule, and how it reads and writes the rule's slots and scalars."""

import functools
import importlib
from types import ModuleType
from typing import Any

import triton
import triton.language as tl

from epi_kernels.rules import Rule
from epi_kernels.schema import SweepScalars
from epi_kernels.storage import FLOAT32

_OWN = tl.constexpr(len(SweepScalars._fields))
SIGN, IMPORTANCE_BETA, ONE_MINUS_IMPORTANCE_BETA = (tl.constexpr(i) for i in range(len(SweepScalars._fields)))


def twin_of(rule: Rule) -> ModuleType:
    """Return the Triton module of a rule: its `update`, and the budgets of its machine code."""
    return importlib.import_module(f"epi_kernels.rules.{rule.name}_triton")


@functools.cache
def constants_of(rule: Rule, optional: bool) -> dict[str, Any]:
    """Return the compile-time arguments that tell a kernel its rule, and how the rule's slots are stored.

    Args:
        rule: the rule.
        optional: whether any tensor has the rule's optional slots.
    """
    storage = importlib.import_module(f"epi_kernels.storage.{FLOAT32.name}_triton")
    return {
        "UPDATE": twin_of(rule).update,
        "LOAD": storage.load,
        "STORE": storage.store,
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
def read_slots(
    words, start, at, left, LOAD: tl.constexpr, SLOTS: tl.constexpr, REQUIRED: tl.constexpr, OPTIONAL: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    """Return a tile of every slot as a tuple, 0 for one that the tensor lacks. words: the addresses of the slots."""
    found = ()
    for k in tl.static_range(SLOTS):
        if k < REQUIRED:
            value = LOAD(tl.load(words + k), start, at, left, FULL, SCATTERED)
        else:
            value = tl.zeros([BLOCK], tl.float32)
            if OPTIONAL:
                if tl.load(words + k) != 0:
                    value = LOAD(tl.load(words + k), start, at, left, FULL, SCATTERED)
        found = found + (value,)
    return found


@triton.jit
def write_slots(
    words, start, at, slots, left, STORE: tl.constexpr, SLOTS: tl.constexpr, REQUIRED: tl.constexpr,
    OPTIONAL: tl.constexpr, FULL: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    """Write a tile of every slot that the tensor has."""
    # the addresses are read again: keeping them since the slots were read took up to 7 registers more than allowed
    for k in tl.static_range(SLOTS):
        if k < REQUIRED:
            STORE(tl.load(words + k), start, at, slots[k], left, FULL, SCATTERED)
        elif OPTIONAL:
            if tl.load(words + k) != 0:
                STORE(tl.load(words + k), start, at, slots[k], left, FULL, SCATTERED)
