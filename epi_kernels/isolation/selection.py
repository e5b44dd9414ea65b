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

# keys of the state of a parameter whose selection has evolved: the clock's value when each trainable entry became so,
# of which its own number of steps follows; and the positions of entries that have moved and do so no more
JOINED, DEPARTED = "joined", "departed"

# what a saved clock has on top where a state has these keys: a loader that takes only some keys does not go unnoticed
_MARK = 0.5

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
    departed: Tensor | None = None


class Selection(Following):
    """Trainable entries move and the others keep their bits; a parameter's state has values only for trainable entries.

    Args:
        rule: the optimizer's rule; a state has one compact tensor for each slot of the rule.
    """

    state_keys = ("indices", "trainable", REST, JOINED, DEPARTED)
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

    @torch.no_grad()
    def evolve(self, owner: Owner, trainable: Mapping[str | Tensor, Tensor]) -> None:
        """Select other entries; those that stay keep their moments. See `epi_kernels.SparseAdamW.select`."""
        self.catch_up(owner)
        groups = owner.param_groups
        chosen = masks_of(trainable, groups, "trainable", partitioned=owner._process_group is not None)
        found = {}
        for param in params_of(groups):
            mask = chosen.get(param)
            if mask is None:
                positions = torch.zeros(0, dtype=torch.int64, device=param.device)
            else:
                positions = local(shard_of(mask.to(param.device), param)).reshape(-1).nonzero()[:, 0]
            digest = digest_of(mask) if mask is not None and is_dtensor(param) else None
            with torch.inference_mode(False):  # the state may be written outside of inference mode
                found[param] = self._evolved(owner, param, narrow(positions.clone(), local(param).numel()), digest)
        for param, (selected, state) in found.items():
            owner.state[param] = state
            self.places.put(param, selected)
        self._begun = False  # of parameters of which nothing was selected the next step looks at what there is
        self.compare_anew()

    def _evolved(
        self, owner: Owner, param: Tensor, positions: Tensor, digest: int | None
    ) -> tuple[_Selected, dict[str, Any]]:
        """Return what belongs to a parameter of which these entries are trainable from now on; change nothing."""
        old, selected = owner.state[param], self.places.get(param) or _Selected(positions[:0], param.shape)
        were, clock = old[key_of(param)].to(positions.dtype), int(old["step"])
        place = torch.searchsorted(were, positions).clamp_(max=max(0, len(were) - 1))
        stay = were[place] == positions if len(were) else torch.zeros_like(positions, dtype=torch.bool)
        state: dict[str, Any] = {"step": old["step"], key_of(param): positions}
        for key in (*self._slots, *([REST] if REST in old else []), JOINED):
            if key == JOINED:
                joined = torch.full_like(positions, clock, dtype=torch.int32)
                joined[stay] = old[JOINED][place[stay]] if JOINED in old else 0
                state[JOINED] = joined
            else:
                state[key] = torch.zeros(len(positions), dtype=old[key].dtype, device=param.device)
                state[key][stay] = old[key][place[stay]]
        gone, before = old.get(DEPARTED, positions[:0]).to(positions.dtype), selected.before
        new = positions[~stay]
        new = new[~torch.isin(new, gone)].long()  # of which nobody has taken a checksum
        if before is not None:
            before = before + checksum(in_whole(param, new), local(param).take(new))
        if selected.begun:
            gone = torch.cat([gone, were[~torch.isin(were, positions)]]).unique()
        state[DEPARTED] = gone[~torch.isin(gone, positions)]
        if not is_dtensor(param):  # of a DTensor all ranks have the same keys
            if not state[JOINED].any():
                del state[JOINED]
            if not len(state[DEPARTED]):
                del state[DEPARTED]
        return _Selected(positions, param.shape, digest, selected.begun, before, state.get(DEPARTED)), state

    def touched(self, owner: Owner, param: Tensor) -> Tensor:
        """Return the positions of the entries in this rank's shard that this task may have changed, ascending."""
        positions = self.positions(owner, param)
        gone = owner.state[param].get(DEPARTED)
        return positions if gone is None else torch.cat([positions, gone.to(positions.dtype)]).sort().values

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
            shape = selected.shape if selected else param.shape
            self.places.put(param, _Selected(positions, shape, begun=True, departed=state.get(DEPARTED)))

    def _start(self, owner: Owner, param: Tensor, group: dict[str, Any], positions: Tensor | None) -> None:
        """Give a parameter a fresh state for the entries at these positions (row-major) of this rank's shard."""
        if positions is None:
            positions = narrow(torch.zeros(0, dtype=torch.int64, device=param.device), local(param).numel())
        k = len(positions)
        with torch.inference_mode(False):  # the state may be written outside of inference mode
            slots = {key: torch.zeros(k, dtype=d, device=param.device) for key, d in self._dtypes(param, group).items()}
        clock = new_clock(0.0, None, bool(group["fused"]))
        owner.state[param] = {"step": clock, **slots, key_of(param): positions.to(param.device)}
        selected: _Selected | None = self.places.get(param)
        if selected is not None and selected.departed is not None:
            owner.state[param][DEPARTED] = selected.departed

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
            gone = owner.state[param].get(DEPARTED)
            return _Selected(self.positions(owner, param), param.shape, begun=True, departed=gone), None
        state = owner.state.get(place.param, {})
        if not state:  # the state was cleared: start with fresh moments
            k, dtypes = len(selected.positions), self._dtypes(param, group_of(param, owner.param_groups))
            slots = {key: torch.zeros(k, dtype=dtype, device=param.device) for key, dtype in dtypes.items()}
            state = {"step": 0.0, **slots, key_of(place.param): selected.positions}
            state |= {} if selected.departed is None else {DEPARTED: selected.departed}
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
        return _Selected(new[key_of(param)], param.shape, digest, selected.begun, before, new.get(DEPARTED)), new

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def packed(self, owner: Owner, packed: dict[str, Any]) -> dict[str, Any]:
        """Return torch's state_dict with the state of a DTensor in the parameter's shape, and clocks marked."""
        state = {}
        for number, param in pairs_of(packed["param_groups"], owner.param_groups):
            if number in packed["state"]:
                entry = packed["state"][number]
                clock = {"step": entry["step"] + _MARK} if {JOINED, DEPARTED} & entry.keys() else {}
                state[number] = {**(self._spread(entry, param) if is_dtensor(param) else entry), **clock}
        return {**packed, "state": state}

    def unpacked(self, entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return a parameter's saved state in the compact form that `state` has."""
        if {JOINED, DEPARTED} & entry.keys():
            entry = {**entry, "step": entry["step"] // 1}
        if "trainable" not in entry:
            if not is_dtensor(param):
                return {**entry, "indices": narrow(entry["indices"], param.numel())}
            entry = {"step": entry["step"], **self._dense(entry, "indices", param.shape)}  # saved without shards
        # the saved tensors are shards of a DTensor, or whole tensors
        keys = (*self._compact(entry), *([DEPARTED] if DEPARTED in entry else []), "trainable")
        parts = {key: local(shard_of(entry[key].to(param.device), param)).reshape(-1) for key in keys}
        positions, count = parts["trainable"].nonzero()[:, 0], local(param).numel()
        found = {key: parts[key][positions] for key in self._compact(entry)}
        if DEPARTED in entry:
            found[DEPARTED] = narrow(parts[DEPARTED].nonzero()[:, 0], count)
        return {"step": entry["step"], **found, key_of(param): narrow(positions, count)}

    def _compact(self, entry: dict[str, Any]) -> tuple[str, ...]:
        """Return the keys of an entry that have a value for each trainable entry."""
        return (*self._slots, *(key for key in (REST, JOINED) if key in entry))

    def loaded(self, owner: Owner) -> None:
        """Take the selection from a checkpoint; parameters without an entry there keep theirs, with fresh moments."""
        for param in params_of(owner.param_groups):
            kept: _Selected | None = self.places.get(param)
            if owner.state.get(param):  # the selection is the checkpoint's
                gone = owner.state[param].get(DEPARTED)
                selected = _Selected(self.positions(owner, param), param.shape, begun=True, departed=gone)
                self.places.put(param, selected)
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
        indices = entry.get("indices" if key != DEPARTED else DEPARTED)
        return tuple(indices.shape) if isinstance(indices, Tensor) else (0,)

    def check_entry(self, entry: dict[str, Any], param: Tensor, name: str) -> None:
        """Check the positions of a saved state.

        Raises:
            ValueError: positions are not 1-D integers, are out of range, or do not increase; or it lacks what belongs
                to a selection that has evolved.
        """
        self._check_evolved(entry, name)
        if "trainable" in entry:
            return
        for key in ("indices", *([DEPARTED] if DEPARTED in entry else [])):
            found = entry.get(key)
            integers = isinstance(found, Tensor) and found.dtype in (torch.int32, torch.int64) and not found.is_meta
            if not isinstance(found, Tensor) or not integers or found.dim() != 1 or found.layout != torch.strided:
                raise ValueError(f"the state of {name} has no 1-D integer {key}: it is not SparseAdamW's")
            if len(found) and not (int(found[0]) >= 0 and int(found[-1]) < param.numel()):
                raise ValueError(
                    f"{key} of {name} go from {int(found[0])} to {int(found[-1])} in the state, and it has "
                    f"{param.numel()} entries here"
                )
            # a step would write wherever the indices point
            if not bool((found[1:] > found[:-1]).all()):
                raise ValueError(
                    f"{key} of {name} do not increase in the state: it was changed, or is not SparseAdamW's"
                )

    def _check_evolved(self, entry: dict[str, Any], name: str) -> None:
        step, joined = entry.get("step"), entry.get(JOINED)
        number = isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta)
        clock = float(local(step) if isinstance(step, Tensor) else step) if number else 0.0  # type: ignore[arg-type]
        if clock % 1 == _MARK and not {JOINED, DEPARTED} & entry.keys():
            raise ValueError(
                f"the state of {name} was loaded without {JOINED} and {DEPARTED}, which it had: its selection has "
                "evolved. Load it with load_state_dict, or select(mask, keep_state=True) before a loader that asks "
                "the optimizer for its keys"
            )
        if isinstance(joined, Tensor) and not joined.is_meta and joined.numel():
            part = local(joined)
            if (
                part.is_floating_point()
                or part.is_complex()
                or (part.numel() and not 0 <= part.min() <= part.max() <= clock)
            ):
                raise ValueError(f"{JOINED} of {name} is no number of steps from 0 to {clock:g} in the state")

    def _dense(self, entry: dict[str, Any], key: str, shape: torch.Size) -> dict[str, Tensor]:
        """Spread compact slots over a shape, with 0 elsewhere, and add the mask; ``entry[key]`` has the positions."""
        positions = entry[key].long()

        def spread(values: Tensor) -> Tensor:
            return put_(torch.zeros(shape, dtype=values.dtype, device=values.device), positions, values)

        ones = torch.ones(len(positions), dtype=torch.uint8, device=positions.device)
        found = {slot: spread(entry[slot]) for slot in self._compact(entry)}
        if DEPARTED in entry:
            gone = entry[DEPARTED].long()
            empty = torch.zeros(shape, dtype=torch.uint8, device=gone.device)
            found[DEPARTED] = put_(empty, gone, torch.ones(len(gone), dtype=torch.uint8, device=gone.device))
        return {**found, "trainable": spread(ones)}

    def _spread(self, entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return the compact state of a shard as DTensors in the shape of the parameter."""
        dense = self._dense(entry, "trainable", local(param).shape)
        return {"step": entry["step"], **{key: wrapped(values, param) for key, values in dense.items()}}


def key_of(param: Tensor) -> str:
    """Return the key of the positions in a parameter's state; a checkpoint has the selection under the same key.

    Loaders of flat checkpoints ask the state which keys to load.
    """
    return "trainable" if is_dtensor(param) else "indices"
