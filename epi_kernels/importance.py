"""Importance of every entry of a model for a task, from one pass over its data at fixed parameters.

PIECE (arXiv 2511.15375) trains the entries that score highest: Fisher information (Eq. 4) or the second-order score
(Eq. 10), both from one gradient per example. `update_magnitude` and `output_magnitude` are the criteria of CPI-FT's
static isolation and of MIGU. `epi_kernels.select.top_k` makes a mask of any of them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from epi_kernels.distributed import is_dtensor, local, reshard
from epi_kernels.per_example import LossFunction, Method, buffers_kept, gradient_sums


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    method: Method = "auto",
    microbatch: int = 1,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Return the empirical Fisher information of every entry: the mean over examples of the squared gradient.

    ::

        F = 1/N sum_i g_i^2,        g_i the gradient of the loss of example i          PIECE (arXiv 2511.15375) Eq. 4

    Parameters, gradients, buffers and the mode of the model (train or eval) are left as they are (a module that writes
    its parameters when it is run, such as an Embedding with max_norm, writes them here too). No example is skipped. In
    a sharded model (FSDP2, tensor parallel), each rank scores its shards: give every rank the same batches, since
    gradients are averaged over the ranks.

    Args:
        model: whose parameters that require a gradient are scored; they must have none now.
        batches: of the new task: each is any nesting of lists, tuples and dicts of tensors whose first dimension counts
            the examples; anything else in it is handed on.
        loss_fn: (model, batch) -> the mean loss over the examples of a batch, 0-d.
        method: how to get a gradient for each example. "loop" takes one example at a time; its memory is the
            accumulators, and each gradient until it is added. "vmap" takes many at a time, 64 MB of gradients and their
            intermediate results, and needs a model that torch.func can take. "auto" is vmap for models of up to a
            million parameters (16 gradients in 64 MB), else loop; if torch.func fails on a batch, loop scores the rest.
        microbatch: B examples to a gradient, for speed: an approximation. The mean of squares of such gradients is too
            small, since noise cancels within each; for independent examples of equal weight
            ``F = B E[g^2] - (B - 1) E[g]^2`` corrects that, and is returned. 1: exact.
        dtype: the dtype of the accumulators: float32, or bfloat16, rounded stochastically, for half the memory until
            the scores, in float32, take their place. There is one accumulator for each entry, the sum of squares, and a
            second one, the sum of gradients, with a microbatch above 1.
        progress: show a progress bar, if tqdm is installed.
        backend: what accumulates: "auto", or the name of a backend, which then runs or raises.

    Returns:
        {name: float32 tensor of the parameter's shape, >= 0}, in squared gradient units; DTensors where parameters are.

    Raises:
        ValueError: there are fewer than 8 gradients; no parameter requires one, or the loss depends on none; a batch
            does not divide into micro-batches; a parameter has a gradient, or a hook that would take it
            (`release_gradients`); the model has a DistributedDataParallel; or an argument is out of its range.
        NotImplementedError: a parameter is complex or a slice of FSDP1's, or a gradient sparse.
        RuntimeError: a parameter got two gradients in one backward pass, as reentrant checkpointing makes them.

    Warns:
        UserWarning: gradients are NaN or infinite; it names the parameters.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.arange(16.0).view(8, 2)
        >>> fisher(model, [x], lambda model, batch: model(batch).mean(), progress=False)
        {'weight': tensor([[70., 85.]])}
    """
    sums = gradient_sums(model, batches, loss_fn, method, microbatch, False, dtype, progress, backend)
    scores = {}
    for name in list(sums.squares):
        scores[name] = sums.as_parameter(name, sums.second_moment(name))
        sums.sums.pop(name, None)
    return scores


def second_order(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    xi: float | None = None,
    method: Method = "auto",
    microbatch: int = 1,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Return the second-order score of every entry: how far its gradients agree, in units of their size.

    ::

        S = |1/N sum_i g_i| / sqrt(1/N sum_i g_i^2 + xi)                        PIECE (arXiv 2511.15375) Eq. 10

    Args:
        model: as in `fisher`, like all arguments except `xi`.
        batches: as in `fisher`.
        loss_fn: as in `fisher`.
        xi: > 0. It decides the ranking, and the paper gives no value. None is 1/N, which ranks like the authors'
            released code, ``|sum g| / sqrt(sum g^2 + 1)``.
        method: as in `fisher`.
        microbatch: as in `fisher`.
        dtype: as in `fisher`; both accumulators are kept.
        progress: as in `fisher`.
        backend: as in `fisher`.

    Returns:
        {name: float32 tensor of the parameter's shape}, in [0, 1] up to the rounding of the accumulators.

    Raises:
        ValueError: `xi` is not above 0; and as `fisher`.
        RuntimeError: as `fisher`.
    """
    if xi is not None and not xi > 0.0:
        raise ValueError(f"Invalid xi: {xi!r}; a number > 0, or None for 1/N")
    sums = gradient_sums(model, batches, loss_fn, method, microbatch, True, dtype, progress, backend)
    offset = 1.0 / sums.examples if xi is None else xi
    scores = {}
    for name in list(sums.sums):
        deviation = sums.second_moment(name).add_(offset).sqrt_()
        scores[name] = sums.as_parameter(name, sums.mean(name).abs_().div_(deviation))
    return scores


def update_magnitude(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return how far training has moved every entry, |after - before|: the criterion of CPI-FT's static isolation.

    Args:
        before: {name: parameter}, copies taken before a probing run:
            ``{name: param.detach().clone() for name, param in model.named_parameters()}``.
        after: the same after that run, ``dict(model.named_parameters())``; other than floating point is left out.

    Returns:
        {name: float32 tensor of the parameter's shape}.

    Raises:
        ValueError: the names or a shape differ, or both are one tensor.
    """
    if before.keys() != after.keys():
        raise ValueError(f"before and after differ in {', '.join(sorted(before.keys() ^ after.keys()))}")
    for name in before:
        if before[name].shape != after[name].shape:
            raise ValueError(f"{name} has shape {tuple(before[name].shape)} before, {tuple(after[name].shape)} after")
        if before[name].numel() and local(before[name]).data_ptr() == local(after[name]).data_ptr():
            raise ValueError(f"{name} is one tensor before and after; clone() the parameters before the probing run")
    return {
        name: (after[name].detach().float() - before[name].detach().to(after[name].device).float()).abs_()
        for name in before
        if after[name].is_floating_point()
    }


@torch.no_grad()
def output_magnitude(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, Tensor]:
    """Return, for the weight of every linear layer, the L1 norm of the layer's output in the row's channel.

    The criterion of MIGU (arXiv 2406.17245), which trains the rows with the largest outputs in each layer:
    ``top_k(scores, ratio, scope="layer")``. Under FSDP2 the scores are of whole tensors: give every rank the same
    batches, so that all choose the same rows.

    Args:
        model: its torch.nn.Linear layers are scored; buffers are left as they are.
        batches: of the new task.
        forward: (model, batch) -> anything; runs the model. None: ``model(batch)``.

    Returns:
        {name of a weight: float32 tensor of its shape}, one number for each row (an expanded view). The names are those
        of ``model.named_parameters()``, where a tied weight has only one.

    Raises:
        ValueError: no linear layer was run.
        NotImplementedError: a layer's output lacks some of its channels, as under tensor parallelism.
    """
    norms: dict[str, Tensor] = {}
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    shapes = {name: param.shape for param, name in names.items()}

    def added(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if is_dtensor(output) or output.shape[-1] != shapes[name][0]:
                raise NotImplementedError(
                    f"the output of the layer of {name} has {local(output).shape[-1]} of {shapes[name][0]} channels "
                    "here; models under tensor parallelism cannot be scored by their outputs"
                )
            norm = output.detach().float().abs().flatten(0, -2).sum(0) if output.dim() > 1 else output.float().abs()
            norms[name] = norms[name] + norm if name in norms else norm

        return hook

    handles = [
        module.register_forward_hook(added(names[module.weight]))
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight in names
    ]
    try:
        with buffers_kept(model):
            for batch in batches:
                model(batch) if forward is None else forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)  # else an optimizer would get the whole parameters, which never have a gradient
    if not norms:
        raise ValueError("no torch.nn.Linear of the model was run: there is nothing to score")
    return {name: norm[:, None].expand(shapes[name]) for name, norm in norms.items()}
