"""The highest scores of a model as a mask: exactly k of them, ties by position, without sorting or copying them."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epi_kernels import contract, ops
from epi_kernels.delta.entries import by_name, summed
from epi_kernels.distributed import Ranks, Shard, agreement, group_of, is_dtensor, local, shard_key, shard_of, wrapped
from epi_kernels.engine.groups import without_wrappers
from epi_kernels.isolation.layers import block
from epi_kernels.ops.equations import score

# entries that are looked at together
_CHUNK = 1 << 20


@torch.no_grad()
def top_k(
    scores: Mapping[str, Tensor],
    ratio: float,
    *,
    scope: Literal["global", "layer"] = "global",
    normalize: Literal["layer"] | None = None,
    layers: Literal["block", "tensor"] | Callable[[str], str] = "tensor",
    process_group: Any = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Return a mask of the k highest scores: k = floor(ratio * d), over all d entries together, and exactly k.

    PIECE (arXiv 2511.15375), Alg. 1. Of equal scores at the threshold the first by position are taken: by the order of
    `scores`, then row-major. An exact count lets compact states have a fixed size. The k-th largest score is found by
    its bits (`epi_kernels.ops.find_threshold`), in three passes over the scores, without sorting or copying them.
    Memory is needed for the masks, for float32 copies of scores of another dtype, and for a copy of one tensor at a
    time that is not contiguous.

    Scores of a sharded model are DTensors, and so are the masks: the selection is that of one process. Every rank must
    call. (Where the threshold cuts through equal scores of a tensor, one bool for each of its entries is gathered.)

    Args:
        scores: {name: tensor, >= 0, of any floating dtype and on any device}. Compared as float32; NaN, infinity and
            subnormal scores count as 0.
        ratio: the share to select, 0 <= ratio <= 1.
        scope: "global", or "layer": floor(ratio * d) of every layer by itself.
        normalize: None compares the scores as they are; "layer" compares (s - min) / (max - min) of their layer, EPI
            Eq. 8.
        layers: what is a layer: "tensor", "block" (see `epi_kernels.isolation.layers.block`) or a callable: name ->
            layer.
        process_group: the ranks over which the scores are sharded; None is the default group if a score is a DTensor,
            and no communication otherwise.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        {name: bool tensor of the score's shape, on its device}, True = selected.

    Raises:
        ValueError: an argument is out of its range, there are no scores, or a score is below 0.

    Example:
        >>> top_k({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([3.0, 2.0])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    _check(scores, ratio, scope, normalize)
    # the operations take float32; scores that are float32 already are not copied
    single = {name: local(values.detach()).float() for name, values in scores.items()}
    group = group_of(list(scores.values()), process_group)
    ranks = None if group is None else Ranks(group)
    held = []
    for name, values in scores.items():
        layer = _layer(name, layers)
        key = shard_key(values, 0, partitioned=False)
        budget = (layer if scope == "layer" else "global", ratio)
        held.append(Shard(name, key, layer, budget, single[name].numel(), values.numel()))
    below = [name for name, values in single.items() if (values <= -contract.SMALLEST_NORMAL).any()]
    asked = [{"ratio": ratio, "scope": scope, "normalize": normalize, "names": list(scores)}]
    if ranks is not None:
        below = ranks.union(below)
    if below:
        raise ValueError(f"{below[0]} has scores below 0; pass magnitudes, such as scores.abs()")
    agreed = agreement([held], 0) if ranks is None else ranks.agree(held, asked)
    layer_of = {shard.name: agreed.layers.index(shard.layer) for shard in held}
    budget_of = {shard.name: agreed.budgets.index(shard.budget) for shard in held}
    counts = [contract.budget(ratio, eligible) for eligible in agreed.budget_eligible]

    def total(numbers: list[int]) -> list[int]:
        return numbers if ranks is None else ranks.sum(torch.tensor(numbers, dtype=torch.int64, device="cpu")).tolist()

    own = {name: values for name, values in single.items() if name in agreed.owned}
    ranges = _ranges(single, layer_of, len(agreed.layers), ranks, backend) if normalize else None
    # a backend that was named may run only on the device of the scores
    home = torch.device("cpu") if backend == "auto" else next(iter(single.values())).device
    thresholds = _thresholds(own, layer_of, budget_of, ranges, counts, ranks, backend, home)
    scored = {
        name: _Scored(values, thresholds[budget_of[name]], None if ranges is None else ranges[layer_of[name]])
        for name, values in single.items()
    }

    # all scores above the threshold are taken; of those equal to it, as many as are missing, by position
    above = [0] * len(counts)
    for name in own:
        above[budget_of[name]] += scored[name].above()
    left = [count - found for count, found in zip(counts, total(above), strict=True)]
    at = dict(zip(single, total([scored[name].at() if name in own else 0 for name in single]), strict=True))
    masks = {}
    for name, values in scores.items():
        take = min(at[name], left[budget_of[name]])
        left[budget_of[name]] -= take
        masks[name] = scored[name].mask(take, cut=0 < take < at[name], like=values)
    return masks


class _Scored:
    """This rank's shard of some scores, compared with the threshold of their budget."""

    def __init__(self, values: Tensor, threshold: Tensor, layer_range: Tensor | None) -> None:
        self._values = values
        self._threshold = threshold.to(values.device)
        self._range = None if layer_range is None else layer_range.to(values.device)

    def above(self) -> int:
        """Return how many scores are above the threshold."""
        return sum(int((found > self._threshold).sum()) for found in self._chunks())

    def at(self) -> int:
        """Return how many scores equal the threshold."""
        return sum(int((found == self._threshold).sum()) for found in self._chunks())

    def mask(self, take: int, *, cut: bool, like: Tensor) -> Tensor:
        """Return the mask of the scores above the threshold and, unless `take` is 0, of those that equal it.

        If `cut`, only the first `take` of the equal ones are selected, in row-major order of the whole tensor `like`.
        """
        at = self._flat(lambda found: found == self._threshold).view(self._values.shape)
        if cut:
            if is_dtensor(like):
                at = wrapped(at.to(torch.uint8), like).full_tensor().bool().contiguous()  # type: ignore[attr-defined]
            _keep_first(at.view(-1), take)
            at = local(shard_of(at, like))
        above = self._flat(lambda found: found > self._threshold).view(self._values.shape)
        return wrapped(above | at if take else above, like)

    def _flat(self, where: Callable[[Tensor], Tensor]) -> Tensor:
        parts = [where(found) for found in self._chunks()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=self._values.device)

    def _chunks(self) -> Iterator[Tensor]:
        """Yield the scores in row-major order: by Eq. 8 if there is a range, else as they are."""
        for chunk in self._values.reshape(-1).split(_CHUNK) if self._values.numel() else ():
            yield score(chunk, self._range)


def _keep_first(flags: Tensor, count: int) -> None:
    """Clear all flags of a 1-D tensor except the first `count` that are set; in place."""
    for chunk in flags.split(_CHUNK):
        found = int(chunk.sum())
        if found > count:
            # a chunk at a time: int64 sums over all flags would take eight times their memory
            chunk &= chunk.cumsum(0) <= count
        count -= min(found, count)


def freeze_unselected(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Let the parameters without a selected entry need no gradient, which saves memory and time in `backward()`.

    `SparseAdamW` does not move them, with a gradient or without. Call it before the optimizer is made. To train another
    task, first let all parameters need gradients again: ``model.requires_grad_()``.

    Args:
        model: ``requires_grad`` of its parameters is written: False where nothing is selected, else as it is.
        masks: {name: bool tensor}, as `top_k` returns them. A parameter without a mask has no selected entry. Of
            DTensors every rank must call.

    Returns:
        The names of the parameters that need no gradient now and did before.

    Raises:
        ValueError: the model has no parameter of a name; nothing has changed.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> freeze_unselected(model, {"weight": torch.tensor([[True, False]])})
        ['bias']
        >>> [name for name, param in model.named_parameters() if param.requires_grad]
        ['weight']
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    names = by_name(masks, params, "the model", "masks have")
    # a rank must keep a parameter of which another rank's shard has an entry
    anywhere = {name: bool(summed(local(mask).any().long(), mask)) for name, mask in masks.items()}
    kept = {id(params[names[name]]) for name, found in anywhere.items() if found}
    frozen = [name for name, param in model.named_parameters() if param.requires_grad and id(param) not in kept]
    for name in frozen:
        params[name].requires_grad_(False)
    return frozen


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


def _layer(name: str, layers: str | Callable[[str], str]) -> str:
    if callable(layers):
        return layers(name)
    if layers not in ("tensor", "block"):
        raise ValueError(f"Invalid layers: {layers!r}; choose one of ('tensor', 'block') or pass a callable")
    return block(name) if layers == "block" else without_wrappers(name)


def _ranges(
    scores: Mapping[str, Tensor], layer_of: Mapping[str, int], count: int, ranks: Ranks | None, backend: str
) -> Tensor:
    """Return float32 [layers, 2] on the CPU: the smallest and the largest score of each layer."""
    ranges = torch.tensor([[torch.inf, -torch.inf]], dtype=torch.float32, device="cpu").repeat(count, 1)
    for device, names in _by_device(scores):
        here = ranges.to(device, copy=True)
        ops.importance_(
            [scores[name] for name in names],
            [None] * len(names),
            here,
            torch.zeros(len(names), dtype=torch.int64, device=device),
            torch.zeros(len(names), 2, dtype=torch.float64, device="cpu"),
            [layer_of[name] for name in names],
            True,
            None,
            None,
            backend,
        )
        low, high = here.cpu().unbind(1)
        ranges = torch.stack([torch.minimum(ranges[:, 0], low), torch.maximum(ranges[:, 1], high)], 1)
    return ranges if ranks is None else ranks.ranges(ranges, clock=0)


def _thresholds(
    scores: Mapping[str, Tensor],
    layer_of: Mapping[str, int],
    budget_of: Mapping[str, int],
    ranges: Tensor | None,
    counts: list[int],
    ranks: Ranks | None,
    backend: str,
    home: torch.device,
) -> Tensor:
    """Return the k-th largest score of each budget, float32 [budgets] on the CPU; `home` is where digits are chosen."""

    def histogram(selection: Tensor, shift: int, bins: int) -> Tensor:
        found = [torch.zeros(len(counts), bins, dtype=torch.int64, device="cpu")]
        for device, names in _by_device(scores):
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
            found.append(part.sum(0).cpu())
        here = torch.stack(found).sum(0)
        return (here if ranks is None else ranks.sum(here))[None].to(home)

    return ops.find_threshold(histogram, counts, exact=True, device=home, backend=backend).cpu()


def _by_device(scores: Mapping[str, Tensor]) -> list[tuple[torch.device, list[str]]]:
    found: defaultdict[torch.device, list[str]] = defaultdict(list)
    for name, values in scores.items():
        found[values.device].append(name)
    return list(found.items())
