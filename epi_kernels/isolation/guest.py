"""The importance in the state of a base optimizer, which is not ours: put in, taken out, kept as asked, checked."""

import copy
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from epi_kernels.distributed import local
from epi_kernels.engine.groups import has_names, name_of, params_of
from epi_kernels.engine.method import Owner
from epi_kernels.engine.settings import Groups
from epi_kernels.engine.state import ensure
from epi_kernels.engine.storages import (
    check_parameter,
    check_parameters,
    converted,
    keys_of,
    place_of,
    put,
    stored,
    wanted_dtype,
)
from epi_kernels.isolation.isolation import Isolation, signed_importance
from epi_kernels.storage import block8

# the keys of a parameter's state under which its importance may be: values; or codes of 8 bits, and their scales
VALUES, CODES, SCALES = KEYS = keys_of("importance")

KEYS_SET = frozenset(KEYS)

# the dtypes that values may have, whatever the group asks for: they are converted
_OF_VALUES = (torch.float32, torch.bfloat16)

# what a state has under these keys
Held = dict[str, Any]


class HostedIsolation(Isolation):
    """The isolation of the parameters of a base optimizer, whose state may have no clock of a parameter.

    The noise of rounding depends on the isolation clock instead, the number of steps that the optimizer has taken.
    """

    def noise_clock(self, owner: Owner, param: Tensor) -> Any:
        """Return the isolation clock, this step included."""
        return self.latest_clock(owner.param_groups)


class Guest:
    """The importance in ``state[p]`` of a base optimizer, which must not see the importance."""

    def __init__(self) -> None:
        self.emptied: set[Tensor] = set()  # parameters for which the base itself made an empty entry

    def put(self, owner: Owner, param: Tensor, held: Held) -> None:
        """Put an importance into the state of a parameter that has none.

        Raises:
            TypeError: the state of the parameter is no dict.
        """
        state = owner.state
        entry = state.get(param)
        if entry is None:
            entry = state[param] = {}
        elif not isinstance(entry, MutableMapping):
            name = name_of(param, owner.param_groups)
            raise TypeError(f"the state of {name} is a {type(entry).__name__}; the importance needs a dict")
        elif not entry:
            self.emptied.add(param)
        entry.pop(SCALES, None)  # a program may have deleted the codes alone
        entry.update(held)

    @contextmanager
    def aside(self, owner: Owner) -> Iterator[dict[Tensor, Held]]:
        """Take the importances out of the base's state while the base may look at it.

        Bases make the state of a parameter if its entry is missing, or empty. An entry that has only the importance is
        therefore removed meanwhile, or left empty if the base itself made an empty one.

        Yields:
            {parameter: what KEYS have}; what is in this dict at the end is put into the state that the base has then.
        """
        aside: dict[Tensor, Held] = {}
        state = owner.state
        for param in params_of(owner.param_groups):
            entry = state.get(param)
            if isinstance(entry, MutableMapping) and not KEYS_SET.isdisjoint(entry):
                aside[param] = {key: entry.pop(key) for key in KEYS if key in entry}
                if not entry and param not in self.emptied:
                    del state[param]
        self.emptied = set()
        try:
            yield aside
        finally:
            for param, held in aside.items():
                self.put(owner, param, held)

    def make(self, owner: Owner) -> list[tuple[Tensor, Tensor]]:
        """Make an importance for each parameter that can be protected and has none, and return these pairs.

        An importance that is kept otherwise than its group asks is converted, rounded to nearest; its locks stay.
        """
        made = []
        for group in owner.param_groups:
            setting = group.get("importance_dtype")
            for param in group["params"] if group["isolation_ratio"] > 0 else ():
                if is_lazy(param) or param.is_meta or not (param.requires_grad or param.grad is not None):
                    continue
                signed = signed_importance(owner, param, group)
                if signed is None:
                    held: Held = {}
                    ensure(held, VALUES, param, setting)
                    self.put(owner, param, held)
                    made.append((param, held[CODES if CODES in held else VALUES]))
                elif signed.dtype != (wanted_dtype(setting, param) or torch.float32):
                    _convert(owner.state[param], param, setting)
        return made

    def drop(self, owner: Owner, param: Tensor) -> None:
        """Remove the importance from the state of a parameter, and the entry too if nothing else is in it."""
        entry = owner.state.get(param, {})
        for key in KEYS:
            entry.pop(key, None)
        if not entry and param not in self.emptied:
            owner.state.pop(param, None)

    def check(self, owner: Owner) -> None:
        """Check that every importance still fits its parameter: other code may have written into the state.

        Raises:
            ValueError: a tensor of an importance is missing, or has another shape, dtype or device; the message names
                the parameter.
        """
        state = owner.state
        for group in owner.param_groups:
            for param in group["params"] if group["isolation_ratio"] > 0 else ():
                entry = state.get(param)
                if not isinstance(entry, MutableMapping) or KEYS_SET.isdisjoint(entry):
                    continue
                if CODES in entry:
                    self._check(owner, param, CODES, entry[CODES], (torch.uint8,), param.shape, local(param).shape)
                    wanted = tuple(map(block8.scales_shape, (param.shape, local(param).shape)))
                    self._check(owner, param, SCALES, entry.get(SCALES), (torch.float32,), *wanted)
                elif VALUES in entry:
                    self._check(owner, param, VALUES, entry[VALUES], _OF_VALUES, param.shape, local(param).shape)

    def _check(
        self,
        owner: Owner,
        param: Tensor,
        key: str,
        found: Any,
        dtypes: tuple[torch.dtype, ...],
        shape: tuple[int, ...],
        of_shard: tuple[int, ...],
    ) -> None:
        """Check one tensor of an importance.

        Args:
            owner: the optimizer.
            param: the parameter.
            key: of the tensor.
            found: what is under this key.
            dtypes: those that it may have.
            shape: that it must have.
            of_shard: the shape that this rank's shard of it must have.

        Raises:
            ValueError: it is something else.
        """
        if (
            isinstance(found, Tensor)
            and found.dtype in dtypes
            and found.device == param.device
            and found.shape == shape
            and local(found).shape == of_shard
        ):
            return
        what = (
            f"{found.dtype} of shape {tuple(found.shape)} on {found.device}"
            if isinstance(found, Tensor)
            else f"a {type(found).__name__}"
        )
        zero = " (0 for a new entry, which is free)" if key == VALUES else ""
        raise ValueError(
            f'state[p]["{key}"] of {name_of(param, owner.param_groups)} is {what}, and the parameter has shape '
            f"{tuple(param.shape)} on {param.device}: it must be {' or '.join(map(str, dtypes))} of shape "
            f"{tuple(shape)} there. Bring it into that form{zero}, or delete what begins with 'importance' in this "
            "entry, which starts over at 0 with nothing locked"
        )

    def base_alone(self, base: Optimizer) -> tuple[Optimizer, dict[Tensor, Held]]:
        """Return the base as it would be without this class, and the importances: {parameter: what KEYS have}.

        torch's optimizers read ``step`` from the first entry of their state when they are copied, so an entry with only
        an importance would make them fail.
        """
        state = vars(base).get("state")
        if not isinstance(state, MutableMapping):
            return base, {}  # this base keeps its state in a form of its own
        importances, bare = {}, copy.copy(state)
        for param, entry in state.items():
            if isinstance(entry, MutableMapping) and not KEYS_SET.isdisjoint(entry):
                importances[param] = {key: entry[key] for key in KEYS if key in entry}
                rest = {key: value for key, value in entry.items() if key not in KEYS}
                if rest or param in self.emptied:
                    bare[param] = rest
                else:
                    del bare[param]
        alone = object.__new__(type(base))
        vars(alone).update({**vars(base), "state": bare})
        return alone, importances


def _convert(entry: MutableMapping[str, Any], param: Tensor, setting: Any) -> None:
    """Convert the importance in the state of a parameter into the storage that `setting` asks for."""
    tensor, scales = stored(entry, VALUES)
    assert tensor is not None
    put(entry, VALUES, *converted(tensor, scales, wanted_dtype(setting, param) or torch.float32, positive=False))


def storage_settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a group that say how its importance is kept, as `epi_kernels.engine.storages` reads them.

    A base may have settings of its own under the other names that are read there. float32 is what None means here.
    """
    own = group.get("importance_dtype")
    is_float32 = isinstance(own, torch.dtype) and own == torch.float32
    return {"importance_dtype": None if is_float32 else own, "rounding_seed": group.get("rounding_seed", 0)}


def check_storages(groups: Groups, of: Groups) -> None:
    """Check that the importances of an optimizer's parameters can be kept as their groups ask.

    Args:
        groups: the groups as they are, or as they would be.
        of: the groups as the optimizer has them, which give the parameters their names.

    Raises:
        ValueError: a group asks for blocks of 8 bits, and no parameter is large enough.
        NotImplementedError: an importance is to be kept otherwise than in float32, and its parameter is float64 or
            complex, or is sharded in a way for which there are no blocks or no noise.
    """

    def name(param: Tensor) -> str:
        return name_of(param, of)

    kept = [
        {**storage_settings(group), "params": [param for param in group["params"] if not is_lazy(param)]}
        for group in groups
        if group["isolation_ratio"] > 0
    ]
    check_parameters(kept, name)
    for group in kept:
        for param in group["params"] if group["importance_dtype"] is not None else ():
            check_parameter(param, name(param), group)
            place_of(param, name(param), group, None, 0)  # raises where the shards have no place


def stepping_of(owner: Owner) -> dict[Tensor, dict[str, Any]]:
    """Return the parameters whose importance this step advances, and their groups.

    Raises:
        RuntimeError: a gradient is sparse, a parameter has no values (meta), or the parameters are not the named
            ones: DeepSpeed ZeRO has put flat partitions in their place.
    """
    stepping = {}
    for group in owner.param_groups:
        if "param_names" in group and group["params"] and not has_names(group):
            raise RuntimeError(
                "the parameters are not those that were named: DeepSpeed ZeRO has put flat partitions in their "
                "place, and each rank would choose masks of its own partition. Use EPIAdamW and its "
                "bind_deepspeed, or FSDP2 (fully_shard), or ZeRO stage 0"
            )
        for param in group["params"] if group["isolation_ratio"] > 0 else ():
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(
                    f"{name_of(param, owner.param_groups)} has a sparse gradient; importance needs dense ones. Give "
                    "its group isolation_ratio=0"
                )
            if param.is_meta:
                raise RuntimeError(
                    f"{name_of(param, owner.param_groups)} is on the meta device and has no values; materialise the "
                    'model first, by model.to_empty(device="cpu") for instance, and construct the optimizer then'
                )
            stepping[param] = group
    return stepping
