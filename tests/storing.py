"""A model whose parameters can be in every storage, optimizers that keep them so, and what tests of these compare."""

from pathlib import Path
from typing import Any

import torch
from sharding import shard
from torch import Tensor, nn

from epi_kernels import EPIAdamW, EPILion, MaskedAdamW, SparseAdamW, distributed
from epi_kernels.storage import block8

BFLOAT16 = torch.bfloat16
SETTINGS: dict[str, Any] = {"lr": 0.02, "backend": "reference"}
ISOLATION: dict[str, Any] = {"isolation_ratio": 0.15, "mask_interval": 2, "importance_beta": 0.5}

STORAGES: dict[str, dict[str, Any]] = {
    "stochastic": {"rounding": "stochastic"},
    "bfloat16": {"state_dtype": BFLOAT16},
    "8 bits": {"state_dtype": "8bit"},
    "8 bits, importance in float32": {"state_dtype": "8bit", "importance_dtype": torch.float32},
    "24 bits": {"state_dtype": BFLOAT16, "master_weight_bits": 24},
    "24 bits, stochastic": {"state_dtype": "8bit", "rounding": "stochastic", "master_weight_bits": 24},
    "32 bits": {"state_dtype": "8bit", "master_weight_bits": 32},
}
KINDS = ("ema", "exp_avg_sq", "lion", "masked", "sparse")


def takes(kind: str, storage: str) -> bool:
    """Return whether an optimizer has a storage; a SparseAdamW has no blocks, so that some would be there twice."""
    if storage == "8 bits, importance in float32":
        return kind in ("ema", "lion")
    return kind != "sparse" or storage != "8 bits"


CASES = [(kind, storage) for kind in KINDS for storage in STORAGES if takes(kind, storage)]
# each kind and each storage at least once
SOME_CASES = [
    ("ema", "8 bits, importance in float32"),
    ("ema", "24 bits, stochastic"),
    ("exp_avg_sq", "bfloat16"),
    ("exp_avg_sq", "32 bits"),
    ("lion", "8 bits"),
    ("masked", "stochastic"),
    ("masked", "24 bits"),
    ("sparse", "24 bits, stochastic"),
]


class Net(nn.Module):
    """Parameters of bfloat16 and of float32: with rows that end within a block, of two rows, of one entry.

    The second dimension of `down` is cut at a multiple of 64 by 2 ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(100, 66, dtype=BFLOAT16)
        self.down = nn.Linear(256, 20)
        self.wide = nn.Parameter(torch.randn(2, 2100).to(BFLOAT16))
        self.kernel = nn.Parameter(torch.randn(9, 8, 8, 8).to(BFLOAT16))
        self.scale = nn.Parameter(torch.ones(1, dtype=BFLOAT16))


class SmallNet(nn.Module):
    """The parameters of a `Net` whose shards are the most uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(100, 66, dtype=BFLOAT16)
        self.wide = nn.Parameter(torch.randn(2, 2100).to(BFLOAT16))


def model_of(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def every_third(params: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Return masks of all parameters."""
    return {name: torch.arange(param.numel()).view(param.shape) % 3 == 0 for name, param in params}


def optimizer_of(kind: str, model: nn.Module, *, selects: bool = True, **given: Any) -> Any:
    """Return an optimizer of a kind; `given` are its storages, and settings that replace the usual ones."""
    named = list(model.named_parameters())
    if kind not in ("ema", "lion"):  # these have no importance of its own
        given.pop("importance_dtype", None)
    if kind == "sparse":
        dtype = None if given.get("state_dtype") is None else BFLOAT16
        settings = {**SETTINGS, **given, "state_dtype": dtype}
        return SparseAdamW(named, **settings, trainable=every_third(named) if selects else {})
    if kind == "masked":
        return MaskedAdamW(named, **{**SETTINGS, **given}, frozen=every_third(named))
    settings = {**SETTINGS, **ISOLATION, **given}
    if kind == "lion":
        return EPILion(named, **{**settings, "lr": 0.002})
    return EPIAdamW(named, **settings, importance="ema" if kind == "ema" else kind)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): param for name, param in model.named_parameters()}


def give(params: dict[str, nn.Parameter], step: int) -> None:
    """Set gradients that depend on the step alone, each rank its shards."""
    generator = torch.Generator().manual_seed(step)
    for param in params.values():
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = distributed.shard_of(grad, param)


def train(params: dict[str, nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        give(params, step)
        optimizer.step()
        optimizer.zero_grad()


def contents(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Return what a model and an optimizer in one piece hold: parameters, states and masks."""
    found = {}
    for name, param in named(model).items():
        state = {key: value.clone() for key, value in optimizer.state[param].items()}
        if "indices" in state:
            state = spread(state, "indices", param.shape)
        else:
            state["mask"] = optimizer.isolation_mask(param)
        found[name] = {"param": param.detach().clone(), **state}
    return found


def spread(state: dict[str, Tensor], key: str, shape: torch.Size) -> dict[str, Tensor]:
    """Return a compact state in the shape of a parameter, with -1 where nothing is selected."""
    where, found = state[key].long(), {"step": state["step"]}
    for slot, values in state.items():
        if slot not in ("step", key):
            dense = torch.full((shape.numel(),), -1, dtype=values.dtype)
            dense[where] = values
            found[slot] = dense.view(shape)
    return found


def assert_holds(model: nn.Module, optimizer: Any, expected: dict[str, dict[str, Tensor]]) -> None:
    """Compare what this rank holds with its part of what one process holds, bit for bit."""
    for name, param in named(model).items():
        state, whole = dict(optimizer.state[param]), dict(expected[name])
        mask = whole.pop("mask", None)
        if mask is not None:
            assert torch.equal(optimizer.isolation_mask(param), shard(mask, param)), (name, "mask")
        else:
            key = "trainable" if "trainable" in state else "indices"
            state = spread(state, key, distributed.local(param).shape)
        state["param"] = param.detach()
        assert state.keys() == whole.keys(), (name, state.keys() ^ whole.keys())
        for key, value in state.items():
            part, here = whole[key], distributed.local(value)
            part = part if key == "step" else shard(part, param)
            assert same_bits(here, part), (name, key, here.shape, part.shape)
            if key.endswith("_scales"):
                assert value.shape == block8.scales_shape(param.shape), (name, key)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bits."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


def snapshot(optimizer: Any) -> list[Any]:
    """Return copies of all that an optimizer has: parameters, states and settings."""
    copies = []
    for group in optimizer.param_groups:
        copies.append({key: value for key, value in group.items() if key != "params"})
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            copies.append(distributed.local(param.detach()).clone())
            copies.append({key: distributed.local(value).clone() for key, value in state.items()})
    return copies


def bytes_of(folder: Path) -> int:
    """Return how many bytes the files in a folder have together."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
