"""The importance in the state of a base optimizer, which is not ours: put in, taken out, checked."""

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
from epi_kernels.engine.state import new_state
from epi_kernels.isolation.isolation import signed_importance


class Guest:
    """``state[p]["importance"]`` in the state of a base optimizer, which must not see the importance."""

    def __init__(self) -> None:
        self.emptied: set[Tensor] = set()  # parameters for which the base itself made an empty entry

    def put(self, owner: Owner, param: Tensor, signed: Tensor) -> None:
        """Put an importance into the state of a parameter.

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
        entry["importance"] = signed

    @contextmanager
    def aside(self, owner: Owner) -> Iterator[dict[Tensor, Tensor]]:
        """Take the importances out of the base's state while the base may look at it.

        Bases make the state of a parameter if its entry is missing, or empty. An entry that has only the importance is
        therefore removed meanwhile, or left empty if the base itself made an empty one.

        Yields:
            A dict of the importances; what is in this dict at the end is put into the state that the base has then.
        """
        aside: dict[Tensor, Tensor] = {}
        state = owner.state
        for param in params_of(owner.param_groups):
            entry = state.get(param)
            if isinstance(entry, MutableMapping) and "importance" in entry:
                aside[param] = entry.pop("importance")
                if not entry and param not in self.emptied:
                    del state[param]
        self.emptied = set()
        try:
            yield aside
        finally:
            for param, signed in aside.items():
                self.put(owner, param, signed)

    def make(self, owner: Owner) -> list[tuple[Tensor, Tensor]]:
        """Make an importance for each parameter that can be protected and has none, and return these pairs."""
        made = []
        for group in owner.param_groups:
            for param in group["params"] if group["isolation_ratio"] > 0 else ():
                stands = is_lazy(param) or param.is_meta or not (param.requires_grad or param.grad is not None)
                if not stands and signed_importance(owner, param, group) is None:
                    signed = new_state(param, "importance")
                    self.put(owner, param, signed)
                    made.append((param, signed))
        return made

    def drop(self, owner: Owner, param: Tensor) -> None:
        """Remove the importance from the state of a parameter, and the entry too if nothing else is in it."""
        entry = owner.state.get(param, {})
        entry.pop("importance", None)
        if not entry and param not in self.emptied:
            owner.state.pop(param, None)

    def check(self, owner: Owner) -> None:
        """Check that every importance still fits its parameter: other code may have written into the state.

        Raises:
            ValueError: an importance has another shape, dtype or device; the message names the parameter.
        """
        for group in owner.param_groups:
            for param in group["params"]:
                signed = signed_importance(owner, param, group)
                if signed is None:
                    continue
                wanted = (torch.float32, tuple(param.shape), tuple(local(param).shape), param.device)
                if not isinstance(signed, Tensor) or wanted != (
                    signed.dtype,
                    tuple(signed.shape),
                    tuple(local(signed).shape),
                    signed.device,
                ):
                    what = (
                        f"{signed.dtype} of shape {tuple(signed.shape)} on {signed.device}"
                        if isinstance(signed, Tensor)
                        else f"a {type(signed).__name__}"
                    )
                    name = name_of(param, owner.param_groups)
                    raise ValueError(
                        f'state[p]["importance"] of {name} is {what}, and the parameter has shape '
                        f"{tuple(param.shape)} on {param.device}: it must be torch.float32 of that shape there. Bring "
                        "it into that form (0 for a new entry, which is free), or delete it, which starts over at 0 "
                        "with nothing locked"
                    )

    def base_alone(self, base: Optimizer) -> tuple[Optimizer, dict[Tensor, Tensor]]:
        """Return the base as it would be without this class, and the importances.

        torch's optimizers read ``step`` from the first entry of their state when they are copied, so an entry with only
        an importance would make them fail.
        """
        state = vars(base).get("state")
        if not isinstance(state, MutableMapping):
            return base, {}  # this base keeps its state in a form of its own
        importances, bare = {}, copy.copy(state)
        for param, entry in state.items():
            if isinstance(entry, MutableMapping) and "importance" in entry:
                importances[param] = entry["importance"]
                rest = {key: value for key, value in entry.items() if key != "importance"}
                if rest or param in self.emptied:
                    bare[param] = rest
                else:
                    del bare[param]
        alone = object.__new__(type(base))
        vars(alone).update({**vars(base), "state": bare})
        return alone, importances


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
