"""The life of a delta: written into a model, taken out of it again, put together with others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epi_kernels.delta.entries import (
    Delta,
    Entries,
    belongings,
    by_name,
    check,
    check_before,
    check_digest,
    check_dtype,
    check_undoes,
    checksum,
    differ,
    digest_of,
    in_whole,
    line_of,
    narrow,
    summed,
    values_at,
    write_,
)
from epi_kernels.delta.since import Base, values_before
from epi_kernels.distributed import is_slice, local, reshard
from epi_kernels.engine.groups import without_wrappers

# entries whose positions are made together, for the digest of a whole model
_CHUNK = 1 << 20


@torch.no_grad()
def apply(model: nn.Module, delta: Mapping[str, Entries], *, convert: bool = False, digest: bool = False) -> Delta:
    """Write a delta's values into the parameters of a model, and return what was there, for `undo`.

    Deltas of tasks that were trained one after the other are applied in that order. A delta with `Delta.before`, as
    `SparseAdamW.delta` makes it, is refused by a model that has other values at the delta's positions than the model
    that was trained: k values are compared, by a checksum, and the rest of the model is not looked at.

    Args:
        model: as it was when the delta's task began; written. In a sharded model every rank writes its shards, and
            every rank must call.
        delta: {name: (positions, values)}; names are those of ``model.named_parameters()``, without what wrappers add
            to them. A tied parameter goes by any of its names.
        convert: values of another dtype are rounded to the parameter's. The values before them have then other bits
            than those from which the delta was made, and are not compared.
        digest: compare the whole model, too, with the base that the delta names (`Delta.base`): every entry is read.

    Returns:
        The delta of the old values: `undo` writes them back. Save it as any delta.

    Raises:
        ValueError: a name is unknown, positions or values do not fit the parameter, a position occurs twice, the dtype
            differs, or the model is another than the delta's base; the model is then as it was.
        NotImplementedError: a parameter is a slice that FSDP1 made.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> old = apply(model, {"weight": (torch.tensor([1]), torch.tensor([0.5]))})
        >>> model.weight[0, 1].item()
        0.5
        >>> _ = undo(model, old)
        >>> torch.equal(model.weight, before)
        True
    """
    return _replace(
        model,
        delta,
        convert,
        digest,
        "the model from which the delta was made. Apply it to the base that its task began with, after the deltas of "
        "the tasks before it; dict(delta) has no checksum and is written over anything",
    )


@torch.no_grad()
def undo(model: nn.Module, old: Delta, *, digest: bool = False) -> Delta:
    """Write back the values that `apply` has replaced, bit for bit, and return those that were there until now.

    Args:
        model: to which the delta was applied; written. Every rank must call.
        old: what `apply` returned, or `load` read of it.
        digest: as in `apply`.

    Returns:
        The delta that was undone: `apply` writes it again.

    Raises:
        ValueError: an entry has been overwritten since, by training or by another delta, or `old` does not fit the
            model; the model is then as it was.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> old = apply(model, {"weight": (torch.tensor([1]), torch.tensor([0.5]))})
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> undo(model, old)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: weight has other values at the 1 positions of the delta than ...
    """
    check_undoes(old)
    return _replace(
        model,
        old,
        False,
        digest,
        "apply() has written there: they have been overwritten since. Undo what came later first",
    )


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    param: Tensor
    positions: Tensor
    values: Tensor


def _replace(model: nn.Module, delta: Mapping[str, Entries], convert: bool, whole: bool, otherwise: str) -> Delta:
    """Check everything, write, and return the delta of the old values; `otherwise` ends an error about these."""
    reshard(model)  # an FSDP2 model that has whole parameters would lose what is written into them
    of = belongings(delta)
    places = _places(model, of, convert)
    if whole:
        check_digest(of, digest(model))
    old = [values_at(place.param, place.positions) for place in places]
    check_before(
        of,
        {
            place.name: int(checksum(place.positions, values))
            for place, values in zip(places, old, strict=True)
            if of[place.name][1].dtype == values.dtype
        },
        otherwise,
    )
    for place in places:
        write_(place.param, place.positions, place.values)
    return Delta(
        {p.name: (of[p.name][0].cpu(), values.cpu()) for p, values in zip(places, old, strict=True)},
        shapes={p.name: tuple(p.param.shape) for p in places},
        before={p.name: int(checksum(p.positions, p.values)) for p in places},
        base=of.target,
        target=of.base,
    )


def _places(model: nn.Module, delta: Delta, convert: bool) -> list[_Place]:
    params = dict(model.named_parameters(remove_duplicate=False))
    names = by_name(delta, params, "the model")
    of_param: dict[int, str] = {}
    found = []
    for name, (positions, values) in delta.items():
        param = params[names[name]]
        other = of_param.setdefault(id(param), name)
        if other != name:
            raise ValueError(f"the delta has {other} and {name}, which are one parameter of the model, tied; keep one")
        if is_slice(param):
            raise NotImplementedError(f"{name} is a slice that FSDP1 made; apply before wrapping, or use FSDP2")
        shape = delta.shapes.get(name)
        if shape is not None and shape != tuple(param.shape):
            raise ValueError(f"{name} has shape {tuple(param.shape)} in the model and {shape} in the delta's base")
        check(name, positions, values, tuple(param.shape))
        check_dtype(name, values.dtype, param.dtype, "the model", convert)
        found.append(_Place(name, param, positions.long().to(param.device), values.to(param.device, param.dtype)))
    return found


@torch.no_grad()
def digest(model: nn.Module | Mapping[str, Tensor]) -> str:
    """Return a digest of all parameters of a model: names without wrappers, dtypes, shapes and bits; 32 hex digits.

    It reads every entry, and takes some 15 ns for each on a thread of a CPU. The digest of a sharded model is that of
    the whole one; every rank must call. A parameter with two names counts once, with its first.

    Args:
        model: or its tensors by name.

    Example:
        >>> one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> digest(one) == digest(torch.nn.Sequential(one)[0]), digest(one) == digest(other)
        (True, False)
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    if isinstance(model, nn.Module):
        reshard(model)
    lines = []
    for name, param in named:
        flat = local(param.detach()).reshape(-1)
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        for begin in range(0, len(flat), _CHUNK):
            end = min(begin + _CHUNK, len(flat))
            where = torch.arange(begin, end, dtype=torch.int64, device=flat.device)
            total += checksum(in_whole(param, where), flat[begin : begin + _CHUNK])
        lines.append(line_of(without_wrappers(name), param.dtype, tuple(param.shape), int(summed(total, param))))
    return digest_of(lines)


def combine(deltas: Sequence[Mapping[str, Entries]], *, consecutive: bool = False, base: Base | None = None) -> Delta:
    """Return one delta that does what several do, applied in their order: at a position that two have, the last counts.

    Args:
        deltas: at least one, of models with the same names and shapes.
        consecutive: True: each task began with the model with which the task before it ended. False: all began with the
            same model, as tasks that were trained apart; where two of them have different values there is a conflict.
        base: with which the first task began: a model, its tensors by name, or the path of a checkpoint. The deltas
            that began with it are compared with it, and ``before`` of the result is known of all parameters.

    Returns:
        The delta, with ascending positions. ``conflicts`` of it has {name: number of conflicts}, names without one left
        out. Without `base`, ``before`` is not known of a name in which tasks that were trained apart share positions:
        what their base had there cannot be told from sums.

    Raises:
        ValueError: there are none; or dtypes or shapes of a parameter differ; or the digests of the deltas say that one
            does not begin where it must; or a delta does not fit `base`.

    Example:
        >>> first = Delta({"w": (torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))})
        >>> other = Delta({"w": (torch.tensor([1, 3]), torch.tensor([5.0, 6.0]))})
        >>> both = combine([first, other])
        >>> both["w"], both.conflicts
        ((tensor([0, 1, 3], dtype=torch.int32), tensor([1., 5., 6.])), {'w': 1})
    """
    if not deltas:
        raise ValueError("there are no deltas to combine")
    first, *others = [belongings(delta) for delta in deltas]
    for name, (positions, values) in first.items():
        check(name, positions, values, first.shapes.get(name))
    if base is not None:
        for one in (first,) if consecutive else (first, *others):
            check_before(one, _checksums(one, base), "the base that was given, from which the delta was not made")
    whole = Delta(first, shapes=first.shapes, before=first.before, base=first.base, target=first.target)
    for number, other in enumerate(others, 1):
        begins, expected = (whole.target, "the one before ends") if consecutive else (whole.base, "the first begins")
        if None not in (begins, other.base) and begins != other.base:
            raise ValueError(f"delta {number} begins with the model {other.base}, and {expected} with {begins}")
        whole = _both(whole, other, consecutive)
    for name, (positions, values) in whole.items():
        order = positions.long().argsort()
        whole[name] = (narrow(positions[order], int(positions.max()) if len(positions) else 0), values[order])
    if base is not None:
        whole.before = _checksums(whole, base)
    return whole


def _checksums(delta: Delta, base: Base) -> dict[str, int]:
    """Return the checksums of what a base has at the positions of a delta."""
    old = values_before(base, delta)
    return {name: int(checksum(positions.cpu(), old[name])) for name, (positions, _) in delta.items()}


def _both(first: Delta, other: Delta, consecutive: bool) -> Delta:
    both = Delta(
        first,
        shapes={**first.shapes, **other.shapes},
        before={**first.before, **other.before},
        base=first.base,
        target=other.target if consecutive else None,
        conflicts=first.conflicts,
    )
    # a name may have components of wrappers in one and not in the other
    bare = {without_wrappers(name): name for name in first}
    for theirs, (positions, values) in other.items():
        check(theirs, positions, values, other.shapes.get(theirs))
        name = bare.get(without_wrappers(theirs), theirs)
        if name not in first:
            both[name] = (positions, values)
            continue
        if name != theirs:
            both.before.pop(theirs, None)
            shape = both.shapes.pop(theirs, None)
            if shape is not None:
                both.shapes.setdefault(name, shape)
        ours, old = first[name]
        shapes = first.shapes.get(name), other.shapes.get(theirs)
        if old.dtype != values.dtype or (None not in shapes and shapes[0] != shapes[1]):
            raise ValueError(
                f"{name} is {old.dtype} of shape {shapes[0]} in one delta and {values.dtype} of shape {shapes[1]} in "
                "another: they are of different models"
            )
        kept = ~torch.isin(ours.long(), positions.long())
        again = ~kept
        both[name] = (torch.cat([ours[kept].long(), positions.long()]), torch.cat([old[kept], values]))
        before = None
        if name in first.before and theirs in other.before and (consecutive or not again.any()):
            # where both are, the other has found what the first has written
            before = first.before[name] + other.before[theirs] - int(checksum(ours[again], old[again]))
        both.before.pop(name, None)
        if before is not None:
            both.before[name] = (before + (1 << 63)) % (1 << 64) - (1 << 63)
        if not consecutive and again.any():
            count = _differing(ours[again], old[again], positions, values)
            if count:
                both.conflicts[name] = both.conflicts.get(name, 0) + count
    return both


def _differing(positions: Tensor, values: Tensor, others: Tensor, theirs: Tensor) -> int:
    """Return at how many of these positions, each of which is among `others`, the values have other bits."""
    order = others.long().argsort()
    place = order[torch.searchsorted(others.long()[order], positions.long())]
    return int(differ(values, theirs[place]).sum())
