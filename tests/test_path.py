"""What an optimizer prints of the path that its steps take: backend, instructions or reason, and alignment."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from epi_kernels import EPIAdamW, EPILion, MaskedAdamW, SparseAdamW
from epi_kernels.backends import registry
from epi_kernels.backends.support import Spec
from epi_kernels.optim import release_gradients

CPU = torch.device("cpu")


def made(kind: type, params: list[tuple[str, Parameter]], **settings: Any) -> Any:
    masks = {name: torch.zeros(p.shape, dtype=torch.bool).index_fill_(0, torch.tensor([0]), True) for name, p in params}
    needs = {MaskedAdamW: {"frozen": masks}, SparseAdamW: {"trainable": masks}}
    return kind(params, **needs.get(kind, {}), **settings)


def path(optimizer: Any) -> str:
    """Return what an optimizer prints of its steps."""
    (line,) = (line for line in repr(optimizer).splitlines() if line.startswith("Step: "))
    return line.removeprefix("Step: ")


def pair() -> list[tuple[str, Parameter]]:
    """Return a parameter of 9 entries whose address is no multiple of 16 bytes, and an aligned one of 991."""
    return [("small", Parameter(torch.randn(10)[1:])), ("large", Parameter(torch.randn(991)))]


@pytest.mark.parametrize("kind", [EPIAdamW, EPILion, MaskedAdamW, SparseAdamW])
def test_every_class_prints_the_path_of_its_steps_after_what_torch_prints(kind: type, backend: str) -> None:
    optimizer = made(kind, pair(), backend=backend)
    kept = torch.optim.Optimizer.__repr__(optimizer)
    assert repr(optimizer).startswith(f"{kept}\nStep: float32 on cpu: {backend}")
    operation = "gather_" if kind is SparseAdamW else "sweep_"
    assert path(optimizer) == f"float32 on cpu: {registry.path_of(Spec(operation), CPU, backend)}"


@pytest.mark.parametrize("kind", [EPIAdamW, EPILion, MaskedAdamW])
def test_after_a_step_unaligned_entries_are_printed_where_they_are_slower(kind: type, backend: str) -> None:
    params = pair()
    optimizer = made(kind, params, backend=backend)
    before = path(optimizer)
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    slower = "; 9 of 1,000 entries unaligned: they take the slower path"
    assert path(optimizer) == before + (slower if backend == "triton" else "")
    params[1][1].grad = torch.ones(992)[1:]  # the addresses of this step count
    optimizer.step()
    assert path(optimizer) == before + (slower.replace("9 of", "1,000 of") if backend == "triton" else "")


def test_aligned_parameters_are_printed_as_such(backend: str) -> None:
    weight = Parameter(torch.randn(1234))
    weight.grad = torch.ones_like(weight)
    optimizer = EPIAdamW([("weight", weight)], backend=backend)
    optimizer.step()
    assert path(optimizer).endswith("; all 1,234 entries aligned") is (backend == "triton")


def test_released_parameters_are_counted_together(backend: str) -> None:
    model = torch.nn.Module()
    for name, p in pair():
        model.register_parameter(name, p)
    optimizer = EPIAdamW(model.named_parameters(), backend=backend, isolation_ratio=0.0)
    released = release_gradients(model, optimizer)
    (model.small.sum() + model.large.sum()).backward()
    optimizer.step()
    assert ("; 9 of 1,000 entries unaligned" in path(optimizer)) is (backend == "triton")
    released.remove()
    model.large.grad = torch.ones_like(model.large)
    optimizer.step()
    assert ("; all 991 entries aligned" in path(optimizer)) is (backend == "triton")


def test_the_path_depends_on_the_dtypes_of_parameters_and_moments() -> None:
    params = [Parameter(torch.randn(3, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.complex64)]
    optimizer = EPIAdamW(params, layers="tensor")
    single = registry.path_of(Spec("sweep_"), CPU, "auto")
    double = frozenset({torch.float64})
    assert path(optimizer) == (
        f"float32 on cpu: {single}; float64 on cpu: {registry.path_of(Spec('sweep_', double, double), CPU, 'auto')}"
    )
    assert "since native cannot: it takes bfloat16, float16, float32 and not float64" in path(optimizer)
    optimizer.state[params[0]] = {"exp_avg": torch.zeros(3, dtype=torch.float16)}
    assert "float32 on cpu: reference, since native cannot: its moments and importance are" in path(optimizer)
    assert params[1] not in optimizer.state  # printing makes no state


def test_a_differentiable_step_is_plain_torch() -> None:
    optimizer = MaskedAdamW([("w", Parameter(torch.ones(2)))], frozen={"w": torch.ones(2) > 0}, differentiable=True)
    assert path(optimizer) == "plain torch, as differentiable=True asks for"
