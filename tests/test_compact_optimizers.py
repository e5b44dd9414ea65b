"""The optimizers with compact storages, in one process.

- With master_weight_bits=32, training is bit for bit that of float32 copies of the weights, masks and refreshes too.
- Protected and frozen entries keep their bits, and those of their rests.
- Noise knows a parameter by its name, else by its position; a seed changes it; a resumed run goes on as it would have.
- What a framework has made in bfloat16 stays so; otherwise moments are float32 unless asked.
- What cannot be is refused before anything has changed, by an error that names it.
"""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import AVAILABLE
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, EPILion, MaskedAdamW, SparseAdamW
from epi_kernels.optim import release_gradients
from epi_kernels.storage import split

BF16, FP32 = torch.bfloat16, torch.float32

# a tensor in blocks of 8 bits, one with ragged rows, one too small for blocks, and a vector
SHAPES = {"layers.0.wide": (32, 128), "layers.0.ragged": (48, 100), "layers.1.small": (8, 64), "layers.1.norm": (96,)}

pytestmark = pytest.mark.filterwarnings("ignore:.* squared gradients were NaN or infinite")

STORAGES: dict[str, dict[str, Any]] = {
    "bfloat16": {"state_dtype": BF16},
    "bfloat16 importance": {"importance_dtype": BF16},
    "8bit": {"state_dtype": "8bit"},
    "8bit with float32 importance": {"state_dtype": "8bit", "importance_dtype": FP32},
    "stochastic": {"rounding": "stochastic"},
    "24 bits": {"master_weight_bits": 24, "state_dtype": "8bit"},
    "24 bits, stochastic": {"master_weight_bits": 24, "state_dtype": BF16, "rounding": "stochastic"},
    "32 bits": {"master_weight_bits": 32},
}


@pytest.fixture(params=[one for one in AVAILABLE if one != "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Run on every backend but Triton's, which would take minutes for these steps; see the last test."""
    return str(request.param)


def weights(dtype: torch.dtype = BF16, seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Parameter(torch.randn(shape, generator=generator).to(BF16).to(dtype)) for name, shape in SHAPES.items()
    }


def gradients(step: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(step)
    for i, shape in enumerate(SHAPES.values()):
        yield (torch.randn(shape, generator=generator) * 10.0 ** -(i % 3)).to(BF16)


def train(optimizer: Any, params: dict[str, Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        for param, grad in zip(params.values(), gradients(step), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def frozen_half(params: dict[str, Parameter]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(param.shape, generator=generator) < 0.5 for name, param in params.items()}


BUILDS: dict[str, Callable[..., Any]] = {
    "EPIAdamW": lambda params, **settings: EPIAdamW(
        params.items(), lr=1e-2, isolation_ratio=0.1, mask_interval=3, **settings
    ),
    "EPIAdamW, exp_avg_sq": lambda params, **settings: EPIAdamW(
        params.items(), lr=1e-2, isolation_ratio=0.1, mask_interval=3, importance="exp_avg_sq", **settings
    ),
    "EPILion": lambda params, **settings: EPILion(
        params.items(), lr=1e-2, isolation_ratio=0.1, mask_interval=3, **settings
    ),
    "MaskedAdamW": lambda params, **settings: MaskedAdamW(
        params.items(), lr=1e-2, frozen=frozen_half(params), **settings
    ),
    "SparseAdamW": lambda params, **settings: SparseAdamW(
        params.items(), lr=1e-2, trainable={name: ~mask for name, mask in frozen_half(params).items()}, **settings
    ),
}


def fits(build: str, settings: dict[str, Any]) -> bool:
    """Return whether an optimizer has these settings."""
    if build in ("MaskedAdamW", "SparseAdamW") and "importance_dtype" in settings:
        return False
    if build == "EPIAdamW, exp_avg_sq" and settings.get("importance_dtype") is not None:
        return False
    return not (build == "SparseAdamW" and settings.get("state_dtype") == "8bit")


CASES = [
    pytest.param(build, settings, id=f"{build}-{name}")
    for build, (name, settings) in itertools.product(BUILDS, STORAGES.items())
    if fits(build, settings)
]


def bits(tensor: Tensor) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(whole[tensor.element_size()])


def same(one: Any, other: Any) -> bool:
    """Return whether two parameters or two states have the same bits."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(bits(one), bits(other))
    return bool(one == other)


def all_of(optimizer: Any, params: dict[str, Parameter]) -> dict[str, Any]:
    return {name: {"param": param, **optimizer.state[param]} for name, param in params.items()}


# Weights of more bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [name for name in BUILDS if name != "SparseAdamW"])
def test_32_bits_are_training_in_float32_bit_for_bit(build: str, backend: str) -> None:
    steps = 1000 if backend == "native" and build == "EPIAdamW" else 60
    ours, theirs = weights(), weights()
    for name, param in theirs.items():
        theirs[name] = Parameter(param.detach().float())
    optimizer, exact = (
        BUILDS[build](ours, master_weight_bits=32, backend=backend),
        BUILDS[build](theirs, backend=backend),
    )
    train(optimizer, ours, 1, steps)
    train(exact, theirs, 1, steps)
    for name, param in ours.items():
        state, expected = dict(optimizer.state[param]), exact.state[theirs[name]]
        assert same(split.joined(param.detach(), state.pop("rest")), theirs[name].detach())
        assert same(state, expected)
        moved = theirs[name].detach() != weights()[name].float()
        assert moved.any()


def test_a_step_too_small_for_bfloat16_moves_the_weight_all_the_same() -> None:
    def moved(dtype: torch.dtype, **settings: Any) -> Tensor:
        params = weights(dtype)
        optimizer = EPIAdamW(params.items(), lr=2e-5, weight_decay=0.0, isolation_ratio=0, **settings)
        for _ in range(100):
            train(optimizer, params, 1, 1)
        param = params["layers.0.wide"]
        rest = optimizer.state[param].get("rest")
        now = param.detach() if rest is None else split.joined(param.detach(), rest)
        return now.double() - weights()["layers.0.wide"].detach().double()

    exact = moved(FP32)

    def share(**settings: Any) -> float:
        """Return how far the weights go of the way that they go in float32."""
        return float((moved(BF16, **settings) * exact).sum() / exact.square().sum())

    assert share() < 0.3
    assert 0.8 < share(rounding="stochastic") < 1.2
    assert 0.95 < share(master_weight_bits=24, rounding="stochastic") < 1.05
    assert 0.9999 < share(master_weight_bits=32) < 1.0001


# Protected entries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "settings"), CASES)
def test_protected_and_frozen_entries_keep_their_bits_under_any_gradient(
    build: str, settings: dict[str, Any], backend: str
) -> None:
    params = weights()
    optimizer = BUILDS[build](params, backend=backend, **settings)
    train(optimizer, params, 1, 7)
    masks = {
        name: ~optimizer.trainable_mask(param) if build == "SparseAdamW" else optimizer.isolation_mask(param)
        for name, param in params.items()
    }
    before = copy.deepcopy(all_of(optimizer, params))
    for param, grad in zip(params.values(), gradients(8), strict=True):
        param.grad = torch.where(torch.rand(param.shape) < 0.3, torch.nan, grad.to(param.dtype))
    optimizer.step()
    moved = 0
    assert sum(int(mask.sum()) for mask in masks.values()) > 500
    for name, param in params.items():
        assert same(param.detach()[masks[name]], before[name]["param"].detach()[masks[name]])
        if "rest" in before[name] and build != "SparseAdamW":
            rest = optimizer.state[param]["rest"]
            assert same(rest[masks[name]], before[name]["rest"][masks[name]])
        free, was = param.detach()[~masks[name]], before[name]["param"].detach()[~masks[name]]
        moved += int((free != was).sum())
    assert moved > 0


@pytest.mark.parametrize(("build", "settings"), CASES)
def test_one_gradient_that_is_not_finite_damages_its_entry_alone(
    build: str, settings: dict[str, Any], backend: str
) -> None:
    params, clean = weights(), weights()
    optimizers = [BUILDS[build](these, backend=backend, **settings) for these in (params, clean)]
    for optimizer, these in zip(optimizers, (params, clean), strict=True):
        train(optimizer, these, 1, 4)
        for param, grad in zip(these.values(), gradients(5), strict=True):
            param.grad = grad.to(param.dtype)
    for param, other in zip(params.values(), clean.values(), strict=True):
        assert param.grad is not None
        assert other.grad is not None
        other.grad.view(-1)[5] = 0.0  # as in the other, the entry contributes to no scale
        param.grad.view(-1)[5] = torch.inf
    for optimizer in optimizers:
        optimizer.step()
    for param, other in zip(params.values(), clean.values(), strict=True):
        differ = (bits(param) != bits(other)).view(-1)
        # in blocks of 8 bits the scale follows from the finite values: that of the moments of an entry with gradient 0
        # counts, that of an infinite one does not
        block = differ.clone()
        block[5] = False
        if "exp_avg_codes" not in optimizers[0].state[param]:
            assert not block.any()
        else:
            assert not block[64:].any()
        assert not param.detach().view(-1)[6:].isnan().any()


# Noise ---------------------------------------------------------------------------------------------------------------


def run(names: Callable[[str], str] | None = str, settings: dict[str, Any] | None = None) -> dict[str, Parameter]:
    params = weights()
    named = params.values() if names is None else [(names(name), param) for name, param in params.items()]
    optimizer = EPIAdamW(named, lr=1e-2, isolation_ratio=0, **(settings or {"rounding": "stochastic"}))
    train(optimizer, params, 1, 3)
    return params


def equal(one: dict[str, Parameter], other: dict[str, Parameter]) -> bool:
    return all(same(one[name].detach(), other[name].detach()) for name in one)


def test_noise_knows_a_parameter_by_its_name_without_what_wrappers_add() -> None:
    assert equal(run(), run(lambda name: f"module._orig_mod.{name}"))
    assert not equal(run(), run(lambda name: f"other.{name}"))


def test_noise_knows_a_parameter_without_a_name_by_its_position_across_groups() -> None:
    one, other = weights(), weights()
    first = EPIAdamW(list(one.values()), lr=1e-2, isolation_ratio=0, rounding="stochastic", layers="tensor")
    halves = list(other.values())
    second = EPIAdamW(
        [{"params": halves[:2]}, {"params": halves[2:]}],
        lr=1e-2,
        isolation_ratio=0,
        rounding="stochastic",
        layers="tensor",
    )
    train(first, one, 1, 3)
    train(second, other, 1, 3)
    assert equal(one, other)


def test_a_seed_changes_the_noise_and_torchs_generators_do_not() -> None:
    params = weights()
    groups = [{"params": list(params.items()), "rounding_seed": 7}]
    seeded = EPIAdamW(groups, lr=1e-2, isolation_ratio=0, rounding="stochastic")
    train(seeded, params, 1, 3)
    assert not equal(params, run())
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert equal(run(), run())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seeded.state_dict()["param_groups"][0]["rounding_seed"] == 7


def test_noise_follows_the_place_of_an_entry_whatever_the_memory_format(backend: str) -> None:
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(16, 32, 3, 3, generator=generator).to(BF16)
        param = Parameter(values.to(memory_format=form))
        optimizer = EPIAdamW(
            [("w", param)], lr=1e-2, rounding="stochastic", state_dtype="8bit", mask_interval=2, backend=backend
        )
        for _ in range(3):
            param.grad = torch.randn(values.shape, generator=generator).to(BF16).to(memory_format=form)
            optimizer.step()
        found.append(param.detach().contiguous())
    assert same(*found)


# Checkpoints and copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "settings"), CASES)
@pytest.mark.parametrize("how", ["loaded", "deepcopy", "pickle"])
def test_a_resumed_run_is_the_uninterrupted_one(build: str, settings: dict[str, Any], how: str, backend: str) -> None:
    params, other = weights(), weights(seed=1)
    optimizer = BUILDS[build](params, backend=backend, **settings)
    train(optimizer, params, 1, 4)
    if how == "loaded":
        twin = BUILDS[build](other, backend=backend, **settings)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for name, param in other.items():
            param.data.copy_(params[name].data)
    else:
        copied = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        twin, flat = copied, [param for group in copied.param_groups for param in group["params"]]
        other = dict(zip(params, flat, strict=True))
    train(optimizer, params, 5, 10)
    train(twin, other, 5, 10)
    assert same(all_of(optimizer, params), all_of(twin, other))


@pytest.mark.parametrize(("build", "settings"), [case for case in CASES if "Sparse" not in str(case.id)])
def test_released_gradients_step_alike(build: str, settings: dict[str, Any], backend: str) -> None:
    found = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64)).to(BF16)
        named = dict(model.named_parameters())
        optimizer = BUILDS[build](named, backend=backend, **settings)
        if released:
            release_gradients(model, optimizer)
        for step in range(4):
            inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(BF16)
            model(inputs).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if "EPI" not in build:  # a released refresh comes after the step, not before
            found.append({name: param.detach() for name, param in named.items()})
    assert not found or same(*found)


# What a framework has made ------------------------------------------------------------------------------------------


def test_moments_that_a_framework_made_in_bfloat16_stay_so_and_are_rounded_stochastically(backend: str) -> None:
    params = weights(FP32)
    optimizer = BUILDS["EPIAdamW"](params, backend=backend)
    for param in params.values():
        optimizer.state[param] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(param, dtype=BF16),
            "exp_avg_sq": torch.zeros_like(param, dtype=BF16),
        }
    other = weights(FP32)
    asked = BUILDS["EPIAdamW"](other, backend=backend, state_dtype=BF16, importance_dtype=FP32)
    train(optimizer, params, 1, 5)
    train(asked, other, 1, 5)
    assert same(all_of(optimizer, params), all_of(asked, other))
    assert optimizer.state[params["layers.0.wide"]]["exp_avg_sq"].dtype == BF16


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_parameters_of_16_bits_have_moments_in_float32_unless_asked(dtype: torch.dtype) -> None:
    params = weights(dtype)
    optimizer = BUILDS["EPIAdamW"](params)
    train(optimizer, params, 1, 1)
    assert {value.dtype for value in optimizer.state[params["layers.0.wide"]].values()} == {FP32}


@pytest.mark.parametrize("settings", STORAGES.values(), ids=STORAGES)
def test_gradients_of_another_dtype_than_their_parameter(settings: dict[str, Any], backend: str) -> None:
    found = []
    for dtype in (BF16, FP32):
        params = weights()
        for param in params.values():
            param.grad_dtype = None
        optimizer = BUILDS["EPIAdamW"](params, backend=backend, **settings)
        for step in range(1, 5):
            for param, grad in zip(params.values(), gradients(step), strict=True):
                param.grad = grad.to(dtype)
            optimizer.step()
        found.append(all_of(optimizer, params))
    assert same(*found)


def test_a_float32_parameter_beside_bfloat16_ones_has_no_rest() -> None:
    params = weights()
    params["layers.1.norm"] = Parameter(params["layers.1.norm"].detach().float())
    optimizer = BUILDS["EPIAdamW"](params, master_weight_bits=32, rounding="nearest")
    train(optimizer, params, 1, 2)
    assert ["rest" in optimizer.state[param] for param in params.values()] == [True, True, True, False]


def test_storages_may_differ_by_group() -> None:
    params = weights()
    first, *others = params.items()
    groups = [{"params": [first], "state_dtype": "8bit"}, {"params": others, "importance_dtype": BF16}]
    optimizer = EPIAdamW(groups, lr=1e-2, isolation_ratio=0.1, mask_interval=2)
    train(optimizer, params, 1, 5)
    keys = [set(optimizer.state[param]) for param in params.values()]
    assert {"exp_avg_codes", "importance_scales"} < keys[0]
    assert optimizer.state[others[0][1]]["importance"].dtype == BF16
    assert optimizer.state[others[0][1]]["exp_avg"].dtype == FP32
    record = optimizer.telemetry()[-1]
    assert record["protected"] >= int(0.1 * sum(param.numel() for param in params.values()))


# Errors --------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "unknown dtype": ({"state_dtype": torch.float16}, FP32, "Invalid state_dtype: torch.float16"),
    "unknown text": ({"importance_dtype": "4bit"}, FP32, "Invalid importance_dtype: '4bit'"),
    "unknown rounding": ({"rounding": "up"}, FP32, "Invalid rounding: 'up'"),
    "unknown bits": ({"master_weight_bits": 16}, BF16, "Invalid master_weight_bits: 16"),
    "a bool for bits": ({"master_weight_bits": True}, BF16, "Invalid master_weight_bits: True"),
    "exact and stochastic": ({"master_weight_bits": 32, "rounding": "stochastic"}, BF16, "rounding='stochastic'"),
    "bits of float32": ({"master_weight_bits": 32}, FP32, "no parameter is bfloat16"),
    "bits of float16": ({"master_weight_bits": 24}, torch.float16, "no parameter is bfloat16"),
    "amsgrad in 8 bits": ({"state_dtype": "8bit", "amsgrad": True}, FP32, "amsgrad=True with state_dtype='8bit'"),
    "float64": ({"state_dtype": BF16}, torch.float64, "state_dtype=torch.bfloat16 and .*, which is torch.float64"),
    "complex": ({"state_dtype": "8bit"}, torch.complex64, "which is torch.complex64"),
    "differentiable": ({"rounding": "stochastic", "differentiable": True}, FP32, "differentiable=True with rounding"),
    "another storage of the same slot": (
        {"importance": "exp_avg_sq", "importance_dtype": BF16},
        FP32,
        "importance='exp_avg_sq' with importance_dtype",
    ),
}


@pytest.mark.parametrize(("settings", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        EPIAdamW(weights(dtype).items(), **settings)
    if "amsgrad" in settings or "differentiable" in settings:
        return
    params = weights(BF16 if dtype == BF16 else FP32)
    optimizer = EPIAdamW(params.items())
    train(optimizer, params, 1, 1)
    before = copy.deepcopy(all_of(optimizer, params))
    if dtype in (BF16, FP32) and "importance" not in settings and "no parameter" not in message:
        optimizer.param_groups[0].update(settings)
        with pytest.raises((ValueError, NotImplementedError), match=message):
            train(optimizer, params, 2, 2)
        assert same(all_of(optimizer, params), before)


def test_8_bits_are_refused_where_no_tensor_is_large_enough() -> None:
    small = [("w", Parameter(torch.zeros(64, 63))), ("v", Parameter(torch.zeros(8192)))]
    with pytest.raises(ValueError, match="no parameter has 2 dimensions, 4096 entries and rows of 64"):
        EPIAdamW(small, state_dtype="8bit")
    with pytest.raises(ValueError, match="Invalid state_dtype: '8bit'; the moments of few entries"):
        SparseAdamW(weights().items(), trainable={}, state_dtype="8bit")


def test_other_bits_than_those_of_the_rests_are_refused_before_a_step() -> None:
    params = weights()
    optimizer = BUILDS["EPIAdamW"](params, master_weight_bits=32)
    train(optimizer, params, 1, 2)
    before = copy.deepcopy(all_of(optimizer, params))
    optimizer.param_groups[0]["master_weight_bits"] = 24
    with pytest.raises(ValueError, match="master_weight_bits=24 in the group of layers.0.wide"):
        train(optimizer, params, 3, 3)
    assert same(all_of(optimizer, params), before)


def test_float32_is_accepted_wherever_none_means_it() -> None:
    one, other = weights(), weights()
    plain, asked = BUILDS["EPIAdamW"](one), BUILDS["EPIAdamW"](other, state_dtype=FP32, importance_dtype=FP32)
    train(plain, one, 1, 4)
    train(asked, other, 1, 4)
    assert same(all_of(plain, one), all_of(asked, other))


# Backends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [one for one in AVAILABLE if one != "reference"])
@pytest.mark.parametrize(
    ("build", "settings"),
    [
        ("EPIAdamW", STORAGES["bfloat16"]),
        ("EPIAdamW", STORAGES["24 bits"]),
        ("EPIAdamW", STORAGES["32 bits"]),
        ("EPIAdamW, exp_avg_sq", STORAGES["24 bits"]),
        ("EPILion", STORAGES["stochastic"]),
        ("SparseAdamW", STORAGES["24 bits, stochastic"]),
    ],
)
def test_every_backend_takes_the_same_steps(build: str, settings: dict[str, Any], backend: str) -> None:
    found = []
    for one in (backend, "reference"):
        params = weights()
        optimizer = BUILDS[build](params, backend=one, **settings)
        for group in optimizer.param_groups:
            if "mask_interval" in group:
                group["mask_interval"] = 2
        train(optimizer, params, 1, 2)
        found.append(all_of(optimizer, params))
    assert same(*found)
