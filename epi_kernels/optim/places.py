"""What belongs to a parameter, a mask or a selection, and follows when another object takes the parameter's place.

Wrappers put other Parameters into `param_groups`: accelerate's FSDP2 DTensors, DeepSpeed ZeRO flat partitions. What is
kept by Parameter objects alone would be lost there, and nothing would be frozen, without a word.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epi_kernels.layers import has_names, without_wrappers
from epi_kernels.optim.groups import Groups
from epi_kernels.optim.prepared import PreparedAdamW


@dataclass(slots=True)
class Place:
    """A parameter, where it was in the groups when they were last looked at, and what belongs to it."""

    param: Tensor  # no weak reference, with which torch.utils.swap_tensors refuses a parameter
    group: int
    position: int
    name: str | None
    belongs: Any = None

    def __str__(self) -> str:
        """Return what messages call the parameter."""
        return f"{self.group}.{self.position}" if self.name is None else self.name


class Places:
    """What belongs to each parameter of some groups, found by the Parameter object.

    A pickle or deepcopy has it by position; `look` at the copy's groups gives it to their parameters.
    """

    def __init__(self) -> None:
        self._places: list[Place] = []  # in the order of the groups
        self._sizes: list[int] = []
        self._of: dict[int, Place] = {}  # by id, those included that are in no group at present
        self._waiting: Sequence[Any] = ()  # of a copy, until `look`

    def __getstate__(self) -> list[Any]:
        """Return what belongs to each parameter, in the order of the groups."""
        return [place.belongs for place in self._places]

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


class Following(PreparedAdamW):
    """An optimizer with something that belongs to parameters, and follows when other objects take their places.

    Not used itself. A subclass makes `_places` before it calls the constructor, and looks at the groups after it.
    """

    _places: Places

    def _moved_to(self, place: Place, param: Tensor) -> tuple[Any, dict[str, Any] | None]:
        """Return what belongs to `param`, which has taken a place to which something belongs; change nothing.

        Returns:
            It, and what the state of `param` shall be instead of the state of the one that is gone; None: as torch.

        Raises:
            ValueError: it does not fit.
        """
        raise NotImplementedError

    def _follow(self) -> None:
        """Let everything follow parameters that other objects have replaced.

        Raises:
            ValueError: it cannot, and nothing has changed; the message names the parameter.
        """
        if self._places.seen(self.param_groups):
            return
        moved = [(place, param) for place, param in self._places.moved(self.param_groups) if place.belongs is not None]
        found = [self._moved_to(place, param) for place, param in moved]
        for (place, param), (_, state) in zip(moved, found, strict=True):
            place.belongs = None
            if state is not None:
                self.state.pop(place.param, None)
                self.state[param] = state
        self._places.look(self.param_groups)
        for (_, param), (belongs, _) in zip(moved, found, strict=True):
            self._places.put(param, belongs)
        self._after_move()
        self._forget()

    def _follow_to(self, param: Tensor) -> None:
        """Follow if `param` is an object that was not in the groups before: no look at all others, for one of them."""
        if self._places.at(param) is None:
            self._follow()

    def _after_move(self) -> None:
        """Do what a subclass does once parameters have been replaced."""

    def _catch_up(self) -> None:
        """Follow, and do what a step leaves for later; before anything is read or saved."""
        self._follow()

    def _compare_masks(self) -> None:
        """Compare the settings and masks with those of the ranks that hold the rest, once; see `_compare_ranks`."""
        if not self._met:
            found = {p: self._places.get(p) for group in self.param_groups for p in group["params"]}
            self._compare_ranks({p: belongs.digest for p, belongs in found.items() if belongs is not None})

    def _step_alone(self, param: Tensor, group: int) -> None:
        self._follow_to(param)
        super()._step_alone(param, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; its parameters have no mask, and take no other's place."""
        if self.param_groups:
            self._follow()
        super().add_param_group(param_group)
        self._places.look(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form."""
        self._catch_up()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as `DropInAdamW` does."""
        self._catch_up()
        super().load_state_dict(state_dict)
        self._places.look(self.param_groups)  # names may be the state's now

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        self._catch_up()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, or torch a state that it loads."""
        super().__setstate__(state)
        self._places.look(self.param_groups)

    _KEPT = (*PreparedAdamW._KEPT, "_places")


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
