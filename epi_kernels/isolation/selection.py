"""A selection of trainable entries: their positions, and a state only for them (PIECE, arXiv 2511.15375)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from epi_kernels.contract import arithmetic_dtype
from epi_kernels.delta.entries import checksum, in_whole, narrow
from epi_kernels.distributed import is_dtensor, local, shard_of, wrapped
from epi_kernels.engine.checkpoint import pairs_of, placed_alike, taken
from epi_kernels.engine.gathering import check_flags
from epi_kernels.engine.groups import digest_of, group_of, masks_of, name_of, params_of, position_of
from epi_kernels.engine.method import Owner
from epi_kernels.engine.places import Following, Place, check_shape
from epi_kernels.engine.state import new_clock
from epi_kernels.engine.storages import REST, wanted_dtype
from epi_kernels.notices import warn
from epi_kernels.ops.flat import put_
from epi_kernels.rules import Rule
from epi_kernels.storage import split

_WAY_OUT = "If you replaced or resized the parameter, select() again, with masks in the new shapes"


@dataclass(frozen=True, slots=True)
class _Selected:
    """The trainable entries of a parameter: positions in this rank's shard, and the shape of the whole parameter.

    A DTensor also has a digest, which is equal on ranks whose masks are equal. Once a step has begun it has a checksum
    of the values that this rank's entries had before; None where nobody knows them: a loaded state does not say.
    """

    positions: Tensor
    shape: torch.Size
    digest: int | None = None
    begun: bool = False
    before: Tensor | None = None


class Selection(Following):
    """Trainable entries move and the others keep their bits; a parameter's state has values only for trainable entries.

    Args:
        rule: the optimizer's rule; a state has one compact tensor for each slot of the rule.
    """

    state_keys = ("indices", "trainable", REST)
    complete = True

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self._slots = tuple(slot.name for slot in rule.slots if slot.option is None)
        self._begun = False  # whether every selection has begun

    # Selecting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, owner: Owner, trainable: Mapping[str | Tensor, Tensor]) -> None:
        """Start over with a selection and fresh moments; see `epi_kernels.SparseAdamW.select`."""
        groups = owner.param_groups
        chosen = masks_of(trainable, groups, "trainable", partitioned=owner._process_group is not None)
        shards = {param: local(shard_of(mask.to(param.device), param)) for param, mask in chosen.items()}
        owner.state.clear()
        self.compare_anew()
        self.places.look(groups)  # the parameters may have been replaced
        for param in params_of(groups):
            self.places.put(param, None)
        for param, mask in shards.items():
            positions = narrow(mask.reshape(-1).nonzero()[:, 0], local(param).numel())
            digest = digest_of(chosen[param]) if is_dtensor(param) else None
            self.places.put(param, _Selected(positions, param.shape, digest))
        self._begun = False
        self.complete_states(owner)

    def complete_states(self, owner: Owner) -> None:
        """Give every parameter a state for its trainable entries, with tensors of no entries if it has none.

        torch.distributed.checkpoint loads only into states that exist, and would skip the others in a file.
        """
        for group in owner.param_groups:
            for param in group["params"]:
                self.state_made(owner, param, group)

    def state_made(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Make a fresh state if it was cleared; if there is a state, its positions become the selection."""
        selected: _Selected | None = self.places.get(param)
        state = owner.state.get(param, {})
        positions = state.get(key_of(param), selected and selected.positions)
        dtypes = self._dtypes(param, group)
        if not {"step", *self._slots, key_of(param)} <= state.keys():
            self._start(owner, param, group, positions)
        elif REST in dtypes and REST not in state:
            state[REST] = torch.zeros(len(positions), dtype=dtypes[REST], device=param.device)
        elif positions is not (selected and selected.positions) and (selected or positions.numel()):
            self.places.put(param, _Selected(positions, selected.shape if selected else param.shape, begun=True))

    def _start(self, owner: Owner, param: Tensor, group: dict[str, Any], positions: Tensor | None) -> None:
        """Give a parameter a fresh state for the entries at these positions (row-major) of this rank's shard."""
        if positions is None:
            positions = narrow(torch.zeros(0, dtype=torch.int64, device=param.device), local(param).numel())
        k = len(positions)
        with torch.inference_mode(False):  # the state may be written outside of inference mode
            slots = {key: torch.zeros(k, dtype=d, device=param.device) for key, d in self._dtypes(param, group).items()}
        clock = new_clock(0.0, None, bool(group["fused"]))
        owner.state[param] = {"step": clock, **slots, key_of(param): positions.to(param.device)}

    def _dtypes(self, param: Tensor, group: dict[str, Any]) -> dict[str, torch.dtype]:
        """Return the compact tensors that the state of a parameter has, and their dtypes."""
        dtype = wanted_dtype(group.get("state_dtype"), param) or arithmetic_dtype(param.dtype)
        dtypes = dict.fromkeys(self._slots, dtype)
        bits = group.get("master_weight_bits")
        return {**dtypes, REST: split.RESTS[bits]} if bits and param.dtype == torch.bfloat16 else dtypes

    def positions(self, owner: Owner, param: Tensor) -> Tensor:
        """Return the positions of the trainable entries in this rank's shard."""
        positions: Tensor | None = owner.state.get(param, {}).get(key_of(param))
        if positions is None:  # the state was cleared
            self.complete_states(owner)
            positions = owner.state[param][key_of(param)]
        return positions

    def trainable(self, owner: Owner, param: Tensor) -> Tensor:
        """Return which entries of a parameter, or of the shard of a DTensor, move: a new bool tensor of its shape."""
        self.follow_to(owner, param)
        position_of(param, owner.param_groups)  # raises if the optimizer does not have the parameter
        shard = local(param)
        mask = torch.zeros(shard.numel(), dtype=torch.bool, device=param.device)
        mask[self.positions(owner, param).long()] = True
        return mask.view(shard.shape)

    # What there was before -------------------------------------------------------------------------------------------

    def before_step(self, owner: Owner) -> None:
        """Look at the entries that will move, before the first step moves them."""
        super().before_step(owner)
        if not self._begun:
            for param in params_of(owner.param_groups):
                self._begin(owner, param)
            self._begun = True

    def before_param(self, owner: Owner, param: Tensor) -> None:
        """Look at the entries of a parameter that steps alone."""
        super().before_param(owner, param)
        if not self._begun:
            self._begin(owner, param)

    def _begin(self, owner: Owner, param: Tensor) -> None:
        selected: _Selected | None = self.places.get(param)
        if selected is not None and not selected.begun:
            self.places.put(param, replace(selected, begun=True, before=self._checksum(owner, param)))

    def _checksum(self, owner: Owner, param: Tensor) -> Tensor:
        positions = self.positions(owner, param).long()
        return checksum(in_whole(param, positions), local(param).take(positions))

    def before(self, owner: Owner, param: Tensor) -> Tensor:
        """Return the checksum of what this rank's entries of a parameter were before the first step; and 1 if lost.

        It is int64 [2], and the sum of it over all shards says the same of the whole parameter.
        """
        selected: _Selected | None = self.places.get(param)
        found = selected.before if selected is not None and selected.begun else self._checksum(owner, param)
        if found is None:
            return torch.tensor([0, 1], dtype=torch.int64, device=param.device)
        return torch.stack([found, torch.zeros_like(found)])

    # The step --------------------------------------------------------------------------------------------------------

    def check_settings(self, group: dict[str, Any]) -> None:
        """Refuse flags and storages that compact states do not have."""
        check_flags(group)

    def moves(self, owner: Owner, param: Tensor) -> bool:
        """Return whether a parameter has trainable entries.

        A DTensor counts even if this rank's shard has none: all ranks may be needed to compute its gradient.
        """
        return bool(self.positions(owner, param).numel()) or is_dtensor(param)

    def before_check(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check that a parameter has the shape of its selection."""
        selected: _Selected | None = self.places.get(param)
        if selected is not None:
            check_shape(param, name_of(param, owner.param_groups), "trainable", selected.shape, _WAY_OUT)
            # a program that has moved the state to other tensors need not keep the old positions alive
            self.places.put(param, replace(selected, positions=self.positions(owner, param)))

    # Parameters that are replaced ------------------------------------------------------------------------------------

    def after_move(self, owner: Owner) -> None:
        """Drop the empty states of parameters that were replaced, and complete the others."""
        for param in [p for p in owner.state if isinstance(p, Tensor) and self.places.at(p) is None]:
            del owner.state[param]
        self.complete_states(owner)

    def added(self, owner: Owner) -> None:
        """Give the parameters of a new group empty states, until `select`."""
        self.complete_states(owner)

    def catch_up(self, owner: Owner) -> None:
        """Follow parameters that were replaced, and give every parameter a state."""
        super().catch_up(owner)
        self.complete_states(owner)

    def digest(self, belongs: Any) -> int | None:
        """Return the digest of a selection."""
        selected: _Selected = belongs
        return selected.digest

    def moved_to(self, owner: Owner, place: Place, param: Tensor) -> tuple[_Selected, dict[str, Any] | None]:
        """Return the selection and the state for a parameter that has taken the place of another."""
        selected: _Selected = place.belongs
        check_shape(param, str(place), "trainable", selected.shape, _WAY_OUT)
        if key_of(param) in owner.state.get(param, ()):  # the code that replaced the parameter has given it a state
            return _Selected(self.positions(owner, param), param.shape, begun=True), None
        state = owner.state.get(place.param, {})
        if not state:  # the state was cleared: start with fresh moments
            k, dtypes = len(selected.positions), self._dtypes(param, group_of(param, owner.param_groups))
            slots = {key: torch.zeros(k, dtype=dtype, device=param.device) for key, dtype in dtypes.items()}
            state = {"step": 0.0, **slots, key_of(place.param): selected.positions}
        if "trainable" in state:
            if not placed_alike(place.param, param):
                raise ValueError(
                    f"{place} was a DTensor, and has been replaced by one that is placed otherwise: this rank has a "
                    "shard of its selection alone. select() again, with masks of whole parameters"
                )
            entry = state
        else:
            entry = self.unpacked(state, param)
        new = taken(entry, param, {}, {})
        new["step"] = new_clock(new["step"], None, bool(group_of(param, owner.param_groups)["fused"]))
        digest = selected.digest  # of the positions of the whole parameter, of which a shard has a part
        if is_dtensor(param) and not is_dtensor(place.param):
            digest = digest_of(selected.positions)
        # the checksum of a shard is not that of another
        alike = placed_alike(place.param, param) if is_dtensor(param) else not is_dtensor(place.param)
        before = selected.before if alike and place.param.dtype == param.dtype else None
        return _Selected(new[key_of(param)], param.shape, digest, selected.begun, before), new

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def packed(self, owner: Owner, packed: dict[str, Any]) -> dict[str, Any]:
        """Return torch's state_dict with the state of a DTensor in the parameter's shape."""
        state = {}
        for number, param in pairs_of(packed["param_groups"], owner.param_groups):
            if number in packed["state"]:
                entry = packed["state"][number]
                state[number] = self._spread(entry, param) if is_dtensor(param) else entry
        return {**packed, "state": state}

    def unpacked(self, entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return a parameter's saved state in the compact form that `state` has."""
        if "trainable" not in entry:
            if not is_dtensor(param):
                return {**entry, "indices": narrow(entry["indices"], param.numel())}
            entry = {"step": entry["step"], **self._dense(entry, "indices", param.shape)}  # saved without shards
        # the saved tensors are shards of a DTensor, or whole tensors
        keys = (*self._slots, *([REST] if REST in entry else []), "trainable")
        parts = {key: local(shard_of(entry[key].to(param.device), param)).reshape(-1) for key in keys}
        positions = parts["trainable"].nonzero()[:, 0]
        slots = {key: parts[key][positions] for key in keys[:-1]}
        return {"step": entry["step"], **slots, key_of(param): narrow(positions, local(param).numel())}

    def loaded(self, owner: Owner) -> None:
        """Take the selection from a checkpoint; parameters without an entry there keep theirs, with fresh moments."""
        for param in params_of(owner.param_groups):
            kept: _Selected | None = self.places.get(param)
            if owner.state.get(param):  # the selection is the checkpoint's
                self.places.put(param, _Selected(self.positions(owner, param), param.shape, begun=True))
            elif kept is not None and kept.positions.numel():
                warn(
                    f"the state has no entry for {name_of(param, owner.param_groups)}, which requires no gradient: its "
                    f"{len(kept.positions)} trainable entries stay those of this optimizer, with fresh moments"
                )
        self.complete_states(owner)

    def state_shape(self, key: str, param: Tensor, entry: dict[str, Any]) -> tuple[int, ...]:
        """Return the shape of a compact tensor, or the parameter's shape if the entry is saved in that shape."""
        if "trainable" in entry:
            return tuple(param.shape)
        indices = entry.get("indices")
        return tuple(indices.shape) if isinstance(indices, Tensor) else (0,)

    def check_entry(self, entry: dict[str, Any], param: Tensor, name: str) -> None:
        """Check the positions of a saved state.

        Raises:
            ValueError: the indices are not 1-D integers, are out of range, or do not increase.
        """
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
        # a step would write wherever the indices point
        if not bool((indices[1:] > indices[:-1]).all()):
            raise ValueError(f"indices of {name} do not increase in the state: it was changed, or is not SparseAdamW's")

    def _dense(self, entry: dict[str, Any], key: str, shape: torch.Size) -> dict[str, Tensor]:
        """Spread compact slots over a shape, with 0 elsewhere, and add the mask; ``entry[key]`` has the positions."""
        positions = entry[key].long()

        def spread(values: Tensor) -> Tensor:
            return put_(torch.zeros(shape, dtype=values.dtype, device=values.device), positions, values)

        ones = torch.ones(len(positions), dtype=torch.uint8, device=positions.device)
        slots = (*self._slots, *([REST] if REST in entry else []))
        return {**{slot: spread(entry[slot]) for slot in slots}, "trainable": spread(ones)}

    def _spread(self, entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return the compact state of a shard as DTensors in the shape of the parameter."""
        dense = self._dense(entry, "trainable", local(param).shape)
        return {"step": entry["step"], **{key: wrapped(values, param) for key, values in dense.items()}}


def key_of(param: Tensor) -> str:
    """Return the key of the positions in a parameter's state; a checkpoint has the selection under the same key.

    Loaders of flat checkpoints ask the state which keys to load.
    """
    return "trainable" if is_dtensor(param) else "indices"
