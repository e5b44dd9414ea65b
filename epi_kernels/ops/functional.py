"""The operations, one in-place function each: check, choose a backend, run.

They are registered with torch (``torch.ops.epi_kernels.*``), so that ``torch.compile`` sees one opaque node, and each
has a fake implementation. All of them work on lists: one call serves every tensor of one device and dtype combination.

A *signed importance* carries the protection mask in its sign bit: see `epi_kernels.lock`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from epi_kernels.contract import KEY_DIGITS, Scalars, check_indices, check_lists
from epi_kernels.dispatch import choose

LOCK_IN = ("none", "importance", "exp_avg_sq", "static")


@torch.library.custom_op(
    "epi_kernels::masked_adamw_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "locks", "nonfinite"),
)
def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    locks: Sequence[Tensor],
    nonfinite: Tensor,
    scalars: Tensor,
    lock_in: str,
    advanced: bool,
    backend: str,
) -> None:
    """Take one AdamW step in place; entries that are locked keep their bits, their moments advance all the same.

    ::

        S <- beta S + (1 - beta) g^2                                     EPI (arXiv 2604.14010) Eq. 5
        m <- m + (1 - beta1)(g - m)                                      AdamW (arXiv 1711.05101) Alg. 2
        v <- beta2 v + (1 - beta2) g^2
        theta <- theta                                                   where locked, EPI Eq. 12-13
        theta <- (1 - lr lambda) theta - step_size m / (sqrt(v) / correction + eps)      elsewhere

    Args:
        params: theta, floating point; written.
        grads: same shapes, any floating dtype; read.
        exp_avgs: m; written.
        exp_avg_sqs: v; written. Signed (see `epi_kernels.lock`) with ``lock_in="exp_avg_sq"``.
        max_exp_avg_sqs: largest v so far, for AMSGrad; written. Empty: no AMSGrad.
        locks: with ``lock_in="importance"`` the signed S, written; with ``"static"`` int8, read; else empty.
        nonfinite: int64 [tensors]; the number of entries whose g^2 was NaN or infinite is added. Such an entry of S
            stays as it was.
        scalars: float64 [tensors, 11] on the CPU, a row of `epi_kernels.contract.Scalars` for each tensor.
        lock_in: where the lock bit is: "none", "importance", "exp_avg_sq" or "static".
        advanced: True when this step's g^2 is in the signed tensor already (a refresh came first).
        backend: "auto" or the name of one.

    Raises:
        ValueError: lists do not belong together, `lock_in` is unknown, or the backend is.
        TypeError: a lock with ``lock_in="static"`` is not int8.
        NotImplementedError: the backend is not part of this version.
        RuntimeError: the backend cannot run on these tensors.
    """
    check_lists(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        max_exp_avg_sqs=max_exp_avg_sqs,
        locks=locks,
    )
    if lock_in not in LOCK_IN:
        raise ValueError(f"Invalid lock_in: {lock_in!r}; choose one of {LOCK_IN}")
    if bool(locks) != (lock_in in ("importance", "static")) and params:
        raise ValueError(f"lock_in={lock_in!r} with {len(locks)} locks for {len(params)} params")
    static = locks if lock_in == "static" else []
    for i, fixed in enumerate(static):
        if fixed.dtype != torch.int8:
            raise TypeError(f"locks[{i}] is {fixed.dtype}; with lock_in='static' pass int8")
    _check_scalars(scalars, params)
    if params:
        states = _dtypes(exp_avgs, exp_avg_sqs, max_exp_avg_sqs, [] if static else locks)
        choose("masked_adamw_", params[0].device.type, backend, _dtypes(params, grads), states).run(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            locks,
            nonfinite,
            scalars,
            lock_in,
            advanced,
        )


masked_adamw_.register_fake(lambda *_: None)


@torch.library.custom_op("epi_kernels::importance_", mutates_args=("importances", "nonfinite"))
def importance_(
    importances: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    nonfinite: Tensor,
    betas: Tensor,
    layers: Sequence[int],
    layer_count: int,
    keep_finite: bool,
    backend: str,
) -> Tensor:
    """Advance the importance where there is a gradient, and return every layer's range from the same pass.

    ::

        S <- beta S + (1 - beta) g^2,     mu_l = min S,  nu_l = max S        EPI (arXiv 2604.14010) Eq. 5 and 7

    Args:
        importances: signed S; magnitudes written, locks kept.
        grads: the gradient of each, or None, which leaves that S as it is; the range takes part in both cases.
        nonfinite: int64 [tensors]; the number of entries whose g^2 was NaN or infinite is added.
        betas: float64 [tensors, 2] on the CPU: beta and 1 - beta of each tensor.
        layers: the layer of each tensor, 0 <= layer < layer_count.
        layer_count: the number of layers.
        keep_finite: True leaves S as it was where g^2 is not finite; False lets it in, for S = exp_avg_sq.
        backend: "auto" or the name of one.

    Returns:
        float32 [layer_count, 2], (mu, nu) of each layer; (inf, -inf) for a layer without entries. Subnormal S counts
        as 0, and S that is not finite takes no part.

    Raises:
        ValueError: lists do not belong together, or the backend is unknown.
        RuntimeError: the backend cannot run on these tensors.
    """
    check_lists(importances=importances, grads=grads)
    return choose("importance_", nonfinite.device.type, backend, _dtypes(grads), _dtypes(importances)).run(
        importances, grads, nonfinite, betas, layers, layer_count, keep_finite
    )


@importance_.register_fake
def _(
    importances: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    nonfinite: Tensor,
    betas: Tensor,
    layers: Sequence[int],
    layer_count: int,
    keep_finite: bool,
    backend: str,
) -> Tensor:
    return torch.empty(layer_count, 2, device=nonfinite.device)


@torch.library.custom_op("epi_kernels::gradient_sums_", mutates_args=("sums", "square_sums"))
def gradient_sums_(
    sums: Sequence[Tensor], square_sums: Sequence[Tensor], grads: Sequence[Tensor], backend: str
) -> None:
    """Add each gradient to a sum and its square to another; both give the importance of PIECE.

    ::

        sum <- sum + g,     square_sum <- square_sum + g^2                   PIECE (arXiv 2511.15375) Eq. 4 and 10

    Args:
        sums: float32; written.
        square_sums: float32, same shapes; written.
        grads: same shapes, any floating dtype; read. Squared in float32 or wider.
        backend: "auto" or the name of one.

    Raises:
        ValueError: lists do not belong together, or the backend is unknown.
        RuntimeError: the backend cannot run on these tensors.
    """
    check_lists(sums=sums, square_sums=square_sums, grads=grads)
    if sums:
        states = _dtypes(sums, square_sums)
        choose("gradient_sums_", sums[0].device.type, backend, _dtypes(grads), states).run(sums, square_sums, grads)


gradient_sums_.register_fake(lambda *_: None)


@torch.library.custom_op("epi_kernels::score_histogram", mutates_args=())
def score_histogram(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    prefixes: Tensor,
    shift: int,
    bins: int,
    backend: str,
) -> Tensor:
    """Count the scores of each budget by one digit of their bits.

    The score (EPI Eq. 8, ``(S - mu) / (nu - mu)``) is a float32 >= 0; its key is its bits as an integer, which order as
    the scores do. An entry counts where the digits above (``key >> shift`` divided by `bins`) are its budget's prefix.

    Args:
        importances: signed S; read.
        layers: the layer of each tensor: a row of `ranges`.
        ranges: float32 [layers, 2], (mu, nu); None ranks the raw S.
        budgets: the budget of each tensor: a row of the result.
        prefixes: int64 [budgets], the digits found so far.
        shift: the number of bits below the digit.
        bins: the number of values of the digit, a power of two.
        backend: "auto" or the name of one.

    Returns:
        int64 [budgets, bins]. The same integers on every backend; sums over shards are exact.
    """
    check_lists(importances=importances)
    return choose("score_histogram", prefixes.device.type, backend, states=_dtypes(importances)).run(
        importances, layers, ranges, budgets, prefixes, shift, bins
    )


@score_histogram.register_fake
def _(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    prefixes: Tensor,
    shift: int,
    bins: int,
    backend: str,
) -> Tensor:
    return torch.empty(prefixes.shape[0], bins, dtype=torch.int64, device=prefixes.device)


@torch.library.custom_op("epi_kernels::lock_", mutates_args=("importances",))
def lock_(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    thresholds: Tensor,
    backend: str,
) -> Tensor:
    """Lock exactly the entries whose score is at least their budget's threshold and above 0 (EPI Eq. 9).

    Args:
        importances: signed S; sign bits written, magnitudes kept.
        layers: the layer of each tensor: a row of `ranges`.
        ranges: float32 [layers, 2], (mu, nu); None ranks the raw S.
        budgets: the budget of each tensor: an element of `thresholds`.
        thresholds: float32 [budgets].
        backend: "auto" or the name of one.

    Returns:
        int64 [tensors, 3]: entries locked now, of these not locked before, and released.
    """
    check_lists(importances=importances)
    return choose("lock_", thresholds.device.type, backend, states=_dtypes(importances)).run(
        importances, layers, ranges, budgets, thresholds
    )


@lock_.register_fake
def _(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    thresholds: Tensor,
    backend: str,
) -> Tensor:
    return torch.empty(len(importances), 3, dtype=torch.int64, device=thresholds.device)


@torch.library.custom_op("epi_kernels::sparse_adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
    backend: str,
) -> None:
    """Take one AdamW step of selected entries in place; the others are not touched, and cost nothing.

    The equations are those of `masked_adamw_` without a lock. State and time are in proportion to the entries selected.

    Args:
        params: theta, floating point; written at the selected entries alone.
        grads: same shapes, any floating dtype; read.
        indices: 1-D, int64 or int32, for each parameter: the positions of its selected entries in row-major order of
            its shape, whatever its strides; strictly increasing. Order and distinctness are the caller's business.
        exp_avgs: m, 1-D, one value for each index; written.
        exp_avg_sqs: v, likewise.
        scalars: float64 [tensors, 11] on the CPU, a row of `epi_kernels.contract.Scalars` for each tensor.
        backend: "auto" or the name of one.

    Raises:
        ValueError: lists do not belong together, or the backend is unknown. On the CPU also: an index is out of range.
        TypeError: indices are not integers.
        NotImplementedError: the backend is not part of this version.
        RuntimeError: the backend cannot run on these tensors.

    Example:
        >>> theta, scalars = torch.ones(2, 2), Scalars(1.0, 1.0, 0.9, 0.1, 0.99, 0.01, 1.0, 0.1, 0.0, 0.0, 1.0)
        >>> state = [torch.zeros(1)], [torch.zeros(1)]
        >>> grads, indices = [torch.ones(2, 2)], [torch.tensor([2])]
        >>> sparse_adamw_([theta], grads, indices, *state, torch.tensor([scalars], dtype=torch.float64), "auto")
        >>> theta
        tensor([[1.0000, 1.0000],
                [0.9000, 1.0000]])
    """
    check_lists(params=params, grads=grads)
    check_indices(params, indices, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _check_scalars(scalars, params)
    if params:
        states = _dtypes(exp_avgs, exp_avg_sqs)
        choose("sparse_adamw_", params[0].device.type, backend, _dtypes(params, grads), states).run(
            params, grads, indices, exp_avgs, exp_avg_sqs, scalars
        )


sparse_adamw_.register_fake(lambda *_: None)


def _check_scalars(scalars: Tensor, params: Sequence[Tensor]) -> None:
    if scalars.shape != (len(params), len(Scalars._fields)):
        raise ValueError(f"scalars has shape {tuple(scalars.shape)}, not {(len(params), len(Scalars._fields))}")


def _dtypes(*lists: Sequence[Tensor | None]) -> frozenset[torch.dtype]:
    return frozenset(tensor.dtype for tensors in lists for tensor in tensors if tensor is not None)


def find_threshold(histogram: Callable[[Tensor, int, int], Tensor], ranks: Tensor, *, exact: bool) -> Tensor:
    """Return the `ranks`-th largest score of each budget, from histograms of the scores' bits alone.

    Radix selection from the highest digit down: no sort and no copy of the scores. Exact needs three passes over the
    scores, one for each digit; ``exact=False`` stops after the first, whose bins are 16 to a factor of two, and
    returns the lower edge of the bin: ``tau_exact / (1 + 1/16) < tau <= tau_exact``, so that at least `ranks` entries
    reach it, at most those of one bin more.

    Args:
        histogram: (prefixes, shift, bins) -> int64 [budgets, bins], as `score_histogram` of all the scores there are.
            The only place that sees data: a caller sums shards or devices in it.
        ranks: int64 [budgets], k of each budget, 1 is the largest. 0: nothing is to be selected.
        exact: refine to the last bit.

    Returns:
        float32 [budgets]. 0 where there are fewer than k scores; infinity where k is 0.

    Example:
        >>> scores = torch.tensor([0.5, 0.25, 1.0])
        >>> def histogram(prefixes, shift, bins):
        ...     key = scores.view(torch.int32) >> shift
        ...     return torch.bincount(key[key // bins == prefixes] % bins, minlength=bins)[None]
        >>> find_threshold(histogram, torch.tensor([2]), exact=True)
        tensor([0.5000])
    """
    prefixes = torch.zeros_like(ranks)
    remaining = ranks
    shift = sum(KEY_DIGITS)
    for bits in KEY_DIGITS if exact else KEY_DIGITS[:1]:
        shift -= bits
        counts = histogram(prefixes, shift, 1 << bits)
        reached = counts.flip(1).cumsum(1)
        skipped = (reached < remaining[:, None]).sum(1).clamp(max=(1 << bits) - 1)
        above = torch.where(skipped > 0, reached.gather(1, (skipped - 1).clamp(min=0)[:, None])[:, 0], 0)
        remaining = remaining - above
        prefixes = (prefixes << bits) + ((1 << bits) - 1 - skipped)
    thresholds = (prefixes << shift).to(torch.int32).view(torch.float32)
    return torch.where(ranks > 0, thresholds, torch.inf)
