"""The state of an optimizer of this package as torch.optim.AdamW has it, for whoever goes on without this package."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from epi_kernels import lock
from epi_kernels.distributed import local, wrapped
from epi_kernels.engine.optimizer import FusedOptimizer
from epi_kernels.engine.storages import stored
from epi_kernels.isolation.layers import STAMPED
from epi_kernels.optim.isolated import IsolatedOptimizer
from epi_kernels.optim.sparse import SparseAdamW
from epi_kernels.storage import block8


@torch.no_grad()
def torch_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer in the form of torch.optim.AdamW, whichever storages it is kept in.

    The state of a parameter has ``step`` and the slots of the optimizer's rule, such as ``exp_avg``, ``exp_avg_sq`` and
    ``max_exp_avg_sq``: values in float32 (in float64 or complex where the parameter is), without locks. Importances,
    masks and the rests of weights are left out: a weight is then what stands in the parameter. A group has torch's
    settings, and what a program has added to it, such as a scheduler's ``initial_lr``. torch.optim.AdamW loads the
    result, and casts moments to the dtype of their parameter.

    DTensors stay DTensors, placed as they are; nothing is communicated. Tensors that are float32 already are not
    copied, as in torch's ``state_dict``.

    Args:
        optimizer: an `EPIAdamW`, `EPILion` or `MaskedAdamW`; of `EPILion`, the result has the slots of Lion.

    Raises:
        TypeError: it is another optimizer; the message says what to do.

    Example:
        >>> from epi_kernels import EPIAdamW
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = EPIAdamW([("weight", weight)], state_dtype=torch.bfloat16, mask_interval=1, isolation_ratio=0.5)
        >>> weight.grad = torch.tensor([1.0, 2.0])
        >>> optimizer.step()
        >>> other = torch.optim.AdamW([weight])
        >>> other.load_state_dict(torch_state_dict(optimizer))
        >>> other.state[weight]["exp_avg"].dtype, sorted(other.state[weight])
        (torch.float32, ['exp_avg', 'exp_avg_sq', 'step'])
    """
    if isinstance(optimizer, SparseAdamW):
        raise TypeError(
            "SparseAdamW has moments of its trainable entries alone, and AdamW of all entries would move the others; "
            "save its state_dict(), or what it has changed, by delta()"
        )
    if isinstance(optimizer, IsolatedOptimizer):
        raise TypeError(
            "IsolatedOptimizer keeps the state of the optimizer that it wraps in that optimizer's own form; use "
            "optimizer.base.state_dict()"
        )
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"{type(optimizer).__name__} is no optimizer of this package; use its state_dict()")
    packed, rule = optimizer.state_dict(), optimizer._planner.rule
    slots = [slot.name for slot in rule.slots]
    state = {number: _values(entry, slots, rule.importance_slot) for number, entry in packed["state"].items()}
    ours = {*optimizer._ours, *STAMPED}
    groups = [{key: value for key, value in group.items() if key not in ours} for group in packed["param_groups"]]
    return {"state": state, "param_groups": groups}


def _values(entry: dict[str, Any], slots: list[str], signed: str | None) -> dict[str, Any]:
    """Return the clock and the slots of a parameter's saved state; codes of the slot `signed` may carry locks."""
    found = {"step": entry["step"]}
    for name in slots:
        tensor, scales = stored(entry, name)
        if not isinstance(tensor, Tensor):
            continue
        values = local(tensor)
        if scales is not None:
            codes = lock.magnitude(values) if name == signed else values
            values = block8.decoded(codes, local(scales))
        found[name] = wrapped(values.to(torch.promote_types(values.dtype, torch.float32)), tensor)
    return found
