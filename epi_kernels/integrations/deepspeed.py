"""DeepSpeed ZeRO: which piece of which parameter lies where in the flat partitions that an optimizer is given.

ZeRO-1 and 2 put one flat float32 tensor into each parameter group, ZeRO-3 one for each of its sub-groups. The tensors
know nothing of names or layers; the engine does.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Segment(NamedTuple):
    """A piece of a parameter in a flat partition of this rank."""

    flat: Tensor
    group: int  # of `flat`, in param_groups
    name: str  # of the parameter, in the model
    start: int  # in `flat`
    entries: int  # padding excluded
    of: int  # entries of the whole parameter


def group_of(engine: Any) -> Any:
    """Return the ranks among which an engine has shared the parameters out."""
    return getattr(engine, "data_parallel_group", None) or dist.group.WORLD


def segments_of(engine: Any) -> Iterator[Segment]:
    """Yield the pieces that this rank has; none where the engine leaves the parameters as they are (stage 0).

    Args:
        engine: as deepspeed.initialize returns it.
    """
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
    groups = getattr(zero, "optimizer", zero).param_groups
    owner = {flat.untyped_storage().data_ptr(): (flat, i) for i, g in enumerate(groups) for flat in g["params"]}
    for name, param in named:
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is not None:
            flat, i = owner[mapping.get_hp_fragment().untyped_storage().data_ptr()]
            place = mapping.get_hp_fragment_address()
            yield Segment(flat, i, name, place.start, place.numel, param.numel())
