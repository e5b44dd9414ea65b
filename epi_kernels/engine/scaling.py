"""What multiplies every gradient before a step sees it: the loss scale of mixed precision, and a clip factor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epi_kernels.contract import arithmetic_dtype


class Scaling(NamedTuple):
    """Float32 tensors of one value, by device; `factor` is empty if it is 1, `found_inf` without a scaler."""

    factor: dict[torch.device, Tensor]
    found_inf: dict[torch.device, Tensor]


UNSCALED = Scaling({}, {})


def scaling_of(
    grads: Sequence[Tensor], clip_grad_norm: float | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> Scaling:
    """Return the factor for the gradients, and whether the step is skipped, on every device that has a gradient.

    ::

        factor = min(1, clip_grad_norm / (|g / grad_scale| + 1e-6)) / grad_scale

    The norm is that of all gradients together, as torch.nn.utils.clip_grad_norm_ has it, in float32 or wider.

    Args:
        grads: real; read once if there is a norm to clip to.
        clip_grad_norm: the largest norm, or None.
        grad_scale: the factor by which a torch.amp.GradScaler has multiplied the loss, or None.
        found_inf: not 0 if the scaler has found an infinite gradient, or None.
    """
    if not grads:
        return UNSCALED
    devices = list(dict.fromkeys(grad.device for grad in grads))
    # as GradScaler.unscale_ has it
    factor = None if grad_scale is None else grad_scale.double().reciprocal().float()
    if clip_grad_norm is not None:
        norm = _norm(grads, devices)
        if factor is not None:
            factor = factor.to(norm.device)
            norm = norm * factor
        clip = (clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = clip.float() if factor is None else (clip * factor).float()
    return Scaling(_on_each(devices, factor), _on_each(devices, found_inf))


def _norm(grads: Sequence[Tensor], devices: Sequence[torch.device]) -> Tensor:
    norms: list[Tensor] = []
    for device in devices:
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            here = [grad for grad in grads if grad.device == device and grad.dtype == dtype]
            # the public get_total_norm rounds the norm of each bfloat16 tensor to bfloat16: 0.4% of the factor
            norms += torch._foreach_norm(here, 2.0, arithmetic_dtype(dtype)) if here else []
    return torch.linalg.vector_norm(torch.stack([norm.to(devices[0], norms[0].dtype) for norm in norms]))


def _on_each(devices: Sequence[torch.device], value: Tensor | None) -> dict[torch.device, Tensor]:
    return {} if value is None else {device: value.to(device, torch.float32, non_blocking=True) for device in devices}
