"""The advance of importances in a step whose update is not ours."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from epi_kernels import ops
from epi_kernels.engine.plan import form_of
from epi_kernels.storage.noise import Place


class Rounding(NamedTuple):
    """What importances that are not all in float32 need, so that they can be rounded stochastically."""

    scales: Sequence[Tensor | None]  # of each importance in blocks of 8 bits; written
    places: Callable[[], Sequence[Place]]  # returns where the entries of each importance lie in the whole tensor
    depends: object  # what the places depend on, compared by ==
    clock: float  # on which the noise depends


class Advance:
    """EPI Eq. 5, ``S <- beta S + (1 - beta) g^2``, prepared once on each device and anew where anything has changed."""

    def __init__(self) -> None:
        self._prepared: dict[torch.device, tuple[list[object], Any]] = {}  # what it was made from, and the object

    def step_(
        self,
        signed: list[Tensor],
        grads: list[Tensor],
        betas: Sequence[float],
        nonfinite: Tensor,
        backend: str,
        rounding: Rounding | None = None,
    ) -> None:
        """Advance the importances of some parameters on one device.

        Args:
            signed: the signed S of each parameter: float32, or with `rounding` also bfloat16, or codes of 8 bits;
                written, except the sign bits.
            grads: real gradients of the same shapes; read.
            betas: the smoothing of each S.
            nonfinite: int64, one value for each parameter; the number of entries whose g^2 was NaN or infinite is
                added.
            backend: "auto" or the name of one.
            rounding: None: all are float32.

        Raises:
            ValueError, TypeError, RuntimeError: as `epi_kernels.ops.importance_`.
        """
        device = nonfinite.device
        seen = [list(betas), list(map(Tensor.data_ptr, signed)), *form_of(signed), *form_of(grads), backend]
        scales: Sequence[Tensor | None] = ()
        steps = None
        if rounding is not None:
            scales = rounding.scales
            steps = torch.full((len(signed),), float(rounding.clock), dtype=torch.float32, device=device)
            seen += [rounding.depends, [None if one is None else one.data_ptr() for one in scales]]
        if device not in self._prepared or self._prepared[device][0] != seen:
            pairs = torch.tensor([(beta, 1.0 - beta) for beta in betas], dtype=torch.float64, device="cpu")
            layers = [0] * len(signed)
            places = () if rounding is None else rounding.places()
            made = ops.prepared_importance(signed, grads, pairs, layers, 1, True, device, backend, scales, places)
            self._prepared[device] = seen, made
        # a range is needed only at a refresh
        self._prepared[device][1].advance_(signed, grads, None, nonfinite, None, None, scales, steps)
        increment_version([*signed, *(one for one in scales if one is not None)])
