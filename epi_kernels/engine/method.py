"""What the engine asks of a method: which entries of an optimizer's parameters move, and what that needs.

EPI, a frozen mask and a selection of trainable entries are methods. The engine knows none of them: it is handed one.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from epi_kernels.distributed import is_dtensor, is_slice, rank_in
from epi_kernels.engine.groups import has_names
from epi_kernels.engine.scaling import Scaling


class Owner(Protocol):
    """An optimizer as its parts see it: torch's attributes, and two arguments that users do not read back."""

    param_groups: list[dict[str, Any]]
    state: Any
    defaults: dict[str, Any]
    _backend: str
    _process_group: Any


def rank_of(owner: Owner, param: Tensor) -> tuple[int | None, int]:
    """Return what tells this rank's entries of a parameter from those of other ranks, for the noise of rounding.

    Returns:
        (rank, offset of the first entry in the whole). The rank is None where the place of the entries is known, or
        where all ranks have the same ones; the placements of a DTensor tell its place.
    """
    parted = owner._process_group is not None and not any("param_names" in group for group in owner.param_groups)
    replaced = any("param_names" in group and not has_names(group) for group in owner.param_groups)
    if is_slice(param) or ((parted or replaced) and not is_dtensor(param)):
        return rank_in(owner._process_group), 0
    return None, 0


class Method:
    """All entries of all parameters move; a subclass says otherwise.

    Every hook gets `owner`, the optimizer that the method belongs to, and keeps no reference to it: a copy of an
    optimizer has a copy of its method.
    """

    # settings of a group that belong to the method: those that must be equal in all groups, and those that the step
    # itself writes
    shared: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()

    # keys of a parameter's state, beside "step" and the slots of the rule, that a checkpoint may hold
    state_keys: tuple[str, ...] = ()

    # whether every parameter has a state from the start
    complete = False

    # how the parameters are grouped into layers, if they are
    grouping: Any = None

    # Settings and groups ---------------------------------------------------------------------------------------------

    def check_settings(self, group: dict[str, Any]) -> None:
        """Check the settings of a group, or raise ValueError."""

    def fixed(self, owner: Owner) -> dict[str, tuple[Any, ...]]:
        """Return the settings that cannot change once there is a state, each with the values that it may have."""
        return {}

    def before_group(self, owner: Owner) -> None:
        """Do what comes before a group is added to an optimizer that has groups already."""

    def admit(self, owner: Owner, group: dict[str, Any]) -> None:
        """Take in a group that was just added, or raise and leave no trace of it."""

    def constructed(self, owner: Owner) -> None:
        """Do what needs all groups, once there are other groups: after an addition, a load, or in a copy."""

    def added(self, owner: Owner) -> None:
        """Do what is left once a group was added."""

    # The step --------------------------------------------------------------------------------------------------------

    def before_step(self, owner: Owner) -> None:
        """Do what comes before a step, such as to compare masks with other ranks; nothing has changed if it raises."""

    def before_param(self, owner: Owner, param: Tensor) -> None:
        """Do what comes before a step of one parameter alone."""

    def moves(self, owner: Owner, param: Tensor) -> bool:
        """Return whether a step may do anything to a parameter that has a gradient."""
        return True

    def lock_in(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> str:
        """Return where the lock bits of a parameter are: see `epi_kernels.ops.sweep_`."""
        return "none"

    def new_lock(self, owner: Owner, param: Tensor) -> Tensor:
        """Create the state of a parameter that holds its lock bits, where that is a tensor of its own."""
        raise NotImplementedError

    def before_check(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check a parameter before a step is planned, or raise."""

    def state_made(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Do what is left once the state of a parameter has what the rule and the lock need."""

    def clock_on_host(self, owner: Owner) -> bool:
        """Return whether the host must know the clocks, although a device could keep them."""
        return False

    def before_update(
        self, owner: Owner, params: Sequence[Tensor], scaling: Scaling, home: torch.device | None = None
    ) -> bool | Tensor:
        """Do what comes before `params` are updated; their clocks are counted already.

        Args:
            owner: the optimizer.
            params: the parameters that have a gradient.
            scaling: what a scaler and clipping do to their gradients.
            home: the device, where only the device knows whether this step counts; None: the step counts.

        Returns:
            Whether this call has advanced the importance of the parameters that can be protected and require a
            gradient: a bool, or a float32 tensor of one value where only the device knows.
        """
        return False

    def rank_of(self, owner: Owner, param: Tensor) -> tuple[int | None, int]:
        """Return what tells this rank's entries of a parameter from those of other ranks; see `rank_of`."""
        return rank_of(owner, param)

    def importance_dtype(self, group: dict[str, Any]) -> Any:
        """Return the setting that says how the importance of a group is kept, where it is a tensor of its own."""
        return None

    def idle_step(self, owner: Owner) -> None:
        """Do what a step does where no parameter has a gradient: count it, and what other ranks do in this step."""

    def between_iterations(self, owner: Owner) -> None:
        """Do what is due after every parameter has stepped alone."""

    def mask(self, owner: Owner, param: Tensor) -> Tensor:
        """Return which entries of a parameter cannot move: a new bool tensor of its shape."""
        raise NotImplementedError

    # Checkpoints and copies ------------------------------------------------------------------------------------------

    def catch_up(self, owner: Owner) -> None:
        """Do what a step leaves for later, before anything is read, saved, loaded or copied."""

    def packed(self, owner: Owner, packed: dict[str, Any]) -> dict[str, Any]:
        """Return torch's state_dict as a checkpoint shall have it."""
        return packed

    def unpacked(self, entry: dict[str, Any], param: Tensor) -> dict[str, Any] | None:
        """Return a parameter's saved state as `state` has it; None: its tensors as they are, or this rank's shards."""
        return None

    def joined(self, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return a parameter's saved state, as `unpacked` gives it, with what belongs together in one tensor."""
        return entry

    def state_shape(self, key: str, param: Tensor, entry: dict[str, Any]) -> tuple[int, ...]:
        """Return the shape that `key` of a parameter's state has in a saved `entry`."""
        return tuple(param.shape)

    def check_entry(self, entry: dict[str, Any], param: Tensor, name: str) -> None:
        """Check a parameter's saved state beyond its keys and shapes; ValueError is for the caller."""

    def captured(self, owner: Owner, state: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors of a state into which a load must write, since a captured step has their addresses."""
        return state

    def lacking(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return settings for the groups that follow from a state of torch's, whose groups lack them."""
        return {}

    def check_loaded(self, owner: Owner, groups: list[dict[str, Any]]) -> None:
        """Check the groups of a state to be loaded, completed with what they lacked; ValueError is for the caller."""

    def loaded(self, owner: Owner) -> None:
        """Do what is left once a state is loaded."""

    def process_group_of_copy(self, owner: Owner) -> Any:
        """Return the process group that a pickle or copy of the optimizer has."""
        raise NotImplementedError
