"""A copy of an optimizer of partitioned parameters has their process group, or says that it has lost it.

Without the group each rank would choose masks of its own, without a word. deepcopy and copy stay in the process and
keep the group; a pickle cannot, and its optimizer raises at the first step or refresh, before anything has changed.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW
from epi_kernels.isolation import deepspeed
from epi_kernels.isolation.deepspeed import Segment

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")

FREE = torch.eye(4, dtype=torch.bool)
MAKES: dict[str, Callable[..., Any]] = {
    "epi": lambda p, **o: EPIAdamW([("w", p)], mask_interval=2, isolation_ratio=0.2, **o),
    "masked": lambda p, **o: MaskedAdamW([("w", p)], frozen={"w": ~FREE}, **o),
    "sparse": lambda p, **o: SparseAdamW([("w", p)], trainable={"w": FREE}, **o),
    "isolated": lambda p, **o: IsolatedOptimizer(torch.optim.SGD([("w", p)]), mask_interval=2, **o),
}


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the groups over which settings have been exchanged so far."""
    found: list[Any] = []
    exchange = dist.all_gather_object

    def noted(everyone: Any, mine: Any, group: Any = None) -> None:
        found.append(group)
        exchange(everyone, mine, group=group)

    monkeypatch.setattr(dist, "all_gather_object", noted)
    return found


def step(optimizer: Any) -> Parameter:
    param: Parameter = optimizer.param_groups[0]["params"][0]
    param.grad = torch.randn(4, 4)
    optimizer.step()
    return param


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
@pytest.mark.parametrize("kind", MAKES)
def test_a_copy_in_this_process_has_the_group(kind: str, copied: Any, times: int, group: Any, asked: list[Any]) -> None:
    optimizer = MAKES[kind](Parameter(torch.ones(4, 4)), process_group=group)
    step(optimizer)
    for _ in range(times):
        optimizer = copied(optimizer)
    asked.clear()
    step(optimizer)
    assert asked
    assert all(one is group for one in asked)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", MAKES)
def test_a_pickled_optimizer_says_that_its_group_is_lost(kind: str, copied: bool, group: Any) -> None:
    optimizer = MAKES[kind](Parameter(torch.ones(4, 4)), process_group=group)
    step(optimizer)
    lost = pickle.loads(pickle.dumps(optimizer))
    if copied:  # what is lost stays lost
        lost = pickle.loads(pickle.dumps(copy.deepcopy(lost)))
    before = lost.param_groups[0]["params"][0].detach().clone()
    state = copy.deepcopy(lost.state_dict()["state"])
    calls = [lambda: step(lost)] + ([lost.refresh] if kind in ("epi", "isolated") else [])
    for call in calls:
        with pytest.raises(RuntimeError, match="its process group did not come along.*construct.*with process_group="):
            call()
    assert torch.equal(lost.param_groups[0]["params"][0], before)
    assert repr(lost.state_dict()["state"]) == repr(state)
    # the way out
    again = MAKES[kind](Parameter(before.clone()), process_group=group)
    again.load_state_dict(lost.state_dict())
    torch.manual_seed(1)
    moved = step(again)
    torch.manual_seed(1)
    assert torch.equal(moved, step(optimizer))


@pytest.mark.parametrize("kind", MAKES)
def test_an_optimizer_without_a_group_has_lost_none(kind: str) -> None:
    optimizer = MAKES[kind](Parameter(torch.ones(4, 4)))
    step(optimizer)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        torch.manual_seed(1)
        moved = step(twin)
        torch.manual_seed(1)
        assert torch.equal(moved, step(copy.deepcopy(optimizer)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_optimizer_that_deepspeed_steps_is_bound_again(
    copied: Any, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = Parameter(torch.ones(16))
    optimizer = EPIAdamW([("w", flat)], mask_interval=2, isolation_ratio=0.2)
    monkeypatch.setattr(deepspeed, "group_of", lambda _: group)

    def bind(one: EPIAdamW) -> None:
        owner = one.param_groups[0]["params"][0]
        monkeypatch.setattr(deepspeed, "segments_of", lambda *_: [Segment(owner, 0, "blocks.0.w", 0, 16, 16)])
        one.bind_deepspeed(object())

    bind(optimizer)
    for _ in range(3):
        flat.grad = torch.arange(16.0)
        optimizer.step()
    twin = copied(optimizer)
    param = twin.param_groups[0]["params"][0]
    before = param.detach().clone()
    param.grad = torch.arange(16.0)
    for call in (twin.step, twin.refresh):
        with pytest.raises(RuntimeError, match=r"call bind_deepspeed\(engine\) of the copy"):
            call()
    assert torch.equal(param, before)
    bind(twin)
    for one in (optimizer, twin):
        one.param_groups[0]["params"][0].grad = torch.arange(16.0)
        one.step()
    assert torch.equal(param, flat)
