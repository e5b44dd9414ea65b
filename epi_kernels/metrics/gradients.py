"""How far the gradients of tasks point against each other."""

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from epi_kernels.distributed import is_dtensor
from epi_kernels.metrics.pairs import matrix
from epi_kernels.metrics.sums import total

# None is the gradient of a parameter that took no part
Gradient: TypeAlias = Tensor | Mapping[str, Tensor | None]


def gradient_conflict(a: Gradient, b: Gradient) -> float:
    """Return how far two gradients point against each other, in [0, 1]: 0 = not at all, 1 = opposite directions.

    ::

        TGC = max(0, -cos(a, b)),   cos(a, b) = a.b / (|a| |b|)                Eq. 2 and 15, Table 7

    Products and sums are float64, whatever the dtypes; that takes two float64 copies of one tensor at a time. Neither
    gradient's length matters, so clipping and loss scales do not. Of DTensors the measure is that of the whole
    gradients, and every rank must call.

    Args:
        a: gradient of the loss of one task, of any floating dtype; a mapping of names counts as one long vector:
            ``{name: param.grad for name, param in model.named_parameters()}``. A None in it counts as zeros.
        b: gradient of another task at the same parameters, with the names and shapes of `a`.

    Raises:
        ValueError: the gradients have different names or shapes; a tensor is not of a dense floating dtype, or has
            NaN or infinity; only one of the two is a DTensor; or a gradient is 0, which has no direction.

    >>> gradient_conflict(torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 4.0]))
    0.6
    """
    first, second = _named(a), _named(b)
    if first.keys() != second.keys():
        raise ValueError(f"only one of the gradients has {sorted(first.keys() ^ second.keys())}")
    for name in first:
        _check(name, first[name], second[name])
    lengths = []
    for which, gradient in (("first", first), ("second", second)):
        squares = {name: _dot(tensor, tensor) for name, tensor in gradient.items()}
        for name, square in squares.items():
            if not math.isfinite(square):
                raise ValueError(
                    f"the squares of the {which} gradient {name!r} add up to {square}; leave out batches with NaN or "
                    "infinite gradients"
                )
        if not any(squares.values()):
            raise ValueError(f"the {which} gradient is 0 in all its entries; run backward() before zero_grad()")
        lengths.append(math.sqrt(math.fsum(squares.values())))
    cosine = math.fsum(_dot(first[name], second[name]) for name in first) / (lengths[0] * lengths[1])
    return min(1.0, max(0.0, -cosine))


def conflict_matrix(gradients: Mapping[str, Gradient]) -> dict[str, dict[str, float]]:
    """Return the conflict of each pair of tasks: ``matrix[task][other]``, symmetric, with 0 on the diagonal.

    Args:
        gradients: task -> its gradient, as in `gradient_conflict`.

    Raises:
        ValueError: as `gradient_conflict`; the message names the two tasks.

    >>> conflict_matrix({"prose": torch.tensor([1.0, 0.0]), "code": torch.tensor([-3.0, 4.0])})
    {'prose': {'prose': 0.0, 'code': 0.6}, 'code': {'prose': 0.6, 'code': 0.0}}
    """
    return matrix(gradients, gradient_conflict)


def _named(gradient: Gradient) -> Mapping[str, Tensor | None]:
    return {"": gradient} if isinstance(gradient, Tensor) else gradient


def _check(name: str, left: Tensor | None, right: Tensor | None) -> None:
    for tensor in (left, right):
        if tensor is not None and (not tensor.is_floating_point() or tensor.is_sparse):
            kind = "sparse" if tensor.is_sparse else str(tensor.dtype)
            raise ValueError(
                f"gradient {name!r} is {kind}; pass a dense floating dtype, as to_dense() and torch.view_as_real() make"
            )
    if left is None or right is None:
        return
    if left.shape != right.shape:
        raise ValueError(
            f"gradient {name!r} has shape {tuple(left.shape)} in one and {tuple(right.shape)} in the other"
        )
    if is_dtensor(left) != is_dtensor(right):
        raise ValueError(f"gradient {name!r} is a DTensor in only one of the two; call full_tensor() on it")


def _dot(left: Tensor | None, right: Tensor | None) -> float:
    """Return the inner product of two tensors, over all ranks."""
    if left is None or right is None:
        return 0.0
    # to the left's device: a stored gradient may have been moved to the host
    return float(total(left.detach().to(torch.float64) * right.detach().to(left.device)))
