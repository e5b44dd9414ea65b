"""What only a GPU can show; run by `make gpu`. The kernels there are compiled, not interpreted.

`EPI_GPU_TESTS_ON=cpu TRITON_INTERPRET=1 pytest tests/test_gpu.py` rehearses it without a GPU: see tests/rehearsal.py.

- Every operation equals the reference on the CPU bit for bit, in memory that held NaN: sizes, dtypes, strides, special
  values, groups of different settings, a gradient factor, found_inf; by Triton and by CUDA.
- A step equals float64 to STEP_ERROR of the update; a step that does nothing does not.
- EPIAdamW chooses the entries that it chooses on the CPU; 20 runs give the same bits.
- Every optimizer trains in every storage as on the CPU, bit for bit; IsolatedOptimizer protects the same entries.
- A step is one kernel for each pair of dtypes, a refresh 8 more, whatever the number of tensors; neither waits for the
  device. Gradients that are not finite are reported all the same.
- A captured step, replayed, is the step on the CPU: over refreshes, a schedule and a load; a capture that would leave a
  parameter out is refused.
- Entries beyond 2^31, by value; hot bins are counted exactly; compute-sanitizer finds nothing.
"""

import copy
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import pytest
import torch
from agreement import (
    HALVES,
    SIZES,
    SPECIAL,
    Lists,
    assert_same,
    clones,
    compares_moments,
    gradient,
    placed,
    scalars,
    signed,
    step,
    step_arguments,
    step_lists,
)
from rehearsal import DEVICE, ON_GPU, stand_in
from storing import CASES, ISOLATION, KINDS, STORAGES, Net, SmallNet, model_of, optimizer_of, same_bits
from tolerances import STEP_ERROR
from torch import Tensor, nn
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, ops
from epi_kernels.backends import registry
from epi_kernels.backends.support import Spec
from epi_kernels.rules import ADAMW

pytestmark = pytest.mark.gpu

POWER = 20 if ON_GPU else 13  # of 2, the entries of a large tensor
LENGTHS = (*SIZES, 1 << POWER) if ON_GPU else (0, 1, 17, 1025, 9001)
BACKEND = "auto" if ON_GPU else "triton"  # "auto" interprets nothing
SIDES = (("cpu", "reference"), (DEVICE, "triton"))


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        stand_in(monkeypatch)


@pytest.fixture(autouse=True)
def used_memory() -> None:
    """Leave NaN in the memory that the next allocations get."""
    held = [torch.full((1 << power,), math.nan, device=DEVICE) for power in range(4, POWER + 5)]
    held.clear()  # into torch's cache, which keeps what is in them


def moved(value: Any, device: str) -> Any:
    """Return tensors, or lists of them, on a device, with the same strides and offsets; anything else as it is."""
    if isinstance(value, Tensor):
        return value if value.device.type == device else placed(value, device)
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    return value


def require(operation: str, backend: str) -> None:
    """Skip where a backend cannot run on this GPU, with its reason."""
    try:
        registry.choose(Spec(operation), torch.device(DEVICE), backend)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))


def assert_step_agrees(lists: Lists, lock_in: str, changes: dict[str, Any] | None = None, **group: Any) -> None:
    """Compare a step on the GPU with the reference on the CPU."""
    require("sweep_", "triton")
    expected = step(lists, "reference", lock_in, changes, **group)
    ours = {name: moved(tensors, DEVICE) for name, tensors in clones(lists).items()}
    call = {**step_arguments(ours, lock_in, **group), **(changes or {})}
    call |= {name: moved(call[name], DEVICE) for name in ("nonfinite", "grad_factor", "found_inf")}
    ops.sweep_(**call, backend="triton")
    found = {name: moved(tensors, "cpu") for name, tensors in ours.items()}
    assert_same({**found, "nonfinite": [call["nonfinite"].cpu()]}, expected)


@compares_moments
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("advanced", [False, True])
def test_step_of_every_size_and_kind(lock_in: str, amsgrad: bool, advanced: bool) -> None:
    params, grads = [torch.randn(size) for size in LENGTHS], [gradient((size,)) for size in LENGTHS]
    lists = step_lists(params, grads, lock_in, amsgrad)
    assert_step_agrees(lists, lock_in, {"advanced": advanced})
    assert_step_agrees(lists, lock_in, {"advanced": advanced}, betas=(0.3, 0.9), maximize=True)
    assert_step_agrees(lists, lock_in, {"advanced": advanced, "grad_factor": torch.tensor(0.3)})
    assert_step_agrees(lists, lock_in, {"advanced": advanced, "found_inf": torch.tensor(1.0)})


@compares_moments
@pytest.mark.parametrize("param_dtype", HALVES)
@pytest.mark.parametrize("grad_dtype", HALVES)
@pytest.mark.parametrize("lock_in", ["none", "importance", "exp_avg_sq", "static"])
def test_step_of_every_pair_of_dtypes(lock_in: str, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    params = [torch.randn(size).to(param_dtype) for size in LENGTHS]
    grads = [gradient((size,), grad_dtype) for size in LENGTHS]
    assert_step_agrees(step_lists(params, grads, lock_in, False), lock_in)


@compares_moments
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_step_of_special_values(dtype: torch.dtype, amsgrad: bool) -> None:
    p, g, m = (t.reshape(-1) for t in torch.meshgrid(SPECIAL, SPECIAL, SPECIAL, indexing="ij"))
    lists = step_lists([p.to(dtype)], [g.to(dtype)], "importance", amsgrad)
    lists |= {"exp_avg": [m.clone()], "exp_avg_sq": [m.abs()]}
    assert_step_agrees(lists, "importance")


@compares_moments
def test_step_of_views_and_of_groups_of_different_settings() -> None:
    params = [torch.randn(9001)[1:], torch.randn(40, 50)[::2, 1::3], torch.randn(70, 90).t(), torch.randn(())]
    lists = step_lists(params, [gradient(p.shape) for p in params], "importance", True)
    lists["max_exp_avg_sq"][2] = None
    lists["locks"][0] = None
    groups = ({"betas": (0.5, 0.9)}, {"lr": 1.0, "maximize": True})
    table = torch.cat([scalars("importance", 3, **group) for group in groups])
    changes = {"lockable": [False, True, True, True], "rows": [0, 1, 1, 0], "scalars": table}
    assert_step_agrees(lists, "importance", changes)


@compares_moments
@pytest.mark.parametrize("keep_finite", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_importance_ranges_and_sums(dtype: torch.dtype, keep_finite: bool) -> None:
    importances = [signed((size,)) for size in LENGTHS]
    grads = [None if i % 4 == 2 else gradient((size,), dtype) for i, size in enumerate(LENGTHS)]
    betas = torch.tensor([(b, 1 - b) for b in torch.rand(len(LENGTHS)).tolist()], dtype=torch.float64)
    sums = [[torch.randn(size) for size in LENGTHS] for _ in range(2)]
    results = []
    for device, backend in SIDES:
        mine, totals = (
            moved([s.clone() for s in importances], device),
            moved([[*map(torch.clone, s)] for s in sums], device),
        )
        ranges = moved(torch.tensor([[math.inf, -math.inf]]).repeat(4, 1), device)
        counts = torch.zeros(len(LENGTHS), dtype=torch.int64, device=device)
        layers = [i % 3 for i in range(len(LENGTHS))]
        ops.importance_(mine, moved(grads, device), ranges, counts, betas, layers, keep_finite, None, None, backend)
        present = [i for i, grad in enumerate(grads) if grad is not None]
        chosen = [[total[i] for i in present] for total in totals]
        ops.gradient_sums_(*chosen, [moved(grads[i], device) for i in present], backend)
        found = {"S": mine, "ranges": [ranges], "counts": [counts], "sums": totals[0], "squares": totals[1]}
        results.append({name: moved(tensors, "cpu") for name, tensors in found.items()})
    assert_same(*results)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hot", ["spread", "equal", "99% zeros"])
def test_histograms_digits_and_locks(backend: str, normalize: bool, hot: str) -> None:
    require("score_histogram", backend)
    importances = [signed((size,)) for size in LENGTHS]
    if hot == "equal":
        importances = [torch.full_like(s, 0.3) for s in importances]
    elif hot == "99% zeros":
        importances = [torch.where(torch.rand(s.shape) < 0.99, 0.0, s.nan_to_num(1.0)) for s in importances]
    layers, budgets = ([i % n for i in range(len(importances))] for n in (3, 2))
    ranges = torch.tensor([[0.0, 900.0], [1e-30, 1.0], [0.3, 0.3]]) if normalize else None
    results = []
    for device, name in (("cpu", "reference"), (DEVICE, backend)):
        mine, theirs = moved([s.clone() for s in importances], device), moved(ranges, device)
        selection = moved(torch.tensor([[0, 500], [0, 100_000]]), device)
        rest = "reference" if name == "reference" else "triton"
        found: dict[str, list[Tensor]] = {"counts": [], "thresholds": []}
        for shift, bins in ((19, 4096), (9, 1024), (0, 512)):
            counts = ops.score_histogram(mine, layers, theirs, budgets, selection, shift, bins, None, name)
            found["counts"].append(counts.sum(0).cpu())
            thresholds = ops.select_digit_(counts, selection, shift, rest)
            found["thresholds"].append(thresholds.cpu())
        found["locks"] = [ops.lock_(mine, layers, theirs, budgets, thresholds, None, rest).cpu()]
        results.append({**found, "selection": [selection.cpu()], "S": moved(mine, "cpu")})
    assert_same(*results)


@compares_moments
@pytest.mark.parametrize("dtype", HALVES)
def test_selected_entries(dtype: torch.dtype) -> None:
    params = [torch.randn(shape).to(dtype) for shape in ((7, 1001), (5,), (LENGTHS[-1] + 3,))]
    params[0] = params[0].t()
    grads = [torch.randn(p.shape).to(dtype) for p in params]
    indices = [torch.randperm(p.numel())[: p.numel() // 3].sort().values for p in params]
    state = [[torch.rand(len(i)) for i in indices] for _ in range(2)]
    row = scalars("none", 3)
    results = []
    for device, backend in SIDES:
        mine = [moved([t.clone() for t in tensors], device) for tensors in (params, *state)]
        rest = [moved(tensors, device) for tensors in (grads, indices)]
        ops.gather_("adamw", mine[0], *rest, [*mine[1], *mine[2]], row, [0] * len(params), backend)
        results.append({str(i): moved(tensors, "cpu") for i, tensors in enumerate(mine)})
    assert_same(*results)


def test_a_step_against_float64() -> None:
    lists = step_lists([torch.randn(LENGTHS[-1])], [torch.randn(LENGTHS[-1])], "none", False)
    wide = {name: [t.double() for t in tensors] for name, tensors in lists.items()}
    expected = step(wide, "reference", "none")["params"][0]
    call = {name: moved(tensors, DEVICE) for name, tensors in clones(lists).items()}
    arguments = step_arguments(call, "none")
    arguments["nonfinite"] = arguments["nonfinite"].to(DEVICE)
    ops.sweep_(**arguments, backend="triton")
    update = (expected - wide["params"][0]).abs().max()
    assert (call["params"][0].cpu() - expected).abs().max() <= STEP_ERROR * update
    assert (lists["params"][0] - expected).abs().max() > STEP_ERROR * update  # had it done nothing


# The optimizer -------------------------------------------------------------------------------------------------------


def optimizer(device: str, shapes: list[tuple[int, ...]], **settings: Any) -> tuple[EPIAdamW, list[Parameter]]:
    generator = torch.Generator().manual_seed(1)
    params = [Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    named = [(f"layers.{i // 2}.weight{i}", p) for i, p in enumerate(params)]
    common = {"isolation_ratio": 0.05, "mask_interval": 4, "importance_beta": 0.9, "lr": 1e-2, "backend": BACKEND}
    return EPIAdamW(named, **{**common, **settings}), params


def give(params: list[Parameter], generator: torch.Generator) -> None:
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * torch.rand(param.shape, generator=generator) ** 4
        param.grad = grad.to(param.device, param.dtype)


LARGER = [(300, 70), (300,), (40_000,)]
MIXED = [(30, 70), (8193,), (5, 6, 7), (), (0, 3), *(LARGER if ON_GPU else [])]


@compares_moments
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"importance": "exp_avg_sq"},
        {"normalize": "none", "scope": "layer"},
        {"threshold": "histogram", "amsgrad": True},
    ],
)
def test_the_entries_that_it_chooses_are_those_of_the_cpu(settings: dict[str, Any]) -> None:
    runs = []
    for device, backend in (("cpu", "reference"), (DEVICE, BACKEND)):
        stepped, params = optimizer(device, MIXED, backend=backend, **settings)
        generator = torch.Generator().manual_seed(2)
        masks = []
        for _ in range(12 if ON_GPU else 4):
            give(params, generator)
            stepped.step()
            masks += [stepped.isolation_mask(p).cpu() for p in params]
        telemetry = stepped.telemetry()
        runs.append((masks, [p.detach().cpu() for p in params], telemetry))
    (masks, params, telemetry), (gpu_masks, gpu_params, gpu_telemetry) = runs
    assert sum(int(mask.sum()) for mask in masks) > 0
    assert all(torch.equal(*pair) for pair in zip(masks, gpu_masks, strict=True))
    assert_same({"params": params}, {"params": gpu_params})
    assert telemetry == gpu_telemetry


@dataclass
class Trained:
    """A model, its optimizer, and its parameters before the last step."""

    model: nn.Module
    optimizer: Any
    before: list[Tensor]


def trained(device: str, build: Callable[[nn.Module], Any]) -> Trained:
    """Return a model after some steps, with a refresh before the last, of the optimizer that `build` makes."""
    model = model_of(Net if ON_GPU else SmallNet).to(device)
    optimizer = build(model)
    for number in range(1, 6 if ON_GPU else 4):
        give(list(model.parameters()), torch.Generator().manual_seed(number))
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
    return Trained(model, optimizer, before)


@compares_moments
@pytest.mark.parametrize(("kind", "storage"), [*CASES, *((kind, "float32") for kind in KINDS)])
def test_every_optimizer_in_every_storage_trains_as_on_the_cpu(kind: str, storage: str) -> None:
    """Parameters and states, selections and masks among them, are the same bit for bit."""
    ours, theirs = (
        trained(device, partial(optimizer_of, kind, backend=backend, **STORAGES.get(storage, {})))
        for device, backend in (("cpu", "reference"), (DEVICE, BACKEND))
    )
    pairs = zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True)
    for (name, expected), found in pairs:
        assert same_bits(found.detach().cpu(), expected.detach()), name
        state, there = ours.optimizer.state[expected], theirs.optimizer.state[found]
        assert state.keys() == there.keys()
        for key, value in state.items():
            assert same_bits(there[key].cpu(), value), (name, key)


@compares_moments
@pytest.mark.parametrize("importance_dtype", [torch.bfloat16, "8bit", None])
def test_an_isolated_optimizer_protects_what_it_protects_on_the_cpu(importance_dtype: Any) -> None:
    def isolated(backend: str, model: nn.Module) -> IsolatedOptimizer:
        base = torch.optim.AdamW(model.named_parameters(), lr=0.02)
        return IsolatedOptimizer(base, **ISOLATION, importance_dtype=importance_dtype, backend=backend)

    ours, theirs = trained("cpu", partial(isolated, "reference")), trained(DEVICE, partial(isolated, BACKEND))
    pairs = zip(ours.model.named_parameters(), theirs.model.parameters(), theirs.before, strict=True)
    for (name, expected), found, before in pairs:
        mask = theirs.optimizer.isolation_mask(found)
        assert torch.equal(mask.cpu(), ours.optimizer.isolation_mask(expected)), name
        assert torch.equal(found[mask], before[mask]), name
        assert not torch.equal(found, before), name
        state, there = ours.optimizer.state[expected], theirs.optimizer.state[found]
        for key in (key for key in state if key.startswith("importance")):
            assert same_bits(there[key].cpu(), state[key]), (name, key)


def test_twenty_runs_give_the_same_bits() -> None:
    found = []
    for _ in range(20 if ON_GPU else 2):
        stepped, params = optimizer(DEVICE, [(1 << POWER - 2,)] * 4, mask_interval=1)
        generator = torch.Generator().manual_seed(3)
        for _ in range(2):
            give(params, generator)
            stepped.step()
        found.append(
            {"p": [p.detach().cpu() for p in params], "S": [stepped.state[p]["importance"].cpu() for p in params]}
        )
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.usefixtures("no_waiting")
def test_neither_a_step_nor_a_refresh_waits_for_the_device() -> None:
    stepped, params = optimizer(DEVICE, MIXED, mask_interval=2)
    give(params, torch.Generator().manual_seed(4))
    for _ in range(4):  # compilation and the self-checks wait, once
        stepped.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(4):
        stepped.step()
    torch.cuda.set_sync_debug_mode("default")
    assert len(stepped.telemetry()) == 4


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("count", [4, 400])
def test_launches(count: int) -> None:
    stepped, params = optimizer(DEVICE, [(100 + i % 7,) for i in range(count)], mask_interval=3)
    for i, param in enumerate(params):
        param.data = param.data.bfloat16() if i % 2 else param.data
    give(params, torch.Generator().manual_seed(5))
    for _ in range(3):
        stepped.step()
    steady = measure.kernels(stepped.step)
    stepped.step()
    refreshed = measure.kernels(stepped.step)
    assert len(stepped._isolation.records) == 2
    for found in (steady, refreshed):
        assert found is not None, "the profiler lost kernels; see measure.SENTINELS"
    assert len(steady) == 2, steady
    assert 2 < len(refreshed) <= 2 + 8, refreshed


def test_gradients_that_are_not_finite_are_reported_without_waiting_and_then_for_certain() -> None:
    stepped, params = optimizer(DEVICE, [(100,), (50,)], mask_interval=2)
    give(params, torch.Generator().manual_seed(6))
    params[1].grad[:3] = math.nan

    def run() -> None:
        for _ in range(2):
            stepped.step()
        torch.cuda.synchronize()
        stepped.step()

    # the refresh of the second step starts a copy of the counters, which may arrive before that step ends
    with pytest.warns(RuntimeWarning, match=r"layers.0.weight1: \d squared gradients were NaN or infinite"):
        run()
    assert stepped.telemetry()[-1]["nonfinite"] == 6


# Large and careful ---------------------------------------------------------------------------------------------------


def as_float32(value: float) -> float:
    """Return what a float32 tensor holds of a number."""
    return float(torch.tensor(value, dtype=torch.float32))


RATE = as_float32(0.01)


def trained_pair(**settings: Any) -> tuple[list[Parameter], EPIAdamW, list[Parameter], EPIAdamW]:
    """Return parameters on the GPU with a capturable optimizer, and the same on the CPU."""
    generator = torch.Generator().manual_seed(3)
    cpu = [Parameter(torch.randn(shape, generator=generator)) for shape in ((300, 70), (70,), (LENGTHS[-1] + 1,))]
    gpu = [Parameter(p.detach().to(DEVICE, copy=True)) for p in cpu]
    for param in gpu:
        param.grad = torch.zeros_like(param)
    names = ["h.0.weight", "h.0.bias", "head.weight"]
    common: dict[str, Any] = {"isolation_ratio": 0.1, "mask_interval": 3, **settings}
    there = {**common, "lr": torch.tensor(RATE, device=DEVICE), "capturable": True, "backend": BACKEND}
    ours = EPIAdamW(zip(names, gpu, strict=True), **there)
    return gpu, ours, cpu, EPIAdamW(zip(names, cpu, strict=True), lr=RATE, backend="reference", **common)


def give_both(gpu: list[Parameter], cpu: list[Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for mine, theirs in zip(gpu, cpu, strict=True):
        theirs.grad = torch.randn(theirs.shape, generator=generator)
        mine.grad.copy_(theirs.grad)  # type: ignore[union-attr]


def captured(optimizer: EPIAdamW) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@compares_moments
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"importance": "exp_avg_sq"}, {"clip_grad_norm": 50.0}], ids=str)
def test_a_captured_step_over_refreshes_a_schedule_and_a_load(settings: dict[str, Any]) -> None:
    gpu, optimizer, cpu, twin = trained_pair(**settings)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        give_both(gpu, cpu, 1)
        optimizer.step()
        twin.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = captured(optimizer)  # takes no step

    def replay(first: int, last: int) -> None:
        for number in range(first, last + 1):
            give_both(gpu, cpu, number)
            rate = as_float32(0.01 / number)
            optimizer.param_groups[0]["lr"].fill_(rate)
            twin.param_groups[0]["lr"] = rate
            graph.replay()
            twin.step()
            for mine, theirs in zip(gpu, cpu, strict=True):
                if "clip_grad_norm" in settings:  # norms add up in another order
                    torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(mine.cpu(), theirs)
                    assert torch.equal(optimizer.isolation_mask(mine).cpu(), twin.isolation_mask(theirs))
                assert optimizer.state[mine]["step"].item() == number

    middle, last = (8, 14) if ON_GPU else (4, 6)
    replay(2, middle)
    assert optimizer.telemetry()[-1]["step"] == middle // 3 * 3
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(twin.state_dict())
    weights = [p.detach().clone() for p in gpu]
    for other in (70, 71):
        give_both(gpu, cpu, other)
        graph.replay()
    optimizer.load_state_dict(saved[0])
    twin.load_state_dict(saved[1])
    for mine, theirs, weight in zip(gpu, cpu, weights, strict=True):
        mine.data.copy_(weight)
        theirs.data.copy_(weight)
    replay(middle + 1, last)


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning")
# torch's own word on the capture that was refused before anything was in it
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_capture_that_would_leave_a_parameter_out_is_refused() -> None:
    gpu, optimizer, cpu, _ = trained_pair()
    give_both(gpu, cpu, 1)
    with pytest.raises(RuntimeError, match="it is not the step of before"):  # no step was taken yet
        captured(optimizer)
    optimizer.step()
    gpu[1].grad = None
    with pytest.raises(RuntimeError, match="h.0.bias has no gradient: replays would never move it"):
        captured(optimizer)


@compares_moments
def test_a_fused_optimizer_under_a_scaler_does_not_wait_and_skips_by_itself() -> None:
    gpu, _, cpu, twin = trained_pair()
    names = ["h.0.weight", "h.0.bias", "head.weight"]
    settings = {"isolation_ratio": 0.1, "mask_interval": 3, "backend": BACKEND}
    optimizer = EPIAdamW(zip(names, gpu, strict=True), lr=RATE, fused=True, **settings)
    for number in range(1, 9):
        give_both(gpu, cpu, number)
        found = number in (2, 5)
        optimizer.grad_scale = torch.tensor(1.0, device=DEVICE)
        optimizer.found_inf = torch.tensor(float(found), device=DEVICE)
        optimizer.step()
        if not found:
            twin.step()
        for mine, theirs in zip(gpu, cpu, strict=True):
            assert torch.equal(mine.cpu(), theirs)
    assert optimizer.state[gpu[0]]["step"].device.type == DEVICE
    assert optimizer.telemetry()[-1]["step"] == twin.telemetry()[-1]["step"] == 6


def test_entries_beyond_two_to_the_31() -> None:
    far = 1 << (31 if ON_GPU else POWER)
    size = far + (1 << 13) + 5  # beyond it full tiles, which are read without a mask, and one that is not
    needed = size * (2 + 2 + 4 + 4 + 4) + (4 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"it takes {needed >> 30} GiB of GPU memory")
    param, grad = (torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in "pg")
    m, v, importance = (torch.zeros(size, device=DEVICE) for _ in "mvS")
    where = torch.tensor([0, far - 1, far, far + 5000, size - 1], device=DEVICE)
    param[where], grad[where] = 1.0, torch.arange(1.0, 6.0, device=DEVICE).bfloat16()
    # theta - 0.5 sign(g), S = g^2
    settings = {"lr": 0.5, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0, "importance_beta": 0.0}
    row, counts = scalars("importance", 1, **settings), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    tensors = ops.Tensors([param], [grad], {"exp_avg": [m], "exp_avg_sq": [v]}, [importance])
    sweep = ops.prepared_sweep(ADAMW, tensors, "importance", [True], "triton")
    sweep.step_(tensors, counts, row, [0], False, None, None, False)
    assert importance[where].tolist() == [1.0, 4.0, 9.0, 16.0, 25.0]
    assert importance.count_nonzero() == 5
    assert param[where].tolist() == [0.5] * 5
    selection = torch.tensor([[0, 2]], device=DEVICE)
    counts = ops.score_histogram([importance], [0], None, [0], selection, 19, 4096, None, "auto").sum(0)
    assert counts.sum() == size
    locked = ops.lock_([importance], [0], None, [0], torch.tensor([16.0], device=DEVICE), None, "triton")
    assert locked.tolist() == [[2, 2, 0]]


SANITIZED = """
import torch
from torch.nn import Parameter
from epi_kernels import EPIAdamW, ops
params = [Parameter(torch.randn(size, device=DEVICE)) for size in (1, 37, 4096, 9001)]
params += [Parameter(torch.randn(5000, device=DEVICE).bfloat16())]
for p in params:
    p.grad = torch.randn_like(p)
settings = {"layers": "tensor", "isolation_ratio": 0.1, "mask_interval": 2, "backend": BACKEND}
optimizer = EPIAdamW(params, amsgrad=True, **settings)
compact = [Parameter(torch.randn(48, 100, device=DEVICE).bfloat16())]
compact[0].grad = torch.randn_like(compact[0])
stored = EPIAdamW(compact, state_dtype=STATE_DTYPE, master_weight_bits=24, **settings)
for _ in range(3):
    optimizer.step()
    stored.step()
p, indices = torch.randn(1000, device=DEVICE), torch.arange(0, 1000, 7, device=DEVICE)
state = [torch.zeros(len(indices), device=DEVICE) for _ in range(2)]
ops.gather_("adamw", [p], [p.clone()], [indices], state, torch.ones(1, 12).double(), [0], "triton")
sums = [torch.zeros(9001, device=DEVICE) for _ in range(2)]
ops.gradient_sums_(*([s] for s in sums), [params[3].grad], "triton")
torch.cuda.synchronize()
print("done")
"""


# interpreted, blocks of 8 bits take half a minute
CONSTANTS = f"DEVICE, BACKEND, STATE_DTYPE = {DEVICE!r}, {BACKEND!r}, {'8bit' if ON_GPU else None!r}\n"


def test_what_compute_sanitizer_runs() -> None:
    exec(CONSTANTS + SANITIZED, {})


@pytest.mark.skipif(not ON_GPU, reason="compute-sanitizer looks at a GPU")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on PATH")
    # torch and triton ask the driver for what may not be there, which is no error of a kernel
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    options += ["--target-processes", "application-only"]  # not the compilers
    command = ["compute-sanitizer", *options, sys.executable, "-c", CONSTANTS + SANITIZED]
    # in a block of torch's cache an access beyond a tensor hits the next one
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if "not supported" in run.stdout:
        pytest.skip("compute-sanitizer does not know this device")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "done" in run.stdout
