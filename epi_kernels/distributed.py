"""Several ranks that share one model: the shard that each has of a tensor, and the few numbers on which they agree.

A sharded parameter is a DTensor (FSDP2, HSDP, tensor parallelism and their combinations), a slice that FSDP1 made, or a
whole parameter that only one rank has. Everything here works on shards; nothing is gathered.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epi_kernels.ops.table import on_device

# the answer is quick for these types: a step asks about every tensor
_PLAIN = (Tensor, torch.nn.Parameter)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor of torch.distributed, of which this rank has a shard or a replica."""
    if type(tensor) in _PLAIN or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, not copied; a plain tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    # without gradients it needs no detach(), which inference mode refuses
    return (tensor.detach() if torch.is_grad_enabled() else tensor).to_local()  # type: ignore[attr-defined]


def is_slice(tensor: Tensor) -> bool:
    """Return whether a tensor is a slice that FSDP1 made of a parameter (use_orig_params=True)."""
    return hasattr(tensor, "_fsdp_flattened")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, or a slice of FSDP1's."""
    return is_dtensor(tensor) or is_slice(tensor)


def local_gradient(param: Tensor) -> Tensor:
    """Return this rank's shard of a parameter's gradient, placed as the parameter is."""
    grad = param.grad
    assert grad is not None
    if not is_dtensor(grad):
        return grad
    if grad.placements != param.placements:  # type: ignore[attr-defined]
        # a partial sum is not a gradient yet
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(grad)


def wrapped(shard: Tensor, like: Tensor, shape: torch.Size | None = None) -> Tensor:
    """Return a shard as a DTensor with the placements of `like`; as it is where `like` is no DTensor.

    Args:
        shard: this rank's.
        like: a parameter.
        shape: of the whole tensor, which is contiguous; None: shape and strides of `like`.
    """
    if not is_dtensor(like):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    stride = like.stride()
    if shape is not None:
        stride = torch.empty(shape, dtype=shard.dtype, device="meta").stride()
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape or like.shape, stride=stride)


def offsets_of(tensor: Tensor) -> list[int]:
    """Return, for each dimension, where this rank's shard of a DTensor starts in the whole tensor; 0 if it is whole."""
    if not is_dtensor(tensor):
        return [0] * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    # a rank outside of the mesh has no entries, and gets no offsets
    return [int(offset) for offset in offsets] or [0] * tensor.dim()


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of the global shape of `like` as a DTensor with the placements of `like`; no communication.

    Raises:
        ValueError: `whole` is a DTensor with other placements.
    """
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if is_dtensor(whole):
        theirs = whole.placements  # type: ignore[attr-defined]
        if theirs != placements:
            raise ValueError(f"a mask is placed {theirs} and its parameter {placements}; place it alike")
        return whole
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def reshard(model: torch.nn.Module) -> None:
    """Let an FSDP2 model have its shards again: after a forward pass without backward its root has whole parameters."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@dataclass(frozen=True)
class Shard:
    """The shard that a rank has of one eligible parameter."""

    name: str
    key: tuple[object, ...]  # equal on the ranks that have the same shard
    layer: str
    budget: tuple[str, float]  # scope and isolation_ratio
    entries: int
    of: int | None  # entries of the whole parameter; None: not known, and every rank must have the name


@dataclass
class Agreement:
    """What all ranks know of each other; equal on all ranks, except `owned`."""

    layers: list[str] = field(default_factory=list)
    budgets: list[tuple[str, float]] = field(default_factory=list)
    layer_eligible: list[int] = field(default_factory=list)
    budget_eligible: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (layer, budget) that have entries
    owned: set[str] = field(default_factory=set)  # names of the parameters whose shard this rank counts


def agreement(everyone: Sequence[Sequence[Shard]], rank: int) -> Agreement:
    """Return the agreement of one rank, from the shards that every rank has.

    If several ranks have the same shard, the lowest of them counts it, so that a replicated entry counts once.

    Raises:
        ValueError: the shards of all ranks do not make exactly one whole parameter of each name.

    Example:
        >>> shard = Shard("w", ("whole",), "layer", ("global", 0.1), entries=4, of=4)
        >>> agreement([[shard], [shard]], rank=1)  # the same on both ranks: rank 0 counts the 4 entries
        Agreement(layers=['layer'], budgets=[('global', 0.1)], layer_eligible=[4], budget_eligible=[4], pairs=[(0, 0)],
            owned=set())
    """
    _check_pieces(everyone)
    found = Agreement()
    layers: dict[str, int] = {}
    budgets: dict[tuple[str, float], int] = {}
    pairs: dict[tuple[int, int], None] = {}
    seen: set[tuple[object, ...]] = set()
    for holder, theirs in enumerate(everyone):
        for shard in theirs:
            layer = layers.setdefault(shard.layer, len(layers))
            budget = budgets.setdefault(shard.budget, len(budgets))
            found.layer_eligible += [0] * (len(layers) - len(found.layer_eligible))
            found.budget_eligible += [0] * (len(budgets) - len(found.budget_eligible))
            if (shard.name, *shard.key) in seen:
                continue
            seen.add((shard.name, *shard.key))
            found.layer_eligible[layer] += shard.entries
            found.budget_eligible[budget] += shard.entries
            pairs[layer, budget] = None
            if holder == rank:
                found.owned.add(shard.name)
    found.layers, found.budgets, found.pairs = list(layers), list(budgets), list(pairs)
    return found


def _check_pieces(everyone: Sequence[Sequence[Shard]]) -> None:
    """Check that the shards of each name make one whole parameter.

    Raises:
        ValueError: they do not; the message names it.
    """
    holders: dict[str, dict[int, Shard]] = {}
    for rank, theirs in enumerate(everyone):
        for shard in theirs:
            if rank in holders.setdefault(shard.name, {}):
                raise ValueError(f"rank {rank} has two parameters of the name {shard.name}; name them apart")
            holders[shard.name][rank] = shard
    for name, shards in holders.items():
        without = [rank for rank in range(len(everyone)) if rank not in shards]
        (first, one), *others = shards.items()
        for rank, other in others:
            if other.of != one.of or (other.key == one.key and other.entries != one.entries):
                raise ValueError(
                    f"{name} is of {other.of} entries on rank {rank} and of {one.of} on rank {first}: a name must be "
                    "one parameter on all ranks. Name the parameters as the whole model has them"
                )
        count = sum({shard.key: shard.entries for shard in shards.values()}.values())
        if without if one.of is None else count != one.of:
            whole = "" if one.of is None else f", which has {one.of}"
            raise ValueError(
                f"the ranks hold {count} entries of {name}{whole}; ranks {without} do not have it. Give every rank's "
                "optimizer the same parameters, named as the whole model has them"
            )


def _check_settings(everyone: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Check that each setting of a parameter group is equal on all ranks that have it.

    Raises:
        ValueError: one differs; the message names the first, and both values.
    """
    said: list[dict[str, tuple[int, Any]]] = [{} for _ in everyone[0]]
    for rank, theirs in enumerate(everyone):
        if len(theirs) != len(everyone[0]):
            raise ValueError(f"rank {rank} has {len(theirs)} parameter groups and rank 0 has {len(everyone[0])}")
        for i, (before, group) in enumerate(zip(said, theirs, strict=True)):
            for key, value in group.items():
                first, other = before.setdefault(key, (rank, value))
                if other != value:
                    raise ValueError(
                        f"{key} of parameter group {i} is {value!r} on rank {rank} and {other!r} on rank {first}; it "
                        "must be the same on all ranks"
                    )


class AgreeAgain(Exception):  # noqa: N818  not an error: all ranks raise it, and then agree again
    """A rank's shards or settings are no longer those on which all ranks agreed."""


class Ranks:
    """The ranks of a process group, with the exchanges that a refresh needs."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if _on_cuda(group) else torch.device("cpu")

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Raise an error that names what this rank waited for, if the other ranks did not come."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} waited for all ranks of the process group at {what}, and they did not come: every "
                "rank of it must take the same steps, with gradients or without, and call refresh() and "
                "add_param_group() alike. If some of its ranks have no part in this optimizer, give process_group="
                f"({error})"
            ) from error

    def agree(self, held: Sequence[Shard], settings: Sequence[dict[str, Any]]) -> Agreement:
        """Tell all ranks which shards this one has, and return the agreement; one exchange of a few names a parameter.

        Args:
            held: this rank's shard of each eligible parameter.
            settings: for each group, settings that must be equal on all ranks that have them.

        Raises:
            ValueError: on every rank: settings differ, or the shards of a parameter do not make a whole one.
            RuntimeError: the other ranks did not come within the group's time-out.
        """
        everyone: list[Any] = [None] * self.size
        with self._together("the exchange of settings"):
            dist.all_gather_object(everyone, (list(held), list(settings)), group=self.group)
        _check_settings([theirs for _, theirs in everyone])
        return agreement([theirs for theirs, _ in everyone], self.rank)

    def ranges(self, ranges: Tensor, clock: int, settings: object = None, *, again: bool = False) -> Tensor:
        """Return the range of every layer over all ranks: the smallest of all minima, the largest of all maxima.

        With NCCL the host waits for the device here, and nowhere else in a refresh: it must know whether all agree.

        Args:
            ranges: float32 [layers, 2] of this rank.
            clock: the step of this refresh; must be the same on all ranks.
            settings: settings that are as they were when all agreed, or have changed alike on all ranks.
            again: whether this rank wants all ranks to agree again.

        Raises:
            RuntimeError: on every rank: one refreshes at another step than the others; or the others did not come
                within the group's time-out.
            AgreeAgain: on every rank: one wants that, or their settings differ by now.
        """
        digest = zlib.crc32(repr(settings).encode())
        said = torch.tensor([again, digest, -digest, clock, -clock], dtype=torch.float64, device="cpu")
        low, high = ranges.to(self.device, torch.float64).unbind(1)
        largest = torch.cat([-low, high, on_device(said, self.device)])
        with self._together(f"the refresh at step {clock}"):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        wanted, digest_last, digest_first, last, first = largest[-5:].tolist()
        if -first != last:
            raise RuntimeError(
                f"a refresh is at step {clock} on rank {self.rank}, and the ranks are between step {int(-first)} "
                f"and {int(last)}: every rank must take the same steps, and call refresh() at the same one"
            )
        if wanted or -digest_first != digest_last:
            raise AgreeAgain
        low, high = largest[:-5].float().view(2, -1)
        return torch.stack([-low, high], 1).to(ranges.device)

    def union(self, names: Sequence[str]) -> list[str]:
        """Return the names that any rank gives, in order."""
        everyone: list[list[str]] = [[]] * self.size
        with self._together("the exchange of names"):
            dist.all_gather_object(everyone, list(names), group=self.group)
        return sorted({name for theirs in everyone for name in theirs})

    def sum(self, counts: Tensor) -> Tensor:
        """Return the sum of int64 counts over all ranks."""
        total = counts.to(self.device, copy=True)
        with self._together("a sum of counts"):
            dist.all_reduce(total, dist.ReduceOp.SUM, group=self.group)
        return total.to(counts.device)


def shard_key(param: Tensor, rank: int, *, partitioned: bool) -> tuple[object, ...]:
    """Return a key that is equal on the ranks that have the same shard of a parameter, and differs on the others.

    Args:
        param: a parameter of an optimizer.
        rank: this rank.
        partitioned: whether only this rank has its plain parameters; else all ranks that have the name share them.
    """
    if is_dtensor(param):
        coordinate = param.device_mesh.get_coordinate()  # type: ignore[attr-defined]
        if coordinate is None:
            return ("nothing",)  # this rank is outside of the mesh
        placed = enumerate(param.placements)  # type: ignore[attr-defined]
        return tuple(
            (repr(placement), coordinate[i], param.device_mesh.size(i))  # type: ignore[attr-defined]
            for i, placement in placed
            if not placement.is_replicate()
        )
    return ("rank", rank) if partitioned or is_slice(param) else ("whole",)


@dataclass(frozen=True)
class Lost:
    """Stands for the process group that a copy of an optimizer has lost."""

    way_out: str


class Given:
    """A process group as an optimizer gives it to pickle and deepcopy: only a copy in this process has the group."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> "Given":
        """Return itself: all copies share the group."""
        return self

    def __reduce__(self) -> Any:
        """Return what another process has instead."""
        return Lost, ("construct the optimizer again with process_group=, and load the state_dict() of this one",)


def given(group: Any) -> Any:
    """Return a process group that a user gave, or None, wrapped for pickle and deepcopy."""
    return group if group is None or isinstance(group, (Given, Lost)) else Given(group)


def group_of(params: Sequence[Tensor], asked: Any) -> Any | None:
    """Return the process group over which the ranks must agree, or None where each rank has all it needs.

    Args:
        params: the parameters of an optimizer.
        asked: a process group that the user named, or None: the default group, if a parameter is sharded.

    Raises:
        RuntimeError: the optimizer is a copy, and its process group is lost.
    """
    if isinstance(asked, Lost):
        raise RuntimeError(
            "this optimizer is a copy of one whose parameters are shared out over ranks, and its process group did not "
            f"come along: each rank would go by masks of its own. Way out: {asked.way_out}"
        )
    if isinstance(asked, Given):
        return asked.group
    if asked is not None:
        return asked
    if dist.is_available() and dist.is_initialized() and any(map(is_sharded, params)):
        return dist.group.WORLD
    return None


def rank_in(asked: Any) -> int | None:
    """Return this rank in the process group that a user gave, else in the default group; None without ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = asked.group if isinstance(asked, Given) else asked
    return dist.get_rank(None if isinstance(group, Lost) else group)


def _on_cuda(group: Any) -> bool:
    return torch.cuda.is_available() and "nccl" in str(dist.get_backend(group))
