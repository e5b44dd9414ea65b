"""What a table of tensors looks like in memory: one description, from which every layout follows.

A row describes one tensor of a call. On the host it is a C struct (`Row.struct` is numpy's view of it); on a device it
is 64-bit words, whose positions a kernel knows (`Row.word`). Both have the fields in the order of this file.
``make schema`` writes ``csrc/schema.h``.
"""

import zlib
from typing import Any, NamedTuple

import numpy as np

from epi_kernels.rules import RULES, Rule
from epi_kernels.storage import STORAGES


class SweepScalars(NamedTuple):
    """The numbers of one step of one tensor that every sweep needs, whatever its rule; the rule's own follow."""

    sign: float  # of the gradient: -1 maximizes
    importance_beta: float
    one_minus_importance_beta: float
    step: float  # the parameter's clock, on which the noise of stochastic rounding depends


def width_of(rule: Rule) -> int:
    """Return the number of scalars of a row."""
    return len(SweepScalars._fields) + len(rule.scalars._fields)


# raised when a function of csrc/epi_native.h or csrc/epi_cuda.h changes
_INTERFACE = 9

# where the lock bit of a tensor is; the position in this tuple is the number in compiled code
LOCK_IN = ("none", "importance", "slot", "static")

# the largest numbers of slots and of scalars that a rule has
SLOTS = max(len(rule.slots) for rule in RULES)
SCALARS = max(width_of(rule) for rule in RULES)

# a word of a device's table of chunks is: tensor << CHUNK_BITS | number of the chunk in that tensor
CHUNK_BITS = 40

_NUMPY = {"int64_t": np.int64, "int32_t": np.int32, "float": np.float32}

_HOST, _DEVICE, _BOTH = "host", "device", "host and device"


class Field(NamedTuple):
    """One field of a row.

    Attributes:
        name: of the field.
        ctype: its type in the C struct. On a device every field is a 64-bit word.
        where: which of the two layouts has it.
        meaning: the comment on it in C.
        length: if it is an array, the name of its length in C and the length.
    """

    name: str
    ctype: str
    where: str
    meaning: str = ""
    length: tuple[str, int] | None = None


class Row:
    """A row of a table.

    Args:
        name: what the table is for.
        fields: in order. The first is the number of entries.
    """

    def __init__(self, name: str, *fields: Field) -> None:
        self.name = name
        self.fields = fields
        assert fields[0].name == "size"

    @property
    def struct(self) -> "np.dtype[Any]":
        """Return the struct of the host."""
        members: list[Any] = []
        for field in self.fields:
            if field.where != _DEVICE:
                kind = _NUMPY.get(field.ctype, np.uintp)  # the others are pointers
                members.append((field.name, kind, (field.length[1],)) if field.length else (field.name, kind))
        return np.dtype(members, align=True)

    @property
    def words(self) -> tuple[str, ...]:
        """Return the names of the words on a device; the words of an array are name[0], name[1] and so on."""
        names: list[str] = []
        for field in self.fields:
            if field.where != _HOST:
                names += [f"{field.name}[{i}]" for i in range(field.length[1])] if field.length else [field.name]
        return tuple(names)

    def word(self, name: str) -> int:
        """Return the position of a word, or of the first word of an array."""
        return self.words.index(name if name in self.words else f"{name}[0]")


_SIZE = Field("size", "int64_t", _BOTH, "entries")
_ALIGNED = Field("aligned", "int64_t", _DEVICE, "1: every address of the row is a multiple of 16 bytes, 0 included")
_NONFINITE = Field("nonfinite", "int64_t", _HOST, "result: entries whose squared gradient is NaN or infinite")
_GRAD_DTYPE = Field("grad_dtype", "int32_t", _BOTH, "enum epi_dtype")
_SLOTS = Field(
    "slots", "void*", _BOTH, "of the rule, written; NULL: an optional one that is not there", ("EPI_SLOTS", SLOTS)
)
_SCALES = Field("scales", "float*", _BOTH, "of a slot in blocks of 8 bits, written; else NULL", ("EPI_SLOTS", SLOTS))
_SLOT_DTYPES = Field("slot_dtypes", "int32_t", _HOST, "enum epi_dtype of each slot", ("EPI_SLOTS", SLOTS))
_REST = Field("rest", "void*", _BOTH, "of a bfloat16 parameter whose weight has more bits, written; else NULL")
_REST_BITS = Field("rest_bits", "int32_t", _HOST, "of an entry of the rest: 16 or 8")
_STOCHASTIC = Field("stochastic", "int32_t", _HOST, "1: round the parameter stochastically")
# where the entries lie in the whole tensor: see `epi_kernels.storage.noise.Place`
_PLACE = (
    Field("key", "int64_t", _BOTH, "of the noise"),
    Field("first", "int64_t", _BOTH, "offset of the first entry in the whole tensor"),
    Field("run", "int64_t", _BOTH, "entries that lie side by side in the whole tensor; 0: all is rounded to nearest"),
    Field("gap", "int64_t", _BOTH, "entries of the whole tensor between two runs"),
)
_ROW = Field("row", "int64_t", _BOTH, "entries of a row, whose blocks share scales; at least 1")
_IMPORTANCE_SCALES = Field("scales", "float*", _BOTH, "of an importance in blocks of 8 bits; else NULL")
_IMPORTANCE_DTYPE = Field("importance_dtype", "int32_t", _BOTH, "enum epi_dtype")
_SCALARS = (
    Field("scalars", "int64_t", _DEVICE, "row of the scalars"),
    Field("scalars", "float", _HOST, "epi_sweep_scalars, then the rule's", ("EPI_SCALARS", SCALARS)),
)

SWEEP = Row(
    "sweep",
    _SIZE,
    Field("param", "void*", _BOTH, "written"),
    Field("grad", "const void*", _BOTH),
    _SLOTS,
    # on a device any number but 0 says that the tensor has a lock, wherever its lock bits are
    Field("lock", "void*", _BOTH, "signed importance, written; with EPI_LOCK_STATIC int8, read; else NULL"),
    _SCALES,
    Field("lock_scales", "float*", _BOTH, "of an importance in blocks of 8 bits, written; else NULL"),
    _REST,
    *_PLACE,
    _ROW,
    _NONFINITE,
    Field("param_dtype", "int32_t", _HOST, "enum epi_dtype"),
    _GRAD_DTYPE._replace(where=_HOST),
    _SLOT_DTYPES,
    Field("lock_dtype", "int32_t", _HOST, "enum epi_dtype of an importance"),
    _REST_BITS,
    _STOCHASTIC,
    Field("lock_in", "int32_t", _HOST, "enum epi_lock_in"),
    *_SCALARS,
    _ALIGNED,
)

GATHER = Row(
    "gather",
    _SIZE._replace(meaning="selected entries"),
    Field("param", "void*", _BOTH, "written at the offsets alone"),
    Field("grad", "const void*", _BOTH),
    Field("param_offsets", "const void*", _BOTH, "of the selected entries from `param`, in entries; distinct"),
    Field("grad_offsets", "const void*", _BOTH),
    _SLOTS._replace(meaning="of the rule, [size] each, written"),
    _REST._replace(meaning="[size], of a bfloat16 parameter whose weight has more bits, written; else NULL"),
    Field("positions", "const void*", _BOTH, "of the selected entries in row-major order, for the noise"),
    *_PLACE,
    Field("param_dtype", "int32_t", _HOST, "enum epi_dtype"),
    _GRAD_DTYPE._replace(where=_HOST),
    _SLOT_DTYPES,
    _REST_BITS,
    _STOCHASTIC,
    Field("wide_offsets", "int32_t", _HOST, "1: int64, 0: int32"),
    *_SCALARS,
)

IMPORTANCE = Row(
    "importance",
    _SIZE,
    Field("importance", "void*", _BOTH, "signed; written where there is a gradient"),
    Field("grad", "const void*", _BOTH, "NULL: the range alone"),
    _IMPORTANCE_SCALES,
    *_PLACE,
    _ROW,
    _NONFINITE,
    _GRAD_DTYPE,
    _IMPORTANCE_DTYPE,
    Field("layer", "int32_t", _BOTH),
    Field("beta", "float", _HOST),
    Field("one_minus_beta", "float", _HOST),
    Field("step", "float", _HOST, "the parameter's clock, for the noise"),
    _ALIGNED,
)

SUMS = Row(
    "sums",
    _SIZE,
    Field("sum", "float*", _BOTH, "written; NULL: only the squares are summed"),
    Field("square_sum", "float*", _BOTH, "written"),
    Field("grad", "const void*", _BOTH),
    _GRAD_DTYPE,
    _ALIGNED,
)

SCORE = Row(
    "score",
    _SIZE,
    Field("importance", "void*", _BOTH, "signed; sign bits written by epi_lock"),
    _IMPORTANCE_SCALES._replace(ctype="const float*"),
    _ROW,
    Field("locked", "int64_t", _HOST, "results of epi_lock"),
    Field("newly_locked", "int64_t", _HOST),
    Field("released", "int64_t", _HOST),
    Field("low", "float", _HOST, "range of the tensor's layer"),
    Field("high", "float", _HOST),
    Field("normalized", "int32_t", _HOST, "0: the score is S itself"),
    Field("layer", "int64_t", _DEVICE),
    Field("budget", "int32_t", _BOTH),
    _IMPORTANCE_DTYPE,
    _ALIGNED,
)

POSITIONS = Row(
    "positions",
    _SIZE._replace(meaning="positions"),
    Field("memory", "void*", _HOST, "of a whole tensor; epi_put writes it at the positions alone"),
    Field("entries", "int64_t", _HOST, "of the whole tensor"),
    Field("positions", "const int64_t*", _HOST, "in the whole tensor, in entries; strictly increasing"),
    Field("values", "void*", _HOST, "[size], one for each position; epi_take writes them"),
    Field("outside", "int32_t", _HOST, "result: 1: a position is outside of the tensor, and nothing was moved"),
    Field("entry_bytes", "int32_t", _HOST, "of an entry of `memory` and `values`: 1, 2, 4 or 8"),
)

ROWS = (SWEEP, GATHER, IMPORTANCE, SUMS, SCORE, POSITIONS)


def _enum(name: str, members: list[str]) -> str:
    # with a comma at the end clang-format keeps one member to a line, whatever their length
    return f"enum {name} {{\n" + "".join(f"    {member},\n" for member in members) + "};\n"


def _struct(name: str, members: list[tuple[str, str]]) -> str:
    fields = "".join((f"    /* {meaning} */\n" if meaning else "") + f"    {member};\n" for member, meaning in members)
    return f"typedef struct {{\n{fields}}} {name};\n"


def _tensor(row: Row) -> str:
    """Return the struct of the host in C."""
    members = [
        (f"{field.ctype} {field.name}" + (f"[{field.length[0]}]" if field.length else ""), field.meaning)
        for field in row.fields
        if field.where != _DEVICE
    ]
    return _struct(f"epi_{row.name}_tensor", members)


def _rule(rule: Rule) -> str:
    """Return what C has to know of a rule: the positions of its slots, how many are required, and its scalars."""
    prefix = f"EPI_{rule.name.upper()}"
    names = [slot.name for slot in rule.slots]
    facts = [
        *(f"{prefix}_{name.upper()} = {i}" for i, name in enumerate(names)),
        f"{prefix}_SLOTS = {len(names)}",
        f"{prefix}_REQUIRED = {rule.required}",
        f"{prefix}_IMPORTANCE_SLOT = {rule.importance_index}",
    ]
    scalars = [(f"float {name}", "") for name in rule.scalars._fields]
    return f"{_enum(f'epi_{rule.name}', facts)}\n{_struct(f'epi_{rule.name}_scalars', scalars)}"


def _parts() -> list[str]:
    words = [(f"int64_t {name}", "") for name in SCORE.words]
    return [
        f"#define EPI_SLOTS {SLOTS}\n#define EPI_SCALARS {SCALARS}\n#define EPI_CHUNK_BITS {CHUNK_BITS}\n",
        _enum("epi_dtype", [f"EPI_{storage.name.upper()}" for storage in STORAGES]),
        _enum("epi_lock_in", [f"EPI_LOCK_{name.upper()}" for name in LOCK_IN]),
        _enum("epi_rule", [*(f"EPI_RULE_{rule.name.upper()}" for rule in RULES), "EPI_RULES"]),
        _struct("epi_sweep_scalars", [(f"float {name}", "") for name in SweepScalars._fields]),
        "/* Of a rule: the positions of its slots; how many there are, and how many of them every parameter has; the\n"
        " * one that can serve as the importance, or -1; and its scalars. */\n\n" + "\n".join(map(_rule, RULES)),
        "/* Rows of the host. */\n\n" + "\n".join(map(_tensor, ROWS)),
        "/* A row of a device's table of scores. */\n\n" + _struct("epi_score_row", words),
    ]


# the version of both libraries in csrc/schema.h: a library that was built from another description is not used
VERSION = zlib.crc32("\n".join([*_parts(), str(_INTERFACE)]).encode()) & 0x7FFFFFFF


def header() -> str:
    """Return csrc/schema.h."""
    parts = [
        "/* Made by `make schema`: change epi_kernels/schema.py, or a rule, and run that. */\n"
        "#ifndef EPI_SCHEMA_H\n#define EPI_SCHEMA_H\n\n#include <stdint.h>\n",
        f"#define EPI_VERSION {VERSION}\n",
        *_parts(),
        "#endif\n",
    ]
    return "\n".join(parts)
