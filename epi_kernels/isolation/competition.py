"""Who competes for protection: the eligible parameters, their layers and budgets, and the ranks that hold the rest."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from epi_kernels.distributed import (
    AgreeAgain,
    Agreement,
    Held,
    Ranks,
    agreement,
    group_of,
    is_slice,
    local,
    shard_key,
)
from epi_kernels.engine.groups import has_names, params_of
from epi_kernels.engine.method import Owner
from epi_kernels.engine.settings import Groups, settings_of
from epi_kernels.integrations.deepspeed import Segment
from epi_kernels.isolation.layers import Grouping
from epi_kernels.isolation.refresh import Candidate
from epi_kernels.isolation.settings import SETTINGS

# (parameter, group) -> the tensor whose sign bits are the mask; None: nothing of it is or can be protected yet
Signed = Callable[[Tensor, dict[str, Any]], Tensor | None]


@dataclass
class Competitors:
    """Who competes for protection in a refresh, as far as this rank holds them."""

    agreed: Agreement
    candidates: list[Candidate] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)  # of the candidates
    untouched: list[int] = field(default_factory=list)  # layers


class Competition:
    """Who competes, in which layer and for which budget; what all ranks have agreed on.

    Args:
        grouping: of the parameters into layers.
    """

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self.segments: list[Segment] | None = None  # of flat partitions
        self.every_group: Groups = ()  # the groups that the segments count by
        self._agreed: Agreement | None = None
        self._agreed_on: tuple[Sequence[Held], Ranks] | None = None  # what this rank held then, and with whom
        self.known_ranks: tuple[Ranks | None] | None = None  # None: they were not looked for yet
        self.parted = True  # parameters have come since the ranks were last looked for
        self.unmet = True  # the ranks may have to agree before the next refresh

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep; no segments of DeepSpeed, which steps no copy."""
        return {"grouping": self.grouping}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__init__(**state)  # type: ignore[misc]

    # Ranks -----------------------------------------------------------------------------------------------------------

    def ranks(self, owner: Owner) -> Ranks | None:
        """Return the ranks among which the parameters are shared out, or None."""
        if self.known_ranks is None:
            group = group_of(params_of(owner.param_groups), owner._process_group)
            self.known_ranks = (None if group is None else Ranks(group),)
            self.parted = False
        return self.known_ranks[0]

    def part(self) -> None:
        """Forget the ranks: parameters are others now. What all agreed on holds until the others hear of it."""
        self.known_ranks = None
        self.parted = self.unmet = True

    def disagree(self) -> None:
        """Let all ranks agree anew."""
        self._agreed, self.unmet = None, True

    def meet(self, owner: Owner) -> None:
        """Agree with the other ranks, if there are any, once.

        Raises:
            ValueError: on every rank: they have other settings, or not the same parameters.
        """
        if self.ranks(owner) is not None and self._agreed is None:
            self._agree(owner, clock=0)
        self.unmet = False

    def settings_of_ranks(self, owner: Owner) -> list[dict[str, Any]]:
        """Return of each group what must be equal on all ranks."""
        return [settings_of(group, SETTINGS) for group in owner.param_groups]

    def _agree(self, owner: Owner, clock: int | Tensor) -> Agreement:
        """Return what all ranks hold; asked of them again when this rank holds something else than before."""
        ranks = self.ranks(owner)
        assert ranks is not None
        bound = self.segments is not None
        held = [piece for _, _, piece in self._pieces(owner)] if bound else [piece for _, piece in self._held(owner)]
        settings = self.settings_of_ranks(owner)
        if self._agreed is not None and self._agreed_on is not None:
            before, partners = self._agreed_on
            if partners.group is not ranks.group:
                self._agreed = None
            elif held != before:
                # the others wait for this rank's ranges, and hear it there
                nothing = torch.tensor([[math.inf, -math.inf]], dtype=torch.float32, device="cpu").repeat(
                    len(self._agreed.layers), 1
                )
                with suppress(AgreeAgain):
                    ranks.ranges(nothing, int(clock), settings, again=True)
                self._agreed = None
        if self._agreed is None:
            self._agreed = ranks.agree(held, settings)
            self._agreed_on = held, ranks
        return self._agreed

    # Competitors -----------------------------------------------------------------------------------------------------

    def competitors(
        self, owner: Owner, signed_of: Signed, grads: dict[Tensor, Tensor], clock: int | Tensor
    ) -> Competitors:
        """Return who competes for protection, in which layer and for which budget."""
        held = dict(self._held(owner)) if self.segments is None else {}
        pieces = list(held.values()) if self.segments is None else [piece for _, _, piece in self._pieces(owner)]
        found = Competitors(self._agree(owner, clock) if self.ranks(owner) else agreement([pieces], 0))
        layers = {layer: i for i, layer in enumerate(found.agreed.layers)}
        budgets = {budget: i for i, budget in enumerate(found.agreed.budgets)}
        if self.segments is not None:
            self._add_segments(owner, signed_of, found, layers, budgets)
            return found
        for param, group in self._eligible(owner.param_groups):
            piece = held[param]
            layer, signed = layers[piece.layer], signed_of(param, group)
            if signed is None:
                # never had a gradient: its importance is 0, for which no memory is spent
                found.untouched.extend([layer] if piece.entries else [])
                continue
            beta = group["importance_beta"] if group["importance"] == "ema" else float(group["betas"][1])
            found.params.append(param)
            counted = piece.name in found.agreed.owned
            found.candidates.append(
                Candidate(local(signed), grads.get(param), beta, 1.0 - beta, layer, budgets[piece.budget], counted)
            )
        return found

    def _add_segments(
        self,
        owner: Owner,
        signed_of: Signed,
        found: Competitors,
        layers: dict[str, int],
        budgets: dict[tuple[str, float], int],
    ) -> None:
        """Let every segment of a flat partition compete, in the layer of its parameter."""
        for segment, group, piece in self._pieces(owner):
            layer, signed = layers[piece.layer], signed_of(segment.flat, group)
            if signed is None:
                found.untouched.extend([layer] if piece.entries else [])
            elif piece.entries:
                part = signed[segment.start : segment.start + segment.entries]
                found.params.append(segment.flat)
                # between two steps: the importance has all gradients
                found.candidates.append(Candidate(part, None, 0.0, 1.0, layer, budgets[piece.budget]))

    def _pieces(self, owner: Owner) -> Iterator[tuple[Segment, dict[str, Any], Held]]:
        """Yield the segments of flat partitions that compete, with their groups and what the ranks hear of them."""
        ranks = self.ranks(owner)
        for segment in self.segments or ():
            group = self.every_group[segment.group]
            if group["isolation_ratio"] > 0:
                layer = self.grouping.layer(segment.name)
                scope = layer if group["scope"] == "layer" else "global"
                budget = (scope, group["isolation_ratio"])
                key = ("rank", 0 if ranks is None else ranks.rank)
                yield segment, group, Held(segment.name, key, layer, budget, segment.entries, segment.of)

    def _held(self, owner: Owner) -> Iterator[tuple[Tensor, Held]]:
        """Yield the shard that this rank has of each eligible parameter.

        Raises:
            NotImplementedError: FSDP1 has cut nothing: of what it holds nobody can tell which ranks have the same.
        """
        groups = owner.param_groups
        layers = self.grouping.of(groups)
        ranks = self.ranks(owner)
        rank = 0 if ranks is None else ranks.rank
        # alone by position, since torch takes a name twice
        names = {
            param: str(group["param_names"][j]) if ranks is not None and has_names(group) else f"{i}.{j}"
            for i, group in enumerate(groups)
            for j, param in enumerate(group["params"])
        }
        named = any("param_names" in group for group in groups)
        partitioned = owner._process_group is not None and not named
        for param, group in self._eligible(groups):
            name = f"{rank}:{names[param]}" if partitioned else names[param]
            layer = f"{rank}:{layers[param]}" if partitioned else layers[param]
            scope = layer if group["scope"] == "layer" else "global"
            if ranks is not None and ranks.size > 1 and is_slice(param) and param.dim() > 1:
                raise NotImplementedError(
                    f"{name} is whole on every rank, as FSDP1's NO_SHARD leaves it, and each would count it; use "
                    "DistributedDataParallel"
                )
            key = shard_key(param, rank, partitioned=partitioned)
            of = None if is_slice(param) else param.numel()
            yield param, Held(name, key, layer, (scope, group["isolation_ratio"]), local(param).numel(), of)

    def _eligible(self, groups: Groups) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the parameters whose entries may be protected, each once, with their groups."""
        seen = set()
        for group in groups:
            for param in group["params"]:
                shaped = not is_lazy(param)  # a lazy module gives it entries in its first forward pass
                if group["isolation_ratio"] > 0 and param.requires_grad and shaped and param not in seen:
                    seen.add(param)
                    yield param, group
