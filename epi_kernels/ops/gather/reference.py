"""One step of a rule over trainable entries, plain torch: the truth for every other backend."""

from collections.abc import Sequence

from torch import Tensor

from epi_kernels import lock
from epi_kernels.contract import arithmetic_dtype
from epi_kernels.ops.flat import put_
from epi_kernels.ops.storages import stored_weight, weight_of, write_
from epi_kernels.ops.tensors import Tensors, TensorsOf
from epi_kernels.rules import Rule
from epi_kernels.schema import SweepScalars
from epi_kernels.storage.noise import OF_SLOT, Noise

_OWN = len(SweepScalars._fields)


class Gather:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_gather`."""

    def __init__(self, rule: Rule, tensors: Tensors, indices: Sequence[Tensor]) -> None:
        self._rule = rule

    def step_(self, tensors: Tensors, indices: Sequence[Tensor], scalars: Tensor, rows: Sequence[int]) -> None:
        """Take the step."""
        numbers = scalars.tolist()
        for i, (grad, chosen) in enumerate(zip(tensors.grads, indices, strict=True)):
            _step(self._rule, tensors.of(i, self._rule), grad, chosen.long(), numbers[rows[i]])


def _step(rule: Rule, of: TensorsOf, raw_grad: Tensor, chosen: Tensor, row: list[float]) -> None:
    own, of_rule = SweepScalars(*row[:_OWN]), rule.scalars(*row[_OWN:])
    dtype = arithmetic_dtype(of.param.dtype)
    grad = raw_grad.take(chosen).to(dtype) * own.sign
    noise = None if of.place is None else Noise(of.place, own.step, chosen)
    values = [None if tensor is None else tensor.to(dtype) for tensor in of.slots]
    if rule.importance_slot is not None:
        values[rule.importance_index] = lock.magnitude(values[rule.importance_index])  # type: ignore[arg-type]
    before = of.param.take(chosen)
    theta, values = rule.update(weight_of(before, of.rest, dtype), grad, values, of_rule, False)
    for k, (tensor, value) in enumerate(zip(of.slots, values, strict=True)):
        if tensor is not None and value is not None:
            write_(tensor, None, value, noise, OF_SLOT[k], positive=False)
    param, rest = stored_weight(theta, before, of.rest, noise, of.stochastic)
    put_(of.param, chosen, param)
    if rest is not None:
        of.rest.copy_(rest)  # type: ignore[union-attr]
