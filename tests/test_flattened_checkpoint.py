"""What `torch.distributed.checkpoint` saves comes back whole, in its nested and in its flattened form.

Trainers such as torchtitan save with ``flatten_optimizer_state_dict=True``. torch then asks ``optimizer.state[p]``
which tensors to load: a tensor that only `state_dict` had was saved and never loaded. So the keys of both are equal.

With ``importance="exp_avg_sq"``, ``importance`` and ``exp_avg_sq`` are one tensor in memory; where somebody has parted
them, the next step takes the importance and joins them again.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from states import same_state
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW, lock

# torch says in both directions that there is one process here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

ISOLATION: dict[str, Any] = {"isolation_ratio": 0.2, "mask_interval": 3}
HALF = torch.arange(36).view(6, 6) % 2 == 0

BUILD: dict[str, Callable[[nn.Module], Any]] = {
    "ema": lambda m: EPIAdamW(m.named_parameters(), **ISOLATION),
    "exp_avg_sq": lambda m: EPIAdamW(m.named_parameters(), importance="exp_avg_sq", **ISOLATION),
    "exp_avg_sq, amsgrad": lambda m: EPIAdamW(m.named_parameters(), importance="exp_avg_sq", amsgrad=True, **ISOLATION),
    "isolation off": lambda m: EPIAdamW(m.named_parameters(), isolation_ratio=0),
    "around AdamW": lambda m: IsolatedOptimizer(torch.optim.AdamW(m.named_parameters()), **ISOLATION),
    "around SGD": lambda m: IsolatedOptimizer(torch.optim.SGD(m.named_parameters(), lr=0.1), **ISOLATION),
    "around momentum": lambda m: IsolatedOptimizer(
        torch.optim.SGD(m.named_parameters(), lr=0.1, momentum=0.9), **ISOLATION
    ),
    "masked": lambda m: MaskedAdamW(m.named_parameters(), frozen={"0.weight": HALF}),
    "sparse": lambda m: SparseAdamW(m.named_parameters(), trainable={"0.weight": HALF}),
}
each_class = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
each_form = pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])


def model_of() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].requires_grad_(False)  # torch saves no state of a parameter that requires no gradient
    return model


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_checkpoint(
    source: tuple[nn.Module, Any], target: tuple[nn.Module, Any], flatten: bool, path: Path
) -> None:
    """Save the state of one optimizer and load it into another, as a trainer does in two processes."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    checkpoint.save({"optimizer": get_optimizer_state_dict(*source, options=options)}, checkpoint_id=path)
    state = {"optimizer": get_optimizer_state_dict(*target, options=options)}
    checkpoint.load(state, checkpoint_id=path)
    set_optimizer_state_dict(*target, state["optimizer"], options=options)


@each_class
@each_form
def test_a_run_goes_on_bit_for_bit(build: Callable[..., Any], flatten: bool, tmp_path: Path) -> None:
    model, twin = model_of(), model_of()
    straight, before = build(twin), build(model)
    train(twin, straight, range(9))
    train(model, before, range(5))
    resumed = model_of()
    resumed.load_state_dict(model.state_dict())
    after = build(resumed)
    through_a_checkpoint((model, before), (resumed, after), flatten, tmp_path)
    assert same_state(after.state_dict(), before.state_dict())
    train(resumed, after, range(5, 9))
    assert same_state(resumed.state_dict(), twin.state_dict())
    assert same_state(after.state_dict(), straight.state_dict())


@each_class
def test_state_has_the_keys_of_the_checkpoint(build: Callable[..., Any]) -> None:
    model = model_of()
    optimizer = build(model)
    train(model, optimizer, range(4))
    saved = optimizer.state_dict()["state"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    held = {number: set(optimizer.state[param]) for number, param in enumerate(params) if optimizer.state.get(param)}
    assert held == {number: set(entry) for number, entry in saved.items() if entry}


def parted(how: str, state: dict[str, Any]) -> None:
    """Make two tensors of the second moment and the importance of a parameter."""
    assert state["importance"] is state["exp_avg_sq"]
    signed = state["importance"]
    if how == "moved and moved back":
        for key in state:
            state[key] = state[key].clone()
    elif how == "a loader wrote both":
        state["exp_avg_sq"], state["importance"] = lock.magnitude(signed), signed.clone()
    elif how == "the moment is another tensor":
        state["exp_avg_sq"] = torch.full_like(signed, 5.0)
    else:
        del state["importance"]


@pytest.mark.parametrize(
    ("how", "ask_first"),
    [
        ("moved and moved back", False),
        ("a loader wrote both", False),
        ("the moment is another tensor", False),
        ("the importance is gone", False),
        ("the moment is another tensor", True),
        ("the importance is gone", True),
    ],
)
def test_what_was_parted_is_one_again_at_the_next_step(how: str, ask_first: bool, backend: str) -> None:
    def build(model: nn.Module) -> EPIAdamW:
        return EPIAdamW(model.named_parameters(), importance="exp_avg_sq", backend=backend, **ISOLATION)

    model, twin = model_of(), model_of()
    optimizer, straight = build(model), build(twin)
    train(model, optimizer, range(4))
    train(twin, straight, range(4))
    for state in optimizer.state.values():
        parted(how, state)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.isolation_mask(param), straight.isolation_mask(other))
        assert torch.equal(optimizer.importance(param), straight.importance(other))
    if ask_first:
        optimizer.refresh()
        straight.refresh()
        assert same_state(optimizer.state_dict(), straight.state_dict())
    train(model, optimizer, range(4, 9))
    train(twin, straight, range(4, 9))
    assert same_state(model.state_dict(), twin.state_dict())
    assert same_state(optimizer.state_dict(), straight.state_dict())
    assert all(state["importance"] is state["exp_avg_sq"] for state in optimizer.state.values())


def test_the_shared_importance_costs_no_memory_and_copies_share_it() -> None:
    model = model_of()
    optimizer = BUILD["exp_avg_sq"](model)
    train(model, optimizer, range(4))
    for one in (optimizer, copy.deepcopy(optimizer)):
        for state in one.state.values():
            assert state["importance"].data_ptr() == state["exp_avg_sq"].data_ptr()
    alone: Tensor = optimizer.state_dict()["state"][0]["exp_avg_sq"]
    assert not torch.signbit(alone).any()


def test_a_state_of_torchs_adamw_loads_where_partial_loads_are_allowed(tmp_path: Path) -> None:
    model, target = model_of(), model_of()
    theirs, ours = torch.optim.AdamW(model.named_parameters()), BUILD["ema"](target)
    train(model, theirs, range(3))
    target.load_state_dict(model.state_dict())
    checkpoint.save({"optimizer": get_optimizer_state_dict(model, theirs)}, checkpoint_id=tmp_path)
    state = {"optimizer": get_optimizer_state_dict(target, ours)}
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=True)
    checkpoint.load(state, checkpoint_id=tmp_path, planner=planner)
    set_optimizer_state_dict(target, ours, state["optimizer"])
    for param, other in zip(target.parameters(), model.parameters(), strict=True):
        if param.requires_grad:
            assert same_state(ours.state[param]["exp_avg"], theirs.state[other]["exp_avg"])
            assert not ours.importance(param).any()
    train(model, theirs, range(3, 4))
    train(target, ours, range(3, 4))
    torch.testing.assert_close(list(target.parameters()), list(model.parameters()), rtol=1e-6, atol=1e-6)
