"""What every test gets: a fixed seed, and the float arithmetic that torch has by default; and the backends to try."""

import pytest
import torch

from epi_kernels import dispatch


def available(backend: str) -> bool:
    """Return whether a backend runs every operation on the CPU here."""
    try:
        for operation in dispatch.STEMS:
            dispatch.choose(operation, "cpu", backend)
    except (NotImplementedError, RuntimeError):
        return False
    return True


AVAILABLE = [backend for backend in dispatch.BACKENDS if available(backend)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=AVAILABLE, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def skip_unless_it_takes(backend: str, dtype: torch.dtype) -> None:
    """Skip a test where `backend` refuses parameters of `dtype`; test_dispatch sees to it that it refuses them."""
    try:
        dispatch.explain(torch.device("cpu"), backend, dtype)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
