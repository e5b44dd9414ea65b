"""With clocks on the device (capturable, or fused on a GPU) a step reads nothing back and is the same step.

A GPU is not needed: the CPU stands in for the device that torch says has graphs. tests/test_gpu.py captures.

- Parameters, moments, importance and masks are those of clocks on the host, bit for bit, over refreshes, schedules,
  scalers, clipping, parameters that miss gradients, and resume.
- A learning rate or weight decay in a tensor is read when the step runs, not when it was prepared.
- A load writes into the state that is there: a captured step has its addresses. All that a captured step reads or
  writes lives on, whatever steps outside of the graph do.
"""

import copy
import gc
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import same_state
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from epi_kernels import EPIAdamW, MaskedAdamW
from epi_kernels.engine import state as engine_state
from epi_kernels.engine.nonfinite import NonfiniteCounts
from epi_kernels.isolation.mask_clock import MaskClock
from epi_kernels.isolation.refresh import Refresh

SHAPES = {"h.0.weight": (30, 7), "h.0.bias": (30,), "h.1.weight": (9, 8), "head.scale": ()}
KINDS: dict[str, Any] = {
    "off": lambda p, **k: EPIAdamW(p.items(), **{"isolation_ratio": 0.0, **k}),
    "ema": lambda p, **k: EPIAdamW(p.items(), **{"isolation_ratio": 0.2, "mask_interval": 3, **k}),
    "exp_avg_sq": lambda p, **k: EPIAdamW(
        p.items(), **{"isolation_ratio": 0.2, "mask_interval": 3, "importance": "exp_avg_sq", **k}
    ),
    "masked": lambda p, **k: MaskedAdamW(p.items(), frozen={"h.0.bias": torch.arange(30) % 2 == 0}, **k),
}
each_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_state, "_get_capturable_supported_devices", lambda: ["cpu"])


def parameters() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def give(params: dict[str, Parameter], step: int, missing: bool = False) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, param in enumerate(params.values()):
        grad = torch.randn(param.shape, generator=generator)
        param.grad = None if missing and (step + i) % 4 == 0 and i else grad


def assert_same(params: dict[str, Parameter], optimizer: Any, twins: dict[str, Parameter], twin: Any) -> None:
    for name, param in params.items():
        assert torch.equal(param, twins[name]), name
        assert same_state(optimizer.state[param], twin.state[twins[name]]), name


def pair(
    build: Callable[..., Any], backend: str, **kwargs: Any
) -> tuple[dict[str, Parameter], Any, dict[str, Parameter], Any]:
    params, twins = parameters(), parameters()
    optimizer = build(params, capturable=True, backend=backend, **copy.deepcopy(kwargs))
    return params, optimizer, twins, build(twins, backend=backend, **copy.deepcopy(kwargs))


# every place of a mask, and every setting with the two that a clock decides a refresh for
RUNS = [(kind, {}) for kind in KINDS]
RUNS += [
    (kind, kwargs)
    for kind in ("ema", "exp_avg_sq")
    for kwargs in (
        {"amsgrad": True, "maximize": True},
        {"lr": torch.tensor(0.01), "betas": (0.8, 0.9)},
        {"clip_grad_norm": 0.5},
    )
]


@pytest.mark.parametrize(("kind", "kwargs"), RUNS, ids=[f"{kind}, {', '.join(kwargs)}" for kind, kwargs in RUNS])
def test_the_steps_are_those_of_clocks_on_the_host(kind: str, kwargs: dict[str, Any], backend: str) -> None:
    params, optimizer, twins, twin = pair(KINDS[kind], backend, **kwargs)
    for step in range(1, 8):
        for ps, o in ((params, optimizer), (twins, twin)):
            give(ps, step, missing=True)
            o.step()
        assert_same(params, optimizer, twins, twin)


def test_groups_have_their_own_numbers(backend: str) -> None:
    results = []
    for capturable in (True, False):
        params = parameters()
        items = list(params.items())
        groups = [
            {"params": items[:2], "lr": 0.1, "isolation_ratio": 0.3},
            {"params": items[2:3], "weight_decay": 0.5, "importance_beta": 0.5},
            {"params": items[3:], "betas": (0.5, 0.6), "isolation_ratio": 0.0, "amsgrad": True},
        ]
        optimizer = EPIAdamW(groups, mask_interval=2, capturable=capturable, backend=backend)
        for step in range(1, 6):
            give(params, step)
            optimizer.step()
        results.append((params, optimizer))
    assert_same(*results[0], *results[1])


@pytest.mark.parametrize("number", ["lr", "weight_decay"])
def test_a_number_in_a_tensor_is_read_when_the_step_runs(number: str, backend: str) -> None:
    value = torch.tensor(0.1)
    params, optimizer, twins, twin = pair(KINDS["ema"], backend)
    optimizer.param_groups[0][number] = value
    for step in range(1, 6):
        give(params, step)
        give(twins, step)
        value.fill_(0.1 / step)  # what a scheduler does with a tensor
        twin.param_groups[0][number] = float(value)
        optimizer.step()
        twin.step()
        assert_same(params, optimizer, twins, twin)


@each_kind
def test_where_an_infinite_gradient_was_found_nothing_moves(build: Any, backend: str) -> None:
    params, optimizer, twins, twin = pair(build, backend)
    for step in range(1, 7):
        give(params, step)
        give(twins, step)
        found = step in (1, 4)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(found))
        for param in params.values():
            param.grad *= 4.0
        before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params.values()]
        optimizer.step()
        if found:
            assert same_state([p.detach() for p in params.values()], before[1])
            assert same_state(optimizer.state_dict()["state"], before[0]) or step == 1  # the first makes the state
        else:
            twin.step()
            assert_same(params, optimizer, twins, twin)


def test_telemetry_has_the_last_refresh_alone(backend: str) -> None:
    params, optimizer, twins, twin = pair(KINDS["ema"], backend)
    assert optimizer.telemetry() == []
    for step in range(1, 9):
        give(params, step)
        give(twins, step)
        optimizer.step()
        twin.step()
        assert optimizer.telemetry() == twin.telemetry()[-1:]
    assert optimizer.telemetry()[0]["step"] == 6


def test_counts_of_gradients_that_are_not_finite(backend: str) -> None:
    params, optimizer, twins, twin = pair(KINDS["ema"], backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in range(1, 7):
            for ps, o in ((params, optimizer), (twins, twin)):
                give(ps, step)
                ps["h.0.bias"].grad[step] = torch.inf
                o.step()
    assert optimizer.telemetry()[-1]["nonfinite"] == 6
    assert twin.telemetry()[-1]["nonfinite"] == 6


@each_kind
def test_a_load_writes_into_the_state_that_is_there(build: Any, backend: str) -> None:
    params, optimizer, twins, twin = pair(build, backend, lr=torch.tensor(0.01))
    rate = optimizer.param_groups[0]["lr"]
    for step in range(1, 5):
        give(params, step)
        give(twins, step)
        optimizer.step()
        twin.step()
    saved = copy.deepcopy(optimizer.state_dict())
    weights = {n: p.detach().clone() for n, p in params.items()}
    addresses = [v.data_ptr() for s in optimizer.state.values() for v in s.values()]
    for step in range(50, 53):
        give(params, step)
        rate.fill_(0.5)
        optimizer.step()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is rate
    for name, param in params.items():
        param.data.copy_(weights[name])
    for step in range(5, 9):
        give(params, step)
        give(twins, step)
        optimizer.step()
        twin.step()
        assert_same(params, optimizer, twins, twin)
    assert [v.data_ptr() for s in optimizer.state.values() for v in s.values()] == addresses


@pytest.mark.parametrize(
    ("kind", "entries"),
    [("ema", "all"), ("ema", "some"), ("ema", "none"), ("exp_avg_sq", "some"), ("masked", "some")],
)
def test_a_load_of_torchs_state_keeps_every_tensor_that_a_captured_step_reads(
    kind: str, entries: str, backend: str
) -> None:
    def number(value: float) -> Tensor:
        return torch.tensor(value)

    settings = {"lr": number(0.01), "eps": number(1e-8), "weight_decay": number(0.1)}
    params, optimizer, twins, twin = pair(KINDS[kind], backend, **settings, betas=(number(0.9), number(0.99)))
    for group in (optimizer.param_groups[0], twin.param_groups[0]):
        group["amsgrad"] = True  # of which the state to be loaded has nothing
    for step in range(1, 5):
        give(params, step)
        optimizer.step()
    group = optimizer.param_groups[0]
    tensors = [*(group[key] for key in settings), *group["betas"]]
    addresses = {n: {k: v.data_ptr() for k, v in optimizer.state[p].items()} for n, p in params.items()}

    others = parameters()
    theirs = torch.optim.AdamW(others.values(), lr=0.03125, eps=2**-20, weight_decay=0.25, betas=(0.75, 0.875))
    if entries != "none":
        give(others, 11, missing=entries == "some")
        theirs.step()
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    twin.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert all(
        one is other for one, other in zip(tensors, [*(group[k] for k in settings), *group["betas"]], strict=True)
    )
    assert [float(value) for value in tensors] == [0.03125, 2**-20, 0.25, 0.75, 0.875]  # exact in float32
    for group in (optimizer.param_groups[0], twin.param_groups[0]):
        group["amsgrad"] = True
        group["capturable"] = group is optimizer.param_groups[0]
    for name, param in params.items():
        param.data.copy_(twins[name])
        found = {k: v.data_ptr() for k, v in optimizer.state[param].items()}
        assert found == addresses[name]
    for step in range(5, 9):
        give(params, step)
        give(twins, step)
        optimizer.step()
        twin.step()
        assert_same(params, optimizer, twins, twin)


class NoReading(TorchDispatchMode):
    """Raises where a tensor becomes a number of Python's: on a GPU that waits, and in a graph it cannot be."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a tensor was read")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "masked"])
def test_nothing_is_read_back(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "triton":
        pytest.skip("a backend of the CPU reads what it must know")
    params, optimizer, _, _ = pair(KINDS[kind], backend, clip_grad_norm=1.0, lr=torch.tensor(0.1))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    give(params, 1)
    optimizer.step()
    # it warns of what the CPU has counted, which is at hand, and of a GPU's counts later
    monkeypatch.setattr(NonfiniteCounts, "warn", lambda *_: None)
    # it reads the copy of a clock once that has arrived on the CPU, where it is at once here
    monkeypatch.setattr(MaskClock, "_learn", lambda _: None)
    with NoReading():
        for step in range(2, 5):
            give(params, step)
            optimizer.step()
    with pytest.raises(AssertionError, match="a tensor was read"), NoReading():
        assert bool(Tensor([1.0]))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what lets the next steps believe that a graph is being captured."""

    def begin() -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


def test_a_capture_before_the_first_step_is_refused(capturing: Callable[[], None]) -> None:
    params, optimizer, _, _ = pair(KINDS["ema"], "auto")
    give(params, 1)
    capturing()
    with pytest.raises(RuntimeError, match="its tensors are not prepared"):
        optimizer.step()
    assert not optimizer.state


def test_a_capture_without_a_gradient_is_refused_by_name(capturing: Callable[[], None]) -> None:
    params, optimizer, _, _ = pair(KINDS["ema"], "auto")
    give(params, 1)
    optimizer.step()
    params["h.0.bias"].grad = None
    before = copy.deepcopy(optimizer.state_dict()["state"])
    capturing()
    with pytest.raises(RuntimeError, match="h.0.bias has no gradient: replays would never move it"):
        optimizer.step()
    assert same_state(optimizer.state_dict()["state"], before)


def test_what_a_captured_step_uploads_is_kept(capturing: Callable[[], None], backend: str) -> None:
    params, optimizer, _, _ = pair(KINDS["ema"], backend)
    give(params, 1)
    optimizer.step()
    give(params, 2)
    capturing()
    optimizer.step()
    kept = optimizer._planner.uploads._captured
    read = next(held for held in kept if isinstance(held, list))[0]
    assert read[0] is next(iter(optimizer._planner._plans.values())).bundles
    assert read[1] is next(iter(optimizer._planner._plans.values())).clocks
    assert {id(tensor) for tensor in read[2].columns["exp_avg"]} == {
        id(optimizer.state[param]["exp_avg"]) for param in params.values()
    }
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # a load does not let go of it
    assert optimizer._planner.uploads._captured is kept


class Storages(TorchDispatchMode):
    """Notes the storages that operations read or write and that others made before."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.found: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # of a number of the host a tensor has just been made
        found = () if function is torch.ops.aten.lift_fresh.default else tree_leaves((args, kwargs))
        for tensor in filter(torch.is_tensor, found):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage._cdata not in self.made:
                self.found.setdefault(storage._cdata, StorageWeakRef(storage))
        results = function(*args, **(kwargs or {}))
        new = {tensor.untyped_storage()._cdata for tensor in filter(torch.is_tensor, tree_leaves(results))}
        self.made |= new - self.found.keys()
        return results


def set_all(optimizer: EPIAdamW, **settings: Any) -> None:
    for group in optimizer.param_groups:
        group.update(settings)


DISTURBANCES: dict[str, Callable[[EPIAdamW, list[Parameter]], object]] = {
    "other gradients": lambda optimizer, params: None,
    "a missing gradient": lambda optimizer, params: setattr(params[2], "grad", None),
    "another ratio": lambda optimizer, params: set_all(optimizer, isolation_ratio=0.2),
    "the clock on the host": lambda optimizer, params: set_all(optimizer, capturable=False),
    "a frozen parameter": lambda optimizer, params: params[1].requires_grad_(False),
    "a load": lambda optimizer, params: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "a cleared state": lambda optimizer, params: optimizer.state.clear(),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_all_that_a_captured_step_reads_or_writes_outlives_what_comes_after(
    importance: str, disturbance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [Parameter(torch.randn(40, 50)[:, ::2].detach()), *(Parameter(torch.randn(30)) for _ in range(2))]
    named = [(f"layer.{i}.weight", param) for i, param in enumerate(params)]
    settings: dict[str, Any] = {"importance": importance, "mask_interval": 2, "isolation_ratio": 0.1}
    optimizer = EPIAdamW(
        named, lr=torch.tensor(0.01), capturable=True, clip_grad_norm=1.0, backend="reference", **settings
    )

    def step(disturbed: bool = False) -> None:
        for param in params:
            param.grad = torch.randn_like(param)
        if disturbed:
            DISTURBANCES[disturbance](optimizer, params)
        optimizer.step()

    step()
    step()
    with monkeypatch.context() as patch, Storages() as captured:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
    gradients = [param.grad for param in params]  # a graph's user keeps them, as for torch's optimizers
    for _ in range(3):
        step(disturbed=True)
    gc.collect()
    assert len(captured.found) > 4 * len(gradients)
    assert not any(storage.expired() for storage in captured.found.values())


def test_a_step_that_is_not_captured_keeps_no_state(backend: str) -> None:
    params, optimizer, _, _ = pair(KINDS["ema"], backend)
    give(params, 1)
    optimizer.step()
    give(params, 2)
    optimizer.step()
    old = [weakref.ref(v) for state in optimizer.state.values() for v in state.values() if v.dim()]
    for state in optimizer.state.values():
        state.update({key: value.clone() for key, value in state.items() if value.dim()})
    gc.collect()
    assert old
    assert all(ref() is None for ref in old)


def test_the_clock_is_where_torch_has_it() -> None:
    params, optimizer, twins, _ = pair(KINDS["ema"], "auto")
    give(params, 1)
    optimizer.step()
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert {state["step"].device for state in optimizer.state.values()} == {torch.device("cpu")}
    theirs = torch.optim.AdamW(twins.values())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert theirs.state[twins["head.scale"]]["step"].item() == 1.0


def refreshes(monkeypatch: pytest.MonkeyPatch) -> list[Refresh]:
    """Return a list to which every launch of a refresh adds an entry, whether the refresh is due or not."""
    launched: list[Refresh] = []
    run = Refresh.run_

    def noted(self: Refresh, *args: Any, **kwargs: Any) -> Any:
        launched.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Refresh, "run_", noted)
    return launched


@pytest.mark.parametrize("skips", [False, True])
def test_where_no_refresh_can_be_due_nothing_is_launched_for_one(skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer, twins, twin = pair(KINDS["ema"], "reference", mask_interval=20)
    launched, steps_with = refreshes(monkeypatch), []
    for step in range(1, 61):
        skipped = skips and step % 7 == 0
        give(params, step)
        optimizer.found_inf = torch.tensor([float(skipped)])
        before = len(launched)
        optimizer.step()
        steps_with += [step] * (len(launched) - before)
        if not skipped:
            give(twins, step)
            twin.step()
    assert_same(params, optimizer, twins, twin)
    # besides the first step and those that are due, 23 and 46 with the skipped steps, those that might have been: the
    # host takes steps for counted until it has read the clock
    assert steps_with == ([1, 20, 22, 23, 43, 46] if skips else [1, 20, 40, 60])


def test_what_the_host_learns_late_delays_no_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    learn, asked = MaskClock._learn, []

    def late(self: MaskClock) -> None:
        asked.append(self)
        if len(asked) % 5 == 0:
            learn(self)

    params, optimizer, twins, twin = pair(KINDS["ema"], "reference", mask_interval=8)
    monkeypatch.setattr(MaskClock, "_learn", late)
    launched = refreshes(monkeypatch)
    for step in range(1, 41):
        for ps, o in ((params, optimizer), (twins, twin)):
            give(ps, step)
            o.step()
        assert_same(params, optimizer, twins, twin)
    assert 6 + 5 < len(launched) < 40


def test_from_a_capture_on_every_step_may_be_due(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer, _, _ = pair(KINDS["ema"], "reference", mask_interval=1000)
    launched = refreshes(monkeypatch)
    give(params, 1)
    optimizer.step()
    optimizer.step()
    assert len(launched) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
    optimizer.step()
    assert len(launched) == 3
    assert len(set(map(id, launched))) == 1  # one plan serves all


@each_kind
def test_a_clock_stays_where_a_captured_step_counts_it_when_another_parameter_misses_a_gradient(build: Any) -> None:
    params = parameters()
    optimizer = build(params, capturable=True, backend="reference")
    give(params, 1)
    optimizer.step()
    first = next(iter(params.values()))
    counted = optimizer.state[first]["step"]  # its address is in a graph that is captured now
    last = list(params.values())[-1]
    last.grad = None
    optimizer.step()
    assert counted.item() == 2
    assert optimizer.state[first]["step"].data_ptr() == counted.data_ptr()


def test_a_step_that_is_not_due_calls_as_little_as_with_clocks_on_the_host() -> None:
    calls = []
    for capturable in (False, True):
        params = parameters()
        optimizer = KINDS["ema"](params, capturable=capturable, backend="reference", mask_interval=1000)
        for step in (1, 2):
            give(params, step)
            optimizer.step()
        counted = Counter[str]()

        def count(frame: Any, event: str, _: Any, counted: Counter[str] = counted) -> None:
            if event == "call" and "epi_kernels" in frame.f_code.co_filename:
                counted["calls"] += 1

        sys.setprofile(count)
        optimizer.step()
        sys.setprofile(None)
        calls.append(counted["calls"])
    assert 0 < calls[1] <= 2 * calls[0]
