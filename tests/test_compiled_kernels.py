"""The kernels as Triton compiles them for A100 and H100, run by the interpreter of PTX.

- Every kernel equals the reference bit for bit and has no race, no misaligned access and none out of bounds: every rule
  and lock, full and ragged tiles, views off their alignment, special values, compact storages.
- So do whole runs of the optimizers, with refreshes. The full tiles of aligned tensors are read and written 4 entries
  at a time, which are 128 bits of float32, wherever the lock is.
- Where nothing is due, programs that begin beyond 2^31 entries do nothing. Gradients that are not finite are counted
  where there is an entry.

`make ptx` runs far more.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from agreement import SPECIAL, assert_steps_agree, gradient, step_lists
from torch import Tensor, nn

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("an interpreted kernel is not compiled", allow_module_level=True)

import test_backends_agree as agree  # noqa: E402
import test_ends_of_tensors as ends  # noqa: E402
import test_gather as gather  # noqa: E402
import test_large_offsets as large  # noqa: E402
import test_storages_agree_triton as compact  # noqa: E402
from ptx_device import Device, Launch, interpreted  # noqa: E402
from storing import STORAGES, optimizer_of, same_bits, snapshot  # noqa: E402

from epi_kernels.ops import tiles  # noqa: E402
from epi_kernels.ops.importance.triton import gradient_sums_kernel, importance_kernel  # noqa: E402
from epi_kernels.ops.slots import constants_of  # noqa: E402
from epi_kernels.ops.sweep.triton import sweep_kernel  # noqa: E402
from epi_kernels.ops.threshold.triton import COPIES, lock_kernel, score_histogram_kernel  # noqa: E402
from epi_kernels.rules import ADAMW, LION  # noqa: E402
from epi_kernels.schema import IMPORTANCE, LOCK_IN, SCORE, SUMS, SWEEP  # noqa: E402

BF16, FP16, FP32, BLOCKS = torch.bfloat16, torch.float16, torch.float32, torch.uint8


ARCHITECTURES = ("sm_80", "sm_90")


def alternating(cases: list[Any]) -> list[Any]:
    """Return cases with an architecture before each, one and the other in turn: all with both take twice the time."""
    return [(ARCHITECTURES[i % 2], *case) for i, case in enumerate(cases)]


@pytest.fixture(params=ARCHITECTURES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with interpreted(request.param) as device:
        yield device


# the operations ------------------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype) -> list[Tensor]:
    """Return two full chunks and a ragged one, tensors off their alignment, strided, tiny and empty, special values."""
    special = torch.cartesian_prod(SPECIAL, SPECIAL)[:, 0]
    found = [
        torch.randn(2 * tiles.CHUNK + 3),
        torch.randn(tiles.CHUNK + 1)[1:],
        torch.randn(601)[1:],
        torch.randn(30, 20).t(),
    ]
    return [tensor.to(dtype) for tensor in (*found, torch.randn(7), torch.randn(0), special)]


def gradients(params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return gradients; those of special parameters are special too, in all pairs."""
    found = [gradient(tuple(param.shape), dtype) for param in params]
    return [*found[:-1], torch.cartesian_prod(SPECIAL, SPECIAL)[:, 1].to(dtype)]


@pytest.mark.parametrize(
    ("device", "lock_in", "amsgrad", "param", "grad", "changes"),
    alternating(
        [
            ("none", False, FP32, FP32, {}),
            ("none", True, FP16, BF16, {}),
            ("importance", False, FP32, FP32, {}),
            ("importance", True, FP32, BF16, {"grad_factor": torch.tensor(0.3), "found_inf": torch.tensor(0.0)}),
            ("importance", False, BF16, BF16, {"advanced": True}),
            ("exp_avg_sq", False, FP32, FP32, {}),
            ("exp_avg_sq", True, BF16, FP16, {"grad_factor": torch.tensor(0.3)}),
            ("static", False, FP32, FP32, {}),
            ("static", True, BF16, FP32, {}),
        ]
    ),
    indirect=["device"],
)
def test_adamw(
    device: Device, lock_in: str, amsgrad: bool, param: torch.dtype, grad: torch.dtype, changes: dict[str, Any]
) -> None:
    params = parameters(param)
    assert_steps_agree("triton", step_lists(params, gradients(params, grad), lock_in, amsgrad), lock_in, changes)


@pytest.mark.parametrize(
    ("device", "lock_in", "changes"),
    alternating(
        [
            ("none", {"param": FP16, "stochastic": True}),
            ("importance", {}),
            ("static", {"param": BF16, "grad": BF16}),
        ]
    ),
    indirect=["device"],
)
def test_lion(device: Device, lock_in: str, changes: dict[str, Any]) -> None:
    compact.assert_steps_agree("triton", LION, lock_in, slots=(FP32,), special=True, **changes)


@pytest.mark.parametrize(
    ("device", "rule", "lock_in", "state", "changes"),
    alternating(
        [
            (ADAMW, "importance", BF16, {"advanced": torch.tensor(0.0), "lockable": (True, False, True, True)}),
            (ADAMW, "importance", BLOCKS, {"param": BF16, "grad": BF16, "rest": torch.int8, "stochastic": True}),
            (ADAMW, "exp_avg_sq", BLOCKS, {"param": BF16, "rest": torch.int8, "strided": True}),
            (ADAMW, "exp_avg_sq", BF16, {"param": BF16, "stochastic": True, "advanced": torch.tensor(1.0)}),
            (ADAMW, "static", BF16, {"param": BF16, "rest": torch.int16}),
            (LION, "importance", BLOCKS, {"param": BF16, "rest": torch.int8, "stochastic": True}),
        ]
    ),
    indirect=["device"],
)
def test_compact_storages(device: Device, rule: Any, lock_in: str, state: torch.dtype, changes: dict[str, Any]) -> None:
    compact.assert_steps_agree("triton", rule, lock_in, slots=(state, state), lock_dtype=state, special=True, **changes)


def test_selected_entries(device: Device) -> None:
    gather.test_selected_entries_step_as_a_dense_step_and_the_others_stay("triton", FP32, torch.int32)
    compact.test_selected_entries("triton", ADAMW, BF16, torch.int8, True, BF16, (1 << 32) - 300, 0)
    compact.test_selected_entries("triton", LION, FP16, None, True, FP32, 5, 1 << 33)


def test_importance_and_sums(device: Device) -> None:
    compact.test_importance("triton", True, None, FP32)
    compact.test_importance("triton", False, 1.0, BF16)
    agree.test_importance_and_ranges("triton", FP16, True)
    agree.test_gradient_sums("triton", BF16)


def test_thresholds_and_locks(device: Device) -> None:
    for normalize in (True, False):
        compact.test_histogram_and_lock("triton", normalize)
    agree.test_histograms("triton", True, 9, 1024)
    agree.test_histograms("triton", True, 0, 512)
    agree.test_the_digit_that_has_a_rank("triton", 3)
    agree.test_locks_and_counts("triton", True)


# the ends of tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_under_a_factor_that_is_not_finite_the_entries_are_counted_and_no_more(device: Device, factor: float) -> None:
    for lock_in in ("importance", "exp_avg_sq"):
        ends.test_a_step_counts_entries_that_are_there(factor, lock_in, "triton")
    ends.test_importance_counts_entries_that_are_there(factor, "triton")


def launch_not_due(kernel: Any, words: tuple[str, ...], names: tuple[str, ...], *more: Any, **constants: Any) -> None:
    """Launch a program that begins a chunk before 2^32 entries; it may access its tables and `more`, nothing else.

    The tensor has no entries, or the kernel is told that nothing is due.
    """
    for aligned in (1, 0):
        tensors = {name: torch.ones(tiles.CHUNK) for name in names}
        rows, chunks = large.far(words, tensors, aligned, empty="due" not in constants)
        given = {"BLOCK": tiles.BLOCK, "TILES": tiles.TILES, **constants}
        if "due" in constants:
            given["CHUNKS"] = 1
        tiles.launch(kernel, 1, torch.device("cpu"), rows, chunks, *more, **given)


def test_what_is_not_due_does_nothing_beyond_2_31_entries(device: Device) -> None:
    count, due = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    launch_not_due(
        *(sweep_kernel, SWEEP.words, ("param", "grad", "slots[0]", "slots[1]", "lock")),
        *(torch.tensor([large.ROW]), count, None, None, None),
        **large.step_constants(),
        **constants_of(ADAMW, False),
    )
    ranges = torch.tensor([[math.inf, -math.inf]]).view(torch.int32)
    launch_not_due(
        *(importance_kernel, IMPORTANCE.words, ("importance", "grad")),
        *(torch.tensor([[0.5, 1.0]]), ranges, count, None),
        KEEP_FINITE=True,
        due=due,
    )
    launch_not_due(gradient_sums_kernel, SUMS.words, ("sum", "square_sum", "grad"))
    counts = torch.zeros(COPIES, 1, 4096, dtype=torch.int64)
    launch_not_due(
        *(score_histogram_kernel, SCORE.words, ("importance",)),
        *(None, torch.tensor([[0, 1]]), counts, 1),
        **{"COPIES": COPIES, "SHIFT": 19, "DIGIT_BITS": 12},
        due=due,
    )
    locked = torch.zeros(1, 3, dtype=torch.int64)
    launch_not_due(lock_kernel, SCORE.words, ("importance",), None, torch.tensor([0.5]), locked, due=due)
    assert len(device.launches) == 10
    assert not any(tensor.any() for tensor in (count, counts, locked))
    assert ranges.view(torch.float32).tolist() == [[math.inf, -math.inf]]


# whole optimizers ----------------------------------------------------------------------------------------------------


SETTINGS = {"float32": {}, "without isolation": {"isolation_ratio": 0.0}, **STORAGES}


class Two(nn.Module):
    """A parameter of full tiles, and one that lies off its alignment and is not whole blocks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.full = nn.Parameter(torch.randn(tiles.CHUNK // 128, 128).to(dtype))
        self.off = nn.Parameter(torch.randn(66 * 70 + 1).to(dtype)[1:].view(66, 70))


def run(kind: str, dtype: torch.dtype, backend: str, settings: str) -> list[Any]:
    """Return all that a model and its optimizer hold after two steps; the second one refreshes."""
    torch.manual_seed(0)
    model = Two(dtype)
    optimizer = optimizer_of(kind, model, backend=backend, **SETTINGS[settings])
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn(param.shape).to(dtype)
        optimizer.step()
    return snapshot(optimizer)


def assert_equal(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        if isinstance(one, Tensor):
            assert same_bits(one, other)
        elif "lr" not in one:
            assert one.keys() == other.keys()
            for name in one:
                assert same_bits(one[name], other[name]), name


def assert_widest(launch: Launch, *words: str) -> None:
    """Check that the first tensor's entries are moved 4 at a time, and scales one by one; `words` must be there."""
    first = {name: bits for name, bits in launch.entries.items() if name.endswith(" of tensor 0")}
    assert {f"{word} of tensor 0" for word in words} <= first.keys()
    for name, bits in first.items():
        expected = {32 if "scales" in name else 4 * bits}
        for access, widths in launch.widths[name].items():
            assert widths == expected, (launch.kernel, name, access)


OF_FLOAT32 = [
    ("ema", "none", FP32, "without isolation"),
    ("ema", "importance", FP32, "float32"),
    ("exp_avg_sq", "slot", FP32, "float32"),
    ("masked", "static", FP32, "float32"),
]
# for one architecture: they take long
COMPACT = [
    ("lion", "importance", BF16, "bfloat16"),
    ("ema", "importance", BF16, "24 bits, stochastic"),
    ("exp_avg_sq", "slot", BF16, "24 bits, stochastic"),
]


@pytest.mark.parametrize(
    ("device", "kind", "lock_in", "dtype", "settings"),
    [("sm_80", *case) for case in OF_FLOAT32] + [("sm_90", *case) for case in OF_FLOAT32 + COMPACT],
    indirect=["device"],
)
def test_full_tiles_are_moved_as_widely_as_their_entries_are(
    device: Device, kind: str, lock_in: str, dtype: torch.dtype, settings: str
) -> None:
    assert_equal(run(kind, dtype, "triton", settings), run(kind, dtype, "reference", settings))
    sweeps = [launch for launch in device.launches if launch.kernel == "sweep_kernel"]
    assert len(sweeps) == 2
    assert {LOCK_IN[launch.constants["LOCK_IN"]] for launch in sweeps} == {lock_in}
    for launch in sweeps:
        assert_widest(launch, "param", "grad", "slots[0]", *(["lock"] if lock_in in ("importance", "static") else []))
    refreshes = [launch for launch in device.launches if launch.kernel in ("importance_kernel", "lock_kernel")]
    assert len(refreshes) == (0 if lock_in in ("none", "static") else 2)
    for launch in refreshes:
        assert_widest(launch, "importance")


def test_selected_entries_of_an_optimizer(device: Device) -> None:
    for settings in ("float32", "24 bits, stochastic"):
        assert_equal(*(run("sparse", BF16, backend, settings) for backend in ("triton", "reference")))
    assert [launch.kernel for launch in device.launches] == ["gather_kernel"] * 4
