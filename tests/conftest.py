"""What every test gets: a fixed seed, the float arithmetic that torch has by default, and the backends to try.

With TRITON_INTERPRET=1 only what tries backends is run, and the only backend is Triton's, interpreted. So with
EPI_KERNELS_PTX=sm_90, where the kernels are compiled for that architecture and the interpreter of PTX runs them.
"""

import os
from pathlib import Path

import hypothesis
import interpreter
import pytest
import rehearsal
import torch

from epi_kernels.backends import registry
from epi_kernels.backends.support import Spec


def available(backend: str) -> bool:
    """Return whether a backend runs every operation on the CPU here."""
    try:
        for operation in registry.STEMS:
            registry.choose(Spec(operation), torch.device("cpu"), backend)
    except (NotImplementedError, RuntimeError):
        return False
    return True


# scripts of processes that tests start, what cannot be imported without triton, and the tests of `make integrations`,
# which names their folder and so has them all the same
collect_ignore = [
    "ptx_device.py",
    "ambient.py",
    "deepspeed_ranks.py",
    "forked.py",
    "integrations",
    "ranks.py",
    "resume.py",
    "sharding.py",
    "storing.py",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ARCHITECTURE = os.environ.get("EPI_KERNELS_PTX")
if ARCHITECTURE:
    import ptx_device

    DEVICE = ptx_device.interpreted(ARCHITECTURE)
    DEVICE.__enter__()
TRITON_ALONE = INTERPRETED or ARCHITECTURE is not None
if TRITON_ALONE:  # what is not chosen below need not be imported either
    collect_ignore += [
        path.name for path in Path(__file__).parent.glob("test_*.py") if "backend" not in path.read_text()
    ]
AVAILABLE = ["triton"] if TRITON_ALONE else [backend for backend in registry.BACKENDS if available(backend)]


def tries_triton(item: pytest.Item) -> bool:
    """Return whether a test has a `backend` that is Triton's here; some files give it as a pair with a SIMD level."""
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return "triton" in (backend if isinstance(backend, tuple) else (backend,))


def is_rehearsed(item: pytest.Item) -> bool:
    """Return whether a test needs a GPU and the CPU stands in for one."""
    return not rehearsal.ON_GPU and item.get_closest_marker("gpu") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if rehearsal.ON_GPU and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU here"))
    if TRITON_ALONE:
        chosen = [item for item in items if tries_triton(item) or is_rehearsed(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


# an example that takes long on a busy machine has not failed
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
if INTERPRETED:
    interpreter.round_as_hardware()
    interpreter.patch_once()
if TRITON_ALONE:
    hypothesis.settings.register_profile("interpreted", deadline=None, max_examples=30)
    hypothesis.settings.load_profile("interpreted")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=AVAILABLE, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def skip_unless_it_takes(backend: str, dtype: torch.dtype) -> None:
    """Skip a test where `backend` refuses parameters of `dtype`; test_backends sees to it that it refuses them."""
    try:
        registry.explain(torch.device("cpu"), backend, dtype)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
