"""The processes of test_sharded.py: ``python tests/ranks.py <check> <rank> <world> <store>``, one for each rank."""

import copy
import functools
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW, distributed, importance, select
from epi_kernels.delta import apply_delta
from epi_kernels.isolation import competition

STEPS = 7
SETTINGS: dict[str, Any] = {"lr": 0.02, "isolation_ratio": 0.15, "mask_interval": 2, "importance_beta": 0.5}


class Block(nn.Module):
    """Two linear layers and a norm, with sizes that do not divide by the number of ranks unless they must."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks and a scale of one entry: of most ranks it has an empty shard."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, hidden), Block(width, hidden)])
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def model_of(tensor_parallel: bool) -> Net:
    torch.manual_seed(0)
    return Net(8, 12) if tensor_parallel else Net(7, 11)


def loss_of(model: nn.Module, step: int, width: int) -> Tensor:
    torch.manual_seed(step)  # the same batch on all ranks
    return model(torch.randn(5, width)).square().mean()


def fsdp(model: Net) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def hsdp(model: Net) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tp(model: Net, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def tp_fsdp(model: Net) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    tp(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def ddp(model: Net) -> nn.Module:
    return DistributedDataParallel(model)


# layout -> (how, whether it is tensor parallel, the numbers of ranks it is for)
LAYOUTS: dict[str, tuple[Callable[[Net], nn.Module], bool, tuple[int, ...]]] = {
    "fsdp": (fsdp, False, (1, 2, 3, 4)),
    "hsdp": (hsdp, False, (2, 4)),
    "tp": (tp, True, (1, 2, 4)),
    "tp+fsdp": (tp_fsdp, True, (2, 4)),
    "ddp": (ddp, False, (1, 2, 3, 4)),
}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mask_of(optimizer: Any, param: Tensor) -> Tensor:
    """Return the mask of a whole parameter."""
    mask = optimizer.isolation_mask(param)
    return full(distributed.wrapped(mask.to(torch.uint8), param)).bool() if isinstance(param, DTensor) else mask


def names_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): param for name, param in model.named_parameters()}


def pairs(layout: str) -> tuple[nn.Module, Net, int]:
    """Return (a model in this layout, the same in one piece, its width)."""
    how, tensor_parallel, _ = LAYOUTS[layout]
    model = model_of(tensor_parallel)
    whole = copy.deepcopy(model)
    return how(model), whole, 8 if tensor_parallel else 7


def step_both(model: nn.Module, optimizer: Any, whole: Net, reference: Any, step: int, width: int) -> None:
    """Step a model in its layout, and by the same gradients one in one piece."""
    loss_of(model, step, width).backward()
    for name, param in names_of(model).items():
        names_of(whole)[name].grad = full(param.grad).detach().clone()
    optimizer.step()
    reference.step()
    optimizer.zero_grad()
    reference.zero_grad()


def assert_same(model: nn.Module, optimizer: Any, whole: Net, reference: Any) -> None:
    twins = names_of(whole)
    for name, param in names_of(model).items():
        assert torch.equal(full(param), twins[name]), name
        assert torch.equal(mask_of(optimizer, param), reference.isolation_mask(twins[name])), name
    assert optimizer.telemetry() == reference.telemetry()


def masks_are_those_of_one_process() -> None:
    """Every layout that this number of ranks has, every kind of optimizer."""
    world = dist.get_world_size()
    for layout, (_, _, worlds) in LAYOUTS.items():
        if world not in worlds:
            continue
        for settings in (
            {},
            {"scope": "layer"},
            {"normalize": "none", "layers": "tensor"},
            {"importance": "exp_avg_sq"},
            {"threshold": "histogram"},
        ):
            model, whole, width = pairs(layout)
            optimizer = EPIAdamW(model.named_parameters(), **SETTINGS, **settings)
            reference = EPIAdamW(whole.named_parameters(), **SETTINGS, **settings)
            for step in range(1, STEPS + 1):
                step_both(model, optimizer, whole, reference, step, width)
                assert_same(model, optimizer, whole, reference)
            eligible = sum(p.numel() for p in whole.parameters())
            if not settings:
                assert optimizer.telemetry()[-1]["eligible"] == eligible, layout
                assert optimizer.telemetry()[-1]["protected"] == int(0.15 * eligible), layout


def other_optimizers_are_those_of_one_process() -> None:
    world = dist.get_world_size()
    for layout, (_, _, worlds) in LAYOUTS.items():
        if world not in worlds:
            continue
        model, whole, width = pairs(layout)
        base = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        isolation = {key: SETTINGS[key] for key in ("isolation_ratio", "mask_interval", "importance_beta")}
        optimizer: Any = IsolatedOptimizer(base(model.named_parameters()), **isolation)
        reference: Any = IsolatedOptimizer(base(whole.named_parameters()), **isolation)
        for step in range(1, STEPS + 1):
            step_both(model, optimizer, whole, reference, step, width)
            assert_same(model, optimizer, whole, reference)
        model, whole, width = pairs(layout)
        frozen = {n: torch.arange(p.numel()).view(p.shape) % 3 == 0 for n, p in names_of(whole).items()}
        prefix = "module." if layout == "ddp" else ""
        optimizer = MaskedAdamW(model.named_parameters(), lr=0.02, frozen={prefix + n: m for n, m in frozen.items()})
        reference = MaskedAdamW(whole.named_parameters(), lr=0.02, frozen=frozen)
        for step in range(1, 4):
            step_both(model, optimizer, whole, reference, step, width)
        for name, param in names_of(model).items():
            assert torch.equal(full(param), names_of(whole)[name]), name
            assert torch.equal(mask_of(optimizer, param), frozen[name])


def piece_is_that_of_one_process() -> None:
    """Scores, selection and training of the selected entries."""
    world = dist.get_world_size()
    for layout, (_, _, worlds) in LAYOUTS.items():
        if world not in worlds or layout == "ddp":
            continue  # nothing is sharded: it is one process
        model, whole, width = pairs(layout)
        torch.manual_seed(9)
        batches = [(torch.randn(8, width), torch.randn(8, width)) for _ in range(2)]

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return (model(batch[0]) - batch[1]).square().mean()

        scores = importance.fisher(model, batches, loss, progress=False)
        expected = importance.fisher(whole, batches, loss, progress=False)
        for name, score in scores.items():
            torch.testing.assert_close(full(score), expected[name], rtol=1e-4, atol=1e-9)
        # ties at the threshold too: rounded, many scores are equal
        for rounded in (False, True):
            theirs = {name: (full(score) * 50).round() if rounded else full(score) for name, score in scores.items()}
            mine = {name: distributed.shard_of(theirs[name], score) for name, score in scores.items()}
            for settings in ({}, {"scope": "layer"}, {"normalize": "layer", "layers": "block"}):
                masks, masks_of_one = select.top_k(mine, 0.2, **settings), select.top_k(theirs, 0.2, **settings)
                for name, mask in masks.items():
                    assert torch.equal(full_bool(mask), masks_of_one[name]), (layout, name, settings)

        optimizer = SparseAdamW(model.named_parameters(), lr=0.02, trainable=masks)
        reference = SparseAdamW(whole.named_parameters(), lr=0.02, trainable=masks_of_one)
        start = {name: full(param).detach().clone() for name, param in names_of(model).items()}
        for step in range(1, 6):
            give(names_of(model), step)
            give(names_of(whole), step)
            optimizer.step()
            reference.step()
        delta = optimizer.delta()
        for name, param in names_of(model).items():
            assert torch.equal(full(param), names_of(whole)[name]), name
            if name in delta:
                start[name].put_(delta[name][0].long(), delta[name][1])
            assert torch.equal(start[name], full(param)), name
        again, _, _ = pairs(layout)
        apply_delta(again, delta)
        for name, param in names_of(again).items():
            assert torch.equal(full(param), names_of(whole)[name]), name
        outputs_are_scored(layout)


def outputs_are_scored(layout: str) -> None:
    model, whole, width = pairs(layout)
    batches = [torch.randn(5, width, generator=torch.Generator().manual_seed(1))]
    if layout.startswith("tp"):
        if dist.get_world_size() > (1 if layout == "tp" else 2):  # else a layer has all of its channels
            expect(
                NotImplementedError,
                "models under tensor parallelism",
                lambda: importance.output_magnitude(model, batches),
            )
        return
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


def states_of_one_process_load_into_shards() -> None:
    """Without torch.distributed.checkpoint: every rank takes its part of the whole tensors."""
    kinds: dict[str, Callable[[nn.Module], Any]] = {
        "EPI": lambda model: EPIAdamW(model.named_parameters(), **SETTINGS),
        "masked": lambda model: MaskedAdamW(model.named_parameters(), lr=0.1, frozen=every_third(model)),
        "sparse": lambda model: SparseAdamW(model.named_parameters(), lr=0.1, trainable=every_third(model)),
    }
    for kind, made in kinds.items():
        model, whole, _ = pairs("fsdp")
        reference = made(whole)
        for step in (1, 2, 3):
            give(names_of(whole), step)
            reference.step()
        with torch.no_grad():
            for name, param in names_of(model).items():
                distributed.local(param).copy_(distributed.local(distributed.shard_of(names_of(whole)[name], param)))
        optimizer = made(model)
        optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        for step in (4, 5):
            give(names_of(whole), step)
            reference.step()
            give(names_of(model), step)
            optimizer.step()
        for name, param in names_of(model).items():
            assert torch.equal(full(param), names_of(whole)[name]), (kind, name)
    replicated = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    epi = EPIAdamW(model.named_parameters(), **SETTINGS)
    for number, param in enumerate(model.parameters()):
        moments = {
            key: distribute_tensor(torch.ones(param.shape), mesh, [Replicate()]) for key in ("exp_avg", "exp_avg_sq")
        }
        replicated["state"][number] = {"step": torch.tensor(1.0), **moments}
    expect(ValueError, "exp_avg of scale is placed", lambda: epi.load_state_dict(replicated))


def every_third(model: nn.Module) -> dict[str, Tensor]:
    """Return masks of the weights alone."""
    named = [(name, param) for name, param in model.named_parameters() if name.endswith("weight")]
    return {name: torch.arange(param.numel()).view(param.shape) % 3 == 1 for name, param in named}


def full_bool(mask: Tensor) -> Tensor:
    if not isinstance(mask, DTensor):
        return mask
    return full(distributed.wrapped(mask.to_local().to(torch.uint8), mask)).bool()


def stages_of_a_pipeline() -> None:
    """Every rank has other parameters, by name, and one that all have: the ranks agree on the union of the layers."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = nn.ModuleDict({"blocks": nn.ModuleList([Block(7, 11 + i) for i in range(world)]), "norm": nn.LayerNorm(7)})
    stage = copy.deepcopy(whole)
    mine = [(n, p) for n, p in stage.named_parameters() if n.startswith((f"blocks.{rank}.", "norm."))]
    optimizer = EPIAdamW(mine, **SETTINGS, process_group=dist.group.WORLD)
    reference = EPIAdamW(whole.named_parameters(), **SETTINGS)
    late = f"blocks.{world - 1}.up.weight"  # joins at the refresh of step 4, of which one rank alone knows
    for step in range(1, STEPS + 1):
        twins = dict(whole.named_parameters())
        give(twins, step)
        twins[late].requires_grad_(step > 3)
        twins[late].grad = twins[late].grad if step > 3 else None
        for name, param in mine:
            param.requires_grad_(twins[name].requires_grad)
            param.grad = None if twins[name].grad is None else twins[name].grad.clone()
        optimizer.step()
        reference.step()
        for name, param in mine:
            assert torch.equal(param, twins[name]), name
            assert torch.equal(optimizer.isolation_mask(param), reference.isolation_mask(twins[name])), name
            assert torch.equal(optimizer.importance(param), reference.importance(twins[name])), name
    ours, theirs = optimizer.telemetry()[-1], reference.telemetry()[-1]
    assert (ours["eligible"], ours["protected"]) == (theirs["eligible"], theirs["protected"])
    by_name = {layer["layer"]: layer for layer in theirs["layers"]}
    assert {layer["layer"]: layer for layer in ours["layers"]} == by_name


def experts_whose_gradients_come_and_go(kind: str) -> None:
    """Every rank has an expert of its own, which not every step has a gradient for: refreshes go by steps all the same.

    A collective of the model lies between two steps: ranks that counted differently would meet there.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = nn.ModuleDict({"experts": nn.ModuleList([Block(7, 11) for _ in range(world)]), "norm": nn.LayerNorm(7)})
    names = [n for n, _ in whole.named_parameters() if n.startswith((f"experts.{rank}.", "norm."))]
    own = copy.deepcopy(whole)
    mine = {n: p for n, p in own.named_parameters() if n in names}

    def build(named: Any, **kwargs: Any) -> Any:
        settings = {key: value for key, value in SETTINGS.items() if key != "lr"}
        if kind == "isolated":
            return IsolatedOptimizer(torch.optim.SGD(named, lr=0.1), **settings, **kwargs)
        return EPIAdamW(named, importance=kind, **settings, **kwargs)

    optimizer, reference = build(list(mine.items()), process_group=dist.group.WORLD), build(whole.named_parameters())
    for step in range(1, 9):
        twins = dict(whole.named_parameters())
        give(twins, step)
        for name, twin in twins.items():
            # the turn of one expert; in every third step no rank has any gradient at all
            turn = name.startswith(f"experts.{step % world}.") and step % 3
            twin.grad = twin.grad if turn else None
            if name in mine:
                mine[name].grad = None if twin.grad is None else twin.grad.clone()
        optimizer.step()
        reference.step()
        seen = torch.full((world,), float(step))
        dist.all_reduce(seen)  # of the model
        assert torch.equal(seen, torch.full((world,), float(step * world)))
        for name, param in mine.items():
            assert torch.equal(param, twins[name]), (step, name)
            assert torch.equal(optimizer.isolation_mask(param), reference.isolation_mask(twins[name])), (step, name)
    assert [r["step"] for r in optimizer.telemetry()] == [r["step"] for r in reference.telemetry()] == [2, 4, 6, 8]


def a_double_count_is_seen() -> None:
    """A norm that is replicated over the ranks of tensor parallelism, counted by each: refused, or the masks differ."""
    original = distributed.shard_key

    def planted(param: Tensor, rank: int, *, partitioned: bool) -> tuple[object, ...]:
        return (*original(param, rank, partitioned=partitioned), rank)

    competition.shard_key = planted

    def two_steps() -> tuple[Any, Any, list[bool]]:
        model, whole, width = pairs("tp+fsdp" if dist.get_world_size() == 4 else "tp")
        optimizer = EPIAdamW(model.named_parameters(), **SETTINGS)
        reference = EPIAdamW(whole.named_parameters(), **SETTINGS)
        for step in (1, 2):
            step_both(model, optimizer, whole, reference, step, width)
        twins = names_of(whole)
        same = [
            torch.equal(mask_of(optimizer, p), reference.isolation_mask(twins[n])) for n, p in names_of(model).items()
        ]
        return optimizer.telemetry()[-1], reference.telemetry()[-1], same

    expect(ValueError, "named as the whole model has them", two_steps)
    distributed._check_pieces = lambda _: None
    mine, expected, same = two_steps()
    assert mine["eligible"] > expected["eligible"]
    assert not all(same)


def a_parameter_that_thaws_joins_on_all_ranks() -> None:
    model, whole, _ = pairs("fsdp")
    optimizer = EPIAdamW(model.named_parameters(), **SETTINGS)
    reference = EPIAdamW(whole.named_parameters(), **SETTINGS)
    for step in range(1, STEPS + 1):
        for one in (model, whole):
            names_of(one)["blocks.0.down.weight"].requires_grad_(step > 3)
        give(names_of(model), step)
        give(names_of(whole), step)
        for one in (model, whole):
            if step <= 3:
                names_of(one)["blocks.0.down.weight"].grad = None
        optimizer.step()
        reference.step()
        assert_same(model, optimizer, whole, reference)
    eligible = [record["eligible"] for record in optimizer.telemetry()]
    assert eligible[0] < eligible[1] == eligible[2] == sum(p.numel() for p in whole.parameters())


def collectives_are_few_and_small() -> None:
    counts: dict[str, list[int]] = {"reduce": [], "gather": []}
    all_reduce, all_gather_object = dist.all_reduce, dist.all_gather_object

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["reduce"].append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    def gathered(*args: Any, **kwargs: Any) -> Any:
        counts["gather"].append(1)
        return all_gather_object(*args, **kwargs)

    dist.all_reduce, dist.all_gather_object = counted, gathered
    for layout in ("fsdp", "ddp"):
        for width in (7, 70):
            torch.manual_seed(0)
            model = LAYOUTS[layout][0](Net(width, 11))
            optimizer = EPIAdamW(model.named_parameters(), **{**SETTINGS, "mask_interval": 3})
            for step in range(1, 7):
                loss_of(model, step, width).backward()
                counts["reduce"].clear()
                counts["gather"].clear()
                optimizer.step()
                found = counts["reduce"][:], len(counts["gather"])
                optimizer.zero_grad()
                if layout == "ddp":
                    assert found == ([], 0)
                elif step % 3:
                    assert found == ([], step == 1), found  # the ranks meet once
                else:
                    # ranges of 3 layers, whether to agree again, settings and clock twice; three digits of the
                    # threshold; counts
                    assert found == ([8 * (2 * 3 + 5), 8 * 4096, 8 * 1024, 8 * 512, 8 * 3 * 3], 0), found
    dist.all_reduce, dist.all_gather_object = all_reduce, all_gather_object


def expect(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as found:
        call()
    assert text in str(found.value), str(found.value)


def a_mismatch_raises_on_every_rank() -> None:
    rank = dist.get_rank()

    def one_step(**settings: Any) -> None:
        model, _, width = pairs("fsdp")
        optimizer = EPIAdamW(model.named_parameters(), **{**SETTINGS, **settings})
        loss_of(model, 1, width).backward()
        optimizer.step()

    last = rank == dist.get_world_size() - 1
    who = f"on rank {dist.get_world_size() - 1} and"
    expect(
        ValueError,
        f"isolation_ratio of parameter group 0 is 0.3 {who} 0.15",
        lambda: one_step(isolation_ratio=0.3 if last else 0.15),
    )
    expect(
        ValueError,
        f"isolation_ratio of parameter group 0 is 0.0 {who} 0.15",
        lambda: one_step(isolation_ratio=0.0 if last else 0.15),
    )
    expect(
        ValueError,
        f"importance_beta of parameter group 0 is 0.9 {who} 0.5",
        lambda: one_step(importance_beta=0.9 if last else 0.5),
    )
    expect(
        ValueError, f"mask_interval of parameter group 0 is 9 {who} 2", lambda: one_step(mask_interval=9 if last else 2)
    )
    expect(ValueError, f"lr of parameter group 0 is 0.5 {who} 0.02", lambda: one_step(lr=0.5 if last else 0.02))

    def another_list() -> None:
        model, _, width = pairs("fsdp")
        named = [(n, p) for n, p in model.named_parameters() if not (last and n == "blocks.0.up.weight")]
        optimizer = EPIAdamW(named, **SETTINGS)
        loss_of(model, 1, width).backward()
        optimizer.step()

    expect(ValueError, "entries of blocks.0.up.weight, which has 77; ranks [2]", another_list)

    def alone() -> None:
        model, _, width = pairs("fsdp")
        optimizer = EPIAdamW(model.named_parameters(), **{**SETTINGS, "mask_interval": 3})
        for step in (1, 2, 3):
            loss_of(model, step, width).backward()
            grads = [p.grad for p in model.parameters()]
            if step < 3:
                optimizer.step()
                optimizer.zero_grad()
        if last:
            optimizer.refresh()  # at step 2; the others refresh at step 3
        else:
            optimizer.step()
        del grads

    expect(RuntimeError, "every rank must take the same steps", alone)
    brief = dist.new_group(timeout=timedelta(seconds=3))
    model, _, _ = pairs("fsdp")
    optimizer = EPIAdamW(model.named_parameters(), **SETTINGS, process_group=brief)
    give(names_of(model), 1)
    optimizer.step()
    if last:  # and the others never
        expect(
            RuntimeError, "rank 2 waited for all ranks of the process group at the refresh at step 1", optimizer.refresh
        )
    dist.barrier()

    def changed(change: Callable[[Any, nn.Module], None]) -> None:
        model, _, _ = pairs("fsdp")
        optimizer = EPIAdamW(model.named_parameters(), **SETTINGS)
        for step in range(1, 5):
            if step == 3 and last:
                change(optimizer, model)
            give(names_of(model), step)
            optimizer.step()

    expect(
        ValueError,
        f"isolation_ratio of parameter group 0 is 0.4 {who} 0.15",
        lambda: changed(lambda optimizer, _: optimizer.param_groups[0].update(isolation_ratio=0.4)),
    )
    expect(
        ValueError,
        "entries of blocks.0.up.weight, which has 77; ranks [2]",
        lambda: changed(lambda _, model: model.blocks[0].up.weight.requires_grad_(False)),
    )
    expect(
        ValueError,
        f"lr of parameter group 0 is 0.5 {who} 0.02",
        lambda: changed(lambda optimizer, _: optimizer.param_groups[0].update(lr=0.5)),
    )
    expect(
        ValueError,
        "rank 2 has 2 parameter groups and rank 0 has 1",
        lambda: changed(
            lambda optimizer, _: optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})
        ),
    )

    def fixed(kind: Callable[..., Any], argument: str, **settings: Any) -> None:
        model, _, _ = pairs("fsdp")
        masks = every_third(model)
        if settings.pop("other_mask", False):
            masks["blocks.1.up.weight"] = ~masks["blocks.1.up.weight"]
        if settings.pop("no_mask", False):
            del masks["blocks.1.up.weight"]
        optimizer = kind(model.named_parameters(), **{argument: masks}, **settings)
        give(names_of(model), 1)
        optimizer.step()

    for kind, argument in ((SparseAdamW, "trainable"), (MaskedAdamW, "frozen")):
        expect(
            ValueError,
            f"lr of parameter group 0 is 0.5 {who} 0.02",
            lambda: fixed(kind, argument, lr=0.5 if last else 0.02),  # noqa: B023
        )
        expect(
            ValueError,
            "the mask of blocks.1.up.weight of parameter group 0 is",
            lambda: fixed(kind, argument, other_mask=last),  # noqa: B023
        )
        for lacking in (last, rank == 0):
            expect(
                ValueError,
                "the mask of blocks.1.up.weight of parameter group 0 is",
                lambda: fixed(kind, argument, no_mask=lacking),  # noqa: B023
            )

    def negative() -> None:
        scores = {name: param.detach().abs() for name, param in pairs("fsdp")[0].named_parameters()}
        if last:
            scores["blocks.0.up.weight"].to_local()[:1] = -1.0
        select.top_k(scores, 0.1)

    expect(ValueError, "blocks.0.up.weight has scores below 0", negative)

    # stages of a pipeline whose parameters have one name
    weight = nn.Parameter(torch.ones(5 if last else 4))
    weight.grad = torch.ones_like(weight)
    optimizer = EPIAdamW([("0.weight", weight)], **SETTINGS, process_group=dist.group.WORLD)
    expect(ValueError, "0.weight is of 5 entries on rank 2 and of 4 on rank 0", optimizer.step)

    twice = [{"params": [("w", nn.Parameter(torch.ones(4)))]} for _ in range(2 if last else 1)]
    groups = twice if last else [*twice, {"params": [("v", nn.Parameter(torch.ones(4)))]}]
    optimizer = EPIAdamW(groups, **SETTINGS, process_group=dist.group.WORLD)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(4)
    expect(ValueError, "rank 2 has two parameters of the name w", optimizer.step)

    def slices() -> None:
        model = FullyShardedDataParallel(model_of(False), use_orig_params=True, device_id=torch.device("cpu"))
        named = [(n, p) for n, p in model.named_parameters() if not (last and n.endswith("blocks.0.up.weight"))]
        optimizer = EPIAdamW(named, **SETTINGS)
        loss_of(model, 1, 7).backward()
        optimizer.step()

    expect(ValueError, "blocks.0.up.weight; ranks [2] do not have it", slices)


def fsdp1_and_zero() -> None:
    world = dist.get_world_size()
    # slices of flat parameters, cut at any entry
    model = model_of(False)
    whole = copy.deepcopy(model)
    sharded = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.FULL_SHARD
    )
    optimizer = EPIAdamW(sharded.named_parameters(), **SETTINGS)
    reference = EPIAdamW(whole.named_parameters(), **SETTINGS)
    for step in range(1, STEPS + 1):
        loss_of(whole, step, 7).backward()
        loss_of(sharded, step, 7).backward()
        grads: list[Any] = [None] * world
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
        masks: list[Any] = [None] * world
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

    for kind in ("ema", "exp_avg_sq"):
        zero_redundancy(kind)
    fixed_under_zero()
    refused_under_fsdp1()


def fixed_under_zero() -> None:
    """Masks by Parameter: each rank takes those of its own."""
    for kind, argument in ((MaskedAdamW, "frozen"), (SparseAdamW, "trainable")):
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


def refused_under_fsdp1() -> None:
    sharded = FullyShardedDataParallel(model_of(False), use_orig_params=True, device_id=torch.device("cpu"))
    masks = {f"_fsdp_wrapped_module.{n}": m for n, m in every_third(model_of(False)).items()}
    for kind, argument in ((MaskedAdamW, "frozen"), (SparseAdamW, "trainable")):
        named, given = sharded.named_parameters(), {argument: masks}
        expect(NotImplementedError, "is a slice that FSDP1 made", functools.partial(kind, named, **given))
    batches = [torch.randn(8, 7)]
    for model, error, text in (
        (sharded, NotImplementedError, "is a slice that FSDP1 made"),
        (DistributedDataParallel(model_of(False)), ValueError, "pass what it wraps, model.module"),
    ):
        square = functools.partial(importance.fisher, model, batches, lambda m, b: m(b).square().mean())
        expect(error, text, functools.partial(square, progress=False))
    optimizer = EPIAdamW(sharded.named_parameters(), clip_grad_norm=1.0)
    loss_of(sharded, 1, 7).backward()
    expect(NotImplementedError, "clip before the step", optimizer.step)


def replicas_of_fsdp1() -> None:
    """HYBRID_SHARD: slices do not say which are replicas, the group that shards does."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, whole = model_of(False), model_of(False)
    sharded = FullyShardedDataParallel(
        model,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
    )
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

    replicated = FullyShardedDataParallel(
        model_of(False),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.NO_SHARD,
    )
    refused = EPIAdamW(replicated.named_parameters(), **SETTINGS)
    loss_of(replicated, 1, 7).backward()
    expect(NotImplementedError, "as FSDP1's NO_SHARD leaves it", refused.step)


def zero_of(model: nn.Module, kind: str) -> ZeroRedundancyOptimizer:
    cls = functools.partial(EPIAdamW, process_group=dist.group.WORLD, layers="tensor", importance=kind)
    return ZeroRedundancyOptimizer(model.parameters(), cls, **SETTINGS)


def zero_redundancy(kind: str) -> None:
    """Whole parameters, each on one rank."""
    rank = dist.get_rank()
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


# the numbers of ranks of each stage, and the steps that it takes: none ends where a refresh is due
STAGES = ((4, 1, 5), (2, 6, 9), (1, 10, 11), (3, 12, 15))


def give(params: dict[str, nn.Parameter], step: int) -> None:
    """Set gradients that depend on the step alone, each rank its shards."""
    generator = torch.Generator().manual_seed(step)
    for param in params.values():
        grad = torch.randn(param.shape, generator=generator)
        param.grad = distributed.shard_of(grad, param)


def train_stage(params: dict[str, nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        give(params, step)
        optimizer.step()
        optimizer.zero_grad()


def resharded(kind: str) -> None:
    """Take one stage of a run: load what the stage before has saved on another number of ranks, go on, save."""
    world = dist.get_world_size()
    stage = next(i for i, (ranks, _, _) in enumerate(STAGES) if ranks == world)
    folder = Path(sys.argv[4]).parent
    model = LAYOUTS["fsdp"][0](model_of(False))
    optimizer = optimizer_of(kind, model, selects=not stage)
    options = StateDictOptions(full_state_dict=kind == "full", cpu_offload=kind == "full")
    if stage:
        parts = get_state_dict(model, optimizer, options=options)  # makes the state, by a step of zeros
        saved = {"model": parts[0], "optimizer": parts[1]}
        if kind == "full":
            saved = torch.load(folder / f"{stage - 1}.pt", weights_only=True)
        else:
            checkpoint.load(saved, checkpoint_id=folder / str(stage - 1))
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
        )
    train_stage(names_of(model), optimizer, *STAGES[stage][1:])
    parts = get_state_dict(model, optimizer, options=options)
    if kind == "full":
        if dist.get_rank() == 0:
            torch.save({"model": parts[0], "optimizer": parts[1]}, folder / f"{stage}.pt")
    else:
        checkpoint.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder / str(stage))

    whole = model_of(False)
    straight = optimizer_of(kind, whole)
    train_stage(names_of(whole), straight, 1, STAGES[stage][2])
    for name, param in names_of(model).items():
        twin = names_of(whole)[name]
        assert torch.equal(full(param), twin), name
        if kind == "sparse":
            continue
        assert torch.equal(mask_of(optimizer, param), straight.isolation_mask(twin)), name
        assert torch.equal(full(distributed.wrapped(optimizer.importance(param), param)), straight.importance(twin))
    if kind == "sparse":
        return
    assert any(straight.isolation_mask(param).any() for param in whole.parameters())
    for mine in optimizer.telemetry()[-1:]:  # a stage may have no refresh
        assert mine == straight.telemetry()[-1]


def optimizer_of(kind: str, model: nn.Module, *, selects: bool = True) -> Any:
    settings = {**SETTINGS, "mask_interval": 4}
    if kind == "sparse":
        # a checkpoint brings its selection along
        trainable = every_third(model) if selects else {}
        return SparseAdamW(model.named_parameters(), lr=0.02, trainable=trainable)
    if kind == "isolated":
        settings.pop("lr")
        return IsolatedOptimizer(torch.optim.Adagrad(model.named_parameters(), lr=0.02), **settings)
    return EPIAdamW(model.named_parameters(), **settings, importance="exp_avg_sq" if kind == "exp_avg_sq" else "ema")


class Odd(nn.Module):
    """A model with what states are missing of: parameters without gradients, frozen ones, ones without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model_of(False)
        self.unused = nn.Parameter(torch.ones(5, 3))
        self.frozen = nn.Parameter(torch.ones(5, 3), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.nothing = nn.Parameter(torch.ones(4))  # of which nothing is selected


def fixed_of(kind: str, model: nn.Module, *, selects: bool = True) -> Any:
    masks = every_third(model) if selects else {}
    if selects and kind == "sparse":
        others = {n: p for n, p in model.named_parameters() if n in ("unused", "frozen", "empty")}
        masks |= {n: torch.arange(p.numel()).view(p.shape) % 2 == 0 for n, p in others.items()}
    if kind == "sparse":
        return SparseAdamW(model.named_parameters(), lr=0.02, trainable=masks)
    # a checkpoint brings its masks along, and its loader asks which states are there
    return MaskedAdamW(
        model.named_parameters(), lr=0.02, frozen=masks or {n: ~m for n, m in every_third(model).items()}
    )


def load_by_keys(model: nn.Module, optimizer: Any, flat: dict[str, Any]) -> None:
    """Load a flat state as torchtitan does: it asks the state of each parameter for its keys."""
    names = {param: name for name, param in model.named_parameters()}
    state, groups, number = {}, [], 0
    for group in optimizer.param_groups:
        members = [names[param] for param in group["params"]]
        settings = {key: flat[f"param_groups.{members[0]}.{key}"] for key in group if key != "params"}
        groups.append({**settings, "params": list(range(number, number + len(members)))})
        for param, name in zip(group["params"], members, strict=True):
            if param.requires_grad:
                state[number] = {key: flat[f"state.{name}.{key}"] for key in optimizer.state[param]}
            number += 1
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def flat_checkpoints(kind: str) -> None:
    """Save and load flat states over torch.distributed.checkpoint, into an optimizer that was given other masks."""
    folder = Path(sys.argv[4]).parent
    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def model_now() -> nn.Module:
        model = Odd() if kind == "sparse" else model_of(False)
        return fully_shard(model)

    def without(model: nn.Module, *idle: str) -> dict[str, nn.Parameter]:
        return {name: param for name, param in names_of(model).items() if name not in idle}

    model = model_now()
    optimizer = fixed_of(kind, model)
    train_stage(without(model, "unused", "frozen", "empty"), optimizer, 1, 4)
    checkpoint.save({"o": get_optimizer_state_dict(model, optimizer, options=flat)}, checkpoint_id=folder / "flat")
    weights = {name: distributed.local(param).clone() for name, param in names_of(model).items()}
    train_stage(without(model, "frozen"), optimizer, 5, 7)
    for how in ("torch", "torchtitan"):
        other = model_now()
        for name, param in names_of(other).items():
            distributed.local(param).copy_(weights[name])
        again = fixed_of(kind, other, selects=False)
        saved = {"o": get_optimizer_state_dict(other, again, options=flat)}
        checkpoint.load(saved, checkpoint_id=folder / "flat")
        if how == "torch":
            set_optimizer_state_dict(other, again, saved["o"], options=flat)
        else:
            load_by_keys(other, again, saved["o"])
        train_stage(without(other, "frozen"), again, 5, 7)
        for name, param in without(other, "frozen").items():  # of that the loaders take no state
            twin = names_of(model)[name]
            assert torch.equal(full(param), full(twin)), (how, name)
            one, two = (
                mask_of(o, p) if kind == "masked" else o.trainable_mask(p)
                for o, p in ((optimizer, twin), (again, param))
            )
            assert torch.equal(one, two), (how, name)
        if kind == "sparse":
            assert set(again.delta()) == {n for n in optimizer.delta() if n != "frozen"}


def a_frozen_parameter_keeps_its_selection(form: str) -> None:
    """A checkpoint has no state of what requires no gradient, and the selection is then the optimizer's own."""
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    for kind in ("sparse", "masked"):
        model = fully_shard(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5)))
        optimizer = optimizer_of_masks(kind, model)
        train_stage(names_of(model), optimizer, 1, 3)
        model[0].weight.requires_grad_(False)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        again = optimizer_of_masks(kind, model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            set_optimizer_state_dict(model, again, saved, options=options)
        told = [str(one.message) for one in caught if "0.weight, which requires no gradient" in str(one.message)]
        entries = distributed.local(model[0].weight).numel()
        assert len(told) == (kind == "sparse" and entries > 1), (told, entries)
        model[0].weight.requires_grad_(True)
        masks = every_third(model)
        for name, param in names_of(model).items():
            before = full(param).clone()
            give({name: param}, 4)
            again.step()
            again.zero_grad()
            free = masks.get(name, torch.zeros_like(before, dtype=torch.bool))
            free = free if kind == "sparse" else ~free
            assert torch.equal(full(param) != before, free), (kind, name)


def optimizer_of_masks(kind: str, model: nn.Module) -> Any:
    if kind == "sparse":
        return SparseAdamW(model.named_parameters(), lr=0.02, trainable=every_third(model))
    return MaskedAdamW(model.named_parameters(), lr=0.02, frozen=every_third(model))


def masks_follow_into_shards() -> None:
    """As accelerate's FSDP2 does it: masks are given with whole parameters, which DTensors then replace."""
    for kind in ("sparse", "masked"):
        model, whole = model_of(False), model_of(False)
        optimizer, reference = optimizer_of_masks(kind, model), optimizer_of_masks(kind, whole)
        names = {param: name for name, param in model.named_parameters()}
        fully_shard(model)
        for group in optimizer.param_groups:
            group["params"] = [names_of(model)[names[param]] for param in group["params"]]
        train_stage(names_of(model), optimizer, 1, 3)
        train_stage(names_of(whole), reference, 1, 3)
        for name, param in names_of(model).items():
            assert torch.equal(full(param), names_of(whole)[name]), (kind, name)
        # ranks that were given different masks say so, as if they were given for shards
        model = model_of(False)
        masks = every_third(model)
        if dist.get_rank() == 1:
            masks["blocks.1.up.weight"] = ~masks["blocks.1.up.weight"]
        argument = {"trainable" if kind == "sparse" else "frozen": masks}
        optimizer = (SparseAdamW if kind == "sparse" else MaskedAdamW)(model.named_parameters(), **argument)
        names = {param: name for name, param in model.named_parameters()}
        fully_shard(model)
        for group in optimizer.param_groups:
            group["params"] = [names_of(model)[names[param]] for param in group["params"]]
        expect(
            ValueError,
            "the mask of blocks.1.up.weight",
            functools.partial(train_stage, names_of(model), optimizer, 1, 1),
        )


def a_rank_without_entries_keeps_the_clock() -> None:
    """Two tensors on three ranks: the third joins every refresh, over a save and a load between two of them."""
    rank = dist.get_rank()
    for interval in (2, 3):
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

    # the same around another optimizer, by slices of FSDP1: the scale is on one rank
    model = FullyShardedDataParallel(nn.Linear(1, 1, bias=False), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = IsolatedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1), isolation_ratio=0.5, mask_interval=2
    )
    for _ in range(5):
        model(torch.ones(2, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [record["step"] for record in optimizer.telemetry()] == [2, 4]


def a_part_of_the_ranks() -> None:
    """A model on two of three ranks: whoever is given their group asks no other."""
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return
    mesh = DeviceMesh.from_group(group, "cpu")
    model, whole = model_of(False), model_of(False)
    fully_shard(model, mesh=mesh)
    masks = every_third(whole)
    scores = {
        n: distributed.shard_of(p.detach().abs(), dict(model.named_parameters())[n])
        for n, p in whole.named_parameters()
    }
    chosen = select.top_k(scores, 0.1, process_group=group)
    expected = select.top_k({n: p.detach().abs() for n, p in whole.named_parameters()}, 0.1)
    for name, mask in chosen.items():
        assert torch.equal(full_bool(mask), expected[name]), name
    for kind, settings in (
        (EPIAdamW, SETTINGS),
        (MaskedAdamW, {"lr": 0.02, "frozen": masks}),
        (SparseAdamW, {"lr": 0.02, "trainable": masks}),
    ):
        optimizer = kind(model.named_parameters(), **settings, process_group=group)
        reference = kind(whole.named_parameters(), **settings)
        for step in (1, 2, 3):
            give(names_of(model), step)
            give(names_of(whole), step)
            optimizer.step()
            reference.step()
        for name, param in names_of(model).items():
            assert torch.equal(full(param), names_of(whole)[name]), (kind, name)


def gradients_that_are_partial_sums() -> None:
    """As of a replicated parameter behind a sharded activation: the step takes their sum."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for kind in ("replicated", "sharded"):
        placements = [Replicate()] if kind == "replicated" else [Shard(0)]
        whole = torch.arange(1.0, 9.0)
        param = nn.Parameter(distribute_tensor(whole.clone(), mesh, placements))
        param.grad = DTensor.from_local(whole * (dist.get_rank() + 1), mesh, [Partial()])
        optimizer = EPIAdamW([("w", param)], **SETTINGS)
        optimizer.step()
        twin = nn.Parameter(whole.clone())
        twin.grad = whole * sum(range(1, world + 1))
        EPIAdamW([("w", twin)], **SETTINGS).step()
        assert torch.equal(full(param), twin), kind


# saved in one layout, loaded in the next, two steps in each: refreshes are at 4, 8 and 12
JOURNEY = ("fsdp", "hsdp", "tp+fsdp", "plain", "tp", "fsdp")


def checkpoints_between_layouts() -> None:
    folder = Path(sys.argv[4]).parent
    for kind in ("ema", "exp_avg_sq", "isolated"):
        whole = model_of(True)
        straight = optimizer_of(kind, whole)
        for leg, layout in enumerate(JOURNEY):
            model = model_of(True)
            model = model if layout == "plain" else LAYOUTS[layout][0](model)
            optimizer = optimizer_of(kind, model)
            if leg:
                parts = get_state_dict(model, optimizer)
                saved = {"model": parts[0], "optimizer": parts[1]}
                checkpoint.load(saved, checkpoint_id=folder / f"{kind}{leg - 1}")
                set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
            for one, o in ((model, optimizer), (whole, straight)):
                train_stage(names_of(one), o, 2 * leg + 1, 2 * leg + 2)
            parts = get_state_dict(model, optimizer)
            checkpoint.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder / f"{kind}{leg}")
            for name, param in names_of(model).items():
                twin = names_of(whole)[name]
                assert torch.equal(full(param), twin), (kind, layout, name)
                assert torch.equal(mask_of(optimizer, param), straight.isolation_mask(twin)), (kind, layout, name)
        assert any(straight.isolation_mask(param).any() for param in whole.parameters())


def a_state_is_broadcast_from_rank_0() -> None:
    """Even shards, as torch asks for it."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for kind in ("ema", "exp_avg_sq", "sparse"):
        models = [fully_shard(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) for _ in range(2)]
        first = optimizer_of(kind, models[0])
        train_stage(names_of(models[0]), first, 1, 5)
        for param, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            distributed.local(twin).copy_(distributed.local(param))
        saves = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = copy.deepcopy(get_optimizer_state_dict(models[0], first, options=saves))
        second = optimizer_of(kind, models[1], selects=False)
        set_optimizer_state_dict(models[1], second, state if dist.get_rank() == 0 else {}, options=options)
        for model, optimizer in zip(models, (first, second), strict=True):
            train_stage(names_of(model), optimizer, 6, 9)
        for param, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(distributed.local(param), distributed.local(twin)), kind


def a_full_sparse_state_loads_into_one_process() -> None:
    model, whole = LAYOUTS["fsdp"][0](model_of(False)), model_of(False)
    optimizer = optimizer_of("sparse", model)
    train_stage(names_of(model), optimizer, 1, 4)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parts = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    train_stage(names_of(model), optimizer, 5, 6)
    trained = {name: full(param) for name, param in names_of(model).items()}
    if dist.get_rank() == 0:
        alone = optimizer_of("sparse", whole, selects=False)
        set_state_dict(whole, alone, model_state_dict=parts[0], optim_state_dict=parts[1])
        train_stage(names_of(whole), alone, 5, 6)
        for name, param in names_of(whole).items():
            assert torch.equal(param, trained[name]), name


def a_step_of_zeros_changes_nothing() -> None:
    model = LAYOUTS["fsdp"][0](model_of(False))
    optimizer = EPIAdamW(model.named_parameters(), **{**SETTINGS, "mask_interval": 1})
    before = {name: full(param).clone() for name, param in names_of(model).items()}
    get_state_dict(model, optimizer)
    for name, param in names_of(model).items():
        assert torch.equal(full(param), before[name])
        assert not optimizer.isolation_mask(param).any()
        assert not optimizer.importance(param).any()


def main() -> None:
    check, rank, world, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    name, *arguments = check.split(":")
    globals()[name](*arguments)
    leave()


def leave() -> None:
    """End this process once every rank has passed its check, without taking gloo's threads down one by one.

    Taking them down once ended with "terminate called without an active exception", after every check had passed.
    """
    dist.barrier()
    time.sleep(0.5)  # until the last rank is out of the barrier
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
