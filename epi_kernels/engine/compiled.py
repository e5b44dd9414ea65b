"""A step under torch.compile: one operation that the compiler does not look into.

Whether to refresh, and with which learning rate to step, is decided when the operation runs: the graph has no such
value in it, and a new learning rate compiles nothing anew.
"""

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Stepping(Protocol):
    """An optimizer whose step can be an operation."""

    def _step_tensors(self) -> list[Tensor]:
        """Return the parameters, in the order in which the operation gets them."""

    def _run_step(self) -> None:
        """Take a step by the parameters' gradients."""


# A custom op cannot take a Python object; the optimizer travels as an int key into this registry.
_optimizers: "WeakValueDictionary[int, Stepping]" = WeakValueDictionary()


def register(optimizer: Stepping) -> int:
    """Return the number by which `step_` knows an optimizer, as long as it lives."""
    _optimizers[id(optimizer)] = optimizer
    return id(optimizer)


@torch.library.custom_op(
    "epi_kernels::optimizer_step_",
    mutates_args=("params",),
    # between two steps the host decides
    tags=[getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)],
)
def step_(params: Sequence[Tensor], grads: Sequence[Tensor | None], optimizer: int) -> None:
    """Take a step of an optimizer with these gradients.

    Args:
        params: the optimizer's parameters, or copies of them in the same order; written.
        grads: the gradient of each parameter, or None.
        optimizer: the number that `register` has returned for it.
    """
    stepping = _optimizers[optimizer]
    own = stepping._step_tensors()
    # some compiler backends hand in copies, and copy them back afterwards
    copies = [(ours, given) for ours, given in zip(own, params, strict=True) if ours.data_ptr() != given.data_ptr()]
    before = [param.grad for param in own]
    try:
        for ours, given in copies:
            ours.copy_(given)
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad
        stepping._run_step()
        for ours, given in copies:
            given.copy_(ours)
    finally:
        for param, grad in zip(own, before, strict=True):
            param.grad = grad


step_.register_fake(lambda *_: None)
