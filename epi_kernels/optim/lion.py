"""EPILion: Lion with evolving parameter isolation (EPI, arXiv 2604.14010; Lion, arXiv 2302.06675)."""

from typing import Any, Literal

from torch import Tensor

from epi_kernels.engine.optimizer import FusedOptimizer
from epi_kernels.engine.storages import StorageArgument
from epi_kernels.engine.sweeping import Sweeping
from epi_kernels.isolation.evolving import Evolving
from epi_kernels.isolation.fused import FusedIsolating
from epi_kernels.isolation.layers import LayersArgument
from epi_kernels.isolation.settings import CLOCK, check_settings
from epi_kernels.optim.since import DeltaSince
from epi_kernels.rules import LION


class EPILion(DeltaSince, FusedIsolating, FusedOptimizer):
    """Lion that protects the most important entries, and chooses them again as training goes on.

    ::

        S <- beta S + (1 - beta) g^2                         every step; EPI Eq. 5
        every mask_interval steps, before the update: the top isolation_ratio of the scores are protected
        c = beta1 m + (1 - beta1) g                          Lion, Alg. 2, for every entry that is not protected
        theta <- (1 - lr lambda) theta - lr sign(c)
        m <- beta2 m + (1 - beta2) g                         every entry

    Sources: "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Algorithm 2, and "Parameter Importance
    is Not Static", arXiv 2604.14010, Algorithm 1. For the same gradients the masks are those of `EPIAdamW`. A
    protected entry gets no update and no weight decay: it keeps its bits. sign(0) is 0, and sign(NaN) is NaN.

    Args:
        params: as torch.optim.AdamW takes them; with ``model.named_parameters()`` layers can be transformer blocks,
            and messages give names.
        lr: step size; a third to a tenth of AdamW's is usual.
        betas: (beta1, beta2) above.
        weight_decay: lambda, decoupled; three to ten times AdamW's is usual.
        maximize, foreach, capturable, fused: as in `EPIAdamW`.
        isolation_ratio, importance_beta, mask_interval, layers, normalize, scope, threshold, state_dtype,
            importance_dtype, rounding, master_weight_bits, process_group, clip_grad_norm, backend: as in `EPIAdamW`.

    State of a parameter: ``step``, ``exp_avg`` (m) and ``importance``: S with the lock in its sign bit (see
    `epi_kernels.lock`); with other storages, the keys that `EPIAdamW` has.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
        NotImplementedError: a parameter's kind is not in this version.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = EPILion([("layers.0.weight", weight)], lr=0.1, isolation_ratio=0.5, mask_interval=1)
        >>> weight.grad = torch.tensor([2.0, -1.0])
        >>> optimizer.step()  # the larger gradient is the more important one
        >>> weight.data
        tensor([1.0000, 1.1000])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        isolation_ratio: float = 0.01,
        importance_beta: float = 0.99,
        mask_interval: int | None = 500,
        layers: LayersArgument = "auto",
        normalize: Literal["layer", "none"] = "layer",
        scope: Literal["global", "layer"] = "global",
        threshold: Literal["exact", "histogram"] = "exact",
        state_dtype: StorageArgument = None,
        importance_dtype: StorageArgument = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        master_weight_bits: Literal[24, 32] | None = None,
        process_group: Any = None,
        clip_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        settings: dict[str, Any] = {
            "isolation_ratio": isolation_ratio,
            "importance_beta": importance_beta,
            "mask_interval": mask_interval,
            "layers": layers,
            "normalize": normalize,
            "scope": scope,
            "threshold": threshold,
            "importance": "ema",
            "state_dtype": state_dtype,
            "importance_dtype": importance_dtype,
            "rounding": rounding,
            "master_weight_bits": master_weight_bits,
            "rounding_seed": 0,
        }
        check_settings(settings, LION.importance_slot)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
        }
        super().__init__(
            params,
            {"defaults": defaults},
            planner=Sweeping(LION, Evolving(layers, LION)),
            settings={"clip_grad_norm": clip_grad_norm, **settings, CLOCK: 0},
            process_group=process_group,
            backend=backend,
        )
