"""In every storage, what ranks hold of parameters, states, masks and rests is what one process holds, bit for bit.

- FSDP2 with uneven shards and a rank without rows, HSDP, tensor parallel on dimensions 0 and 1, both together, shards
  of dimension 1, replicas. All are given the same gradients, and refresh their masks.
- Checkpoints in the middle of an interval go on, on other numbers of ranks, nested and flat, and in one file.
- Layouts that cut blocks, and those for which there is no noise, are refused before anything has changed.
- Planted faults make the same comparisons fail: noise by local offsets, and blocks that cross a row.
"""

import copy
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import storing
import torch
import torch.distributed as dist
from ranks import needs_ranks, on_ranks, run
from sharding import expect, layouts
from states import same_state
from storing import BFLOAT16, CASES, SOME_CASES, STORAGES, SmallNet, assert_holds, model_of, named, optimizer_of, train
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
from torch.distributed.tensor import Placement, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import EPIAdamW, distributed
from epi_kernels.engine import plan, storages
from epi_kernels.isolation import isolation
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


# Checkpoints ---------------------------------------------------------------------------------------------------------

# the number of ranks of each stage, and its steps: none ends where a refresh is due
STAGES = ((4, 1, 3), (2, 4, 5), (1, 6, 6), (3, 7, 9))
INTERVAL = 4

CHECKPOINTED = [
    ("ema", "8 bits, importance in float32"),
    ("exp_avg_sq", "24 bits, stochastic"),
    ("lion", "bfloat16"),
    ("masked", "32 bits"),
    ("sparse", "32 bits"),
]


def build(case: tuple[str, str], model: nn.Module, *, selects: bool = True) -> Any:
    interval = {} if case[0] in ("masked", "sparse") else {"mask_interval": INTERVAL}
    return optimizer_of(case[0], model, selects=selects, **STORAGES[case[1]], **interval)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of what an uninterrupted run of one process holds after the last stage."""
    found = {}
    for case in CHECKPOINTED:
        model = model_of(SmallNet)
        optimizer = build(case, model)
        train(named(model), optimizer, 1, STAGES[-1][2])
        found[case] = storing.contents(model, optimizer)
    path = tmp_path_factory.mktemp("straight") / "straight.pt"
    torch.save(found, path)
    return path


@needs_ranks
@pytest.mark.parametrize("form", ["nested", "flat", "full"])
def test_checkpoints_go_from_4_ranks_to_2_to_1_to_3_bit_for_bit(form: str, straight: Path, tmp_path: Path) -> None:
    """In the middle of an interval; "full" is one file of whole tensors."""
    for stage, (size, _, _) in enumerate(STAGES):
        run(resharded, size, stage=stage, form=form, folder=tmp_path, straight=straight)


def resharded(rank: int, size: int, stage: int, form: str, folder: Path, straight: Path) -> None:
    """Take one stage of each case: load what the stage before has saved on other ranks, go on, save."""
    whole = torch.load(straight)
    full = form == "full"
    options = StateDictOptions(full_state_dict=full, cpu_offload=full, flatten_optimizer_state_dict=form == "flat")
    for number, case in enumerate(CHECKPOINTED):
        model = fully_shard(model_of(SmallNet))
        optimizer = build(case, model, selects=not stage)
        here, before = folder / f"{number}.{stage}", folder / f"{number}.{stage - 1}"
        if stage:
            saved = dict(zip("mo", get_state_dict(model, optimizer, options=options), strict=True))
            if full:
                saved = torch.load(before, weights_only=True)
            else:
                checkpoint.load(saved, checkpoint_id=before)
            set_state_dict(model, optimizer, model_state_dict=saved["m"], optim_state_dict=saved["o"], options=options)
        train(named(model), optimizer, *STAGES[stage][1:])
        saved = dict(zip("mo", get_state_dict(model, optimizer, options=options), strict=True))
        if not full:
            checkpoint.save(saved, checkpoint_id=here)
        elif rank == 0:
            torch.save(saved, here)
        if stage == len(STAGES) - 1:
            assert_holds(model, optimizer, whole[case])


@on_ranks(2)
def test_a_state_is_broadcast_from_rank_0(rank: int, size: int) -> None:
    """Even shards, as torch asks for it; weights of 32 bits have rests of int16, which gloo and NCCL do not send."""
    saves = StateDictOptions(full_state_dict=True, cpu_offload=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for case in (("ema", "32 bits"), ("sparse", "24 bits, stochastic")):
        models = [fully_shard(nn.Sequential(nn.Linear(64, 66, dtype=BFLOAT16))) for _ in range(2)]
        first, second = (build(case, model, selects=not i) for i, model in enumerate(models))
        train(named(models[0]), first, 1, 3)
        for param, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            distributed.local(twin).copy_(distributed.local(param))
        state = copy.deepcopy(get_optimizer_state_dict(models[0], first, options=saves))
        set_optimizer_state_dict(models[1], second, state if rank == 0 else {}, options=options)
        for model, optimizer in zip(models, (first, second), strict=True):
            train(named(model), optimizer, 4, 5)
        for param, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(distributed.local(param), distributed.local(twin))
            for key, value in first.state[param].items():
                assert torch.equal(distributed.local(value), distributed.local(second.state[twin][key])), key


# what the state of an entry takes: moments, importance and rest
BYTES = {"float32": 12.0, "bfloat16": 6.0, "8 bits": 3 * (1 + 4 / 64), "24 bits": 7.0, "32 bits": 2 + 3 * (1 + 4 / 64)}


@on_ranks(2)
def test_checkpoints_are_smaller_in_proportion(rank: int, size: int, tmp_path: Path) -> None:
    for storage, each in BYTES.items():
        model = fully_shard(nn.Sequential(nn.Linear(512, 512, dtype=BFLOAT16)))
        optimizer = optimizer_of("ema", model, **STORAGES.get(storage, {}))
        train(named(model), optimizer, 1, 1)
        checkpoint.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / storage)
        dist.barrier()
        found = storing.bytes_of(tmp_path / storage) / (512 * 512)
        assert each <= found < each + 0.4, (storage, found)


@on_ranks(3)
def test_states_of_one_process_load_into_shards(rank: int, size: int) -> None:
    """Without torch.distributed.checkpoint: every rank takes its part of the whole tensors, also of converted ones."""
    for case, storage in ((("ema", "32 bits"), "32 bits"), (("exp_avg_sq", "8 bits"), "bfloat16")):
        whole, model = model_of(SmallNet), fully_shard(model_of(SmallNet))
        reference = build(case, whole)
        train(named(whole), reference, 1, 3)
        again, optimizer = (build((case[0], storage), one) for one in (whole, model))
        for name, param in named(model).items():
            param = param.detach()
            distributed.local(param).copy_(distributed.local(distributed.shard_of(named(whole)[name].detach(), param)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for one in (again, optimizer):
                one.load_state_dict(copy.deepcopy(reference.state_dict()))
        told = [str(one.message) for one in caught if "converted" in str(one.message)]
        assert len(told) == (2 if case[1] != storage else 0), told
        train(named(whole), again, 4, 5)
        train(named(model), optimizer, 4, 5)
        assert_holds(model, optimizer, storing.contents(whole, again))


# Layouts that are refused --------------------------------------------------------------------------------------------


def assert_refuses(settings: dict[str, Any], text: str, params: Any) -> None:
    """Check that a constructor, a new group, and a setting that is written each refuse parameters with a text."""
    constructed = functools.partial(EPIAdamW, params, backend="reference", **settings)
    expect(NotImplementedError, text, constructed)
    other = nn.Parameter(torch.ones(64, 64, dtype=BFLOAT16))
    optimizer = EPIAdamW([("other", other)], backend="reference", mask_interval=1)
    expect(NotImplementedError, text, lambda: optimizer.add_param_group({"params": params, **settings}))
    assert len(optimizer.param_groups) == 1

    optimizer = EPIAdamW(params, backend="reference", mask_interval=1)
    for step in (1, 2):
        storing.give(dict(params), step)
        if step == 2:
            before = storing.snapshot(optimizer)
            optimizer.param_groups[0].update(settings)
            expect(NotImplementedError, text, optimizer.step)
            optimizer.param_groups[0].update(dict.fromkeys(settings), rounding="nearest")
            assert same_state(storing.snapshot(optimizer), before)
        optimizer.step()


def placed(shape: tuple[int, ...], mesh: tuple[int, ...], *placements: Placement) -> list[tuple[str, nn.Parameter]]:
    """Return one bfloat16 parameter with its name."""
    whole = torch.ones(shape, dtype=BFLOAT16)
    param = distribute_tensor(whole, init_device_mesh("cpu", mesh), placements, src_data_rank=None)
    return [("w", nn.Parameter(param))]


def crossed() -> list[tuple[str, nn.Parameter]]:
    """Return a parameter that tensor parallelism and then FSDP2 cut along its second dimension."""
    model = nn.Sequential(nn.Linear(512, 16, bias=False, dtype=BFLOAT16))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(1))
    return [("w", model[0].weight)]


@on_ranks(4)
def test_layouts_that_cut_blocks_are_refused(rank: int, size: int) -> None:
    codes, way_out = {"state_dtype": "8bit"}, "use state_dtype=torch.bfloat16"
    assert_refuses(codes, way_out, placed((64, 100), (4,), Shard(1)))
    # 192 entries each, if only one of them is cut; both together cut 96
    assert_refuses(codes, way_out, placed((16, 384), (2, 2), Shard(1), Shard(1)))
    assert_refuses(codes, way_out, placed((64, 8, 64), (4,), Shard(2)))
    # 2, 2, 1 and 0 times 128 entries, where torch would cut 10 blocks into 3, 3, 3 and 1
    assert_refuses(codes, way_out, placed((16, 5, 128), (4,), Shard(1)))
    assert_refuses(codes, way_out, crossed())
    assert_refuses(
        {"importance_dtype": "8bit"}, "use importance_dtype=torch.bfloat16", placed((64, 100), (4,), Shard(1))
    )
    for params in (placed((64, 100), (4,), Shard(1)), crossed()):
        EPIAdamW(params, state_dtype=BFLOAT16, backend="reference")
    # a mesh of one rank cuts nothing
    EPIAdamW(placed((64, 100), (1, 4), Shard(1), Shard(0)), state_dtype="8bit", backend="reference")


@on_ranks(4)
def test_layouts_without_noise_are_refused(rank: int, size: int) -> None:
    params = placed((16, 8, 64), (2, 2), Shard(1), Shard(2))
    for settings in ({"state_dtype": BFLOAT16}, {"importance_dtype": BFLOAT16}, {"rounding": "stochastic"}):
        assert_refuses(settings, "several of its inner dimensions", params)


@on_ranks(2)
def test_slices_of_fsdp1_are_refused_in_blocks(rank: int, size: int) -> None:
    model = nn.Sequential(nn.Linear(100, 100))
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    params = [*wrapped.named_parameters()]
    for kind in ("ema", "masked", "lion"):
        expect(
            NotImplementedError, "a slice that FSDP1 made", lambda k=kind: optimizer_of(k, wrapped, state_dtype="8bit")
        )
    EPIAdamW(params, state_dtype=BFLOAT16, backend="reference")


# Planted faults ------------------------------------------------------------------------------------------------------


def fails(layout: str, size: int, storage: str) -> bool:
    """Return whether parameters and states of ranks differ from those of one process."""
    whole, model = model_of(), LAYOUTS[layout](model_of(), size)
    optimizer, reference = (optimizer_of("ema", one, **STORAGES[storage]) for one in (model, whole))
    train(named(model), optimizer, 1, STEPS)
    train(named(whole), reference, 1, STEPS)
    try:
        assert_holds(model, optimizer, storing.contents(whole, reference))
    except AssertionError:
        return True
    return False


def on_any(found: bool) -> bool:
    """Return whether something was found on any rank."""
    total = torch.tensor(float(found))
    dist.all_reduce(total)
    return bool(total)


@on_ranks(2)
def test_noise_by_local_offsets_would_be_seen(rank: int, size: int) -> None:
    for storage in ("stochastic", "bfloat16", "8 bits", "24 bits, stochastic"):
        assert not on_any(fails("fsdp", size, storage)), storage
    storages.offsets_of = lambda tensor: [0] * tensor.dim()
    for storage in ("stochastic", "bfloat16", "8 bits", "24 bits, stochastic"):
        assert on_any(fails("fsdp", size, storage)), storage


@on_ranks(2)
def test_noise_by_offsets_within_a_row_would_be_seen(rank: int, size: int) -> None:
    """Where columns are cut, local entries lie in runs, with gaps between them."""
    assert not on_any(fails("columns", size, "bfloat16"))
    original = storages.place_of

    def planted(*arguments: Any) -> Any:
        return original(*arguments)._replace(run=1 << 40, gap=0)

    plan.place_of = isolation.place_of = planted
    assert on_any(fails("columns", size, "bfloat16"))


@on_ranks(2)
def test_blocks_that_cross_rows_would_be_seen(rank: int, size: int) -> None:
    def largest(magnitudes: Tensor) -> Tensor:
        rows, blocks = block8.scales_shape(magnitudes.shape)
        found = torch.zeros(rows * blocks)
        for i, block in enumerate(magnitudes.flatten().split(block8.BLOCK)):
            found[i] = block.max()
        return found.view(rows, blocks)

    def of_entries(of_blocks: Tensor, shape: torch.Size) -> Tensor:
        return of_blocks.flatten().repeat_interleave(block8.BLOCK)[: shape.numel()].view(shape)

    block8._largest, block8._of_entries = largest, of_entries
    assert on_any(fails("fsdp", size, "8 bits"))
