"""Operations on an optimizer take time in proportion to its parameters: lines of the package that run are counted."""

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import epi_kernels
from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW
from epi_kernels.distributed import Held, agreement
from epi_kernels.optim.groups import position_of

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
    "names": lambda optimizer: optimizer._names(),
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


def test_ranks_agree_in_linear_time() -> None:
    counts = []
    for count in (100, 200):
        held = [Held(f"w{i}", ("whole",), f"layer {i}", (f"layer {i}", 0.1), 4, 4) for i in range(count)]
        counts.append(lines(lambda held=held: agreement([held, held], 0)))
        assert agreement([held, held], 0).pairs == [(i, i) for i in range(count)]
    assert counts[1] <= 2.3 * counts[0]


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
