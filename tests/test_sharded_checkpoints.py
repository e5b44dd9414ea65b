"""Checkpoints of ranks go on bit for bit: on other numbers of ranks, in other layouts, in one process, and back.

- torch.distributed.checkpoint, nested and flat, and one file of whole tensors; a state that rank 0 broadcasts; a state
  of one process that each rank takes its part of, without torch.distributed.checkpoint.
- Flat checkpoints bring masks and selections along; a parameter that is frozen at a load keeps the optimizer's own.
- The step of zeros by which torch makes a state to load into changes nothing.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import needs_ranks, on_ranks, run
from sharding import (
    LAYOUTS,
    SETTINGS,
    every_third,
    expect,
    full,
    give,
    mask_of,
    model_of,
    names_of,
    optimizer_of,
    optimizer_of_masks,
    pairs,
    train_stage,
)
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW, distributed

# the numbers of ranks of each stage, and the steps that it takes: none ends where a refresh is due
STAGES = ((4, 1, 5), (2, 6, 9), (1, 10, 11), (3, 12, 15))


@needs_ranks
@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "isolated", "sparse", "full"])
def test_checkpoints_go_from_4_ranks_to_2_to_1_to_3_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """In the middle of an interval, with uneven shards; "full" is one file of whole tensors."""
    for stage, (size, _, _) in enumerate(STAGES):
        run(resharded, size, stage=stage, kind=kind, folder=tmp_path)


def resharded(rank: int, size: int, stage: int, kind: str, folder: Path) -> None:
    """Take one stage of a run: load what the stage before has saved on another number of ranks, go on, save."""
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
        if rank == 0:
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


# saved in one layout, loaded in the next, two steps in each: refreshes are at 4, 8 and 12
JOURNEY = ("fsdp", "hsdp", "tp+fsdp", "plain", "tp", "fsdp")


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "isolated"])
@on_ranks(4)
def test_checkpoints_between_layouts_go_on_bit_for_bit(rank: int, size: int, kind: str, tmp_path: Path) -> None:
    whole = model_of(True)
    straight = optimizer_of(kind, whole)
    for leg, layout in enumerate(JOURNEY):
        model = model_of(True)
        model = model if layout == "plain" else LAYOUTS[layout][0](model)
        optimizer = optimizer_of(kind, model)
        if leg:
            parts = get_state_dict(model, optimizer)
            saved = {"model": parts[0], "optimizer": parts[1]}
            checkpoint.load(saved, checkpoint_id=tmp_path / str(leg - 1))
            set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        for one, o in ((model, optimizer), (whole, straight)):
            train_stage(names_of(one), o, 2 * leg + 1, 2 * leg + 2)
        parts = get_state_dict(model, optimizer)
        checkpoint.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=tmp_path / str(leg))
        for name, param in names_of(model).items():
            twin = names_of(whole)[name]
            assert torch.equal(full(param), twin), (layout, name)
            assert torch.equal(mask_of(optimizer, param), straight.isolation_mask(twin)), (layout, name)
    assert any(straight.isolation_mask(param).any() for param in whole.parameters())


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "sparse"])
@on_ranks(2)
def test_a_state_is_broadcast_from_rank_0(rank: int, size: int, kind: str) -> None:
    """Even shards, as torch asks for it."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    models = [fully_shard(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) for _ in range(2)]
    first = optimizer_of(kind, models[0])
    train_stage(names_of(models[0]), first, 1, 5)
    for param, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
        distributed.local(twin).copy_(distributed.local(param))
    saves = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = copy.deepcopy(get_optimizer_state_dict(models[0], first, options=saves))
    second = optimizer_of(kind, models[1], selects=False)
    set_optimizer_state_dict(models[1], second, state if rank == 0 else {}, options=options)
    for model, optimizer in zip(models, (first, second), strict=True):
        train_stage(names_of(model), optimizer, 6, 9)
    for param, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(distributed.local(param), distributed.local(twin))


@on_ranks(2)
def test_a_full_sparse_state_loads_into_one_process(rank: int, size: int) -> None:
    model, whole = LAYOUTS["fsdp"][0](model_of(False)), model_of(False)
    optimizer = optimizer_of("sparse", model)
    train_stage(names_of(model), optimizer, 1, 4)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parts = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    train_stage(names_of(model), optimizer, 5, 6)
    trained = {name: full(param) for name, param in names_of(model).items()}
    if rank == 0:
        alone = optimizer_of("sparse", whole, selects=False)
        set_state_dict(whole, alone, model_state_dict=parts[0], optim_state_dict=parts[1])
        train_stage(names_of(whole), alone, 5, 6)
        for name, param in names_of(whole).items():
            assert torch.equal(param, trained[name]), name


def built(kind: str, model: nn.Module) -> Any:
    if kind == "EPI":
        return EPIAdamW(model.named_parameters(), **SETTINGS)
    return optimizer_of_masks(kind, model)


@pytest.mark.parametrize("kind", ["EPI", "masked", "sparse"])
@on_ranks(3)
def test_states_of_one_process_load_into_shards(rank: int, size: int, kind: str) -> None:
    """Without torch.distributed.checkpoint: every rank takes its part of the whole tensors."""
    model, whole, _ = pairs("fsdp")
    reference = built(kind, whole)
    train_stage(names_of(whole), reference, 1, 3)
    with torch.no_grad():
        for name, param in names_of(model).items():
            distributed.local(param).copy_(distributed.local(distributed.shard_of(names_of(whole)[name], param)))
    optimizer = built(kind, model)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for one, its in ((model, optimizer), (whole, reference)):
        train_stage(names_of(one), its, 4, 5)
    for name, param in names_of(model).items():
        assert torch.equal(full(param), names_of(whole)[name]), name


@on_ranks(2)
def test_a_state_that_is_placed_otherwise_is_refused(rank: int, size: int) -> None:
    model, _, _ = pairs("fsdp")
    optimizer = EPIAdamW(model.named_parameters(), **SETTINGS)
    replicated: dict[str, Any] = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    mesh = init_device_mesh("cpu", (size,))
    for number, param in enumerate(model.parameters()):
        moments = {
            key: distribute_tensor(torch.ones(param.shape), mesh, [Replicate()]) for key in ("exp_avg", "exp_avg_sq")
        }
        replicated["state"][number] = {"step": torch.tensor(1.0), **moments}
    expect(ValueError, "exp_avg of scale is placed", lambda: optimizer.load_state_dict(replicated))


@on_ranks(2)
def test_the_step_of_zeros_that_makes_a_state_changes_nothing(rank: int, size: int) -> None:
    model = LAYOUTS["fsdp"][0](model_of(False))
    optimizer = EPIAdamW(model.named_parameters(), **{**SETTINGS, "mask_interval": 1})
    before = {name: full(param).clone() for name, param in names_of(model).items()}
    get_state_dict(model, optimizer)
    for name, param in names_of(model).items():
        assert torch.equal(full(param), before[name])
        assert not optimizer.isolation_mask(param).any()
        assert not optimizer.importance(param).any()


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


@pytest.mark.parametrize("kind", ["sparse", "masked"])
@on_ranks(1, 2)
def test_flat_checkpoints_of_fixed_masks_go_on_bit_for_bit(rank: int, size: int, kind: str, tmp_path: Path) -> None:
    """Save and load flat states over torch.distributed.checkpoint, into an optimizer that was given other masks."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def model_now() -> nn.Module:
        model = Odd() if kind == "sparse" else model_of(False)
        return fully_shard(model)

    def without(model: nn.Module, *idle: str) -> dict[str, nn.Parameter]:
        return {name: param for name, param in names_of(model).items() if name not in idle}

    model = model_now()
    optimizer = fixed_of(kind, model)
    train_stage(without(model, "unused", "frozen", "empty"), optimizer, 1, 4)
    checkpoint.save({"o": get_optimizer_state_dict(model, optimizer, options=flat)}, checkpoint_id=tmp_path / "flat")
    weights = {name: distributed.local(param).clone() for name, param in names_of(model).items()}
    train_stage(without(model, "frozen"), optimizer, 5, 7)
    for how in ("torch", "torchtitan"):
        other = model_now()
        for name, param in names_of(other).items():
            distributed.local(param).copy_(weights[name])
        again = fixed_of(kind, other, selects=False)
        saved = {"o": get_optimizer_state_dict(other, again, options=flat)}
        checkpoint.load(saved, checkpoint_id=tmp_path / "flat")
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


@pytest.mark.parametrize("kind", ["sparse", "masked"])
@pytest.mark.parametrize("form", ["flat", "nested"])
@on_ranks(2)
def test_a_parameter_frozen_at_a_load_keeps_its_selection(rank: int, size: int, form: str, kind: str) -> None:
    """A checkpoint has no state of what requires no gradient, and the selection is then the optimizer's own."""
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
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
        assert torch.equal(full(param) != before, free), name
