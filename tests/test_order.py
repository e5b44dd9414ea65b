"""A state goes by name where the same names are in another order, and by position where the names are others."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW
from epi_kernels.engine.checkpoint import in_our_order

NAMES = ("0.q.weight", "0.k.weight", "1.q.weight", "1.k.weight", "1.bias")
OTHER = ("1.bias", "1.k.weight", "0.q.weight", "0.k.weight", "1.q.weight")
MASK = {"0.q.weight": torch.eye(3, dtype=torch.bool), "1.bias": torch.tensor([True, False, True])}

Make = Callable[[Sequence[Any]], Any]
MAKES: dict[str, Make] = {
    "epi": lambda p: EPIAdamW(p, lr=0.1, isolation_ratio=0.3, mask_interval=2),
    "exp_avg_sq": lambda p: EPIAdamW(p, lr=0.1, isolation_ratio=0.3, mask_interval=2, importance="exp_avg_sq"),
    "tensor": lambda p: EPIAdamW(p, lr=0.1, isolation_ratio=0.3, mask_interval=2, layers="tensor"),
    "masked": lambda p: MaskedAdamW(p, lr=0.1, frozen=masks_of(p), amsgrad=True),
    "sparse": lambda p: SparseAdamW(p, lr=0.1, trainable=masks_of(p)),
}


def masks_of(groups: Sequence[Any]) -> dict[str, Tensor]:
    names = [name for group in groups for name, _ in group["params"]]
    return {name: mask for name in names for bare, mask in MASK.items() if name.endswith(bare)}


def parameters(names: Sequence[str]) -> dict[str, Parameter]:
    return {name: Parameter(torch.ones((3,) if "bias" in name else (3, 3))) for name in names}


def train(params: dict[str, Parameter], optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for name in NAMES:
            params[name].grad = torch.randn(params[name].shape, generator=generator)
        optimizer.step()


def copied(params: dict[str, Parameter], names: Sequence[str]) -> dict[str, Parameter]:
    return {name: Parameter(params[name].detach().clone()) for name in names}


def grouped(params: dict[str, Parameter], size: int | None, prefix: str = "") -> list[dict[str, Any]]:
    named = [(prefix + name, param) for name, param in params.items()]
    return [{"params": named}] if size is None else [{"params": named[:size]}, {"params": named[size:]}]


@pytest.mark.parametrize("size", [None, 2], ids=["one group", "two groups"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", MAKES)
def test_a_state_goes_by_name_where_the_order_is_another(kind: str, prefix: str, size: int | None) -> None:
    straight = parameters(NAMES)
    optimizer = MAKES[kind](grouped(straight, size))
    train(straight, optimizer, 1, 3)
    reordered = copied(straight, OTHER)
    other = MAKES[kind](grouped(reordered, size, prefix))
    own_names = [list(group["param_names"]) for group in other.param_groups]
    digests = [group.get("layer_digest") for group in other.param_groups]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["param_names"] for group in other.param_groups] == own_names
    assert [group.get("layer_digest") for group in other.param_groups] == digests
    for name in NAMES:
        assert torch.equal(mask_of(other, reordered[name]), mask_of(optimizer, straight[name])), name
    train(straight, optimizer, 4, 7)
    train(reordered, other, 4, 7)
    for name in NAMES:
        assert torch.equal(straight[name], reordered[name]), name
    if kind == "sparse":
        assert set(other.delta()) == {prefix + name for name in MASK}


def mask_of(optimizer: Any, param: Tensor) -> Tensor:
    if isinstance(optimizer, SparseAdamW):
        return optimizer.trainable_mask(param)
    return optimizer.isolation_mask(param)


@pytest.mark.parametrize("kind", MAKES)
def test_a_state_goes_by_position_where_the_names_are_others(kind: str) -> None:
    straight = parameters(NAMES)
    optimizer = MAKES[kind](grouped(straight, None))
    train(straight, optimizer, 1, 3)
    twin = copied(straight, NAMES)
    renamed = {name.replace("q", "query"): param for name, param in twin.items()}
    if kind in ("masked", "sparse"):
        other: Any = type(optimizer)(
            renamed.items(), lr=0.1, **{"frozen" if kind == "masked" else "trainable": {}}, amsgrad=kind == "masked"
        )
    else:
        other = MAKES[kind](grouped(renamed, None))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, 4, 7)
    train(twin, other, 4, 7)
    for name in NAMES:
        assert torch.equal(straight[name], twin[name]), name


def test_another_grouping_into_layers_is_refused_in_any_order() -> None:
    def make(names: Sequence[str], layer: Callable[[str], str]) -> EPIAdamW:
        return EPIAdamW(parameters(names).items(), layers=layer)

    blocks = make(NAMES, lambda name: name[0])
    assert make(OTHER, lambda name: name[0]).load_state_dict(blocks.state_dict()) is None
    for order in (NAMES, OTHER):
        other = make(order, lambda name: name.split(".")[-1])
        with pytest.raises(ValueError, match="falls into other layers"):
            other.load_state_dict(blocks.state_dict())
    # what is by chance the same digest by position is another grouping by name
    two = ("0.a", "1.b", "0.c")
    saved = EPIAdamW([(name, Parameter(torch.ones(2))) for name in two], layers=lambda name: name[0])
    swapped = EPIAdamW(
        [(name, Parameter(torch.ones(2))) for name in ("1.b", "0.c", "0.a")],
        layers=lambda name: "one" if name in ("1.b", "0.a") else "other",
    )
    assert saved.param_groups[0]["layer_digest"] == swapped.param_groups[0]["layer_digest"]
    with pytest.raises(ValueError, match="falls into other layers"):
        swapped.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("kind", MAKES)
def test_a_shape_that_does_not_fit_by_name_is_refused(kind: str) -> None:
    params = parameters(NAMES)
    optimizer = MAKES[kind](grouped(params, None))
    train(params, optimizer, 1, 3)
    names = ("0.q.weight", "0.k.weight", "1.q.weight", "1.bias", "1.k.weight")
    shapes = {name: (3,) if name == "1.bias" else (4, 3) if name == "1.k.weight" else (3, 3) for name in names}
    other = MAKES[kind]([{"params": [(name, Parameter(torch.ones(shape))) for name, shape in shapes.items()]}])
    before = other.state_dict()["state"]
    if kind == "sparse":  # nothing is selected there, and compact states do not carry a shape
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return
    with pytest.raises(ValueError, match="1.k.weight has shape"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state_dict()["state"] == before


@pytest.mark.parametrize("change", ["none", "no names", "fewer names", "twice", "text", "unnamed here"])
def test_states_without_usable_names_stay_as_they_are(change: str) -> None:
    groups = grouped(parameters(NAMES), 2)
    ours: list[dict[str, Any]] = [
        {"params": [p for _, p in g["params"]], "param_names": [n for n, _ in g["params"]]} for g in groups
    ]
    saved: list[dict[str, Any]] = [
        {"params": [0, 1], "param_names": list(OTHER[:2])},
        {"params": [2, 3, 4], "param_names": list(OTHER[2:])},
    ]
    if change == "none":
        state = in_our_order({"state": {}, "param_groups": saved}, ours)
        assert [group["params"] for group in state["param_groups"]] == [[2, 3], [4, 1, 0]]
        assert [group["params"] for group in saved] == [[0, 1], [2, 3, 4]]
        return
    if change == "no names":
        del saved[1]["param_names"]
    elif change == "fewer names":
        saved[1]["param_names"].pop()
    elif change == "twice":
        saved[1]["param_names"][0] = saved[0]["param_names"][0]
    elif change == "text":
        saved[0]["param_names"] = "ab"
    else:
        del ours[0]["param_names"]
    given = {"state": {}, "param_groups": saved}
    assert in_our_order(given, ours) is given


def test_tied_parameters_of_two_names() -> None:
    shared = nn.Parameter(torch.ones(3))
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.ones(2)), shared, shared], "param_names": ["z", "x", "y"]}
    ]
    saved = {"state": {}, "param_groups": [{"params": [0, 0, 2], "param_names": ["x", "y", "z"]}]}
    assert in_our_order(saved, groups)["param_groups"][0]["params"] == [2, 0, 0]
