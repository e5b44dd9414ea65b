"""What a process has set for everybody changes no result: default dtype and device, flushed subnormals, threads, forks.

Each test is a process of its own (ambient.py, forked.py), since what is wrong here may abort or wait for ever.

- Parameters, states, masks, scores and deltas of every class and both CPU backends have the bits of the ordinary state.
- With flushed subnormals the masks have them too, of gradients whose squares are subnormal included.
- An optimizer steps in other threads than the one that made it, and several step at once.
- A child of fork(), which has none of its parent's OpenMP threads, steps on the native backend.
- No tensor of the package is made with a dtype or device that the process has as default.
"""

import ast
import os
from pathlib import Path

import ambient
import forked
import pytest
import torch
from conftest import available

import epi_kernels
from epi_kernels.backends import native

STATES = [*ambient.STATES, "other threads"]
ROOT = Path(epi_kernels.__file__).parent

# what torch makes with its default dtype and device, unless it is told
FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
}
FACTORIES |= {"randn", "randperm", "scalar_tensor", "tensor", "zeros"}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("state", STATES)
def test_results_are_those_of_the_ordinary_state(state: str, backend: str) -> None:
    if not available(backend):
        pytest.skip(native.obstacle() or f"{backend} cannot run here")
    if state == "flushed subnormals" and not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush subnormals")
    forked.run(ambient.run, 1, state, backend)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_of_fork_steps_natively() -> None:
    if not available("native"):
        pytest.skip(native.obstacle() or "native does not take float32 here")
    forked.run(ambient.run, 1, "forked", "native")


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_with_dtype_and_device(path: Path) -> None:
    for call in calls(path):
        if not (isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch"):
            continue
        if call.func.attr in FACTORIES:
            given = {keyword.arg for keyword in call.keywords}
            assert {"dtype", "device"} <= given, f"line {call.lineno}: {ast.unparse(call)}"
        if call.func.attr == "where" and len(call.args) == 3:
            numbers = [isinstance(arg, (ast.Constant, ast.UnaryOp)) for arg in call.args[1:]]
            assert not all(numbers), f"line {call.lineno}: two numbers, whose dtype is the default"
