"""One AdamW step of selected entries, plain torch: the truth for every other backend."""

from collections.abc import Sequence

from torch import Tensor

from epi_kernels.contract import Scalars, arithmetic_dtype
from epi_kernels.ops.equations import first_moment, moved, second_moment
from epi_kernels.ops.flat import put_


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.SparseSweep`."""

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        indices: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
    ) -> None:
        """Take the tensors, of which nothing is prepared."""

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        indices: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        scalars: Tensor,
        rows: Sequence[int],
    ) -> None:
        """Take the step."""
        numbers = [Scalars(*row) for row in scalars.tolist()]
        tensors = zip(params, indices, exp_avgs, exp_avg_sqs, strict=True)
        for grad, row, others in zip(grads, rows, tensors, strict=True):
            _step(grad, numbers[row], *others)


def _step(raw_grad: Tensor, s: Scalars, param: Tensor, indices: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    dtype = arithmetic_dtype(param.dtype)
    chosen = indices.long()
    grad = raw_grad.take(chosen).to(dtype) * s.sign
    m = first_moment(exp_avg.to(dtype), grad, s.one_minus_beta1)
    v = second_moment(exp_avg_sq.to(dtype), grad, s.beta2, s.one_minus_beta2)
    theta = moved(param.take(chosen).to(dtype), m, v, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    put_(param, chosen, theta.to(param.dtype))
