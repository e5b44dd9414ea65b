"""What an operation hands to compiled code is checked first: a wrong argument is refused, and nothing is written.

Compiled code goes by the dtype and shape that the documentation names. A float64 tensor in a float32's place, or one
row too few, would be read or written beyond its memory.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import gradient, signed, step_arguments, step_lists
from torch import Tensor

from epi_kernels import ops
from epi_kernels.rules import ADAMW
from epi_kernels.schema import width_of

Change = Callable[[dict[str, Any]], Any]


def importance_arguments() -> dict[str, Any]:
    return {
        "importances": [signed((5,)), signed((3, 4))],
        "grads": [gradient((5,)), None],
        "ranges": torch.tensor([[torch.inf, -torch.inf]]).repeat(2, 1),
        "nonfinite": torch.zeros(2, dtype=torch.int64),
        "betas": torch.tensor([(0.9, 0.1)] * 2, dtype=torch.float64),
        "layers": [0, 1],
        "keep_finite": True,
        "grad_factor": torch.ones(()),
        "due": torch.ones(1),
    }


def histogram_arguments() -> dict[str, Any]:
    return {
        "importances": [signed((5,)), signed((3, 4))],
        "layers": [0, 1],
        "ranges": torch.tensor([[0.0, 1.0]] * 2),
        "budgets": [0, 1],
        "selection": torch.tensor([[0, 3], [0, 2]]),
        "shift": 19,
        "bins": 4096,
        "due": torch.ones(()),
    }


def digit_arguments() -> dict[str, Any]:
    counts = torch.zeros(1, 2, 4096, dtype=torch.int64)
    counts[:, :, 7] = 9
    return {"counts": counts, "selection": torch.tensor([[0, 3], [0, 2]]), "shift": 19}


def lock_arguments() -> dict[str, Any]:
    kept = {key: value for key, value in histogram_arguments().items() if key not in ("selection", "shift", "bins")}
    return {**kept, "thresholds": torch.tensor([0.1, 0.2])}


def sweep_arguments() -> dict[str, Any]:
    arguments = step_arguments(step_lists([torch.ones(5)], [gradient((5,))], "importance", False), "importance")
    return {**arguments, "grad_factor": torch.ones(()), "found_inf": torch.zeros(())}


def gather_arguments() -> dict[str, Any]:
    return {
        "rule": "adamw",
        "params": [torch.ones(4, 3)],
        "grads": [gradient((4, 3))],
        "indices": [torch.tensor([1, 5])],
        "slots": [torch.zeros(2), torch.zeros(2)],
        "scalars": torch.ones(1, width_of(ADAMW), dtype=torch.float64),
        "rows": [0],
    }


def sums_arguments() -> dict[str, Any]:
    return {"sums": [torch.ones(5)], "square_sums": [torch.ones(5)], "grads": [gradient((5,))]}


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "importance_": (ops.importance_, importance_arguments),
    "score_histogram": (ops.score_histogram, histogram_arguments),
    "select_digit_": (ops.select_digit_, digit_arguments),
    "lock_": (ops.lock_, lock_arguments),
    "sweep_": (ops.sweep_, sweep_arguments),
    "gather_": (ops.gather_, gather_arguments),
    "gradient_sums_": (ops.gradient_sums_, sums_arguments),
}

# operation -> its small tensors, and those of its numbers that are positions in one of them
TENSORS = {
    "importance_": ("ranges", "nonfinite", "betas", "grad_factor", "due"),
    "score_histogram": ("ranges", "selection", "due"),
    "select_digit_": ("counts", "selection"),
    "lock_": ("ranges", "thresholds", "due"),
    "sweep_": ("nonfinite", "scalars", "grad_factor", "found_inf"),
    "gather_": ("scalars",),
}
POSITIONS = {
    "importance_": ("layers",),
    "score_histogram": ("layers", "budgets"),
    "lock_": ("layers", "budgets"),
    "sweep_": ("rows",),
    "gather_": ("rows",),
}
OTHER = {torch.float32: torch.float64, torch.float64: torch.float32, torch.int64: torch.int32}

WRONG: dict[str, Change] = {
    "of another dtype": lambda tensor: tensor.to(OTHER[tensor.dtype]),
    "of half the bytes": lambda tensor: tensor.to(torch.bfloat16 if tensor.is_floating_point() else torch.int16),
    "longer": lambda tensor: torch.cat([tensor.reshape(1) if tensor.dim() == 0 else tensor] * 2, -1),
    "shorter": lambda tensor: tensor.reshape(1)[:0] if tensor.dim() == 0 else tensor[..., :-1],
    "not contiguous": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}


def tensors_of(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    return [t for one in arguments for t in tensors_of(one)] if isinstance(arguments, (list, tuple)) else []


def assert_refused(operation: str, arguments: dict[str, Any], backend: str, match: str) -> None:
    call, _ = OPERATIONS[operation]
    here = [tensor for tensor in tensors_of(arguments) if tensor.device.type == "cpu"]
    before = [tensor.clone() for tensor in here]
    with pytest.raises((TypeError, ValueError), match=match):
        call(**arguments, backend=backend)
    for tensor, copy in zip(here, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


# what is no mistake: a threshold that no tensor asks for
RIGHT = {("thresholds", "longer")}
CASES = [
    (operation, name, wrong)
    for operation, names in TENSORS.items()
    for name in names
    for wrong in WRONG
    if (name, wrong) not in RIGHT
    # of one value there is one layout
    and not (name in ("grad_factor", "due", "found_inf", "nonfinite") and wrong == "not contiguous")
]


@pytest.mark.parametrize(("operation", "name", "wrong"), CASES, ids=lambda value: str(value))
def test_a_wrong_tensor_is_refused_and_nothing_is_written(operation: str, name: str, wrong: str, backend: str) -> None:
    arguments = OPERATIONS[operation][1]()
    arguments[name] = WRONG[wrong](arguments[name])
    assert_refused(operation, arguments, backend, f"{name}|bins" if name == "counts" else name)


# operation -> its lists of tensors or numbers; without gradients a tensor's importance and its range stay
LISTS = {
    "importance_": ("importances", "grads", "layers"),
    "score_histogram": ("importances", "layers", "budgets"),
    "lock_": ("importances", "layers", "budgets"),
    "sweep_": ("params", "grads", "slots", "locks", "rows", "lockable"),
    "gather_": ("params", "grads", "indices", "slots", "rows"),
    "gradient_sums_": ("square_sums", "grads"),
}


@pytest.mark.parametrize(
    ("operation", "name"), [(o, n) for o, names in LISTS.items() for n in names], ids=lambda value: str(value)
)
def test_an_empty_list_in_the_place_of_one_that_is_needed_is_refused(operation: str, name: str, backend: str) -> None:
    for changes in ({}, {"ranges": None}) if operation in ("score_histogram", "lock_") else ({},):
        arguments = {**OPERATIONS[operation][1](), **changes, name: []}
        assert_refused(operation, arguments, backend, "pass|lock_in")


def test_tensors_on_two_devices_are_refused() -> None:
    def lists(*devices: str) -> list[Tensor]:
        return [torch.ones(2, device=device) for device in devices]

    both = ("cpu", "meta")
    for backend in ("auto", "reference"):
        slots = {"exp_avg": lists(*both), "exp_avg_sq": lists(*both)}
        with pytest.raises(ValueError, match=r"params\[1\] is on meta; pass it on cpu"):
            ops.prepared_sweep(ADAMW, ops.Tensors(lists(*both), lists(*both), slots), "none", [False, False], backend)
        indices = [torch.tensor([0, 1], device=device) for device in both]
        with pytest.raises(ValueError, match=r"params\[1\] is on meta; pass it on cpu"):
            ops.prepared_gather(ADAMW, ops.Tensors(lists(*both), lists(*both), slots), indices, backend)
        elsewhere = {"exp_avg": lists("cpu"), "exp_avg_sq": lists("meta")}
        with pytest.raises(ValueError, match=r"exp_avg_sq\[0\] is on meta but params\[0\] is on cpu"):
            ops.prepared_gather(ADAMW, ops.Tensors(lists("cpu"), lists("cpu"), elsewhere), indices[:1], backend)
        # past torch's dispatcher, which takes a meta tensor for a question about shapes
        with pytest.raises(ValueError, match=r"grads\[1\] is on meta; pass it on cpu"):
            ops.gradient_sums_._init_fn([], lists(*both), lists(*both), backend)


@pytest.mark.parametrize(
    ("operation", "name"),
    [(o, n) for o, names in TENSORS.items() for n in names if n in ("grad_factor", "due", "found_inf")],
    ids=lambda value: str(value),
)
def test_one_value_may_have_any_shape(operation: str, name: str, backend: str) -> None:
    results = []
    for shape in ((), (1,), (1, 1)):
        torch.manual_seed(0)
        call, make = OPERATIONS[operation]
        arguments = make()
        for key in arguments.keys() & {"params", "grads", "slots", "locks", "importances"}:
            arguments[key] = [None if tensor is None else tensor.flatten()[0] for tensor in arguments[key]]
        arguments[name] = arguments[name].reshape(shape)
        result = call(**arguments, backend=backend)
        results.append([tensor.flatten() for tensor in [*tensors_of(arguments), *tensors_of([result])]])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    ("operation", "name"), [(o, n) for o, names in POSITIONS.items() for n in names], ids=lambda value: str(value)
)
@pytest.mark.parametrize("position", [-1, 2, 10**6])
def test_a_position_out_of_range_is_refused(operation: str, name: str, position: int, backend: str) -> None:
    arguments = OPERATIONS[operation][1]()
    arguments[name] = [*arguments[name][:-1], position]
    assert_refused(operation, arguments, backend, name)


@pytest.mark.parametrize(
    ("operation", "name"), [(o, n) for o, names in POSITIONS.items() for n in names], ids=lambda value: str(value)
)
def test_a_position_for_each_tensor(operation: str, name: str, backend: str) -> None:
    arguments = OPERATIONS[operation][1]()
    arguments[name] = arguments[name] * 2
    assert_refused(operation, arguments, backend, name)


@pytest.mark.parametrize(
    ("bins", "shift"),
    [(4095, 19), (0, 19), (1, 19), (1 << 20, 0), (4096, -1), (4096, 20), (4096, 31), (2, 31), (4, 70)],
)
def test_digits_that_no_key_has_are_refused(bins: int, shift: int, backend: str) -> None:
    assert_refused("score_histogram", {**histogram_arguments(), "bins": bins, "shift": shift}, backend, "bins")
    if bins <= 4096:
        counts = torch.zeros(1, 2, bins, dtype=torch.int64)
        assert_refused("select_digit_", {**digit_arguments(), "counts": counts, "shift": shift}, backend, "bins")


def test_a_threshold_of_nan_locks_nothing(backend: str) -> None:
    arguments = {**lock_arguments(), "thresholds": torch.tensor([torch.nan, 0.2])}
    counts = ops.lock_(**arguments, backend=backend)
    assert counts[0, 0] == 0 < counts[1, 0]
    assert not arguments["importances"][0].signbit().any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_right_arguments_are_taken(operation: str, backend: str) -> None:
    call, arguments = OPERATIONS[operation]
    call(**arguments(), backend=backend)
