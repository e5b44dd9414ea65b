"""What a step needs that does not change from step to step: prepared once, and anew where anything has changed.

A step of an optimizer of this package is a look at every tensor (has it moved? has it a gradient?), one addition that
counts all clocks, and one launch for each bundle of tensors.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from epi_kernels.contract import check_lists, shares_memory
from epi_kernels.distributed import Ranks, group_of, is_dtensor, local, local_gradient
from epi_kernels.optim.clocks import DeviceClocks, HostClocks
from epi_kernels.optim.complex import as_real
from epi_kernels.optim.drop_in import DropInAdamW
from epi_kernels.optim.groups import settings_of

_NOTHING: dict[str, Tensor] = {}

# (group, its parameters that may take part)
Members = Iterable[tuple[dict[str, Any], Sequence[Tensor]]]


@dataclass(slots=True)
class Bundle:
    """The tensors of one launch."""

    params: list[Tensor]
    groups: list[int]  # of each, its position in param_groups
    plain: bool = field(init=False)  # real tensors whose gradients are in memory, and no DTensor among them

    def __post_init__(self) -> None:
        """See whether there is anything to look behind."""
        self.plain = all(local(p) is p and not p.is_complex() and not p.grad.is_neg() for p in self.params)  # type: ignore[union-attr]

    def grads(self) -> list[Tensor]:
        """Return the gradients as an operation takes them."""
        if self.plain:
            return [param.grad for param in self.params]  # type: ignore[misc]
        return list(map(real_gradient, self.params))


@dataclass
class Prepared:
    """What was prepared for some parameters, and what it was made from."""

    seen: list[object] | None = None
    bundles: list[Any] = field(default_factory=list)  # of what a subclass's `_bundle` returns
    params: list[Tensor] = field(default_factory=list)  # of the bundles
    clocks: HostClocks | DeviceClocks = field(default_factory=lambda: HostClocks([], []))


class PreparedAdamW(DropInAdamW):
    """torch.optim.AdamW on operations that take all tensors of a device and pair of dtypes at once.

    Not used itself.
    """

    _met = False  # the other ranks, since parameters, masks or a state came

    # What a subclass says -------------------------------------------------------------------------------------------

    def _bundle(self, params: list[Tensor], groups: list[int]) -> Bundle:
        """Return the bundle of parameters of one device and pair of dtypes, of these groups."""
        raise NotImplementedError

    def _update(self, prepared: Prepared) -> None:
        """Update the parameters, their clocks counted."""
        raise NotImplementedError

    def _ensure_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Create what `param` lacks of state."""
        raise NotImplementedError

    def _moves(self, param: Tensor) -> bool:
        """Return whether a step may do anything to a parameter that has a gradient."""
        return True

    def _settings_seen(self, group: dict[str, Any]) -> tuple[object, ...]:
        """Return the settings of a group on which what is prepared depends."""
        return ()

    def _kind(self, param: Tensor) -> tuple[object, ...]:
        """Return what parameters of one bundle have in common, besides device and dtypes."""
        return ()

    def _check_layout(self, param: Tensor, group: dict[str, Any]) -> None:
        """Check what a step cannot do with a parameter; called before anything is changed.

        Raises:
            RuntimeError: the parameter is a lazily conjugated or negated view, or several of its entries share memory.
        """
        if param.is_conj() or param.is_neg():
            raise RuntimeError(
                f"{self._name(param)} is {'conjugated' if param.is_conj() else 'negated'} lazily: its values are not "
                "in memory, where a step writes. Optimize the tensor that it is a view of, or "
                "resolve_conj().resolve_neg(), a copy"
            )
        if shares_memory(local(param)):
            raise RuntimeError(
                f"{self._name(param)} is expanded, or strided over itself: several of its entries are one place in "
                "memory, and a step would write there several times; clone() it first"
            )

    # ----------------------------------------------------------------------------------------------------------------

    def _compare_ranks(self, masks: Mapping[Tensor, int]) -> None:
        """Compare the settings, and `digest_of` each DTensor's mask, with those of the ranks that hold the rest, once.

        Raises:
            ValueError: on every rank: they differ; the message names the first that does.
        """
        if self._met:
            return
        group = group_of([param for group in self.param_groups for param in group["params"]], self._process_group)
        if group is not None:
            digests = [
                {f"the mask of {self._name(param)}": masks.get(param) for param in filter(is_dtensor, one["params"])}
                for one in self.param_groups
            ]
            settings = map(settings_of, self.param_groups)
            Ranks(group).agree([], [{**one, **of_masks} for one, of_masks in zip(settings, digests, strict=True)])
        self._met = True

    def _step_alone(self, param: Tensor, group: int) -> None:
        prepared = self._alone.setdefault(param, Prepared())
        self._bring_up_to_date(prepared, [(self.param_groups[group], [param])])
        if prepared.bundles and prepared.clocks.count({}):
            self._update(prepared)

    def _forget(self) -> None:
        self._met = False
        self._prepared = Prepared()
        self._alone: dict[Tensor, Prepared] = {}

    def _bring_up_to_date(self, prepared: Prepared, members: Members, capturing: bool = False) -> None:
        """Prepare anew if anything has changed since the last step.

        Raises:
            RuntimeError: a gradient is sparse, or a graph is being captured.
        """
        members = list(members)
        seen = self._look(members)
        if seen == prepared.seen:
            return
        if capturing:
            raise RuntimeError(
                "step() is being captured, and it is not the step of before: its tensors are not prepared, or "
                "other parameters have a gradient now, or a state was loaded. Take a step outside of the capture "
                "first, with the same parameters having gradients"
            )
        self._prepare(prepared, members)
        prepared.seen = self._look(members)

    def _look(self, members: Members) -> list[object]:
        """Return what decides whether the bundles of the last step still hold: settings, addresses and layouts.

        This is all that a step does for each tensor; the rest of it was prepared.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        seen: list[object] = []
        state = self.state
        for group, params in members:
            seen.append(self._settings_seen(group))
            for param in params:
                grad = param.grad
                if grad is None or not self._moves(param):
                    seen.append(None)
                    continue
                if grad.is_sparse:
                    raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
                held, held_grad = local(param), local(grad)
                seen.append(
                    (
                        held.data_ptr(),
                        held.shape,
                        held.is_contiguous() or held.stride(),
                        held.is_neg() or held.is_conj(),
                        param.requires_grad,
                        grad.dtype,
                        grad.is_neg() or grad.is_conj(),
                        held_grad.is_contiguous() or held_grad.stride(),
                        *[local(value).data_ptr() for value in state.get(param, _NOTHING).values()],
                    )
                )
        return seen

    def _prepare(self, prepared: Prepared, members: Members) -> None:
        """Check the parameters that have a gradient, create what state they lack, and bundle them into launches."""
        prepared.seen, prepared.bundles = None, []
        of_group: dict[Tensor, int] = {}
        numbers = {id(group): i for i, group in enumerate(self.param_groups)}
        for group, params in members:
            for param in params:
                if param.grad is not None and self._moves(param):
                    of_group.setdefault(param, numbers[id(group)])
        check_lists(params=list(map(as_real, of_group)), grads=list(map(real_gradient, of_group)))
        for param, i in of_group.items():
            self._check_layout(param, self.param_groups[i])
        bundles: defaultdict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        for param, i in of_group.items():
            self._ensure_state(param, self.param_groups[i])
            key = (param.device, param.dtype, param.grad.dtype, *self._kind(param))  # type: ignore[union-attr]
            bundles[key].append(param)
        prepared.params = [param for bundle in bundles.values() for param in bundle]
        self._gather_clocks(prepared, list(bundles.values()), of_group)
        for bundle in bundles.values():
            prepared.bundles.append(self._bundle(bundle, [of_group[param] for param in bundle]))

    def _gather_clocks(self, prepared: Prepared, bundles: list[list[Tensor]], members: dict[Tensor, int]) -> None:
        """Make every ``state["step"]`` an element of the vectors of `prepared.clocks`."""
        steps = [[self.state[param]["step"] for param in bundle] for bundle in bundles]
        others = self._sleeping(members) if prepared is self._prepared else []  # alone it refreshes nothing
        if any(self._clock_device(param, self.param_groups[i]) is not None for param, i in members.items()):
            prepared.clocks = DeviceClocks(steps, others, [bundle[0].device for bundle in bundles])
        else:
            prepared.clocks = HostClocks(steps, others)
        for param, step in zip(prepared.params, prepared.clocks.elements(), strict=True):
            self.state[param]["step"] = step

    def _sleeping(self, members: Iterable[Tensor]) -> list[Tensor]:
        """Return the clocks of the parameters that do not take part in this step."""
        awake = set(members)
        return [state["step"] for param, state in self.state.items() if param not in awake and "step" in state]


def real_gradient(param: Tensor) -> Tensor:
    """Return what this rank holds of a parameter's gradient, as real numbers."""
    return as_real(local_gradient(param))
