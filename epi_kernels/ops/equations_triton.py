"""The per-element mathematics in Triton, in float32, with the names, equations and roundings of equations.py.

Compile with `enable_fp_fusion=False`: every product and sum must round separately, except where `fma` is written, or
masks would differ between backends. Signs and NaN are tested on bits, as csrc/importance.h does.
"""

import triton
import triton.language as tl

_SIGN = tl.constexpr(-(1 << 31))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SMALLEST_NORMAL = tl.constexpr(0x00800000)
_NEGLIGIBLE = tl.constexpr(2.0**-125)
INFINITE = tl.constexpr(0x7F800000)  # the bits of +inf; above them are the NaNs
MINUS_INFINITE = tl.constexpr(-0x00800000)  # the bits of -inf, as int32

# the lock: the sign bit of a signed importance


@triton.jit
def bits_of(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_locked(signed):
    return bits_of(signed) < 0


@triton.jit
def magnitude(signed):
    # abs is not used: it may give a NaN either sign
    return float_of(bits_of(signed) & _MAGNITUDE)


@triton.jit
def with_lock(importance, locked):
    return float_of((bits_of(importance) & _MAGNITUDE) | tl.where(locked, _SIGN, 0))


@triton.jit
def is_finite(value):
    return (bits_of(value) & INFINITE) != INFINITE


# importance


@triton.jit
def noticed(value):
    # compared as floats: as integers, the bits of a NaN with its sign bit set would be below those of any number
    return tl.where(value < _NEGLIGIBLE, 0.0, value)


@triton.jit
def importance_average(importance, grad, beta, one_minus_beta):
    return noticed(importance * beta) + noticed(grad * one_minus_beta * grad)


@triton.jit
def advanced_importance(signed, grad, beta, one_minus_beta, KEEP_FINITE: tl.constexpr):
    before = magnitude(signed)
    after = importance_average(before, grad, beta, one_minus_beta)
    if KEEP_FINITE:
        after = tl.where(is_finite(grad * grad), after, before)
    return with_lock(after, is_locked(signed))


@triton.jit
def usable_bits(signed):
    bits = bits_of(signed) & _MAGNITUDE
    return tl.where(bits < _SMALLEST_NORMAL, 0, bits)


@triton.jit
def score(signed, low, high, NORMALIZED: tl.constexpr):
    bits = usable_bits(signed)
    value = float_of(bits)
    if NORMALIZED:
        distance, span = value - low, high - low
        # differences, compared as bits: a normal difference is above 0, and that of an empty range is beyond infinity
        spans = bits_of(span) >= _SMALLEST_NORMAL
        valid = (bits_of(distance) >= _SMALLEST_NORMAL) & spans
        # most S may be 0, and all of a constant layer: a division of or by 0 takes a slow path, this one does not
        divisor = tl.where(spans, span, 1.0)
        quotient = noticed(tl.div_rn(tl.where(valid, distance, divisor), tl.broadcast_to(divisor, value.shape)))
        value = tl.where(valid, quotient, 0.0)
    return tl.where(bits < INFINITE, value, 0.0)
