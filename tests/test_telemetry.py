"""What an optimizer remembers of its refreshes: true to the masks, bounded, in checkpoints, and never waited for.

- Every count of a record equals that of the masks before and after the refresh, layer by layer; overlap and distance
  equal those of `epi_kernels.metrics`.
- A checkpoint that is asked for the records has them, JSON keeps them, and a record that was changed is refused.
- The records are bounded, and hold no tensor once a device has brought them.
"""

import copy
import gc
import json
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from states import same_state
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer

from epi_kernels import EPIAdamW, EPILion, IsolatedOptimizer
from epi_kernels.isolation.telemetry import RECORDS, Budget, Layout, Record, Records
from epi_kernels.metrics import mask_hamming, mask_jaccard

SETTINGS: dict[str, Any] = {"isolation_ratio": 0.2, "mask_interval": 2, "importance_beta": 0.5, "layers": "block"}
SHAPES = {"layers.0.a": (6, 4), "layers.0.b": (5,), "layers.1.a": (3, 7), "head.w": (9,)}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "EPIAdamW": lambda named: EPIAdamW(named, lr=0.1, **SETTINGS),
    "EPIAdamW, S = exp_avg_sq": lambda named: EPIAdamW(named, lr=0.1, importance="exp_avg_sq", **SETTINGS),
    "EPILion": lambda named: EPILion(named, lr=0.1, **SETTINGS),
    "IsolatedOptimizer": lambda named: IsolatedOptimizer(torch.optim.SGD(named, lr=0.1), **SETTINGS),
}


def made(name: str) -> tuple[Any, dict[str, Parameter]]:
    params = {name: Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    return OPTIMIZERS[name](params.items()), params


def step(optimizer: Optimizer, params: dict[str, Parameter], seed: int, bad: int = 0) -> None:
    """Take a step with gradients of which `bad` are not finite."""
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator)
    params["layers.0.a"].grad.view(-1)[:bad] = float("nan")  # type: ignore[union-attr]
    optimizer.step()


def masks(optimizer: Any, params: dict[str, Parameter]) -> dict[str, Tensor]:
    return {name: optimizer.isolation_mask(param) for name, param in params.items()}


@pytest.fixture(params=OPTIMIZERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(name: str) -> tuple[Any, dict[str, Parameter]]:
    """Return an optimizer after three refreshes, and its parameters."""
    optimizer, params = made(name)
    for seed in range(7):
        step(optimizer, params, seed)
    return optimizer, params


def test_every_record_equals_the_masks_before_and_after_the_refresh(name: str) -> None:
    optimizer, params = made(name)
    assert optimizer.telemetry(last=True) is None
    before = masks(optimizer, params)
    for seed in range(12):
        step(optimizer, params, seed)
        after = masks(optimizer, params)
        record = optimizer.telemetry(last=True)
        if seed % 2 == 0:
            assert same_state(before, after)
            continue
        assert record == optimizer.telemetry()[-1]
        assert record["step"] == seed + 1
        assert record["hamming"] == mask_hamming(before, after) > 0
        assert record["jaccard"] == mask_jaccard(before, after)
        now, new, gone = (
            {n: int(of(before[n], after[n]).sum()) for n in params}
            for of in (lambda b, a: a, lambda b, a: a & ~b, lambda b, a: b & ~a)
        )
        assert record["protected"] == sum(now.values()) == 11  # floor(0.2 * 59)
        assert (record["locked"], record["released"]) == (sum(new.values()), sum(gone.values()))
        assert record["kept"] == record["protected"] - record["locked"]
        for layer in record["layers"]:
            members = [n for n in params if n.startswith(layer["layer"])]
            assert layer["protected"] == sum(now[n] for n in members)
            assert layer["locked"] == sum(new[n] for n in members)
            assert layer["released"] == sum(gone[n] for n in members)
            assert layer["kept"] == layer["protected"] - layer["locked"]
        before = after


def test_two_empty_masks_are_equal() -> None:
    weight = Parameter(torch.ones(4))
    optimizer = EPIAdamW([("weight", weight)], mask_interval=1, isolation_ratio=0.5)
    weight.grad = torch.zeros(4)
    optimizer.step()
    record = optimizer.telemetry(last=True)
    assert (record["protected"], record["jaccard"], record["hamming"]) == (0, 1.0, 0)


def test_a_checkpoint_that_is_asked_for_the_records_has_them(run: tuple[Any, dict[str, Parameter]], name: str) -> None:
    optimizer, params = run
    assert "telemetry" not in optimizer.state_dict()
    saved = copy.deepcopy(optimizer.state_dict(telemetry=True))
    other, _ = made(name)
    other.load_state_dict(saved)
    assert other.telemetry() == optimizer.telemetry()
    assert [record["step"] for record in other.telemetry()] == [2, 4, 6]
    step(optimizer, params, 7)
    step(other, dict(zip(params, other.param_groups[0]["params"], strict=True)), 7)
    assert other.telemetry() == optimizer.telemetry()
    assert len(other.telemetry()) == 4
    assert "telemetry" in saved  # the caller's dict is as it was


def test_counts_of_gradients_that_are_not_finite_go_on_from_the_last_record(name: str) -> None:
    optimizer, params = made(name)
    other, twins = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(4):
            step(optimizer, params, seed, bad=seed + 1)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict(telemetry=True)))
        for seed in range(4, 8):
            step(optimizer, params, seed, bad=seed + 1)
            step(other, twins, seed, bad=seed + 1)
    assert [record["nonfinite"] for record in optimizer.telemetry()] == [3, 10, 21, 36]
    assert other.telemetry() == optimizer.telemetry()
    other.load_telemetry(optimizer.telemetry()[:1])
    other.refresh()
    assert other.telemetry(last=True)["nonfinite"] == 3


def test_a_state_without_records_leaves_those_that_there_are(run: tuple[Any, dict[str, Parameter]]) -> None:
    optimizer, _ = run
    records = optimizer.telemetry()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.telemetry() == records


def test_torchs_adamw_loads_a_state_with_records() -> None:
    optimizer, params = made("EPIAdamW")
    for seed in range(3):
        step(optimizer, params, seed)
    torch.optim.AdamW(params.items()).load_state_dict(optimizer.state_dict(telemetry=True))


def test_json_keeps_the_records(run: tuple[Any, dict[str, Parameter]], name: str) -> None:
    optimizer, _ = run
    other, _ = made(name)
    other.load_telemetry(json.loads(json.dumps(optimizer.telemetry())))
    assert other.telemetry() == optimizer.telemetry()


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a sum": (lambda r: r.update(locked=r["locked"] + 1), "record 1 has been changed: its locked is"),
    "a count of a layer": (lambda r: r["layers"][0].update(released=99), "record 1 has been changed: its"),
    "a layer gone": (lambda r: r["layers"].pop(), "record 1 has been changed: its"),
    "a key gone": (lambda r: r.pop("layers"), "record 1 has no 'layers'; pass records as"),
    "a key of a layer gone": (lambda r: r["layers"][0].pop("minimum"), "record 1 has no 'minimum'; pass records as"),
    "text": (lambda r: r.update(step="soon"), "record 1 is not one that telemetry.. returned: invalid literal"),
    "no list": (lambda r: r.update(budgets=3), "record 1 is not one that telemetry.. returned: 'int' object"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_that_was_changed_is_refused_and_nothing_changes(
    run: tuple[Any, dict[str, Parameter]], change: str
) -> None:
    optimizer, params = run
    records = optimizer.telemetry()
    saved = copy.deepcopy(optimizer.state_dict(telemetry=True))
    step(optimizer, params, 7)
    edit, message = CHANGES[change]
    edit(saved["telemetry"][1])
    before = copy.deepcopy((optimizer.state_dict(), optimizer.telemetry()))
    for load in (lambda: optimizer.load_state_dict(saved), lambda: optimizer.load_telemetry(saved["telemetry"])):
        with pytest.raises(ValueError, match=f"telemetry {message}"):
            load()
        assert same_state((optimizer.state_dict(), optimizer.telemetry()), before)
    with pytest.raises(ValueError, match="telemetry record 1 is a int and not a dict"):
        optimizer.load_telemetry([records[0], 3])


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_telemetry_is_bounded_and_holds_no_tensor() -> None:
    named = [(f"layers.{i}.w", Parameter(torch.ones(4))) for i in range(300)]
    optimizer = EPIAdamW(named, mask_interval=1, isolation_ratio=0.1)
    for _, param in named:
        param.grad = torch.randn(4)
    for _ in range(50):
        optimizer.step()
    alive = tensors_alive()
    for _ in range(250):
        optimizer.step()
    assert tensors_alive() == alive
    records = optimizer.telemetry()
    assert [record["step"] for record in records] == list(range(300 - RECORDS + 1, 301))
    assert all(len(record["layers"]) == 300 for record in records)
    # 8 bytes of a range and 3 of counts for each layer, and names once
    assert len(pickle.dumps(optimizer._isolation.records)) < RECORDS * 300 * 12 + 500 * RECORDS
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.telemetry() == records
    twin = pickle.loads(pickle.dumps(optimizer))
    twin.refresh()
    assert twin.telemetry()[:-1] == records[1:]


def test_ten_thousand_refreshes_are_as_large_as_256(arrivals: "Arrivals") -> None:
    records, sizes = Records(), []
    arrivals.arrived = True
    for first, last in ((1, RECORDS), (RECORDS + 1, 10_000)):
        for number in range(first, last + 1):
            records.add(arrivals.record(number), [arrivals.device])
        sizes.append(len(pickle.dumps(records)))
    assert records.read()[-1]["step"] == 10_000
    assert sizes[1] <= sizes[0] + 4 * RECORDS  # the numbers themselves need a byte or two more each


class Arrivals:
    """A device, not the CPU, whose copies arrive when the test says so; its tensors are in the memory of the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = torch.device("meta")
        self.arrived = False
        to, here = Tensor.to, self

        class Event:
            def __init__(self, device: torch.device) -> None:
                assert device == here.device

            def record(self, stream: object) -> None:
                pass

            def query(self) -> bool:
                return here.arrived

            def synchronize(self) -> None:
                here.arrived = True

        def copied(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return tensor.clone() if args == ("cpu",) else to(tensor, *args, **kwargs)

        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
        monkeypatch.setattr(Tensor, "to", copied)

    def record(self, step: int) -> Record:
        """Return the record of a refresh on this device."""
        counts, thresholds = torch.tensor([[2, 1, 0], [3, 0, 1]]), torch.ones(1)
        budgets = (Budget("global", 0.5, 10, 5),)
        layout, layer_of, budget_of = Layout(("a", "b"), (4, 6), budgets), np.array([0, 1]), np.array([0, 0])
        nonfinite = [torch.tensor([step, 1])]
        return Record(step, layout, layer_of, budget_of, torch.ones(2, 2), thresholds, counts, nonfinite)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals:
    return Arrivals(monkeypatch)


def test_a_record_that_is_under_way_is_read_when_it_has_arrived(arrivals: Arrivals) -> None:
    records = Records()
    for step in range(1, RECORDS + 10):
        records.add(arrivals.record(step), [arrivals.device])
    assert len(records) == RECORDS
    assert not records._done
    read = records.read()
    assert [record["step"] for record in read] == list(range(10, RECORDS + 10))
    assert read[0]["nonfinite"] == 11
    assert [layer["protected"] for layer in read[0]["layers"]] == [2, 3]
    assert not records._under_way


def test_a_record_that_has_arrived_is_numbers_at_the_next_one(arrivals: Arrivals) -> None:
    records = Records()
    for step in range(1, 4):
        arrivals.arrived = False  # that of this step is under way
        records.add(arrivals.record(step), [arrivals.device])
        assert [record.step for record, _ in records._under_way] == list(range(1, step + 1))
    arrivals.arrived = True
    records.add(arrivals.record(4), [arrivals.device])
    assert not records._under_way
    assert [numbers.step for numbers in records._done] == [1, 2, 3, 4]


def test_a_record_keeps_nothing_on_its_device(arrivals: Arrivals) -> None:
    records, record = Records(), arrivals.record(1)
    on_device = [weakref.ref(tensor) for tensor in (record.ranges, record.thresholds, record.counts)]
    records.add(record, [arrivals.device])
    assert len(records._under_way) == 1
    del record
    gc.collect()
    assert all(tensor() is None for tensor in on_device)
    assert [layer["protected"] for layer in records.read()[0]["layers"]] == [2, 3]


@pytest.mark.parametrize("rows", [{"layer_of": np.array([1, 0])}, {"budget_of": np.array([1, 0])}])
def test_a_record_of_tensors_in_other_layers_or_budgets_is_not_written_over_another(rows: dict[str, Any]) -> None:
    budgets = (Budget("global", 0.5, 4, 2), Budget("global", 0.25, 4, 1))
    numbers = {"ranges": torch.ones(2, 2), "thresholds": torch.ones(2), "nonfinite": [torch.zeros(2)]}
    where = {"layer_of": np.array([0, 1]), "budget_of": np.array([0, 1])}
    counts = torch.tensor([[2, 0, 0], [1, 0, 0]])
    layout = Layout(("a", "b"), (4, 4), budgets)
    before = Record(torch.tensor(1.0), layout, **where, **numbers, counts=counts)
    after = Record(torch.tensor(2.0), layout, **{**where, **rows}, **numbers, counts=counts)
    assert after.kept_where(torch.tensor(1.0), before) is not before
    assert float(after.kept_where(torch.tensor(0.0), before).step) == 0
    assert (
        Record(torch.tensor(2.0), layout, **where, **numbers, counts=counts).kept_where(torch.tensor(1.0), before)
        is before
    )
