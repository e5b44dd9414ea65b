"""What the instructions of PTX compute: the values of one operand for all threads are one array.

Only what Triton compiles the project's kernels to is known. Float arithmetic must say how it rounds (``add.rn.f32``),
or the assembler may join a product and a sum. Every NaN that arithmetic makes is the one that GPUs make.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from interpreter import multiply_add

Array = np.ndarray[Any, Any]

PREDICATE = np.dtype(bool)
U8, U16, U32, U64 = (np.dtype(f"u{size}") for size in (1, 2, 4, 8))
UNSIGNED = {kind.itemsize: kind for kind in (U8, U16, U32, U64)}
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)

# the suffix of an instruction -> the dtype of its operands
TYPES = {
    "pred": PREDICATE,
    **{
        f"{letter}{8 * size}": np.dtype(f"{'i' if letter == 's' else 'u'}{size}")
        for letter in "sub"
        for size in UNSIGNED
    },
    "f16": F16,
    "f32": F32,
}

_SIGN, _NAN = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)


class Meaning(NamedTuple):
    """The dtypes of an instruction's operands, and the function that gives its result."""

    operands: tuple[Any, ...]
    function: Callable[..., Array]


@functools.cache
def meaning(opcode: str) -> Meaning:
    """Return what an instruction means that reads and writes registers alone.

    Raises:
        NotImplementedError: the opcode is not known.
    """
    if opcode in _FLOATS:
        return _FLOATS[opcode]
    name, _, suffix = opcode.rpartition(".")
    kind = TYPES.get(suffix)
    if kind is not None:
        root, _, comparison = name.partition(".")
        if root == "setp" and comparison in _COMPARISONS:
            return Meaning((kind, kind), _COMPARISONS[comparison])
        if root == "cvt" and kind.kind in "iu" and comparison in TYPES and TYPES[comparison].kind in "iu":
            return Meaning((kind,), lambda value: value.astype(TYPES[comparison]))
        if name in ("mov", "selp") or kind.kind != "f":
            known = _integers(kind).get(name)
            if known is not None:
                return known
    raise NotImplementedError(f"the interpreter of PTX does not know {opcode}")


@functools.cache
def _integers(kind: Any) -> dict[str, Meaning]:
    """Return the instructions on whole numbers and bits of a dtype."""
    return {
        "mov": Meaning((kind,), lambda a: a),
        "selp": Meaning((kind, kind, PREDICATE), lambda a, b, chosen: np.where(chosen, a, b)),
        "add": Meaning((kind, kind), np.add),
        "sub": Meaning((kind, kind), np.subtract),
        "mul.lo": Meaning((kind, kind), np.multiply),
        "mad.lo": Meaning((kind, kind, kind), lambda a, b, c: a * b + c),
        "div": Meaning((kind, kind), _quotient),
        "rem": Meaning((kind, kind), lambda a, b: a - _quotient(a, b) * b),
        "min": Meaning((kind, kind), np.minimum),
        "max": Meaning((kind, kind), np.maximum),
        "neg": Meaning((kind,), np.negative),
        "abs": Meaning((kind,), np.abs),
        "not": Meaning((kind,), np.invert),
        "and": Meaning((kind, kind), np.bitwise_and),
        "or": Meaning((kind, kind), np.bitwise_or),
        "xor": Meaning((kind, kind), np.bitwise_xor),
        "shl": Meaning((kind, U32), lambda a, by: _shifted(np.left_shift, a, by)),
        "shr": Meaning((kind, U32), lambda a, by: _shifted(np.right_shift, a, by)),
        "bfe": Meaning((kind, U32, U32), lambda a, first, bits: (a >> first) & ((U32.type(1) << bits) - U32.type(1))),
        "popc": Meaning((kind,), _ones),
        "prmt": Meaning((kind, kind, kind), _permuted),
        **(_products(kind) if kind in (np.int32, U32) else {}),
    }


def _products(kind: Any) -> dict[str, Meaning]:
    """Return the instructions on products of 64 bits."""
    wide = np.dtype(f"{kind.kind}8")
    return {
        "mul.hi": Meaning((kind, kind), lambda a, b: (a.astype(wide) * b.astype(wide) >> wide.type(32)).astype(kind)),
        "mul.wide": Meaning((kind, kind), lambda a, b: a.astype(wide) * b.astype(wide)),
        "mad.wide": Meaning((kind, kind, wide), lambda a, b, c: a.astype(wide) * b.astype(wide) + c),
    }


def _quotient(a: Array, b: Array) -> Array:
    """Return a / b rounded towards zero; anything for a b of 0."""
    whole = np.floor_divide(a, b)
    return whole + ((whole < 0) & (whole * b != a)).astype(a.dtype)


def _shifted(shift: Any, value: Array, by: Array) -> Array:
    """Return a shift in which a distance of the width or more moves all bits out."""
    bits = 8 * value.itemsize
    near = shift(value, np.minimum(by, bits - 1).astype(value.dtype))
    if value.dtype.kind == "i":
        return near
    return np.where(by < bits, near, value.dtype.type(0))


def _ones(value: Array) -> Array:
    return np.unpackbits(np.atleast_1d(value)[:, None].view(U8), axis=1).sum(1, dtype=np.uint32)


def _permuted(low: Array, high: Array, selectors: Array) -> Array:
    """Return four bytes, each chosen by 4 bits among eight; the highest of these bits asks for the byte's sign."""
    low, high, selectors = np.broadcast_arrays(low, high, selectors)
    both = low.astype(U64) | high.astype(U64) << U64.type(32)
    result = np.zeros(low.shape, U32)
    for i in range(4):
        selector = selectors >> U32.type(4 * i)
        byte = (both >> ((selector & U32.type(7)) * U32.type(8)).astype(U64)).astype(U8)
        sign = np.where(byte >= 128, U8.type(255), U8.type(0))
        result |= np.where(selector & U32.type(8) != 0, sign, byte).astype(U32) << U32.type(8 * i)
    return result


# floats ---------------------------------------------------------------------------------------------------------------


def _rounded(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return a function of float32 whose NaNs are those of GPUs."""

    def result(*operands: Array) -> Array:
        value = function(*operands)
        return np.where(np.isnan(value), _NAN.view(F32), value)

    return result


def _approximate_root(value: Array) -> Array:
    """Return square roots as wrong as they may be: an ulp more in one thread, an ulp less in the next.

    A subnormal number has the root 0.
    """
    root = np.sqrt(_flushed(value))
    towards = np.where(np.arange(root.size) % 2, F32.type(np.inf), F32.type(0))
    return np.where((root == 0) | np.isinf(root), root, np.nextafter(root, towards))


def _to_bfloat16(value: Array) -> Array:
    bits = value.view(U32)
    rounded = (bits + U32.type(0x7FFF) + ((bits >> U32.type(16)) & U32.type(1))) >> U32.type(16)
    return np.where(np.isnan(value), U16.type(0x7FFF), rounded.astype(U16))


def _of_bfloat16(value: Array) -> Array:
    return (value.astype(U32) << U32.type(16)).view(F32)


def _to_float16(value: Array) -> Array:
    return np.where(np.isnan(value), U16.type(0x7FFF), value.astype(F16).view(U16))


def _both(function: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Return a function that puts two results of 16 bits into 32, the first one on top."""
    return lambda high, low: function(high).astype(U32) << U32.type(16) | function(low).astype(U32)


def _flushed(value: Array) -> Array:
    return np.where(np.abs(value) < np.finfo(F32).tiny, np.copysign(F32.type(0), value), value)


def _with_sign_of(sign: Array, value: Array) -> Array:
    return (sign & _SIGN) | (value & ~_SIGN)


_FLOATS = {
    "add.rn.f32": Meaning((F32, F32), _rounded(np.add)),
    "sub.rn.f32": Meaning((F32, F32), _rounded(np.subtract)),
    "mul.rn.f32": Meaning((F32, F32), _rounded(np.multiply)),
    "div.rn.f32": Meaning((F32, F32), _rounded(np.divide)),
    "fma.rn.f32": Meaning((F32, F32, F32), _rounded(multiply_add)),
    "sqrt.rn.f32": Meaning((F32,), _rounded(np.sqrt)),
    "sqrt.rn.ftz.f32": Meaning((F32,), _rounded(lambda value: np.sqrt(_flushed(value)))),
    "div.rn.ftz.f32": Meaning((F32, F32), _rounded(lambda a, b: _flushed(_flushed(a) / _flushed(b)))),
    "sqrt.approx.ftz.f32": Meaning((F32,), _rounded(_approximate_root)),
    "min.NaN.f32": Meaning((F32, F32), _rounded(np.minimum)),
    "max.NaN.f32": Meaning((F32, F32), _rounded(np.maximum)),
    "abs.f32": Meaning((F32,), _rounded(np.abs)),
    "neg.f32": Meaning((F32,), _rounded(np.negative)),
    "abs.bf16x2": Meaning((U32,), lambda pair: pair & U32.type(0x7FFF7FFF)),
    "copysign.f32": Meaning((U32, U32), _with_sign_of),
    "cvt.f32.bf16": Meaning((U16,), _of_bfloat16),
    "cvt.f32.f16": Meaning((F16,), _rounded(lambda value: value.astype(F32))),
    "cvt.rn.bf16.f32": Meaning((F32,), _to_bfloat16),
    "cvt.rn.f16.f32": Meaning((F32,), _to_float16),
    "cvt.rn.bf16x2.f32": Meaning((F32, F32), _both(_to_bfloat16)),
    "cvt.rn.f16x2.f32": Meaning((F32, F32), _both(_to_float16)),
    "cvt.rn.f32.u32": Meaning((U32,), lambda value: value.astype(F32)),
    "cvt.rmi.ftz.f32.f32": Meaning((F32,), _rounded(lambda value: np.floor(_flushed(value)))),
    "setp.eq.bf16": Meaning((U16, U16), lambda a, b: _of_bfloat16(a) == _of_bfloat16(b)),
}


def _ordered(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a, b) & (a == a) & (b == b)


def _or_unordered(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a, b) | (a != a) | (b != b)


_PLAIN = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARISONS = {
    **{name: _ordered(compare) for name, compare in _PLAIN.items()},
    **{f"{name}u": _or_unordered(compare) for name, compare in _PLAIN.items()},
    "nan": lambda a, b: (a != a) | (b != b),
    "num": lambda a, b: (a == a) & (b == b),
}
