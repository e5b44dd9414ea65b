"""One AdamW step of selected entries, plain torch: the truth for every other backend."""

from collections.abc import Sequence

from torch import Tensor

from epi_kernels.contract import Scalars, arithmetic_dtype
from epi_kernels.ops.equations import first_moment, moved, second_moment


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
    rows: Sequence[int],
) -> None:
    """Step the selected entries in place; contract: `epi_kernels.ops.sparse_adamw_`."""
    for i, param in enumerate(params):
        s = Scalars(*scalars[rows[i]].tolist())
        dtype = arithmetic_dtype(param.dtype)
        chosen = indices[i].long()
        grad = grads[i].take(chosen).to(dtype) * s.sign
        m = first_moment(exp_avgs[i].to(dtype), grad, s.one_minus_beta1)
        v = second_moment(exp_avg_sqs[i].to(dtype), grad, s.beta2, s.one_minus_beta2)
        theta = moved(param.take(chosen).to(dtype), m, v, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps)
        exp_avgs[i].copy_(m)
        exp_avg_sqs[i].copy_(v)
        param.put_(chosen, theta.to(param.dtype))
