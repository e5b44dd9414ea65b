"""The operations, one in-place function each: check, choose a backend, run.

They are registered with torch (``torch.ops.epi_kernels.*``), so that ``torch.compile`` sees one opaque node, and each
has a fake implementation. All of them work on lists: one call serves every tensor of one device and dtype combination.

A *signed importance* carries the protection mask in its sign bit: see `epi_kernels.lock`.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from epi_kernels.backends.registry import choose
from epi_kernels.backends.support import Spec
from epi_kernels.contract import (
    KEY_DIGITS,
    check_indices,
    check_lists,
    check_one_dtype,
    check_positions,
    check_rows,
    check_tensor,
    check_value,
)
from epi_kernels.ops.table import on_device

# of a histogram: a digit has at most this many values
_MOST_BINS = 1 << max(KEY_DIGITS)

LOCK_IN = ("none", "importance", "exp_avg_sq", "static")


class Sweep:
    """`masked_adamw_` prepared for its tensors, for an optimizer that steps the same ones again and again.

    What does not change from step to step, the checks and the table that a backend makes of the tensors, is done once.
    No tensor is kept: `step_` is given them again.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks, lock_in, lockable, backend: see `masked_adamw_`.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `masked_adamw_`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        locks: Sequence[Tensor | None],
        lock_in: str,
        lockable: Sequence[bool],
        backend: str,
    ) -> None:
        check_lists(
            params=params,
            grads=grads,
            exp_avgs=exp_avgs,
            exp_avg_sqs=exp_avg_sqs,
            max_exp_avg_sqs=max_exp_avg_sqs,
            locks=locks,
        )
        check_one_dtype(params=params, grads=grads)
        _check_locks(locks, lock_in, lockable, len(params))
        self._sweep = None
        if params:
            absent = [None] * len(params)
            lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or absent, locks or absent)
            states = _dtypes(exp_avgs, exp_avg_sqs, max_exp_avg_sqs, [] if lock_in == "static" else locks)
            chosen = choose(Spec("masked_adamw_", _dtypes(params, grads), states), params[0].device, backend)
            self._sweep = chosen.module.Sweep(*lists, lock_in, lockable)

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None],
        locks: Sequence[Tensor | None],
        nonfinite: Tensor,
        scalars: Tensor,
        rows: Sequence[int],
        *,
        advanced: bool | Tensor,
        grad_factor: Tensor | None = None,
        found_inf: Tensor | None = None,
        moved: bool = False,
    ) -> None:
        """Take one step of all the tensors; the arguments are those of `masked_adamw_`.

        `advanced` may be float32, one value on the tensors' device, where the host does not know it: not 0 is True.
        `scalars` may be float32 on that device.

        The tensors have the shapes, strides, dtypes and devices of the constructor's: that is not checked again. Where
        any but the gradients lies at another address than in the constructor, say so by `moved`.
        """
        if self._sweep is None:
            return
        if not max_exp_avg_sqs or not locks:
            absent = [None] * len(params)
            max_exp_avg_sqs, locks = max_exp_avg_sqs or absent, locks or absent
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks)
        self._sweep.step_(*lists, moved, nonfinite, scalars, rows, advanced, grad_factor, found_inf)
        optional = [tensor for tensor in (*max_exp_avg_sqs, *locks) if tensor is not None]
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *optional])


@torch.library.custom_op(
    "epi_kernels::masked_adamw_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "locks", "nonfinite"),
)
def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    locks: Sequence[Tensor | None],
    nonfinite: Tensor,
    scalars: Tensor,
    rows: Sequence[int],
    lock_in: str,
    lockable: Sequence[bool],
    advanced: bool,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    backend: str,
) -> None:
    """Take one AdamW step in place; entries that are locked keep their bits, their moments advance all the same.

    ::

        g <- factor g
        S <- beta S + (1 - beta) g^2                                     EPI (arXiv 2604.14010) Eq. 5
        m <- m + (1 - beta1)(g - m)                                      AdamW (arXiv 1711.05101) Alg. 2
        v <- beta2 v + (1 - beta2) g^2
        theta <- theta                                                   where locked, EPI Eq. 12-13
        theta <- (1 - lr lambda) theta - step_size m / (sqrt(v) / correction + eps)      elsewhere

    Args:
        params: theta, floating point, of one dtype; written.
        grads: same shapes, any one floating dtype; read.
        exp_avgs: m; written.
        exp_avg_sqs: v; written. Signed (see `epi_kernels.lock`) with ``lock_in="exp_avg_sq"``.
        max_exp_avg_sqs: largest v so far, for AMSGrad; written. None, or an empty list: no AMSGrad.
        locks: of the lockable tensors, with ``lock_in="importance"`` the signed S, written; with ``"static"`` int8,
            read; else None, or an empty list.
        nonfinite: int64 [tensors]; the number of entries whose g^2 was NaN or infinite is added. Such an entry of S
            stays as it was.
        scalars: float64 [n, 11] on the CPU, rows of `epi_kernels.contract.Scalars`.
        rows: which of them each tensor uses.
        lock_in: where the lock bit is: "none", "importance", "exp_avg_sq" or "static".
        lockable: the tensors for which that holds; the others have no lock.
        advanced: True when this step's g^2 is in the signed tensor already (a refresh came first).
        grad_factor: float32, one value on the tensors' device, by which every gradient is multiplied first: 1 / scale
            of automatic mixed precision, a clip factor, or their product.
        found_inf: float32, one value on the tensors' device. Where it is not 0 nothing changes at all.
        backend: "auto" or the name of one.

    Raises:
        ValueError: lists do not belong together, `lock_in` is unknown, or the backend is.
        TypeError: params or grads have several dtypes; a lock with ``lock_in="static"`` is not int8.
        NotImplementedError: the backend does not have this operation.
        RuntimeError: the backend cannot run on these tensors.
    """
    sweep = Sweep(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks, lock_in, lockable, backend)
    check_rows(scalars, rows, len(params))
    if params:
        check_tensor("nonfinite", nonfinite, torch.int64, (len(params),), params[0].device)
        check_value("grad_factor", grad_factor, params[0].device)
        check_value("found_inf", found_inf, params[0].device)
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, locks)
    sweep.step_(*lists, nonfinite, scalars, rows, advanced=advanced, grad_factor=grad_factor, found_inf=found_inf)


masked_adamw_.register_fake(lambda *_: None)


@torch.library.custom_op("epi_kernels::importance_", mutates_args=("importances", "ranges", "nonfinite"))
def importance_(
    importances: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    ranges: Tensor,
    nonfinite: Tensor,
    betas: Tensor,
    layers: Sequence[int],
    keep_finite: bool,
    grad_factor: Tensor | None,
    due: Tensor | None,
    backend: str,
) -> None:
    """Advance the importance where there is a gradient, and extend every layer's range in the same pass.

    ::

        S <- beta S + (1 - beta) g^2,     mu_l <- min(mu_l, S),  nu_l <- max(nu_l, S)

    EPI (arXiv 2604.14010) Eq. 5 and 7.

    Args:
        importances: signed S; magnitudes written, locks kept.
        grads: the gradient of each, or None, which leaves that S as it is; the range takes part in both cases.
        ranges: float32 [layers, 2], (mu, nu) of each layer, contiguous; written. Start from (inf, -inf), or from (0, 0)
            where a layer has entries elsewhere whose S is 0. Subnormal S counts as 0, and S that is not finite takes no
            part.
        nonfinite: int64 [tensors]; the number of entries whose g^2 was NaN or infinite is added.
        betas: float64 [tensors, 2] on the CPU: beta and 1 - beta of each tensor.
        layers: the layer of each tensor: a row of `ranges`.
        keep_finite: True leaves S as it was where g^2 is not finite; False lets it in, for S = exp_avg_sq.
        grad_factor: float32, one value on the tensors' device, by which every gradient is multiplied first, or None.
        due: float32, one value on the tensors' device; where it is 0 nothing changes. None: 1. The device then knows
            whether this is the step to refresh, and the host need not.
        backend: "auto" or the name of one.

    Raises:
        ValueError: lists do not belong together, a tensor beside them has another shape, layout or device, a layer has
            no row in `ranges`, or the backend is unknown.
        TypeError: a tensor has another dtype.
        RuntimeError: the backend cannot run on these tensors.
    """
    check_lists(importances=importances, grads=grads)
    count, device = len(importances), ranges.device
    _check_devices(importances, device)
    check_tensor("ranges", ranges, torch.float32, (len(ranges), 2), device)
    check_tensor("nonfinite", nonfinite, torch.int64, (count,), device)
    check_tensor("betas", betas, torch.float64, (count, 2), torch.device("cpu"))
    check_positions("layers", layers, count, "ranges", len(ranges))
    check_value("grad_factor", grad_factor, device)
    check_value("due", due, device)
    spec = Spec("importance_", _dtypes(grads), _dtypes(importances))
    choose(spec, ranges.device, backend).module.importance_(
        importances, grads, ranges, nonfinite, betas, layers, keep_finite, grad_factor, due
    )


importance_.register_fake(lambda *_: None)


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
        chosen = choose(Spec("gradient_sums_", _dtypes(grads), states), sums[0].device, backend)
        chosen.module.gradient_sums_(sums, square_sums, grads)


gradient_sums_.register_fake(lambda *_: None)


@torch.library.custom_op("epi_kernels::score_histogram", mutates_args=())
def score_histogram(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    selection: Tensor,
    shift: int,
    bins: int,
    due: Tensor | None,
    backend: str,
) -> Tensor:
    """Count the scores of each budget by one digit of their bits.

    The score (EPI Eq. 8, ``(S - mu) / (nu - mu)``) is a float32 >= 0; its key is its bits as an integer, which order as
    the scores do. An entry counts where the digits above (``key >> shift`` divided by `bins`) are its budget's, as far
    as `select_digit_` has found them.

    Args:
        importances: signed S; read.
        layers: the layer of each tensor: a row of `ranges`.
        ranges: float32 [layers, 2], (mu, nu); None ranks the raw S.
        budgets: the budget of each tensor: a row of the result.
        selection: int64 [budgets, 2], contiguous: the digits found so far, and the rank among the scores that have
            them; see `select_digit_`.
        shift: the number of bits below the digit.
        bins: the number of values of the digit, a power of two.
        due: as of `importance_`; where it is 0 nothing is counted.
        backend: "auto" or the name of one.

    Returns:
        int64 [parts, budgets, bins]; the histogram is the sum over the parts, as many as a backend likes. The same
        integers on every backend, so that sums over shards are exact.

    Raises:
        ValueError, TypeError, RuntimeError: as `importance_`; or `shift` and `bins` are no digit of a key.
    """
    _check_scored(importances, layers, ranges, budgets, due, "selection", len(selection), selection.device)
    check_tensor("selection", selection, torch.int64, (len(selection), 2), selection.device)
    if not (1 <= bins <= _MOST_BINS and bins & (bins - 1) == 0 and 0 <= shift < 31):
        raise ValueError(f"bins is {bins} and shift {shift}; bins is a power of two up to {_MOST_BINS}, shift 0 to 30")
    chosen = choose(Spec("score_histogram", states=_dtypes(importances)), selection.device, backend)
    return cast(
        Tensor, chosen.module.score_histogram(importances, layers, ranges, budgets, selection, shift, bins, due)
    )


@score_histogram.register_fake
def _(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    selection: Tensor,
    shift: int,
    bins: int,
    due: Tensor | None,
    backend: str,
) -> Tensor:
    parts = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(parts, selection.shape[0], bins, dtype=torch.int64, device=selection.device)


@torch.library.custom_op("epi_kernels::select_digit_", mutates_args=("selection",))
def select_digit_(counts: Tensor, selection: Tensor, shift: int, backend: str) -> Tensor:
    """Find, for every budget, the digit of the score that has its rank: one step of `find_threshold`.

    Args:
        counts: as `score_histogram` returns it, over all the scores there are.
        selection: int64 [budgets, 2], contiguous; written. (digits found so far, rank k among the scores that have
            them, 1 is the largest); then the same with one digit more. k = 0: nothing is to be selected.
        shift: the number of bits below the digit.
        backend: "auto" or the name of one.

    Returns:
        float32 [budgets], the smallest score that has the digits found. 0 where there are fewer than k scores;
        infinity where k is 0.

    Raises:
        ValueError, TypeError: `counts` or `selection` has another shape, layout, device or dtype.
    """
    check_tensor("selection", selection, torch.int64, (len(selection), 2), selection.device)
    if counts.dim() != 3:
        raise ValueError(f"counts has shape {tuple(counts.shape)}; pass [parts, budgets, bins]")
    parts, _, bins = counts.shape
    check_tensor("counts", counts, torch.int64, (parts, len(selection), bins), selection.device)
    chosen = choose(Spec("select_digit_"), selection.device, backend)
    return cast(Tensor, chosen.module.select_digit_(counts, selection, shift))


@select_digit_.register_fake
def _(counts: Tensor, selection: Tensor, shift: int, backend: str) -> Tensor:
    return torch.empty(selection.shape[0], dtype=torch.float32, device=selection.device)


@torch.library.custom_op("epi_kernels::lock_", mutates_args=("importances",))
def lock_(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    thresholds: Tensor,
    due: Tensor | None,
    backend: str,
) -> Tensor:
    """Lock exactly the entries whose score is at least their budget's threshold and above 0 (EPI Eq. 9).

    Args:
        importances: signed S; sign bits written, magnitudes kept.
        layers: the layer of each tensor: a row of `ranges`.
        ranges: float32 [layers, 2], (mu, nu); None ranks the raw S.
        budgets: the budget of each tensor: an element of `thresholds`.
        thresholds: float32 [budgets].
        due: as of `importance_`; where it is 0 every lock stays and nothing is counted.
        backend: "auto" or the name of one.

    Returns:
        int64 [tensors, 3]: entries locked now, of these not locked before, and released.

    Raises:
        ValueError, TypeError, RuntimeError: as `importance_`.
    """
    _check_scored(importances, layers, ranges, budgets, due, "thresholds", len(thresholds), thresholds.device)
    check_tensor("thresholds", thresholds, torch.float32, (len(thresholds),), thresholds.device)
    chosen = choose(Spec("lock_", states=_dtypes(importances)), thresholds.device, backend)
    return cast(Tensor, chosen.module.lock_(importances, layers, ranges, budgets, thresholds, due))


@lock_.register_fake
def _(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    thresholds: Tensor,
    due: Tensor | None,
    backend: str,
) -> Tensor:
    return torch.empty(len(importances), 3, dtype=torch.int64, device=thresholds.device)


class SparseSweep:
    """`sparse_adamw_` prepared for its tensors, for an optimizer that steps the same ones again and again.

    No tensor is kept: `step_` is given them again. Offsets that a backend made from indices live as long as these.

    Args:
        params, grads, indices, exp_avgs, exp_avg_sqs, backend: see `sparse_adamw_`.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `sparse_adamw_`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        indices: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        backend: str,
    ) -> None:
        check_lists(params=params, grads=grads)
        check_one_dtype(params=params, grads=grads)
        check_indices(params, indices, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
        self._sweep = None
        if params:
            states = _dtypes(exp_avgs, exp_avg_sqs)
            chosen = choose(Spec("sparse_adamw_", _dtypes(params, grads), states), params[0].device, backend)
            self._sweep = chosen.module.Sweep(params, grads, indices, exp_avgs, exp_avg_sqs)

    def step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        indices: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        scalars: Tensor,
        rows: Sequence[int],
    ) -> None:
        """Take one step of all the tensors; the arguments are those of `sparse_adamw_`.

        All but the gradients are the constructor's; the gradients have the shapes, strides, dtypes and devices of the
        constructor's. That is not checked again.
        """
        if self._sweep is not None:
            self._sweep.step_(params, grads, indices, exp_avgs, exp_avg_sqs, scalars, rows)
            torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


@torch.library.custom_op("epi_kernels::sparse_adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
    rows: Sequence[int],
    backend: str,
) -> None:
    """Take one AdamW step of selected entries in place; the others are not touched, and cost nothing.

    The equations are those of `masked_adamw_` without a lock. State and time are in proportion to the entries selected.

    Args:
        params: theta, floating point, of one dtype; written at the selected entries alone.
        grads: same shapes, any one floating dtype; read.
        indices: 1-D, int64 or int32, for each parameter: the positions of its selected entries in row-major order of
            its shape, whatever its strides; strictly increasing. Order and distinctness are the caller's business.
        exp_avgs: m, 1-D, one value for each index; written.
        exp_avg_sqs: v, likewise.
        scalars: float64 [n, 11] on the CPU, rows of `epi_kernels.contract.Scalars`.
        rows: which of them each tensor uses.
        backend: "auto" or the name of one.

    Raises:
        ValueError: lists do not belong together, or the backend is unknown. On the CPU also: the first or the last
            index of a tensor is out of range.
        TypeError: indices are not integers; params or grads have several dtypes.
        NotImplementedError: the backend does not have this operation.
        RuntimeError: the backend cannot run on these tensors.

    Example:
        >>> theta, scalars = torch.ones(2, 2), Scalars(1.0, 1.0, 0.9, 0.1, 0.99, 0.01, 1.0, 0.1, 0.0, 0.0, 1.0)
        >>> state = [torch.zeros(1)], [torch.zeros(1)]
        >>> grads, indices = [torch.ones(2, 2)], [torch.tensor([2])]
        >>> sparse_adamw_([theta], grads, indices, *state, torch.tensor([scalars], dtype=torch.float64), [0], "auto")
        >>> theta
        tensor([[1.0000, 1.0000],
                [0.9000, 1.0000]])
    """
    sweep = SparseSweep(params, grads, indices, exp_avgs, exp_avg_sqs, backend)
    check_rows(scalars, rows, len(params))
    sweep.step_(params, grads, indices, exp_avgs, exp_avg_sqs, scalars, rows)


sparse_adamw_.register_fake(lambda *_: None)


def _check_locks(locks: Sequence[Tensor | None], lock_in: str, lockable: Sequence[bool], count: int) -> None:
    if lock_in not in LOCK_IN:
        raise ValueError(f"Invalid lock_in: {lock_in!r}; choose one of {LOCK_IN}")
    if len(lockable) != count:
        raise ValueError(f"lockable has {len(lockable)} values for {count} params; pass one for each")
    for i, can in enumerate(lockable):
        fixed = locks[i] if locks else None
        if (fixed is not None) != (can and lock_in in ("importance", "static")):
            raise ValueError(f"locks[{i}] is {'None' if fixed is None else 'a tensor'} with {lock_in=}, lockable={can}")
        if fixed is not None and lock_in == "static" and fixed.dtype != torch.int8:
            raise TypeError(f"locks[{i}] is {fixed.dtype}; with lock_in='static' pass int8")


def _check_devices(importances: Sequence[Tensor], device: torch.device) -> None:
    for i, importance in enumerate(importances):
        if importance.device != device:
            raise ValueError(f"importances[{i}] is on {importance.device}, and the numbers beside it on {device}")


def _check_scored(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    ranges: Tensor | None,
    budgets: Sequence[int],
    due: Tensor | None,
    of_budgets: str,
    budget_count: int,
    device: torch.device,
) -> None:
    """Check what the histogram and the lock have in common; `of_budgets` is the argument with a row for each budget."""
    check_lists(importances=importances)
    _check_devices(importances, device)
    if ranges is not None:
        check_tensor("ranges", ranges, torch.float32, (len(ranges), 2), device)
        check_positions("layers", layers, len(importances), "ranges", len(ranges))
    check_positions("budgets", budgets, len(importances), of_budgets, budget_count)
    check_value("due", due, device)


def _dtypes(*lists: Sequence[Tensor | None]) -> frozenset[torch.dtype]:
    return frozenset(tensor.dtype for tensors in lists for tensor in tensors if tensor is not None)


def find_threshold(
    histogram: Callable[[Tensor, int, int], Tensor],
    ranks: Sequence[int],
    *,
    exact: bool,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Return the `ranks`-th largest score of each budget, from histograms of the scores' bits alone.

    Radix selection from the highest digit down: no sort, no copy of the scores, and no waiting for an accelerator.
    Exact needs three passes over the scores, one for each digit; ``exact=False`` stops after the first, whose bins are
    16 to a factor of two, and returns the lower edge of the bin: ``tau_exact / (1 + 1/16) < tau <= tau_exact``, so that
    at least `ranks` entries reach it, at most those of one bin more.

    Args:
        histogram: (selection, shift, bins) -> int64 [parts, budgets, bins], as `score_histogram` of all the scores
            there are. The only place that sees data: a caller adds shards or devices in it, as parts or by their sum.
        ranks: k of each budget, 1 is the largest. 0: nothing is to be selected.
        exact: refine to the last bit.
        device: of the histograms.
        backend: "auto" or the name of one.

    Returns:
        float32 [budgets]. 0 where there are fewer than k scores; infinity where k is 0.

    Example:
        >>> scores = torch.tensor([0.5, 0.25, 1.0])
        >>> def histogram(selection, shift, bins):
        ...     key = scores.view(torch.int32) >> shift
        ...     return torch.bincount(key[key // bins == selection[0, 0]] % bins, minlength=bins)[None, None]
        >>> find_threshold(histogram, [2], exact=True)
        tensor([0.5000])
    """
    selection = on_device(
        torch.tensor([[0, rank] for rank in ranks], dtype=torch.int64, device="cpu").view(-1, 2), torch.device(device)
    )
    shift = sum(KEY_DIGITS)
    for bits in KEY_DIGITS if exact else KEY_DIGITS[:1]:
        shift -= bits
        thresholds = select_digit_(histogram(selection, shift, 1 << bits), selection, shift, backend)
    return thresholds
