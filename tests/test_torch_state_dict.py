"""torch.optim.AdamW goes on from `torch_state_dict`, from every storage: with the values, without locks and rests."""

import copy
import io
from typing import Any

import pytest
import storing
import torch
from ranks import on_ranks
from storing import BFLOAT16, STORAGES, SmallNet, model_of, named, optimizer_of, train
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from epi_kernels import EPIAdamW, IsolatedOptimizer, distributed
from epi_kernels.engine.storages import stored
from epi_kernels.optim import torch_state_dict
from epi_kernels.storage import block8

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "amsgrad": {"state_dtype": BFLOAT16, "amsgrad": True},
    **{name: settings for name, settings in STORAGES.items() if "importance" not in name},
}


def value(state: dict[str, Tensor], name: str) -> Tensor:
    tensor, scales = stored(state, name)
    assert tensor is not None
    return (tensor.float() if scales is None else block8.decoded(tensor, scales)).abs()


def trained(kind: str, **settings: Any) -> tuple[nn.Module, Any]:
    model = model_of(SmallNet)
    if settings.get("master_weight_bits") is None and settings.get("rounding") is None:
        model = model.float()
    optimizer = optimizer_of(kind, model, **settings)
    train(named(model), optimizer, 1, 3)
    return model, optimizer


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "masked"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_adamw_of_torch_goes_on_from_the_values(kind: str, settings: dict[str, Any]) -> None:
    model, optimizer = trained(kind, **settings)
    optimizer.param_groups[0]["initial_lr"] = 0.5  # as a scheduler writes it
    state = torch_state_dict(optimizer)
    slots = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if settings.get("amsgrad") else [])]
    for number, (name, param) in enumerate(named(model).items()):
        entry = state["state"][number]
        assert sorted(entry) == sorted(["step", *slots]), name
        for slot in slots:
            assert entry[slot].dtype == torch.float32
            assert torch.equal(entry[slot].abs(), value(optimizer.state[param], slot)), (name, slot)
        assert not torch.signbit(entry["exp_avg_sq"]).any(), name

    torchs = torch.optim.AdamW(model.named_parameters())
    assert set(state["param_groups"][0]) == {*torchs.state_dict()["param_groups"][0], "initial_lr"}
    assert all(state["param_groups"][0][key] == optimizer.param_groups[0][key] for key in ("lr", "betas", "eps"))

    # whoever loads it goes on as an AdamW that was given these values
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    steps = []
    for _ in range(2):
        twin = copy.deepcopy(model)
        steps.append((named(twin), torch.optim.AdamW(twin.named_parameters())))
    steps[0][1].load_state_dict(torch.load(file, weights_only=True))
    params, other = steps[1]
    other.param_groups[0].update({key: v for key, v in state["param_groups"][0].items() if key not in ("params",)})
    for number, param in enumerate(params.values()):
        entry = state["state"][number]
        other.state[param] = {key: v.clone().to(v.dtype if key == "step" else param.dtype) for key, v in entry.items()}
    for params, other in steps:
        train(params, other, 4, 6)
    for name, param in steps[0][0].items():
        assert torch.equal(param, steps[1][0][name]), name
        assert not torch.equal(param, named(model)[name]), name


@pytest.mark.parametrize("storage", ["bfloat16", "8 bits"])
def test_of_lion_there_are_its_slots(storage: str) -> None:
    model, optimizer = trained("lion", **STORAGES[storage])
    state = torch_state_dict(optimizer)
    for number, param in enumerate(model.parameters()):
        assert sorted(state["state"][number]) == ["exp_avg", "step"]
        assert torch.equal(state["state"][number]["exp_avg"].abs(), value(optimizer.state[param], "exp_avg"))
    settings = {"params", "param_names", "lr", "betas", "weight_decay", "maximize", "foreach", "capturable", "fused"}
    assert set(state["param_groups"][0]) == settings


def test_moments_of_complex_and_of_wide_parameters_keep_their_dtype() -> None:
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.complex64, torch.float64)]
    optimizer = EPIAdamW([("complex", params[0]), ("wide", params[1])], backend="reference")
    for param in params:
        param.grad = torch.full_like(param, -2.0)
    optimizer.step()
    entries = torch_state_dict(optimizer)["state"]
    for number, param in enumerate(params):
        assert entries[number]["exp_avg_sq"].dtype == param.dtype
        assert torch.equal(entries[number]["exp_avg"], optimizer.state[param]["exp_avg"])


def test_other_optimizers_are_refused_with_the_way_out() -> None:
    _, sparse = trained("sparse")
    with pytest.raises(TypeError, match=r"SparseAdamW has moments of its trainable entries.*delta\(\)"):
        torch_state_dict(sparse)
    base = torch.optim.AdamW([("weight", nn.Parameter(torch.ones(2)))])
    with pytest.raises(TypeError, match=r"use optimizer\.base\.state_dict\(\)"):
        torch_state_dict(IsolatedOptimizer(base))
    with pytest.raises(TypeError, match="AdamW is no optimizer of this package"):
        torch_state_dict(base)


@on_ranks(3)
def test_dtensors_stay_dtensors(rank: int, size: int) -> None:
    for kind, storage in (("ema", "8 bits"), ("exp_avg_sq", "8 bits"), ("masked", "bfloat16")):
        model, whole = fully_shard(model_of(SmallNet)), model_of(SmallNet)
        states = []
        for one in (model, whole):
            optimizer = optimizer_of(kind, one, **STORAGES[storage])
            train(named(one), optimizer, 1, 3)
            states.append(torch_state_dict(optimizer)["state"])
        for number, param in enumerate(model.parameters()):
            for slot in ("exp_avg", "exp_avg_sq"):
                mine = states[0][number][slot]
                assert isinstance(mine, DTensor)
                assert mine.placements == param.placements
                part = distributed.shard_of(states[1][number][slot], param)
                assert storing.same_bits(distributed.local(mine), distributed.local(part)), (number, slot)
