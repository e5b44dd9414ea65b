"""Slices of flat parameters, as FSDP1 makes them, and whole parameters on single ranks, as ZeroRedundancyOptimizer has.

- Masks, parameters and telemetry are those of one process, cut at any entry, over a save and a load.
- Replicas of slices go by the group that shards; where nothing says which slices are replicas they are refused.
- A rank without entries counts the steps and joins every refresh.
- What slices cannot have is refused: masks that are given, scores, clipping inside the step.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharding import SETTINGS, STEPS, every_third, expect, loss_of, model_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import EPIAdamW, EPILion, IsolatedOptimizer, MaskedAdamW, SparseAdamW, importance


def fsdp1_of(model: nn.Module, **settings: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), **settings)


@pytest.mark.parametrize("kind", [EPIAdamW, EPILion])
@on_ranks(1, 2, 3)
def test_slices_of_fsdp1_have_the_masks_of_one_process(rank: int, size: int, kind: Any) -> None:
    # slices of flat parameters, cut at any entry
    model = model_of(False)
    whole = copy.deepcopy(model)
    sharded = fsdp1_of(model, sharding_strategy=ShardingStrategy.FULL_SHARD)
    optimizer = kind(sharded.named_parameters(), **SETTINGS)
    reference = kind(whole.named_parameters(), **SETTINGS)
    for step in range(1, STEPS + 1):
        loss_of(whole, step, 7).backward()
        loss_of(sharded, step, 7).backward()
        grads: list[Any] = [None] * size
        mine = {n: (None if p.grad is None else p.grad.clone()) for n, p in sharded.named_parameters()}
        dist.all_gather_object(grads, mine)
        for name, param in whole.named_parameters():
            key = f"_fsdp_wrapped_module.{name}"
            parts = [part[key] for part in grads if part[key] is not None]
            param.grad = torch.cat(parts).view(param.shape)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
        masks: list[Any] = [None] * size
        dist.all_gather_object(masks, {n: optimizer.isolation_mask(p) for n, p in sharded.named_parameters()})
        for name, param in whole.named_parameters():
            found = torch.cat([part[f"_fsdp_wrapped_module.{name}"].reshape(-1) for part in masks])
            assert torch.equal(found.view(param.shape), reference.isolation_mask(param)), name
    for mine, expected in zip(optimizer.telemetry(), reference.telemetry(), strict=True):
        assert {**mine, "layers": 0} == {**expected, "layers": 0}
        prefix = "_fsdp_wrapped_module."
        assert [{**layer, "layer": layer["layer"].removeprefix(prefix)} for layer in mine["layers"]] == expected[
            "layers"
        ]


@on_ranks(4)
def test_replicas_of_fsdp1_go_by_the_group_that_shards(rank: int, size: int) -> None:
    """HYBRID_SHARD: slices do not say which are replicas, the group that shards does."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, whole = model_of(False), model_of(False)
    sharded = fsdp1_of(model, device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD)
    optimizer = EPIAdamW(sharded.named_parameters(), **SETTINGS, process_group=mesh.get_group("shard"))
    reference = EPIAdamW(whole.named_parameters(), **SETTINGS)
    for step in range(1, 5):
        for one, o in ((sharded, optimizer), (whole, reference)):
            loss_of(one, step, 7).backward()
            o.step()
            o.zero_grad()
    assert [(r["eligible"], r["protected"]) for r in optimizer.telemetry()] == [
        (r["eligible"], r["protected"]) for r in reference.telemetry()
    ]


@on_ranks(2)
def test_slices_of_fsdp1_that_are_all_replicas_are_refused(rank: int, size: int) -> None:
    replicated = fsdp1_of(model_of(False), sharding_strategy=ShardingStrategy.NO_SHARD)
    refused = EPIAdamW(replicated.named_parameters(), **SETTINGS)
    loss_of(replicated, 1, 7).backward()
    expect(NotImplementedError, "as FSDP1's NO_SHARD leaves it", refused.step)


@pytest.mark.parametrize(("kind", "argument"), [(MaskedAdamW, "frozen"), (SparseAdamW, "trainable")])
@on_ranks(2)
def test_masks_that_are_given_are_refused_for_slices_of_fsdp1(rank: int, size: int, kind: Any, argument: str) -> None:
    sharded = fsdp1_of(model_of(False))
    masks = {f"_fsdp_wrapped_module.{n}": m for n, m in every_third(model_of(False)).items()}
    build = functools.partial(kind, sharded.named_parameters(), **{argument: masks})
    expect(NotImplementedError, "is a slice that FSDP1 made", build)


@pytest.mark.parametrize(
    ("wrapper", "error", "text"),
    [
        (fsdp1_of, NotImplementedError, "is a slice that FSDP1 made"),
        (DistributedDataParallel, ValueError, "pass what it wraps, model.module"),
    ],
)
@on_ranks(2)
def test_scores_are_refused_for_a_wrapped_model(
    rank: int, size: int, wrapper: Callable[[nn.Module], nn.Module], error: type[Exception], text: str
) -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    model, batches = wrapper(model_of(False)), [torch.randn(8, 7)]
    expect(error, text, lambda: importance.fisher(model, batches, loss, progress=False))


@on_ranks(2)
def test_clipping_in_the_step_is_refused_for_slices_of_fsdp1(rank: int, size: int) -> None:
    sharded = fsdp1_of(model_of(False))
    optimizer = EPIAdamW(sharded.named_parameters(), clip_grad_norm=1.0)
    loss_of(sharded, 1, 7).backward()
    expect(NotImplementedError, "clip before the step", optimizer.step)


def zero_of(model: nn.Module, kind: str) -> ZeroRedundancyOptimizer:
    cls = functools.partial(EPIAdamW, process_group=dist.group.WORLD, layers="tensor", importance=kind)
    return ZeroRedundancyOptimizer(model.parameters(), cls, **SETTINGS)


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq"])
@on_ranks(1, 2, 3, 4)
def test_whole_parameters_that_zero_gives_to_single_ranks(rank: int, size: int, kind: str) -> None:
    """A save and a load lie in the middle of an interval."""
    model, whole = model_of(False), model_of(False)
    names = [name for name, _ in model.named_parameters()]
    zero = zero_of(model, kind)
    reference = EPIAdamW(whole.named_parameters(), layers="tensor", importance=kind, **SETTINGS)
    for step in range(1, STEPS + 1):
        for one, o in ((model, zero), (whole, reference)):
            loss_of(one, step, 7).backward()
            o.step()
            o.zero_grad()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, q)
        if step == 3:  # in the middle of an interval: saved, and loaded into a new one
            zero.consolidate_state_dict(to=0)
            saved = [zero.state_dict() if rank == 0 else None]
            dist.broadcast_object_list(saved, src=0)
            zero = zero_of(model, kind)
            zero.load_state_dict(saved[0])
    own = {p for group in zero.optim.param_groups for p in group["params"]}
    for name, p, q in zip(names, model.parameters(), whole.parameters(), strict=True):
        if p in own:
            assert torch.equal(zero.optim.isolation_mask(p), reference.isolation_mask(q)), (rank, name)


@pytest.mark.parametrize(("kind", "argument"), [(MaskedAdamW, "frozen"), (SparseAdamW, "trainable")])
@on_ranks(1, 3)
def test_of_masks_by_parameter_each_rank_under_zero_takes_its_own(
    rank: int, size: int, kind: Any, argument: str
) -> None:
    model, whole = model_of(False), model_of(False)
    masks = every_third(whole)
    mine = {p: masks[n] for n, p in model.named_parameters() if n in masks}
    cls = functools.partial(kind, process_group=dist.group.WORLD, **{argument: mine})
    zero = ZeroRedundancyOptimizer(model.parameters(), cls, lr=0.02)
    reference = kind(whole.named_parameters(), lr=0.02, **{argument: masks})
    for step in (1, 2, 3):
        for one, optimizer in ((model, zero), (whole, reference)):
            loss_of(one, step, 7).backward()
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("interval", [2, 3])
@on_ranks(3)
def test_a_rank_without_entries_keeps_the_clock(rank: int, size: int, interval: int) -> None:
    """Two tensors on three ranks: the third joins every refresh, over a save and a load between two of them."""
    params, twins = ([nn.Parameter(torch.arange(1.0, n)) for n in (30, 40)] for _ in range(2))
    cls = functools.partial(EPIAdamW, process_group=dist.group.WORLD, layers="tensor")
    settings = {**SETTINGS, "mask_interval": interval}
    zero = ZeroRedundancyOptimizer(params, cls, **settings)
    reference = EPIAdamW(twins, layers="tensor", **settings)
    assert rank != 2 or not zero.optim.param_groups[0]["params"]
    for step in range(1, 9):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        zero.step()
        reference.step()
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q)
        if step == 5:
            zero.consolidate_state_dict(to=0)
            saved = [zero.state_dict() if rank == 0 else None]
            dist.broadcast_object_list(saved, src=0)
            zero = ZeroRedundancyOptimizer(params, cls, **settings)
            zero.load_state_dict(saved[0])
        if step == 7:
            zero.optim.refresh()
            reference.refresh()
    mine, expected = zero.optim.telemetry()[-1], reference.telemetry()[-1]
    assert (mine["step"], mine["protected"]) == (expected["step"], expected["protected"])


@on_ranks(3)
def test_a_rank_without_a_slice_keeps_the_clock_of_an_optimizer_that_is_wrapped(rank: int, size: int) -> None:
    """FSDP1 puts the one entry on one rank."""
    model = fsdp1_of(nn.Linear(1, 1, bias=False))
    optimizer = IsolatedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1), isolation_ratio=0.5, mask_interval=2
    )
    for _ in range(5):
        model(torch.ones(2, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [record["step"] for record in optimizer.telemetry()] == [2, 4]
