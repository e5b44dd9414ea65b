"""What each backend says that it can run, and which one runs.

That is the fastest that can, or the one that was named, which runs or raises: there is never a quiet fallback.
"""

import importlib
import importlib.util
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import AVAILABLE
from torch.nn import Parameter

import epi_kernels
from epi_kernels import EPIAdamW, __version__
from epi_kernels.backends import cuda, native, registry, triton
from epi_kernels.backends.registry import choose
from epi_kernels.backends.support import FLOAT32, Spec, Support
from epi_kernels.backends.target import Target, target_of
from epi_kernels.ops import functional
from epi_kernels.storage import STATES, VALUES

CPU = torch.device("cpu")
FIRST_GPU = torch.device("cuda", 0)

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
    float64 = frozenset({torch.float64})
    choice = choose(Spec(operation, float64, float64), CPU, "reference")
    assert hasattr(choice.module, PREPARED.get(operation, operation))
    assert choice.backend == "reference"


@needs_native
@pytest.mark.parametrize("operation", registry.STEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_is_the_choice_of_auto_on_a_cpu(operation: str, dtype: torch.dtype) -> None:
    choice = choose(Spec(operation, frozenset({dtype})), CPU, "auto")
    assert hasattr(choice.module, PREPARED.get(operation, operation))
    assert choice.backend == "native"


@needs_native
@pytest.mark.parametrize(
    ("device_type", "values", "states", "reason"),
    [
        ("cpu", {torch.float32, torch.float64}, {torch.float32}, "takes bfloat16, float16, float32 and not float64"),
        ("cpu", {torch.bfloat16}, {torch.float16}, "its moments and importance are bfloat16, .* and not float16"),
        ("meta", {torch.float32}, {torch.float32}, "it runs on the CPU and the tensors are on meta"),
    ],
)
def test_what_native_cannot_run_raises_where_it_is_named_and_else_goes_to_the_reference(
    device_type: str, values: set[torch.dtype], states: set[torch.dtype], reason: str
) -> None:
    spec, device = Spec("importance_", frozenset(values), frozenset(states)), torch.device(device_type)
    assert choose(spec, device, "auto").backend == "reference"
    with pytest.raises(RuntimeError, match=f"backend='native' cannot run importance_ here: .*{reason}.*'reference'"):
        choose(spec, device, "native")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Forget the choices that were made, before and after a test that pretends something."""
    registry._choose.cache_clear()
    yield
    registry._choose.cache_clear()


@pytest.fixture
def no_library(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "obstacle", lambda: "it was not built; install the package again")


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
    assert lines["cpu, float32, a step"] == registry.path_of(Spec("sweep_"), CPU, "auto")
    assert lines["cpu, float64, a step"].startswith("reference, since native cannot: ")
    assert lines["native library"].startswith("loaded" if "native" in AVAILABLE else "none: ")
    assert lines["CUDA library"].startswith(("loaded, built by nvcc", "not used: "))


@pytest.fixture
def gpu(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Pretend that there is an A100 and the CUDA library; {stem: obstacle} of its kernels."""
    pytest.importorskip("triton")
    obstacles = {"threshold": ""}
    for stem in obstacles:
        module = importlib.import_module(f"epi_kernels.ops.{stem}.cuda")
        monkeypatch.setattr(module, "obstacle", lambda device, stem=stem: obstacles[stem])
    monkeypatch.setattr(cuda, "load", object)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return obstacles


@pytest.fixture
def amd(gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that there is an MI300, whose capability is above that of an H100, and that nobody was warned yet."""
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    registry._say_slow.cache_clear()
    yield
    registry._say_slow.cache_clear()


def on_gpu(operation: str) -> str:
    registry._choose.cache_clear()
    return choose(Spec(operation), FIRST_GPU, "auto").backend


def test_on_a_gpu_triton_runs_all_but_the_histogram_of_shared_memory(gpu: dict[str, str]) -> None:
    assert {operation: on_gpu(operation) for operation in registry.STEMS} == {
        **dict.fromkeys(registry.STEMS, "triton"),
        "score_histogram": "cuda",
    }


def test_a_histogram_that_disagrees_on_the_device_is_not_used(gpu: dict[str, str]) -> None:
    gpu["threshold"] = "on this GPU its counts differ"
    assert on_gpu("score_histogram") == "triton"
    registry._choose.cache_clear()
    with pytest.raises(RuntimeError, match="cannot run score_histogram here: on this GPU its counts differ"):
        choose(Spec("score_histogram"), FIRST_GPU, "cuda")


@pytest.mark.parametrize(("version", "runs"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True)])
def test_a_triton_that_flushes_subnormals_is_refused(
    version: str, runs: bool, gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    registry._choose.cache_clear()
    assert (choose(Spec("lock_"), FIRST_GPU, "auto").backend == "triton") is runs
    if not runs:
        with pytest.raises(RuntimeError, match="triton 3.5.1 divides subnormal numbers as 0; it needs triton 3.6"):
            choose(Spec("lock_"), FIRST_GPU, "triton")
    registry._choose.cache_clear()


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
        choose(Spec("lock_"), FIRST_GPU, "triton")


def test_an_older_gpu_is_named(gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"it needs compute capability 8.0 and this GPU has 7.5"):
        choose(Spec("lock_"), FIRST_GPU, "triton")


def test_each_gpu_is_judged_by_itself_and_not_by_the_current_one(
    gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the second is old; the third does not agree with the reference, which its own look at it says
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (9, 0))
    threshold = importlib.import_module("epi_kernels.ops.threshold.cuda")
    monkeypatch.setattr(threshold, "obstacle", lambda device: "its counts differ" if device.index == 2 else "")
    devices = [torch.device("cuda", i) for i in range(3)]
    assert [choose(Spec("lock_"), device, "auto").backend for device in devices] == ["triton", "reference", "triton"]
    backends = [choose(Spec("score_histogram"), device, "auto").backend for device in devices]
    assert backends == ["cuda", "reference", "triton"]
    for backend in ("triton", "cuda"):
        assert choose(Spec("score_histogram"), devices[0], backend).backend == backend
        with pytest.raises(RuntimeError, match="compute capability 8.0 and this GPU has 7.5"):
            choose(Spec("score_histogram"), devices[1], backend)
    assert registry.explain(devices[1], "auto") == "reference"
    assert registry.explain(devices[0], "auto") != "reference"


def test_the_path_of_a_step_names_the_backend_or_why_it_is_plain_torch(
    gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (9, 0))
    paths = [registry.path_of(Spec("sweep_"), torch.device("cuda", i), "auto") for i in range(2)]
    assert paths == ["triton", "reference, since triton cannot: it needs compute capability 8.0 and this GPU has 7.5"]
    assert registry.path_of(Spec("sweep_"), FIRST_GPU, "reference") == "reference, as requested"
    asked = registry.path_of(Spec("sweep_"), FIRST_GPU, "native")
    assert asked.startswith("backend='native' cannot run sweep_ here: it runs on the CPU")


@needs_native
@pytest.mark.parametrize(("level", "name"), [(1, "the compiler's baseline"), (3, "AVX2"), (4, "AVX-512")])
def test_the_path_of_a_step_names_the_instructions(level: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "simd_level", lambda: level)
    assert registry.path_of(Spec("sweep_"), CPU, "auto").startswith(f"native with {name}")


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
    cuda._error_of.cache_clear()
    try:
        for _ in range(2):
            assert cuda.obstacle(torch.device("cuda", 0)) == ""
            assert "CUDA error 209" in cuda.obstacle(torch.device("cuda", 1))
    finally:
        cuda._error_of.cache_clear()
    assert asked == [0, 1]


@pytest.mark.usefixtures("gpu")
def test_the_current_gpu_is_asked_for_again_where_a_device_has_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (9, 0))
    chosen = []
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        chosen.append(choose(Spec("lock_"), torch.device("cuda"), "auto").backend)
    assert chosen == ["triton", "reference"]


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("operation", registry.STEMS)
def test_an_amd_gpu_is_refused_with_the_reason_and_auto_takes_the_reference(operation: str) -> None:
    assert target_of(FIRST_GPU) == Target("amd")
    assert choose(Spec(operation), FIRST_GPU, "auto").backend == "reference"
    for backend in ("triton", "cuda"):
        if backend == "triton" or operation in cuda.OPERATIONS:
            with pytest.raises(RuntimeError, match="built for ROCm, and nobody has tried .*; or use .* 'reference'"):
                choose(Spec(operation), FIRST_GPU, backend)
    with pytest.raises(RuntimeError, match="it runs on the CPU and the tensors are on an AMD GPU"):
        choose(Spec(operation), FIRST_GPU, "native")


@pytest.mark.usefixtures("amd")
def test_an_amd_gpu_is_said_to_be_slow_once_for_the_process() -> None:
    with pytest.warns(UserWarning, match="no kernels for AMD GPUs yet .*backend='reference'.* is silent") as caught:
        registry.say_if_slow(FIRST_GPU)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.say_if_slow(torch.device("cuda", 1))


@pytest.mark.usefixtures("gpu")
def test_other_devices_are_not_said_to_be_slow() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in (FIRST_GPU, torch.device("mps"), torch.device("meta")):
            registry.say_if_slow(device)


def test_an_answer_is_yes_or_no_with_a_reason() -> None:
    assert Support.yes()
    assert Support.unless("") == Support.yes()
    assert not Support.no("it is Tuesday")
    assert Support.unless("it is Tuesday") == Support.no("it is Tuesday")
    for supported, reason in ((False, ""), (True, "it is Tuesday")):
        with pytest.raises(ValueError, match="only a no has a reason"):
            Support(supported, reason)
    with pytest.raises(ValueError, match="only a no has a reason"):
        Support.no("")


BFLOAT16, FLOAT16 = frozenset({torch.bfloat16}), frozenset({torch.float16})
FLOAT64 = frozenset({torch.float64})
TARGETS = {
    target.vendor + str(target.architecture): target
    for target in (
        Target("cpu"),
        Target("nvidia", (7, 5)),
        Target("nvidia", (9, 0)),
        Target("amd"),
        Target("mps"),
        Target("meta"),
    )
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("values", [FLOAT32, BFLOAT16, FLOAT64], ids=["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "states", [FLOAT32, BFLOAT16, FLOAT16], ids=["float32 states", "bfloat16 states", "float16 states"]
)
def test_each_backend_says_yes_where_it_belongs_and_else_gives_a_reason(
    monkeypatch: pytest.MonkeyPatch, target: Target, values: frozenset[torch.dtype], states: frozenset[torch.dtype]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(cuda, "load", object)
    monkeypatch.setattr(native, "obstacle", str)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    answers = {
        backend: module.supports(Spec("score_histogram", values, states), target)
        for backend, module in registry.BACKENDS.items()
    }
    fits = values <= VALUES and states <= STATES
    on_nvidia = fits and target == Target("nvidia", (9, 0))
    assert {backend: bool(answer) for backend, answer in answers.items()} == {
        "triton": on_nvidia,
        "cuda": on_nvidia and states == FLOAT32,
        "native": fits and target == Target("cpu"),
        "reference": True,
    }
    for answer in answers.values():
        assert bool(answer.reason) != bool(answer)


def test_a_backend_says_no_to_an_operation_that_it_does_not_have() -> None:
    assert cuda.supports(Spec("lock_"), Target("nvidia", (9, 0))) == Support.no("it has no lock_")


@pytest.mark.parametrize("operation", cuda.OPERATIONS)
def test_a_backend_says_no_where_its_library_is_missing(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    monkeypatch.setattr(cuda, "load", lambda: "it was not built")
    monkeypatch.setattr(native, "obstacle", lambda: "it was not built either")
    assert cuda.supports(Spec(operation), Target("nvidia", (9, 0))) == Support.no("it was not built")
    assert native.supports(Spec(operation), Target("cpu")) == Support.no("it was not built either")


@pytest.mark.usefixtures("forgotten")
def test_a_choice_is_made_again_when_triton_is_told_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    # a kernel that is imported now would stay interpreted, in other tests, too
    monkeypatch.setattr(importlib, "import_module", ModuleType)
    for interpret in ("0", "1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        if interpret == "1":
            assert choose(Spec("lock_"), CPU, "triton").backend == "triton"
            assert choose(Spec("lock_"), CPU, "auto").backend != "triton"  # which is very slow here
        else:
            with pytest.raises(RuntimeError, match="on the CPU only with TRITON_INTERPRET=1"):
                choose(Spec("lock_"), CPU, "triton")


def test_one_module_asks_torch_for_vendor_and_capability() -> None:
    asking = re.compile(r"get_device_capability|get_device_properties|version\.(hip|cuda)\b|gcnArchName")
    root = Path(epi_kernels.__file__).parent
    files = [path.relative_to(root).as_posix() for path in root.rglob("*.py") if asking.search(path.read_text())]
    assert files == ["backends/target.py"]


def test_operations_ask_for_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def noted(spec: Spec, device: torch.device, requested: str) -> registry.Choice:
        asked.append(device)
        return choose(spec, device, requested)

    monkeypatch.setattr(functional, "choose", noted)
    param = Parameter(torch.ones(4, dtype=torch.float32, device="cpu"))
    param.grad = torch.ones_like(param)
    optimizer = EPIAdamW([param], layers="tensor", isolation_ratio=0.5, mask_interval=1)
    for _ in range(2):
        optimizer.step()
    assert len(asked) >= 4
    assert set(asked) == {param.device}
