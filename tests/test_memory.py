"""What an optimizer has prepared keeps no tensor alive that a program has moved or dropped.

Programs that train and generate in turns move states and weights to another device between two steps, to have their
memory. The tensors here lie in memory of NumPy arrays, whose death says that no alias of the memory is left, known to
Python or not.

- Moved states, cleared states, moved weights, dropped parameters and gradients: all old memory is free at once.
- The next step works, and a run that is disturbed so equals one that is not, bit for bit.
- A key of the user's own in a state changes nothing, and is saved.
- Counters of infinite gradients are as many as are in use, whichever parameters have gradients.
- A tensor that takes the place of a dead one, at its address and under its identity, is not taken for it.
"""

import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import skip_unless_it_takes
from states import same_state
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW
from epi_kernels.distributed import local, wrapped
from epi_kernels.optim import release_gradients

EPI: dict[str, Any] = {"lr": 0.1, "isolation_ratio": 0.2, "mask_interval": 2, "layers": "tensor"}
OURS: dict[str, Any] = {
    "EPIAdamW": lambda named, _, **kw: EPIAdamW(named, **EPI, **kw),
    "EPIAdamW, S = exp_avg_sq": lambda named, _, **kw: EPIAdamW(named, **EPI, importance="exp_avg_sq", **kw),
    "EPIAdamW, amsgrad": lambda named, _, **kw: EPIAdamW(named, **EPI, amsgrad=True, **kw),
    "MaskedAdamW": lambda named, masks, **kw: MaskedAdamW(named, lr=0.1, frozen=masks, **kw),
    "SparseAdamW": lambda named, masks, **kw: SparseAdamW(named, lr=0.1, trainable=masks, **kw),
}

# a fixed mask outlives the state that shows it
MASKS = ("frozen", "indices", "trainable")

STORAGES: dict[str, Any] = {
    "contiguous": ((6, 4), (4, 1), torch.float32),
    "transposed": ((6, 4), (1, 6), torch.float32),
    "strided": ((6, 4), (9, 2), torch.float32),  # not dense: steps go by way of copies
    "float64": ((6, 4), (4, 1), torch.float64),
    "complex": ((6, 4), (4, 1), torch.complex64),
    "DTensor": ((6, 4), (4, 1), torch.float32),
}


def masks(named: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.arange(24, dtype=torch.int64, device="cpu").view(6, 4) % 3 == 0 for name, _ in named}


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def in_memory(values: Tensor, strides: tuple[int, ...]) -> tuple[Tensor, "weakref.ref[Any]"]:
    """Return a copy of `values` with these strides in memory of its own, and what tells that the memory is free."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    memory = torch.empty(0, dtype=values.dtype).numpy().dtype
    array = np.zeros(extent, memory)
    copy = torch.from_numpy(array).as_strided(values.shape, strides).copy_(values)
    return copy, weakref.ref(array)


class Run:
    """Two parameters of a class, a backend and a kind of storage, and what tells whether their memory is free."""

    def __init__(self, kind: str, storage: str, backend: str, mesh: Any, masked: int = 2) -> None:
        self.shape, self.strides, self.dtype = STORAGES[storage]
        if (kind == "SparseAdamW" or "exp_avg_sq" in kind) and self.dtype.is_complex:
            pytest.skip(f"{kind} takes no complex parameters")
        skip_unless_it_takes(backend, self.dtype.to_real() if self.dtype.is_complex else self.dtype)
        if backend == "native" and storage == "float64":
            pytest.skip("the native backend takes no float64")
        self.mesh = mesh if storage == "DTensor" else None
        torch.manual_seed(0)
        self.weights: list[weakref.ref[Any]] = []
        self.params = []
        for _ in range(2):
            values, free = in_memory(torch.randn(self.shape, dtype=self.dtype), self.strides)
            self.weights.append(free)
            self.params.append(Parameter(self.as_param(values)))
        named = [(f"w{i}", p) for i, p in enumerate(self.params)]
        self.shared = "exp_avg_sq" in kind  # two keys of one tensor
        self.optimizer = OURS[kind](named, masks(named[:masked]), backend=backend)
        self.states: list[weakref.ref[Any]] = []
        self.masks: list[weakref.ref[Any]] = []

    def as_param(self, values: Tensor) -> Tensor:
        return values if self.mesh is None else DTensor.from_local(values, self.mesh, [Shard(0)])

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        for param in self.params:
            param.grad = self.as_param(torch.randn(self.shape, dtype=self.dtype))
        self.optimizer.step()

    def steps(self) -> "Run":
        """Take steps, with states in memory that is watched from the third on."""
        self.step(1)
        self.step(2)
        self.move_states()
        self.step(3)
        return self

    def move_states(self) -> None:
        """Put every state into new memory."""
        self.states, self.masks = [], []
        for param, state in self.optimizer.state.items():
            for key, value in state.items():
                if key != "step" and not (key == "importance" and self.shared):
                    copy, free = in_memory(local(value), local(value).stride())
                    state[key] = wrapped(copy, param) if type(value) is DTensor else copy
                    (self.masks if key in MASKS else self.states).append(free)
            if self.shared:
                state["importance"] = state["exp_avg_sq"]

    def assert_equal(self, other: "Run") -> None:
        assert same_state([local(p.detach()) for p in self.params], [local(p.detach()) for p in other.params])
        ours, theirs = ([dict(run.optimizer.state[p]) for p in run.params] for run in (self, other))
        for mine, its in zip(ours, theirs, strict=True):
            assert same_state({k: local(v) for k, v in mine.items()}, {k: local(v) for k, v in its.items()})


def left(memory: list["weakref.ref[Any]"]) -> int:
    if any(ref() is not None for ref in memory):
        gc.collect()
    return sum(ref() is not None for ref in memory)


# every class has other keys in its state; storages differ in how a step reaches a tensor, for locks and for indices
RUNS = [(kind, "contiguous") for kind in OURS]
RUNS += [(kind, storage) for kind in ("EPIAdamW", "SparseAdamW") for storage in STORAGES if storage != "contiguous"]
every_run = pytest.mark.parametrize(("kind", "storage"), RUNS, ids=[", ".join(run) for run in RUNS])


@every_run
def test_moved_states_are_free_and_the_run_goes_on(kind: str, storage: str, backend: str, mesh: Any) -> None:
    run, twin = Run(kind, storage, backend, mesh).steps(), Run(kind, storage, backend, mesh).steps()
    old, old_masks = run.states, run.masks
    assert all(ref() is not None for ref in old)
    assert len(old) >= 4
    run.move_states()
    assert left(old) == 0
    for seed in (4, 5):
        run.step(seed)
        twin.step(seed)
    run.assert_equal(twin)
    assert left(old_masks) == 0  # a mask or selection outlives its state, until another has its place


@every_run
def test_cleared_states_are_free(kind: str, storage: str, backend: str, mesh: Any) -> None:
    run = Run(kind, storage, backend, mesh).steps()
    clock = weakref.ref(run.optimizer.state[run.params[0]]["step"])
    run.optimizer.state.clear()
    assert left([*run.states, clock]) == 0


@every_run
def test_moved_weights_are_free_and_the_run_goes_on(kind: str, storage: str, backend: str, mesh: Any) -> None:
    run, twin = Run(kind, storage, backend, mesh).steps(), Run(kind, storage, backend, mesh).steps()
    old = run.weights
    assert all(ref() is not None for ref in old)
    for param in run.params:
        param.grad = None
        moved = run.as_param(in_memory(local(param.detach()), run.strides)[0])
        if storage == "DTensor":
            torch.utils.swap_tensors(param, Parameter(moved))  # as Module.to does
        else:
            param.data = moved
    del param, moved
    assert left(old) == 0
    for seed in (4, 5):
        run.step(seed)
        twin.step(seed)
    run.assert_equal(twin)


@every_run
def test_gradients_are_free(kind: str, storage: str, backend: str, mesh: Any) -> None:
    run = Run(kind, storage, backend, mesh).steps()
    free = []
    for param in run.params:
        values, ref = in_memory(torch.randn(run.shape, dtype=run.dtype), run.strides)
        param.grad = run.as_param(values)
        free.append(ref)
    del values
    run.optimizer.step()
    assert all(ref() is not None for ref in free)
    run.optimizer.zero_grad()
    assert left(free) == 0


@every_run
def test_a_dropped_parameter_is_free_with_all_that_it_had(kind: str, storage: str, backend: str, mesh: Any) -> None:
    run = Run(kind, storage, backend, mesh, masked=1).steps()  # a mask keeps its parameter
    of_each = len(run.optimizer.state[run.params[1]].keys() - {"step", *MASKS})
    of_each -= run.shared
    dropped = run.params.pop()
    group = run.optimizer.param_groups[0]
    group["params"], group["param_names"] = group["params"][:1], group["param_names"][:1]
    of_it = [weakref.ref(dropped), run.weights[1], *run.states[-of_each:]]
    del run.optimizer.state[dropped], dropped
    if kind in ("MaskedAdamW", "SparseAdamW"):
        run.step(4)  # which sees that it has gone, and not another object in its place
    assert left(of_it) == 0
    run.step(5)


@pytest.mark.parametrize("kind", ["EPIAdamW", "MaskedAdamW", "SparseAdamW"])
def test_released_gradients_leave_nothing_behind(kind: str, backend: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    named = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    model[0].bias.requires_grad_(False), model[1].bias.requires_grad_(False)
    settings: dict[str, Any] = {"isolation_ratio": 0.2} if kind == "EPIAdamW" else {}
    chosen = {named[0][0]: torch.ones(6, 4, dtype=torch.bool)}
    if kind != "EPIAdamW":
        settings["frozen" if kind == "MaskedAdamW" else "trainable"] = chosen
    optimizer = {"EPIAdamW": EPIAdamW, "MaskedAdamW": MaskedAdamW, "SparseAdamW": SparseAdamW}[kind](
        named, backend=backend, **settings
    )
    release_gradients(model, optimizer)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    items = [(key, v) for state in optimizer.state.values() for key, v in state.items() if key not in MASKS]
    old = [weakref.ref(v) for _, v in items]
    del items
    for state in optimizer.state.values():
        state.update({key: value.clone() for key, value in state.items() if key not in MASKS})
    assert left(old) == 0
    dropped = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["param_names"].pop()
    del optimizer.state[dropped], named
    dropped = weakref.ref(dropped)
    model[1] = torch.nn.Linear(6, 4)
    optimizer.step()  # which sees that it has gone, and not another object in its place
    assert left([dropped]) == 0


def test_a_tensor_in_the_place_of_a_dead_one_is_not_taken_for_it(backend: str) -> None:
    run = Run("EPIAdamW", "contiguous", backend, None).steps()
    state = run.optimizer.state[run.params[0]]
    before = run.params[1].detach().clone()
    moment = state.pop("exp_avg")
    storage, identity = moment.untyped_storage(), id(moment)
    del moment
    # one of many new objects takes the place of the dead one in memory
    candidates = [torch.empty(0).set_(storage, 0, (3, 4), (4, 1)) for _ in range(200)]
    halves = [candidate for candidate in candidates if id(candidate) == identity]
    if not halves:
        pytest.skip("Python has put 200 new tensors elsewhere")
    state["exp_avg"] = halves[0]
    with pytest.raises(ValueError, match=r"w0 has shape \(6, 4\) now, and exp_avg in its state \(3, 4\)"):
        run.step(4)
    assert torch.equal(run.params[1], before)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "importance"])
def test_a_state_of_another_dtype_at_the_same_address_is_seen(key: str) -> None:
    skip_unless_it_takes("native", torch.float32)
    run = Run("EPIAdamW", "contiguous", "native", None).steps()
    state = run.optimizer.state[run.params[0]]
    state[key].data = state[key].view(torch.float16)[:, :4]
    with pytest.raises(RuntimeError, match="native"):
        run.step(4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, torch.zeros(3, 5)) for name in ("EPIAdamW, S = exp_avg_sq", "MaskedAdamW", "SparseAdamW")],
        *[("EPIAdamW", value) for value in (1.0, "text", None, torch.zeros(3, 5), torch.zeros((), dtype=torch.int32))],
    ],
    ids=str,
)
def test_a_key_of_the_users_own_in_a_state_is_left_alone_and_saved(name: str, value: Any, backend: str) -> None:
    run, twin = Run(name, "contiguous", backend, None), Run(name, "contiguous", backend, None)
    run.step(1)
    twin.step(1)
    run.optimizer.state[run.params[0]]["tag"] = value
    for seed in (2, 3):
        run.step(seed)
        twin.step(seed)
    assert run.optimizer.state_dict()["state"][0]["tag"] is value
    assert run.optimizer.state[run.params[0]].pop("tag") is value
    run.assert_equal(twin)


def changing(optimizer: EPIAdamW, params: list[Parameter], steps: int) -> int:
    """Step another half of the parameters each time, some with gradients that are not finite; return how many."""
    bad = 0
    for _ in range(steps):
        for param in params:
            param.grad = torch.full((4,), float("nan")) if torch.rand(()) < 0.3 else torch.ones(4)
            if torch.rand(()) < 0.5:
                param.grad = None
            bad += 0 if param.grad is None else int(param.grad.isnan().sum())
        optimizer.step()
    return bad


def test_counters_are_as_many_as_are_in_use_and_add_up(backend: str) -> None:
    params = [Parameter(torch.ones(4)) for _ in range(8)]
    optimizer = EPIAdamW(params, mask_interval=10, isolation_ratio=0.1, layers="tensor", backend=backend)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bad = changing(optimizer, params, 25)
        assert len(optimizer._isolation.nonfinite.counters()) <= 12  # not 25, as many as steps
        optimizer.refresh()
        assert optimizer.telemetry()[-1]["nonfinite"] == bad > 20
        twin = pickle.loads(pickle.dumps(optimizer))
        twin.refresh()
        assert twin.telemetry()[-1]["nonfinite"] == bad
        more = changing(twin, twin.param_groups[0]["params"], 10)
        twin.refresh()
        assert twin.telemetry()[-1]["nonfinite"] == bad + more
    messages = [str(warning.message) for warning in said if "squared gradients" in str(warning.message)]
    assert len(messages) == len(params)
    assert {message.split(":")[0] for message in messages} == {f"0.{i}" for i in range(8)}


def test_a_parameter_that_has_left_is_not_warned_of() -> None:
    params = [Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = EPIAdamW(params, isolation_ratio=0.1, layers="tensor")
    optimizer._isolation.nonfinite.counter([params[1]]).fill_(3)
    optimizer.param_groups[0]["params"].pop()
    params[0].grad = torch.ones(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    optimizer.refresh()
    assert optimizer.telemetry()[-1]["nonfinite"] == 3
