"""One AdamW step in which locked entries do not move, in CUDA; kernel: csrc/cuda/masked_adamw.cu."""

import functools

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.backends import cuda, native
from epi_kernels.contract import Scalars
from epi_kernels.ops.equations import advanced_importance, first_moment, moved, second_moment
from epi_kernels.ops.masked_adamw.sweep import TableSweep


class Sweep(TableSweep):
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.Sweep`."""

    def _piece(self) -> int:
        return cuda.sweep_piece()

    def _launch(
        self,
        scalars: Tensor,
        nonfinite: Tensor,
        advanced: bool,
        refreshed: Tensor | None,
        grad_factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        cuda.call(
            "epi_cuda_masked_adamw",
            self._device,
            self._table.rows(),
            self._table.pieces,
            self._table.pieces.numel(),
            scalars,
            nonfinite,
            refreshed,
            grad_factor,
            found_inf,
            native.DTYPES[self._param_dtype],
            native.DTYPES[self._grad_dtype],
            native.LOCK_IN[self._lock_in],
            advanced,
        )


@functools.cache
def obstacle(device: torch.device) -> str:
    """Return why the kernel cannot be used on a GPU; empty if it can. Takes a step and compares it, once."""
    if cuda.obstacle(device):
        return cuda.obstacle(device)
    s = Scalars(-1.0, 0.99, 0.9, 0.1, 0.999, 0.001, 1e-3, 0.1, 1e-8, 0.9, 0.1)
    generator = torch.Generator("cpu").manual_seed(0)
    p, g, m, v, raw = torch.randn(
        5, 3 * cuda.sweep_piece() // 2, generator=generator, dtype=torch.float32, device="cpu"
    )
    v, signed = v.square(), lock.with_lock(raw.abs(), raw < 0)
    ours = [tensor.to(device) for tensor in (p, g, m, v, signed)]
    params, grads, exp_avgs, exp_avg_sqs, locks = ([tensor] for tensor in ours)
    lists = (params, grads, exp_avgs, exp_avg_sqs, [None], locks)
    sweep = Sweep(*lists, "importance", [True])
    scalars = torch.tensor([s], dtype=torch.float64, device="cpu")
    count = torch.zeros(1, dtype=torch.int64, device=device)
    sweep.step_(*lists, False, count, scalars, [0], False, None, None)
    m = first_moment(m, -g, s.one_minus_beta1)
    v = second_moment(v, g, s.beta2, s.one_minus_beta2)
    after, _ = advanced_importance(signed, g, s.importance_beta, s.one_minus_importance_beta, keep_finite=True)
    theta = torch.where(raw < 0, p, moved(p, m, v, s.decay, s.step_size, s.bias_correction2_sqrt, s.eps))
    same = all(torch.equal(x.cpu(), y) for x, y in zip(ours, (theta, g, m, v, after), strict=True))
    return "" if same else "on this GPU its step differs from the reference's; please report it"
