"""Whether an importance score says what a change of an entry does to the loss."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from epi_kernels.distributed import is_dtensor
from epi_kernels.isolation.layers import Grouping, LayersArgument
from epi_kernels.per_example import LossFunction, buffers_kept


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the linear correlation of two lists of numbers, in [-1, 1].

    ::

        r = sum_i (x_i - mean x)(y_i - mean y) / sqrt(sum_i (x_i - mean x)^2 sum_i (y_i - mean y)^2)

    Args:
        x: numbers in any unit.
        y: as many, in any unit.

    Raises:
        ValueError: the lengths differ, a number is NaN or infinite, or a list has fewer than two different numbers.

    >>> round(pearson([1.0, 2.0, 3.0], [1.0, 2.0, 6.0]), 4)
    0.9449
    """
    if len(x) != len(y):
        raise ValueError(
            f"a correlation is of pairs, and there are {len(x)} and {len(y)} numbers; pass as many of each"
        )
    first, second = _centred(x), _centred(y)
    return min(1.0, max(-1.0, float(first @ second / np.sqrt((first @ first) * (second @ second)))))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the rank correlation of two lists of numbers, in [-1, 1]: 1 where both have the same order.

    It is `pearson` of the ranks; equal numbers share the mean of their ranks.

    Args:
        x: numbers in any unit.
        y: as many, in any unit.

    Raises:
        ValueError: as `pearson`.

    >>> round(spearman([1.0, 2.0, 3.0], [1.0, 2.0, 600.0]), 4)
    1.0
    """
    for values in (x, y):
        _check_finite(values)  # NaN would have a rank
    return pearson(_ranks(x), _ranks(y))


class Validity(NamedTuple):
    """How well scores predict changes of the loss, and the points from which that follows."""

    pearson: float
    spearman: float
    scores: list[float]  # of the entries that were perturbed
    changes: list[float]  # of the loss, for each of these entries, in units of the loss


@torch.no_grad()
def importance_validity(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    scores: Mapping[str, Tensor],
    *,
    deviation: float = 0.03,
    per_layer: int = 32,
    layers: LayersArgument = "block",
    seed: int = 0,
) -> Validity:
    """Return how well a score predicts what a small Gaussian perturbation of an entry does to the loss.

    Appendix E.4 and Table 15: some entries of every layer are perturbed, one at a time, and the change of the loss is
    correlated with their score. A single draw would say more of its own size and sign than of the entry, and its first
    order (gradient times step, which the score does not claim to predict) would hide the second. So the change is the
    expected one, by quadrature with an antithetic pair, in which odd orders cancel; it is exact for a loss that is a
    polynomial of degree 5 or less in the entry::

        change = E[L(w + e) - L(w)],  e ~ N(0, deviation^2)
               = (L(w + s) + L(w - s) - 2 L(w)) / 6,  s = sqrt(3) deviation

    Parameters and buffers are restored bit for bit, also where the loss raises. The model is run under no_grad, in the
    mode that it has (train or eval), 2 + 2 n times over the batches for n entries. In float32 the loss has 7 digits, in
    which small changes drown: pass a copy in float64, ``copy.deepcopy(model).double()``, where that fits.

    Args:
        model: its parameters are perturbed in place, and restored.
        batches: of the task whose loss matters, held out, and the same in every run; each counts the same.
        loss_fn: (model, batch) -> the mean loss over the examples of a batch, one number.
        scores: name of a parameter -> tensor of its shape, >= 0, of any floating dtype: what
            `epi_kernels.importance.fisher` returns, or ``optimizer.state[param]["importance"].abs()`` (its sign is the
            lock). Only these parameters are perturbed.
        deviation: standard deviation of the perturbation, in units of the parameters, > 0.
        per_layer: entries that are drawn from every layer, or all if it has fewer.
        layers: what is a layer, as in EPIAdamW: "block", "tensor", or a callable name -> layer.
        seed: of the draw of entries; the same seed draws the same entries, in whatever order the scores are.

    Raises:
        ValueError: there are no scores or no batches; a score has no parameter of its name and shape, or is below 0,
            NaN or infinite; a parameter is in less than float32, whose steps would be rounded; an argument is out of
            its range; the loss is not one finite number, or differs when it is taken again; or all scores drawn, or
            all changes, are equal.
        NotImplementedError: a parameter is a DTensor.

    >>> model = torch.nn.Linear(4, 1, bias=False).double()
    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).diag()
    >>> found = importance_validity(
    ...     model, [x], lambda model, batch: model(batch).square().sum(), {"weight": x.diagonal()[None] ** 2}
    ... )
    >>> round(found.pearson, 6), round(found.spearman, 6)
    (1.0, 1.0)
    """
    if not (deviation > 0.0 and math.isfinite(deviation)):
        raise ValueError(f"Invalid deviation: {deviation!r}; a standard deviation > 0, in units of the parameters")
    if not isinstance(per_layer, int) or per_layer < 1:
        raise ValueError(f"Invalid per_layer: {per_layer!r}; entries to draw from every layer, an int >= 1")
    if isinstance(batches, Tensor):
        raise ValueError("batches is a tensor, whose rows would be batches; pass [tensor], or a loader")
    params = _scored(model, scores)
    kept = list(batches)
    if not kept:
        raise ValueError("there are no batches; pass held-out batches of the task (an iterator runs only once)")

    def loss() -> float:
        found = [loss_fn(model, batch) for batch in kept]
        if any(one.numel() != 1 or not math.isfinite(one) for one in found):
            raise ValueError(f"the losses of the batches are {found}; loss_fn must return one finite number for each")
        return math.fsum(map(float, found)) / len(found)

    step = math.sqrt(3.0) * deviation
    drawn = _drawn(scores, layers, per_layer, seed)
    points = [float(scores[name][index]) for name, index in drawn]
    if len(set(points)) < 2:  # refused before it costs anything
        raise ValueError(
            f"all {len(points)} scores drawn are equal, {points[:1]}; draw more than {per_layer} per_layer, or take "
            "another seed"
        )
    changes = []
    with buffers_kept(model):
        middle, again = loss(), loss()
        if middle != again:
            raise ValueError(f"the loss is {middle}, and {again} when taken again; call model.eval() if it has dropout")
        for name, index in drawn:
            entry = params[name][index]  # a view
            before = entry.clone()
            try:
                entry.copy_(before + step)
                above = loss()
                entry.copy_(before - step)
                below = loss()
            finally:
                entry.copy_(before)
            changes.append((above + below - 2.0 * middle) / 6.0)
    if len(set(changes)) < 2:
        raise ValueError(
            f"the loss changes by {changes[0]} at every entry; take a model in float64, or more than {deviation} as "
            "deviation"
        )
    return Validity(pearson(points, changes), spearman(points, changes), points, changes)


def _scored(model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that have scores, after checking both."""
    if not scores:
        raise ValueError("there are no scores; pass {name: tensor}")
    params = dict(model.named_parameters())
    for name, values in scores.items():
        if name not in params:
            raise ValueError(f"the model has no parameter {name!r}; scores go by the names of model.named_parameters()")
        param = params[name]
        if is_dtensor(param):
            raise NotImplementedError(f"{name} is a DTensor; perturb a copy of the model that is not sharded")
        if values.shape != param.shape:
            raise ValueError(f"{name} has scores of shape {tuple(values.shape)} and is {tuple(param.shape)}")
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {param.dtype}, in which a small step is rounded; perturb copy.deepcopy(model).double()"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} has scores that are NaN or infinite; leave out the batches they come from")
        if bool((values < 0).any()):
            raise ValueError(f"{name} has scores below 0; pass magnitudes, such as scores.abs()")
    return {name: params[name] for name in scores}


def _drawn(
    scores: Mapping[str, Tensor], layers: LayersArgument, per_layer: int, seed: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and the index of each entry to perturb: of every layer as many, without replacement."""
    grouping = Grouping(layers)
    grouping.resolve(named=True)
    members: dict[str, list[str]] = {}
    for name in sorted(scores):
        members.setdefault(grouping.layer(name), []).append(name)
    draw, drawn = random.Random(seed), []
    for names in members.values():
        ends = np.cumsum([scores[name].numel() for name in names])
        for place in sorted(draw.sample(range(ends[-1]), min(per_layer, int(ends[-1])))):
            which = int(np.searchsorted(ends, place, side="right"))
            name = names[which]
            offset = place - int(ends[which]) + scores[name].numel()
            drawn.append((name, tuple(map(int, np.unravel_index(offset, scores[name].shape)))))
    return drawn


def _check_finite(values: Sequence[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"a correlation needs finite numbers, and one is {value}; leave its pair out")


def _centred(values: Sequence[float]) -> "np.ndarray[Any, Any]":
    """Return numbers less their mean, scaled: products of very small or large ones stay in range."""
    _check_finite(values)
    found = np.asarray(values, np.float64)
    if not len(found) or found.min() == found.max():
        raise ValueError(f"a correlation needs two different numbers, and all {len(found)} are {found[:1]}; add others")
    found = found - found.min()
    found = found / found.max()
    return found - found.mean()


def _ranks(values: Sequence[float]) -> list[float]:
    _, places, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - (counts - 1) / 2
    return [float(rank) for rank in middles[places]]
