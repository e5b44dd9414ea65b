"""EPIAdamW: AdamW with evolving parameter isolation (EPI, arXiv 2604.14010, Alg. 1)."""

from typing import Any, Literal, cast

from torch import Tensor

# not by way of torch.optim, where a program may have put one of our classes in the place of torch's
from torch.optim.adamw import AdamW

from epi_kernels.engine.optimizer import FusedOptimizer
from epi_kernels.engine.sweeping import Sweeping
from epi_kernels.isolation.evolving import Evolving
from epi_kernels.isolation.isolating import Isolating
from epi_kernels.isolation.layers import LayersArgument
from epi_kernels.isolation.settings import CLOCK, check_settings
from epi_kernels.rules import ADAMW


class EPIAdamW(Isolating, FusedOptimizer, AdamW):
    """AdamW that protects the most important entries, and chooses them again as training goes on.

    ::

        S <- beta S + (1 - beta) g^2                         every step; Eq. 5
        every mask_interval steps, before the update:
            I = (S - min S) / (max S - min S)                over each layer; Eq. 7-8
            protected = the top isolation_ratio of I         over all layers together; Eq. 9
        AdamW update of every entry that is not protected    Eq. 12-13

    Source: "Parameter Importance is Not Static", arXiv 2604.14010, Algorithm 1. A protected entry gets no update and
    no weight decay: it keeps its bits. Its moments advance, so that a released entry moves on at full speed. An entry
    whose score is 0 is never protected; ties at the threshold all are.

    Args:
        params: as torch.optim.AdamW takes them; ``model.named_parameters()`` lets layers be transformer blocks and
            messages speak of names.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach: as in torch.optim.AdamW. `foreach` is checked as
            torch does and changes nothing: `backend` decides what runs.
        fused: as there, too. With True a torch.amp.GradScaler leaves the gradients to the step, which divides by the
            scale and, where one is infinite, does nothing at all. It does not write the gradients, and on a GPU
            nothing is read back.
        capturable: lets a CUDA graph capture `step`; clocks and the decision to refresh are on the device. A number in
            a tensor (lr, eps, weight_decay, betas) is read at every replay, any other is a constant of the graph.
        differentiable: autograd goes back through the step, by torch's own arithmetic. For float32, float64 and
            complex parameters, with ``importance="ema"``.
        isolation_ratio: p, share of the entries to protect, 0 <= p < 1. A group may carry its own: each ratio is then
            a budget of its own over its own groups, and 0 exempts a group (no importance, no state for it).
        importance_beta: smoothing of S, 0 <= beta < 1; 0 takes the last gradient alone. A group may carry its own.
        mask_interval: H, steps from one choice to the next. Every call of `step` counts, whichever parameters have a
            gradient in it; a step that a scaler skips does not. None: only `refresh`.
        layers: what is normalised together. "block": the transformer block, and the module outside of blocks;
            "tensor": each parameter; a callable: name -> layer. "auto": "block" where names are known, else "tensor".
        normalize: "layer" as above; "none" ranks the raw S.
        scope: "global" has one budget over all layers; "layer" protects the top p of each.
        threshold: "exact" is the k-th largest score to the bit; "histogram" reads the scores once instead of three
            times and may protect up to one histogram bin more (1/16 in the score; see `epi_kernels.ops`).
        importance: "ema" keeps S; "exp_avg_sq" takes AdamW's second moment for it (beta = betas[1]), without any
            state or traffic of its own. The lock bit then rides in the sign of ``exp_avg_sq``. `state_dict` has
            ``exp_avg_sq`` without locks, so that torch.optim.AdamW can load it, and the signed tensor as
            ``importance``.
        clip_grad_norm: the largest norm of all gradients together, as of torch.nn.utils.clip_grad_norm_: one pass over
            them, and the factor is applied in the step, importance included, without writing the gradients. None: no
            clipping.
        process_group: the ranks that share the parameters out. None is the default group where a parameter is a DTensor
            (FSDP2, HSDP, tensor parallel) or a slice of FSDP1's, and no communication otherwise, DDP included. Given
            with plain parameters that have no names, each rank's parameters are its own. Slices of FSDP1 do not say
            which are replicas: with HYBRID_SHARD give the group that shards; NO_SHARD is refused.
        backend: "auto", or the name of one, which then runs or raises.

    State of a parameter: torch's ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` and ``importance``: S in
    float32 with the lock in its sign bit (see `epi_kernels.lock`). With ``importance="exp_avg_sq"``, ``importance`` and
    ``exp_avg_sq`` are one tensor, which carries the lock; where a loader or an offloader has made two tensors of that
    one, the next step takes ``importance`` for both. A group has the settings above, a digest of its layers, and
    ``isolation_clock``: how many steps the optimizer has taken, by which it refreshes. (Under ``capturable`` the clock
    runs on the device, and `state_dict` brings its value into the groups.) A state of torch.optim.AdamW, which has no
    such clock, starts it at the largest ``step``.

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

    @property
    def _isolation(self) -> Evolving:
        return cast(Evolving, self._method)

    def bind_deepspeed(self, engine: Any) -> None:
        """Say which layer every segment of DeepSpeed's flat partitions belongs to: ZeRO-1, 2 and 3.

        Call it after ``deepspeed.initialize(..., optimizer=optimizer)``, on every rank. A refresh that is due then
        happens at the start of the next step, from the importance that all groups have advanced. Unbound, each flat
        partition is one layer, has a budget of its own, and a warning says so.

        Args:
            engine: as deepspeed.initialize returns it.

        Raises:
            TypeError: `engine` is not an engine.
            ValueError: it steps another optimizer, or its segments do not lie in the partitions that this one has.
        """
        self._isolation.bind_deepspeed(self, engine)
