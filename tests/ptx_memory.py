"""The memory of a launch that `ptx` interprets: every access must lie in a tensor, be aligned, and not race.

Threads of different programs are never ordered. Threads of one program are ordered by the barriers between them, and
those of one warp by their instructions. Two threads race if nothing orders them and both access a byte, one of them
with a plain store, or one atomically and the other with a plain load.
"""

import ctypes
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LOAD, STORE, UPDATE = 1, 2, 4  # an update is atomic
NAMES = {LOAD: "load", STORE: "store", UPDATE: "update"}

# no access is wider than 16 bytes
_WIDEST = 16


class KernelError(Exception):
    """What a kernel must not do."""


def moments(program: Array, phase: Array, warp: Array) -> Array:
    """Return numbers for when threads act: equal programs and phases make two warps of one program unordered."""
    return program << 40 | phase << 8 | warp


class Memory:
    """Ranges of bytes, each with a name and an address.

    Args:
        ranges: (name, address, size in bytes). Those that overlap are one range, which gets the first name.
    """

    def __init__(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        joined: list[tuple[str, int, int]] = []  # name, first address, end
        for name, start, size in sorted(ranges, key=lambda one: one[1]):
            if size and joined and start < joined[-1][2]:
                joined[-1] = (*joined[-1][:2], max(joined[-1][2], start + size))
            elif size:
                joined.append((name, start, start + size))
        self.names = [name for name, _, _ in joined]
        self.starts = np.array([start for _, start, _ in joined], np.uint64)
        self.ends = np.array([end for _, _, end in joined], np.uint64)
        # all ranges lie in one array, each as far from a multiple of the widest access as its address
        self.firsts = np.zeros(len(joined), np.int64)
        end = 0
        for i, (_, start, stop) in enumerate(joined):
            self.firsts[i] = end + start % _WIDEST
            end = -(-(int(self.firsts[i]) + stop - start) // _WIDEST) * _WIDEST
        self.bytes = np.full(end, 0xD1, np.uint8)  # nobody has written them
        self._log: list[tuple[int, int, Array, Array]] = []  # kind, width, first bytes, moments

    def load(self, address: Array, kind: Any, count: int, when: Array) -> Array:
        """Return [threads, count] values of a dtype that lie side by side."""
        first = self._noted(LOAD, address, kind.itemsize * count, when)
        return self.bytes.view(kind)[first[:, None] // kind.itemsize + np.arange(count)]

    def store(self, address: Array, values: Array, when: Array) -> None:
        """Write [threads, count] values.

        Raises:
            KernelError: two threads of a warp write one byte with the same instruction.
        """
        size = values.itemsize
        first = self._noted(STORE, address, size * values.shape[1], when)
        if len(np.unique(first)) < len(first):
            order = np.lexsort((first, when))
            at_once = (np.diff(first[order]) == 0) & (np.diff(when[order]) == 0)
            if at_once.any():
                place = self._place(int(first[order][at_once.argmax()]))
                raise KernelError(f"race: two threads of a warp store at once to {place}")
        self.bytes.view(values.dtype)[first[:, None] // size + np.arange(values.shape[1])] = values

    def update(self, address: Array, function: np.ufunc, values: Array, when: Array) -> Array:
        """Update one value for each thread atomically; return what was there, zero where several threads update it.

        What such a thread gets on a GPU depends on the order of the threads.
        """
        place = self._noted(UPDATE, address, values.itemsize, when) // values.itemsize
        there = self.bytes.view(values.dtype)
        _, inverse, counts = np.unique(place, return_inverse=True, return_counts=True)
        before = np.where(counts[inverse] == 1, there[place], there.dtype.type(0))
        function.at(there, place, values)
        return before

    def widths(self) -> dict[str, dict[str, set[int]]]:
        """Return name -> "load", "store" or "update" -> the bits of the accesses that were made."""
        found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for kind, width, first, _ in self._log:
            for i in np.unique(np.searchsorted(self.firsts, first, "right") - 1):
                found[self.names[i]][NAMES[kind]].add(8 * width)
        return {name: dict(kinds) for name, kinds in found.items()}

    def check_order(self) -> None:
        """Raise KernelError if two threads have raced."""
        if not self._log:
            return
        unit = min(width for _, width, _, _ in self._log)
        kinds, places, whens = ([] for _ in range(3))
        for kind, width, first, when in self._log:
            places.append((first[:, None] // unit + np.arange(width // unit)).reshape(-1))
            whens.append(np.repeat(when, width // unit))
            kinds.append(np.full(len(places[-1]), kind, np.uint8))
        kind, place, when = map(np.concatenate, (kinds, places, whens))
        # most bytes are never written, or by one warp that nobody else waits for
        low, high = np.full(len(self.bytes) // unit, np.iinfo(np.int64).max), np.full(len(self.bytes) // unit, -1)
        np.minimum.at(low, place, when)
        np.maximum.at(high, place, when)
        made = np.zeros(len(low), np.uint8)
        np.bitwise_or.at(made, place, kind)
        chosen = ((low < high) & _conflicting(made))[place]
        kind, place, when = kind[chosen], place[chosen], when[chosen]
        for keys, agent, names in (
            ((place,), when >> 40, "programs"),
            ((when >> 8, place), when & 0xFF, "warps of one program"),
        ):
            self._check_order(keys, agent, kind, names, unit)

    def _check_order(self, keys: tuple[Array, ...], agent: Array, kind: Array, names: str, unit: int) -> None:
        """Raise KernelError if of several agents with equal keys, the last of which is the place, two conflict."""
        if not len(agent):
            return
        order = np.lexsort(keys)
        begins = np.zeros(len(order), bool)
        begins[0] = True
        for key in keys:
            begins[1:] |= key[order][1:] != key[order][:-1]
        starts = np.flatnonzero(begins)
        agent, kind = agent[order], kind[order]
        several = np.minimum.reduceat(agent, starts) < np.maximum.reduceat(agent, starts)
        bad = np.flatnonzero(several & _conflicting(np.bitwise_or.reduceat(kind, starts)))
        if len(bad):
            first, *rest = starts[starts >= starts[bad[0]]].tolist()
            group = slice(first, rest[0] if rest else None)
            who = sorted({f"{a}: {NAMES[k]}" for a, k in zip(agent[group].tolist(), kind[group].tolist(), strict=True)})
            place = self._place(int(keys[-1][order][first]) * unit)
            raise KernelError(f"race: {names} that nothing orders at {place}; {', '.join(who)}")

    def _noted(self, kind: int, address: Array, width: int, when: Array) -> Array:
        """Return where an access begins in `bytes`; note the access.

        Raises:
            KernelError: a part of it lies in no range, or its address is not a multiple of its width.
        """
        number = np.searchsorted(self.starts, address, "right") - 1
        inside = number >= 0
        inside[inside] = address[inside] + np.uint64(width) <= self.ends[number[inside]]
        for wrong, what in ((~inside, "out of bounds"), (address % np.uint64(width) != 0, "misaligned")):
            if wrong.any():
                i = int(wrong.argmax())
                near, program = self._near(int(address[i]), int(number[i])), int(when[i]) >> 40
                raise KernelError(f"{what}: a {NAMES[kind]} of {width} bytes by program {program} at {near}")
        first = self.firsts[number] + (address - self.starts[number]).astype(np.int64)
        self._log.append((kind, width, first, when))
        return first

    def _near(self, address: int, number: int) -> str:
        if number < 0:
            return f"address {address:#x}, below all tensors"
        start, end = int(self.starts[number]), int(self.ends[number])
        return f"byte {address - start} of {self.names[number]}, which has {end - start}"

    def _place(self, first: int) -> str:
        number = int(np.searchsorted(self.firsts, first, "right")) - 1
        return f"byte {first - int(self.firsts[number])} of {self.names[number]}"


class ProcessMemory(Memory):
    """Ranges of this process's own memory, copied for the launch; `write_back` copies the results back."""

    def __init__(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        super().__init__(ranges)
        for there, here in self._pairs():
            here[:] = there

    def write_back(self) -> None:
        """Copy all ranges to where they came from."""
        for there, here in self._pairs():
            there[:] = here

    def _pairs(self) -> Iterable[tuple[Array, Array]]:
        for start, end, first in zip(self.starts.tolist(), self.ends.tolist(), self.firsts.tolist(), strict=True):
            there = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
            yield there, self.bytes[first : first + end - start]


def _conflicting(made: Array) -> Array:
    """Return where accesses of several agents, as a sum of their kinds, are a race."""
    return (made & STORE != 0) | (made == LOAD | UPDATE)
