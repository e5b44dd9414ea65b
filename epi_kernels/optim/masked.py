"""MaskedAdamW: AdamW with a fixed set of entries that never move (static isolation)."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim.adamw import AdamW

from epi_kernels.engine.optimizer import FusedOptimizer
from epi_kernels.engine.storages import StorageArgument
from epi_kernels.engine.sweeping import Sweeping
from epi_kernels.isolation.fixed import FixedMask
from epi_kernels.optim.since import DeltaSince
from epi_kernels.rules import ADAMW


class MaskedAdamW(DeltaSince, FusedOptimizer, AdamW):
    """AdamW that never moves the entries of a fixed mask.

    ::

        theta <- theta where frozen, else the AdamW update          EPI (arXiv 2604.14010) Eq. 12-13 with a constant m

    This is the static isolation of CPI-FT and of EPI's static baselines (Table 2). A frozen entry gets no update and
    no weight decay: it keeps its bits, under NaN gradients too. Its moments advance.

    Args:
        params: as torch.optim.AdamW takes them; ``model.named_parameters()`` if `frozen` has names.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, fused, capturable, differentiable: as in
            torch.optim.AdamW; see `EPIAdamW`.
        frozen: {name or Parameter: bool tensor of the parameter's shape}, True = never moves. All entries of
            parameters without a mask move.
        state_dtype, rounding, master_weight_bits, clip_grad_norm: as in `EPIAdamW`.
        process_group: the ranks over which the parameters are sharded; None is the default group if a parameter is a
            DTensor, and no communication otherwise. Given with plain parameters without names, as inside of
            ZeroRedundancyOptimizer, each rank's parameters are its own, and it skips masks of other ranks' parameters.
        backend: "auto", or the name of a backend, which then runs or raises.

    State of a parameter with a mask: torch's keys, and ``frozen``, int8, -1 where frozen. The mask outlives the state
    (``state.clear()``, a checkpoint without a mask); a mask in a checkpoint replaces it. If a wrapper puts other
    objects into `param_groups`, a mask follows by name, else by position; a DTensor gets its shard of the mask.

    Raises:
        ValueError: a name or Parameter is unknown, or its mask is not bool or has another shape; or, at the first step
            and on every rank that has shards, settings or masks of the ranks differ; or a wrapper has put other tensors
            into `param_groups` to which a mask cannot go, as DeepSpeed ZeRO does.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = MaskedAdamW([weight], lr=0.1, frozen={weight: torch.tensor([True, False])})
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> weight.data
        tensor([1.0000, 0.8990])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        frozen: Mapping[str | Tensor, Tensor],
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StorageArgument = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        master_weight_bits: Literal[24, 32] | None = None,
        process_group: Any = None,
        clip_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        mask = FixedMask()
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
            },
            planner=Sweeping(ADAMW, mask),
            settings={
                "clip_grad_norm": clip_grad_norm,
                "state_dtype": state_dtype,
                "rounding": rounding,
                "master_weight_bits": master_weight_bits,
                "rounding_seed": 0,
            },
            process_group=process_group,
            backend=backend,
        )
        mask.freeze(self, frozen)

    def isolation_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` are frozen: a new bool tensor of its shape, or of the shard of a DTensor.

        Raises:
            ValueError: `param` is not a parameter of this optimizer, or its mask cannot follow to it.
        """
        return self._method.mask(self, param)
