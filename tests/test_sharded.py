"""Masks, parameters and telemetry are those of one process that was given the same gradients, in every layout of ranks.

- FSDP2 with uneven and empty shards, HSDP, tensor parallel, both together, DDP, stages of a pipeline, groups of ranks.
- A rank without a gradient in a step counts the step, and takes part in its refresh.
- A planted double count of a replicated norm is refused, and past that makes the same comparison fail.
- Collectives of a refresh: 5, of a size that knows the number of layers alone. Of other steps, and of DDP: none.
- Masks follow where DTensors replace whole parameters.

What varies: EPIAdamW with its usual settings trains by gradients of a loss in every layout, on every number of ranks.
Other settings change what ranks tell each other, whatever the layout, and are tested in three. Other optimizers are
tested in each layout once. These are given gradients.
"""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharding import (
    LAYOUTS,
    SETTINGS,
    STEPS,
    Block,
    Net,
    assert_same,
    assert_same_here,
    every_layout,
    every_layout_and_size,
    every_third,
    expect,
    full,
    full_bool,
    give,
    give_both,
    layouts,
    loss_of,
    mask_of,
    model_of,
    names_of,
    optimizer_of_masks,
    pairs,
    step_both,
    train_stage,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.overrides import TorchFunctionMode

from epi_kernels import EPIAdamW, EPILion, IsolatedOptimizer, MaskedAdamW, SparseAdamW, distributed, select
from epi_kernels.isolation import competition
from epi_kernels.isolation.refresh import Refresh


@every_layout_and_size
@on_ranks()
def test_masks_are_those_of_one_process(rank: int, size: int, layout: str) -> None:
    model, whole, width = pairs(layout)
    optimizer = EPIAdamW(model.named_parameters(), **SETTINGS)
    reference = EPIAdamW(whole.named_parameters(), **SETTINGS)
    for step in range(1, STEPS + 1):
        step_both(model, optimizer, whole, reference, step, width)
        assert_same_here(model, optimizer, whole, reference)
    assert_same(model, optimizer, whole, reference)
    eligible = sum(p.numel() for p in whole.parameters())
    assert optimizer.telemetry()[-1]["eligible"] == eligible
    assert optimizer.telemetry()[-1]["protected"] == int(0.15 * eligible)


def assert_protected_alike(model: nn.Module, optimizer: Any, whole: Net, reference: Any) -> None:
    """Train both models by the same given gradients; check that their masks, parameters and telemetry are the same."""
    for step in range(1, STEPS + 1):
        give_both(model, optimizer, whole, reference, step)
        assert_same_here(model, optimizer, whole, reference)
    assert_same(model, optimizer, whole, reference)
    assert any(reference.isolation_mask(param).any() for param in whole.parameters())


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "a budget for each layer": {"scope": "layer"},
    "raw scores": {"normalize": "none", "layers": "tensor"},
    "S = exp_avg_sq": {"importance": "exp_avg_sq"},
    "histogram": {"threshold": "histogram"},
}


@pytest.mark.parametrize("settings", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
@layouts(("fsdp", 1), ("fsdp", 3), ("tp+fsdp", 4))
@on_ranks()
def test_masks_of_other_settings_are_those_of_one_process(
    rank: int, size: int, layout: str, settings: dict[str, Any]
) -> None:
    model, whole, _ = pairs(layout)
    optimizer = EPIAdamW(model.named_parameters(), **SETTINGS, **settings)
    reference = EPIAdamW(whole.named_parameters(), **SETTINGS, **settings)
    assert_protected_alike(model, optimizer, whole, reference)


@every_layout
@on_ranks()
def test_an_optimizer_that_is_wrapped_is_isolated_as_in_one_process(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    settings = {key: value for key, value in SETTINGS.items() if key != "lr"}
    optimizer, reference = (
        IsolatedOptimizer(torch.optim.SGD(one.named_parameters(), lr=0.05, momentum=0.9), **settings)
        for one in (model, whole)
    )
    assert_protected_alike(model, optimizer, whole, reference)


@layouts(("fsdp", 1), ("fsdp", 3), ("tp+fsdp", 4))
@on_ranks()
def test_lion_is_isolated_as_in_one_process(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    optimizer = EPILion(model.named_parameters(), **SETTINGS)
    reference = EPILion(whole.named_parameters(), **SETTINGS)
    assert_protected_alike(model, optimizer, whole, reference)


@every_layout
@on_ranks()
def test_masks_that_are_given_hold_as_in_one_process(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    frozen = {n: torch.arange(p.numel()).view(p.shape) % 3 == 0 for n, p in names_of(whole).items()}
    prefix = "module." if layout == "ddp" else ""
    optimizer = MaskedAdamW(model.named_parameters(), lr=0.02, frozen={prefix + n: m for n, m in frozen.items()})
    reference = MaskedAdamW(whole.named_parameters(), lr=0.02, frozen=frozen)
    for step in range(1, 4):
        give_both(model, optimizer, whole, reference, step)
    for name, param in names_of(model).items():
        assert torch.equal(full(param), names_of(whole)[name]), name
        assert torch.equal(mask_of(optimizer, param), frozen[name])


@on_ranks(3)
def test_stages_of_a_pipeline_agree_by_the_names_of_layers(rank: int, size: int) -> None:
    """Every rank has other parameters, by name, and one that all have: the ranks agree on the union of the layers."""
    torch.manual_seed(0)
    whole = nn.ModuleDict({"blocks": nn.ModuleList([Block(7, 11 + i) for i in range(size)]), "norm": nn.LayerNorm(7)})
    stage = copy.deepcopy(whole)
    mine = [(n, p) for n, p in stage.named_parameters() if n.startswith((f"blocks.{rank}.", "norm."))]
    optimizer = EPIAdamW(mine, **SETTINGS, process_group=dist.group.WORLD)
    reference = EPIAdamW(whole.named_parameters(), **SETTINGS)
    late = f"blocks.{size - 1}.up.weight"  # joins at the refresh of step 4, of which one rank alone knows
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


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "isolated"])
@on_ranks(2)
def test_a_rank_without_a_gradient_takes_part_in_the_refresh(rank: int, size: int, kind: str) -> None:
    """Every rank has an expert of its own, which not every step has a gradient for: refreshes go by steps all the same.

    A collective of the model lies between two steps: ranks that counted differently would meet there.
    """
    torch.manual_seed(0)
    whole = nn.ModuleDict({"experts": nn.ModuleList([Block(7, 11) for _ in range(size)]), "norm": nn.LayerNorm(7)})
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
            turn = name.startswith(f"experts.{step % size}.") and step % 3
            twin.grad = twin.grad if turn else None
            if name in mine:
                mine[name].grad = None if twin.grad is None else twin.grad.clone()
        optimizer.step()
        reference.step()
        seen = torch.full((size,), float(step))
        dist.all_reduce(seen)  # of the model
        assert torch.equal(seen, torch.full((size,), float(step * size)))
        for name, param in mine.items():
            assert torch.equal(param, twins[name]), (step, name)
            assert torch.equal(optimizer.isolation_mask(param), reference.isolation_mask(twins[name])), (step, name)
    assert [r["step"] for r in optimizer.telemetry()] == [r["step"] for r in reference.telemetry()] == [2, 4, 6, 8]


@layouts(("tp", 2), ("tp+fsdp", 4))
@on_ranks()
def test_a_double_count_would_be_seen(rank: int, size: int, layout: str) -> None:
    """A norm that is replicated over the ranks of tensor parallelism, counted by each: refused, or the masks differ."""
    original = distributed.shard_key

    def planted(param: Tensor, number: int, *, partitioned: bool) -> tuple[object, ...]:
        return (*original(param, number, partitioned=partitioned), number)

    competition.shard_key = planted

    def two_steps() -> tuple[Any, Any, list[bool]]:
        model, whole, width = pairs(layout)
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


@on_ranks(2)
def test_a_parameter_that_thaws_joins_on_all_ranks(rank: int, size: int) -> None:
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
        assert_same_here(model, optimizer, whole, reference)
    eligible = [record["eligible"] for record in optimizer.telemetry()]
    assert eligible[0] < eligible[1] == eligible[2] == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
@on_ranks(2)
def test_collectives_are_few_and_their_size_knows_no_parameters(rank: int, size: int, layout: str) -> None:
    counts: dict[str, list[int]] = {"reduce": [], "gather": []}
    all_reduce, all_gather_object = dist.all_reduce, dist.all_gather_object

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["reduce"].append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    def gathered(*args: Any, **kwargs: Any) -> Any:
        counts["gather"].append(1)
        return all_gather_object(*args, **kwargs)

    dist.all_reduce, dist.all_gather_object = counted, gathered
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


class Waits(TorchFunctionMode):
    """Notes what would make the host wait for a GPU: values that it reads, and values sent from pageable memory.

    Here all tensors are on the CPU, so it goes by how a tensor is made: on the host with ``device="cpu"``, and for the
    ranks with the `torch.device` of theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        reads = name in ("tolist", "item", "__bool__", "__int__", "__float__")
        by_list = name == "__getitem__" and isinstance(args[1], list)
        if reads or by_list or (name == "tensor" and kwargs.get("device") != "cpu"):
            self.seen.append(name)
        return function(*args, **kwargs)


@layouts(("tp+fsdp", 4))
@on_ranks()
def test_a_refresh_waits_for_the_device_once(rank: int, size: int, layout: str) -> None:
    refresh, seen = Refresh.run_, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        with Waits() as waits:
            found = refresh(*args, **kwargs)
        seen.append(waits.seen)
        return found

    Refresh.run_ = watched
    model, _, width = pairs(layout)
    optimizer = EPIAdamW(model.named_parameters(), **SETTINGS)
    for step in range(1, 5):
        loss_of(model, step, width).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [["tolist"], ["tolist"]]  # the ranges of all ranks


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
@on_ranks(2)
def test_gradients_that_are_partial_sums(rank: int, size: int, kind: str) -> None:
    """As of a replicated parameter behind a sharded activation: the step takes their sum."""
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(1.0, 9.0)
    placements = [Replicate()] if kind == "replicated" else [Shard(0)]
    param = nn.Parameter(distribute_tensor(whole.clone(), mesh, placements))
    param.grad = DTensor.from_local(torch.cos(whole * (rank + 1)), mesh, [Partial()])
    optimizer = EPIAdamW([("w", param)], **SETTINGS)
    optimizer.step()
    twin = nn.Parameter(whole.clone())
    twin.grad = sum(torch.cos(whole * (rank + 1)) for rank in range(size))
    EPIAdamW([("w", twin)], **SETTINGS).step()
    assert torch.equal(full(param), twin)


@on_ranks(3)
def test_whoever_is_given_a_group_of_ranks_asks_no_others(rank: int, size: int) -> None:
    """A model is on two of three ranks."""
    group = dist.new_group([0, 1])
    if rank == 2:
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


def into_shards(model: nn.Module, optimizer: Any) -> None:
    """Shard a model as accelerate's FSDP2 does it: DTensors replace the whole parameters that masks were given with."""
    names = {param: name for name, param in model.named_parameters()}
    fully_shard(model)
    for group in optimizer.param_groups:
        group["params"] = [names_of(model)[names[param]] for param in group["params"]]


@pytest.mark.parametrize("kind", ["sparse", "masked"])
@on_ranks(2)
def test_masks_of_whole_parameters_follow_into_shards(rank: int, size: int, kind: str) -> None:
    model, whole = model_of(False), model_of(False)
    optimizer, reference = optimizer_of_masks(kind, model), optimizer_of_masks(kind, whole)
    into_shards(model, optimizer)
    train_stage(names_of(model), optimizer, 1, 3)
    train_stage(names_of(whole), reference, 1, 3)
    for name, param in names_of(model).items():
        assert torch.equal(full(param), names_of(whole)[name]), name


@pytest.mark.parametrize("kind", ["sparse", "masked"])
@on_ranks(2)
def test_masks_of_shards_follow_into_shards_that_replace_them(rank: int, size: int, kind: str) -> None:
    model, whole = model_of(False), model_of(False)
    optimizer, reference = optimizer_of_masks(kind, model), optimizer_of_masks(kind, whole)
    into_shards(model, optimizer)
    # the moments of a selection follow with it; those of other parameters start anew, as under torch.optim.AdamW
    before = 3 if kind == "sparse" else 0
    train_stage(names_of(model), optimizer, 1, before)
    names = {param: name for name, param in names_of(model).items()}
    params = {name: nn.Parameter(param.detach().clone()) for param, name in names.items()}
    for group in optimizer.param_groups:
        group["params"] = [params[names[param]] for param in group["params"]]
    train_stage(params, optimizer, before + 1, 6)
    train_stage(names_of(whole), reference, 1, 6)
    for name, param in params.items():
        assert torch.equal(full(param), names_of(whole)[name]), name


@pytest.mark.parametrize("kind", ["sparse", "masked"])
@on_ranks(2)
def test_different_masks_of_whole_parameters_are_named_once_they_are_in_shards(rank: int, size: int, kind: str) -> None:
    model = model_of(False)
    masks = every_third(model)
    if rank == 1:
        masks["blocks.1.up.weight"] = ~masks["blocks.1.up.weight"]
    argument = {"trainable" if kind == "sparse" else "frozen": masks}
    optimizer = (SparseAdamW if kind == "sparse" else MaskedAdamW)(model.named_parameters(), **argument)
    into_shards(model, optimizer)
    steps = functools.partial(train_stage, names_of(model), optimizer, 1, 1)
    expect(ValueError, "the mask of blocks.1.up.weight", steps)
