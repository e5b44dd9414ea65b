"""Gradient release: each parameter is stepped as its gradient is ready, and the gradient freed."""

import torch
from torch import Tensor

from epi_kernels.optim.drop_in import DropInAdamW


class GradientRelease:
    """What `release_gradients` has set up; `remove` takes it back."""

    def __init__(self, model: torch.nn.Module, optimizer: DropInAdamW) -> None:
        _check(model, optimizer)
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()
        self._handles = [
            param.register_post_accumulate_grad_hook(lambda param, group=i: self._step(param, group))
            for i, group in enumerate(optimizer.param_groups)
            for param in group["params"]
            if param.requires_grad
        ]
        optimizer._released = self
        # else a scaler would look for gradients, find none, and say that and not why
        optimizer._step_supports_amp_scaling = True

    def remove(self) -> None:
        """Let gradients stay until `optimizer.step()` again."""
        for handle in self._handles:
            handle.remove()
        self._optimizer._released = None
        self._optimizer._settle()

    @torch.no_grad()
    def _step(self, param: Tensor, group: int) -> None:
        if param in self._stepped:
            raise RuntimeError(
                f"{self._optimizer._name(param)} got a second gradient before optimizer.step(): with released "
                "gradients there is nothing to accumulate into, the first is applied and gone. Call optimizer.step() "
                "after each backward(), or remove() the release"
            )
        self._optimizer._step_alone(param, group)
        self._stepped.add(param)
        param.grad = None

    def end_iteration(self) -> None:
        """Do what `optimizer.step()` still has to do after a backward pass.

        Raises:
            RuntimeError: a gradient scaler calls: the gradients that it would unscale and look at are applied and gone.
        """
        if getattr(self._optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "a gradient scaler cannot work with released gradients: they were applied, still multiplied by its "
                "scale, before it could look for an infinite one. Train in bfloat16, which needs no scaler, or "
                "remove() the release"
            )
        stepped, self._stepped = self._stepped, set()
        if stepped:
            self._optimizer._between_iterations()


def release_gradients(model: torch.nn.Module, optimizer: DropInAdamW) -> GradientRelease:
    """Let every parameter take its step during backward(), as soon as its gradient is ready, and free the gradient.

    The memory of the gradients goes from that of the whole model to that of the largest few tensors. The loop stays as
    it is: ``optimizer.step()`` ends an iteration, and a refresh that is due happens there, from the importance that
    this iteration's gradients have already advanced. A mask so takes effect one update later than without release;
    everything else is the same, bit for bit.

    Args:
        model: whose parameters get the gradients.
        optimizer: an `EPIAdamW`, `MaskedAdamW` or `SparseAdamW` of parameters of `model`.

    Returns:
        What takes it back: ``release.remove()``.

    Raises:
        ValueError: the optimizer clips (the norm is known after the last gradient), is capturable or differentiable,
            has parameters that are not the model's or gradients left over; or the model is a DistributedDataParallel,
            whose gradients are averaged later.
        RuntimeError: later, in backward(): a second gradient before step(), as in gradient accumulation; in step(): a
            gradient scaler calls.

    Example:
        >>> from epi_kernels import EPIAdamW
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = EPIAdamW(model.named_parameters(), isolation_ratio=0.1)
        >>> release = release_gradients(model, optimizer)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> model.weight.grad is None, int(optimizer.state[model.weight]["step"])
        (True, 1)
        >>> optimizer.step()
    """
    return GradientRelease(model, optimizer)


def _check(model: torch.nn.Module, optimizer: DropInAdamW) -> None:
    if not isinstance(optimizer, DropInAdamW):
        raise TypeError(
            f"{type(optimizer).__name__} cannot step a parameter alone; use EPIAdamW, MaskedAdamW or SparseAdamW"
        )
    if optimizer._released is not None:
        raise ValueError("the optimizer releases its gradients already; remove() that release first")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel averages gradients after they are accumulated: released before, each rank would "
            "step by its own. Use it without release"
        )
    for group in optimizer.param_groups:
        if group.get("clip_grad_norm") is not None:
            raise ValueError(
                f"clip_grad_norm={group['clip_grad_norm']} needs the norm of all gradients before the first is "
                "applied, and released gradients are gone by then; use clip_grad_norm=None"
            )
        for flag in ("capturable", "differentiable"):
            if group[flag]:
                raise ValueError(f"{flag}=True and released gradients cannot be had together")
    known = set(model.parameters())
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in known:
                raise ValueError(f"{optimizer._name(param)} is not a parameter of the model")
            if param.grad is not None:
                raise ValueError(f"{optimizer._name(param)} has a gradient already; call optimizer.zero_grad() first")
