# mypy: allow-untyped-defs, allow-incomplete-defs
"""The noise of stochastic rounding in Triton: the words of noise.py, in unsigned integers of 32 bits."""

import triton
import triton.language as tl

from epi_kernels.storage import noise

OF_IMPORTANCE, OF_PARAM = tl.constexpr(noise.IMPORTANCE), tl.constexpr(noise.PARAM)
_OF_SLOT = tl.constexpr(sum(number << 4 * k for k, number in enumerate(noise.OF_SLOT)))
_FIRST = tl.constexpr(noise.FIRST)
_LAST0, _LAST1, _LAST2 = (tl.constexpr(constant) for constant in noise.LAST)

# no chunk has as many entries as two to this power
_BEYOND_CHUNKS = tl.constexpr(20)

# the words of a place lie side by side in a row
_KEY, _START, _RUN, _GAP = (tl.constexpr(i) for i in range(4))


@triton.constexpr_function
def of_slot(k):
    """Return whose noise a slot of the rule has."""
    return (_OF_SLOT >> 4 * k) & 15


@triton.jit
def mix(x):
    z = (x ^ (x >> 16)) * _FIRST
    z = (z ^ (z >> 15)) * _LAST0
    return z ^ (z >> 16)


@triton.jit
def key_of(place, step):
    """Return the key of one step, uint32. place: the words of a place; step: float32, the clock."""
    key = tl.load(place + _KEY)
    bits = mix(step.to(tl.uint32, bitcast=True))
    return mix(key.to(tl.uint32) + mix((key >> 32).to(tl.uint32) + bits))


@triton.jit
def begun(place, step, start):
    """Return what the noise of a chunk needs: (first low word, key, key after the low word wraps).

    A chunk has less than 2^32 entries, so that the low words of their offsets wrap at most once.
    """
    key = key_of(place, step)
    offset = tl.load(place + _START) + start
    high = key + (offset >> 32).to(tl.uint32)
    return offset.to(tl.uint32), mix(high), mix(high + 1)


@triton.jit
def has_gaps(place):
    """Return whether a tensor has entries between which there are others in the whole tensor."""
    return tl.load(place + _GAP) != 0


@triton.jit
def mixed(begun_at, place, step, start, at, end, tile, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """Return the part that all words of an entry share, uint32.

    begun_at: from `begun`. at: int32, the entries from `start` on, below CHUNK; others get any word. end: int32, at
    most CHUNK. tile: int32, anything that comes from a tile that was read. FULL: the tensor has no gaps.
    """
    if FULL:
        first, key, following = begun_at
        low = first + at.to(tl.uint32)
        x = low ^ tl.where(low < first, following, key)
    else:
        # one division of 64 bits finds the run of the first entry; those of the others are of 32 bits
        run = tl.load(place + _RUN)
        number = start // run
        left = tl.minimum((number + 1) * run - start, CHUNK).to(tl.int32)
        further = tl.where(at < left, 0, 1 + (at - left) // tl.minimum(run, CHUNK).to(tl.int32))
        offset = tl.load(place + _START) + start + at + (number + further) * tl.load(place + _GAP)
        x = _hashed(offset, key_of(place, step))
    # nothing is added: it gives the noise the layout of the tiles. It would get one of its own, from which each word
    # would be moved through shared memory
    x ^= (tile & (end >> _BEYOND_CHUNKS)).to(tl.uint32, bitcast=True)
    return _shared(x)


@triton.jit
def mixed_at(place, step, local):
    """Return the same of scattered entries. local: int32 or int64, their offsets in row-major order."""
    gap = tl.load(place + _GAP)
    offset = tl.load(place + _START) + local
    if gap != 0:
        offset += (local // tl.load(place + _RUN).to(tl.int64)) * gap
    return _shared(_hashed(offset, key_of(place, step)))


@triton.jit
def _hashed(offset, key):
    return offset.to(tl.uint32) ^ mix(key + (offset >> 32).to(tl.uint32))


@triton.jit
def _shared(x):
    z = (x ^ (x >> 16)) * _FIRST
    return z ^ (z >> 15)


@triton.jit
def noise_of(shared, SLOT: tl.constexpr):
    """Return the noise of a slot, uint32 values from 0 to 2^16 - 1. shared: from `mixed`."""
    if SLOT // 2 == 0:
        word = shared * _LAST0
    elif SLOT // 2 == 1:
        word = shared * _LAST1
    else:
        word = shared * _LAST2
    word = word ^ (word >> 16)
    return word >> 16 if SLOT % 2 else word & 0xFFFF
