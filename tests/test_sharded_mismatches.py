"""Ranks that differ, or of which one stays away, raise, each of them, and say in what.

Rank 2 of three is the one that differs. It does so from the start, or at a later step.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharding import SETTINGS, every_third, expect, give, loss_of, model_of, names_of, pairs
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW, select

FIXED = {"sparse": (SparseAdamW, "trainable"), "masked": (MaskedAdamW, "frozen")}
every_kind_of_masks = pytest.mark.parametrize("kind", FIXED)
# the setting, what rank 2 has, what the others have
settings = pytest.mark.parametrize(
    ("name", "its", "theirs"),
    [
        ("isolation_ratio", 0.3, 0.15),
        ("isolation_ratio", 0.0, 0.15),
        ("importance_beta", 0.9, 0.5),
        ("mask_interval", 9, 2),
        ("lr", 0.5, 0.02),
    ],
)


@settings
@on_ranks(3)
def test_a_setting_that_differs_is_named(rank: int, size: int, name: str, its: float, theirs: float) -> None:
    model, _, width = pairs("fsdp")
    optimizer = EPIAdamW(model.named_parameters(), **{**SETTINGS, name: its if rank == 2 else theirs})
    loss_of(model, 1, width).backward()
    expect(ValueError, f"{name} of parameter group 0 is {its} on rank 2 and {theirs}", optimizer.step)


@on_ranks(3)
def test_a_parameter_that_one_rank_has_not_given_is_named(rank: int, size: int) -> None:
    model, _, width = pairs("fsdp")
    named = [(n, p) for n, p in model.named_parameters() if not (rank == 2 and n == "blocks.0.up.weight")]
    optimizer = EPIAdamW(named, **SETTINGS)
    loss_of(model, 1, width).backward()
    expect(ValueError, "entries of blocks.0.up.weight, which has 77; ranks [2]", optimizer.step)


@on_ranks(3)
def test_a_slice_of_fsdp1_that_one_rank_has_not_given_is_named(rank: int, size: int) -> None:
    model = FullyShardedDataParallel(model_of(False), use_orig_params=True, device_id=torch.device("cpu"))
    named = [(n, p) for n, p in model.named_parameters() if not (rank == 2 and n.endswith("blocks.0.up.weight"))]
    optimizer = EPIAdamW(named, **SETTINGS)
    loss_of(model, 1, 7).backward()
    expect(ValueError, "blocks.0.up.weight; ranks [2] do not have it", optimizer.step)


@on_ranks(3)
def test_a_refresh_that_one_rank_does_a_step_early_raises(rank: int, size: int) -> None:
    model, _, width = pairs("fsdp")
    optimizer = EPIAdamW(model.named_parameters(), **{**SETTINGS, "mask_interval": 3})
    for step in (1, 2, 3):
        loss_of(model, step, width).backward()
        if step < 3:
            optimizer.step()
            optimizer.zero_grad()
    # rank 2 refreshes at step 2, the others at step 3
    expect(RuntimeError, "every rank must take the same steps", optimizer.refresh if rank == 2 else optimizer.step)


@on_ranks(3)
def test_a_refresh_that_one_rank_does_alone_says_for_whom_it_waited(rank: int, size: int) -> None:
    brief = dist.new_group(timeout=timedelta(seconds=3))
    model, _, _ = pairs("fsdp")
    optimizer = EPIAdamW(model.named_parameters(), **SETTINGS, process_group=brief)
    give(names_of(model), 1)
    optimizer.step()
    if rank == 2:  # and the others never
        text = "rank 2 waited for all ranks of the process group at the refresh at step 1"
        expect(RuntimeError, text, optimizer.refresh)
    dist.barrier()


def freeze(optimizer: EPIAdamW, model: nn.Module) -> None:
    names_of(model)["blocks.0.up.weight"].requires_grad_(False)


def add_a_group(optimizer: EPIAdamW, model: nn.Module) -> None:
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})


def raise_the_ratio(optimizer: EPIAdamW, model: nn.Module) -> None:
    optimizer.param_groups[0]["isolation_ratio"] = 0.4


def raise_the_learning_rate(optimizer: EPIAdamW, model: nn.Module) -> None:
    optimizer.param_groups[0]["lr"] = 0.5


CHANGES = {
    raise_the_ratio: "isolation_ratio of parameter group 0 is 0.4 on rank 2 and 0.15",
    freeze: "entries of blocks.0.up.weight, which has 77; ranks [2]",
    raise_the_learning_rate: "lr of parameter group 0 is 0.5 on rank 2 and 0.02",
    add_a_group: "rank 2 has 2 parameter groups and rank 0 has 1",
}


@pytest.mark.parametrize(("change", "text"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
@on_ranks(3)
def test_what_one_rank_changes_later_is_named(rank: int, size: int, change: Callable[..., None], text: str) -> None:
    model, _, _ = pairs("fsdp")
    optimizer = EPIAdamW(model.named_parameters(), **SETTINGS)

    def go_on() -> None:
        for step in range(1, 5):
            if step == 3 and rank == 2:
                change(optimizer, model)
            give(names_of(model), step)
            optimizer.step()

    expect(ValueError, text, go_on)


def a_step_by_masks(kind: str, masks: dict[str, torch.Tensor], model: nn.Module, **settings: Any) -> None:
    cls, argument = FIXED[kind]
    optimizer = cls(model.named_parameters(), **{argument: masks}, **settings)
    give(names_of(model), 1)
    optimizer.step()


@every_kind_of_masks
@on_ranks(3)
def test_a_learning_rate_that_differs_beside_masks_is_named(rank: int, size: int, kind: str) -> None:
    model, _, _ = pairs("fsdp")
    expect(
        ValueError,
        "lr of parameter group 0 is 0.5 on rank 2 and 0.02",
        lambda: a_step_by_masks(kind, every_third(model), model, lr=0.5 if rank == 2 else 0.02),
    )


@every_kind_of_masks
@on_ranks(3)
def test_a_mask_that_differs_is_named(rank: int, size: int, kind: str) -> None:
    model, _, _ = pairs("fsdp")
    masks = every_third(model)
    if rank == 2:
        masks["blocks.1.up.weight"] = ~masks["blocks.1.up.weight"]
    text = "the mask of blocks.1.up.weight of parameter group 0 is"
    expect(ValueError, text, lambda: a_step_by_masks(kind, masks, model))


@pytest.mark.parametrize("lacking", [0, 2])
@every_kind_of_masks
@on_ranks(3)
def test_a_mask_that_one_rank_has_not_is_named(rank: int, size: int, kind: str, lacking: int) -> None:
    model, _, _ = pairs("fsdp")
    masks = every_third(model)
    if rank == lacking:
        del masks["blocks.1.up.weight"]
    text = "the mask of blocks.1.up.weight of parameter group 0 is"
    expect(ValueError, text, lambda: a_step_by_masks(kind, masks, model))


@on_ranks(3)
def test_scores_below_0_on_one_rank_are_refused_on_all(rank: int, size: int) -> None:
    scores = {name: param.detach().abs() for name, param in pairs("fsdp")[0].named_parameters()}
    if rank == 2:
        scores["blocks.0.up.weight"].to_local()[:1] = -1.0
    expect(ValueError, "blocks.0.up.weight has scores below 0", lambda: select.top_k(scores, 0.1))


@on_ranks(3)
def test_parameters_of_one_name_and_other_sizes_are_named(rank: int, size: int) -> None:
    """As stages of a pipeline have them."""
    weight = nn.Parameter(torch.ones(5 if rank == 2 else 4))
    weight.grad = torch.ones_like(weight)
    optimizer = EPIAdamW([("0.weight", weight)], **SETTINGS, process_group=dist.group.WORLD)
    expect(ValueError, "0.weight is of 5 entries on rank 2 and of 4 on rank 0", optimizer.step)


@on_ranks(3)
def test_a_name_that_one_rank_has_twice_is_named(rank: int, size: int) -> None:
    groups = [{"params": [(name, nn.Parameter(torch.ones(4)))]} for name in ("w", "w" if rank == 2 else "v")]
    optimizer = EPIAdamW(groups, **SETTINGS, process_group=dist.group.WORLD)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(4)
    expect(ValueError, "rank 2 has two parameters of the name w", optimizer.step)
