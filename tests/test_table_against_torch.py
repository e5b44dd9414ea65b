"""Every public attribute, group key, state key and error text is torch.optim.AdamW's, read from the installed torch.

A table: a row for each thing that a program can see of an optimizer. What this package adds stands in OURS, and nothing
else may differ.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW

TORCH = torch.optim.AdamW

# what the classes add: constructor arguments, keys of a group, keys of a parameter's state, public methods
SETTINGS = {"isolation_ratio", "importance_beta", "mask_interval", "layers", "normalize", "scope", "threshold"}
# how numbers are kept; a group has these keys only where they say something
STORAGES = {"state_dtype", "rounding", "master_weight_bits"}
OURS: dict[type, dict[str, set[str]]] = {
    EPIAdamW: {
        "arguments": SETTINGS
        | STORAGES
        | {"importance", "importance_dtype", "process_group", "clip_grad_norm", "backend"},
        "group": SETTINGS | {"importance", "clip_grad_norm", "layer_digest", "layers_auto", "isolation_clock"},
        "state": {"importance"},
        "methods": {"isolation_mask", "importance", "refresh", "telemetry", "load_telemetry", "bind_deepspeed"}
        | {"delta_since"},
    },
    MaskedAdamW: {
        "arguments": STORAGES | {"frozen", "clip_grad_norm", "process_group", "backend"},
        "group": {"clip_grad_norm"},
        "state": {"frozen"},
        "methods": {"isolation_mask", "delta_since"},
    },
    SparseAdamW: {
        "arguments": STORAGES | {"trainable", "process_group", "backend"},
        "group": set(),
        "state": {"indices"},
        "methods": {"trainable_mask", "select", "delta"},
    },
}
each_class = pytest.mark.parametrize("ours", OURS, ids=lambda c: c.__name__)


# IsolatedOptimizer is no AdamW: it has the groups, the state and the errors of its base
with_isolated = pytest.mark.parametrize("ours", [*OURS, IsolatedOptimizer], ids=lambda c: c.__name__)


def build(ours: type, params: Any, **kwargs: Any) -> Any:
    if ours in (MaskedAdamW, SparseAdamW):
        given = list(params)
        masks = {p: torch.ones(p.shape, dtype=torch.bool) for p in given if isinstance(p, Tensor)}
        return ours(given, **{"frozen" if ours is MaskedAdamW else "trainable": masks}, **kwargs)
    if ours is IsolatedOptimizer:
        return IsolatedOptimizer(TORCH(params, **kwargs), layers="tensor")
    return EPIAdamW(params, layers="tensor", **kwargs) if ours is EPIAdamW else ours(params, **kwargs)


def stepped(ours: type, **kwargs: Any) -> tuple[Any, Parameter]:
    param = Parameter(torch.randn(3, 4))
    optimizer = build(ours, [param], **kwargs)
    param.grad = torch.randn(3, 4)
    optimizer.step()
    return optimizer, param


@each_class
def test_a_program_that_asks_what_it_is_finds_adamw(ours: type) -> None:
    optimizer, _ = stepped(ours)
    assert isinstance(optimizer, TORCH)
    assert isinstance(optimizer, torch.optim.Optimizer)


@each_class
def test_arguments(ours: type) -> None:
    theirs, mine = (inspect.signature(c).parameters for c in (TORCH, ours))
    assert set(mine) - set(theirs) == OURS[ours]["arguments"]
    assert [name for name in mine if name in theirs] == list(theirs)
    for name, argument in theirs.items():
        assert (mine[name].default, mine[name].kind) == (argument.default, argument.kind), name
    for name in OURS[ours]["arguments"]:
        assert mine[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert inspect.signature(ours.step).parameters.keys() == inspect.signature(TORCH.step).parameters.keys()
    assert inspect.signature(ours.load_state_dict).parameters.keys() == {"self", "state_dict"}


@each_class
def test_public_names(ours: type) -> None:
    theirs, mine = ({n for n in dir(stepped(c)[0]) if not n.startswith("_")} for c in (TORCH, ours))
    assert theirs <= mine
    assert mine - theirs == OURS[ours]["methods"]


@each_class
def test_private_names_that_others_rely_on(ours: type) -> None:
    """Scalers, schedulers, DCP and torch.compile go by these."""
    for kwargs in ({}, {"fused": True}):
        theirs, mine = stepped(TORCH, **kwargs)[0], stepped(ours, **kwargs)[0]
        # a scaler unscales for SparseAdamW, whose step reads few entries of a gradient
        leaves_it = ours is not SparseAdamW and getattr(theirs, "_step_supports_amp_scaling", False)
        assert mine._step_supports_amp_scaling == leaves_it
        assert type(mine).step.hooked is type(theirs).step.hooked is True
        assert mine._zero_grad_profile_name == f"Optimizer.zero_grad#{ours.__name__}.zero_grad"


@each_class
def test_group_keys_and_values(ours: type) -> None:
    theirs, mine = stepped(TORCH)[0], stepped(ours)[0]
    for one, other in ((theirs.param_groups[0], mine.param_groups[0]), (theirs.defaults, mine.defaults)):
        assert set(other) - set(one) <= OURS[ours]["group"]
        assert [key for key in other if key in one] == list(one)
        assert {k: v for k, v in other.items() if k in one and k != "params"} == {
            k: v for k, v in one.items() if k != "params"
        }
    assert set(mine.param_groups[0]) - set(theirs.param_groups[0]) == OURS[ours]["group"]


def test_isolated_the_groups_are_the_base_s_and_so_is_the_state() -> None:
    theirs, mine = stepped(TORCH)[0], stepped(IsolatedOptimizer)[0]
    assert isinstance(mine, torch.optim.Optimizer)
    assert {n for n in dir(torch.optim.Optimizer) if not n.startswith("_")} <= set(dir(mine))
    assert list(mine.param_groups[0])[: len(theirs.param_groups[0])] == list(theirs.param_groups[0])
    added = set(mine.param_groups[0]) - set(theirs.param_groups[0])
    assert added == SETTINGS | {"importance", "layer_digest", "layers_auto", "isolation_clock"}
    one, other = (next(iter(o.state_dict()["state"].values())) for o in (theirs, mine))
    assert list(other) == [*one, "importance"]


@each_class
@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}], ids=str)
def test_state_keys_dtypes_shapes_and_devices(ours: type, kwargs: dict[str, Any]) -> None:
    if ours is SparseAdamW and "amsgrad" in kwargs:
        pytest.skip("SparseAdamW has no amsgrad, and says so")
    (theirs, q), (mine, p) = stepped(TORCH, **kwargs), stepped(ours, **kwargs)
    one, other = theirs.state[q], mine.state[p]
    assert [key for key in other if key in one] == list(one)
    assert set(other) - set(one) == OURS[ours]["state"]
    for key, value in one.items():
        found = other[key]
        if ours is SparseAdamW:  # its moments are those of the selected entries, here all
            found = found.view(value.shape)
        assert (found.dtype, found.shape, found.device, found.stride()) == (
            value.dtype,
            value.shape,
            value.device,
            value.stride(),
        ), key
    assert other["step"].item() == one["step"].item() == 1.0


@with_isolated
def test_the_form_of_a_state_dict(ours: type) -> None:
    theirs, mine = stepped(TORCH)[0].state_dict(), stepped(ours)[0].state_dict()
    assert list(mine) == list(theirs) == ["state", "param_groups"]
    assert list(mine["state"]) == list(theirs["state"]) == [0]
    assert mine["param_groups"][0]["params"] == theirs["param_groups"][0]["params"] == [0]


def a() -> Parameter:
    return Parameter(torch.ones(2))


CONSTRUCTION: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "lr < 0": lambda: ([a()], {"lr": -1.0}),
    "lr is NaN": lambda: ([a()], {"lr": float("nan")}),
    "lr of two": lambda: ([a()], {"lr": torch.tensor([0.1, 0.1])}),
    "lr a tensor, foreach": lambda: ([a()], {"lr": torch.tensor(0.1), "foreach": True}),
    "eps < 0": lambda: ([a()], {"eps": -1.0}),
    "beta1 = 1": lambda: ([a()], {"betas": (1.0, 0.9)}),
    "beta2 < 0": lambda: ([a()], {"betas": (0.9, -0.1)}),
    "a beta an integer": lambda: ([a()], {"betas": (0, 0.9)}),
    "betas a tensor, foreach": lambda: ([a()], {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True}),
    "betas mixed": lambda: ([a()], {"betas": (0.9, torch.tensor(0.9))}),
    "betas of two": lambda: ([a()], {"betas": (torch.tensor([0.9, 0.9]), torch.tensor([0.9, 0.9]))}),
    "weight_decay < 0": lambda: ([a()], {"weight_decay": -0.1}),
    "fused and foreach": lambda: ([a()], {"fused": True, "foreach": True}),
    "fused and differentiable": lambda: ([a()], {"fused": True, "differentiable": True}),
    "no parameters": lambda: ([], {}),
    "a tensor": lambda: (a(), {}),
    "a set in a group": lambda: ([{"params": {a()}}], {}),
    "no leaf": lambda: ([a() * 2], {}),
    "numbers": lambda: ([1.0], {}),
    "names for some": lambda: ([("w", a()), a()], {}),
    "a parameter in two groups": lambda: ([{"params": [w := a()]}, {"params": [w]}], {}),
    "a group that lacks params": lambda: ([{"lr": 0.1}], {}),
}
# what torch checks in its constructor alone is checked in the same words where a group brings it
GROUPS: dict[str, dict[str, Any]] = {
    case: make()[1]
    for case, make in CONSTRUCTION.items()
    if case.startswith(("lr", "eps", "a beta", "beta", "weight", "fused"))
}
GROUPS["one beta"] = {"betas": (0.9,)}


def text_of(call: Callable[[], Any]) -> tuple[type, str]:
    """Return the type and text of what a call raises; addresses and values of tensors aside."""
    try:
        call()
    except Exception as error:
        return type(error), re.sub(r"0x[0-9a-f]+", "", str(error))
    return type(None), ""


def refused_anyway(ours: type, case: str) -> bool:
    """Return whether a class refuses a flag by name before torch's check of it comes."""
    return ours is SparseAdamW and "differentiable" in case


@each_class
@pytest.mark.parametrize("case", CONSTRUCTION, ids=str)
def test_errors_of_the_constructor(ours: type, case: str) -> None:
    def construct(c: type) -> Any:
        params, kwargs = CONSTRUCTION[case]()
        masks = {MaskedAdamW: {"frozen": {}}, SparseAdamW: {"trainable": {}}}
        return c(params, **masks[c], **kwargs) if c in masks else build(c, params, **kwargs)

    found, expected = text_of(lambda: construct(ours)), text_of(lambda: construct(TORCH))
    assert expected[0] is not type(None)
    assert found == expected or (refused_anyway(ours, case) and found[0] is NotImplementedError)


@each_class
@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_errors_of_a_group_are_those_of_the_constructor(ours: type, case: str) -> None:
    optimizer, _ = stepped(ours)
    found = text_of(lambda: optimizer.add_param_group({"params": [a()], **GROUPS[case]}))
    expected = text_of(lambda: TORCH([a()], **GROUPS[case]))
    assert expected[0] is not type(None)
    assert found == expected or (refused_anyway(ours, case) and found[0] is NotImplementedError)
    assert len(optimizer.param_groups) == 1


def sparse(optimizer: Any, param: Parameter) -> None:
    param.grad = torch.zeros(3, 4).to_sparse()
    optimizer.step()


def complex_fused(optimizer: Any, param: Parameter) -> None:
    other = Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer.add_param_group({"params": [other], "fused": True})
    other.grad = torch.ones(2, dtype=torch.complex64)
    optimizer.step()


def capturable_on_the_cpu(optimizer: Any, param: Parameter) -> None:
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()


def another_number_of_groups(optimizer: Any, param: Parameter) -> None:
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "param_groups": state["param_groups"] * 2})


def another_number_of_parameters(optimizer: Any, param: Parameter) -> None:
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], "params": [0, 1]}]})


def a_group_that_is_no_dict(optimizer: Any, param: Parameter) -> None:
    optimizer.add_param_group([param])


def a_group_with_a_parameter_of_before(optimizer: Any, param: Parameter) -> None:
    optimizer.add_param_group({"params": [param]})


def a_group_with_names_after_one_without(optimizer: Any, param: Parameter) -> None:
    optimizer.add_param_group({"params": [("w", a())]})


# its own message, by name, comes before torch's
OWN_WORDS = {
    (SparseAdamW, complex_fused),
    (SparseAdamW, capturable_on_the_cpu),
    (IsolatedOptimizer, sparse),
}


@with_isolated
@pytest.mark.parametrize(
    "misuse",
    [
        sparse,
        complex_fused,
        capturable_on_the_cpu,
        another_number_of_groups,
        another_number_of_parameters,
        a_group_that_is_no_dict,
        a_group_with_a_parameter_of_before,
        a_group_with_names_after_one_without,
    ],
)
def test_errors_of_use(ours: type, misuse: Callable[[Any, Parameter], None]) -> None:
    (theirs, q), (mine, p) = stepped(TORCH), stepped(ours)
    found, expected = text_of(lambda: misuse(mine, p)), text_of(lambda: misuse(theirs, q))
    assert expected[0] is not type(None)
    if (ours, misuse) in OWN_WORDS:
        assert found[0] in (NotImplementedError, expected[0])
    else:
        assert found == expected


def test_the_table_sees_another_text() -> None:
    assert text_of(lambda: TORCH([a()], lr=-1.0)) != text_of(lambda: TORCH([a()], lr=-2.0))
    assert text_of(lambda: TORCH([a()])) == (type(None), "")


@each_class
def test_what_a_profiler_shows(ours: type) -> None:
    optimizer, param = stepped(ours)
    param.grad = torch.randn(3, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{ours.__name__}.step" in names
    assert f"Optimizer.zero_grad#{ours.__name__}.zero_grad" in names
