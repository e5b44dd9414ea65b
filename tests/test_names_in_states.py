"""A state of an optimizer with parameter names loads into one without, and back, as torch's own tests have it.

Layers go by names, so ``layers="auto"`` has chosen two groupings then. It takes the one that it can have after the
load and says so. Groupings that were asked for are refused where they differ, and nothing changes.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from states import same_state
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer

NAMES = ("h.0.a", "h.0.b", "h.1.a", "h.1.b")


def params() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float32)) for _ in NAMES]


def build(kind: type, named: bool, layers: Any = "auto") -> Any:
    given: Any = list(zip(NAMES, params(), strict=True)) if named else params()
    settings = {"layers": layers, "isolation_ratio": 0.2, "mask_interval": 2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the optimizer was given no parameter names")
        if kind is EPIAdamW:
            return EPIAdamW(given, lr=0.1, **settings)
        return IsolatedOptimizer(torch.optim.AdamW(given, lr=0.1), **settings)


def train(optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(optimizer.param_groups[0]["params"]):
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) * 10.0**-i
        optimizer.step()


def masks(optimizer: Any) -> list[torch.Tensor]:
    return [optimizer.isolation_mask(param) for param in optimizer.param_groups[0]["params"]]


every_kind = pytest.mark.parametrize("kind", [EPIAdamW, IsolatedOptimizer])


@every_kind
def test_an_unnamed_optimizer_takes_the_names_of_a_state_and_its_layers(kind: type) -> None:
    source, target = build(kind, True), build(kind, False)
    train(source, 1, 3)
    saved = copy.deepcopy(source.state_dict())
    with pytest.warns(UserWarning, match="its layers are by 'block' now, as in the state, and no longer by 'tensor'"):
        target.load_state_dict(copy.deepcopy(saved))
    assert same_state(target.state_dict(), saved)
    assert "in 2 layers by 'block'" in repr(target)
    for ours, theirs in zip(target.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
        ours.data.copy_(theirs.data)
    train(source, 4, 8)
    train(target, 4, 8)
    assert all(map(torch.equal, masks(source), masks(target)))
    assert any(mask.any() for mask in masks(source))


@every_kind
def test_a_named_optimizer_keeps_its_layers_with_a_state_without_names(kind: type) -> None:
    source, target = build(kind, False), build(kind, True)
    train(source, 1, 3)
    with pytest.warns(UserWarning, match="saved with layers by 'tensor', and this optimizer has them by 'block'"):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert target.param_groups[0]["param_names"] == list(NAMES)
    assert all(map(torch.equal, masks(source), masks(target)))
    train(target, 4, 4)  # the next refresh
    assert {layer["layer"] for layer in target.telemetry()[-1]["layers"]} == {"h.0", "h.1"}


@every_kind
def test_there_and_back_says_nothing_more(kind: type) -> None:
    source, between, target = build(kind, True), build(kind, False), build(kind, True)
    train(source, 1, 3)
    with pytest.warns(UserWarning, match="by 'block' now"):
        between.load_state_dict(copy.deepcopy(source.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(copy.deepcopy(between.state_dict()))
    assert same_state(target.state_dict(), source.state_dict())


@every_kind
@pytest.mark.parametrize(
    ("saved_named", "saved_layers", "named", "layers"),
    [
        (True, "block", False, "auto"),
        (True, "auto", False, "tensor"),
        (False, "tensor", True, "auto"),
        (False, "auto", True, "block"),
        (True, "auto", True, "tensor"),
        (True, lambda name: name[-1], True, "auto"),
    ],
)
def test_groupings_that_were_asked_for_and_differ_are_refused(
    kind: type, saved_named: bool, saved_layers: Any, named: bool, layers: Any
) -> None:
    source, target = build(kind, saved_named, saved_layers), build(kind, named, layers)
    train(source, 1, 3)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="falls into other layers, and the masks would not compare"):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert same_state(target.state_dict(), before)
    train(target, 1, 3)


@every_kind
def test_automatic_layers_of_other_names_are_refused(kind: type) -> None:
    source, target = build(kind, True), build(kind, True)
    state = copy.deepcopy(source.state_dict())
    state["param_groups"][0]["layer_digest"] = "another model"
    with pytest.raises(ValueError, match="falls into other layers"):
        target.load_state_dict(state)
