"""Checkpoints: a run that stops, saves, loads and goes on is the run that never stopped, bit for bit.

In the middle of a mask interval, in every mode and dtype, through ``torch.save`` and ``torch.load(weights_only=True)``.
A state of torch.optim.AdamW loads, and ours loads into torch.optim.AdamW. pickle and deepcopy keep everything.
"""

import copy
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import same_state
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW

SHAPES = {"blocks.0.weight": (30, 7), "blocks.0.bias": (30,), "head.weight": (11, 5), "head.scale": ()}
MODES: dict[str, dict[str, Any]] = {
    "ema": {},
    "exp_avg_sq": {"importance": "exp_avg_sq"},
    "tensor": {"layers": "tensor"},
    "per layer": {"scope": "layer"},
    "amsgrad": {"amsgrad": True},
    "off": {"isolation_ratio": 0.0},
}


def epi(params: dict[str, Parameter], **settings: Any) -> EPIAdamW:
    return EPIAdamW(params.items(), **{"lr": 1e-2, "isolation_ratio": 0.2, "mask_interval": 4, **settings})


def masked(params: dict[str, Parameter], **settings: Any) -> MaskedAdamW:
    frozen = {"head.weight": torch.arange(55).view(11, 5) % 3 == 0}
    return MaskedAdamW(params.items(), lr=1e-2, frozen=frozen)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def train(params: dict[str, Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Take steps first .. last, whose gradients depend on the step alone; all but the first parameter miss some."""
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params.values()):
            grad = torch.randn(param.shape, generator=generator) * 10.0**-i
            param.grad = None if (step + i) % 5 == 0 and i else grad.to(param.dtype)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def masks(optimizer: Any, params: dict[str, Parameter]) -> list[Tensor]:
    return [optimizer.isolation_mask(p) for p in params.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("build", "settings"), [*((epi, mode) for mode in MODES.values()), (masked, {})], ids=[*MODES, "MaskedAdamW"]
)
def test_resumed_is_uninterrupted(build: Callable[..., Any], settings: dict[str, Any], dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    train(straight, build(straight, **settings), 1, 22)

    first = parameters(dtype)
    before = build(first, **settings)
    train(first, before, 1, 10)  # step 8 refreshed; 10 is in the middle of an interval
    saved = through_a_file(before.state_dict())

    second = {n: Parameter(p.detach().clone()) for n, p in first.items()}
    after = build(second, **settings)
    after.load_state_dict(saved)
    for one, other in zip(masks(before, first), masks(after, second), strict=True):
        assert torch.equal(one, other)
    train(second, after, 11, 22)
    for name in SHAPES:
        assert torch.equal(second[name], straight[name]), name


@pytest.mark.parametrize("kind", [pickle, copy], ids=["pickle", "deepcopy"])
def test_pickle_and_deepcopy_go_on_as_the_original(kind: Any) -> None:
    params = parameters()
    optimizer = epi(params)
    train(params, optimizer, 1, 10)
    twin = copy.deepcopy(optimizer) if kind is copy else pickle.loads(pickle.dumps(optimizer))
    twins = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    assert twin.telemetry() == optimizer.telemetry()
    train(params, optimizer, 11, 20)
    train(twins, twin, 11, 20)
    assert len(twin.telemetry()) == 5
    for name in SHAPES:
        assert torch.equal(params[name], twins[name]), name


def test_settings_come_from_the_state_as_with_torch() -> None:
    params = parameters()
    optimizer = epi(params, isolation_ratio=0.3, mask_interval=3)
    train(params, optimizer, 1, 2)
    other = epi(parameters(), isolation_ratio=0.1, mask_interval=500)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["isolation_ratio"], other.param_groups[0]["mask_interval"]) == (0.3, 3)


def test_a_state_of_another_grouping_is_refused_and_changes_nothing() -> None:
    params = parameters()
    optimizer = epi(params, layers="tensor")
    train(params, optimizer, 1, 5)
    other = epi(parameters(), layers="block")
    with pytest.raises(ValueError, match="saved with layers='tensor' and this optimizer has layers='block'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_a_state_of_torch_loads_and_goes_on(importance: str) -> None:
    params = parameters()
    torchs = torch.optim.AdamW(params.values(), lr=1e-2)
    train(params, torchs, 1, 6)
    twins = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    ours = epi(twins, importance=importance, isolation_ratio=0.25)
    ours.load_state_dict(through_a_file(torchs.state_dict()))
    assert ours.param_groups[0]["isolation_ratio"] == 0.25
    train(params, torchs, 7, 7)
    train(twins, ours, 7, 7)  # no refresh before 8
    for name in SHAPES:
        torch.testing.assert_close(params[name], twins[name], rtol=0, atol=1e-7)
    train(twins, ours, 8, 8)
    assert ours.telemetry()[-1]["step"] == 8


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_our_state_loads_into_torch_and_goes_on(importance: str) -> None:
    params = parameters()
    ours = epi(params, importance=importance)
    train(params, ours, 1, 10)
    assert any(mask.any() for mask in masks(ours, params))
    state = through_a_file(ours.state_dict())
    assert all((entry["exp_avg_sq"] >= 0).all() for entry in state["state"].values())
    twins = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    torchs = torch.optim.AdamW(twins.values(), lr=1e-2)
    torchs.load_state_dict(state)
    free = [~mask for mask in masks(ours, params)]
    train(params, ours, 11, 11)
    train(twins, torchs, 11, 11)
    for name, moving in zip(SHAPES, free, strict=True):
        torch.testing.assert_close(params[name][moving], twins[name][moving], rtol=0, atol=1e-7)


def test_a_hook_after_saving_sees_what_the_checkpoint_holds() -> None:
    optimizer, params = trained(importance="exp_avg_sq")
    assert any(mask.any() for mask in masks(optimizer, params))
    seen = []

    def look(_: Any, state: dict[str, Any]) -> None:
        seen.extend(bool((entry["exp_avg_sq"] >= 0).all()) for entry in state["state"].values())

    optimizer.register_state_dict_post_hook(look)
    optimizer.state_dict()
    assert seen == [True] * len(SHAPES)


def test_states_keep_their_dtypes_under_bfloat16_parameters() -> None:
    params = parameters(torch.bfloat16)
    optimizer = epi(params)
    train(params, optimizer, 1, 5)
    other = epi(parameters(torch.bfloat16))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for state in other.state.values():
        assert {name: tensor.dtype for name, tensor in state.items()} == {
            "step": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "importance": torch.float32,
        }


def trained(**settings: Any) -> tuple[EPIAdamW, dict[str, Parameter]]:
    params = parameters()
    optimizer = epi(params, **settings)
    train(params, optimizer, 1, 10)
    return optimizer, params


def without(entry: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["state"][int(entry)].pop(key)


def shaped(number: int, key: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["state"][number].update({key: torch.ones(shape)})


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another shape": (
        shaped(0, "exp_avg", 7, 30),
        r"exp_avg of blocks.0.weight has shape \(7, 30\) in the state, and \(30, 7\) here",
    ),
    "importance of another shape": (
        shaped(1, "importance", 3),
        r"importance of blocks.0.bias has shape \(3,\) in the state, and \(30,\) here",
    ),
    "a step for each entry": (
        shaped(2, "step", 4),
        r"step of head.weight has shape \(4,\) in the state, and \(\) here",
    ),
    "truncated: no second moment": (
        without("1", "exp_avg_sq"),
        "the state of blocks.0.bias has no exp_avg_sq and is not AdamW's; it has step, exp_avg, importance",
    ),
    "truncated: no step": (without("3", "step"), "the state of head.scale has no step"),
    "truncated: no groups": (lambda s: s.pop("param_groups"), "the state has no 'param_groups'"),
    "truncated: no state": (lambda s: s.pop("state"), "the state has no 'state'"),
    "a group without betas": (
        lambda s: s["param_groups"][0].pop("betas"),
        "parameter group 0 of the state has no betas: it is not AdamW's",
    ),
    "an entry too many": (
        lambda s: s["state"].update({7: s["state"][0]}),
        "the state has an entry 7 that belongs to none of its 4 parameters",
    ),
    "a tensor that is none": (
        lambda s: s["state"][0].update(exp_avg=[1.0]),
        "exp_avg of blocks.0.weight is a list and not a tensor",
    ),
    "complex moments": (
        lambda s: s["state"][0].update(exp_avg=torch.zeros(30, 7, dtype=torch.complex64)),
        "exp_avg of blocks.0.weight is torch.complex64 in the state, and torch.float32 here",
    ),
    "integer moments": (
        lambda s: s["state"][0].update(exp_avg=torch.zeros(30, 7, dtype=torch.int64)),
        "exp_avg of blocks.0.weight is torch.int64 in the state, and torch.float32 here",
    ),
    "sparse moments": (
        lambda s: s["state"][0].update(exp_avg=torch.zeros(30, 7).to_sparse()),
        "exp_avg of blocks.0.weight is torch.sparse_coo on cpu in the state",
    ),
    "moments on the meta device": (
        lambda s: s["state"][1].update(exp_avg_sq=torch.zeros(30, device="meta")),
        "exp_avg_sq of blocks.0.bias is torch.strided on meta in the state",
    ),
    "amsgrad without its moment": (
        lambda s: s["param_groups"][0].update(amsgrad=True),
        "the state of blocks.0.weight has no max_exp_avg_sq and is not AdamW's with amsgrad",
    ),
    "an entry that is a list": (
        lambda s: s["state"].update({1: [1.0]}),
        "the state of blocks.0.bias is a list and not a dict",
    ),
    **{
        f"step is {step!r}": (
            lambda s, step=step: s["state"][2].update(step=step),
            f"step of head.weight is {re.escape(repr(step))} in the state",
        )
        for step in ("a", None, [3.0], float("nan"), float("inf"), -1.0, 1j)
    },
    "step is NaN in a tensor": (
        lambda s: s["state"][2].update(step=torch.tensor(float("nan"))),
        "step of head.weight is nan in the state",
    ),
    "step is complex in a tensor": (
        lambda s: s["state"][2].update(step=torch.tensor(1j)),
        r"step of head.weight is \(?1j",
    ),
    "state is None": (lambda s: s.update(state=None), "'state' of the state is a NoneType and not a dict"),
    "groups are None": (lambda s: s.update(param_groups=None), "'param_groups' of the state is a NoneType"),
    "a group that is none": (
        lambda s: s.update(param_groups=[3]),
        "parameter group 0 of the state has no list of params",
    ),
    "a group without params": (
        lambda s: s["param_groups"][0].pop("params"),
        "parameter group 0 of the state has no list of params",
    ),
    "Adam's decay": (
        lambda s: s["param_groups"][0].update(decoupled_weight_decay=False),
        "parameter group 0 of the state has decoupled_weight_decay=False: it is Adam's",
    ),
    "no amsgrad, as RAdam and NAdam": (
        lambda s: s["param_groups"][0].pop("amsgrad"),
        "parameter group 0 of the state has no amsgrad: it is not AdamW's",
    ),
    **{
        f"{key} is {value!r}": (
            lambda s, key=key, value=value: s["param_groups"][0].update({key: value}),
            f"parameter group 0 of the state: {text}",
        )
        for key, value, text in (
            ("lr", "x", "lr is 'x'; it is a finite number"),
            ("lr", -1.0, "Invalid learning rate: -1.0"),
            ("betas", (2.0, 0.9), "Invalid beta parameter at index 0: 2.0"),
            ("betas", (0.9,), r"betas is \(0.9,\); it is two numbers"),
            ("clip_grad_norm", -1.0, "Invalid clip_grad_norm: -1.0"),
            ("isolation_ratio", 3.0, "Invalid isolation_ratio: 3.0"),
            ("mask_interval", 0, "Invalid mask_interval: 0"),
        )
    },
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(
    change: Callable[[dict[str, Any]], Any], message: str, importance: str
) -> None:
    optimizer, params = trained(importance=importance)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(optimizer.state_dict())
    change(wrong)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(wrong)
    assert same_state(optimizer.state_dict(), before)
    train(params, optimizer, 11, 12)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adam,
        torch.optim.Adafactor,
        lambda p: masked(dict(zip(SHAPES, p, strict=True))),
    ],
    ids=["SGD", "plain SGD", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Adam", "Adafactor", "MaskedAdamW"],
)
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(foreign: Callable[..., Any]) -> None:
    params = parameters()
    other = foreign(list(params.values()))
    train(params, other, 1, 3)
    optimizer, _ = trained()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match="of the state has no betas|is not AdamW's|is Adam's|which this optimizer has not"
    ):
        optimizer.load_state_dict(other.state_dict())
    assert same_state(optimizer.state_dict(), before)


def test_settings_that_are_one_for_all_groups_are_so_in_a_state() -> None:
    params = list(parameters().items())
    optimizer = EPIAdamW([{"params": params[:2]}, {"params": params[2:]}], mask_interval=4)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["param_groups"][1]["mask_interval"] = 5
    with pytest.raises(ValueError, match="parameter group 1 of the state: mask_interval=5 in a parameter group"):
        optimizer.load_state_dict(wrong)
    assert [group["mask_interval"] for group in optimizer.param_groups] == [4, 4]


def test_a_state_of_an_older_torch_loads_which_had_integers_and_fewer_keys() -> None:
    optimizer, params = trained(betas=(0.0, 0.999))
    older = copy.deepcopy(optimizer.state_dict())
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del older["param_groups"][0][key]
    older["param_groups"][0]["betas"] = (0, 0.999)
    for entry in older["state"].values():
        entry["step"] = int(entry["step"])
    twins = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    other = epi(twins)
    other.load_state_dict(older)
    train(params, optimizer, 11, 14)
    train(twins, other, 11, 14)
    for name in SHAPES:
        assert torch.equal(params[name], twins[name])


@pytest.mark.parametrize("build", [epi, masked], ids=["EPIAdamW", "MaskedAdamW"])
def test_the_defaults_are_those_of_the_state_so_that_a_group_can_join(build: Callable[..., Any]) -> None:
    optimizer = build(parameters())
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["clip_grad_norm"] = 2.0
    optimizer.load_state_dict(state)
    assert optimizer.defaults["clip_grad_norm"] == 2.0
    optimizer.add_param_group({"params": [("more.weight", Parameter(torch.ones(2)))]})
    assert optimizer.param_groups[1]["clip_grad_norm"] == 2.0


def test_a_truncated_file_loses_nothing(tmp_path: Any) -> None:
    optimizer, _ = trained()
    before = copy.deepcopy(optimizer.state_dict())
    path = tmp_path / "state.pt"
    torch.save(optimizer.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises((RuntimeError, OSError)):
        optimizer.load_state_dict(torch.load(path, weights_only=True))
    assert same_state(optimizer.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_takes_the_tensors_and_makes_no_second_copy(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = epi(params)
    train(params, optimizer, 1, 5)
    saved = through_a_file(optimizer.state_dict())
    other = epi(parameters(dtype))
    other.load_state_dict(saved)
    for entry, state in zip(saved["state"].values(), other.state.values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq", "importance"):
            assert state[key].data_ptr() == entry[key].data_ptr()


def test_the_old_state_is_gone_before_the_new_one_is_made() -> None:
    optimizer, params = trained()
    saved = through_a_file(optimizer.state_dict())
    old = [weakref.ref(optimizer.state[p]["exp_avg"]) for p in params.values()]
    gone: list[bool] = []
    # a hook of the user's runs after the state is in place; by then the old one must have been let go
    optimizer.register_load_state_dict_post_hook(lambda _: gone.extend(ref() is None for ref in old))
    optimizer.load_state_dict(saved)
    gc.collect()
    assert gone == [True] * len(SHAPES)


def test_dcp_calls_by_keyword_and_its_step_of_zeros_moves_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = EPIAdamW(model.named_parameters(), lr=0.1, isolation_ratio=0.2, mask_interval=1)
    before = [p.detach().clone() for p in model.parameters()]
    empty = get_optimizer_state_dict(model, optimizer)  # takes the step
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not any(optimizer.isolation_mask(p).any() or optimizer.importance(p).any() for p in model.parameters())
    assert {"0.weight", "1.bias"} <= empty["state"].keys()

    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    other = EPIAdamW(twin.named_parameters(), lr=0.1, isolation_ratio=0.2, mask_interval=1)
    set_optimizer_state_dict(twin, other, optim_state_dict=saved)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_state(optimizer.state[p], other.state[q])
        assert torch.equal(optimizer.isolation_mask(p), other.isolation_mask(q))
