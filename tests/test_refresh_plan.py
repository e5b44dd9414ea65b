"""A refresh is planned once and goes by its plan for as long as all that it depends on is as it was.

- Steps of the same parameters plan one refresh.
- Whatever changes between two refreshes, a run equals one that plans every refresh anew, bit for bit.
- Negative control: a plan that were kept nevertheless would be seen by these tests.
- A planned refresh passes few files of the package.
"""

import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import skip_unless_it_takes
from states import same_state
from torch.nn import Parameter

import epi_kernels
from epi_kernels import EPIAdamW, IsolatedOptimizer
from epi_kernels.isolation import isolation
from epi_kernels.isolation.isolation import Isolation

NAMES = ["blocks.0.w", "blocks.0.v", "blocks.1.w", "head"]


class Run:
    """An optimizer of four parameters in two groups, which refreshes at every second step."""

    def __init__(self, backend: str, kind: str = "EPIAdamW", **settings: Any) -> None:
        torch.manual_seed(0)
        self.params = [Parameter(torch.randn(6, 4)) for _ in NAMES]
        self.transposed: set[int] = set()  # parameters whose gradients are
        self.absent: set[int] = set()  # parameters without a gradient
        self.old: list[Any] = []  # what must outlive a plan that points to it
        named = list(zip(NAMES, self.params, strict=True))
        groups: list[dict[str, Any]] = [{"params": named[:2]}, {"params": named[2:], "importance_beta": 0.5}]
        settings = {"isolation_ratio": 0.25, "mask_interval": 2, "backend": backend, **settings}
        self.optimizer: Any
        if kind == "EPIAdamW":
            self.optimizer = EPIAdamW(groups, lr=0.1, **settings)
        else:
            self.optimizer = IsolatedOptimizer(torch.optim.SGD(groups, lr=0.1), **settings)

    def steps(self, first: int, last: int, plan_anew: bool) -> None:
        for step in range(first, last + 1):
            torch.manual_seed(step)
            for i, param in enumerate(self.params):
                grad = torch.randn(param.shape) * (1 + i)
                grad = grad.t().contiguous().t() if i in self.transposed else grad
                param.grad = None if i in self.absent or not param.requires_grad else grad
            if plan_anew:
                self.optimizer._isolation._plan = None
            self.optimizer.step()

    def refresh(self, plan_anew: bool) -> None:
        if plan_anew:
            self.optimizer._isolation._plan = None
        self.optimizer.refresh()

    def result(self) -> list[Any]:
        states = [dict(self.optimizer.state[param]) for param in self.params if param in self.optimizer.state]
        masks = [self.optimizer.isolation_mask(param) for param in self.params]
        return [[p.detach() for p in self.params], states, masks, self.optimizer.telemetry()]


def write(**settings: Any) -> Callable[[Run], None]:
    def disturb(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group.update(settings)

    return disturb


def freeze(run: Run) -> None:
    run.params[1].requires_grad_(False)


def write_one_ratio(run: Run) -> None:
    run.optimizer.param_groups[1]["isolation_ratio"] = 0.5


def exempt_a_group(run: Run) -> None:
    run.optimizer.param_groups[1]["isolation_ratio"] = 0.0


def write_one_beta(run: Run) -> None:
    run.optimizer.param_groups[0]["importance_beta"] = 0.25


def replace_a_state(run: Run) -> None:
    state = run.optimizer.state[run.params[1]]
    run.old.append(state["importance"])
    state["importance"] = state["importance"].clone() * 2


def move_a_state(run: Run) -> None:
    signed = run.optimizer.state[run.params[1]]["importance"]
    run.old.append(signed.data)
    signed.data = signed.detach().clone() * 2


def transpose_a_state(run: Run) -> None:
    state = run.optimizer.state[run.params[1]]
    run.old.append(state["importance"])
    # at the address of before, with other strides
    state["importance"].data = state["importance"].view(4, 6).t()


def swap_states(run: Run) -> None:
    one, other = (run.optimizer.state[run.params[i]] for i in (0, 2))
    one["importance"], other["importance"] = other["importance"], one["importance"]


def swap_parameters(run: Run) -> None:
    params = run.optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


def move_a_parameter_into_another_group(run: Run) -> None:
    first, second = run.optimizer.param_groups
    second["params"].insert(0, first["params"].pop())
    second["param_names"].insert(0, first["param_names"].pop())


def rename(run: Run) -> None:
    run.optimizer.param_groups[0]["param_names"] = ["blocks.1.w2", "blocks.0.v"]


def lose_the_names(run: Run) -> None:
    run.optimizer.param_groups[0]["param_names"].append("one more than parameters")


def add_a_layer(run: Run) -> None:
    run.params.append(Parameter(torch.linspace(0, 1, 24).view(6, 4)))
    run.optimizer.add_param_group({"params": [("blocks.9.w", run.params[-1])]})


def drop_a_layer(run: Run) -> None:
    run.optimizer.param_groups[1]["params"].pop()
    run.optimizer.param_groups[1]["param_names"].pop()
    run.old.append(run.params.pop())


def withhold_a_gradient(run: Run) -> None:
    run.absent.add(1)


def transpose_gradients(run: Run) -> None:
    run.transposed |= {0, 3}


def go_by_another_grouping(run: Run) -> None:
    grouping = run.optimizer._isolation.grouping
    grouping.layers = "tensor"  # as for a state that was saved without names
    grouping.stamp(run.optimizer.param_groups)


DISTURBANCES: dict[str, Callable[[Run], None]] = {
    "frozen": freeze,
    "a group's ratio": write_one_ratio,
    "ratio 0": exempt_a_group,
    "a group's beta": write_one_beta,
    "normalize": write(normalize="none"),
    "scope": write(scope="layer"),
    "threshold": write(threshold="histogram"),
    "state replaced": replace_a_state,
    "state moved": move_a_state,
    "state transposed": transpose_a_state,
    "states swapped": swap_states,
    "parameters swapped": swap_parameters,
    "another group": move_a_parameter_into_another_group,
    "renamed": rename,
    "names lost": lose_the_names,
    "grouping": go_by_another_grouping,
    "layer added": add_a_layer,
    "layer dropped": drop_a_layer,
    "no gradient": withhold_a_gradient,
    "gradients transposed": transpose_gradients,
}


def disturbed(run: Run, disturb: Callable[[Run], None], plan_anew: bool) -> list[Any]:
    run.steps(1, 2, plan_anew)
    disturb(run)
    run.steps(3, 4, plan_anew)
    run.refresh(plan_anew)
    return run.result()


@pytest.mark.parametrize("name", DISTURBANCES)
@pytest.mark.parametrize("kind", ["EPIAdamW", "IsolatedOptimizer"])
def test_a_run_equals_one_that_plans_every_refresh(name: str, kind: str, backend: str) -> None:
    if (name, kind) == ("names lost", "IsolatedOptimizer"):
        pytest.skip("IsolatedOptimizer refuses to step parameters that are not those that were named")
    if (kind, backend) == ("IsolatedOptimizer", "triton"):
        pytest.skip("to save time: the plans of IsolatedOptimizer are those of EPIAdamW, which are tried with Triton")
    disturb = DISTURBANCES[name]
    found, expected = (disturbed(Run(backend, kind), disturb, plan_anew) for plan_anew in (False, True))
    assert same_state(found, expected)


# what no result follows from: of parameters that have changed places, whom a warning names; of gradients that come and
# go, in which dtype they come back
UNSEEN = {"parameters swapped", "no gradient"}


@pytest.mark.parametrize("name", [name for name in DISTURBANCES if name not in UNSEEN])
def test_a_stale_plan_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_it_takes("native", torch.float32)
    expected = disturbed(Run("native"), DISTURBANCES[name], plan_anew=True)
    look = Isolation._look

    def blind(self: Isolation, *arguments: Any) -> Any:
        seen, *tensors = look(self, *arguments)
        return seen and ["the same"], *tensors

    monkeypatch.setattr(Isolation, "_look", blind)
    run = Run("native")
    try:
        found = disturbed(run, DISTURBANCES[name], plan_anew=False)
    except (IndexError, AttributeError, RuntimeError):
        return  # it does not even fit
    assert not same_state(found, expected)


# between two calls of refresh(), which no gradient and no planner of steps tells of anything


def drop_a_state(run: Run) -> None:
    run.old.append(run.optimizer.state.pop(run.params[1]))


def hand_a_state_over(run: Run) -> None:
    run.optimizer.state[run.params[3]] = run.optimizer.state.pop(run.params[2])


def enlarge(run: Run) -> None:
    run.old.append(run.params[3].data)
    run.params[3].data = torch.zeros(20, 4)


def exchange_groups(run: Run) -> None:
    first, second = run.optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


@pytest.mark.parametrize("disturb", [freeze, drop_a_state, hand_a_state_over, enlarge, exchange_groups])
def test_a_refresh_alone_equals_one_that_is_planned_anew(disturb: Callable[[Run], None], backend: str) -> None:
    results = []
    for plan_anew in (False, True):
        run = Run(backend, layers="tensor")
        for group in run.optimizer.param_groups:
            del group["param_names"]
        run.optimizer._isolation.grouping.stamp(run.optimizer.param_groups)
        run.optimizer.param_groups[1]["isolation_ratio"] = 0.5
        run.absent.add(3)  # it has no state
        run.steps(1, 4, plan_anew)
        run.refresh(plan_anew)
        disturb(run)
        run.refresh(plan_anew)
        results.append(run.result())
    assert same_state(*results)
    before, after = results[0][-1][-2:]
    assert before != after


@pytest.mark.parametrize("of", ["importance", "gradient"])
def test_another_shape_at_the_same_address_is_refused(of: str, backend: str) -> None:
    run = Run(backend)
    run.steps(1, 5, plan_anew=False)
    tensor = run.params[1].grad if of == "gradient" else run.optimizer.state[run.params[1]]["importance"]
    tensor.data = tensor.detach().view(8, 3)
    with pytest.raises(ValueError, match=r"has shape \((8, 3|6, 4)\)"):
        run.optimizer.step()


def test_another_dtype_at_the_same_address_is_refused(backend: str) -> None:
    run = Run(backend)
    run.steps(1, 5, plan_anew=False)
    signed = run.optimizer.state[run.params[1]]["importance"]
    signed.data = signed.view(torch.int32)
    with pytest.raises(TypeError, match=r"\[[01]\] is torch\.int32; the operations take"):
        run.optimizer.step()


def test_gradients_of_another_dtype_are_read_as_such(backend: str) -> None:
    results = []
    for plan_anew in (False, True):
        run = Run(backend, mask_interval=1)
        run.steps(1, 4, plan_anew)
        for _ in range(2):
            for param in run.params:
                param.grad = torch.full((6, 4), 2.0)
                param.grad.data = param.grad.detach().bfloat16()
            if plan_anew:
                run.optimizer._isolation._plan = None
            run.optimizer.step()
        results.append(run.result())
    assert same_state(*results)


def test_a_frozen_parameter_that_thaws_competes_again(backend: str) -> None:
    results = []
    for plan_anew in (False, True):
        run = Run(backend)
        run.steps(1, 4, plan_anew)
        run.params[0].requires_grad_(False)
        run.steps(5, 6, plan_anew)
        run.params[0].requires_grad_(True)
        run.steps(7, 8, plan_anew)
        results.append(run.result())
    assert same_state(*results)
    assert [record["eligible"] for record in results[0][-1]] == [96, 96, 72, 96]


def test_a_callable_that_answers_otherwise_is_heard(backend: str) -> None:
    layers = dict.fromkeys(NAMES, "one")
    results = []
    for plan_anew in (False, True):
        layers["head"] = "one"
        run = Run(backend, layers=lambda name: layers[name])
        run.steps(1, 4, plan_anew)
        layers["head"] = "another"
        run.steps(5, 6, plan_anew)
        results.append(run.result())
    assert same_state(*results)
    assert [len(record["layers"]) for record in results[0][-1]] == [1, 1, 2]


def test_betas_are_those_of_the_second_moment_where_it_is_the_importance(backend: str) -> None:
    results = []
    for plan_anew in (False, True):
        run = Run(backend, importance="exp_avg_sq")
        run.steps(1, 4, plan_anew)
        write(betas=(0.9, 0.5))(run)
        run.steps(5, 6, plan_anew)
        results.append(run.result())
    assert same_state(*results)


def test_a_warning_names_the_parameter_that_is_there_now(backend: str) -> None:
    run = Run(backend)
    run.steps(1, 5, plan_anew=False)
    before = run.params[0]
    run.old.append(before)
    group, state = run.optimizer.param_groups[0], run.optimizer.state
    group["params"][0] = run.params[0] = Parameter(before.detach())  # at the address of before, with its state
    entries = {param: state.pop(param) for param in list(state)}
    state.update({run.params[0] if param is before else param: entry for param, entry in entries.items()})
    run.params[0].grad = torch.full((6, 4), torch.nan)
    with pytest.warns(RuntimeWarning, match=r"^blocks\.0\.w: 24 squared gradients"):
        run.optimizer.step()


def test_gradients_come_back_in_another_place(backend: str) -> None:
    skip_unless_it_takes(backend, torch.bfloat16)
    results = []
    for plan_anew in (False, True):
        params = [Parameter(torch.arange(1.0, 9.0).to(dtype)) for dtype in [torch.bfloat16] * 2]
        optimizer = EPIAdamW(params, isolation_ratio=0.25, mask_interval=1, layers="tensor", backend=backend)
        for step in range(6):
            for i, param in enumerate(params):
                param.grad = param.detach() * (step + 1) if step < 2 or i == step % 2 else None
            if plan_anew:
                optimizer._isolation._plan = None
            optimizer.step()
        results.append([[p.detach() for p in params], optimizer.telemetry()])
    assert same_state(*results)


def test_another_backend_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("auto")
    run.steps(1, 4, plan_anew=False)
    run.optimizer._backend = "reference"
    made: list[str] = []
    monkeypatch.setattr(isolation, "Refresh", noting(made, isolation.Refresh))
    run.steps(5, 6, plan_anew=False)
    assert made == ["reference"]


def noting(made: list[str], refresh: Any) -> Any:
    """Return `refresh`, which notes the backend of each that is made."""

    def make(*arguments: Any, **named: Any) -> Any:
        made.append(named["backend"])
        return refresh(*arguments, **named)

    return make


def test_autograd_hears_of_what_a_refresh_writes(backend: str) -> None:
    run = Run(backend)
    run.steps(1, 4, plan_anew=False)
    signed = [run.optimizer.state[param]["importance"] for param in run.params]
    for _ in range(2):
        before = [tensor._version for tensor in signed]
        run.optimizer.refresh()
        assert all(tensor._version > version for tensor, version in zip(signed, before, strict=True))


@pytest.mark.parametrize("kind", ["EPIAdamW", "IsolatedOptimizer"])
def test_steps_of_the_same_parameters_plan_one_refresh(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(isolation, "Refresh", noting(made, isolation.Refresh))
    run = Run(backend, kind)
    run.steps(1, 8, plan_anew=False)
    assert made == [backend]
    run.steps(9, 16, plan_anew=True)
    assert made == [backend] * 5
    copied = run.optimizer.__getstate__()["_method"] if kind == "IsolatedOptimizer" else None
    assert copied is None or "_plan" not in copied.__getstate__()


def test_a_planned_refresh_passes_few_files() -> None:
    skip_unless_it_takes("native", torch.float32)
    folder = os.path.dirname(epi_kernels.__file__)
    params = [Parameter(torch.randn(64)) for _ in range(2)]
    named = [(f"layers.{i}.w", param) for i, param in enumerate(params)]
    optimizer = EPIAdamW(named, mask_interval=5, isolation_ratio=0.1, backend="native")
    passed: list[str] = []

    def called(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            passed.append(frame.f_code.co_filename)

    for _ in range(10):
        for param in params:
            param.grad = torch.randn_like(param)
        passed.clear()
        sys.setprofile(called)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    changes = sum(before != after for before, after in itertools.pairwise(passed))
    assert len(optimizer.telemetry()) == 2
    assert 1 < len(set(passed)) <= 12
    assert changes <= 50
