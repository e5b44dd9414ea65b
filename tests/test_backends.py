"""Which backend runs: the fastest that can, or the one that was named, which runs or raises; never a quiet fallback."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from conftest import AVAILABLE
from torch.nn import Parameter

from epi_kernels import EPIAdamW, __version__
from epi_kernels.backends import cuda, native, registry
from epi_kernels.ops import functional

# the classes of the operations whose tables are kept
PREPARED = {
    "sweep_": "Sweep",
    "gather_": "Gather",
    "importance_": "Importance",
    "score_histogram": "Histogram",
    "lock_": "Lock",
}

needs_native = pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle() or "it is built")


@pytest.mark.parametrize("operation", registry.STEMS)
def test_reference_runs_everywhere(operation: str) -> None:
    choice = registry.choose(operation, "cpu", "reference", frozenset({torch.float64}), frozenset({torch.float64}))
    assert hasattr(choice.module, PREPARED.get(operation, operation))
    assert choice.backend == "reference"


@needs_native
@pytest.mark.parametrize("operation", registry.STEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_is_the_choice_of_auto_on_a_cpu(operation: str, dtype: torch.dtype) -> None:
    choice = registry.choose(operation, "cpu", "auto", frozenset({dtype}))
    assert hasattr(choice.module, PREPARED.get(operation, operation))
    assert choice.backend == "native"


@needs_native
@pytest.mark.parametrize(
    ("device_type", "values", "states", "reason"),
    [
        ("cpu", {torch.float32, torch.float64}, {torch.float32}, "takes bfloat16, float16, float32 and not float64"),
        ("cpu", {torch.bfloat16}, {torch.bfloat16}, "its moments and importance are float32 and not bfloat16"),
        ("meta", {torch.float32}, {torch.float32}, "it runs on the CPU and the tensors are on meta"),
    ],
)
def test_what_native_cannot_run_raises_where_it_is_named_and_else_goes_to_the_reference(
    device_type: str, values: set[torch.dtype], states: set[torch.dtype], reason: str
) -> None:
    where = (device_type, frozenset(values), frozenset(states))
    assert registry.choose("importance_", where[0], "auto", *where[1:]).backend == "reference"
    with pytest.raises(RuntimeError, match=f"backend='native' cannot run importance_ here: .*{reason}.*'reference'"):
        registry.choose("importance_", where[0], "native", *where[1:])


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.choose.cache_clear()
    monkeypatch.setattr(native, "obstacle", lambda: "it was not built; install the package again")
    yield
    registry.choose.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_auto_runs_on_the_reference_and_native_says_what_to_do() -> None:
    optimizer = EPIAdamW([Parameter(torch.ones(1))], layers="tensor")
    assert "backend reference on cpu" in repr(optimizer)
    with pytest.raises(RuntimeError, match="it was not built; install the package again"):
        EPIAdamW([Parameter(torch.ones(1))], backend="native", layers="tensor")


@needs_native
def test_an_optimizer_refuses_a_parameter_that_its_backend_cannot_step() -> None:
    params = [Parameter(torch.ones(1)), Parameter(torch.ones(1, dtype=torch.float64))]
    with pytest.raises(RuntimeError, match="and not float64"):
        EPIAdamW(params, backend="native", layers="tensor")
    assert "backend native on cpu; reference on cpu" in repr(EPIAdamW(params, layers="tensor"))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="Invalid backend: 'cublas'"):
        EPIAdamW([Parameter(torch.ones(1))], backend="cublas", layers="tensor")


def test_a_backend_that_is_not_there_is_never_replaced_in_silence() -> None:
    with pytest.raises(NotImplementedError, match="backend='cuda' has no sweep_, importance_, .*; use backend='auto'"):
        EPIAdamW([Parameter(torch.ones(1))], backend="cuda", layers="tensor")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run sweep_ here: .*TRITON_INTERPRET=1"):
        EPIAdamW([Parameter(torch.ones(1))], backend="triton", layers="tensor")


def test_the_command_line_says_what_runs_here() -> None:
    run = subprocess.run([sys.executable, "-m", "epi_kernels"], check=True, capture_output=True, text=True)
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in run.stdout.splitlines())
    assert lines["epi_kernels"] == __version__
    assert lines["cpu, float32"] == registry.explain(torch.device("cpu"), "auto")
    assert lines["cpu, float64"] == "reference"
    assert lines["native library"].startswith("loaded" if "native" in AVAILABLE else "none: ")
    assert lines["CUDA library"].startswith(("loaded, built by nvcc", "not used: "))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Pretend that there is an A100; {stem: obstacle} of its CUDA kernels."""
    pytest.importorskip("triton")
    obstacles = {"threshold": ""}
    for stem in obstacles:
        module = importlib.import_module(f"epi_kernels.ops.{stem}.cuda")
        monkeypatch.setattr(module, "obstacle", lambda device, stem=stem: obstacles[stem])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    registry.choose.cache_clear()
    yield obstacles
    registry.choose.cache_clear()


def on_gpu(operation: str) -> str:
    registry.choose.cache_clear()
    return registry.choose(operation, "cuda", "auto").backend


def test_on_a_gpu_triton_runs_all_but_the_histogram_of_shared_memory(gpu: dict[str, str]) -> None:
    assert {operation: on_gpu(operation) for operation in registry.STEMS} == {
        **dict.fromkeys(registry.STEMS, "triton"),
        "score_histogram": "cuda",
    }


def test_a_histogram_that_disagrees_on_the_device_is_not_used(gpu: dict[str, str]) -> None:
    gpu["threshold"] = "on this GPU its counts differ"
    assert on_gpu("score_histogram") == "triton"
    registry.choose.cache_clear()
    with pytest.raises(RuntimeError, match="cannot run score_histogram here: on this GPU its counts differ"):
        registry.choose("score_histogram", "cuda", "cuda")


def test_without_triton_cuda_counts_and_the_reference_does_the_rest(
    gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    assert {operation: on_gpu(operation) for operation in registry.STEMS} == {
        **dict.fromkeys(registry.STEMS, "reference"),
        "score_histogram": "cuda",
    }
    with pytest.raises(RuntimeError, match="triton is not installed; pip install triton"):
        registry.choose("lock_", "cuda", "triton")


def test_an_older_gpu_is_named(gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"it needs compute capability 8.0 and this GPU has 7.5"):
        registry.choose("lock_", "cuda", "triton")


def test_each_gpu_is_judged_by_itself_and_not_by_the_current_one(
    gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the second is old; the third does not agree with the reference, which its own look at it says
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (9, 0))
    threshold = importlib.import_module("epi_kernels.ops.threshold.cuda")
    monkeypatch.setattr(threshold, "obstacle", lambda device: "its counts differ" if device.index == 2 else "")
    devices = [torch.device("cuda", i) for i in range(3)]
    assert [registry.choose("lock_", device, "auto").backend for device in devices] == ["triton", "reference", "triton"]
    backends = [registry.choose("score_histogram", device, "auto").backend for device in devices]
    assert backends == ["cuda", "reference", "triton"]
    for backend in ("triton", "cuda"):
        assert registry.choose("score_histogram", devices[0], backend).backend == backend
        with pytest.raises(RuntimeError, match="compute capability 8.0 and this GPU has 7.5"):
            registry.choose("score_histogram", devices[1], backend)
    assert registry.explain(devices[1], "auto") == "reference"
    assert registry.explain(devices[0], "auto") != "reference"


def test_the_cuda_library_asks_each_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    current = [0]

    class On:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Library:
        def epi_cuda_device_error(self) -> int:
            asked.append(current[-1])
            return 209 if current[-1] == 1 else 0

    monkeypatch.setattr(cuda, "load", Library)
    monkeypatch.setattr(torch.cuda, "device", On)
    cuda.obstacle.cache_clear()
    try:
        for _ in range(2):
            assert cuda.obstacle(torch.device("cuda", 0)) == ""
            assert "CUDA error 209" in cuda.obstacle(torch.device("cuda", 1))
    finally:
        cuda.obstacle.cache_clear()
    assert asked == [0, 1]


@pytest.mark.parametrize("operation", registry.STEMS)
def test_a_torch_for_rocm_is_refused_with_the_reason_and_auto_takes_the_reference(
    gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))  # of an MI300
    assert registry.choose(operation, torch.device("cuda", 0), "auto").backend == "reference"
    for backend in ("triton", "cuda"):
        if backend == "triton" or operation == "score_histogram":
            with pytest.raises(RuntimeError, match="this torch is built for ROCm 6.4.1; or use backend='auto'"):
                registry.choose(operation, torch.device("cuda", 0), backend)


def test_operations_ask_for_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    choose = registry.choose

    def noted(operation: str, device: torch.device | str, *arguments: object, **others: object) -> registry.Choice:
        asked.append(device)
        return choose(operation, device, *arguments, **others)

    monkeypatch.setattr(functional, "choose", noted)
    param = Parameter(torch.ones(4, dtype=torch.float32, device="cpu"))
    param.grad = torch.ones_like(param)
    optimizer = EPIAdamW([param], layers="tensor", isolation_ratio=0.5, mask_interval=1)
    for _ in range(2):
        optimizer.step()
    assert len(asked) >= 4
    assert set(asked) == {param.device}
