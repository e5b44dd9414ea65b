"""Evolving isolation as the method of a fused optimizer: EPI's masks in state, in checkpoints and under DeepSpeed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels import lock
from epi_kernels.distributed import Lost, given, local, wrapped
from epi_kernels.engine.checkpoint import named
from epi_kernels.engine.groups import group_of, name_of, params_of
from epi_kernels.engine.method import Method, Owner
from epi_kernels.engine.storages import importance_setting, keys_of, wanted_dtype
from epi_kernels.isolation import deepspeed
from epi_kernels.isolation.isolation import Isolation
from epi_kernels.isolation.layers import LayersArgument, check_saved
from epi_kernels.isolation.settings import CLOCK, SHARED, check_settings
from epi_kernels.rules import Rule


class Evolving(Isolation, Method):
    """`Isolation` chooses the protected entries; the sign bits of a parameter's importance are its locks.

    Args:
        layers: see `Isolation`.
        rule: the optimizer's rule; one of its slots may serve as the importance.
    """

    shared = SHARED
    counted = (CLOCK,)
    state_keys = keys_of("importance")

    def __init__(self, layers: LayersArgument, rule: Rule) -> None:
        super().__init__(layers)
        self._slot = rule.importance_slot

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        return {**super().__getstate__(), "_slot": self._slot}

    # Settings and groups ---------------------------------------------------------------------------------------------

    def check_settings(self, group: dict[str, Any]) -> None:
        """Check the settings of a group, or raise ValueError."""
        check_settings(group, self._slot)

    def fixed(self, owner: Owner) -> dict[str, tuple[Any, ...]]:
        """Return the settings that must not change: masks depend on the place of the locks and on the layers."""
        return {
            "importance": (owner.defaults["importance"],),
            "layers": (self.grouping.name, owner.defaults["layers"]),  # the second where parameters have no names
        }

    def admit(self, owner: Owner, group: dict[str, Any]) -> None:
        """Take in a group that was just added: check that its locks have a place, and find its layers."""
        self._check_locks(owner, group, group["params"])
        self.join(owner.param_groups, group)
        self.grouping.resolve(named="param_names" in group)
        self.grouping.stamp(owner.param_groups)
        self.competition.part()

    def _check_locks(self, owner: Owner, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Check that a group's settings leave a place for the locks of these parameters."""
        for param in params:
            if param.is_complex() and self.lock_in(owner, param, group) == "exp_avg_sq":
                raise NotImplementedError(
                    f"{name_of(param, owner.param_groups)} is {param.dtype}, whose second moment has two parts for "
                    "each entry and no place for its lock; use importance='ema', or isolation_ratio=0 in its group"
                )

    def lock_in(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> str:
        """Return where the locks of a parameter are: its importance, its second moment, or nowhere."""
        if group["isolation_ratio"] == 0:
            return "none"
        return "importance" if group["importance"] == "ema" else "exp_avg_sq"

    def importance_dtype(self, group: dict[str, Any]) -> Any:
        """Return the setting that says how the importance of a group is kept."""
        return importance_setting(group)

    def rank_of(self, owner: Owner, param: Tensor) -> tuple[int | None, int]:
        """Return what tells this rank's entries from those of others; in bound flat partitions, their offset."""
        rank, first = super().rank_of(owner, param)
        if rank is not None and self.competition.segments is not None:
            return None, rank * param.numel()  # ranks have equal parts of one flat tensor
        return rank, first

    # The step --------------------------------------------------------------------------------------------------------

    def idle_step(self, owner: Owner) -> None:
        """Count a step in which this rank has no gradient, and take part in a refresh that is due."""
        found_inf = getattr(owner, "found_inf", None)
        if self.competition.segments is not None or (found_inf is not None and found_inf.item()):
            return
        self.step_without_gradients(owner)

    def between_iterations(self, owner: Owner) -> None:
        """Count the step that the parameters have taken one by one, and refresh the masks if a refresh is due."""
        self.nonfinite.warn(owner.param_groups)
        self.idle_step(owner)

    def clock_on_host(self, owner: Owner) -> bool:
        """Return whether several ranks decide together when to refresh: the host must then know the clock.

        Under a GradScaler it waits for the device in each step to know it.
        """
        return self.competition.ranks(owner) is not None

    def before_check(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Make the importance the second moment again, if only one name of that tensor was given another shape."""
        state = owner.state.get(param, {})
        # (codes of 8 bits have one name)
        shared = group["importance"] == "exp_avg_sq" and {"importance", "exp_avg_sq"} <= state.keys()
        # code that reshapes a parameter and its moments need not know that one of the moments has two names
        if shared and local(state["importance"]).shape != local(state["exp_avg_sq"]).shape == local(param).shape:
            state["importance"] = state["exp_avg_sq"]

    def state_made(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Make importance and second moment one tensor, where the second moment carries the locks."""
        state = owner.state[param]
        exempt = group["isolation_ratio"] == 0 and "importance" not in state
        if group["importance"] != "exp_avg_sq" or exempt:
            return
        if "exp_avg_sq" not in state:  # codes, with the locks in them
            state.pop("importance", None)
            return
        # Code that writes into `state` without load_state_dict may have made two tensors of the one: a checkpoint
        # loader, or an offloader that moved each to the host and back. The importance is the one with the locks.
        own, other = state["exp_avg_sq"], state.get("importance", state["exp_avg_sq"])
        if other is not own and local(other).data_ptr() != local(own).data_ptr():
            other = other.to(own.device)
            own = other if other.dtype == own.dtype else _signed_like(own, other)
        self._take_signed(owner, param, own)

    def _take_signed(self, owner: Owner, param: Tensor, signed: Tensor) -> None:
        """Make one signed second moment the parameter's ``exp_avg_sq`` and its ``importance``."""
        state = owner.state[param]
        if state["exp_avg_sq"] is not signed and group_of(param, owner.param_groups)["capturable"]:
            signed = state["exp_avg_sq"].copy_(signed)  # a captured step has the old tensor's address
        state["exp_avg_sq"] = state["importance"] = signed

    # DeepSpeed -------------------------------------------------------------------------------------------------------

    def bind_deepspeed(self, owner: Owner, engine: Any) -> None:
        """Assign every segment of DeepSpeed's flat partitions to its layer; see `EPIAdamW.bind_deepspeed`."""
        segments = deepspeed.segments_of(engine, owner)
        self.competition.segments = segments or None  # stage 0 leaves the parameters as they are
        self.competition.every_group = owner.param_groups
        if segments:
            owner._process_group = deepspeed.group_of(engine)
        elif isinstance(owner._process_group, Lost):
            owner._process_group = None
        self.competition.part()

    # Checkpoints and copies ------------------------------------------------------------------------------------------

    def packed(self, owner: Owner, packed: dict[str, Any]) -> dict[str, Any]:
        """Return torch's state_dict with the clock in its groups, and second moments without locks."""
        clock, groups = self.latest_clock(owner.param_groups), packed["param_groups"]
        packed = {**packed, "param_groups": [{**group, CLOCK: clock} for group in groups]}
        if groups[0]["importance"] != "exp_avg_sq":
            return packed
        exempt = {number for group in groups if group["isolation_ratio"] == 0 for number in group["params"]}
        return {
            **packed,
            "state": {
                number: entry if number in exempt and "importance" not in entry else _unlocked(entry)
                for number, entry in packed["state"].items()
            },
        }

    def joined(self, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return a saved state with the locks in the second moment, where that is to be kept in codes with locks."""
        coded = wanted_dtype(group.get("state_dtype"), param) == torch.uint8
        if group["importance"] != "exp_avg_sq" or not coded or not {"importance", "exp_avg_sq"} <= entry.keys():
            return entry
        signed = _signed_like(entry["exp_avg_sq"], entry["importance"])
        return {**{key: value for key, value in entry.items() if key != "importance"}, "exp_avg_sq": signed}

    def captured(self, owner: Owner, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state without an importance that is the second moment: `loaded` puts the loaded locks in."""
        if owner.param_groups[0]["importance"] != "exp_avg_sq":
            return state
        return {key: value for key, value in state.items() if key != "importance"}

    def lacking(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the clock for a state of torch.optim.AdamW, which has no clock: the largest ``step``."""
        steps = [float(local(entry["step"])) for entry in state_dict["state"].values() if entry]
        return {CLOCK: int(max(steps, default=0))}

    def check_loaded(self, owner: Owner, groups: list[dict[str, Any]]) -> None:
        """Check that a state was made with this optimizer's layers, and that its locks have a place."""
        check_saved(groups, owner.param_groups)
        for i, (group, own) in enumerate(zip(groups, owner.param_groups, strict=True)):
            with named(f"parameter group {i} of the state"):
                self._check_locks(owner, group, own["params"])

    def loaded(self, owner: Owner) -> None:
        """Take over the layers and the clock of a state, and make importance and second moment one tensor again."""
        groups = owner.param_groups
        self.grouping.adopt(groups)
        self.competition.part()
        if self.competition.segments is not None:
            self.competition.every_group = groups
        self.start_iteration()
        self.keep_clock(groups, int(groups[0][CLOCK]))
        if groups[0]["importance"] == "exp_avg_sq":
            for param, state in owner.state.items():
                if "exp_avg_sq" not in state:
                    continue  # codes, with the locks in them
                own, loaded = state["exp_avg_sq"], state.pop("importance", None)
                # locks from the importance, values from the second moment: the importance was loaded as float32
                self._take_signed(owner, param, own if loaded is None else _signed_like(own, loaded))

    def catch_up(self, owner: Owner) -> None:
        """Copy the clock from a device into the groups, before the groups are saved or copied."""
        self.keep_clock(owner.param_groups, self.latest_clock(owner.param_groups))

    def constructed(self, owner: Owner) -> None:
        """Count the parameters, so that a `step` with only some of them can be told from a whole iteration."""
        self.iteration.parameters = max(self.iteration.parameters, len(params_of(owner.param_groups)))

    def process_group_of_copy(self, owner: Owner) -> Any:
        """Return the process group for a copy in this process, or what stands for the group in another process."""
        if self.competition.segments is not None:
            return Lost("call bind_deepspeed(engine) of the copy")
        return given(owner._process_group)


def _signed_like(exp_avg_sq: Tensor, signed: Tensor) -> Tensor:
    """Return the values of a second moment with the locks of a signed importance that is placed alike."""
    return wrapped(lock.with_lock(local(exp_avg_sq), lock.is_locked(local(signed))), exp_avg_sq)


def _unlocked(entry: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter's state as a checkpoint has it: exp_avg_sq without locks, and the importance with them."""
    if "exp_avg_sq" not in entry:
        return entry
    signed = entry.get("importance", entry["exp_avg_sq"])
    return {**entry, "exp_avg_sq": wrapped(lock.magnitude(local(signed)), signed), "importance": signed}
