"""SparseAdamW: AdamW of selected entries alone, with state for them alone (PIECE, arXiv 2511.15375)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from epi_kernels.contract import arithmetic_dtype
from epi_kernels.distributed import is_dtensor, local, shard_of, wrapped
from epi_kernels.notices import warn
from epi_kernels.ops import Gather, Tensors
from epi_kernels.ops.flat import put_
from epi_kernels.optim.checkpoint import pairs_of, placed_alike, taken
from epi_kernels.optim.groups import digest_of, masks_of, position_of
from epi_kernels.optim.places import Following, Place, Places, check_shape
from epi_kernels.optim.prepared import Bundle, Prepared, Present
from epi_kernels.optim.refusals import require_default
from epi_kernels.rules import ADAMW

# positions fit int32 below this
_NARROW = 1 << 31

# flags of AdamW that this version does not have for compact states
_REFUSED = ("amsgrad", "capturable", "differentiable")

_WAY_OUT = "If you replaced or resized the parameter, select() again, with masks in the new shapes"


@dataclass(frozen=True, slots=True)
class _Selection:
    """What is trainable of a parameter: positions in what this rank holds, and the shape of the whole parameter.

    Of a DTensor there is a number that is equal on ranks of equal masks.
    """

    positions: Tensor
    shape: torch.Size
    digest: int | None = None


@dataclass(slots=True)
class _Bundle(Bundle):
    gather: Gather = field(init=False)

    def indices(self, now: Present) -> list[Tensor]:
        """Return the positions of the selected entries."""
        # of a DTensor the positions have another key
        keys = [key for key in ("indices", "trainable") if key in now.state]
        return [next(filter(_is_there, each)) for each in zip(*(self.state(now, key) for key in keys), strict=True)]

    def tensors(self, now: Present) -> Tensors:
        """Return the tensors that `gather_` takes."""
        slots = {key: self.state(now, key) for key in ("exp_avg", "exp_avg_sq")}
        return Tensors(self.params(now), self.grads(now), slots)


class SparseAdamW(Following):
    """AdamW that moves the selected entries and no others; time and memory go with the entries selected.

    ::

        theta <- AdamW's update where selected, else theta                PIECE (arXiv 2511.15375) Alg. 1

    An entry that is not selected keeps its bits: it gets no update and no weight decay, whatever its gradient, NaN
    included. The selected ones move as under AdamW with the other gradients at 0, bit for bit. The moments are
    compact: 12 bytes for each selected entry, positions included. With `release_gradients` a gradient is gathered and
    freed as it is ready, and at no time are there all of them.

    Args:
        params: as torch.optim.AdamW takes them; ``model.named_parameters()`` for masks by names.
        lr, betas, eps, weight_decay, maximize, foreach, fused: as in torch.optim.AdamW. `foreach` and `fused` are
            checked as torch does and change nothing.
        amsgrad, capturable, differentiable: not in this version.
        trainable: {name or Parameter: bool tensor of the parameter's shape}, True = moves, as
            `epi_kernels.select.top_k` makes it. Parameters that it does not name do not move.
        process_group: the ranks that share the parameters out; None is the default group where a parameter is a
            DTensor, and no communication otherwise. Given with plain parameters that have no names, as inside of
            ZeroRedundancyOptimizer, each rank's parameters are its own, and masks of others are left to other ranks.
        backend: "auto", or the name of one, which then runs or raises.

    State of a parameter with k selected entries: ``step``, ``exp_avg`` and ``exp_avg_sq`` [k], and ``indices`` [k], the
    positions in row-major order, int32 (int64 from 2^31 entries on). A checkpoint brings its selection along; what it
    has no entry for, because it required no gradient, keeps its selection and starts with fresh moments, as after
    ``state.clear()``. Where a wrapper puts other objects into `param_groups`, state and selection follow by name, else
    by position, to the shard where that is a DTensor.

    Of a DTensor the state is that of the shard, with the positions under ``trainable``, and a checkpoint has it in the
    parameter's shape, with the mask as ``trainable``, so that it loads on another number of ranks: 9 bytes for each
    entry, made when it is saved. What is plain has k values there, and torch.distributed.checkpoint, which loads into
    what is there, loads it where as many entries are selected; between sharded and plain, save with
    ``full_state_dict=True``. Ranks that have a replica each, as under DDP, must be given the same masks.

    Raises:
        ValueError: a name or Parameter is unknown, or its mask is not bool or has another shape; or, at the first step
            and on every rank that holds a part of the parameters, settings or masks of the ranks differ; or a wrapper
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

    _SHARDED = True
    _COMPLETE = True
    _STATE = ("exp_avg", "exp_avg_sq", "indices", "trainable")

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
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        self._process_group = process_group
        self._places = Places()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            backend=backend,
            settings={},
        )
        self.select(trainable)

    # Selection -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, trainable: Mapping[str | Tensor, Tensor]) -> None:
        """Start over with another selection and fresh moments: the next task of a sequence.

        Args:
            trainable: as in the constructor.

        Raises:
            ValueError: as the constructor; the selection is then as it was.
        """
        parted = self._process_group is not None
        chosen = masks_of(trainable, self.param_groups, "trainable", partitioned=parted)
        shards = {param: local(shard_of(mask.to(param.device), param)) for param, mask in chosen.items()}
        self.state.clear()
        self._forget()
        self._places.look(self.param_groups)  # with parameters that may be others by now
        for param in (param for group in self.param_groups for param in group["params"]):
            self._places.put(param, None)
        for param, mask in shards.items():
            positions = _narrow(mask.reshape(-1).nonzero()[:, 0], local(param))
            digest = digest_of(chosen[param]) if is_dtensor(param) else None
            self._places.put(param, _Selection(positions, param.shape, digest))
        self._complete()

    def _complete(self) -> None:
        """Give every parameter a state: that of its selection, of nothing where nothing is selected.

        torch.distributed.checkpoint loads into the states that are there, and would leave out the others of a file.
        """
        for group in self.param_groups:
            for param in group["params"]:
                self._ensure_state(param, group)

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Start a state that was cleared over; of one that is there the selection is what counts."""
        selection: _Selection | None = self._places.get(param)
        state = self.state.get(param, {})
        positions = state.get(_key(param), selection and selection.positions)
        if not {"step", "exp_avg", "exp_avg_sq", _key(param)} <= state.keys():
            self._start(param, group, positions)
        elif positions is not (selection and selection.positions) and (selection or positions.numel()):
            self._places.put(param, _Selection(positions, selection.shape if selection else param.shape))

    def _start(self, param: Tensor, group: dict[str, Any], positions: Tensor | None) -> None:
        """Give a parameter a fresh state of entries at these positions of what this rank holds, in row-major order."""
        if positions is None:
            positions = _narrow(torch.zeros(0, dtype=torch.int64, device=param.device), local(param))
        dtype, k = arithmetic_dtype(param.dtype), len(positions)
        with torch.inference_mode(False):  # the state may be written outside of it
            moments = {key: torch.zeros(k, dtype=dtype, device=param.device) for key in ("exp_avg", "exp_avg_sq")}
        clock = self._clock(0.0, param, group)
        self.state[param] = {"step": clock, **moments, _key(param): positions.to(param.device)}

    def _positions(self, param: Tensor) -> Tensor:
        """Return the positions of what is selected, in what this rank holds."""
        positions: Tensor | None = self.state.get(param, {}).get(_key(param))
        if positions is None:  # it was cleared
            self._complete()
            positions = self.state[param][_key(param)]
        return positions

    # Parameters that are replaced ------------------------------------------------------------------------------------

    def _after_move(self) -> None:
        for param in [p for p in self.state if isinstance(p, Tensor) and self._places.at(p) is None]:
            del self.state[param]  # the state of nothing of a parameter that was replaced
        self._complete()

    def _catch_up(self) -> None:
        super()._catch_up()
        self._complete()

    def _moved_to(self, place: Place, param: Tensor) -> tuple[_Selection, dict[str, Any] | None]:
        selection: _Selection = place.belongs
        check_shape(param, str(place), "trainable", selection.shape, _WAY_OUT)
        if _key(param) in self.state.get(param, ()):  # whoever has replaced the parameter has seen to its state
            return _Selection(self._positions(param), param.shape), None
        state = self.state.get(place.param, {})
        if not state:  # it was cleared, and the moments are fresh
            moments = torch.zeros(len(selection.positions), dtype=arithmetic_dtype(param.dtype), device=param.device)
            key = _key(place.param)
            state = {"step": 0.0, "exp_avg": moments, "exp_avg_sq": moments.clone(), key: selection.positions}
        if "trainable" in state:
            if not placed_alike(place.param, param):
                raise ValueError(
                    f"{place} was a DTensor, and has been replaced by one that is placed otherwise: this rank has a "
                    "shard of its selection alone. select() again, with masks of whole parameters"
                )
            entry = state
        else:
            entry = self._unpacked(state, param)
        new = taken(entry, param, {}, {})
        new["step"] = self._clock(new["step"], param, self._group_of(param))
        digest = digest_of(selection.positions) if is_dtensor(param) else None
        return _Selection(new[_key(param)], param.shape, digest), new

    # -----------------------------------------------------------------------------------------------------------------

    def _check_settings(self, group: dict[str, Any], shared: dict[str, Any]) -> None:
        _refuse_flags(group)
        super()._check_settings(group, shared)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; nothing of it is selected until `select`."""
        super().add_param_group(param_group)
        self._complete()

    def trainable_mask(self, param: Tensor) -> Tensor:
        """Return which entries of `param` move: a new bool tensor of its shape, or of the shard of a DTensor.

        Raises:
            ValueError: `param` is not a parameter of this optimizer.
        """
        self._follow_to(param)
        position_of(param, self.param_groups)  # raises where it has none
        held = local(param)
        mask = torch.zeros(held.numel(), dtype=torch.bool, device=param.device)
        mask[self._positions(param).long()] = True
        return mask.view(held.shape)

    @torch.no_grad()
    def delta(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what this task may have changed: {name: (positions, values)} of the selected entries, on the CPU.

        Put onto the model as it was when the task began, it is the model as it is, bit for bit: `epi_kernels.delta`.
        Of sharded parameters every rank must call; each is gathered, one after the other.

        Raises:
            ValueError: the optimizer has no names, which are what a delta goes by.
        """
        if not all("param_names" in group for group in self.param_groups):
            raise ValueError("a delta goes by names, and the optimizer has none; pass it model.named_parameters()")
        self._catch_up()
        found = {}
        # in the order of the groups, which is the same on all ranks
        for param in (param for group in self.param_groups for param in group["params"]):
            positions, whole = self._positions(param), param
            if is_dtensor(param):
                mask = wrapped(self.trainable_mask(param).to(torch.uint8), param)
                mask, whole = mask.full_tensor(), param.full_tensor()  # type: ignore[attr-defined]
                positions = _narrow(mask.flatten().nonzero()[:, 0], param)
            if positions.numel():
                found[self._name(param)] = (positions.cpu(), whole.take(positions.long()).cpu())
        return found

    def __repr__(self) -> str:
        """Return torch's text and how much is selected."""
        params = [param for group in self.param_groups for param in group["params"]]
        counts = [len(self.state.get(param, {}).get(_key(param), ())) for param in params]
        total = sum(local(param).numel() for param in params)
        return f"{super().__repr__()}\nSelected: {sum(counts)} of {total} entries, in {sum(map(bool, counts))} tensors"

    # The step --------------------------------------------------------------------------------------------------------

    def _run_step(self) -> None:
        self._follow()
        self._compare_masks()
        if self._released is not None:
            self._released.end_iteration()
            return
        members = ((group, group["params"]) for group in self.param_groups)
        now = self._bring_up_to_date(self._prepared, members)
        if self._prepared.bundles and self._prepared.clocks.count({}):
            self._update(self._prepared, now)

    def _update(self, prepared: Prepared, now: Present) -> None:
        for number, bundle in enumerate(prepared.bundles):
            scalars, rows = prepared.clocks.scalars(ADAMW, number, bundle.groups, self.param_groups)
            bundle.gather.step_(bundle.tensors(now), bundle.indices(now), scalars, rows)

    def _moves(self, param: Tensor) -> bool:
        # a DTensor even where this rank has nothing: to come by its gradient may take all ranks
        return bool(self._positions(param).numel()) or is_dtensor(param)

    def _settings_seen(self, group: dict[str, Any]) -> tuple[object, ...]:
        return tuple(group[flag] for flag in _REFUSED)

    def _check_layout(self, param: Tensor, group: dict[str, Any]) -> None:
        _refuse_flags(group)  # that were set since the group was added
        selection: _Selection | None = self._places.get(param)
        if selection is not None:
            check_shape(param, self._name(param), "trainable", selection.shape, _WAY_OUT)
            # a program that has moved the state need not keep the positions that were there before
            self._places.put(param, replace(selection, positions=self._positions(param)))
        super()._check_layout(param, group)

    def _kind(self, param: Tensor) -> tuple[object, ...]:
        # one tensor beyond 2^31 entries would double the offsets of all others
        return (self._positions(param).dtype,)

    def _bundle(self, now: Present, where: list[int], groups: list[int], plain: bool) -> _Bundle:
        bundle = _Bundle(where, groups, plain)
        bundle.gather = Gather(ADAMW, bundle.tensors(now), bundle.indices(now), self._backend)
        return bundle

    # State -----------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        super()._settle()
        # a scaler unscales and skips by itself: the gradients that would be left to the step are dense
        self._step_supports_amp_scaling = self._released is not None

    def _packed(self, packed: dict[str, Any]) -> dict[str, Any]:
        state = {}
        for number, param in pairs_of(packed["param_groups"], self.param_groups):
            if number in packed["state"]:
                entry = packed["state"][number]
                state[number] = _spread(entry, param) if is_dtensor(param) else entry
        return {**packed, "state": state}

    def _unpacked(self, entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
        if "trainable" not in entry:
            if not is_dtensor(param):
                return {**entry, "indices": _narrow(entry["indices"], param)}
            entry = {"step": entry["step"], **_dense(entry, "indices", param.shape)}  # of one process
        # of a DTensor's shard, or of the whole of it where the checkpoint has that
        keys = ("exp_avg", "exp_avg_sq", "trainable")
        parts = {key: local(shard_of(entry[key].to(param.device), param)).reshape(-1) for key in keys}
        positions = parts["trainable"].nonzero()[:, 0]
        return {
            "step": entry["step"],
            "exp_avg": parts["exp_avg"][positions],
            "exp_avg_sq": parts["exp_avg_sq"][positions],
            _key(param): _narrow(positions, local(param)),
        }

    def _after_load(self) -> None:
        for param in (param for group in self.param_groups for param in group["params"]):
            kept: _Selection | None = self._places.get(param)
            if self.state.get(param):  # the selection is the checkpoint's
                self._places.put(param, _Selection(self._positions(param), param.shape))
            elif kept is not None and kept.positions.numel():
                warn(
                    f"the state has no entry for {self._name(param)}, which requires no gradient: its "
                    f"{len(kept.positions)} trainable entries stay those of this optimizer, with fresh moments"
                )
        self._complete()

    def _state_shape(self, key: str, param: Tensor, entry: dict[str, Any]) -> tuple[int, ...]:
        if "trainable" in entry:
            return tuple(param.shape)
        indices = entry.get("indices")
        return tuple(indices.shape) if isinstance(indices, Tensor) else (0,)

    def _check_entry(self, entry: dict[str, Any], param: Tensor, name: str) -> None:
        if "trainable" in entry:
            return
        indices = entry.get("indices")
        integers = isinstance(indices, Tensor) and indices.dtype in (torch.int32, torch.int64) and not indices.is_meta
        if not isinstance(indices, Tensor) or not integers or indices.dim() != 1 or indices.layout != torch.strided:
            raise ValueError(f"the state of {name} has no 1-D integer indices: it is not SparseAdamW's")
        if len(indices) and not (int(indices[0]) >= 0 and int(indices[-1]) < param.numel()):
            raise ValueError(
                f"indices of {name} go from {int(indices[0])} to {int(indices[-1])} in the state, and it has "
                f"{param.numel()} entries here"
            )
        # a step would write wherever they point
        if not bool((indices[1:] > indices[:-1]).all()):
            raise ValueError(f"indices of {name} do not increase in the state: it was changed, or is not SparseAdamW's")


def _refuse_flags(group: dict[str, Any]) -> None:
    require_default(**{flag: (group.get(flag, False), False) for flag in _REFUSED})


def _is_there(tensor: Tensor | None) -> bool:
    return tensor is not None


def _key(param: Tensor) -> str:
    """Return the key of the positions in a parameter's state, which is that of the selection in a checkpoint too.

    Loaders of flat checkpoints ask the state which keys to load.
    """
    return "trainable" if is_dtensor(param) else "indices"


def _narrow(positions: Tensor, tensor: Tensor) -> Tensor:
    """Return positions in a tensor in the dtype in which they are kept."""
    return positions.int() if tensor.numel() < _NARROW else positions.long()


def _dense(entry: dict[str, Any], key: str, shape: torch.Size) -> dict[str, Tensor]:
    """Return compact moments in a shape, zeros where nothing is selected, and where it is; `key` has the positions."""
    positions = entry[key].long()

    def spread(values: Tensor) -> Tensor:
        return put_(torch.zeros(shape, dtype=values.dtype, device=values.device), positions, values)

    ones = torch.ones(len(positions), dtype=torch.uint8, device=positions.device)
    return {"exp_avg": spread(entry["exp_avg"]), "exp_avg_sq": spread(entry["exp_avg_sq"]), "trainable": spread(ones)}


def _spread(entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """Return the compact state of a shard in the shape of its parameter."""
    dense = _dense(entry, "trainable", local(param).shape)
    return {"step": entry["step"], **{key: wrapped(values, param) for key, values in dense.items()}}
