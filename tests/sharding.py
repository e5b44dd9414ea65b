"""A small model in every layout that shares it out over ranks, and what tests of these layouts compare."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW, distributed

STEPS = 7
SETTINGS: dict[str, Any] = {"lr": 0.02, "isolation_ratio": 0.15, "mask_interval": 2, "importance_beta": 0.5}


class Block(nn.Module):
    """Two linear layers and a norm, with sizes that do not divide by the number of ranks unless they must."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks and a scale of one entry: of most ranks it has an empty shard."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, hidden), Block(width, hidden)])
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def model_of(tensor_parallel: bool) -> Net:
    torch.manual_seed(0)
    return Net(8, 12) if tensor_parallel else Net(7, 11)


def loss_of(model: nn.Module, step: int, width: int) -> Tensor:
    torch.manual_seed(step)  # the same batch on all ranks
    return model(torch.randn(5, width)).square().mean()


def fsdp(model: Net) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def hsdp(model: Net) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tp(model: Net, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def tp_fsdp(model: Net) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    tp(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def ddp(model: Net) -> nn.Module:
    return DistributedDataParallel(model)


# layout -> (how, whether it is tensor parallel)
LAYOUTS: dict[str, tuple[Callable[[Net], nn.Module], bool]] = {
    "fsdp": (fsdp, False),
    "hsdp": (hsdp, False),
    "tp": (tp, True),
    "tp+fsdp": (tp_fsdp, True),
    "ddp": (ddp, False),
}
SIZES = {"fsdp": (1, 2, 3, 4), "hsdp": (2, 4), "tp": (1, 2, 4), "tp+fsdp": (2, 4), "ddp": (1, 2, 3, 4)}


def layouts(*given: tuple[str, int]) -> pytest.MarkDecorator:
    """Return parameters of a test: each layout with a number of ranks."""
    return pytest.mark.parametrize(("layout", "size"), given, ids=[f"{layout}, {size} ranks" for layout, size in given])


every_layout_and_size = layouts(*[(layout, size) for layout, sizes in SIZES.items() for size in sizes])
# each layout once, with the fewest ranks that do all that it does: of three, some have shorter shards or none
SHARDED = (("fsdp", 3), ("hsdp", 4), ("tp", 2), ("tp+fsdp", 4))
every_sharded_layout = layouts(*SHARDED)
every_layout = layouts(("fsdp", 1), *SHARDED, ("ddp", 2))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_bool(mask: Tensor) -> Tensor:
    if not isinstance(mask, DTensor):
        return mask
    return full(distributed.wrapped(mask.to_local().to(torch.uint8), mask)).bool()


def mask_of(optimizer: Any, param: Tensor) -> Tensor:
    """Return the mask of a whole parameter."""
    mask = optimizer.isolation_mask(param)
    return full(distributed.wrapped(mask.to(torch.uint8), param)).bool() if isinstance(param, DTensor) else mask


def names_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): param for name, param in model.named_parameters()}


def pairs(layout: str) -> tuple[nn.Module, Net, int]:
    """Return (a model in this layout, the same in one piece, its width)."""
    how, tensor_parallel = LAYOUTS[layout]
    model = model_of(tensor_parallel)
    whole = copy.deepcopy(model)
    return how(model), whole, 8 if tensor_parallel else 7


def step_both(model: nn.Module, optimizer: Any, whole: Net, reference: Any, step: int, width: int) -> None:
    """Step a model in its layout by gradients of its own loss, and by the same gradients the one in one piece."""
    loss_of(model, step, width).backward()
    for name, param in names_of(model).items():
        names_of(whole)[name].grad = full(param.grad).detach().clone()
    optimizer.step()
    reference.step()
    optimizer.zero_grad()
    reference.zero_grad()


def give_both(model: nn.Module, optimizer: Any, whole: Net, reference: Any, step: int) -> None:
    """Step both by gradients that depend on the step alone."""
    for one, its in ((model, optimizer), (whole, reference)):
        give(names_of(one), step)
        its.step()


def assert_same(model: nn.Module, optimizer: Any, whole: Net, reference: Any) -> None:
    """Compare whole parameters, put together by torch, and whole masks."""
    twins = names_of(whole)
    for name, param in names_of(model).items():
        assert torch.equal(full(param), twins[name]), name
        assert torch.equal(mask_of(optimizer, param), reference.isolation_mask(twins[name])), name
    assert optimizer.telemetry() == reference.telemetry()


def assert_same_here(model: nn.Module, optimizer: Any, whole: Net, reference: Any) -> None:
    """Compare what this rank holds, without a word to the others."""
    for name, param in names_of(model).items():
        twin = names_of(whole)[name]
        assert torch.equal(local(param), shard(twin.detach(), param)), name
        assert torch.equal(optimizer.isolation_mask(param), shard(reference.isolation_mask(twin), param)), name
    assert optimizer.telemetry() == reference.telemetry()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, param: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank holds of `param`."""
    return local(distributed.shard_of(tensor, param))


def every_third(model: nn.Module) -> dict[str, Tensor]:
    """Return masks of the weights alone."""
    named = [(name, param) for name, param in model.named_parameters() if name.endswith("weight")]
    return {name: torch.arange(param.numel()).view(param.shape) % 3 == 1 for name, param in named}


def give(params: dict[str, nn.Parameter], step: int) -> None:
    """Set gradients that depend on the step alone, each rank its shards."""
    generator = torch.Generator().manual_seed(step)
    for param in params.values():
        grad = torch.randn(param.shape, generator=generator)
        param.grad = distributed.shard_of(grad, param)


def train_stage(params: dict[str, nn.Parameter], optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        give(params, step)
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(kind: str, model: nn.Module, *, selects: bool = True) -> Any:
    settings = {**SETTINGS, "mask_interval": 4}
    if kind == "sparse":
        # a checkpoint brings its selection along
        trainable = every_third(model) if selects else {}
        return SparseAdamW(model.named_parameters(), lr=0.02, trainable=trainable)
    if kind == "isolated":
        settings.pop("lr")
        return IsolatedOptimizer(torch.optim.Adagrad(model.named_parameters(), lr=0.02), **settings)
    return EPIAdamW(model.named_parameters(), **settings, importance="exp_avg_sq" if kind == "exp_avg_sq" else "ema")


def optimizer_of_masks(kind: str, model: nn.Module) -> Any:
    if kind == "sparse":
        return SparseAdamW(model.named_parameters(), lr=0.02, trainable=every_third(model))
    return MaskedAdamW(model.named_parameters(), lr=0.02, frozen=every_third(model))


def expect(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as found:
        call()
    assert text in str(found.value), str(found.value)
