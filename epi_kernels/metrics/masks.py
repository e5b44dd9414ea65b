"""How masks differ: from refresh to refresh, from task to task, and from place to place in a model."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from epi_kernels.engine.groups import without_wrappers
from epi_kernels.isolation.layers import Grouping, LayersArgument, block
from epi_kernels.metrics.pairs import matrix
from epi_kernels.metrics.sums import total

Mask: TypeAlias = Tensor | Mapping[str, Tensor]


def mask_jaccard(a: Mask, b: Mask) -> float:
    """Return the overlap of two protected sets, in [0, 1]: 1 = the same entries, 0 = none in common.

    ::

        J = |a and b| / |a or b|                             Tables 11 and 13; two empty sets: 1

    Args:
        a: mask, True = protected.
        b: mask with the names and shapes of `a`.

    Raises:
        ValueError: the masks have different names or shapes, or a tensor is not bool.

    >>> mask_jaccard(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    0.5
    """
    either, both = _counts(a, b)
    return both / either if either else 1.0


def mask_hamming(a: Mask, b: Mask) -> int:
    """Return in how many entries two masks differ: the temporal drift between two refreshes.

    ::

        d = sum_j 1(a_j != b_j)                              Eq. 4

    Args:
        a: mask, True = protected.
        b: mask with the names and shapes of `a`.

    Raises:
        ValueError: the masks have different names or shapes, or a tensor is not bool.

    >>> mask_hamming(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    2
    """
    either, both = _counts(a, b)
    return either - both


def flip_rate(before: Mask, after: Mask) -> float:
    """Return the share of the protected entries that changed between two refreshes, in [0, 1].

    ::

        r = |before xor after| / (|before| + |after|)        Table 12; two empty sets: 0

    The paper gives no denominator; this one makes 0 = the same set and 1 = none in common, whatever the sizes. For
    the rate of one layer, pass only the masks of its parameters.

    Args:
        before: mask of the earlier refresh, True = protected.
        after: mask of the later refresh, with the names and shapes of `before`.

    Raises:
        ValueError: the masks have different names or shapes, or a tensor is not bool.

    >>> flip_rate(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    0.5
    """
    either, both = _counts(before, after)
    return (either - both) / (either + both) if either else 0.0


def flip_rates(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], layers: LayersArgument = "block"
) -> dict[str, float]:
    """Return the flip rate of each layer, in [0, 1]: where in a model protection moves.

    Args:
        before: mask of the earlier refresh: name of a parameter -> bool tensor, True = protected.
        after: mask of the later refresh, with the names and shapes of `before`.
        layers: what is a layer, as in EPIAdamW: "block", "tensor", or a callable name -> layer, which can also make the
            layer groups of Table 12.

    Returns:
        {layer: `flip_rate` of its parameters}, in the order of `before`.

    Raises:
        ValueError: the masks have different names or shapes, a tensor is not bool, or `layers` is none of these.

    >>> before = {"blocks.0.weight": torch.tensor([True, False]), "blocks.1.weight": torch.tensor([True, False])}
    >>> after = {"blocks.0.weight": torch.tensor([True, False]), "blocks.1.weight": torch.tensor([False, True])}
    >>> flip_rates(before, after)
    {'blocks.0': 0.0, 'blocks.1': 1.0}
    """
    grouping = Grouping(layers)
    grouping.resolve(named=True)
    _check_alike(before, after)
    members: dict[str, list[str]] = {}
    for name in before:
        members.setdefault(grouping.layer(name), []).append(name)
    return {
        layer: flip_rate({name: before[name] for name in names}, {name: after[name] for name in names})
        for layer, names in members.items()
    }


def overlap_matrix(masks: Mapping[str, Mask]) -> dict[str, dict[str, float]]:
    """Return the overlap of each pair of tasks: ``matrix[task][other]``, symmetric, with 1 on the diagonal.

    ::

        J = |a and b| / |a or b|                             Table 13; PIECE Fig. 5, which gives no denominator

    Args:
        masks: task -> the mask of what matters to it; all have the same names and shapes.

    Raises:
        ValueError: as `mask_jaccard`; the message names the two tasks.

    >>> overlap_matrix({"prose": torch.tensor([True, True]), "code": torch.tensor([True, False])})
    {'prose': {'prose': 1.0, 'code': 0.5}, 'code': {'prose': 0.5, 'code': 1.0}}
    """
    return matrix(masks, mask_jaccard)


class Place(NamedTuple):
    """One row of `placement`: how much of one parameter a mask has."""

    layer: str  # by `epi_kernels.isolation.layers.block`
    kind: str  # what follows the number of the block in the name; of a parameter in no block, its whole name
    entries: int  # of the parameter
    selected: int  # of those, how many are True in the mask
    share_of_entries: float  # selected / entries, in [0, 1]; 0 of an empty parameter
    share_of_mask: float  # selected / all that are True in the whole mask, in [0, 1]; 0 of an empty mask


def placement(mask: Mapping[str, Tensor]) -> list[Place]:
    """Return where in a model a mask lies, by layer and by kind of module: a table with a row for each parameter.

    PIECE Fig. 3. The two shares differ in what a large module can do: `share_of_mask` is large where many selected
    entries are, and `share_of_entries` where they are dense. The whole mask's `share_of_mask` add up to 1.

    Args:
        mask: name of a parameter -> bool tensor, True = protected or selected; wrappers in a name do not count.

    Returns:
        Rows in the order of `mask`; ``pandas.DataFrame(rows)`` has the same columns.

    Raises:
        ValueError: a tensor is not bool.

    >>> mask = {"layers.3.mlp.weight": torch.tensor([True, True, True, False]), "head.weight": torch.tensor([True])}
    >>> for place in placement(mask):
    ...     print(*place)
    layers.3 mlp.weight 4 3 0.75 0.75
    head head.weight 1 1 1.0 0.25
    """
    for name, tensor in mask.items():
        _check_bool(name, tensor)
    selected = {name: int(total(tensor)) for name, tensor in mask.items()}
    size = sum(selected.values())
    rows = []
    for name, tensor in mask.items():
        layer, entries, count = block(name), tensor.numel(), selected[name]
        bare = without_wrappers(name)
        # a parameter can be the block itself, as in a ParameterList
        kind = bare[len(layer) + 1 :] if is_block(layer) and bare != layer else bare
        rows.append(
            Place(layer, kind, entries, count, count / entries if entries else 0.0, count / size if size else 0.0)
        )
    return rows


def is_block(layer: str) -> bool:
    """Return whether a layer, as `epi_kernels.isolation.layers.block` names it, is a block and no other module.

    >>> is_block("model.layers.3"), is_block("model.embed_tokens")
    (True, False)
    """
    return layer.rpartition(".")[2].isdecimal()


def _counts(a: Mask, b: Mask) -> tuple[int, int]:
    """Return the sizes of the union and of the intersection."""
    first, second = _named(a), _named(b)
    _check_alike(first, second)
    either = both = 0
    for name, left in first.items():
        either += int(total(left | second[name]))
        both += int(total(left & second[name]))
    return either, both


def _named(mask: Mask) -> Mapping[str, Tensor]:
    return {"": mask} if isinstance(mask, Tensor) else mask


def _check_alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    if first.keys() != second.keys():
        raise ValueError(f"only one of the masks has {sorted(first.keys() ^ second.keys())}")
    for name, left in first.items():
        right = second[name]
        _check_bool(name, left)
        _check_bool(name, right)
        if left.shape != right.shape:
            raise ValueError(
                f"mask {name!r} has shape {tuple(left.shape)} in one and {tuple(right.shape)} in the other"
            )


def _check_bool(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.bool:
        raise ValueError(f"mask {name!r} is {tensor.dtype}; masks are torch.bool, True = protected")
