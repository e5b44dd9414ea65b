"""The processes of test_deepspeed.py: ``python tests/deepspeed_ranks.py <stage> <what> <rank> <folder>``, 2 ranks.

<what> is "bound" or "unbound", of EPIAdamW, "lion", bound, or "masked", "sparse" or "isolated", of the others.
"""

import copy
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

STAGE, BOUND, RANK, FOLDER = int(sys.argv[1]), sys.argv[2] in ("bound", "lion"), int(sys.argv[3]), Path(sys.argv[4])
os.environ.update(DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(FOLDER / "extensions"), GLOO_SOCKET_IFNAME="lo")
os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from epi_kernels import EPIAdamW, EPILion, IsolatedOptimizer, MaskedAdamW, SparseAdamW  # noqa: E402
from epi_kernels.select import top_k  # noqa: E402

# an extension for one machine's processes, built when it is first asked for; gloo alone does
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# whether the second group, biases and norms, is exempt from isolation
EXEMPT = STAGE != 2

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": STAGE},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": True},
}


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 7, bias=True), torch.nn.Linear(7, 9))]
    blocks += [torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.LayerNorm(9))]
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(blocks)})


class Net(torch.nn.Module):
    """Blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = model_of()["blocks"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def engine_of() -> tuple[Any, EPIAdamW]:
    model = Net()
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() > 1]},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    if EXEMPT:
        groups[1]["isolation_ratio"] = 0.0
    kind: Any = EPILion if sys.argv[2] == "lion" else EPIAdamW
    optimizer = kind(groups, lr=0.02, isolation_ratio=0.2, mask_interval=2, importance_beta=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(CONFIG))
    if BOUND:
        optimizer.bind_deepspeed(engine)
    return engine, optimizer


def train(engine: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        torch.manual_seed(100 * step + RANK)
        loss = engine(torch.randn(2, 9).bfloat16()).float().square().mean()
        engine.backward(loss)
        engine.step()


def fixed_masks(what: str) -> None:
    """Masks follow to the float32 copies of stage 0, and flat partitions are refused before anything has moved."""
    model = Net()
    named = list(model.named_parameters())
    free = {name: torch.rand(p.shape) < 0.5 for name, p in named}
    frozen = {name: ~mask for name, mask in free.items()}
    groups = [{"params": named[::2]}, {"params": named[1::2], "weight_decay": 0.0}]
    optimizer: Any = (
        MaskedAdamW(groups, lr=0.02, frozen=frozen)
        if what == "masked"
        else SparseAdamW(groups, lr=0.02, trainable=free)
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(CONFIG))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    if STAGE:
        try:
            train(engine, 1, 1)
        except ValueError as error:
            assert "blocks.0.0.weight is no longer a parameter" in str(error), error  # noqa: PT017
            assert "stage 0" in str(error), error  # noqa: PT017
        else:
            raise AssertionError("flat partitions were taken")
        assert all(map(torch.equal, params, before))
        return
    train(engine, 1, 3)
    names = [name for name, _ in named[::2] + named[1::2]]
    for name, param, old in zip(names, params, before, strict=True):
        assert param.dtype == torch.float32
        assert torch.equal(param != old, free[name]), name


def isolated() -> None:
    """IsolatedOptimizer protects entries at stage 0, and refuses flat partitions, each its own layer and budget."""
    model = Net()
    named = list(model.named_parameters())
    groups = [{"params": named[::2]}, {"params": named[1::2], "weight_decay": 0.0}]
    optimizer = IsolatedOptimizer(torch.optim.SGD(groups, lr=0.02), isolation_ratio=0.2, mask_interval=2)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(CONFIG))
        train(engine, 1, 3)
    except RuntimeError as error:
        assert STAGE, error  # noqa: PT017
        assert "DeepSpeed ZeRO has put flat partitions in their place" in str(error), error  # noqa: PT017
        return
    assert not STAGE, "flat partitions were taken"
    assert optimizer.telemetry()[-1]["protected"] == int(0.2 * sum(p.numel() for _, p in named))


def flats_of(optimizer: EPIAdamW) -> list[torch.Tensor]:
    return [
        torch.cat([p.detach(), *[state[key] for key in sorted(state.keys() - {"step"})]])
        for p, state in optimizer.state.items()
    ]


def mask_of(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.signbit(state.get("importance", torch.zeros_like(state["exp_avg"])))


def main() -> None:
    dist.init_process_group("gloo", init_method=f"file://{FOLDER / 'store'}", rank=RANK, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # finds that group
    if sys.argv[2] in ("masked", "sparse"):
        fixed_masks(sys.argv[2])
        return
    if sys.argv[2] == "isolated":
        isolated()
        return
    engine, optimizer = engine_of()
    if not BOUND:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(engine, 1, 4)
        assert sum("bind_deepspeed(engine) brings the layers back" in str(w.message) for w in caught) == 1
        assert any(mask_of(state).any() for state in optimizer.state.values())
        return
    train(engine, 1, 5)
    # every entry counted once, padding none of them, in the layers of the model
    shapes = {name: p.shape for name, p in Net().named_parameters() if p.dim() > 1 or not EXEMPT}
    entries = sum(shape.numel() for shape in shapes.values())
    records = optimizer.telemetry()
    assert [record["step"] for record in records] == [2, 4], [record["step"] for record in records]
    for record in records:
        assert record["eligible"] == entries, (record["eligible"], entries)
        assert record["protected"] == int(0.2 * entries)
        assert [layer["layer"] for layer in record["layers"]] == ["blocks.0", "blocks.1"]
    every: list[Any] = [None, None]
    dist.all_gather_object(every, records)
    assert every[0] == every[1]
    locked = torch.tensor([sum(int(mask_of(state).sum()) for state in optimizer.state.values())])
    dist.all_reduce(locked)
    assert int(locked) == int(0.2 * entries)

    # the pieces are the model's: put together by name, their masks are those of whole tensors
    optimizer.refresh()
    own = [segment for segment in optimizer._isolation.competition.segments if segment.name in shapes]
    mine = {s.name: optimizer.state[s.flat]["importance"][s.start : s.start + s.entries] for s in own}
    dist.all_gather_object(every, mine)
    signed = {n: torch.cat([part[n] for part in every if n in part]).view(shape) for n, shape in shapes.items()}
    expected = top_k({n: s.abs() for n, s in signed.items()}, 0.2, normalize="layer", layers="block")
    for name, mask in expected.items():
        assert torch.equal(torch.signbit(signed[name]), mask), name

    # protected entries of the float32 partitions do not move
    before = {p: p.detach().clone() for p in optimizer.state}
    masks = {p: mask_of(state) for p, state in optimizer.state.items()}
    train(engine, 6, 6)
    for p, mask in masks.items():
        assert torch.equal(p[mask], before[p][mask])
        assert (p[~mask] != before[p][~mask]).float().mean() > 0.5

    # saved, loaded and gone on with: the same as not saved, bit for bit
    engine.save_checkpoint(str(FOLDER / "checkpoint"))
    train(engine, 7, 10)
    again, other = engine_of()
    again.load_checkpoint(str(FOLDER / "checkpoint"))
    if BOUND:
        other.bind_deepspeed(again)
    train(again, 7, 10)
    for one, two in zip(flats_of(optimizer), flats_of(other), strict=True):
        assert torch.equal(one, two)
    assert other.telemetry()[-1] == optimizer.telemetry()[-1]


def leave() -> None:
    """End this process once both ranks have passed, without taking gloo's threads down one by one.

    Taking them down once ended with "terminate called without an active exception", after everything had passed.
    """
    dist.barrier()
    time.sleep(0.5)  # until the last rank is out of the barrier
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()
