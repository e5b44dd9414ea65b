"""Importance of every entry of a model for a task, from one pass over its data at fixed parameters.

PIECE (arXiv 2511.15375) trains the entries that score highest: Fisher information (Eq. 4) or the second-order score
(Eq. 10), both from one gradient per example. `update_magnitude` and `output_magnitude` are the criteria of CPI-FT's
static isolation and of MIGU. `epi_kernels.select.top_k` makes a mask of any of them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from epi_kernels import ops
from epi_kernels.distributed import is_dtensor, is_slice, local, local_gradient, reshard, wrapped
from epi_kernels.notices import warn

# fewer gradients than this cannot rank entries: with one, Eq. 10 gives the same score to all
FEWEST = 8

# entries of per-example gradients that `vmap` holds at a time, and the fewest examples for which "auto" takes it: what
# it saves is the overhead of backward passes. On 2 cores it took a third to a half of the loop's time for models of 0.1
# to 0.8 million parameters, as long for 3 million, and longer for 13
_AT_ONCE = 1 << 24
_WORTH_VMAP = 16

LossFunction = Callable[[nn.Module, Any], Tensor]
Method = Literal["auto", "vmap", "loop"]


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
    its parameters when it is run, such as an Embedding with max_norm, writes them here too). No example is skipped. Of
    a model that is sharded (FSDP2, tensor parallel), each rank scores what it holds: give every rank the same batches,
    since what a rank gets is the gradient averaged over the ranks.

    Args:
        model: whose parameters that require a gradient are scored; they must have none now.
        batches: of the new task: each any nesting of lists, tuples and dicts of tensors whose first dimension counts
            the examples; what else is in it is handed on.
        loss_fn: (model, batch) -> the mean loss over the examples of a batch, 0-d.
        method: of getting a gradient for each example. "loop" goes one by one and holds no gradient longer than it
            takes to add it, and else the two accumulators alone. "vmap" has many at a time, in 64 MB and what they are
            made of, and needs a model that torch.func can take. "auto" is vmap for models of up to a million
            parameters, where 16 gradients fit into that, and loop from the first examples on for which torch.func gives
            up.
        microbatch: B examples to a gradient, for speed: an approximation. The mean of squares of such gradients is too
            small by the noise that cancels within one; for independent examples of equal weight
            ``F = B E[g^2] - (B - 1) E[g]^2`` corrects that, and is what is returned. 1: exact.
        dtype: of the two accumulators: float32, or bfloat16, rounded stochastically, for half the memory until the
            scores, in float32, take their place.
        progress: show a progress bar, if tqdm is installed.
        backend: of the accumulation: "auto", or the name of one, which then runs or raises.

    Returns:
        {name: float32 tensor of the parameter's shape, >= 0}, in squared gradient units; DTensors where parameters are.

    Raises:
        ValueError: there are fewer than 8 gradients; no parameter requires one, or the loss depends on none; a batch
            does not divide into micro-batches; a parameter has a gradient, or a hook that would take it
            (`release_gradients`); the model has a DistributedDataParallel; or an argument is out of its range.
        NotImplementedError: a parameter is complex or a slice of FSDP1's, or a gradient sparse.
        RuntimeError: a parameter got two gradients in one backward pass, as reentrant checkpointing makes them.

    Warns:
        UserWarning: gradients are NaN or infinite, and the names of the parameters.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.arange(16.0).view(8, 2)
        >>> fisher(model, [x], lambda model, batch: model(batch).mean(), progress=False)
        {'weight': tensor([[70., 85.]])}
    """
    sums = _gradient_sums(model, batches, loss_fn, method, microbatch, dtype, progress, backend)
    scores = {}
    for name in list(sums.squares):
        scores[name] = sums.as_parameter(name, sums.second_moment(name))
        del sums.sums[name]
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
        model: as in `fisher`, and so are all others but `xi`.
        batches: see there.
        loss_fn: see there.
        xi: > 0. It decides the ranking, and the paper gives none. None is 1/N, with which the ranking is that of the
            authors' released code, ``|sum g| / sqrt(sum g^2 + 1)``.
        method: see there.
        microbatch: see there.
        dtype: see there.
        progress: see there.
        backend: see there.

    Returns:
        {name: float32 tensor of the parameter's shape}, in [0, 1] but for what the accumulators round.

    Raises:
        ValueError: `xi` is not above 0; and as `fisher`.
        RuntimeError: as `fisher`.
    """
    if xi is not None and not xi > 0.0:
        raise ValueError(f"Invalid xi: {xi!r}; a number > 0, or None for 1/N")
    sums = _gradient_sums(model, batches, loss_fn, method, microbatch, dtype, progress, backend)
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
        after: the same after it, ``dict(model.named_parameters())``; what is not floating point is left out.

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
    ``top_k(scores, ratio, scope="layer")``. Of a model under FSDP2 the scores are of whole tensors: give every rank the
    same batches, so that all choose the same rows.

    Args:
        model: its torch.nn.Linear layers are looked at; buffers are left as they are.
        batches: of the new task.
        forward: (model, batch) -> anything; runs the model. None: ``model(batch)``.

    Returns:
        {name of a weight: float32 tensor of its shape}, a row the same number throughout (an expanded view). The names
        are those of ``model.named_parameters()``, where a tied weight has one.

    Raises:
        ValueError: no linear layer was run.
        NotImplementedError: a layer's output is not all of its channels, as under tensor parallelism.
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
        with _buffers_kept(model):
            for batch in batches:
                model(batch) if forward is None else forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)  # else an optimizer would be given the whole parameters, which never get a gradient
    if not norms:
        raise ValueError("no torch.nn.Linear of the model was run: there is nothing to score")
    return {name: norm[:, None].expand(shapes[name]) for name, norm in norms.items()}


class _Sums:
    """Sums of gradients and of their squares by name, and what follows from them."""

    def __init__(self, params: Mapping[str, Tensor], microbatch: int, dtype: torch.dtype, backend: str) -> None:
        # of what this rank holds
        self.sums = {name: torch.zeros_like(local(param), dtype=dtype) for name, param in params.items()}
        self.squares = {name: torch.zeros_like(local(param), dtype=dtype) for name, param in params.items()}
        self._params = params
        self.gradients = 0
        self.microbatch = microbatch
        self._backend = backend
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def examples(self) -> int:
        return self.gradients * self.microbatch

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Add one gradient of some parameters."""
        sums, squares = ([of[name] for name in grads] for of in (self.sums, self.squares))
        if sums[0].dtype == torch.float32:
            ops.gradient_sums_(sums, squares, list(grads.values()), self._backend)
            return
        for total, square, grad in zip(sums, squares, grads.values(), strict=True):
            wide = grad.float()
            self._round_into(total, wide)
            # not square_(): a gradient may be that of another parameter too
            self._round_into(square, wide.square())

    def add_many(self, grads: Mapping[str, Tensor]) -> None:
        """Add gradients of all parameters, those of several examples stacked in a first dimension."""
        # row by row: sums over them all, and their squares in between, would take ten times as long and a copy
        for row in zip(*grads.values(), strict=True):
            self.add(dict(zip(grads, row, strict=True)))

    def _round_into(self, total: Tensor, more: Tensor) -> None:
        """Add in float32 and round to bfloat16, up or down with the probability that keeps the mean."""
        # to the nearest, a sum stands still once what is added is below 1/512 of it
        device = total.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        bits = (total.float() + more).view(torch.int32)
        noise = torch.randint(
            0, 1 << 16, bits.shape, generator=self._generators[device], dtype=torch.int32, device=device
        )
        total.copy_((bits + noise & -(1 << 16)).view(torch.float32))

    def as_parameter(self, name: str, score: Tensor) -> Tensor:
        """Return a score of what this rank holds as a DTensor, where the parameter is one."""
        return wrapped(score, self._params[name])

    def mean(self, name: str) -> Tensor:
        """Return E[g], and let the sum go."""
        return self.sums.pop(name).float().div_(self.gradients)

    def second_moment(self, name: str) -> Tensor:
        """Return E[g_i^2] of single examples, and let the sum go."""
        found = self.squares.pop(name).float().div_(self.gradients)
        if self.microbatch > 1:
            mean = self.sums[name].float().div(self.gradients)
            found.mul_(self.microbatch).sub_(mean.square_(), alpha=self.microbatch - 1).clamp_(min=0.0)
        return found


def _gradient_sums(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    method: Method,
    microbatch: int,
    dtype: torch.dtype,
    progress: bool,
    backend: str,
) -> _Sums:
    """Return the sums over all gradients of all batches."""
    if method not in ("auto", "vmap", "loop"):
        raise ValueError(f"Invalid method: {method!r}; choose one of ('auto', 'vmap', 'loop')")
    if not isinstance(microbatch, int) or microbatch < 1:
        raise ValueError(f"Invalid microbatch: {microbatch!r}; examples to a gradient, an int >= 1")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"Invalid dtype: {dtype}; accumulate in torch.float32 or torch.bfloat16")
    if isinstance(batches, Tensor):
        raise ValueError("batches is a tensor, whose rows would be batches; pass [tensor], or a loader")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel averages gradients when they have been added; pass what it wraps, model.module"
        )
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    sharded = any(is_dtensor(param) for param in params.values())
    _check(params, method, sharded)
    sums = _Sums(params, microbatch, dtype, backend)
    at_once = _AT_ONCE // max(1, sum(param.numel() for param in params.values()))
    many = microbatch == 1 and at_once >= _WORTH_VMAP and not sharded
    way = method if method != "auto" else "vmap" if many else "loop"
    with _buffers_kept(model):
        for batch in map(_plain, _shown(batches, progress)):
            count = _examples_in(batch)
            if count % microbatch:
                raise ValueError(
                    f"a batch has {count} examples, which do not divide into micro-batches of {microbatch}"
                )
            done = 0  # examples
            if way == "vmap":
                try:
                    _add_by_vmap(sums, model, params, loss_fn, batch, microbatch, max(1, at_once))
                    done = count
                except _VmapError as error:
                    if method == "vmap":
                        raise error.reason from None
                    way, done = "loop", error.done
            if done < count:
                _add_by_loop(sums, params, model, loss_fn, batch, microbatch, done)
    if sums.gradients < FEWEST:
        raise ValueError(
            f"{sums.gradients} gradients cannot rank entries: at least {FEWEST} are needed, and hundreds are wise; "
            "pass more batches, or a smaller microbatch"
        )
    bad = [name for name, squares in sums.squares.items() if not squares.isfinite().all()]
    if bad:
        warn(
            f"an example had gradients that are NaN or infinite, and so are scores of {', '.join(bad)}: top_k counts "
            "them as 0. Look for the example, such as one without a target"
        )
    return sums


def _check(params: Mapping[str, Tensor], method: Method, sharded: bool) -> None:
    if sharded and method == "vmap":
        raise ValueError("method='vmap' and a sharded model: torch.func cannot take it; use method='loop' or 'auto'")
    if not params:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to score")
    for name, param in params.items():
        if is_slice(param):
            raise NotImplementedError(
                f"{name} is a slice that FSDP1 made, which gets no gradient of its own; use FSDP2 (fully_shard)"
            )
        if param.is_complex():
            raise NotImplementedError(f"{name} is {param.dtype}; gradients of real parameters can be scored")
        if param.grad is not None:
            raise ValueError(f"{name} has a gradient, which would be added to; call model.zero_grad() first")
        if param._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name} has a hook that would take the gradients of the examples, such as release_gradients sets up; "
                "remove() it while entries are scored"
            )


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers back as they are now: in training mode a forward pass moves those of BatchNorm."""
    before = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)


def _plain(batch: Any) -> Any:
    """Return a batch as torch's pytrees know it: transformers' BatchEncoding is a mapping and no dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch


class _VmapError(Exception):
    """torch.func cannot take the model: data-dependent control flow, or an operation without a batching rule."""

    def __init__(self, reason: Exception, done: int) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.done = done  # examples of the batch whose gradients have been added


def _add_by_vmap(
    sums: _Sums,
    model: nn.Module,
    params: Mapping[str, Tensor],
    loss_fn: LossFunction,
    batch: Any,
    microbatch: int,
    at_once: int,
) -> None:
    loss = _Loss(model, loss_fn)
    leaves, structure = pytree.tree_flatten(batch)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def gradient(values: dict[str, Tensor], tensors: list[Tensor]) -> dict[str, Tensor]:
        example = pytree.tree_unflatten(
            [tensors[where.index(i)] if i in where else leaf for i, leaf in enumerate(leaves)], structure
        )
        return torch.func.grad(
            lambda given: torch.func.functional_call(loss, {f"model.{k}": v for k, v in given.items()}, (example,))
        )(values)

    values = {name: param.detach() for name, param in params.items()}
    count = _examples_in(batch) // microbatch
    for first in range(0, count, at_once):
        some = min(at_once, count - first)
        rows = slice(first * microbatch, (first + some) * microbatch)
        examples = [leaves[i][rows].unflatten(0, (some, microbatch)) for i in where]
        with warnings.catch_warnings():
            # of an operation without a batching rule: slower than with one, and still faster than one by one
            warnings.filterwarnings("ignore", message="There is a performance drop")
            try:
                grads = torch.func.vmap(gradient, in_dims=(None, 0), randomness="different")(values, examples)
            except (RuntimeError, NotImplementedError) as error:
                raise _VmapError(error, first * microbatch) from error
        sums.add_many(grads)
        sums.gradients += some


def _add_by_loop(
    sums: _Sums,
    params: Mapping[str, Tensor],
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    microbatch: int,
    done: int,
) -> None:
    with _accumulating(sums, params) as added:
        for first in range(done, _examples_in(batch), microbatch):
            added.clear()
            example = pytree.tree_map_only(Tensor, lambda t: t[first : first + microbatch], batch)  # noqa: B023
            with torch.enable_grad():
                _checked(loss_fn(model, example)).backward()
            sums.gradients += 1


@contextmanager
def _accumulating(sums: _Sums, params: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """Let every gradient be added to the sums and freed as it is ready; yield the names added so far."""
    added: set[str] = set()

    def adder(name: str) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            if param.grad is not None and param.grad.is_sparse:
                raise NotImplementedError(f"the gradient of {name} is sparse; use an embedding with sparse=False")
            grad, param.grad = local_gradient(param), None
            if name in added:
                raise RuntimeError(
                    f"{name} got two gradients in one backward pass, and the square of their sum is not known any "
                    "more; checkpoint with use_reentrant=False"
                )
            added.add(name)
            with torch.no_grad():
                sums.add({name: grad})

        return hook

    handles = [param.register_post_accumulate_grad_hook(adder(name)) for name, param in params.items()]
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()
        for param in params.values():
            param.grad = None


class _Loss(nn.Module):
    """A loss as a module, so that torch.func can call it with other parameters."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return _checked(self.loss_fn(self.model, batch))


def _checked(loss: Tensor) -> Tensor:
    """Return a loss, if gradients can come of it: under torch.func they would be 0."""
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        raise ValueError(
            "loss_fn returned what depends on no parameter that requires a gradient; let it return a 0-d tensor, "
            "without detach(), item() and no_grad()"
        )
    return loss


def _examples_in(batch: Any) -> int:
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            f"the tensors of a batch, a {type(batch).__name__}, have the first dimensions {sorted(sizes)}; pass lists, "
            "tuples or dicts of tensors whose first dimension counts the same examples"
        )
    return int(sizes.pop())


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    """Return the batches behind a progress bar, where that is wanted and can be had."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return batches
        return tqdm(batches, desc="importance", unit="batch")
    return batches
