"""Moments that a framework keeps in 16 bits stay in 16 bits through every load.

torchtitan, among others, fills ``exp_avg`` and ``exp_avg_sq`` in bfloat16 under float32 parameters, before the first
step. A moment keeps the dtype of the live state. Without one it has that of the arithmetic, which is float32 of a
16-bit parameter; but 16 bits under a float32 or float64 parameter were chosen, and stay.
"""

import copy
import itertools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from states import same_state
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW
from epi_kernels.backends import native, registry
from epi_kernels.backends.support import Spec
from epi_kernels.ops import steps

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MASK = torch.arange(20, device="cpu").view(5, 4) % 3 == 0
BUILDS: dict[str, Callable[..., Any]] = {
    "ema": lambda named: EPIAdamW(named, isolation_ratio=0.2, mask_interval=2),
    "exp_avg_sq": lambda named: EPIAdamW(named, isolation_ratio=0.2, mask_interval=2, importance="exp_avg_sq"),
    "amsgrad": lambda named: EPIAdamW(named, isolation_ratio=0.2, mask_interval=2, amsgrad=True),
    "MaskedAdamW": lambda named: MaskedAdamW(named, frozen={"w": MASK}),
}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
pytestmark = pytest.mark.filterwarnings("ignore:the moments of")


def parameter(dtype: torch.dtype) -> Parameter:
    generator = torch.Generator().manual_seed(1)
    return Parameter(torch.randn(5, 4, generator=generator, dtype=FP32).to(dtype))


def train(optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=generator, dtype=FP32).to(param.dtype)
        optimizer.step()


def fill(optimizer: Any, dtype: torch.dtype = BF16) -> None:
    """Do before a step what torchtitan's hook does."""

    def hook(*_: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if not optimizer.state[param]:
                    keys = MOMENTS[: 3 if group["amsgrad"] else 2]
                    optimizer.state[param] = {
                        "step": torch.zeros((), dtype=FP32),
                        **{key: torch.zeros_like(param, dtype=dtype) for key in keys},
                    }

    optimizer.register_step_pre_hook(hook)


def dtypes(optimizer: Any) -> set[torch.dtype]:
    return {state[key].dtype for state in optimizer.state.values() for key in MOMENTS if key in state}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("fresh", [True, False], ids=["into a fresh optimizer", "into a live one"])
def test_a_resumed_run_with_bfloat16_moments_is_the_uninterrupted_one(build: Callable[..., Any], fresh: bool) -> None:
    first, second = parameter(FP32), parameter(FP32)
    straight, resumed = build([("w", first)]), build([("w", second)])
    fill(straight)
    train(straight, 1, 5)
    if not fresh:
        fill(resumed)
        train(resumed, 1, 1)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert dtypes(resumed) == {BF16}
    second.data.copy_(first.data)
    train(straight, 6, 10)
    train(resumed, 6, 10)
    assert torch.equal(first, second)
    assert same_state(straight.state_dict(), resumed.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_distributed_checkpoint_keeps_them(build: Callable[..., Any], flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def made() -> tuple[torch.nn.Module, Any]:
        model = torch.nn.Module()
        model.w = parameter(FP32)
        optimizer = build(model.named_parameters())
        fill(optimizer)
        return model, optimizer

    model, optimizer = made()
    train(optimizer, 1, 3)
    twin, other = made()
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"o": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=folder)
        state = {"o": get_optimizer_state_dict(twin, other, options=options)}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(twin, other, state["o"], options=options)
    assert dtypes(other) == {BF16}
    twin.w.data.copy_(model.w.data)  # type: ignore[union-attr,operator]
    train(optimizer, 4, 6)
    train(other, 4, 6)
    assert torch.equal(model.w, twin.w)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("of", "saved", "live"), list(itertools.product((BF16, FP16, FP32, FP64), (BF16, FP32, FP64), (None, BF16, FP32)))
)
def test_the_dtype_is_that_of_the_live_state_or_what_was_chosen(
    of: torch.dtype, saved: torch.dtype, live: torch.dtype | None
) -> None:
    source, target = BUILDS["ema"]([("w", parameter(FP32))]), BUILDS["ema"]([("w", parameter(of))])
    train(source, 1, 2)
    state = copy.deepcopy(source.state_dict())
    for key in MOMENTS[:2]:
        state["state"][0][key] = state["state"][0][key].to(saved)
    if live is not None:
        fill(target, live)
        train(target, 1, 1)
    target.load_state_dict(state)
    usual = FP64 if of == FP64 else FP32
    chosen = saved if saved == BF16 and of in (FP32, FP64) else usual
    assert dtypes(target) == {live or chosen}
    train(target, 2, 4)


def test_a_named_backend_that_cannot_step_them_refuses_the_state_and_nothing_changes() -> None:
    if native.obstacle():
        pytest.skip(native.obstacle())
    source = BUILDS["ema"]([("w", parameter(FP32))])
    fill(source, FP16)
    train(source, 1, 2)
    target = EPIAdamW([("w", parameter(FP32))], backend="native")
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of w is torch\.float16: backend='native' cannot run .* float32"):
        target.load_state_dict(source.state_dict())
    assert same_state(target.state_dict(), before)
    train(target, 1, 2)


def test_a_live_dtype_that_no_step_can_take_is_not_kept() -> None:
    optimizer = BUILDS["ema"]([("w", parameter(FP32))])
    train(optimizer, 1, 2)
    state = copy.deepcopy(optimizer.state_dict())
    (live,) = optimizer.state.values()
    live["exp_avg"] = live["exp_avg"].to(torch.float8_e4m3fn)
    optimizer.load_state_dict(state)
    assert dtypes(optimizer) == {FP32}
    train(optimizer, 3, 4)


def test_one_warning_names_a_parameter_and_the_cost() -> None:
    if registry.choose(Spec("sweep_"), torch.device("cpu"), "auto").backend == "reference":
        pytest.skip("there is no faster backend here")
    named = [("w", parameter(FP32)), ("v", parameter(FP32))]
    optimizer = BUILDS["ema"](named)
    fill(optimizer, FP16)
    with pytest.warns(UserWarning, match=r"the moments of w are torch\.float16, .* several times slower") as caught:
        train(optimizer, 1, 3)
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
def test_moments_of_the_optimizers_own_are_no_reason_to_warn(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        # not a mark: that of the module, which ignores this warning, would come first
        warnings.filterwarnings("error", message="the moments of")
        train(EPIAdamW([("w", parameter(dtype))]), 1, 2)
        asked = EPIAdamW([("w", parameter(FP32))], backend="reference")
        fill(asked)
        train(asked, 1, 2)


def test_moments_of_16_bits_do_not_slow_the_other_parameters_down(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[frozenset[torch.dtype]] = []
    choose = registry.choose

    def spy(spec: Spec, device: torch.device, backend: str) -> Any:
        if spec.operation == "sweep_":
            chosen.append(spec.states)
        return choose(spec, device, backend)

    monkeypatch.setattr(steps, "choose", spy)
    named = [("w", parameter(FP32)), ("v", parameter(FP32))]
    optimizer = BUILDS["ema"](named)
    half = torch.zeros_like(named[0][1], dtype=BF16)
    optimizer.state[named[0][1]] = {
        "step": torch.zeros((), dtype=FP32),
        "exp_avg": half,
        "exp_avg_sq": half.clone(),
    }
    train(optimizer, 1, 1)
    assert set(chosen) == {frozenset({BF16, FP32}), frozenset({FP32})}
