"""Operations on an optimizer take time in proportion to its parameters: lines of the package that run are counted."""

import copy
import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import epi_kernels
from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW, distributed
from epi_kernels.distributed import Shard
from epi_kernels.engine.groups import names_of, position_of
from epi_kernels.engine.sweeping import Sweeping
from epi_kernels.isolation.refresh import Candidate, Refresh

FOLDER = epi_kernels.__path__[0]


def lines(operation: Callable[[], Any]) -> int:
    """Return how many lines of the package an operation runs."""
    count = 0

    def traced(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        count += event == "line"
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        operation()
    finally:
        sys.settrace(before)
    return count


def masks(named: list[tuple[str, Parameter]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([True, False]) for name, _ in named}


BUILD: dict[str, Any] = {
    "EPIAdamW": lambda named: EPIAdamW(named, isolation_ratio=0.5, mask_interval=1, scope="layer"),
    "MaskedAdamW": lambda named: MaskedAdamW(named, frozen=masks(named)),
    "SparseAdamW": lambda named: SparseAdamW(named, trainable=masks(named)),
    "IsolatedOptimizer": lambda named: IsolatedOptimizer(torch.optim.SGD(named), isolation_ratio=0.5, mask_interval=1),
}


def made(kind: str, count: int) -> Any:
    named = [(f"layers.{i}.w", Parameter(torch.randn(2))) for i in range(count)]
    for _, param in named:
        param.grad = torch.randn(2)
    return BUILD[kind](named)


def all_masks(optimizer: Any) -> None:
    read = optimizer.trainable_mask if isinstance(optimizer, SparseAdamW) else optimizer.isolation_mask
    for param in optimizer.param_groups[0]["params"]:
        read(param)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "step": lambda optimizer: optimizer.step(),
    "masks": all_masks,
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "pickle": copy.deepcopy,
    "names": lambda optimizer: names_of(optimizer.param_groups),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", BUILD)
def test_twice_the_parameters_take_twice_the_lines(kind: str, operation: str) -> None:
    counts = []
    for count in (60, 120):
        optimizer = made(kind, count)
        optimizer.step()
        counts.append(lines(lambda optimizer=optimizer: OPERATIONS[operation](optimizer)))
    assert counts[0] > 0 or operation == "pickle"
    assert counts[1] <= 2.3 * counts[0] + 10


@pytest.mark.parametrize("kind", BUILD)
def test_construction_and_the_first_step_are_linear(kind: str) -> None:
    counts = [lines(lambda count=count: made(kind, count).step()) for count in (60, 120)]
    assert counts[1] <= 2.3 * counts[0]


class Searched(list[Any]):
    """A list that counts how often it is searched."""

    times = 0

    def __contains__(self, item: object) -> bool:
        Searched.times += 1
        return super().__contains__(item)

    def index(self, *args: Any) -> int:
        Searched.times += 1
        return super().index(*args)


def test_layers_and_budgets_of_ranks_are_not_searched_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Searched, "times", 0)
    monkeypatch.setattr(distributed, "Agreement", functools.partial(distributed.Agreement, pairs=Searched()))
    held = [Shard(f"w{i}", ("whole",), f"layer {i}", (f"layer {i}", 0.1), 4, 4) for i in range(20)]
    pairs = distributed.agreement([held, held], 0).pairs
    assert pairs == [(i, i) for i in range(20)]

    class OneRank:
        device = torch.device("cpu")

        def ranges(self, ranges: torch.Tensor, *_: object) -> torch.Tensor:
            return ranges

        def sum(self, counts: torch.Tensor) -> torch.Tensor:
            return counts

    candidates = [Candidate(torch.rand(4), None, 0.9, 0.1, i, i) for i in range(20)]
    refresh = Refresh(
        candidates,
        [],
        20,
        [2] * 20,
        lambda where: torch.zeros(len(where), dtype=torch.int64),
        normalize=True,
        exact=True,
        keep_finite=True,
        backend="auto",
        ranks=OneRank(),  # type: ignore[arg-type]
        pairs=Searched(pairs),
    )
    found = refresh.run_([candidate.importance for candidate in candidates], [None] * 20, grad_factor={}, due=None)
    assert found.counts[:, 0].tolist() == [2] * 20
    assert Searched.times == 0


def test_a_position_is_right_whatever_was_done_to_the_groups() -> None:
    params = [Parameter(torch.zeros(1)) for _ in range(6)]
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:]}]
    assert [position_of(p, groups) for p in params] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    groups[0]["params"].pop(0)
    assert [position_of(p, groups) for p in params[1:]] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        position_of(params[0], groups)
    groups[1]["params"] = [params[5], params[0]]
    assert position_of(params[0], groups) == (1, 1)
    assert position_of(params[5], groups) == (1, 0)
    groups.reverse()
    assert position_of(params[5], groups) == (0, 0)
    groups.pop()
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        position_of(params[1], groups)


def test_a_position_is_the_parameters_and_not_that_of_another_optimizer() -> None:
    params = [Parameter(torch.zeros(1)) for _ in range(2)]
    for _ in range(20):  # groups that die leave their identity to others
        assert position_of(params[1], [{"params": list(params)}]) == (0, 1)
        assert position_of(params[1], [{"params": params[::-1]}]) == (0, 0)


def test_parameters_whose_gradients_stay_are_not_prepared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = made("EPIAdamW", 20)
    last = optimizer.param_groups[0]["params"][-1]
    optimizer.step()
    grad, last.grad = last.grad, None
    optimizer.step()
    prepared = []
    check = Sweeping.check
    monkeypatch.setattr(
        Sweeping, "check", lambda self, owner, param, group: (prepared.append(param), check(self, owner, param, group))
    )
    for _ in range(3):
        last.grad = grad
        optimizer.step()
        last.grad = None
        optimizer.step()
    assert all(param is last for param in prepared)


@pytest.mark.parametrize("kind", ["EPIAdamW", "MaskedAdamW", "SparseAdamW"])
def test_a_clock_that_a_program_holds_goes_on(kind: str) -> None:
    optimizer = made(kind, 3)
    first, *_, last = optimizer.param_groups[0]["params"]
    optimizer.step()
    clock = optimizer.state[first]["step"]
    last.grad = None
    optimizer.step()
    assert clock.item() == 2  # as torch's, which is written in place
