"""EPIAdamW does Algorithm 1 of the paper.

- Masks equal an independent float64 computation (`oracle`) entry for entry, over settings, shapes and gradient scales.
- Parameters agree with it to RUN_OF_12; a run without isolation does not (negative control).
- A protected entry is bit-identical across every step in which it is protected.
- `importance="exp_avg_sq"` gives the masks of `importance="ema"` with importance_beta = betas[1], to the bit.
"""

from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch
from tolerances import RUN_OF_12
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW
from epi_kernels.isolation.layers import block

# shape, size of the gradients: every kind of tensor, and scales over nine decades
SHAPES: dict[str, tuple[tuple[int, ...], float]] = {
    "embed.weight": ((40, 6), 1e-6),
    "blocks.0.scale": ((), 1e-5),
    "blocks.0.weight": ((4099,), 1e-3),
    "blocks.0.bias": ((1,), 1e-1),
    "blocks.1.weight": ((3, 5, 7), 1e2),
    "blocks.1.nothing": ((0, 4), 1.0),
    "head.weight": ((11, 13), 1e3),
}

SETTINGS = {
    "paper": {"isolation_ratio": 0.01, "importance_beta": 0.99, "mask_interval": 4},
    "every step": {"isolation_ratio": 0.1, "importance_beta": 0.9, "mask_interval": 1},
    "no EMA": {"isolation_ratio": 0.05, "importance_beta": 0.0, "mask_interval": 2},
    "raw": {"isolation_ratio": 0.05, "importance_beta": 0.9, "mask_interval": 3, "normalize": "none"},
    "per layer": {"isolation_ratio": 0.2, "importance_beta": 0.9, "mask_interval": 2, "scope": "layer"},
    "tensor": {"isolation_ratio": 0.1, "importance_beta": 0.99, "mask_interval": 2, "layers": "tensor"},
    "per tensor": {
        "isolation_ratio": 0.3,
        "importance_beta": 0.9,
        "mask_interval": 5,
        "layers": "tensor",
        "scope": "layer",
    },
    "nearly all": {"isolation_ratio": 0.999, "importance_beta": 0.5, "mask_interval": 3},
}
LR = 1e-2
STEPS = 12


def gradients(seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield STEPS sets of gradients; each entry has a size of its own, so that importance means something."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: torch.rand(shape, generator=generator) ** 4 for name, (shape, _) in SHAPES.items()}
    for _ in range(STEPS):
        yield {
            name: torch.randn(shape, generator=generator) * sizes[name] * scale
            for name, (shape, scale) in SHAPES.items()
        }


def parameters() -> dict[str, Parameter]:
    return {name: Parameter(torch.randn(shape)) for name, (shape, _) in SHAPES.items()}


def give(params: dict[str, Parameter], grads: dict[str, Tensor]) -> None:
    for name, param in params.items():
        param.grad = grads[name].clone()


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_and_parameters_are_those_of_the_oracle(name: str, backend: str) -> None:
    settings = SETTINGS[name]
    params = parameters()
    layer_of = (lambda n: n) if settings.get("layers") == "tensor" else block
    truth = oracle.Oracle(
        {
            n: oracle.Tensor(p.detach().numpy().copy(), layer_of(n), settings["isolation_ratio"])
            for n, p in params.items()
        },
        LR,
        settings["importance_beta"],
        settings["mask_interval"],
        settings.get("normalize", "layer"),
        settings.get("scope", "global"),
    )
    optimizer = EPIAdamW(params.items(), lr=LR, backend=backend, **settings)
    held = 0
    for grads in gradients(seed=1):
        before = {n: p.detach().clone() for n, p in params.items()}
        give(params, grads)
        optimizer.step()
        truth.step({n: g.numpy() for n, g in grads.items()})
        for n, param in params.items():
            mask = optimizer.isolation_mask(param)
            np.testing.assert_array_equal(mask.numpy(), truth.tensors[n].mask, err_msg=n)
            assert torch.equal(param.detach()[mask].view(torch.int32), before[n][mask].view(torch.int32)), n
            np.testing.assert_allclose(param.detach().numpy(), truth.tensors[n].theta, rtol=0, atol=RUN_OF_12)
            held += int(mask.sum())
    assert held > 0


def test_the_bound_on_parameters_sees_a_missing_mask() -> None:
    params = parameters()
    free = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    optimizers = [
        EPIAdamW(params.items(), lr=LR, **SETTINGS["every step"]),
        EPIAdamW(free.items(), lr=LR, isolation_ratio=0.0),
    ]
    for grads in gradients(seed=1):
        for own, optimizer in zip((params, free), optimizers, strict=True):
            give(own, grads)
            optimizer.step()
    assert max((params[n] - free[n]).abs().max().item() for n in params if params[n].numel()) > 10 * RUN_OF_12


def test_second_moment_as_importance_protects_the_same_entries(backend: str) -> None:
    params = parameters()
    twins = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    betas = (0.9, 0.97)
    common = {"lr": LR, "betas": betas, "isolation_ratio": 0.1, "mask_interval": 2, "backend": backend}
    own = EPIAdamW(params.items(), importance="ema", importance_beta=betas[1], **common)
    free = EPIAdamW(twins.items(), importance="exp_avg_sq", **common)
    for grads in gradients(seed=2):
        for tensors, optimizer in ((params, own), (twins, free)):
            give(tensors, grads)
            optimizer.step()
        for n in params:
            assert torch.equal(own.isolation_mask(params[n]), free.isolation_mask(twins[n])), n
            assert torch.equal(own.importance(params[n]), free.importance(twins[n])), n
            # v rounds as S does, which is not quite as torch's v does
            torch.testing.assert_close(params[n], twins[n], rtol=0, atol=RUN_OF_12)
    assert free.state[twins["head.weight"]]["importance"] is free.state[twins["head.weight"]]["exp_avg_sq"]


def test_before_the_first_refresh_nothing_is_protected() -> None:
    params = parameters()
    optimizer = EPIAdamW(params.items(), lr=LR, isolation_ratio=0.5, mask_interval=5)
    for step, grads in enumerate(gradients(seed=3), start=1):
        give(params, grads)
        optimizer.step()
        assert any(optimizer.isolation_mask(p).any() for p in params.values()) == (step >= 5)


def test_released_entries_move_and_newly_locked_ones_stop(backend: str) -> None:
    param = Parameter(torch.ones(4))
    settings = {"isolation_ratio": 0.25, "mask_interval": 1, "importance_beta": 0.0, "backend": backend}
    optimizer = EPIAdamW([("layer.weight", param)], lr=LR, **settings)
    for strongest in (0, 3):
        before = param.detach().clone()
        param.grad = torch.tensor([0.1, 0.2, 0.3, 0.4])
        param.grad[strongest] = 1.0
        optimizer.step()
        assert optimizer.isolation_mask(param).tolist() == [i == strongest for i in range(4)]
        assert (param != before).tolist() == [i != strongest for i in range(4)]
    assert optimizer.telemetry()[-1]["layers"] == [
        {
            "layer": "layer",
            "eligible": 4,
            "protected": 1,
            "locked": 1,
            "released": 1,
            "kept": 0,
            "minimum": pytest.approx(0.01),
            "maximum": 1.0,
        }
    ]
