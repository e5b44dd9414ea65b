"""The first mask of an optimizer with evolving isolation, kept to tell how much of it is still protected."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from epi_kernels.distributed import is_slice, shard_of, wrapped
from epi_kernels.engine.groups import name_of
from epi_kernels.isolation.isolating import Isolating
from epi_kernels.metrics import mask_jaccard
from epi_kernels.metrics.sums import total


class FirstMask:
    """The first mask that an optimizer chose, and its overlap with the present one.

    ::

        J = |first and now| / |first or now|                 arXiv 2604.14010, Table 11

    `EPIAdamW.telemetry` compares each mask with the one before it, by counts alone. A comparison with the first mask
    needs that mask: one byte for each entry that competes, which this object holds.

    Args:
        optimizer: one with evolving isolation, such as `EPIAdamW` or `IsolatedOptimizer`.

    Attributes:
        masks: the parameter's name -> bool tensor of its shape, True = protected in the first mask; a DTensor for a
            DTensor. Empty until `overlap` has found protected entries.

    Example:
        >>> from epi_kernels import EPIAdamW
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = EPIAdamW([("weight", weight)], mask_interval=1, isolation_ratio=0.5, importance_beta=0.0)
        >>> first, overlaps = FirstMask(optimizer), []
        >>> for grad in ([0.0, 1.0, 2.0, 3.0], [0.0, 3.0, 2.0, 1.0], [3.0, 2.0, 1.0, 0.0]):
        ...     weight.grad = torch.tensor(grad)
        ...     optimizer.step()
        ...     overlaps.append(first.overlap())
        >>> [round(overlap, 2) for overlap in overlaps]
        [1.0, 0.33, 0.0]
    """

    def __init__(self, optimizer: Isolating) -> None:
        if not isinstance(optimizer, Isolating):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}, whose masks do not evolve; pass an EPIAdamW, an EPILion "
                "or an IsolatedOptimizer"
            )
        self._optimizer = optimizer
        self.masks: dict[str, Tensor] = {}

    def overlap(self) -> float | None:
        """Return the overlap of the first mask with the present one, in [0, 1]; None if nothing is protected so far.

        Call it after every refresh: the mask at the first call that finds protected entries is the first one. Where
        parameters are sharded, every rank calls it, and all get the same number. It waits for the device.

        Raises:
            NotImplementedError: FSDP1 has cut the parameters into slices, which do not say which are replicas.
            ValueError: a parameter has another shape than its first mask.
        """
        now = dict(self._present())
        if not self.masks and any(int(total(mask)) for mask in now.values()):
            self.masks = now
        if not self.masks:
            return None
        for name, first in self.masks.items():
            if name in now and first.shape != now[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(now[name].shape)} now and {tuple(first.shape)} in the first mask; delete "
                    "it from masks if it was replaced"
                )
        # of a parameter that has come or gone since, nothing is protected in the other mask
        none = {name: torch.zeros_like(mask) for name, mask in {**self.masks, **now}.items()}
        return mask_jaccard({**none, **self.masks}, {**none, **now})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the first mask by names, for torch.save or torch.distributed.checkpoint; {}: there is none yet."""
        return dict(self.masks)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take a first mask that `state_dict` returned; a whole mask is taken for a DTensor, each rank its shard.

        Raises:
            ValueError: a mask is of no parameter, or has another shape, dtype or placement; nothing has changed.
        """
        present, masks = dict(self._present()), {}
        for name, mask in state_dict.items():
            like = present.get(name)
            if like is None:
                raise ValueError(f"the first mask has {name}, which is no parameter that the optimizer protects")
            if mask.dtype != torch.bool or mask.shape != like.shape:
                raise ValueError(
                    f"the first mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}; the parameter needs "
                    f"torch.bool of shape {tuple(like.shape)}"
                )
            masks[name] = shard_of(mask, like)
        self.masks = masks

    def _present(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and mask of every parameter that can be protected."""
        groups = self._optimizer.param_groups  # type: ignore[attr-defined]
        for group in groups:
            for param in group["params"] if group["isolation_ratio"] > 0 else ():
                name = name_of(param, groups)
                if is_slice(param):
                    raise NotImplementedError(
                        f"{name} is a slice that FSDP1 made: the first mask is kept for whole tensors and DTensors "
                        "(FSDP2, fully_shard)"
                    )
                yield name, wrapped(self._optimizer.isolation_mask(param), param)
