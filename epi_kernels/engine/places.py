"""Masks and selections, which belong to a parameter and follow when another object takes the parameter's place.

Wrappers put other Parameters into `param_groups`: accelerate's FSDP2 DTensors, DeepSpeed ZeRO flat partitions. A mask
kept only by Parameter object would be lost there: nothing would be frozen, and no error would say so.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels.distributed import Ranks, given, group_of, is_dtensor
from epi_kernels.engine.groups import has_names, name_of, params_of, without_wrappers
from epi_kernels.engine.method import Method, Owner
from epi_kernels.engine.settings import Groups, settings_of


@dataclass(slots=True)
class Place:
    """A parameter, where it was in the groups when they were last looked at, and what belongs to it."""

    param: Tensor  # not a weak reference: torch.utils.swap_tensors refuses a parameter that has one
    group: int
    position: int
    name: str | None
    belongs: Any = None

    def __str__(self) -> str:
        """Return what messages call the parameter."""
        return f"{self.group}.{self.position}" if self.name is None else self.name


class Places:
    """What belongs to each parameter of some groups, found by the Parameter object.

    A pickle or deepcopy keeps what belongs to each by position; `look` gives it to the parameters of the copy's groups.
    """

    def __init__(self) -> None:
        self._places: list[Place] = []  # in the order of the groups
        self._sizes: list[int] = []
        self._of: dict[int, Place] = {}  # by id, also of parameters in no group now
        self._waiting: Sequence[Any] = ()  # what a copy has, until `look`

    def __getstate__(self) -> list[Any]:
        """Return what belongs to each parameter, in the order of the groups."""
        return list(self._waiting) or [place.belongs for place in self._places]

    def __setstate__(self, belongings: list[Any]) -> None:
        """Take what `__getstate__` gave, for the groups that `look` will see."""
        vars(self).update(vars(Places()))
        self._waiting = belongings

    def at(self, param: Tensor) -> Place | None:
        """Return the place of a parameter, or None where `look` has not seen this object."""
        place = self._of.get(id(param))
        return place if place is not None and place.param is param else None

    def get(self, param: Tensor) -> Any:
        """Return what belongs to a parameter, or None."""
        place = self.at(param)
        return None if place is None else place.belongs

    def put(self, param: Tensor, belongs: Any) -> None:
        """Let this belong to a parameter that `look` has seen."""
        self._of[id(param)].belongs = belongs

    def seen(self, groups: Groups) -> bool:
        """Return whether the groups have the parameters that `look` saw, each where it was."""
        params = [param for group in groups for param in group["params"]]
        return (
            [len(group["params"]) for group in groups] == self._sizes
            and len(params) == len(self._places)
            and all(place.param is param for place, param in zip(self._places, params, strict=True))
        )

    def look(self, groups: Groups) -> None:
        """Remember which parameters are where; what belongs to one that has left stays, should it come back."""
        of = {key: place for key, place in self._of.items() if place.belongs is not None}
        self._places, waiting = [], iter(self._waiting)
        for i, group in enumerate(groups):
            names = [without_wrappers(str(name)) for name in group["param_names"]] if has_names(group) else None
            for j, param in enumerate(group["params"]):
                belongs = next(waiting, None) if self._waiting else self.get(param)
                place = Place(param, i, j, names[j] if names else None, belongs)
                self._places.append(place)
                of[id(param)] = place
        self._of, self._sizes, self._waiting = of, [len(group["params"]) for group in groups], ()

    def moved(self, groups: Groups) -> list[tuple[Place, Tensor]]:
        """Return (the place of a parameter that is gone, the object that has taken it), by name, else by position.

        Raises:
            ValueError: something belongs to a parameter that is gone, and none of the objects that came has its name,
                or its position in a group of as many parameters.
        """
        here = {id(param) for group in groups for param in group["params"]}
        gone = [place for place in self._places if id(place.param) not in here]
        count = Counter(place.name for place in gone)
        by_name = {place.name: place for place in gone if count[place.name] == 1}
        by_number = {(place.group, place.position): place for place in gone}
        alike = len(groups) == len(self._sizes)
        found, strange = [], []
        for i, group in enumerate(groups):
            named = has_names(group)
            for j, param in enumerate(group["params"]):
                if self.at(param) is not None:
                    continue
                name = without_wrappers(str(group["param_names"][j])) if named else None
                place = by_name.get(name) if named else None
                if place is None and alike and len(group["params"]) == self._sizes[i]:
                    place = by_number.get((i, j))
                    if place is not None and named and place.name is not None and count[place.name] == 1:
                        place = None  # the parameter there had another name
                if place is None:
                    strange.append(param)
                else:
                    found.append((place, param))
        taken = {id(place) for place, _ in found}
        left = [place for place in gone if place.belongs is not None and id(place) not in taken]
        if strange and left:
            raise ValueError(
                f"{left[0]} is no longer a parameter of the optimizer, and a tensor of shape "
                f"{tuple(strange[0].shape)} has come that has neither its name nor its position: its mask cannot "
                "follow. DeepSpeed ZeRO does so, which puts flat partitions there: use stage 0, or FSDP2 "
                "(fully_shard). Otherwise construct the optimizer again, with masks of the parameters that it has now"
            )
        return found


class Following(Method):
    """An abstract method with masks or selections that follow when other objects take the places of parameters."""

    def __init__(self) -> None:
        self.places = Places()
        self._ranks_compared = False  # reset when parameters, masks or a loaded state change

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what pickle and deepcopy keep; a shallow copy has places of its own."""
        vars(self).update(state, places=copy.copy(state["places"]), _ranks_compared=False)

    # What a subclass says --------------------------------------------------------------------------------------------

    def moved_to(self, owner: Owner, place: Place, param: Tensor) -> tuple[Any, dict[str, Any] | None]:
        """Return what shall belong to `param`, which has taken another parameter's `place`; change nothing.

        Returns:
            What shall belong to it, and the state that replaces the other parameter's; None: the states stay.

        Raises:
            ValueError: it does not fit.
        """
        raise NotImplementedError

    def after_move(self, owner: Owner) -> None:
        """Do what is left once parameters have been replaced."""

    def digest(self, belongs: Any) -> int | None:
        """Return a number that is equal on ranks whose masks are equal."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------

    def follow(self, owner: Owner) -> None:
        """Let everything follow parameters that other objects have replaced.

        Raises:
            ValueError: it cannot, and nothing has changed; the message names the parameter.
        """
        groups = owner.param_groups
        if self.places.seen(groups):
            return
        moved = [(place, param) for place, param in self.places.moved(groups) if place.belongs is not None]
        found = [self.moved_to(owner, place, param) for place, param in moved]
        for (place, param), (_, state) in zip(moved, found, strict=True):
            place.belongs = None
            if state is not None:
                owner.state.pop(place.param, None)
                owner.state[param] = state
        self.places.look(groups)
        for (_, param), (belongs, _) in zip(moved, found, strict=True):
            self.places.put(param, belongs)
        self.after_move(owner)
        self.compare_anew()

    def follow_to(self, owner: Owner, param: Tensor) -> None:
        """Follow if `param` was not in the groups before; for a known parameter, do not look at all the others."""
        if self.places.at(param) is None:
            self.follow(owner)

    def compare_anew(self) -> None:
        """Let the next step compare the ranks."""
        self._ranks_compared = False

    def catch_up(self, owner: Owner) -> None:
        """Follow, before anything is read, saved, loaded or copied."""
        self.follow(owner)

    def before_step(self, owner: Owner) -> None:
        """Follow, and once compare settings and masks with the ranks that have the other shards.

        Raises:
            ValueError: on every rank: they differ; the message names the first difference.
        """
        self.follow(owner)
        if self._ranks_compared:
            return
        groups = owner.param_groups
        ranks = group_of(params_of(groups), owner._process_group)
        if ranks is not None:
            said = []
            for group in groups:
                digests = {}
                for param in filter(is_dtensor, group["params"]):
                    belongs = self.places.get(param)
                    name = f"the mask of {name_of(param, groups)}"
                    digests[name] = None if belongs is None else self.digest(belongs)
                said.append({**settings_of(group), **digests})
            Ranks(ranks).agree([], said)
        self._ranks_compared = True

    def before_param(self, owner: Owner, param: Tensor) -> None:
        """Follow to the parameter."""
        self.follow_to(owner, param)

    def before_group(self, owner: Owner) -> None:
        """Follow, before a group is added; its parameters have no mask, and take no other's place."""
        self.follow(owner)

    def constructed(self, owner: Owner) -> None:
        """Remember which parameters are where; a load may have changed their names."""
        self._ranks_compared = False
        self.places.look(owner.param_groups)

    def process_group_of_copy(self, owner: Owner) -> Any:
        """Return the process group for a copy in this process, and what another process has instead."""
        return given(owner._process_group)


def check_shape(param: Tensor, name: str, kind: str, shape: torch.Size, way_out: str) -> None:
    """Check that a parameter has the shape of the mask that belongs to it.

    Raises:
        ValueError: it has not; the message names both shapes and the way out.
    """
    if param.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(param.shape)} now, and its {kind} mask {tuple(shape)}: which entries the mask "
            f"means cannot be told. {way_out}"
        )
