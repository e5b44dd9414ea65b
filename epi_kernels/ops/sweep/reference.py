"""One step of a rule in which locked entries do not move, plain torch: the truth for every other backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.contract import arithmetic_dtype
from epi_kernels.ops.equations import advanced_importance, multiplied
from epi_kernels.ops.tensors import Tensors
from epi_kernels.rules import Rule
from epi_kernels.schema import SweepScalars

_OWN = len(SweepScalars._fields)


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_sweep`."""

    def __init__(self, rule: Rule, tensors: Tensors, lock_in: str, lockable: Sequence[bool]) -> None:
        self._rule = rule
        self._lock_in = [lock_in if can else "none" for can in lockable]

    def step_(
        self,
        tensors: Tensors,
        nonfinite: Tensor,
        scalars: Tensor,
        rows: Sequence[int],
        advanced: bool | Tensor,
        grad_factor: Tensor | None,
        found_inf: Tensor | None,
        moved: bool,
    ) -> bool:
        """Take the step."""
        if found_inf is not None and found_inf.item():
            return False
        numbers = scalars.tolist()
        locks = tensors.locks or [None] * len(tensors.params)
        absent = [None] * len(tensors.params)
        slots = [tensors.slots.get(slot.name) or absent for slot in self._rule.slots]
        for i, (param, grad, *of_param) in enumerate(zip(tensors.params, tensors.grads, *slots, strict=True)):
            raw = multiplied(grad, grad_factor)
            row = numbers[rows[i]]
            nonfinite[i] += _step(self._rule, param, raw, of_param, locks[i], self._lock_in[i], row, bool(advanced))
        return True


def _step(
    rule: Rule,
    param: Tensor,
    raw_grad: Tensor,
    slots: list[Tensor | None],
    lock_: Tensor | None,
    lock_in: str,
    row: list[float],
    advanced: bool,
) -> Tensor | int:
    """Step one tensor in place; return how many of its squared gradients are not finite, where the step checks them."""
    own, of_rule = SweepScalars(*row[:_OWN]), rule.scalars(*row[_OWN:])
    dtype = arithmetic_dtype(param.dtype)
    grad = raw_grad.to(dtype) * own.sign
    betas = own.importance_beta, own.one_minus_importance_beta
    bad: Tensor | int = 0

    signed = slots[rule.importance_index] if lock_in == "slot" else lock_
    if lock_in in ("importance", "slot") and not advanced:
        assert signed is not None
        after, bad = advanced_importance(signed, raw_grad, *betas, keep_finite=lock_in == "importance")
        signed.copy_(after)

    values = [None if tensor is None else tensor.to(dtype) for tensor in slots]
    if rule.importance_slot is not None:
        values[rule.importance_index] = lock.magnitude(values[rule.importance_index])  # type: ignore[arg-type]
    theta, values = rule.update(param.to(dtype), grad, values, of_rule, lock_in == "slot")
    theta = theta.to(param.dtype)
    if lock_in != "none":
        assert signed is not None
        # a choice, never a product with 0: 0 * inf is NaN, and a locked entry keeps its bits
        theta = torch.where(lock.is_locked(signed), param, theta)
    param.copy_(theta)
    for tensor, value in zip(slots, values, strict=True):
        # the slot that serves as the importance was advanced already, together with its lock bits
        if tensor is not None and value is not None and not (lock_in == "slot" and tensor is signed):
            tensor.copy_(value)
    return bad
