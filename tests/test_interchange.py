"""States go both ways between torch.optim.AdamW and EPIAdamW, and training goes on as torch's would.

The continuation is compared step by step, each from the same parameters, in `step_ulps`; the moments are the loaded
ones throughout. A state that was not loaded fails the same bounds (negative control).
"""

import copy
import io
from typing import Any

import pytest
import torch
from tolerances import STEP_ULPS, step_ulps
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW

SHAPES = {"h.0.weight": (64, 33), "h.0.bias": (64,), "head.weight": (501,), "head.scale": ()}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "tensor lr": {"lr": torch.tensor(0.001)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def parameters() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def step(params: dict[str, Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(params: dict[str, Parameter]) -> dict[str, Parameter]:
    return {n: Parameter(p.detach().clone()) for n, p in params.items()}


def worst(
    params: dict[str, Parameter], optimizer: Any, twins: dict[str, Parameter], twin: Any, free: dict[str, Tensor]
) -> float:
    """Return the worst step_ulps of 20 further steps of two optimizers, among the entries that are free."""
    largest = 0.0
    for number in range(11, 31):
        before = {n: p.detach().clone() for n, p in params.items()}
        for name, q in twins.items():
            q.data.copy_(before[name])
        step(params, optimizer, number)
        step(twins, twin, number)
        for name, p in params.items():
            moving = free[name]
            largest = max(largest, *step_ulps(p.detach()[moving], twins[name].detach()[moving], before[name][moving]))
    return largest


@each_option
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not loaded"])
def test_a_state_of_torch_goes_on_in_epiadamw(options: dict[str, Any], loaded: bool) -> None:
    twins = parameters()
    twin = torch.optim.AdamW(twins.values(), **copy.deepcopy(options), fused=True)
    for number in range(1, 11):
        step(twins, twin, number)
    params = copies(twins)
    # nothing is protected before the refresh at 1000, but importance is kept
    optimizer = EPIAdamW(params.items(), isolation_ratio=0.25, mask_interval=1000, **copy.deepcopy(options))
    if loaded:
        optimizer.load_state_dict(through_a_file(twin.state_dict()))
    free = {n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()}
    found = worst(params, optimizer, twins, twin, free)
    assert (found <= STEP_ULPS) == loaded
    assert optimizer.state[params["head.scale"]]["step"].item() == (30.0 if loaded else 20.0)
    assert all(optimizer.importance(p).all() for p in params.values())


@each_option
@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "MaskedAdamW"])
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not loaded"])
def test_our_state_goes_on_in_torch(options: dict[str, Any], kind: str, loaded: bool) -> None:
    params = parameters()
    optimizer: Any
    if kind == "MaskedAdamW":
        frozen = {"h.0.bias": torch.arange(64) % 2 == 0}
        optimizer = MaskedAdamW(params.items(), frozen=frozen, **copy.deepcopy(options))
    else:
        optimizer = EPIAdamW(
            params.items(), isolation_ratio=0.25, mask_interval=10, importance=kind, **copy.deepcopy(options)
        )
    for number in range(1, 11):
        step(params, optimizer, number)
    twins = copies(params)
    twin = torch.optim.AdamW(twins.values(), **copy.deepcopy(options), fused=True)
    if loaded:
        twin.load_state_dict(through_a_file(optimizer.state_dict()))
        for group in twin.param_groups:
            group["fused"] = True  # the state has brought ours
    free = {n: ~optimizer.isolation_mask(p) for n, p in params.items()}
    assert 0 < sum(int(f.sum()) for f in free.values()) < sum(f.numel() for f in free.values())
    if kind != "MaskedAdamW":
        optimizer.param_groups[0]["mask_interval"] = None  # the masks stay
    assert (worst(params, optimizer, twins, twin, free) <= STEP_ULPS) == loaded


OTHER_DTYPES = [
    (dtype, fused)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.complex64)
    for fused in (True, False)
    if not (fused and dtype.is_complex)  # torch's fused takes none
]


@pytest.mark.parametrize(("dtype", "fused"), OTHER_DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["to torch", "to EPIAdamW"])
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not loaded"])
def test_states_of_other_dtypes_go_on_to_2_ulp(dtype: torch.dtype, fused: bool, direction: str, loaded: bool) -> None:
    """A step after the load, from the same parameters and moments, in ulp of the parameter's dtype."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    start, *grads = (torch.randn(4000, generator=generator, dtype=wide).to(dtype) for _ in range(12))
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    # an eps of 1e-8 is 0 in float16, and torch's loop then divides 0 by 0
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4, "fused": fused}
    mine = EPIAdamW([("h.0.w", ours)], mask_interval=None, **options)
    other = torch.optim.AdamW([theirs], foreach=False, **options)
    pairs = [(mine, ours), (other, theirs)]
    (source, p), (target, q) = pairs if direction == "to torch" else reversed(pairs)
    for grad in grads[:-1]:
        p.grad = grad.clone()
        source.step()
    for key in ("exp_avg", "exp_avg_sq"):
        moment = source.state[p][key]
        moment.copy_(moment.to(dtype))  # torch keeps 16 bits of it under 16-bit parameters: let both have those
    if loaded:
        target.load_state_dict(through_a_file(source.state_dict()))
    q.data.copy_(p.detach())
    before = p.detach().clone()
    for param, optimizer in ((p, source), (q, target)):
        param.grad = grads[-1].clone()
        optimizer.step()
    one, two, old = (torch.view_as_real(x) if dtype.is_complex else x for x in (p.detach(), q.detach(), before))
    scale = torch.stack([old.abs(), (two - old).abs(), two.abs()]).amax(0)
    ulp = torch.nextafter(scale, torch.full_like(scale, torch.inf)).double() - scale.double()
    assert (((one.double() - two.double()).abs() / ulp).max().item() <= STEP_ULPS) == loaded


def test_there_and_back_is_the_same_state() -> None:
    params = parameters()
    optimizer = EPIAdamW(params.items(), isolation_ratio=0.25, mask_interval=5)
    for number in range(1, 11):
        step(params, optimizer, number)
    twins = copies(params)
    twin = torch.optim.AdamW(twins.values())
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    again = EPIAdamW(copies(params).items(), isolation_ratio=0.25, mask_interval=5)
    again.load_state_dict(through_a_file(twin.state_dict()))
    for state, other in zip(optimizer.state.values(), again.state.values(), strict=True):
        # torch carries the importance along, which it does not know
        for key in ("step", "exp_avg", "exp_avg_sq", "importance"):
            assert torch.equal(state[key], other[key])
