"""Every operation of `epi_kernels.ops` on every backend, against the plain torch that defines it, of the same round."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SECTOR, SELECTED, TENSORS
from measure import DEVICES

from epi_kernels import ops
from epi_kernels.backends import registry
from epi_kernels.backends.support import Spec
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.rules import ADAMW

ENTRIES = {"1M": 1 << 20, "16M": 1 << 24}


class Inputs:
    """Tensors of 16 layers, and what the operations take beside them."""

    def __init__(self, entries: int, device: str) -> None:
        torch.manual_seed(0)
        shape, self.layers = (entries // TENSORS,), list(range(TENSORS))

        def made(scale: float) -> list[torch.Tensor]:
            return [torch.randn(shape, device=device) * scale for _ in range(TENSORS)]

        self.params, self.grads = made(1.0), made(1e-3)
        self.moments, self.squares = made(1e-3), [torch.rand(shape, device=device) * 1e-6 for _ in range(TENSORS)]
        self.importances = [torch.rand(shape, device=device) * 1e-6 for _ in range(TENSORS)]
        self.ranges = torch.tensor([[0.0, 1e-6]] * TENSORS, device=device)
        self.nonfinite = torch.zeros(TENSORS, dtype=torch.int64, device=device)
        self.betas = torch.tensor([(0.99, 0.01)] * TENSORS, dtype=torch.float64)
        self.selection = torch.tensor([[0, entries // 100]], device=device)
        self.thresholds = torch.tensor([0.99], device=device)
        group = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False}
        row = scalars_of(ADAMW, {**group, "importance_beta": 0.99}, 10)
        self.scalars = torch.tensor([row], dtype=torch.float64, device=device)
        self.indices = [
            torch.arange(0, shape[0], round(1 / SELECTED), dtype=torch.int32, device=device) for _ in range(TENSORS)
        ]
        self.few = [[torch.zeros(len(of), device=device) for of in self.indices] for _ in range(2)]
        self.counts = self.histogram("auto")

    def importance(self, backend: str) -> object:
        """Advance the importances; ranges are reset by nobody, which changes no time."""
        betas, layers = self.betas, self.layers
        return ops.importance_(
            self.importances, self.grads, self.ranges, self.nonfinite, betas, layers, True, None, None, backend
        )

    def histogram(self, backend: str) -> torch.Tensor:
        """Count by the first digit, which every entry has."""
        budgets = [0] * TENSORS
        return ops.score_histogram(
            self.importances, self.layers, self.ranges, budgets, self.selection, 19, 4096, None, backend
        )

    def select(self, backend: str) -> object:
        """Find the first digit."""
        return ops.select_digit_(self.counts, self.selection.clone(), 19, backend)

    def lock(self, backend: str) -> object:
        """Lock the entries above a threshold."""
        budgets = [0] * TENSORS
        return ops.lock_(self.importances, self.layers, self.ranges, budgets, self.thresholds, None, backend)

    def sums(self, backend: str) -> object:
        """Add gradients and their squares."""
        return ops.gradient_sums_(self.moments, self.squares, self.grads, backend)

    def sweep(self, backend: str) -> object:
        """Take a step of EPI's AdamW."""
        rows, lockable = [0] * TENSORS, [True] * TENSORS
        return ops.sweep_(
            "adamw", self.params, self.grads, [*self.moments, *self.squares], self.importances, self.nonfinite,
            self.scalars, rows, "importance", lockable, False, None, None, backend,
        )  # fmt: skip

    def gather(self, backend: str) -> object:
        """Take a step of PIECE's AdamW."""
        slots = [*self.few[0], *self.few[1]]
        return ops.gather_("adamw", self.params, self.grads, self.indices, slots, self.scalars, [0] * TENSORS, backend)


# operation -> the method, its name in the registry, and the bytes that it moves for each entry
OPERATIONS: dict[str, tuple[Callable[[Inputs, str], object], str, float | None]] = {
    "sweep_": (Inputs.sweep, "sweep_", 36),
    "importance_": (Inputs.importance, "importance_", 12),
    "score_histogram": (Inputs.histogram, "score_histogram", 4),
    "select_digit_": (Inputs.select, "select_digit_", None),
    "lock_": (Inputs.lock, "lock_", 8),
    "gradient_sums_": (Inputs.sums, "gradient_sums_", 20),
    "gather_": (Inputs.gather, "gather_", SELECTED * (3 * SECTOR["cpu"] + 2 * 8 + 4)),
}


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest) -> Inputs:
    entries, device = request.param
    return Inputs(ENTRIES[entries], device)


PLACES = [(entries, device) for device in DEVICES for entries in ENTRIES]


@pytest.mark.parametrize("inputs", PLACES, ids=[" on ".join(place) for place in PLACES], indirect=True)
@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(
    operation: str, backend: str, inputs: Inputs, benchmark: Any, interleaved: Callable[..., None]
) -> None:
    run, name, size = OPERATIONS[operation]
    device = inputs.params[0].device
    try:
        registry.choose(Spec(name), device, backend)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(str(error))
    entries = TENSORS * inputs.params[0].numel()
    benchmark.group = f"{operation}, {entries:,} entries, {device.type}"
    interleaved(lambda: run(inputs, backend), lambda: run(inputs, "reference"), device.type, entries, size)
