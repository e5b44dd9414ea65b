"""The highest scores of a model as a mask: exactly k of them, ties by position, without sorting or copying them."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from epi_kernels import contract, ops
from epi_kernels.layers import block, without_wrappers
from epi_kernels.ops.equations import score

# entries looked at together
_PIECE = 1 << 20


@torch.no_grad()
def top_k(
    scores: Mapping[str, Tensor],
    ratio: float,
    *,
    scope: Literal["global", "layer"] = "global",
    normalize: Literal["layer"] | None = None,
    layers: Literal["block", "tensor"] | Callable[[str], str] = "tensor",
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Return a mask of the k highest scores: k = floor(ratio * d), over all d entries together, and exactly k.

    PIECE (arXiv 2511.15375), Alg. 1. Of equal scores at the threshold the first by position are taken: by the order of
    `scores`, then row-major. That the count is exact lets compact states have a fixed size. The k-th largest score is
    found by its bits (`epi_kernels.ops.find_threshold`), in three passes over the scores.

    Args:
        scores: {name: tensor, >= 0, of any floating dtype and on any device}. Compared as float32; NaN and infinity
            count as 0, and so does what is subnormal.
        ratio: the share to select, 0 <= ratio <= 1.
        scope: "global", or "layer": floor(ratio * d) of every layer by itself.
        normalize: None ranks the scores as they are; "layer" by (s - min) / (max - min) of their layer, EPI Eq. 8.
        layers: what is a layer: "tensor", "block" (see `epi_kernels.layers.block`) or a callable name -> layer.
        backend: "auto", or the name of one, which then runs or raises.

    Returns:
        {name: bool tensor of the score's shape, on its device}, True = selected.

    Raises:
        ValueError: an argument is out of its range, there are no scores, or one is below 0.

    Example:
        >>> top_k({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([3.0, 2.0])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    _check(scores, ratio, scope, normalize)
    layer_of = {name: _layer(name, layers) for name in scores}
    index = {layer: i for i, layer in enumerate(dict.fromkeys(layer_of.values()))}
    where = {name: index[layer] for name, layer in layer_of.items()}
    budget_of = {name: where[name] if scope == "layer" else 0 for name in scores}
    eligible = [0] * (max(budget_of.values()) + 1)
    for name, values in scores.items():
        eligible[budget_of[name]] += values.numel()
    ranks = [contract.budget(ratio, count) for count in eligible]

    # float32 as the operations take it: what is float32 already is not copied
    single = {name: values.detach().float() for name, values in scores.items()}
    ranges = _ranges(single, where, len(index)) if normalize else None
    thresholds = _thresholds(single, where, budget_of, ranges, ranks, backend)

    # above the threshold all are taken; of those at it, as many as are missing
    left = list(ranks)
    for name, values in single.items():
        tau, layer_range = thresholds[budget_of[name]], None if ranges is None else ranges[where[name]]
        for piece in _pieces(values):
            left[budget_of[name]] -= int((_score(piece, layer_range) > tau.to(piece.device)).sum())
    masks = {}
    for name, values in single.items():
        budget, layer_range = budget_of[name], None if ranges is None else ranges[where[name]]
        tau = thresholds[budget].to(values.device)
        parts = []
        for piece in _pieces(values):
            found = _score(piece, layer_range)
            at = found == tau
            first = at & (at.cumsum(0) <= left[budget])
            left[budget] -= int(first.sum())
            parts.append((found > tau) | first)
        flat = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=values.device)
        masks[name] = flat.view(values.shape)
    return masks


def _check(scores: Mapping[str, Tensor], ratio: float, scope: str, normalize: str | None) -> None:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"Invalid ratio: {ratio!r}; it is a share of the entries, 0 <= ratio <= 1")
    if scope not in ("global", "layer"):
        raise ValueError(f"Invalid scope: {scope!r}; choose one of ('global', 'layer')")
    if normalize not in (None, "layer"):
        raise ValueError(f"Invalid normalize: {normalize!r}; choose one of (None, 'layer')")
    if not scores:
        raise ValueError("there are no scores; pass {name: tensor}")
    for name, values in scores.items():
        if not values.is_floating_point():
            raise ValueError(f"the scores of {name} are {values.dtype}; pass a floating dtype")
        if (values < 0).any():
            raise ValueError(f"{name} has scores below 0; pass magnitudes, such as scores.abs()")


def _layer(name: str, layers: str | Callable[[str], str]) -> str:
    if callable(layers):
        return layers(name)
    if layers not in ("tensor", "block"):
        raise ValueError(f"Invalid layers: {layers!r}; choose one of ('tensor', 'block') or pass a callable")
    return block(name) if layers == "block" else without_wrappers(name)


def _ranges(scores: Mapping[str, Tensor], layer_of: Mapping[str, int], count: int) -> Tensor:
    """Return float32 [layers, 2] on the CPU: the smallest and the largest score of each layer."""
    ranges = torch.tensor([[torch.inf, -torch.inf]]).repeat(count, 1)
    by_device: defaultdict[torch.device, list[str]] = defaultdict(list)
    for name, values in scores.items():
        by_device[values.device].append(name)
    for device, names in by_device.items():
        here = ranges.to(device, copy=True)
        ops.importance_(
            [scores[name] for name in names],
            [None] * len(names),
            here,
            torch.zeros(len(names), dtype=torch.int64, device=device),
            torch.zeros(len(names), 2, dtype=torch.float64),
            [layer_of[name] for name in names],
            True,
            None,
            None,
            "auto",
        )
        low, high = here.cpu().unbind(1)
        ranges = torch.stack([torch.minimum(ranges[:, 0], low), torch.maximum(ranges[:, 1], high)], 1)
    return ranges


def _thresholds(
    scores: Mapping[str, Tensor],
    layer_of: Mapping[str, int],
    budget_of: Mapping[str, int],
    ranges: Tensor | None,
    ranks: list[int],
    backend: str,
) -> Tensor:
    """Return the k-th largest score of each budget, float32 [budgets] on the CPU."""
    by_device: defaultdict[torch.device, list[str]] = defaultdict(list)
    for name, values in scores.items():
        by_device[values.device].append(name)

    def histogram(selection: Tensor, shift: int, bins: int) -> Tensor:
        counts = []
        for device, names in by_device.items():
            part = ops.score_histogram(
                [scores[name] for name in names],
                [layer_of[name] for name in names],
                None if ranges is None else ranges.to(device),
                [budget_of[name] for name in names],
                selection.to(device),
                shift,
                bins,
                None,
                backend,
            )
            counts.append(part.sum(0).cpu())
        return torch.stack(counts)

    return ops.find_threshold(histogram, ranks, exact=True, backend=backend if backend != "triton" else "auto")


def _score(piece: Tensor, layer_range: Tensor | None) -> Tensor:
    return score(piece, None if layer_range is None else layer_range.to(piece.device))


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    """Return views, or copies where strides need them, of the entries in row-major order."""
    return values.reshape(-1).split(_PIECE) if values.numel() else ()
