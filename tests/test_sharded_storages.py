"""In every storage, what ranks hold of parameters, states, masks and rests is what one process holds, bit for bit.

- FSDP2 with uneven shards and a rank without rows, HSDP, tensor parallel on dimensions 0 and 1, both together, shards of
  dimension 1, replicas. All are given the same gradients, and refresh their masks.
- Checkpoints in the middle of an interval go on, on other numbers of ranks, nested and flat, and in one file.
- Layouts that cut blocks, and those for which there is no noise, are refused before anything has changed.
- Planted faults make the same comparisons fail: noise by local offsets, and blocks that cross a row.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import storing
import torch
from ranks import needs_ranks, on_ranks, run
from sharding import expect, layouts
from states import same_state
from storing import BFLOAT16, CASES, SOME_CASES, STORAGES, assert_holds, model_of, named, optimizer_of, train
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import EPIAdamW, EPILion, distributed
from epi_kernels.engine import storages
from epi_kernels.storage import block8

STEPS = 3  # a refresh at the second


# Layouts -------------------------------------------------------------------------------------------------------------


def fsdp(model: nn.Module, size: int) -> nn.Module:
    return fully_shard(model)


def hsdp(model: nn.Module, size: int) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))


def tp(model: nn.Module, size: int, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (size,))
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tp_fsdp(model: nn.Module, size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    return fully_shard(tp(model, size, mesh["tp"]), mesh=mesh["dp"])


def columns(model: nn.Module, size: int) -> nn.Module:
    """Shard the second dimension of `down`, at a multiple of 64, by FSDP2."""
    down = model.down.weight
    return fully_shard(model, shard_placement_fn=lambda param: Shard(1) if param is down else None)


def ddp(model: nn.Module, size: int) -> nn.Module:
    return DistributedDataParallel(model)


LAYOUTS = {"fsdp": fsdp, "hsdp": hsdp, "tp": tp, "tp+fsdp": tp_fsdp, "columns": columns, "ddp": ddp}


def saved(cases: Sequence[tuple[str, str]], folder: Path) -> Path:
    """Return a file of what one process holds in some cases after all steps."""
    found = {}
    for kind, storage in cases:
        model = model_of()
        optimizer = optimizer_of(kind, model, **STORAGES[storage])
        train(named(model), optimizer, 1, STEPS)
        found[kind, storage] = storing.contents(model, optimizer)
    torch.save(found, folder / "expected.pt")
    return folder / "expected.pt"


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(SOME_CASES, tmp_path_factory.mktemp("some"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved([case for case in CASES if case not in SOME_CASES], tmp_path_factory.mktemp("others"))


def assert_all_hold(layout: str, size: int, expected: Path) -> None:
    for (kind, storage), whole in torch.load(expected).items():
        model = LAYOUTS[layout](model_of(), size)
        optimizer = optimizer_of(kind, model, **STORAGES[storage])
        train(named(model), optimizer, 1, STEPS)
        try:
            assert_holds(model, optimizer, whole)
        except AssertionError as error:
            raise AssertionError(f"{kind} in {storage}: {error}") from error


@layouts(("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("tp", 2), ("tp+fsdp", 4), ("columns", 2), ("ddp", 2))
@on_ranks()
def test_ranks_hold_what_one_process_holds(rank: int, size: int, layout: str, some: Path) -> None:
    assert_all_hold(layout, size, some)


@on_ranks(3)
def test_ranks_hold_what_one_process_holds_in_the_other_cases(rank: int, size: int, others: Path) -> None:
    """Of three ranks, some have shorter shards or none."""
    assert_all_hold("fsdp", size, others)
