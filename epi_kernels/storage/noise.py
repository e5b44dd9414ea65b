"""The noise of stochastic rounding: a function of what is rounded, so that every backend and any ranks round alike.

A word of noise depends on a key of the parameter, on the parameter's clock and on the entry's offset in the whole
tensor in row-major order, whatever the shards, the memory format or the order of execution. torch's generators are
never read. A word has 16 bits for each of two slots::

    key   <- mix(low(k) + mix(high(k) + mix(bits of float32(step))))
    x     <- low(offset) ^ mix(key + high(offset))
    z     <- (x ^ x >> 16) C_0;   z <- z ^ z >> 15
    w_j   <- z C_(j+1);           w_j <- w_j ^ w_j >> 16
    noise of slot 2j is w_j mod 2^16, that of slot 2j + 1 is w_j >> 16

in unsigned integers of 32 bits, where ``mix`` has the same form as the last lines. The constants are those of a hash
with low bias (two multiplications and three shifts of the kind of MurmurHash3's finalizer).
"""

import functools
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

# C_0; C_1 of the words 0, 1 and 2
FIRST = 0x7FEB352D
LAST = (0x846CA68B, 0x9E3779B1, 0xC2B2AE3D)

# whose noise it is: the rule's slots have 0, 1 and 4 in their order
IMPORTANCE, PARAM = 2, 3
OF_SLOT = (0, 1, 4)

_MASK = 0xFFFFFFFF


class Place(NamedTuple):
    """Where the entries of a tensor, or of a rank's shard of a tensor, lie in the whole tensor; and the noise's key.

    Local entry i, in row-major order, is the entry ``first + i + i // run * gap`` of the whole tensor.

    Attributes:
        key: of the noise, a signed integer of 64 bits; see `key_of`.
        first: the offset of the first entry in the whole tensor.
        run: how many local entries lie side by side in the whole tensor, at least 1.
        gap: the entries of the whole tensor between the end of a run and the start of the next.
        row: the entries of a local row, which is one index of dimension 0; blocks of a row share a scale.
    """

    key: int
    first: int
    run: int
    gap: int
    row: int

    def offsets(self, local: Tensor) -> Tensor:
        """Return the offsets in the whole tensor of local offsets, int64."""
        return self.first + local + local // self.run * self.gap


def whole(key: int, shape: torch.Size) -> Place:
    """Return the place of a tensor that this rank has as a whole."""
    entries = max(1, shape.numel())
    return Place(key, 0, entries, 0, max(1, entries // max(1, shape[0])) if shape else 1)


@functools.lru_cache(maxsize=1 << 16)
def key_of(seed: int, name: str, rank: int | None = None) -> int:
    """Return the key of a parameter's noise, a signed integer of 64 bits.

    Args:
        seed: the setting ``rounding_seed`` of its group.
        name: of the parameter, without what wrappers add; or its position across all groups.
        rank: this rank, if it is not known where its entries lie in the whole tensor; else None.
    """
    text = f"{seed}:{name}" if rank is None else f"{seed}:{name}:{rank}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Noise:
    """The noise of one step of one tensor.

    Args:
        place: where the entries lie.
        step: the parameter's clock, this step included.
        local: int64, the local row-major offsets of the entries whose noise is wanted.

    Example:
        >>> Noise(whole(key_of(0, "w"), torch.Size([4])), 1.0, torch.arange(4)).of(PARAM).tolist()
        [14474, 3645, 2249, 9877]
    """

    def __init__(self, place: Place, step: float, local: Tensor) -> None:
        offsets = place.offsets(local)
        bits = int(torch.tensor(step, dtype=torch.float32, device="cpu").view(torch.int32)) & _MASK
        key = _mix((place.key & _MASK) + _mix((place.key >> 32 & _MASK) + _mix(bits)))
        x = (offsets & _MASK) ^ _mix_tensor(key + (offsets >> 32))
        z = (x ^ x >> 16) * FIRST & _MASK
        self._mixed = z ^ z >> 15

    def of(self, slot: int) -> Tensor:
        """Return the noise of a slot, int64 values from 0 to 2^16 - 1."""
        word = self._mixed * LAST[slot // 2] & _MASK
        word = word ^ word >> 16
        return word >> 16 if slot % 2 else word & 0xFFFF


def _mix(x: int) -> int:
    x &= _MASK
    z = (x ^ x >> 16) * FIRST & _MASK
    z = (z ^ z >> 15) * LAST[0] & _MASK
    return z ^ z >> 16


def _mix_tensor(x: Tensor) -> Tensor:
    x = x & _MASK
    z = (x ^ x >> 16) * FIRST & _MASK
    z = (z ^ z >> 15) * LAST[0] & _MASK
    return z ^ z >> 16
