"""The operation `gather_`, every backend.

- Selected entries: bit for bit the dense step; the others keep every bit, whatever their gradient.
- Any strides, in row-major positions; int32 and int64 indices; nothing selected.
- What does not belong together is refused by name.
- torch's `opcheck` accepts the registration.
"""

from typing import Any

import pytest
import torch
from conftest import skip_unless_it_takes
from torch import Tensor

from epi_kernels import ops
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.rules import ADAMW

GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.5, "maximize": False}
ROW = scalars_of(ADAMW, GROUP, 3)


def arguments(backend: str, params: list[Tensor], grads: list[Tensor], indices: list[Tensor]) -> dict[str, Any]:
    """Return the arguments of a step with moments that are not zero."""
    wide = [torch.promote_types(p.dtype, torch.float32) for p in params]
    return {
        "rule": "adamw",
        "params": params,
        "grads": grads,
        "indices": indices,
        "slots": [
            *(torch.randn(len(i), dtype=d) for i, d in zip(indices, wide, strict=True)),
            *(torch.rand(len(i), dtype=d) for i, d in zip(indices, wide, strict=True)),
        ],
        "scalars": torch.tensor([ROW], dtype=torch.float64),
        "rows": [0] * len(params),
        "backend": backend,
    }


def slots(call: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the first and the second moments."""
    count = len(call["params"])
    return call["slots"][:count], call["slots"][count : 2 * count]


def dense(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, chosen: Tensor) -> list[Tensor]:
    """Return (p, m, v) at the chosen entries after a dense step of the reference."""
    wide = torch.promote_types(param.dtype, torch.float32)
    state = [torch.zeros(param.shape, dtype=wide).put_(chosen, s) for s in (exp_avg, exp_avg_sq)]
    param = param.clone()
    nonfinite, scalars = torch.zeros(1, dtype=torch.int64), torch.tensor([ROW], dtype=torch.float64)
    ops.sweep_(
        "adamw", [param], [grad], state, [], nonfinite, scalars, [0], "none", [False], False, None, None,
        "reference",
    )  # fmt: skip
    return [t.take(chosen) for t in (param, *state)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_selected_entries_step_as_a_dense_step_and_the_others_stay(
    backend: str, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    skip_unless_it_takes(backend, dtype)
    params, grads, indices = [], [], []
    for shape, count in (((), 1), ((0,), 0), ((7, 1001), 999), ((5,), 0), ((3, 4, 5), 60)):
        params.append(torch.randn(shape).to(dtype))
        grads.append(torch.randn(shape).to(dtype))
        indices.append(torch.randperm(params[-1].numel())[:count].sort().values.to(index_dtype))
        unselected = torch.ones(params[-1].numel(), dtype=torch.bool).index_fill_(0, indices[-1].long(), False)
        grads[-1].view(-1)[unselected] = torch.nan
    before = [p.clone() for p in params]
    call = arguments(backend, params, grads, indices)
    chosen = [i.long() for i in indices]
    exp_avg, exp_avg_sq = slots(call)
    expected = [dense(*each) for each in zip(params, grads, exp_avg, exp_avg_sq, chosen, strict=True)]
    ops.gather_(**call)
    results = zip(params, exp_avg, exp_avg_sq, chosen, before, expected, strict=True)
    for param, first, second, positions, old, (p, m, v) in results:
        assert torch.equal(param.take(positions), p)
        assert torch.equal(first, m)
        assert torch.equal(second, v)
        assert torch.equal(param, old.put_(positions, p))


def test_positions_are_row_major_whatever_the_strides(backend: str) -> None:
    storage = torch.zeros(6, 8)
    param, grad = storage[::2, 1::2].t(), torch.randn(3, 4).t()
    expected, contiguous_grad = param.contiguous(), grad.contiguous()
    indices = torch.tensor([0, 4, 5, 11])
    calls = [arguments(backend, [p], [g], [indices]) for p, g in ((param, grad), (expected, contiguous_grad))]
    calls[0]["slots"] = [t.clone() for t in calls[1]["slots"]]
    for call in calls:
        ops.gather_(**call)
    assert torch.equal(param, expected)
    assert param.nonzero().tolist() == [[0, 0], [1, 1], [1, 2], [3, 2]]
    assert storage.count_nonzero() == 4


def test_arguments_that_do_not_belong_together() -> None:
    call = arguments("auto", [torch.ones(4)], [torch.ones(4)], [torch.tensor([1, 3])])
    for changes, message in (
        ({"grads": []}, "grads has 0 tensors but params has 1"),
        ({"indices": []}, "indices has 0 tensors but params has 1"),
        ({"indices": [torch.tensor([[1, 3]])]}, r"indices\[0\] has shape \(1, 2\); pass one dimension"),
        ({"indices": [torch.tensor([1, 4])]}, r"indices\[0\] goes from 1 to 4 but params\[0\] has 4 entries"),
        ({"indices": [torch.tensor([-1, 2])]}, r"indices\[0\] goes from -1 to 2"),
        ({"slots": [torch.zeros(3), *call["slots"][1:]]}, r"exp_avg has the shapes \[\(3,\)\]"),
        ({"slots": call["slots"][:1]}, "slots has 1 tensors for 1 params"),
        ({"slots": [None, *call["slots"][1:]]}, r"exp_avg\[0\] is None; the rule adamw keeps it"),
        ({"rule": "sgd"}, "Invalid rule: 'sgd'; choose one of"),
        ({"scalars": call["scalars"][:, 1:]}, r"scalars has shape \(1, 11\), not \[n, 12\]"),
        ({"rows": [1]}, r"rows is \[1\]; pass for each of 1 tensors one of 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.gather_(**{**call, **changes})
    with pytest.raises(TypeError, match=r"indices\[0\] is torch.bool; pass int64 or int32"):
        ops.gather_(**{**call, "indices": [torch.tensor([True, True])]})


def test_opcheck(backend: str) -> None:
    params, grads = ([torch.ones(4), torch.ones(2, 3)] for _ in "pg")
    call = arguments(backend, params, grads, [torch.tensor([1, 2]), torch.tensor([5])])
    torch.library.opcheck(torch.ops.epi_kernels.gather_.default, (), call)


def test_triton_gives_each_tile_of_selected_entries_a_program_of_its_own(backend: str) -> None:
    if backend != "triton":
        pytest.skip("programs are Triton's")
    from epi_kernels.ops import tiles
    from epi_kernels.ops.gather.triton import Gather

    counts = [2 * tiles.BLOCK + 1, 0, tiles.BLOCK, 1]
    params = [torch.randn(3 * tiles.BLOCK) for _ in counts]
    indices = [torch.randperm(3 * tiles.BLOCK)[:count].sort().values for count in counts]
    call = arguments(backend, params, [torch.randn_like(p) for p in params], indices)
    exp_avg, exp_avg_sq = slots(call)
    tensors = ops.Tensors(params, call["grads"], {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
    assert Gather(ADAMW, tensors, indices)._table.chunks.numel() == 3 + 0 + 1 + 1
    expected = [dense(*each) for each in zip(params, call["grads"], exp_avg, exp_avg_sq, indices, strict=True)]
    ops.gather_(**call)
    for i, (theta, m, v) in enumerate(expected):
        assert torch.equal(params[i].take(indices[i]), theta)
        assert torch.equal(exp_avg[i], m)
        assert torch.equal(exp_avg_sq[i], v)
