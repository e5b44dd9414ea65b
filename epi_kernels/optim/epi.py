"""EPIAdamW: AdamW with evolving parameter isolation (EPI, arXiv 2604.14010, Alg. 1)."""

from typing import Any, Literal

from torch import Tensor

# imported from its module: in torch.optim a program may have replaced torch's class by one of ours
from torch.optim.adamw import AdamW

from epi_kernels.engine.optimizer import FusedOptimizer
from epi_kernels.engine.storages import StorageArgument
from epi_kernels.engine.sweeping import Sweeping
from epi_kernels.isolation.evolving import Evolving
from epi_kernels.isolation.fused import FusedIsolating
from epi_kernels.isolation.layers import LayersArgument
from epi_kernels.isolation.settings import CLOCK, check_settings
from epi_kernels.optim.since import DeltaSince
from epi_kernels.rules import ADAMW


class EPIAdamW(DeltaSince, FusedIsolating, FusedOptimizer, AdamW):
    """AdamW that protects the most important entries, and chooses them again as training goes on.

    ::

        S <- beta S + (1 - beta) g^2                         every step; Eq. 5
        every mask_interval steps, before the update:
            I = (S - min S) / (max S - min S)                over each layer; Eq. 7-8
            protected = the top isolation_ratio of I         over all layers together; Eq. 9
        AdamW update of every entry that is not protected    Eq. 12-13

    Source: "Parameter Importance is Not Static", arXiv 2604.14010, Algorithm 1. A protected entry gets no update and
    no weight decay: it keeps its bits. Its moments advance, so that a released entry moves at full speed at once. An
    entry whose score is 0 is never protected; all entries tied at the threshold are protected.

    Args:
        params: as torch.optim.AdamW takes them; with ``model.named_parameters()`` layers can be transformer blocks,
            and messages give names.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach: as in torch.optim.AdamW. `foreach` is checked as
            torch does and changes nothing: `backend` decides what runs.
        fused: as in torch.optim.AdamW. With True, a torch.amp.GradScaler leaves unscaling to the step: the step divides
            the gradients by the scale, and changes nothing if one is infinite. The step does not write the gradients,
            and on a GPU the host reads nothing back.
        capturable: lets a CUDA graph capture `step`; clocks and the decision to refresh are on the device. A setting
            that is a tensor (lr, eps, weight_decay, betas) is read at every replay; a number is fixed in the graph.
        differentiable: autograd can go back through the step, which then uses torch's own operations. Only for float32,
            float64 and complex parameters, with ``importance="ema"`` and states in float32.
        isolation_ratio: p, share of the entries to protect, 0 <= p < 1. A group may have its own ratio: the groups
            with the same ratio then share one budget, and 0 exempts a group (no importance, no state for it).
        importance_beta: smoothing of S, 0 <= beta < 1; 0 uses only the last gradient. A group may have its own.
        mask_interval: H, steps from one refresh to the next. Every call of `step` counts, whichever parameters have a
            gradient; a step that a scaler skips does not count. None: masks change only when `refresh` is called.
        layers: which entries are normalised together. "block": a transformer block, or a module outside of blocks;
            "tensor": each parameter; a callable: name -> layer. "auto": "block" where names are known, else "tensor".
        normalize: "layer" scores entries as above; "none" takes the raw S as the score.
        scope: "global" has one budget over all layers; "layer" protects the top p of each layer.
        threshold: "exact" is exactly the k-th largest score; "histogram" reads the scores once instead of three
            times and may protect up to one histogram bin more (1/16 in the score; see `epi_kernels.ops`).
        importance: "ema" keeps S; "exp_avg_sq" uses AdamW's second moment as S (beta = betas[1]), without additional
            state or memory traffic. The lock is then the sign bit of ``exp_avg_sq``. `state_dict` has
            ``exp_avg_sq`` without locks, so that torch.optim.AdamW can load it, and the signed tensor as
            ``importance``.
        state_dtype: how moments, and by default the importance, are kept. None: float32, or as a framework has made
            them before the first step. torch.bfloat16: 2 bytes, always rounded stochastically. "8bit": 1 byte and a
            scale for each 64 entries of a row, for parameters of at least 2 dimensions, 4096 entries and rows of 64;
            bfloat16 for the others. A group may have its own, as of the three arguments below.
        importance_dtype: how the importance is kept; None: as `state_dtype` says. torch.float32 is accepted too.
        rounding: "nearest" or "stochastic", of bfloat16 and float16 parameters; with ``master_weight_bits=24``, how the
            last 8 bits of a weight are dropped. The noise depends on the group's ``rounding_seed`` (0 by default), the
            parameter's clock and name and the entry's place in the whole tensor, and on no generator of torch.
        master_weight_bits: 32 keeps the exact float32 weight behind a bfloat16 parameter, with a state of 16 bits; 24
            keeps 24 bits of it, with a state of 8. The parameter is the weight rounded to nearest.
        clip_grad_norm: the largest allowed norm of all gradients together, as in torch.nn.utils.clip_grad_norm_. The
            norm takes one pass over the gradients; the step applies the factor, for the importance too, and does not
            write the gradients. None: no clipping.
        process_group: the ranks over which the parameters are sharded. None: the default group if a parameter is a
            DTensor (FSDP2, HSDP, tensor parallel) or a slice that FSDP1 made, and no communication otherwise, also
            under DDP. With a group and plain parameters without names, each rank's parameters are its own. FSDP1 does
            not say which slices are replicas: with HYBRID_SHARD give the group that shards; NO_SHARD is refused.
        backend: "auto", or the name of a backend, which then runs or raises.

    State of a parameter: torch's ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` and ``importance``: S with
    the lock in its sign bit (see `epi_kernels.lock`). What is in blocks of 8 bits has other keys, such as
    ``exp_avg_codes`` and ``exp_avg_scales``; bits of a weight beyond those of its parameter are ``rest`` (in
    `state_dict`, 16 bits are two bytes in a last dimension, since process groups do not send int16). With
    ``importance="exp_avg_sq"``, ``importance`` and ``exp_avg_sq`` are one tensor, which carries the lock (in blocks of
    8 bits there is no such second name: the locks are in ``exp_avg_sq_codes``); where a loader or an offloader has made
    two tensors of that one, the next step takes ``importance`` for both. A group has the settings above, a digest of
    its layers, and ``isolation_clock``: how many steps the optimizer has taken, which decides when masks are refreshed.
    (Under ``capturable`` this clock runs on the device, and `state_dict` copies its value into the groups.) If a state
    of torch.optim.AdamW is loaded, which has no such clock, the clock starts at the largest ``step``.

    Raises:
        ValueError: an argument is out of its range; the message names it and its value.
        NotImplementedError: an argument or a parameter's kind is not in this version.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> optimizer = EPIAdamW(model.named_parameters(), lr=1e-3, isolation_ratio=0.1, mask_interval=1)
        >>> model(torch.randn(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> int(sum(optimizer.isolation_mask(p).sum() for p in model.parameters()))  # floor(0.1 * 144)
        14
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
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        isolation_ratio: float = 0.01,
        importance_beta: float = 0.99,
        mask_interval: int | None = 500,
        layers: LayersArgument = "auto",
        normalize: Literal["layer", "none"] = "layer",
        scope: Literal["global", "layer"] = "global",
        threshold: Literal["exact", "histogram"] = "exact",
        importance: Literal["ema", "exp_avg_sq"] = "ema",
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
            "importance": importance,
            "state_dtype": state_dtype,
            "importance_dtype": importance_dtype,
            "rounding": rounding,
            "master_weight_bits": master_weight_bits,
            "rounding_seed": 0,
        }
        check_settings(settings, ADAMW.importance_slot)
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
            planner=Sweeping(ADAMW, Evolving(layers, ADAMW)),
            settings={"clip_grad_norm": clip_grad_norm, **settings, CLOCK: 0},
            process_group=process_group,
            backend=backend,
        )
