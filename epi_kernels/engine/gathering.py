"""Steps of trainable entries only, with state for no other entries."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from epi_kernels import ops
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.engine.groups import name_of
from epi_kernels.engine.method import Owner
from epi_kernels.engine.plan import Bundle, Planner, Present
from epi_kernels.engine.state import check_memory
from epi_kernels.engine.storages import REST, check_parameter, check_rest, rounds
from epi_kernels.storage.noise import Place

# flags of AdamW that compact states do not support yet
REFUSED = ("amsgrad", "capturable", "differentiable")

# the key of the positions in a parameter's state: the second one for DTensors
_POSITIONS = ("indices", "trainable")

# where entries of a parameter became trainable at several times: the clock's value of each when it did
_JOINED = "joined"


@dataclass(slots=True)
class _Bundle(Bundle):
    gather: Any = field(init=False)  # of a backend; see `epi_kernels.ops.prepared_gather`
    rests: bool  # whether the weights have more bits than the parameters
    places: list[Place]  # see `Planner.places`
    rounds: bool  # whether the weights are rounded stochastically
    # for each parameter the entries that joined together: when, and where in the compact tensors, None for all
    cohorts: list[list[tuple[int, Tensor | None]]] | None = None

    def tensors(self, slots: tuple[str, ...], now: Present) -> tuple[ops.Tensors, list[Tensor]]:
        """Return the lists that the operation takes, and the positions."""
        columns = [self.column(now, key) for key in _POSITIONS if key in now.columns]
        positions = [next(one for one in each if one is not None) for each in zip(*columns, strict=True)]
        of_slots = {slot: self.column(now, slot) for slot in slots}
        rests = self.column(now, REST) if self.rests else []
        params, grads, rounds = self.params(now), self.grads(now), self.rounds
        return ops.Tensors(params, grads, of_slots, rests=rests, places=self.places, stochastic=rounds), positions


class Gathering(Planner):
    """Steps of trainable entries by `epi_kernels.ops.Gather`; the method makes the state of a parameter."""

    operation = "gather_"

    @property
    def _slots(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.rule.slots if slot.option is None)

    def run(self, owner: Owner) -> None:
        """Take a step with the gradients of the parameters."""
        plan, now = self.planned(owner, [(i, group["params"]) for i, group in enumerate(owner.param_groups)])
        if plan.bundles and plan.clocks.count({}):
            self._update(owner, plan, now)

    def run_alone(self, owner: Owner, param: Tensor, group: int) -> None:
        """Step one parameter of the group at position `group`, with its gradient."""
        plan, now = self.planned_alone(owner, param, group)
        if plan.bundles and plan.clocks.count({}):
            self._update(owner, plan, now)

    def _update(self, owner: Owner, plan: Any, now: Present) -> None:
        for number, bundle in enumerate(plan.bundles):
            if bundle.cohorts is not None:
                self._update_cohorts(owner, plan.clocks.values(number), bundle, now)
                continue
            scalars, rows = plan.clocks.scalars(number, bundle.groups, owner.param_groups, self.rule)
            tensors, positions = bundle.tensors(self._slots, now)
            bundle.gather.step_(tensors, positions, scalars, rows)
            for written in tensors.all_written():
                increment_version(written)

    def _update_cohorts(self, owner: Owner, clocks: list[float], bundle: _Bundle, now: Present) -> None:
        """Step entries with a number of steps of their own: those that joined together as a tensor of their own."""
        tensors, positions = bundle.tensors(self._slots, now)
        assert bundle.cohorts is not None
        cohorts = [(i, since, where) for i, of in enumerate(bundle.cohorts) for since, where in of]

        def parts(column: list[Any]) -> list[Any]:
            return [column[i] if where is None else column[i][where] for i, _, where in cohorts if column]

        slots, rests = {slot: parts(column) for slot, column in tensors.slots.items()}, parts(tensors.rests)
        apart = ops.Tensors(
            [tensors.params[i] for i, _, _ in cohorts],
            [tensors.grads[i] for i, _, _ in cohorts],
            slots,
            rests=rests,
            places=[tensors.places[i] for i, _, _ in cohorts] if tensors.places else [],
            stochastic=tensors.stochastic,
        )
        indices = parts(positions)
        table = [scalars_of(self.rule, owner.param_groups[bundle.groups[i]], clocks[i] - s) for i, s, _ in cohorts]
        scalars = torch.tensor(table, dtype=torch.float64, device="cpu")
        gather = ops.prepared_gather(self.rule, apart, indices, owner._backend)
        gather.step_(apart, indices, scalars, list(range(len(cohorts))))
        for whole, made in ((tensors.rests, rests), *((tensors.slots[slot], slots[slot]) for slot in slots)):
            for (i, _, where), part in zip(cohorts, made, strict=False):
                if where is None:
                    increment_version(part)
                else:
                    whole[i][where] = part  # type: ignore[index]
        increment_version(tensors.params)

    def _kind(self, owner: Owner, param: Tensor) -> tuple[object, ...]:
        # a tensor from 2^31 entries on has int64 positions: in one launch it would double those of all others
        state = owner.state[param]
        return tuple(state[key].dtype for key in _POSITIONS if key in state)

    def clock_device(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> torch.device | None:
        """Return None: the clocks run on the host."""
        return None

    def check(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check what a step cannot do with a parameter.

        Raises:
            NotImplementedError: a flag that compact states do not support was set after the group was added.
            RuntimeError: entries of the parameter share memory, or the parameter is a lazy view.
            ValueError: the parameter has another shape than its selection.
        """
        check_flags(group)
        self.method.before_check(owner, param, group)
        name = name_of(param, owner.param_groups)
        check_memory(param, name)
        check_parameter(param, name, group)
        check_rest(owner.state.get(param, {}), name, group)

    def check_options(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Check nothing: a saved group that asks for an option of a dense step is refused by `check_flags`."""

    def ensure_state(self, owner: Owner, param: Tensor, group: dict[str, Any]) -> None:
        """Let the method create the state that a parameter lacks."""
        self.method.state_made(owner, param, group)

    def _bundle(self, owner: Owner, now: Present, bundle: Bundle) -> _Bundle:
        param, group = now.params[bundle.where[0]], owner.param_groups[bundle.groups[0]]
        made = _Bundle(
            *(bundle.where, bundle.groups, bundle.plain),
            rests=REST in owner.state[param],
            places=self.places(owner, [now.params[i] for i in bundle.where], bundle.groups),
            rounds=rounds(param, group),
        )
        tensors, positions = made.tensors(self._slots, now)
        if _JOINED in now.columns:
            made.cohorts = [_cohorts(joined) for joined in bundle.column(now, _JOINED)]
        made.gather = ops.prepared_gather(self.rule, tensors, positions, owner._backend)
        return made


def _cohorts(joined: Tensor | None) -> list[tuple[int, Tensor | None]]:
    """Return when the entries of a parameter joined, and the positions of those that did so together."""
    times = [] if joined is None else joined.unique().tolist()
    if joined is None or len(times) < 2:
        return [(times[0] if times else 0, None)]
    return [(time, (joined == time).nonzero()[:, 0]) for time in times]


def check_flags(group: dict[str, Any]) -> None:
    """Check that a group asks for no flag and no storage that states of few entries do not support.

    Raises:
        NotImplementedError: it asks for such a flag; the message names the flag.
        ValueError: it asks for blocks of 8 bits.
    """
    if group.get("state_dtype") == "8bit":
        raise ValueError(
            "Invalid state_dtype: '8bit'; the moments of few entries are not kept in blocks of 8 bits: use "
            "torch.bfloat16"
        )
    for flag in REFUSED:
        if group.get(flag, False):
            raise NotImplementedError(f"{flag}={group[flag]!r} is not part of this version; leave it at False")
