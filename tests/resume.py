"""The runs of test_resume.py, and what a new process does to go on with one of them."""

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW

SHAPES = {"blocks.0.weight": (30, 7), "blocks.0.bias": (30,), "blocks.1.weight": (9, 8), "head.weight": (11, 5)}
HALF, WHOLE = 50, 100  # in the middle of an interval of 7

EPI = {
    "off": {"isolation_ratio": 0.0},
    "on": {},
    "per layer": {"scope": "layer"},
    "not normalized": {"normalize": "none"},
    "tensors": {"layers": "tensor"},
    "histogram": {"threshold": "histogram"},
    "S = exp_avg_sq": {"importance": "exp_avg_sq"},
    "no memory": {"importance_beta": 0.0},
    "amsgrad": {"amsgrad": True},
    "fused": {"fused": True},
    "clipped": {"clip_grad_norm": 0.1},
    "maximize": {"maximize": True},
    "reference": {"backend": "reference"},
    "tensor lr and betas": {"lr": torch.tensor(1e-2), "betas": (torch.tensor(0.8), torch.tensor(0.95))},
}
BASES: dict[str, Any] = {
    "isolated SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "isolated SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "isolated Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "isolated AdamW with amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
}
MODES = [*EPI, "masked", "sparse", *BASES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]
RUNS = [
    (mode, dtype)
    for mode, dtype in itertools.product(MODES, DTYPES)
    # refused: see test_drop_in.py and test_sparse_optimizer.py
    if not (dtype.is_complex and mode in ("S = exp_avg_sq", "fused", "sparse"))
]


def parameters(dtype: torch.dtype) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def optimizer_of(mode: str, params: dict[str, Parameter]) -> torch.optim.Optimizer:
    isolation: dict[str, Any] = {"isolation_ratio": 0.2, "mask_interval": 7}
    mask = {"head.weight": torch.arange(55).view(11, 5) % 3 == 0}
    if mode == "masked":
        return MaskedAdamW(params.items(), lr=1e-2, frozen=mask)
    if mode == "sparse":
        return SparseAdamW(params.items(), lr=1e-2, trainable=mask)
    if mode in BASES:
        return IsolatedOptimizer(BASES[mode](params.items()), **isolation)
    return EPIAdamW(params.items(), **{"lr": 1e-2, **isolation, **copy.deepcopy(EPI[mode])})


def train(params: dict[str, Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Take the steps from `first` to `last`, whose gradients depend on the step alone; some are missing."""
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params.values()):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype) * 10.0**-i
            param.grad = None if (step + i) % 5 == 0 and i else grad
        optimizer.step()


def go_on(number: int, folder: Path, path: Path, mode: str, dtype: torch.dtype) -> None:
    """Load half of a run from a file, take the other half, and write it into the file, in a process of `forked`."""
    warnings.simplefilter("error")
    saved = torch.load(path, weights_only=True)
    params = parameters(dtype)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(saved["params"][name])
    optimizer = optimizer_of(mode, params)
    optimizer.load_state_dict(saved["optimizer"])
    train(params, optimizer, HALF + 1, WHOLE)
    torch.save(contents(params, optimizer), path)


def contents(params: dict[str, Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"params": {name: p.detach() for name, p in params.items()}, "optimizer": optimizer.state_dict()}
