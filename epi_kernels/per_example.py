"""Sums of per-example gradients and of their squares, over data that is read once.

`epi_kernels.importance` scores entries by them. ``loop`` takes one example after the other, ``vmap`` many at once.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from epi_kernels import ops
from epi_kernels.distributed import is_dtensor, is_slice, local, local_gradient, wrapped
from epi_kernels.notices import warn

# fewer gradients than this cannot rank entries: with one, Eq. 10 gives the same score to all
FEWEST = 8

# entries of per-example gradients that `vmap` has in memory at a time, and the fewest examples in them for which "auto"
# takes vmap, which saves the overhead of backward passes. On 2 cores vmap took a third to a half of the loop's time for
# models of 0.1 to 0.8 million parameters, as long for 3 million, and longer for 13
_AT_ONCE = 1 << 24
_WORTH_VMAP = 16

LossFunction = Callable[[nn.Module, Any], Tensor]
Method = Literal["auto", "vmap", "loop"]


class Sums:
    """Sums of gradients and of their squares by name, and the moments that follow from them.

    Args:
        params: by name.
        microbatch: how many examples there are to a gradient.
        means: whether `mean` will be called. Without it, and with one example to a gradient, only squares are summed.
        dtype: of the sums, float32 or bfloat16.
        backend: what accumulates.
    """

    def __init__(
        self, params: Mapping[str, Tensor], microbatch: int, means: bool, dtype: torch.dtype, backend: str
    ) -> None:
        def zeros() -> dict[str, Tensor]:  # of this rank's shards
            return {name: torch.zeros_like(local(param), dtype=dtype) for name, param in params.items()}

        self.squares = zeros()
        # the second moment of single examples reads no sum of gradients
        self.sums = zeros() if means or microbatch > 1 else {}
        self._params = params
        self.gradients = 0
        self.microbatch = microbatch
        self._backend = backend
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def examples(self) -> int:
        """How many examples have been added."""
        return self.gradients * self.microbatch

    def add(self, grads: Mapping[str, Tensor]) -> None:
        """Add one gradient of some parameters."""
        if all(self.squares[name].dtype == torch.float32 for name in grads):
            for device in dict.fromkeys(grad.device for grad in grads.values()):  # a model may be on several
                here = {name: grad for name, grad in grads.items() if grad.device == device}
                squares = [self.squares[name] for name in here]
                sums = [self.sums[name] for name in here] if self.sums else []
                ops.gradient_sums_(sums, squares, list(here.values()), self._backend)
            return
        for name, grad in grads.items():
            wide = grad.float()
            if self.sums:
                self._round_into(self.sums[name], wide)
            # not square_(): two parameters may share one gradient tensor
            self._round_into(self.squares[name], wide.square())

    def add_many(self, grads: Mapping[str, Tensor]) -> None:
        """Add gradients of all parameters; the first dimension counts the examples."""
        # row by row: to square and sum whole stacks would take ten times as long, and a copy
        for row in zip(*grads.values(), strict=True):
            self.add(dict(zip(grads, row, strict=True)))

    def _round_into(self, total: Tensor, more: Tensor) -> None:
        """Add in float32 and round to bfloat16, up or down with the probability that keeps the mean."""
        # rounded to the nearest, a sum would stop growing once each addend is below 1/512 of it
        device = total.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        bits = (total.float() + more).view(torch.int32)
        noise = torch.randint(
            0, 1 << 16, bits.shape, generator=self._generators[device], dtype=torch.int32, device=device
        )
        total.copy_((bits + noise & -(1 << 16)).view(torch.float32))

    def as_parameter(self, name: str, score: Tensor) -> Tensor:
        """Return a score of this rank's shard, as a DTensor if the parameter is one."""
        return wrapped(score, self._params[name])

    def mean(self, name: str) -> Tensor:
        """Return E[g], and free the sum."""
        return self.sums.pop(name).float().div_(self.gradients)

    def second_moment(self, name: str) -> Tensor:
        """Return E[g_i^2] of single examples, and free the sum."""
        found = self.squares.pop(name).float().div_(self.gradients)
        if self.microbatch > 1:
            mean = self.sums[name].float().div(self.gradients)
            found.mul_(self.microbatch).sub_(mean.square_(), alpha=self.microbatch - 1).clamp_(min=0.0)
        return found


def gradient_sums(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    method: Method,
    microbatch: int,
    means: bool,
    dtype: torch.dtype,
    progress: bool,
    backend: str,
) -> Sums:
    """Return the sums over all gradients of all batches; `means` as in `Sums`, the others as in `importance.fisher`."""
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
    sums = Sums(params, microbatch, means, dtype, backend)
    at_once = _AT_ONCE // max(1, sum(param.numel() for param in params.values()))
    many = microbatch == 1 and at_once >= _WORTH_VMAP and not sharded
    way = method if method != "auto" else "vmap" if many else "loop"
    with buffers_kept(model):
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
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers on leaving: in training mode a forward pass changes those of BatchNorm."""
    before = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)


def _plain(batch: Any) -> Any:
    """Return a batch in a form that torch's pytrees know: transformers' BatchEncoding is a mapping but not a dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch


class _VmapError(Exception):
    """torch.func cannot take the model: data-dependent control flow, or an operation without a batching rule."""

    def __init__(self, reason: Exception, done: int) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.done = done  # examples of the batch whose gradients have been added


def _add_by_vmap(
    sums: Sums,
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
            # vmap warns of operations without a batching rule: they are slower, but still faster than one by one
            warnings.filterwarnings("ignore", message="There is a performance drop")
            try:
                grads = torch.func.vmap(gradient, in_dims=(None, 0), randomness="different")(values, examples)
            except (RuntimeError, NotImplementedError) as error:
                raise _VmapError(error, first * microbatch) from error
        sums.add_many(grads)
        sums.gradients += some


def _add_by_loop(
    sums: Sums,
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
def _accumulating(sums: Sums, params: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """Add every gradient to the sums and free it as soon as it is ready; yield the names added so far."""
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
    """Return a loss after checking that it has gradients: under torch.func they would silently be 0."""
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
    """Return the batches behind a progress bar, if one is wanted and tqdm is installed."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return batches
        return tqdm(batches, desc="importance", unit="batch")
    return batches
