"""What has changed since a snapshot or a base, found by comparing bits."""

from collections.abc import Iterable, Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from epi_kernels.delta.checkpoint import Checkpoint, Weight, bits_in, known_dtype, values_from
from epi_kernels.delta.entries import (
    Delta,
    Entries,
    by_name,
    check,
    check_dtype,
    checksum,
    differ,
    in_whole,
    narrow,
    summed,
    values_at,
)
from epi_kernels.distributed import is_dtensor, local, shard_of, wrapped

Base = Mapping[str, Tensor] | nn.Module | str | PathLike[str]


@torch.no_grad()
def changes(named: Iterable[tuple[str, Tensor]], base: Base) -> Delta:
    """Return the entries of parameters whose bits are not those of a base.

    One parameter after the other is compared; what `base` has besides is not looked at. If parameters are sharded,
    every rank must call.

    Args:
        named: names and parameters.
        base: {name: tensor}, such as ``{name: p.detach().clone() for name, p in model.named_parameters()}``, or a
            model, or the path of a checkpoint of save_pretrained. Tensors are whole, or placed as the parameter is.

    Returns:
        The delta, on the CPU, with shapes and with checksums of the values in the base. Parameters that have not
        changed are left out.

    Raises:
        ValueError: the base lacks a parameter, or has it in another shape, dtype or placement.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> snapshot = {name: param.detach().clone() for name, param in model.named_parameters()}
        >>> with torch.no_grad():
        ...     model.weight[0, 1] = 0.5
        >>> changes(model.named_parameters(), snapshot)
        {'weight': (tensor([1], dtype=torch.int32), tensor([0.5000]))}
    """
    named, source = list(named), tensors_of(base)
    names = by_name([name for name, _ in named], source, "the base", "the optimizer has")
    found = Delta()
    for name, param in named:
        old = _whole(source[names[name]])
        if old.shape != param.shape:
            raise ValueError(f"{name} has shape {tuple(param.shape)}, and {tuple(old.shape)} in the base")
        check_dtype(name, old.dtype, param.dtype, "the model", convert=False)
        theirs = local(shard_of(old.to(param.device), param)).reshape(-1)
        ours = local(param).reshape(-1)
        where = differ(ours, theirs).nonzero()[:, 0]
        before = int(summed(checksum(in_whole(param, where), theirs[where]), param))
        entries = entries_at(param, where)
        if len(entries[0]):
            found[name], found.shapes[name], found.before[name] = entries, tuple(param.shape), before
    return found


def tensors_of(base: Base) -> Mapping[str, Tensor | Weight]:
    """Return the tensors of a base by name, those of a checkpoint as where they are."""
    if isinstance(base, nn.Module):
        return dict(base.named_parameters(remove_duplicate=False))
    return base if isinstance(base, Mapping) else Checkpoint(base).weights


def _whole(held: Tensor | Weight) -> Tensor:
    if isinstance(held, Tensor):
        return held.detach()
    with bits_in(held, "r") as integers:
        return values_from(integers, known_dtype(held)).view(held.stored.shape)


@torch.no_grad()
def values_before(base: Base, delta: Mapping[str, Entries]) -> dict[str, Tensor]:
    """Return what a base has at the positions of a delta, by the delta's names; of DTensors every rank must call.

    Raises:
        ValueError: the base lacks a parameter, or has it in another shape or dtype.
    """
    source = tensors_of(base)
    names = by_name(delta, source, "the base")
    found = {}
    for name, (positions, values) in delta.items():
        held = source[names[name]]
        shape = held.shape if isinstance(held, Tensor) else held.stored.shape
        dtype = held.dtype if isinstance(held, Tensor) else known_dtype(held)
        check(name, positions, values, tuple(shape))
        check_dtype(name, values.dtype, dtype, "the base", convert=False)
        if isinstance(held, Tensor):
            found[name] = values_at(held, positions.long().to(held.device)).cpu()
        else:
            with bits_in(held, "r") as integers:
                found[name] = values_from(integers[positions.numpy()], dtype)
    return found


def entries_at(param: Tensor, where: Tensor) -> Entries:
    """Return positions in a whole parameter and values, on the CPU, of entries of all ranks.

    Args:
        param: plain or a DTensor; every rank must call.
        where: the positions of the entries in this rank's shard.
    """
    positions = where
    if is_dtensor(param):
        # a byte for each entry is gathered: the ranks do not know each other's number of entries
        mask = torch.zeros(local(param).numel(), dtype=torch.uint8, device=param.device)
        mask[where.long()] = 1
        whole = wrapped(mask.view(local(param).shape), param).full_tensor()  # type: ignore[attr-defined]
        positions = whole.reshape(-1).nonzero()[:, 0]
    return narrow(positions, param.numel()).cpu(), values_at(param, positions.long()).cpu()
