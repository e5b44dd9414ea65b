"""Deltas of sharded models are those of one process, with their checksums; what does not fit is refused on all ranks.

- A delta that shards have trained is applied and undone in every layout, bit for bit, with few entries communicated.
- Digests and checksums of the values before are those of the whole model.
"""

from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharding import SETTINGS, every_layout, every_sharded_layout, every_third, expect, full, give, names_of, pairs
from torch import Tensor, nn

from epi_kernels import EPIAdamW, SparseAdamW, delta, distributed, select


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(param).detach().clone() for name, param in names_of(model).items()}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, tensor in state(model).items():
        assert torch.equal(tensor, expected[name]), name


def trained(model: nn.Module, masks: dict[str, Tensor], steps: int = 3) -> delta.Delta:
    params = names_of(model)
    trainable = {params[name]: distributed.shard_of(mask, params[name]) for name, mask in masks.items()}
    optimizer = SparseAdamW(model.named_parameters(), lr=0.02, trainable=trainable)
    for step in range(1, 1 + steps):
        give(params, step)
        optimizer.step()
    return optimizer.delta()


@every_layout
@on_ranks()
def test_a_delta_of_shards_is_that_of_one_process_and_is_undone(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    start = state(whole)
    masks = every_third(whole)
    masks["scale"] = torch.tensor([True])  # of one entry: of most ranks an empty shard
    given, expected = trained(model, masks), trained(whole, masks)
    prefix = "module." if layout == "ddp" else ""
    assert given.keys() == {prefix + name for name in expected}
    for name, (positions, values) in expected.items():
        assert torch.equal(given[prefix + name][0], positions)
        assert torch.equal(given[prefix + name][1], values)
        assert given.shapes[prefix + name] == expected.shapes[name]
        assert given.before[prefix + name] == expected.before[name]
    again, _, _ = pairs(layout)
    old = delta.apply(again, given)
    assert_same(again, state(whole))
    for name, (positions, values) in old.items():
        assert torch.equal(values, start[name.removeprefix(prefix)].take(positions.long()))
    redo = delta.undo(again, old)
    assert_same(again, start)
    delta.undo(again, redo)
    assert_same(again, state(whole))


@every_sharded_layout
@on_ranks()
def test_tasks_of_shards_combine(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    base = state(whole)
    tasks = [trained(model, every_third(whole), steps) for steps in (2, 3)]
    both = delta.combine(tasks, consecutive=True)
    assert both.before == tasks[0].before
    again, _, _ = pairs(layout)
    old = delta.apply(again, both)
    assert_same(again, state(model))
    delta.undo(again, old)
    assert_same(again, base)


@every_layout
@on_ranks()
def test_the_digest_is_that_of_the_whole_model(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    assert delta.digest(model) == delta.digest(whole)


@every_sharded_layout
@on_ranks()
def test_what_does_not_fit_is_refused_on_all_ranks_and_changes_none(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    given = trained(model, every_third(whole))
    name = "blocks.0.up.weight"
    other, _, _ = pairs(layout)
    position = int(given[name][0][-1])
    delta.apply(other, {name: (torch.tensor([position]), torch.tensor([9.0]))})
    now = state(other)
    # one rank's shard has the entry
    expect(ValueError, f"{name} has other values", lambda: delta.apply(other, given))
    assert_same(other, now)
    old = delta.apply(other, dict(given))
    delta.apply(other, {name: (torch.tensor([position]), torch.tensor([9.0]))})
    expect(ValueError, "have been overwritten since", lambda: delta.undo(other, old))


@every_sharded_layout
@on_ranks()
def test_a_parameter_is_frozen_where_no_rank_has_a_selected_entry(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    masks: dict[str, Any] = {
        name: torch.zeros(param.shape, dtype=torch.bool) for name, param in names_of(whole).items()
    }
    masks["blocks.0.up.weight"].view(-1)[0] = True  # in the shard of one rank
    placed = {name: distributed.shard_of(masks[name], param) for name, param in names_of(model).items()}
    frozen = select.freeze_unselected(model, placed)
    assert set(frozen) == names_of(model).keys() - {"blocks.0.up.weight"}


@pytest.mark.parametrize("size", [2], ids=["2 ranks"])
@on_ranks()
def test_a_delta_goes_into_the_shards_of_an_fsdp_model_that_has_whole_parameters(rank: int, size: int) -> None:
    model, whole, width = pairs("fsdp")
    given = trained(whole, every_third(whole))
    with torch.no_grad():
        model(torch.randn(2, width))  # the root keeps whole parameters after a forward pass alone
    delta.apply(model, given)
    assert_same(model, state(whole))


@every_layout
@on_ranks()
def test_what_shards_have_changed_since_is_that_of_one_process(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    snapshot, base = {n: p.detach().clone() for n, p in names_of(model).items()}, state(whole)
    optimizers = [EPIAdamW(one.named_parameters(), **SETTINGS) for one in (model, whole)]
    for step in range(1, 4):
        for one, optimizer in zip((model, whole), optimizers, strict=True):
            give(names_of(one), step)
            optimizer.step()
    expected = optimizers[1].delta_since(base)
    for held in (snapshot, base):  # placed as the parameters are, and whole
        found = optimizers[0].delta_since(held)
        assert {name.removeprefix("module.") for name in found} == set(expected)
        for name, (positions, values) in found.items():
            bare = name.removeprefix("module.")
            assert torch.equal(positions, expected[bare][0])
            assert torch.equal(values, expected[bare][1])
            assert found.before[name] == expected.before[bare]
