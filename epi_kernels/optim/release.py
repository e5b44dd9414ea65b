"""Gradient release: each parameter is stepped as soon as its gradient is ready, and the gradient is freed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from epi_kernels.engine.groups import name_of
from epi_kernels.engine.optimizer import FusedOptimizer
from epi_kernels.engine.releases import releases_of


class _Hook:
    """The hook that torch calls once a parameter has its gradient; `releases_of` finds it by the name `release`."""

    def __init__(self, release: "GradientRelease", group: int) -> None:
        self.release, self._group = release, group

    def __call__(self, param: Tensor) -> None:
        self.release.step(param, self._group)


class GradientRelease:
    """The hooks that `release_gradients` has set up; `remove` removes them."""

    def __init__(self, model: torch.nn.Module, optimizer: FusedOptimizer) -> None:
        _check(model, optimizer)
        for group in optimizer.param_groups:
            self.check_group(group)
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()
        self._handles = {
            id(param): _hooked(param, _Hook(self, i))
            for i, group in enumerate(optimizer.param_groups)
            for param in dict.fromkeys(group["params"])
        }
        optimizer._release(self)

    def remove(self) -> None:
        """Let gradients stay until `optimizer.step()` again; an iteration under way ends with the next such call."""
        for handle in self._handles.values():
            handle.remove()
        self._optimizer._release(None)
        self._stepped = set()

    @torch.no_grad()
    def step(self, param: Tensor, group: int) -> None:
        """Step one parameter, which is in the group at position `group`, and free its gradient.

        Raises:
            RuntimeError: the parameter has stepped since the last `optimizer.step()`.
            ValueError: the group has a setting that a release excludes.
        """
        if param in self._stepped:
            raise RuntimeError(
                f"{self._name(param)} got a second gradient before optimizer.step(): with released "
                "gradients there is nothing to accumulate into, the first is applied and gone. Call optimizer.step() "
                "after each backward(), or remove() the release. After a backward() that raised, "
                "optimizer.zero_grad() starts over: what has stepped keeps its step"
            )
        if not self._stepped:
            self._optimizer._take_written()
        self.check_group(self._optimizer.param_groups[group])  # a program may have written into the group
        self._optimizer._step_alone(param, group)
        self._stepped.add(param)
        param.grad = None

    def _name(self, param: Tensor) -> str:
        return name_of(param, self._optimizer.param_groups)

    def start_over(self) -> None:
        """Let the next backward() step every parameter again; steps since the last step() are not undone."""
        self._stepped = set()

    def _steps(self, param: Tensor) -> bool:
        """Return whether backward() steps a parameter: its hook tells, since nothing here refers to parameters."""
        handle = self._handles.get(id(param))
        return handle is not None and handle.hooks_dict_ref() is param._post_accumulate_grad_hooks

    def end_iteration(self) -> None:
        """Do what is left for `optimizer.step()` after a backward pass.

        Raises:
            RuntimeError: a gradient scaler calls: the gradients that it would unscale and check are gone already; or a
                parameter has a gradient left, or joined the optimizer later, and would not train.
        """
        if getattr(self._optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "a gradient scaler cannot work with released gradients: they were applied, still multiplied by its "
                "scale, before it could look for an infinite one. Train in bfloat16, which needs no scaler, or "
                "remove() the release"
            )
        for param in (param for group in self._optimizer.param_groups for param in group["params"]):
            if not self._steps(param):
                raise RuntimeError(
                    f"{self._name(param)} joined the optimizer after release_gradients, and backward() does not step "
                    "it; remove() the release and call release_gradients anew"
                )
            if param.grad is not None:
                raise RuntimeError(
                    f"{self._name(param)} has a gradient that backward() has not released: it was set by hand, or by "
                    "DistributedDataParallel, which averages it after the step; nothing would apply it. remove() the "
                    "release for that"
                )
        self._stepped = set()
        self._optimizer._end_iteration()

    def check_group(self, group: dict[str, Any]) -> None:
        """Check that a group has no setting that a release excludes.

        Raises:
            ValueError: the group has such a setting; the message names the setting.
        """
        if group.get("clip_grad_norm") is not None:
            raise ValueError(
                f"clip_grad_norm={group['clip_grad_norm']} needs the norm of all gradients before the first is "
                "applied, and released gradients are gone by then; use clip_grad_norm=None"
            )
        for flag in ("capturable", "differentiable"):
            if group.get(flag):
                raise ValueError(f"{flag}=True and released gradients cannot be had together")


def release_gradients(model: torch.nn.Module, optimizer: FusedOptimizer) -> GradientRelease:
    """Let every parameter take its step during backward(), as soon as its gradient is ready, and free the gradient.

    Gradients need the memory of the few largest tensors instead of the whole model. The training loop stays as it is:
    ``optimizer.step()`` ends an iteration, and a refresh that is due happens in that call, from an importance that this
    iteration's gradients have already advanced. A mask therefore takes effect one update later than without release;
    everything else is the same, bit for bit. A parameter that requires no gradient now may thaw later.

    If backward() raises, ``optimizer.zero_grad()`` starts the iteration over: parameters that have stepped keep that
    step, the gradients that are left are dropped, and the next backward() steps every parameter again.

    Code that looks at gradients between backward() and step() finds none, and no error can say so: clipping from
    outside (``torch.nn.utils.clip_grad_norm_``, or a trainer's ``max_grad_norm``) returns a norm of 0.0 and clips
    nothing, and a log of gradient norms shows 0. Turn them off.

    Args:
        model: its parameters get the gradients.
        optimizer: an `EPIAdamW`, `EPILion`, `MaskedAdamW` or `SparseAdamW` of parameters of `model`.

    Returns:
        The release; ``release.remove()`` ends it.

    Raises:
        ValueError: the optimizer clips (the norm is known after the last gradient), is capturable or differentiable, or
            has parameters that are not the model's, are slices that FSDP1 made, have gradients, or are released to
            another optimizer, whose release must be removed first; or a module in the model is a
            DistributedDataParallel, which averages gradients later. Also raised later, if a state or a group
            with such settings is loaded or added.
        RuntimeError: later, in backward(): a second gradient before step(), as in gradient accumulation; in step(): a
            gradient scaler calls, a parameter still has a gradient (from DistributedDataParallel around `model`, or set
            by hand), or has joined the optimizer since.

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


def _hooked(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a hook that runs once a parameter has its gradient; the parameter may require one only later."""
    trains = param.requires_grad
    # torch registers this hook only on tensors that require grad, so switch it on for the call
    handle = param.requires_grad_().register_post_accumulate_grad_hook(hook)
    param.requires_grad_(trains)
    return handle


def _check(model: torch.nn.Module, optimizer: FusedOptimizer) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} cannot step a parameter alone; use EPIAdamW, EPILion, MaskedAdamW or "
            "SparseAdamW"
        )
    if optimizer._released is not None:
        raise ValueError("the optimizer releases its gradients already; remove() that release first")
    if any(isinstance(module, torch.nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel averages gradients after they are accumulated: released before, each rank would "
            "step by its own. Use it without release"
        )
    known = set(model.parameters())
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = name_of(param, optimizer.param_groups)
            if param not in known:
                raise ValueError(f"{name} is not a parameter of the model")
            if hasattr(param, "_fsdp_flattened"):
                raise ValueError(
                    f"{name} is a slice that FSDP1 made: it gets its gradient from FSDP after "
                    "backward() has come by, and would never be stepped. Use FSDP2, or no release"
                )
            if releases_of(param):
                raise ValueError(
                    f"{name} is released to another optimizer, which steps it in backward(); "
                    "remove() that release first"
                )
            if param.grad is not None:
                raise ValueError(f"{name} has a gradient already; call optimizer.zero_grad() first")
