"""What a training program may do with AdamW, it may do with ours.

Parameters of every form, options changed between steps, torch.compile, and the masks under all of it. PyTorch's own
tests are in test_torch_suite.py, the table of names and errors in test_table_against_torch.py, checkpoints in
test_checkpoint.py, scalers and clipping in test_scaling.py.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW


def give(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


# Parameters of every form ------------------------------------------------------------------------------------------

FORMS: dict[str, Any] = {
    "0-d": lambda: torch.randn(()),
    "one entry": lambda: torch.randn(1),
    "empty": lambda: torch.randn(0, 3),
    "transposed": lambda: torch.randn(6, 5).t(),
    "every second": lambda: torch.randn(10, 6)[:, ::2],
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "a view into another": lambda: torch.randn(4, 30)[1:3],
    "complex": lambda: torch.randn(7, 3, dtype=torch.complex64),
    "complex, transposed": lambda: torch.randn(7, 3, dtype=torch.complex64).t(),
    "complex128": lambda: torch.randn(9, dtype=torch.complex128),
}
GRADS: dict[str, Any] = {
    "as the parameter": lambda g, p: g.clone().as_strided(p.shape, torch.empty_like(p).stride()).copy_(g),
    "contiguous": lambda g, p: g.contiguous(),
    "expanded": lambda g, p: g.flatten()[:1].reshape([1] * g.dim()).expand(g.shape) if g.numel() else g,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("layout", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("isolation_ratio", [0.0, 0.3])
def test_a_parameter_of_any_form_moves_as_its_contiguous_copy(form: Any, layout: Any, isolation_ratio: float) -> None:
    param = form().requires_grad_()
    twin = Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    other, other_twin = Parameter(torch.ones(5)), Parameter(torch.ones(5))
    settings: dict[str, Any] = {"lr": 0.1, "isolation_ratio": isolation_ratio, "mask_interval": 2}
    ours = EPIAdamW([("h.0.w", param), ("h.0.b", other)], **settings)
    theirs = EPIAdamW([("h.0.w", twin), ("h.0.b", other_twin)], **settings, backend="reference")
    address = param.data_ptr()
    for step in range(5):
        give([twin, other_twin], step)
        twin.grad = layout(twin.grad, twin).clone(memory_format=torch.contiguous_format)
        param.grad, other.grad = layout(twin.grad, param), other_twin.grad
        ours.step()
        theirs.step()
        assert torch.equal(param, twin)
        assert torch.equal(ours.isolation_mask(param), theirs.isolation_mask(twin))
    assert param.data_ptr() == address
    for key, value in ours.state[param].items():
        assert key == "step" or value.shape == param.shape, key


def test_an_expanded_parameter_is_refused_by_name_before_anything_changes() -> None:
    # torch's step raises for it too, after it has moved what comes before
    first, expanded = Parameter(torch.ones(3)), torch.ones(1, 3).expand(4, 3).requires_grad_()
    optimizer = EPIAdamW([("first", first), ("wide", expanded)])
    give([first, expanded], 0)
    with pytest.raises(RuntimeError, match="wide is expanded"):
        optimizer.step()
    assert first.tolist() == [1.0] * 3
    assert not optimizer.state


def test_a_complex_entry_is_protected_whole_by_the_square_of_its_magnitude() -> None:
    param = Parameter(torch.tensor([1 + 1j, 2 + 2j, 3 + 3j, 4 + 4j]))
    optimizer = EPIAdamW([("w", param)], isolation_ratio=0.5, mask_interval=1, importance_beta=0.5, lr=0.1)
    param.grad = torch.tensor([3 + 4j, 1j, 4.9 + 0j, 0.5 + 0j])
    optimizer.step()
    torch.testing.assert_close(optimizer.importance(param), torch.tensor([12.5, 0.5, 12.005, 0.125]))
    assert optimizer.isolation_mask(param).tolist() == [True, False, True, False]
    assert param[0].item() == 1 + 1j
    assert param[2].item() == 3 + 3j
    assert all(param[i].real != i + 1 and param[i].imag != i + 1 for i in (1, 3) if i == 1)
    param.grad = torch.tensor([complex("nan"), 1, 1, 1])
    with pytest.warns(RuntimeWarning, match="w: 1 squared gradients"):
        optimizer.step()
    assert param[0].item() == 1 + 1j
    assert optimizer.telemetry()[-1]["eligible"] == 4


def test_the_second_moment_of_a_complex_parameter_has_no_place_for_a_lock() -> None:
    z = Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(NotImplementedError, match="z is torch.complex64, whose second moment has two parts"):
        EPIAdamW([("z", z)], importance="exp_avg_sq")
    EPIAdamW([("z", z)], importance="exp_avg_sq", isolation_ratio=0.0)


def test_a_differentiable_step_needs_a_second_moment_without_locks_and_float32() -> None:
    p = torch.ones(2)
    p.grad = torch.ones(2)
    with pytest.raises(NotImplementedError, match="use importance='ema'"):
        EPIAdamW([("p", p)], importance="exp_avg_sq", differentiable=True).step()
    half = torch.ones(2, dtype=torch.bfloat16)
    half.grad = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="h is torch.bfloat16"):
        EPIAdamW([("h", half)], differentiable=True).step()


def _leaf() -> Tensor:
    return Parameter(torch.ones(3))


def _expanded() -> Tensor:
    return torch.ones(1, requires_grad=True).clone().expand(3)


@pytest.mark.parametrize(
    ("param", "grad", "state", "message"),
    [
        (_leaf, torch.ones(3), {}, "w is a leaf that requires a gradient"),
        (_expanded, torch.ones(3), {}, "w is expanded"),
        (lambda: _leaf().clone(), torch.ones(3).to_sparse(), {}, "does not support sparse gradients"),
        (lambda: _leaf().clone(), torch.ones(3), {"importance": torch.ones(2)}, r"w has shape \(3,\) now"),
        (lambda: _leaf().clone(), torch.ones(3), {"exp_avg": torch.ones(2)}, r"w has shape \(3,\) now"),
    ],
    ids=["leaf", "expanded", "sparse gradient", "importance", "exp_avg"],
)
def test_a_differentiable_step_that_is_refused_changes_nothing(
    param: Any, grad: Tensor, state: dict[str, Tensor], message: str
) -> None:
    w = param()
    other = Parameter(torch.ones(3)).clone()  # comes first, and could be stepped
    optimizer = EPIAdamW([("v", other), ("w", w)], differentiable=True, isolation_ratio=0.5, mask_interval=1)
    optimizer.state[w].update(state)
    other.grad, w.grad = torch.ones(3), grad
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))
    assert optimizer.param_groups[0]["isolation_clock"] == 0
    assert not optimizer.state.get(other)
    assert optimizer.state[w].keys() == state.keys()


@pytest.mark.parametrize("importance_beta", [0.0, 0.9])
def test_a_differentiable_step_protects_what_the_other_protects(importance_beta: float) -> None:
    results = []
    for differentiable in (False, True):
        torch.manual_seed(0)
        params = [torch.randn(20), torch.randn(4, 5)]
        params = [Parameter(p) for p in params]
        if differentiable:  # autograd writes into no leaf that requires a gradient
            params = [p.clone() for p in params]
        optimizer = EPIAdamW(
            [("h.0.a", params[0]), ("h.0.b", params[1])],
            lr=0.1,
            isolation_ratio=0.25,
            mask_interval=2,
            importance_beta=importance_beta,
            differentiable=differentiable,
        )
        for step in range(6):
            give(params, step)
            optimizer.step()
        results.append([t for p in params for t in (optimizer.importance(p), optimizer.isolation_mask(p))])
        assert sum(int(optimizer.isolation_mask(p).sum()) for p in params) == 10
    assert all(map(torch.equal, *results))


# What is in memory with another sign ---------------------------------------------------------------------------------

ALL: dict[str, Any] = {
    "EPIAdamW": lambda p: EPIAdamW([("w", p)], lr=0.1, isolation_ratio=0.0),
    "S = exp_avg_sq": lambda p: EPIAdamW([("w", p)], lr=0.1, importance="exp_avg_sq"),
    "MaskedAdamW": lambda p: MaskedAdamW([("w", p)], lr=0.1, frozen={}),
    "SparseAdamW": lambda p: SparseAdamW(
        [("w", p)], lr=0.1, trainable={"w": torch.ones(p.shape, dtype=torch.bool, device=p.device)}
    ),
}
every_optimizer = pytest.mark.parametrize("build", ALL.values(), ids=ALL)


@every_optimizer
def test_a_gradient_that_is_negated_lazily_has_its_own_sign(build: Any) -> None:
    values = torch.tensor([1.0, 2.0, -3.0, 4.0])
    # in memory the first has the other sign, with the parameter's strides and without
    lazy = [torch._neg_view(values), torch.conj(torch.complex(values, -values)).imag, values, torch._neg_view(values)]
    param, twin = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    ours, theirs = build(param), build(twin)
    for grad in lazy:  # the sign changes from step to step
        param.grad, twin.grad = grad, grad.clone().resolve_neg()
        ours.step()
        theirs.step()
        assert torch.equal(param, twin)


def test_gradients_of_complex_parameters_that_are_conjugated_lazily(backend: str) -> None:
    params = [Parameter(torch.ones(6, dtype=torch.complex64)) for _ in range(2)]
    ours, theirs = (EPIAdamW([("w", p)], lr=0.1, backend=backend) for p in params)
    every_second = torch.randn(12, dtype=torch.complex64)[::2]
    for grad in (
        every_second.conj(),
        every_second,
        torch._neg_view(every_second),
        torch._neg_view(every_second).conj(),
    ):
        params[0].grad, params[1].grad = grad, grad.resolve_conj().resolve_neg().clone()
        ours.step()
        theirs.step()
        assert torch.equal(*params)


@every_optimizer
def test_a_parameter_that_is_negated_lazily_is_refused_by_name(build: Any) -> None:
    param = torch._neg_view(torch.ones(4)).detach().requires_grad_()
    param.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="w is negated lazily: its values are not in memory"):
        build(param).step()


@pytest.mark.parametrize("kind", ["EPIAdamW", "MaskedAdamW"])
def test_a_parameter_that_is_conjugated_lazily_is_refused_by_name(kind: str) -> None:
    param = torch.ones(4, dtype=torch.complex64).conj().detach().requires_grad_()
    param.grad = torch.ones(4, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="w is conjugated lazily: its values are not in memory"):
        ALL[kind](param).step()


# What the look before a step sees ------------------------------------------------------------------------------------


@every_optimizer
def test_a_gradient_of_other_strides_is_seen(build: Any) -> None:
    param, twin = Parameter(torch.ones(3, 4)), Parameter(torch.ones(3, 4))
    ours, theirs = build(param), build(twin)
    for step in range(4):
        twin.grad = torch.randn(3, 4)
        param.grad = twin.grad if step % 2 == 0 else twin.grad.t().contiguous().t()
        ours.step()
        theirs.step()
        assert torch.equal(param, twin)


@every_optimizer
def test_a_parameter_of_other_strides_at_the_same_place_is_seen(build: Any) -> None:
    storage = torch.arange(16.0)
    param, twin = Parameter(storage.view(4, 4)), Parameter(storage.view(4, 4).clone())
    ours, theirs = build(param), build(twin)
    for step in range(4):
        if step == 2:
            param.data, twin.data = param.data.t(), twin.data.t().contiguous()
        param.grad = torch.randn(4, 4)
        twin.grad = param.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(param, twin)


def test_a_parameter_that_freezes_between_steps_advances_its_importance_all_the_same() -> None:
    # what a refresh advances and what it does not are two launches: which one a parameter is in must follow
    param, twin, other, other_twin = (Parameter(torch.ones(8)) for _ in range(4))
    settings: dict[str, Any] = {"isolation_ratio": 0.25, "mask_interval": 2, "importance_beta": 0.5}
    ours = EPIAdamW([("a.w", param), ("b.w", other)], **settings)
    theirs = EPIAdamW([("a.w", twin), ("b.w", other_twin)], **settings)
    for step in range(4):
        param.requires_grad_(step != 1)
        twin.requires_grad_(step != 1)
        give([param, other], step)
        give([twin, other_twin], step)
        theirs._planner.forget()  # looks anew
        ours.step()
        theirs.step()
        for p, q in ((param, twin), (other, other_twin)):
            assert torch.equal(ours.importance(p), theirs.importance(q))
            assert torch.equal(p, q)


# Options that change between steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["EPIAdamW", "MaskedAdamW"])
def test_options_changed_in_a_group_are_those_of_the_next_step(kind: str) -> None:
    params, twins = ([Parameter(torch.ones(6)), Parameter(torch.ones(3, 2))] for _ in range(2))
    ours: Any = (
        EPIAdamW(params, isolation_ratio=0.0, layers="tensor") if kind == "EPIAdamW" else MaskedAdamW(params, frozen={})
    )
    theirs = torch.optim.AdamW(twins)
    changes = [{}, {"lr": 0.1}, {"weight_decay": 0.5}, {"betas": (0.5, 0.6)}, {"eps": 0.1}, {"maximize": True}]
    for step, change in enumerate([*changes, {"lr": torch.tensor(0.01)}, {"foreach": False}]):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(change)
        give(params, step)
        give(twins, step)
        ours.step()
        theirs.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_parameter_whose_data_was_replaced_is_the_one_that_moves() -> None:
    param = Parameter(torch.ones(4))
    optimizer = EPIAdamW([("w", param)], lr=0.1, isolation_ratio=0.0)
    param.grad = torch.ones(4)
    optimizer.step()
    old = param.data
    kept = old.clone()
    param.data = torch.full((4,), 5.0)
    optimizer.step()
    assert torch.equal(old, kept)
    assert (param != 5.0).all()


def test_a_group_added_in_the_middle_has_a_clock_of_its_own() -> None:
    first, second = Parameter(torch.ones(8)), Parameter(torch.ones(8))
    optimizer = EPIAdamW([("a.w", first)], isolation_ratio=0.25, mask_interval=4)
    for step in range(3):
        give([first], step)
        optimizer.step()
    optimizer.add_param_group({"params": [("b.w", second)], "lr": 0.5})
    give([first, second], 3)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [4, 1]
    assert [record["step"] for record in optimizer.telemetry()] == [4]
    assert optimizer.telemetry()[0]["eligible"] == 16


@pytest.mark.parametrize("kind", ["EPIAdamW", "S = exp_avg_sq", "MaskedAdamW"])
def test_amsgrad_that_is_switched_on_later_starts_with_the_moments_of_then(kind: str) -> None:
    param, twin = Parameter(torch.ones(6)), Parameter(torch.ones(6))
    ours, theirs = ALL[kind](param), torch.optim.AdamW([twin], lr=0.1)
    for step in range(6):
        if step == 3:
            ours.param_groups[0]["amsgrad"] = theirs.param_groups[0]["amsgrad"] = True
            # torch itself makes it for a parameter without a state alone
            theirs.state[twin]["max_exp_avg_sq"] = torch.zeros(6)
        give([param], step)
        param.grad /= step + 1.0
        twin.grad = param.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.state[param]["max_exp_avg_sq"], theirs.state[twin]["max_exp_avg_sq"])


def test_a_name_is_whatever_torch_takes_for_one() -> None:
    params = [Parameter(torch.ones(8)), Parameter(torch.ones(8))]
    optimizer = EPIAdamW(list(enumerate(params)), isolation_ratio=0.25, mask_interval=1)
    give(params, 0)
    optimizer.step()
    assert [layer["eligible"] for layer in optimizer.telemetry()[0]["layers"]] == [8, 8]


def test_a_frozen_parameter_that_thaws_and_freezes() -> None:
    first, second = Parameter(torch.ones(8)), Parameter(torch.ones(8), requires_grad=False)
    optimizer = EPIAdamW([("a.w", first), ("b.w", second)], isolation_ratio=0.25, mask_interval=1)
    eligible = []
    for step, trains in enumerate((False, True, True, False)):
        second.requires_grad_(trains)
        give([first, second] if trains else [first], step)
        optimizer.step()
        optimizer.zero_grad()
        eligible.append(optimizer.telemetry()[-1]["eligible"])
    assert eligible == [8, 16, 16, 8]


# torch.compile -------------------------------------------------------------------------------------------------------

STEPS: dict[str, Any] = {
    "isolation off": lambda p: EPIAdamW(p, lr=0.1, isolation_ratio=0.0),
    "isolation on": lambda p: EPIAdamW(p, lr=0.1, isolation_ratio=0.2, mask_interval=2),
    "S = exp_avg_sq": lambda p: EPIAdamW(p, lr=0.1, isolation_ratio=0.2, mask_interval=2, importance="exp_avg_sq"),
    "tensor lr": lambda p: EPIAdamW(p, lr=torch.tensor(0.1), isolation_ratio=0.2, mask_interval=2),
    "MaskedAdamW": lambda p: MaskedAdamW(p, lr=0.1, frozen={"l.0": torch.arange(40) % 2 == 0}),
}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("build", STEPS.values(), ids=STEPS)
def test_a_compiled_step_is_the_step_without_graph_breaks(build: Any, compiler: str) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        params = [Parameter(torch.linspace(-1, 1, 40)) for _ in range(3)]
        optimizer = build([(f"l.{i}", p) for i, p in enumerate(params)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on its profiler range
            step = torch.compile(optimizer.step, backend=compiler, fullgraph=True) if compiled else optimizer.step
            for number in range(6):
                give(params[:2], number)
                if number == 3:
                    optimizer.param_groups[0]["lr"] *= 0.5
                step()
        if compiled:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
            assert not torch._dynamo.utils.counters["graph_break"]
        results.append([*(p.detach() for p in params), *(optimizer.isolation_mask(p) for p in params)])
        assert [int(optimizer.state[p]["step"]) for p in params[:2]] == [6, 6]
    assert all(map(torch.equal, *results))


def test_a_compiled_training_step_with_the_optimizer_inside() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 1))
        optimizer = EPIAdamW(model.named_parameters(), lr=0.1, isolation_ratio=0.2, mask_interval=2)

        def clamp_and_step(model: torch.nn.Module = model, optimizer: Any = optimizer) -> None:
            # what comes before the step in the same graph is written before it
            with torch.no_grad():
                for param in model.parameters():
                    param.clamp_(-0.3, 0.3)
            optimizer.step()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = torch.compile(clamp_and_step, backend="aot_eager") if compiled else clamp_and_step
            for number in range(5):
                torch.manual_seed(number)
                model(torch.randn(3, 6)).square().sum().backward()
                step()
                optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_the_operation_of_a_compiled_step_dies_with_its_optimizer() -> None:
    param = Parameter(torch.ones(3))
    optimizer = EPIAdamW([("w", param)])
    number = optimizer._number
    twin = copy.deepcopy(optimizer)
    assert twin._number != number
    del optimizer
    with pytest.raises(KeyError):
        torch.ops.epi_kernels.optimizer_step_([param], [None], number)
