"""Scores, selections and the training of selected entries are those of one process, in every layout that shards.

- Scores of gradients are near, since each rank adds up in another order; what is selected of equal scores has the same
  bits, ties at the threshold included.
- SparseAdamW trains the same bits, and a delta of the shards brings another model of the same layout to them.
- Scores of outputs leave the model in shards, and are refused where no rank has all channels of a layer.
"""

from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharding import (
    every_sharded_layout,
    every_third,
    expect,
    full,
    full_bool,
    give,
    layouts,
    loss_of,
    names_of,
    pairs,
)
from torch import Tensor, nn

from epi_kernels import SparseAdamW, distributed, importance, select
from epi_kernels.delta import apply_delta


@layouts(("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("tp", 2), ("tp", 4), ("tp+fsdp", 4))
@on_ranks()
def test_scores_are_those_of_one_process(rank: int, size: int, layout: str) -> None:
    model, whole, width = pairs(layout)
    torch.manual_seed(9)
    batches = [(torch.randn(8, width), torch.randn(8, width)) for _ in range(2)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    scores = importance.fisher(model, batches, loss, progress=False)
    expected = importance.fisher(whole, batches, loss, progress=False)
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        torch.testing.assert_close(full(score), expected[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("rounded", [False, True], ids=["", "many of them equal"])
@every_sharded_layout
@on_ranks()
def test_selections_are_those_of_one_process(rank: int, size: int, layout: str, rounded: bool) -> None:
    model, whole, _ = pairs(layout)
    torch.manual_seed(9)
    theirs = {name: torch.rand(param.shape) for name, param in whole.named_parameters()}
    if rounded:
        theirs = {name: (10 * score).round() for name, score in theirs.items()}
    mine = {name: distributed.shard_of(theirs[name], param) for name, param in names_of(model).items()}
    settings: dict[str, Any]
    for settings in ({}, {"scope": "layer"}, {"normalize": "layer", "layers": "block"}):
        masks, expected = select.top_k(mine, 0.2, **settings), select.top_k(theirs, 0.2, **settings)
        for name, mask in masks.items():
            assert torch.equal(full_bool(mask), expected[name]), (name, settings)


@every_sharded_layout
@on_ranks()
def test_selected_entries_train_as_in_one_process_and_their_delta_applies(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    trainable = every_third(whole)
    mine = {name: distributed.shard_of(mask, names_of(model)[name]) for name, mask in trainable.items()}
    optimizer = SparseAdamW(model.named_parameters(), lr=0.02, trainable=mine)
    reference = SparseAdamW(whole.named_parameters(), lr=0.02, trainable=trainable)
    start = {name: full(param).detach().clone() for name, param in names_of(model).items()}
    for step in range(1, 6):
        give(names_of(model), step)
        give(names_of(whole), step)
        optimizer.step()
        reference.step()
    delta = optimizer.delta()
    assert delta.keys() == trainable.keys()
    for name, param in names_of(model).items():
        assert torch.equal(full(param), names_of(whole)[name]), name
        if name in delta:
            start[name].put_(delta[name][0].long(), delta[name][1])
        assert torch.equal(start[name], full(param)), name
    again, _, _ = pairs(layout)
    apply_delta(again, delta)
    for name, param in names_of(again).items():
        assert torch.equal(full(param), names_of(whole)[name]), name


@layouts(("fsdp", 1), ("fsdp", 3), ("hsdp", 4))
@on_ranks()
def test_scores_of_outputs_are_those_of_one_process_and_leave_the_shards(rank: int, size: int, layout: str) -> None:
    model, whole, width = pairs(layout)
    batches = [torch.randn(5, width, generator=torch.Generator().manual_seed(1))]
    scores, expected = (importance.output_magnitude(one, batches) for one in (model, whole))
    for name, score in expected.items():
        torch.testing.assert_close(scores[name], score)
    # the model has its shards again: an optimizer that is built now trains them
    optimizer = SparseAdamW(model.named_parameters(), lr=0.1, trainable=select.top_k(scores, 0.3, scope="layer"))
    before = {name: full(param).detach().clone() for name, param in names_of(model).items()}
    loss_of(model, 1, width).backward()
    optimizer.step()
    for name, param in names_of(model).items():
        moved = (full(param) != before[name]).any()
        assert bool(moved) == (name in expected), name


@layouts(("tp", 2), ("tp+fsdp", 4))
@on_ranks()
def test_scores_of_outputs_are_refused_where_channels_are_shared_out(rank: int, size: int, layout: str) -> None:
    model, _, width = pairs(layout)
    text = "models under tensor parallelism"
    expect(NotImplementedError, text, lambda: importance.output_magnitude(model, [torch.randn(5, width)]))
