"""What the comparisons of backends share: tensors of a step, special values, and equality of bits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from epi_kernels import lock, ops
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.ops import Tensors
from epi_kernels.rules import ADAMW

HALVES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = {
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "maximize": False,
    "importance_beta": 0.99,
}

# a vector and its neighbours, a block of the kernels and its neighbours, a chunk and one entry more
SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1023, 1025, 2049, 65_537)

SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 3e38, -1e20, 1e-20, 65504.0, 1.0])

Lists = dict[str, list[Tensor]]


def fuses() -> bool:
    """Return whether torch on this CPU rounds once in a multiply-add, as a GPU does.

    Without AVX2 it rounds the product too: what is left here of a product of 1 + 2^-11 + 2^-24 is then 0.
    """
    factor, rest = torch.full((64,), 1 + 2**-12), torch.full((64,), -(1 + 2**-11))
    fused = torch.addcmul(rest, factor, factor) != 0
    ends = rest / 4, factor + rest / 4
    return bool((fused & (torch.lerp(*ends, weight=factor / 4) != 0)).all())


# a comparison of moments, or of what follows from them, with those of the CPU
compares_moments = pytest.mark.skipif(not fuses(), reason="torch on this CPU rounds a multiply-add twice, a GPU once")


def differing(left: Tensor, right: Tensor) -> int:
    """Return how many entries differ in a bit; two NaNs do not."""
    flat = [torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)) for t in (left, right)]
    bytes_of = [t.view(torch.uint8).view(t.numel(), t.element_size()) for t in flat]
    return int(((bytes_of[0] != bytes_of[1]).any(1) & ~(left.isnan() & right.isnan()).reshape(-1)).sum())


def assert_same(left: Lists, right: Lists) -> None:
    for name in left:
        for i, (ours, theirs) in enumerate(zip(left[name], right[name], strict=True)):
            assert ours is theirs is None or not differing(ours, theirs), (
                f"{name}[{i}]: {differing(ours, theirs)} of {ours.numel()}"
            )


def clones(lists: Lists) -> Lists:
    """Return copies with the same strides and alignment, in memory that is NaN elsewhere."""
    return {name: [None if t is None else placed(t) for t in tensors] for name, tensors in lists.items()}


def placed(tensor: Tensor, device: str = "cpu") -> Tensor:
    """Return a copy on `device` with the same strides and the same offset in its storage, all else NaN (77)."""
    first = tensor.storage_offset()
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    filling = math.nan if tensor.is_floating_point() else 77
    memory = torch.full((first + max(span, 0),), filling, dtype=tensor.dtype, device=device)
    copy = memory.as_strided(tensor.shape, tensor.stride(), first)
    # the entries of an expanded dimension are one entry
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
    copy[once].copy_(tensor[once])
    return copy


def step_lists(params: list[Tensor], grads: list[Tensor], lock_in: str, amsgrad: bool) -> Lists:
    """Return the tensors of a step in the middle of a run; three in ten entries locked."""

    def like(values: Any) -> list[Tensor]:
        return [torch.empty_like(p, dtype=torch.float32).copy_(values(p)) for p in params]

    locked = [torch.rand(p.shape) < 0.3 for p in params]
    lists = {
        "params": params,
        "grads": grads,
        "exp_avg": like(lambda p: torch.randn(p.shape) * 0.1),
        "exp_avg_sq": like(lambda p: torch.rand(p.shape) * 0.1),
        "max_exp_avg_sq": like(lambda p: torch.rand(p.shape) * 0.1) if amsgrad else [],
        "locks": [],
    }
    if lock_in == "importance":
        lists["locks"] = [
            lock.with_lock(s, where) for s, where in zip(like(lambda p: torch.rand(p.shape)), locked, strict=True)
        ]
    elif lock_in == "static":
        lists["locks"] = [lock.static_lock(where) for where in locked]
    elif lock_in == "exp_avg_sq":
        lists["exp_avg_sq"] = [lock.with_lock(v, where) for v, where in zip(lists["exp_avg_sq"], locked, strict=True)]
    return lists


def gradient(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return gradients over ten decades; in the 16-bit dtypes some overflow when squared, some vanish."""
    return (torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-7, 3)).to(dtype)


def signed(shape: tuple[int, ...]) -> Tensor:
    """Return an importance over forty decades, subnormals, zeros and values that are not finite included."""
    values = 10 ** torch.empty(shape).uniform_(-42, 3)
    values = torch.where(torch.rand(shape) < 0.1, SPECIAL[torch.randint(0, len(SPECIAL), shape)].abs(), values)
    return lock.with_lock(values, torch.rand(shape) < 0.3)


SLOTS = [slot.name for slot in ADAMW.slots]


def tensors_of(lists: Lists) -> Tensors:
    """Return the record of the tensors of a step."""
    slots = {name: lists[name] for name in SLOTS if lists.get(name)}
    return Tensors(lists["params"], lists["grads"], slots, lists["locks"])


def flat_slots(lists: Lists) -> list[Tensor]:
    """Return the slots as `ops.sweep_` takes them."""
    return [tensor for name in SLOTS for tensor in lists.get(name, [])]


def scalars(lock_in: str, step: int, **group: Any) -> Tensor:
    """Return a row of scalars; a lock in a slot has that slot's beta."""
    importance = {"importance": lock_in} if lock_in == "exp_avg_sq" else {}
    return torch.tensor([scalars_of(ADAMW, {**GROUP, **importance, **group}, step)], dtype=torch.float64)


def step_arguments(lists: Lists, lock_in: str, *, step: int = 3, **group: Any) -> dict[str, Any]:
    """Return the arguments of `ops.sweep_` without a backend: one group, its clock at `step`."""
    count = len(lists["params"])
    return {
        "rule": "adamw",
        "params": lists["params"],
        "grads": lists["grads"],
        "slots": flat_slots(lists),
        "locks": lists["locks"],
        "nonfinite": torch.zeros(count, dtype=torch.int64),
        "scalars": scalars(lock_in, step, **group),
        "rows": [0] * count,
        "lock_in": lock_in,
        "lockable": [lock_in != "none"] * count,
        "advanced": False,
        "grad_factor": None,
        "found_inf": None,
    }


def step(lists: Lists, backend: str, lock_in: str, changes: dict[str, Any] | None = None, **group: Any) -> Lists:
    """Return the tensors after one step, the counts with them; `changes` replace arguments."""
    lists = clones(lists)
    call = {**step_arguments(lists, lock_in, **group), **(changes or {})}
    call["nonfinite"] = torch.zeros_like(call["nonfinite"])
    ops.sweep_(**call, backend=backend)
    return {**lists, "nonfinite": [call["nonfinite"]]}


def assert_steps_agree(
    backend: str, lists: Lists, lock_in: str, changes: dict[str, Any] | None = None, **group: Any
) -> None:
    assert_same(step(lists, backend, lock_in, changes, **group), step(lists, "reference", lock_in, changes, **group))
