"""One step of a rule over trainable entries, plain torch: the truth for every other backend."""

from collections.abc import Sequence

from torch import Tensor

from epi_kernels import lock
from epi_kernels.contract import arithmetic_dtype
from epi_kernels.ops.flat import put_
from epi_kernels.ops.tensors import Tensors
from epi_kernels.rules import Rule
from epi_kernels.schema import SweepScalars

_OWN = len(SweepScalars._fields)


class Gather:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_gather`."""

    def __init__(self, rule: Rule, tensors: Tensors, indices: Sequence[Tensor]) -> None:
        self._rule = rule

    def step_(self, tensors: Tensors, indices: Sequence[Tensor], scalars: Tensor, rows: Sequence[int]) -> None:
        """Take the step."""
        numbers = scalars.tolist()
        absent = [None] * len(tensors.params)
        slots = [tensors.slots.get(slot.name) or absent for slot in self._rule.slots]
        for param, grad, chosen, row, *of_param in zip(
            tensors.params, tensors.grads, indices, rows, *slots, strict=True
        ):
            _step(self._rule, param, grad, chosen.long(), of_param, numbers[row])


def _step(
    rule: Rule, param: Tensor, raw_grad: Tensor, chosen: Tensor, slots: list[Tensor | None], row: list[float]
) -> None:
    own, of_rule = SweepScalars(*row[:_OWN]), rule.scalars(*row[_OWN:])
    dtype = arithmetic_dtype(param.dtype)
    grad = raw_grad.take(chosen).to(dtype) * own.sign
    values = [None if tensor is None else tensor.to(dtype) for tensor in slots]
    if rule.importance_slot is not None:
        values[rule.importance_index] = lock.magnitude(values[rule.importance_index])  # type: ignore[arg-type]
    theta, values = rule.update(param.take(chosen).to(dtype), grad, values, of_rule, False)
    for tensor, value in zip(slots, values, strict=True):
        if tensor is not None and value is not None:
            tensor.copy_(value)
    put_(param, chosen, theta.to(param.dtype))
