"""Who competes for protection: the eligible parameters, their layers, budgets and ranks."""

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
    Ranks,
    Shard,
    agreement,
    group_of,
    is_slice,
    local,
    shard_key,
)
from epi_kernels.engine.groups import has_names, params_of
from epi_kernels.engine.method import Owner
from epi_kernels.engine.settings import Groups, settings_of
from epi_kernels.engine.storages import DEFAULTS
from epi_kernels.isolation.deepspeed import Segment
from epi_kernels.isolation.layers import Grouping
from epi_kernels.isolation.refresh import Candidate
from epi_kernels.isolation.settings import SETTINGS
from epi_kernels.storage.noise import Place

# (parameter, group) -> the tensor whose sign bits are the mask; None: the parameter has no mask
Signed = Callable[[Tensor, dict[str, Any]], Tensor | None]

# the scales of an importance in blocks of 8 bits, else None; and where the parameter's entries lie, for the noise
Compact = tuple[Tensor | None, Place]


@dataclass
class Competitors:
    """Who competes for protection in a refresh: the tensors, or shards of tensors, that this rank has."""

    agreed: Agreement
    candidates: list[Candidate] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)  # the parameter of each candidate
    untouched: list[int] = field(default_factory=list)  # layers with entries that have no state yet


class Competition:
    """Who competes, in which layer and for which budget; and what all ranks have agreed on.

    Args:
        grouping: which layer each parameter belongs to.
    """

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self.segments: list[Segment] | None = None  # segments of DeepSpeed's flat partitions
        self.every_group: Groups = ()  # the groups to which the numbers in the segments refer
        self._agreed: Agreement | None = None
        self._agreed_on: tuple[Sequence[Shard], Ranks] | None = None  # this rank's shards then, and the ranks
        self.known_ranks: tuple[Ranks | None] | None = None  # None: not looked for yet
        self.parted = True  # parameters have come since the ranks were last looked for
        self.unmet = True  # the ranks may have to agree before the next refresh

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: no segments, since DeepSpeed never steps a copy."""
        return {"grouping": self.grouping}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__init__(**state)  # type: ignore[misc]

    # Ranks -----------------------------------------------------------------------------------------------------------

    def ranks(self, owner: Owner) -> Ranks | None:
        """Return the ranks over which the parameters are sharded, or None."""
        if self.known_ranks is None:
            group = group_of(params_of(owner.param_groups), owner._process_group)
            self.known_ranks = (None if group is None else Ranks(group),)
            self.parted = False
        return self.known_ranks[0]

    def part(self) -> None:
        """Forget the ranks, since parameters have changed; the agreement holds until the others hear of it."""
        self.known_ranks = None
        self.parted = self.unmet = True

    def disagree(self) -> None:
        """Drop the agreement, so that all ranks agree again."""
        self._agreed, self.unmet = None, True

    def meet(self, owner: Owner) -> None:
        """Agree with the other ranks, if there are any and no agreement exists yet.

        Raises:
            ValueError: on every rank: the ranks have different settings or different parameters.
        """
        if self.ranks(owner) is not None and self._agreed is None:
            self._agree(owner, clock=0)
        self.unmet = False

    def settings_of_ranks(self, owner: Owner) -> list[dict[str, Any]]:
        """Return, for each group, the settings that must be equal on all ranks.

        Replicas that kept or rounded their numbers in different ways would choose different masks.
        """
        return [settings_of(group, (*SETTINGS, *DEFAULTS)) for group in owner.param_groups]

    def _agree(self, owner: Owner, clock: int | Tensor) -> Agreement:
        """Return the agreement of all ranks; they agree again when the shards of this rank have changed."""
        ranks = self.ranks(owner)
        assert ranks is not None
        bound = self.segments is not None
        shards = [shard for _, _, shard in self._pieces(owner)] if bound else [shard for _, shard in self._held(owner)]
        settings = self.settings_of_ranks(owner)
        if self._agreed is not None and self._agreed_on is not None:
            before, partners = self._agreed_on
            if partners.group is not ranks.group:
                self._agreed = None
            elif shards != before:
                # the other ranks wait for this rank's ranges; that exchange tells them to agree again
                nothing = torch.tensor([[math.inf, -math.inf]], dtype=torch.float32, device="cpu").repeat(
                    len(self._agreed.layers), 1
                )
                with suppress(AgreeAgain):
                    ranks.ranges(nothing, int(clock), settings, again=True)
                self._agreed = None
        if self._agreed is None:
            self._agreed = ranks.agree(shards, settings)
            self._agreed_on = shards, ranks
        return self._agreed

    # Competitors -----------------------------------------------------------------------------------------------------

    def competitors(
        self,
        owner: Owner,
        signed_of: Signed,
        compact_of: Callable[[Tensor, dict[str, Any]], Compact],
        grads: dict[Tensor, Tensor],
        clock: int | Tensor,
    ) -> Competitors:
        """Return who competes for protection, in which layer and for which budget."""
        shard_of = dict(self._held(owner)) if self.segments is None else {}
        shards = list(shard_of.values()) if self.segments is None else [shard for _, _, shard in self._pieces(owner)]
        found = Competitors(self._agree(owner, clock) if self.ranks(owner) else agreement([shards], 0))
        layers = {layer: i for i, layer in enumerate(found.agreed.layers)}
        budgets = {budget: i for i, budget in enumerate(found.agreed.budgets)}
        if self.segments is not None:
            self._add_segments(owner, signed_of, found, layers, budgets)
            return found
        for param, group in self._eligible(owner.param_groups):
            shard = shard_of[param]
            layer, signed = layers[shard.layer], signed_of(param, group)
            if signed is None:
                # the parameter never had a gradient: its importance is 0 and takes no memory
                found.untouched.extend([layer] if shard.entries else [])
                continue
            beta = group["importance_beta"] if group["importance"] == "ema" else float(group["betas"][1])
            found.params.append(param)
            counted = shard.name in found.agreed.owned
            compact = compact_of(param, group) if signed.dtype in (torch.bfloat16, torch.uint8) else (None, None)
            budget = budgets[shard.budget]
            found.candidates.append(
                Candidate(local(signed), grads.get(param), beta, 1.0 - beta, layer, budget, counted, *compact)
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
        for segment, group, shard in self._pieces(owner):
            layer, signed = layers[shard.layer], signed_of(segment.flat, group)
            if signed is None:
                found.untouched.extend([layer] if shard.entries else [])
            elif shard.entries:
                part = signed[segment.start : segment.start + segment.entries]
                found.params.append(segment.flat)
                # this runs between two steps: the importance has taken in all gradients already
                found.candidates.append(Candidate(part, None, 0.0, 1.0, layer, budgets[shard.budget]))

    def _pieces(self, owner: Owner) -> Iterator[tuple[Segment, dict[str, Any], Shard]]:
        """Yield the segments of flat partitions that compete, with their groups and shards."""
        ranks = self.ranks(owner)
        for segment in self.segments or ():
            group = self.every_group[segment.group]
            if group["isolation_ratio"] > 0:
                layer = self.grouping.layer(segment.name)
                scope = layer if group["scope"] == "layer" else "global"
                budget = (scope, group["isolation_ratio"])
                key = ("rank", 0 if ranks is None else ranks.rank)
                yield segment, group, Shard(segment.name, key, layer, budget, segment.entries, segment.of)

    def _held(self, owner: Owner) -> Iterator[tuple[Tensor, Shard]]:
        """Yield the shard that this rank has of each eligible parameter.

        Raises:
            NotImplementedError: FSDP1 has not sharded a parameter, and does not say which ranks have copies of it.
        """
        groups = owner.param_groups
        layers = self.grouping.of(groups)
        ranks = self.ranks(owner)
        rank = 0 if ranks is None else ranks.rank
        # without other ranks, name by position: torch accepts the same name twice
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
            yield param, Shard(name, key, layer, (scope, group["isolation_ratio"]), local(param).numel(), of)

    def _eligible(self, groups: Groups) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the parameters whose entries may be protected, each once, with their groups."""
        seen = set()
        for group in groups:
            for param in group["params"]:
                shaped = not is_lazy(param)  # a lazy parameter gets its entries in the first forward pass
                if group["isolation_ratio"] > 0 and param.requires_grad and shaped and param not in seen:
                    seen.add(param)
                    yield param, group
