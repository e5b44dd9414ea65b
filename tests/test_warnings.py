"""Every warning points at a line of the program that called, and not into this package, torch or a framework."""

import ast
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import epi_kernels
from epi_kernels import EPIAdamW, IsolatedOptimizer
from epi_kernels.importance import fisher
from epi_kernels.optim.release import release_gradients

ROOT = Path(epi_kernels.__file__).parent


def unnamed() -> list[Parameter]:
    return [Parameter(torch.ones(2)), Parameter(torch.ones(3))]


def with_nan(optimizer: Any) -> Any:
    optimizer.param_groups[0]["params"][0].grad = torch.full((2,), torch.nan)
    return optimizer


def stepped_by_a_scheduler() -> None:
    optimizer = with_nan(EPIAdamW(unnamed(), layers="tensor"))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the step
    optimizer.step()


def stepped_by_a_closure() -> None:
    optimizer = EPIAdamW(unnamed(), layers="tensor")

    def closure() -> float:
        with_nan(optimizer)
        return 0.0

    optimizer.step(closure)


def stepped_compiled() -> None:
    torch.compile(with_nan(EPIAdamW(unnamed(), layers="tensor")).step, backend="eager")()


def stepped_by_a_scaler() -> None:
    optimizer = EPIAdamW(unnamed(), layers="tensor")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.step(with_nan(optimizer))


def released() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = EPIAdamW(model.named_parameters())
    release_gradients(model, optimizer)
    model(torch.full((1, 2), torch.nan)).sum().backward()
    optimizer.step()


def flat_partitions() -> None:
    optimizer = EPIAdamW([("a", Parameter(torch.ones(2))), ("b", Parameter(torch.ones(2)))])
    flat = Parameter(torch.ones(4))
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.step()


def called_by_a_framework() -> None:
    names = {"__name__": "transformers.trainer", "step": with_nan(EPIAdamW(unnamed(), layers="tensor")).step}
    exec("def train():\n    step()", names)
    names["train"]()


def scored() -> None:
    model = torch.nn.Linear(2, 2)
    batches = [torch.full((1, 2), torch.nan) for _ in range(8)]
    fisher(model, batches, lambda model, batch: model(batch).sum(), progress=False)


SITUATIONS: dict[str, Callable[[], Any]] = {
    "EPIAdamW is constructed": lambda: EPIAdamW(unnamed()),
    "IsolatedOptimizer is constructed": lambda: IsolatedOptimizer(torch.optim.SGD(unnamed(), lr=0.1)),
    "a step": lambda: with_nan(EPIAdamW(unnamed(), layers="tensor")).step(),
    "a step of IsolatedOptimizer": lambda: with_nan(
        IsolatedOptimizer(torch.optim.SGD(unnamed(), lr=0.1), layers="tensor")
    ).step(),
    "a step that a scheduler has wrapped": stepped_by_a_scheduler,
    "a step with a closure": stepped_by_a_closure,
    "a compiled step": stepped_compiled,
    "a step by a scaler": stepped_by_a_scaler,
    "a step in backward()": released,
    "flat partitions": flat_partitions,
    "a step that a training framework takes": called_by_a_framework,
    "fisher": scored,
}


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_a_warning_points_at_the_program(situation: Callable[[], Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        situation()
    assert caught
    assert {w.filename for w in caught} == {__file__}


def test_no_other_module_warns_by_itself() -> None:
    calls = [
        path.name
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "warn" and ast.unparse(node.value) == "warnings"
    ]
    assert calls == ["notices.py"]
