"""DeepSpeed ZeRO: which segment of which parameter lies where in the flat partitions that an optimizer is given.

ZeRO-1 and 2 put one flat float32 tensor into each parameter group, ZeRO-3 one for each of its sub-groups. The tensors
know nothing of names or layers; the engine does.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Segment(NamedTuple):
    """A run of a parameter's entries in a flat partition of this rank."""

    flat: Tensor
    group: int  # of `flat`, in param_groups
    name: str  # of the parameter, in the model
    start: int  # in `flat`
    entries: int  # padding excluded
    of: int  # entries of the whole parameter


def group_of(engine: Any) -> Any:
    """Return the ranks over which an engine has sharded the parameters."""
    return getattr(engine, "data_parallel_group", None) or dist.group.WORLD


def segments_of(engine: Any, optimizer: Any) -> list[Segment]:
    """Return the segments that this rank has; none if the engine leaves the parameters as they are (stage 0).

    Args:
        engine: as deepspeed.initialize returns it.
        optimizer: the one that the engine shall step.

    Raises:
        TypeError: `engine` is not an engine.
        ValueError: it steps another optimizer, or its segments do not lie in the partitions that `optimizer` has.
    """
    missing = [name for name in ("module", "optimizer") if not hasattr(engine, name)]
    if missing:
        raise TypeError(
            f"engine is a {type(engine).__name__} and has no {missing[-1]}; pass what deepspeed.initialize returned, "
            "which is trainer.model_wrapped in a transformers Trainer"
        )
    stepped = [engine.optimizer]
    while getattr(stepped[-1], "optimizer", None) is not None and stepped[-1] is not optimizer:
        stepped.append(stepped[-1].optimizer)  # ZeRO's and the precisions' wrappers
    if stepped[-1] is not optimizer:
        raise ValueError(
            f"the engine steps another optimizer ({type(stepped[-1]).__name__}), and this one would never train. "
            "Give this one to deepspeed.initialize(optimizer=...) and no optimizer in the config; a transformers "
            "Trainer drops optimizers=(optimizer, None) under DeepSpeed, so construct it in "
            "optimizer_cls_and_kwargs or create_optimizer"
        )
    found = list(_segments(engine, optimizer))
    ends: dict[Tensor, list[tuple[int, int, str]]] = {}
    for segment in found:
        if not 0 <= segment.group < len(optimizer.param_groups):
            raise ValueError(
                f"{segment.name} is in group {segment.group} of the engine, and the optimizer has "
                f"{len(optimizer.param_groups)}; bind an engine that was initialized with this optimizer"
            )
        ends.setdefault(segment.flat, []).append((segment.start, segment.start + segment.entries, segment.name))
    for flat, places in ends.items():
        before = (0, 0, "")
        for start, end, name in sorted(place for place in places if place[0] < place[1]):
            if start < before[1] or end > flat.numel():
                other = f"{before[2]} up to {before[1]}" if start < before[1] else f"{flat.numel()} entries"
                raise ValueError(
                    f"{name} has the entries {start} to {end} of a flat partition that has {other}: the engine's sizes "
                    "do not fit; this version of DeepSpeed lays partitions out in a way that is not known here"
                )
            before = (start, end, name)
    return found


def _segments(engine: Any, optimizer: Any) -> Iterator[Segment]:
    zero = engine.optimizer
    named = list(engine.module.named_parameters())
    if hasattr(zero, "grad_position"):  # stage 3
        rank = dist.get_rank(group_of(engine))
        for name, param in named:
            if param.ds_id in zero.grad_position:
                sub_group, start, padded = zero.grad_position[param.ds_id]
                entries = max(0, min(padded, param.ds_numel - rank * param.ds_tensor.ds_numel))
                flat, group = zero.fp32_partitioned_groups_flat[sub_group], zero.sub_group_to_group_id[sub_group]
                yield Segment(flat, group, name, start, entries, param.ds_numel)
        return
    groups = optimizer.param_groups
    owner = {flat.untyped_storage().data_ptr(): (flat, i) for i, g in enumerate(groups) for flat in g["params"]}
    for name, param in named:
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is not None:
            held = owner.get(mapping.get_hp_fragment().untyped_storage().data_ptr())
            if held is None:
                raise ValueError(
                    f"{name} lies in a flat partition that this optimizer does not have: its groups were replaced "
                    "since deepspeed.initialize, or the engine was loaded anew. Bind after that"
                )
            place = mapping.get_hp_fragment_address()
            yield Segment(*held, name, place.start, place.numel, param.numel())
