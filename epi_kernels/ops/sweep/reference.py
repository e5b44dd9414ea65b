"""One step of a rule in which locked entries do not move, plain torch: the truth for every other backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.contract import arithmetic_dtype
from epi_kernels.ops.equations import advanced_importance, multiplied
from epi_kernels.ops.storages import noise_of, read, stored_weight, weight_of, write_
from epi_kernels.ops.tensors import Tensors, TensorsOf
from epi_kernels.rules import Rule
from epi_kernels.schema import SweepScalars
from epi_kernels.storage.noise import IMPORTANCE, OF_SLOT

_OWN = len(SweepScalars._fields)


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_sweep`."""

    table = None

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
        for i, raw_grad in enumerate(tensors.grads):
            of_param = tensors.of(i, self._rule)
            raw, row = multiplied(raw_grad, grad_factor), numbers[rows[i]]
            nonfinite[i] += _step(self._rule, of_param, raw, self._lock_in[i], row, bool(advanced))
        return True


def _step(rule: Rule, of: TensorsOf, raw_grad: Tensor, lock_in: str, row: list[float], advanced: bool) -> Tensor | int:
    """Step one tensor in place; return how many of its squared gradients are not finite, where the step checks them."""
    own, of_rule = SweepScalars(*row[:_OWN]), rule.scalars(*row[_OWN:])
    dtype = arithmetic_dtype(of.param.dtype)
    grad = raw_grad.to(dtype) * own.sign
    noise = None if of.place is None else noise_of(of.place, own.step, of.param.shape, of.param.device)
    bad: Tensor | int = 0

    values = [
        None if tensor is None else read(tensor, scales, dtype)
        for tensor, scales in zip(of.slots, of.scales, strict=True)
    ]
    signed: Tensor | None = None
    if lock_in == "slot":
        signed = values[rule.importance_index]
    elif of.lock is not None:
        signed = of.lock if lock_in == "static" else read(of.lock, of.lock_scales, arithmetic_dtype(of.lock.dtype))
    advances = lock_in in ("importance", "slot") and not advanced
    if advances:
        assert signed is not None
        betas = own.importance_beta, own.one_minus_importance_beta
        signed, bad = advanced_importance(signed, raw_grad, *betas, keep_finite=lock_in == "importance")
    if lock_in == "slot":
        values[rule.importance_index] = signed
    if rule.importance_slot is not None:
        values[rule.importance_index] = lock.magnitude(values[rule.importance_index])  # type: ignore[arg-type]

    theta, values = rule.update(weight_of(of.param, of.rest, dtype), grad, values, of_rule, lock_in == "slot")
    param, rest = stored_weight(theta, of.param, of.rest, noise, of.stochastic)
    if lock_in != "none":
        assert signed is not None
        # a choice, never a product with 0: 0 * inf is NaN, and a locked entry keeps its bits
        locked = lock.is_locked(signed)
        param = torch.where(locked, of.param, param)
        rest = None if rest is None else torch.where(locked, of.rest, rest)  # type: ignore[arg-type]
    of.param.copy_(param)
    if rest is not None:
        of.rest.copy_(rest)  # type: ignore[union-attr]
    if lock_in == "importance" and advances:
        write_(of.lock, of.lock_scales, signed, noise, IMPORTANCE, positive=False)  # type: ignore[arg-type]
    for k, (tensor, value) in enumerate(zip(of.slots, values, strict=True)):
        important = k == rule.importance_index
        if lock_in == "slot" and important:
            if advanced:
                continue  # the refresh has written this slot
            value = signed
        if tensor is not None and value is not None:
            write_(tensor, of.scales[k], value, noise, OF_SLOT[k], positive=important)
    return bad
