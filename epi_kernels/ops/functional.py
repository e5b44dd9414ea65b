"""The operations of importance and threshold, one function each: check, choose a backend, prepare, run.

They are registered with torch (``torch.ops.epi_kernels.*``), so that ``torch.compile`` sees one opaque node, and each
has a fake implementation. All of them work on lists: one call serves every tensor of one device and dtype combination.
A refresh, which takes the same tensors again and again, prepares them once and keeps what the backend has made.

A *signed importance* carries the protection mask in its sign bit: see `epi_kernels.lock`.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from epi_kernels.backends.registry import choose
from epi_kernels.backends.support import Spec
from epi_kernels.contract import (
    DIGITS,
    check_lists,
    check_one_device,
    check_positions,
    check_tensor,
    check_value,
)
from epi_kernels.ops.storages import check_scales
from epi_kernels.ops.table import on_device
from epi_kernels.ops.tensors import dtypes_of
from epi_kernels.storage.noise import Place

# the most bins of a histogram: a digit has at most this many values
_MOST_BINS = max(bins for _, bins in DIGITS)


def prepared_importance(
    importances: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    betas: Tensor,
    layers: Sequence[int],
    layer_count: int,
    keep_finite: bool,
    device: torch.device,
    backend: str,
    scales: Sequence[Tensor | None] = (),
    places: Sequence[Place] = (),
) -> Any:
    """Return a backend's `importance_` of these tensors, with all prepared that stays the same from call to call.

    The returned object keeps no tensor of the lists. Its one function takes the lists again on each call::

        advance_(importances, grads, ranges, nonfinite, grad_factor, due, scales, steps)

    Those tensors must have the same shapes, strides, dtypes and devices as the tensors given here, gradients must be
    missing in the same places, and all but the gradients must lie at the same addresses. That is not checked again. The
    caller tells autograd what was written. `ranges` may be None where no range is wanted, which saves a third of the
    time on the CPU.

    The arguments are those of `importance_`; `layer_count` is the number of rows of `ranges`, and `device` is the
    device of all tensors except `betas`. Importances may also be bfloat16, or in blocks of 8 bits, uint8: `scales` are
    then theirs, written, and None for the others. With `places`, where the entries of each tensor lie in the whole
    tensor, such importances are rounded stochastically; `steps` are then the parameters' clocks, float32 [tensors] on
    `device`. Without, bfloat16 is rounded to nearest.

    Raises:
        ValueError, TypeError, RuntimeError: as `importance_`.
    """
    check_lists(importances=importances, grads=grads)
    check_one_device("importances", importances, device)
    check_tensor("betas", betas, torch.float64, (len(importances), 2), torch.device("cpu"))
    check_positions("layers", layers, len(importances), "ranges", layer_count)
    check_scales("importances", importances, scales)
    if not places and torch.uint8 in dtypes_of(importances):
        raise ValueError("places is empty, and importances are rounded stochastically; pass the place of each tensor")
    chosen = choose(Spec("importance_", dtypes_of(grads), dtypes_of(importances)), device, backend)
    return chosen.module.Importance(importances, grads, betas, layers, keep_finite, device, scales, places)


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
        grads: the gradient of each tensor; None leaves S as it is. S extends the layer's range in both cases.
        ranges: float32 [layers, 2], (mu, nu) of each layer, contiguous; written. Start from (inf, -inf), or from (0, 0)
            if the layer has other entries, not in these lists, whose S is 0. A subnormal S counts as 0, and an S that
            is not finite does not extend the range.
        nonfinite: int64 [tensors]; the number of entries whose g^2 was NaN or infinite is added.
        betas: float64 [tensors, 2] on the CPU: beta and 1 - beta of each tensor.
        layers: the layer of each tensor: a row of `ranges`.
        keep_finite: True leaves S as it was where g^2 is not finite; False stores the value, for S = exp_avg_sq.
        grad_factor: float32, one value on the tensors' device, by which every gradient is multiplied first, or None.
        due: float32, one value on the tensors' device; where it is 0 nothing changes. None means 1. With `due`, only
            the device needs to know whether this step refreshes, not the host.
        backend: "auto" or the name of one.

    Raises:
        ValueError: lists do not belong together, another tensor argument has a wrong shape, layout or device, a layer
            has no row in `ranges`, or the backend is unknown.
        TypeError: a tensor has a wrong dtype.
        RuntimeError: the backend cannot run on these tensors.
    """
    device = ranges.device
    check_tensor("ranges", ranges, torch.float32, (len(ranges), 2), device)
    check_tensor("nonfinite", nonfinite, torch.int64, (len(importances),), device)
    check_value("grad_factor", grad_factor, device)
    check_value("due", due, device)
    prepared = prepared_importance(importances, grads, betas, layers, len(ranges), keep_finite, device, backend)
    prepared.advance_(importances, grads, ranges, nonfinite, grad_factor, due, (), None)


importance_.register_fake(lambda *_: None)


@torch.library.custom_op("epi_kernels::gradient_sums_", mutates_args=("sums", "square_sums"))
def gradient_sums_(
    sums: Sequence[Tensor], square_sums: Sequence[Tensor], grads: Sequence[Tensor], backend: str
) -> None:
    """Add each gradient to a sum and its square to another sum; PIECE computes its importance from both.

    ::

        sum <- sum + g,     square_sum <- square_sum + g^2                   PIECE (arXiv 2511.15375) Eq. 4 and 10

    Args:
        sums: float32; written. An empty list where only the squares are wanted.
        square_sums: float32, one for each gradient; written.
        grads: the shapes of `square_sums` and of `sums`, any floating dtype; read. Squared in float32 or wider.
        backend: "auto" or the name of one.

    Raises:
        ValueError: lists do not belong together, their tensors are on several devices, or the backend is unknown.
        TypeError: a tensor has a wrong dtype.
        RuntimeError: the backend cannot run on these tensors.
    """
    check_lists({"sums": sums}, square_sums=square_sums, grads=grads)
    if grads:
        check_one_device("grads", grads, grads[0].device)
        states = dtypes_of(sums, square_sums)
        chosen = choose(Spec("gradient_sums_", dtypes_of(grads), states), grads[0].device, backend)
        chosen.module.gradient_sums_(sums, square_sums, grads)


gradient_sums_.register_fake(lambda *_: None)


def prepared_histogram(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    layer_count: int | None,
    budgets: Sequence[int],
    budget_count: int,
    device: torch.device,
    backend: str,
    scales: Sequence[Tensor | None] = (),
) -> Any:
    """Return a backend's `score_histogram` of these tensors, with all prepared that stays the same between calls.

    The returned object keeps no tensor of the list. Its one function takes the list again, under the conditions of
    `prepared_importance`::

        count(importances, ranges, selection, shift, bins, due, scales) -> counts

    The arguments are those of `score_histogram`; `layer_count` is the number of rows of `ranges` (None without ranges),
    `budget_count` the number of rows of `selection`, and `device` the device of all tensors. Importances and `scales`
    are as in `prepared_importance`.

    Raises:
        ValueError, TypeError, RuntimeError: as `score_histogram`.
    """
    _check_scored(importances, scales, layers, layer_count, budgets, "selection", budget_count, device)
    chosen = choose(Spec("score_histogram", states=dtypes_of(importances)), device, backend)
    return chosen.module.Histogram(importances, layers, budgets, device, scales)


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

    The score (EPI Eq. 8, ``(S - mu) / (nu - mu)``) is a float32 >= 0; its key is its bits read as an integer, and keys
    have the same order as scores. An entry is counted only if the digits above this one (``key >> shift`` divided by
    `bins`) equal those that `select_digit_` has found for its budget so far.

    Args:
        importances: signed S; read.
        layers: the layer of each tensor: a row of `ranges`.
        ranges: float32 [layers, 2], (mu, nu); None: the score is the raw S.
        budgets: the budget of each tensor: a row of the result.
        selection: int64 [budgets, 2], contiguous: the digits found so far, and k among the scores that have these
            digits; see `select_digit_`.
        shift: the number of bits below the digit.
        bins: the number of values of the digit, a power of two.
        due: as in `importance_`; where it is 0 nothing is counted.
        backend: "auto" or the name of one.

    Returns:
        int64 [parts, budgets, bins]; the histogram is the sum over the parts, whose number a backend chooses. Every
        backend returns the same integers in this sum, so that sums over shards are exact.

    Raises:
        ValueError, TypeError, RuntimeError: as `importance_`; or `shift` and `bins` do not describe a digit of a key.
    """
    device = selection.device
    check_tensor("selection", selection, torch.int64, (len(selection), 2), device)
    layer_count = _rows_of(ranges, device)
    check_value("due", due, device)
    _check_digit(shift, bins)
    prepared = prepared_histogram(importances, layers, layer_count, budgets, len(selection), device, backend)
    return cast(Tensor, prepared.count(importances, ranges, selection, shift, bins, due, ()))


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


def prepared_digit(device: torch.device, backend: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return a backend's `select_digit_`, (counts, selection, shift) -> thresholds, which checks nothing.

    Raises:
        ValueError, RuntimeError: the backend is unknown, or cannot run on the device.
    """
    return cast(
        Callable[[Tensor, Tensor, int], Tensor], choose(Spec("select_digit_"), device, backend).module.select_digit_
    )


@torch.library.custom_op("epi_kernels::select_digit_", mutates_args=("selection",))
def select_digit_(counts: Tensor, selection: Tensor, shift: int, backend: str) -> Tensor:
    """Find, for every budget, one digit of its k-th largest score: one step of `find_threshold`.

    Args:
        counts: as `score_histogram` returns it, counted over all scores.
        selection: int64 [budgets, 2], contiguous; written. Before: (the digits found so far, k among the scores that
            have these digits; k = 1 is the largest). After: the same with one more digit. k = 0: no entry is to
            reach the threshold.
        shift: the number of bits below the digit.
        backend: "auto" or the name of one.

    Returns:
        float32 [budgets], the smallest score that has the digits found. 0 where there are fewer than k scores;
        infinity where k is 0.

    Raises:
        ValueError: `counts` or `selection` has another shape, layout or device; `shift` and the bins do not describe a
            digit of a key; or the backend is unknown.
        TypeError: `counts` or `selection` has another dtype.
        RuntimeError: the backend cannot run on the device.
    """
    check_tensor("selection", selection, torch.int64, (len(selection), 2), selection.device)
    if counts.dim() != 3:
        raise ValueError(f"counts has shape {tuple(counts.shape)}; pass [parts, budgets, bins]")
    parts, _, bins = counts.shape
    _check_digit(shift, bins)
    check_tensor("counts", counts, torch.int64, (parts, len(selection), bins), selection.device)
    return prepared_digit(selection.device, backend)(counts, selection, shift)


@select_digit_.register_fake
def _(counts: Tensor, selection: Tensor, shift: int, backend: str) -> Tensor:
    return torch.empty(selection.shape[0], dtype=torch.float32, device=selection.device)


def prepared_lock(
    importances: Sequence[Tensor],
    layers: Sequence[int],
    layer_count: int | None,
    budgets: Sequence[int],
    budget_count: int,
    device: torch.device,
    backend: str,
    scales: Sequence[Tensor | None] = (),
) -> Any:
    """Return a backend's `lock_` of these tensors, with all prepared that stays the same from call to call.

    The returned object keeps no tensor of the list. Its one function takes the list again, under the conditions of
    `prepared_importance`::

        lock_(importances, ranges, thresholds, due, scales) -> counts

    The arguments are those of `lock_`; `layer_count` is the number of rows of `ranges` (None without ranges),
    `budget_count` the number of thresholds, and `device` the device of all tensors. Importances and `scales` are as in
    `prepared_importance`; scales are read.

    Raises:
        ValueError, TypeError, RuntimeError: as `lock_`.
    """
    _check_scored(importances, scales, layers, layer_count, budgets, "thresholds", budget_count, device)
    chosen = choose(Spec("lock_", states=dtypes_of(importances)), device, backend)
    return chosen.module.Lock(importances, layers, budgets, device, scales)


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
        ranges: float32 [layers, 2], (mu, nu); None: the score is the raw S.
        budgets: the budget of each tensor: an element of `thresholds`.
        thresholds: float32 [budgets].
        due: as in `importance_`; where it is 0 every lock stays as it is and nothing is counted.
        backend: "auto" or the name of one.

    Returns:
        int64 [tensors, 3]: entries locked now, entries locked now and not before, and entries released.

    Raises:
        ValueError, TypeError, RuntimeError: as `importance_`.
    """
    device = thresholds.device
    check_tensor("thresholds", thresholds, torch.float32, (len(thresholds),), device)
    layer_count = _rows_of(ranges, device)
    check_value("due", due, device)
    prepared = prepared_lock(importances, layers, layer_count, budgets, len(thresholds), device, backend)
    return cast(Tensor, prepared.lock_(importances, ranges, thresholds, due, ()))


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


def _check_digit(shift: int, bins: int) -> None:
    """Check that a key of 31 bits has a digit of `bins` values above its lowest `shift` bits."""
    if not (2 <= bins <= _MOST_BINS and bins & (bins - 1) == 0 and 0 <= shift <= 32 - bins.bit_length()):
        raise ValueError(
            f"bins is {bins} and shift {shift}; bins is a power of two from 2 to {_MOST_BINS}, and the digit lies "
            "within the 31 bits of a key"
        )


def _rows_of(ranges: Tensor | None, device: torch.device) -> int | None:
    """Check the ranges of a histogram or a lock, and return their number of rows; None without ranges."""
    if ranges is None:
        return None
    check_tensor("ranges", ranges, torch.float32, (len(ranges), 2), device)
    return len(ranges)


def _check_scored(
    importances: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    layers: Sequence[int],
    layer_count: int | None,
    budgets: Sequence[int],
    of_budgets: str,
    budget_count: int,
    device: torch.device,
) -> None:
    """Check what the histogram and the lock have in common; `of_budgets` has a row for each budget."""
    check_lists(importances=importances)
    check_scales("importances", importances, scales)
    check_one_device("importances", importances, device)
    check_positions("layers", layers, len(importances), "ranges", layer_count)
    check_positions("budgets", budgets, len(importances), of_budgets, budget_count)


def find_threshold(
    histogram: Callable[[Tensor, int, int], Tensor],
    ranks: Sequence[int],
    *,
    exact: bool,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Return the `ranks`-th largest score of each budget, using only histograms of the scores' bits.

    Radix selection from the highest digit down: no sort, no copy of the scores, and no waiting for an accelerator.
    The exact threshold needs three passes over the scores, one for each digit. ``exact=False`` stops after the first
    pass, which has 16 bins for each factor of two, and returns the lower edge of the bin:
    ``tau_exact / (1 + 1/16) < tau <= tau_exact``. At least `ranks` entries then reach the threshold, and the excess is
    at most the entries of one bin.

    Args:
        histogram: (selection, shift, bins) -> int64 [parts, budgets, bins], as `score_histogram` over all scores. Only
            this function reads the scores: a caller with several shards or devices combines them here, as parts or as a
            sum.
        ranks: k of each budget; 1 is the largest score, and 0 means that no entry is to reach the threshold.
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
    for shift, bins in DIGITS if exact else DIGITS[:1]:
        thresholds = select_digit_(histogram(selection, shift, bins), selection, shift, backend)
    return thresholds
