"""Every operation has a reference; a backend that is named runs or raises."""

import pytest
import torch

from epi_kernels import EPIAdamW, dispatch


@pytest.mark.parametrize("operation", dispatch.STEMS)
@pytest.mark.parametrize("requested", ["auto", "reference"])
def test_reference_runs_everywhere(operation: str, requested: str) -> None:
    choice = dispatch.choose(operation, "cpu", requested)
    assert choice.run.__name__ == operation
    assert choice.backend == "reference"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="Invalid backend: 'cublas'"):
        EPIAdamW([torch.nn.Parameter(torch.ones(1))], backend="cublas", layers="tensor")


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_backend_that_is_not_there_is_never_replaced_in_silence(backend: str) -> None:
    with pytest.raises(NotImplementedError, match=f"backend='{backend}' has no masked_adamw_"):
        EPIAdamW([torch.nn.Parameter(torch.ones(1))], backend=backend, layers="tensor")
