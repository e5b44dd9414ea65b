"""SparseAdamW: AdamW of trainable entries only, with state only for them (PIECE, arXiv 2511.15375)."""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim.adamw import AdamW

from epi_kernels.contract import FLOATING
from epi_kernels.delta.entries import Delta, summed
from epi_kernels.delta.since import entries_at
from epi_kernels.distributed import local
from epi_kernels.engine.gathering import Gathering
from epi_kernels.engine.groups import name_of, params_of
from epi_kernels.engine.optimizer import FusedOptimizer
from epi_kernels.isolation.selection import Selection, key_of
from epi_kernels.optim.since import check_names
from epi_kernels.rules import ADAMW


class SparseAdamW(FusedOptimizer, AdamW):
    """AdamW that moves only the trainable entries; time and memory grow with the number of trainable entries.

    ::

        theta <- AdamW's update where trainable, else theta               PIECE (arXiv 2511.15375) Alg. 1

    An entry that is not trainable keeps its bits: it gets no update and no weight decay, even if its gradient is NaN.
    The trainable entries move as under AdamW with all other gradients at 0, bit for bit. The moments are compact: 12
    bytes for each trainable entry, positions included. With `release_gradients` each gradient is gathered and freed
    once it is ready, so that all gradients never exist at the same time.

    Args:
        params: as torch.optim.AdamW takes them; ``model.named_parameters()`` if `trainable` has names.
        lr, betas, eps, weight_decay, maximize, foreach, fused: as in torch.optim.AdamW. `foreach` and `fused` are
            checked as torch does and change nothing.
        amsgrad, capturable, differentiable: not in this version.
        trainable: {name or Parameter: bool tensor of the parameter's shape}, True = moves, as
            `epi_kernels.select.top_k` makes it. Parameters without a mask do not move.
        state_dtype: torch.bfloat16, or None for float32; the moments of few entries are not kept in blocks of 8 bits.
        rounding, master_weight_bits: as in `EPIAdamW`; the rest of a weight is kept for trainable entries alone.
        process_group: the ranks over which the parameters are sharded; None is the default group if a parameter is a
            DTensor, and no communication otherwise. Given with plain parameters without names, as inside of
            ZeroRedundancyOptimizer, each rank's parameters are its own, and it skips masks of other ranks' parameters.
        backend: "auto", or the name of a backend, which then runs or raises.

    State of a parameter with k trainable entries: ``step``, ``exp_avg`` and ``exp_avg_sq`` [k], and ``indices`` [k],
    the positions in row-major order, int32 (int64 from 2^31 entries on); ``joined`` and ``departed`` as well once the
    selection has evolved, see `select`. A checkpoint includes its selection. A
    parameter without an entry in the checkpoint, because it required no gradient, keeps its selection and starts with
    fresh moments, as after ``state.clear()``. If a wrapper puts other objects into `param_groups`, state and selection
    follow by name, else by position; a DTensor gets its shard of them.

    The state of a DTensor covers this rank's shard, with the positions under ``trainable``. A checkpoint has that state
    in the parameter's shape, with the mask as ``trainable``, so that another number of ranks can load it: 9 bytes for
    each entry, allocated when the state is saved. Plain parameters save k values; torch.distributed.checkpoint loads in
    place, so k must be equal on both sides. To move between sharded and plain parameters, save with
    ``full_state_dict=True``. Ranks with replicas, as under DDP, must be given the same masks.

    Raises:
        ValueError: a name or Parameter is unknown, or its mask is not bool or has another shape; or, at the first step
            and on every rank that has shards, settings or masks of the ranks differ; or a wrapper
            has put other tensors into `param_groups` to which a selection cannot go, as DeepSpeed ZeRO does; or a
            parameter has another shape than its selection.
        NotImplementedError: an argument or a parameter's kind is not in this version.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SparseAdamW([weight], lr=0.1, trainable={weight: torch.tensor([True, False])})
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8990, 1.0000])
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
        trainable: Mapping[str | Tensor, Tensor],
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        master_weight_bits: Literal[24, 32] | None = None,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
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
            planner=Gathering(ADAMW, Selection(ADAMW)),
            settings={
                "state_dtype": state_dtype,
                "rounding": rounding,
                "master_weight_bits": master_weight_bits,
                "rounding_seed": 0,
            },
            process_group=process_group,
            backend=backend,
            dtypes=FLOATING,
            scales=False,
        )
        self.select(trainable)

    @property
    def _selection(self) -> Selection:
        return cast(Selection, self._method)

    @torch.no_grad()
    def select(self, trainable: Mapping[str | Tensor, Tensor], *, keep_state: bool = False) -> None:
        """Select other entries: for the next task of a sequence, or anew within a task.

        Args:
            trainable: as in the constructor.
            keep_state: False: another task begins, with fresh moments. True: the task goes on; entries that stay
                trainable keep their moments, others start as under a fresh optimizer, each with a number of steps of
                its own: 4 bytes more for an entry. `delta` has all entries that the task may have moved, also those
                that move no more: 4 bytes for each of them.

        A checkpoint of a selection that has evolved has the keys ``joined`` and ``departed``, too. Loaders of
        torch.distributed.checkpoint ask an optimizer for its keys: call ``select(mask, keep_state=True)`` before, with
        as many entries as were saved; a state that was loaded without them is refused.

        Raises:
            ValueError: as the constructor; the selection has then not changed.
        """
        if keep_state:
            self._selection.evolve(self, trainable)
        else:
            self._selection.select(self, trainable)

    def trainable_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` move: a new bool tensor of its shape, or of the shard of a DTensor.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        return self._selection.trainable(self, param)

    @torch.no_grad()
    def delta(self) -> Delta:
        """Return what this task may have changed: {name: (positions, values)} of the trainable entries, on the CPU.

        `epi_kernels.delta` applies these values to the model from the start of the task and gets the present model, bit
        for bit. The delta has the shapes of its parameters and a checksum of the values that its entries had before the
        first step, so that `epi_kernels.delta.apply` refuses another model. A state that was loaded does not say what
        these were: deltas after a resumption have no such checksum.

        If parameters are sharded, every rank must call `delta`, which gathers one parameter after the other.

        Raises:
            ValueError: the optimizer has no parameter names, by which a delta stores entries.
        """
        check_names(self.param_groups)
        self._selection.catch_up(self)
        found = Delta()
        # in the order of the groups, which is the same on all ranks
        for param in params_of(self.param_groups):
            before, unknown = summed(self._selection.before(self, param), param).tolist()
            entries = entries_at(param, self._selection.touched(self, param))
            if len(entries[0]):
                name = name_of(param, self.param_groups)
                found[name], found.shapes[name] = entries, tuple(param.shape)
                if not unknown:
                    found.before[name] = before
        return found

    def __repr__(self) -> str:
        """Return torch's text and the number of trainable entries."""
        params = params_of(self.param_groups)
        counts = [len(self.state.get(param, {}).get(key_of(param), ())) for param in params]
        total = sum(local(param).numel() for param in params)
        return f"{super().__repr__()}\nSelected: {sum(counts)} of {total} entries, in {sum(map(bool, counts))} tensors"
