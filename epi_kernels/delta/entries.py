"""The entries of a delta: how they are checked, named and added up, and where they are in a parameter."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from epi_kernels.distributed import is_dtensor, local, offsets_of
from epi_kernels.engine.groups import nearest, without_wrappers
from epi_kernels.ops.flat import put_

# positions in row-major order, values
Entries = tuple[Tensor, Tensor]

# positions fit int32 below this
_NARROW = 1 << 31

# torch does not compare unsigned ones of more than 8 bits
_POSITIONS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64})

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}

# odd numbers of 64 bits with about as many ones as zeros, signed as torch has them; the last two are splitmix64's
_OF_POSITIONS, _OF_VALUES = -0x61C8864680B583EB, -0x2F6A2B1D4C3E5977
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15

# entries whose checksum is computed together: they stay in the cache
_CHUNK = 1 << 16


class Delta(dict[str, Entries]):
    """What a task has changed, ``{name: (positions, values)}``, and what it belongs to.

    Args:
        entries: {name: (positions in row-major order, values)}, both 1-D and equally long. A name is that of a
            parameter; components that wrappers add, such as ``_orig_mod``, do not count.
        shapes: {name: shape of the whole parameter}; absent: not known.
        before: {name: `checksum` of the values that were at these positions before}; absent: not known. It makes
            `apply` refuse another base.
        base, target: `digest` of the whole model before and after; None: not known.
        conflicts: {name: number of entries for which another delta had another value}, in what `combine` returns.

    Example:
        >>> delta = Delta({"weight": (torch.tensor([1]), torch.tensor([0.5]))}, shapes={"weight": (2, 1)})
        >>> delta["weight"][1], delta.shapes, delta.base
        (tensor([0.5000]), {'weight': (2, 1)}, None)
    """

    def __init__(
        self,
        entries: Mapping[str, Entries] | Iterable[tuple[str, Entries]] = (),
        *,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        before: Mapping[str, int] | None = None,
        base: str | None = None,
        target: str | None = None,
        conflicts: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(entries)
        self.shapes = {name: tuple(shape) for name, shape in (shapes or {}).items()}
        self.before = dict(before or {})
        self.base, self.target = base, target
        self.conflicts = dict(conflicts or {})


def belongings(delta: Mapping[str, Entries]) -> Delta:
    """Return a delta as it is; a plain dict as a `Delta` that knows nothing about its model."""
    return delta if isinstance(delta, Delta) else Delta(delta)


def rename(delta: Mapping[str, Entries], names: Mapping[str, str] | Callable[[str], str]) -> Delta:
    """Return a delta for a model whose parameters have other names.

    Args:
        delta: read; the result has the same tensors.
        names: {old: new}, of which a name that ends in a point replaces the beginnings of names; or a callable.

    Raises:
        ValueError: two names become one, or a key of `names` is the name or the beginning of none.

    Example:
        >>> delta = Delta({"h.0.weight": (torch.tensor([1]), torch.tensor([0.5]))})
        >>> list(rename(delta, {"h.": "transformer.h."}))
        ['transformer.h.0.weight']
    """
    if callable(names):
        new = {name: names(name) for name in delta}
    else:
        new, used = {}, set()
        for name in delta:
            found = [key for key in names if name == key or (key.endswith(".") and name.startswith(key))]
            key = max(found, key=len, default="")
            used.add(key)
            new[name] = names[key] + name[len(key) :] if found else name
        for key in names:
            if key not in used:
                raise ValueError(f"{key!r} is to be renamed, and the delta has no such name; {nearest(key, delta)}")
    if len(set(new.values())) < len(new):
        twice = next(one for one in new.values() if list(new.values()).count(one) > 1)
        raise ValueError(f"two parameters would have the name {twice}; rename one of them to another")
    of = belongings(delta)
    return Delta(
        {new[name]: entries for name, entries in of.items()},
        shapes={new[name]: shape for name, shape in of.shapes.items()},
        before={new[name]: checksum for name, checksum in of.before.items()},
        conflicts={new[name]: count for name, count in of.conflicts.items()},
    )


# Names ---------------------------------------------------------------------------------------------------------------


def by_name(given: Iterable[str], known: Iterable[str], whose: str, what: str = "the delta has") -> dict[str, str]:
    """Return {name: the known name that is meant}; components that wrappers add do not count.

    Args:
        given: the names.
        known: the names that there are.
        whose: the known names are, for errors: "the model".
        what: the beginning of errors: what has the given names.

    Raises:
        ValueError: a name is unknown, or means several; or two names mean the same.
    """
    known = list(known)
    exact, bare = set(known), dict[str, list[str]]()
    for one in known:
        bare.setdefault(without_wrappers(one), []).append(one)
    found: dict[str, str] = {}
    for name in given:
        meant = [name] if name in exact else bare.get(without_wrappers(name), [])
        if not meant:
            raise ValueError(
                f"{what} {name}, which {whose} has not; {nearest(without_wrappers(name), known)}. If only the names "
                "differ, give epi_kernels.delta.rename the new ones"
            )
        if len(meant) > 1:
            raise ValueError(f"{what} {name}, and {whose} has {' and '.join(meant)}; rename() it to one of them")
        for other, theirs in found.items():
            if theirs == meant[0]:
                raise ValueError(f"{what} {other} and {name}, which are one parameter of {whose}; keep one")
        found[name] = meant[0]
    return found


# Checks --------------------------------------------------------------------------------------------------------------


def check(name: str, positions: Tensor, values: Tensor, shape: tuple[int, ...] | None) -> None:
    """Check the entries of one parameter.

    Args:
        name: for errors.
        positions: of the delta.
        values: of the delta.
        shape: of the whole parameter; None: not known.

    Raises:
        ValueError: positions or values are not 1-D or not equally long; positions are no integers, out of range, or
            occur twice.
    """
    if positions.shape != values.shape or positions.dim() != 1:
        raise ValueError(
            f"{name} has positions of shape {tuple(positions.shape)} and values of {tuple(values.shape)}; both are "
            "1-D and equally long"
        )
    if positions.dtype not in _POSITIONS:
        raise ValueError(f"{name} has positions of {positions.dtype}; they are signed integers")
    if not positions.numel():
        return
    # the usual case is told by one comparison; in others the positions are sorted
    ascending = bool((positions[1:] > positions[:-1]).all())
    low, high = (int(one) for one in ((positions[0], positions[-1]) if ascending else positions.aminmax()))
    count = math.prod(shape) if shape is not None else high + 1
    if not 0 <= low <= high < count:
        raise ValueError(f"the delta has positions from {low} to {high} in {name}, which has {count} entries")
    if not ascending and positions.unique().numel() != positions.numel():
        raise ValueError(f"the delta has positions of {name} twice; it was changed, or put together from several")


def narrow(positions: Tensor, count: int) -> Tensor:
    """Return positions among `count` entries as int32 if every position fits, else as int64."""
    return positions.int() if count < _NARROW else positions.long()


def check_dtype(name: str, given: torch.dtype, wanted: torch.dtype, whose: str, convert: bool) -> None:
    """Check that values of one dtype may be written where another is.

    Raises:
        ValueError: the dtypes differ, and `convert` is not set or only one of them is complex.
    """
    if given != wanted and (not convert or given.is_complex != wanted.is_complex):
        way_out = "convert one of them" if convert else "convert=True rounds the values"
        raise ValueError(f"{name} is {wanted} in {whose} and {given} in the delta; {way_out}")


def check_before(delta: Delta, found: Mapping[str, int], otherwise: str) -> None:
    """Compare the checksums of the values that are to be replaced, by name, with those that the delta expects.

    Raises:
        ValueError: one differs; `otherwise` says what was expected.
    """
    for name, expected in delta.before.items():
        if name in found and found[name] != expected:
            raise ValueError(
                f"{name} has other values at the {len(delta[name][0])} positions of the delta than {otherwise}"
            )


def check_digest(delta: Delta, found: str) -> None:
    """Compare the digest of a whole model with that of a delta's base.

    Raises:
        ValueError: they differ, or the delta has none.
    """
    if delta.base is None:
        raise ValueError("the delta has no digest of its base; set delta.base = digest(model) before training")
    if delta.base != found:
        raise ValueError(f"the model's digest is {found} and that of the delta's base {delta.base}: they differ")


def check_undoes(old: Mapping[str, Entries]) -> None:
    """Check that a delta says what it is to replace.

    Raises:
        ValueError: it does not, so that what was written since would be lost.
    """
    for name in old:
        if name not in belongings(old).before:
            raise ValueError(
                f"{name} has no checksum of the values that are to be replaced, so what was written since would be "
                "lost: pass what apply() returned"
            )


# Checksums -----------------------------------------------------------------------------------------------------------


def integers_of(values: Tensor) -> Tensor:
    """Return the bits of 1-D values as integers of their size, [k], or as int64 [k, 2] where a value has 16 bytes."""
    bits = values.contiguous().view(_INTEGERS[values.element_size()])
    return bits.view(-1, 2) if values.element_size() == 16 else bits


def differ(one: Tensor, other: Tensor) -> Tensor:
    """Return where 1-D values of one dtype have other bits: bool [k]."""
    found = integers_of(one) != integers_of(other)
    return found.any(1) if found.dim() == 2 else found


def bits_of(values: Tensor) -> Tensor:
    """Return the bits of 1-D values as int64 [k], or [k, 2] where a value has 16 bytes."""
    return integers_of(values).long()


def from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of a dtype that have these bits, see `bits_of`."""
    return bits.to(_INTEGERS[dtype.itemsize]).reshape(-1).view(dtype)


def checksum(positions: Tensor, values: Tensor) -> Tensor:
    """Return the sum of a hash of every entry's position and bits: an int64 without dimensions, modulo 2^64.

    It does not depend on the order of the entries, and those of disjoint entries add up: shards have checksums of their
    own, and deltas can be put together. It tells errors from what is right; it is no protection against a forger.

    Args:
        positions: [k] integers, in the whole parameter.
        values: [k].

    Example:
        >>> parts = [checksum(torch.tensor([i]), torch.tensor([0.5 + i])) for i in range(2)]
        >>> torch.equal(sum(parts), checksum(torch.tensor([1, 0]), torch.tensor([1.5, 0.5])))
        True
    """
    total = torch.zeros((), dtype=torch.int64, device=positions.device)
    for begin in range(0, len(positions), _CHUNK):
        x = positions[begin : begin + _CHUNK].long() * _OF_POSITIONS
        bits = bits_of(values[begin : begin + _CHUNK])
        for column in bits.unbind(1) if bits.dim() == 2 else (bits,):
            x += column * _OF_VALUES
            x = _mixed(x)
        total += x.sum()
    return total


def _mixed(x: Tensor) -> Tensor:
    # a shift of int64 drags the sign along, which the masks take away
    x ^= x >> 30 & (1 << 34) - 1
    x *= _FIRST
    x ^= x >> 27 & (1 << 37) - 1
    x *= _SECOND
    x ^= x >> 31 & (1 << 33) - 1
    return x


def line_of(name: str, dtype: torch.dtype, shape: tuple[int, ...], total: int) -> str:
    """Return what a digest knows of one parameter."""
    return f"{name} {dtype} {list(shape)} {total}"


def digest_of(lines: Sequence[str]) -> str:
    """Return the digest of a model from the lines of its parameters, in any order."""
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest()


# Entries of a parameter, which may be shared out over ranks -----------------------------------------------------------


def values_at(param: Tensor, positions: Tensor) -> Tensor:
    """Return the values of a parameter at these positions, on its device and on every rank that has a shard of it.

    Args:
        param: plain or a DTensor; every rank must call.
        positions: int64 [k] in the whole parameter, on its device.
    """
    inside, where = _here(param, positions)
    values = local(param).take(where)
    if inside is None:
        return values
    bits = bits_of(values)
    whole = torch.zeros((len(positions), *bits.shape[1:]), dtype=torch.int64, device=bits.device)
    whole[inside] = bits
    return from_bits(summed(whole, param), param.dtype)


def write_(param: Tensor, positions: Tensor, values: Tensor) -> None:
    """Write values into a parameter, or into this rank's shard of it; no communication.

    Args:
        param: written.
        positions: int64 [k] in the whole parameter, on its device, each once.
        values: [k] of its dtype, on its device.
    """
    inside, where = _here(param, positions)
    put_(local(param), where, values if inside is None else values[inside])


def summed(of_shard: Tensor, like: Tensor) -> Tensor:
    """Return the sum of integers over the shards of `like`, where replicas count once; every rank must call."""
    if not is_dtensor(like):
        return of_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    added = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(of_shard, mesh, added, run_check=False).full_tensor()


def in_whole(param: Tensor, where: Tensor) -> Tensor:
    """Return the positions in the whole parameter of entries at these positions in this rank's shard, int64."""
    where = where.long()
    if not is_dtensor(param) or not param.dim():
        return where
    shape, offsets, whole = local(param).shape, offsets_of(param), torch.zeros_like(where)
    if not where.numel():  # of an empty shard nothing can be unraveled
        return where
    for size, offset, place in zip(param.shape, offsets, torch.unravel_index(where, shape), strict=True):
        whole = whole * size + place + offset
    return whole


def _here(param: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return which positions are in this rank's shard, None for all, and where they are in the shard."""
    if not is_dtensor(param):
        return None, positions
    shape, offsets = local(param).shape, offsets_of(param)
    inside = torch.full_like(positions, bool(local(param).numel()), dtype=torch.bool)
    where = torch.zeros_like(positions)
    if param.dim():
        for size, offset, place in zip(shape, offsets, torch.unravel_index(positions, param.shape), strict=True):
            inside &= (place >= offset) & (place < offset + size)
            where = where * size + place - offset
    return inside, where[inside]
