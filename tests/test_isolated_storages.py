"""IsolatedOptimizer with importances in bfloat16 and in blocks of 8 bits.

- Masks and importances are EPIAdamW's with the same importance_dtype, bit for bit, where both clocks are equal.
- Checkpoints, copies, DTensors and a step in which the base raises work in each storage as in float32.
- What a parameter or a state cannot have is refused by name, before anything has changed.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from states import same_state
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from epi_kernels import EPIAdamW, IsolatedOptimizer
from epi_kernels.isolation.guest import HostedIsolation

# the first two have blocks of 8 bits, the second with a ragged end of each row
SHAPES = {"h.0.weight": (64, 128), "h.1.weight": (50, 90), "h.1.bias": (50,), "head.weight": (11, 5), "head.scale": ()}
CODED = ("h.0.weight", "h.1.weight")
BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}
COMPACT: list[Any] = [torch.bfloat16, "8bit"]
each_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
each_storage = pytest.mark.parametrize("dtype", [None, *COMPACT], ids=str)
each_compact = pytest.mark.parametrize("dtype", COMPACT, ids=str)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def train(params: dict[str, Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Take steps in which every parameter has a gradient, so that all clocks are equal."""
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def isolated(params: dict[str, Parameter], make: Any, dtype: Any, **settings: Any) -> IsolatedOptimizer:
    own = {"isolation_ratio": 0.2, "mask_interval": 3, "importance_dtype": dtype, **settings}
    return IsolatedOptimizer(make(params.items()), **own)


def adamw(params: dict[str, Parameter], dtype: Any) -> EPIAdamW:
    return EPIAdamW(params.items(), isolation_ratio=0.2, mask_interval=3, importance_dtype=dtype)


def kept(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """Return what the state of a parameter has of its importance."""
    return {key: value for key, value in optimizer.state[param].items() if key.startswith("importance")}


def same_importances(params: dict[str, Parameter], ours: Any, twins: dict[str, Parameter], theirs: Any) -> bool:
    return all(same_state(kept(ours, params[name]), kept(theirs, twins[name])) for name in params)


class Stateless(torch.optim.SGD):
    """A base that has no state, not even an empty one."""

    @property  # type: ignore[override]
    def state(self) -> Any:
        raise AttributeError("there is none")

    @state.setter
    def state(self, state: Any) -> None: ...

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            param.sub_(param.grad, alpha=0.1)


@pytest.mark.parametrize("make", [*BASES.values(), Stateless], ids=[*BASES, "stateless"])
@each_storage
def test_importances_and_masks_have_the_bits_of_epiadamws_and_protected_entries_stay(make: Any, dtype: Any) -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = isolated(params, make, dtype), adamw(twins, dtype)
    for step in range(1, 9):
        before = {name: param.detach().clone() for name, param in params.items()}
        train(params, optimizer, step, step)
        train(twins, twin, step, step)
        assert same_importances(params, optimizer, twins, twin), step
        for name, param in params.items():
            mask = optimizer.isolation_mask(param)
            assert torch.equal(param == before[name], mask)
            assert torch.equal(mask, twin.isolation_mask(twins[name]))
            assert torch.equal(optimizer.importance(param), twin.importance(twins[name]))
    assert sum(int(optimizer.isolation_mask(param).sum()) for param in params.values()) > 100
    for name, param in params.items():
        keys = {"importance_codes", "importance_scales"} if dtype == "8bit" and name in CODED else {"importance"}
        assert kept(optimizer, param).keys() == keys
        wanted = torch.float32 if dtype is None else torch.bfloat16
        assert all(value.dtype == wanted for key, value in kept(optimizer, param).items() if key == "importance")


@each_compact
def test_the_noise_has_the_clock_of_the_optimizer_whichever_parameters_have_gradients(dtype: Any) -> None:
    def skip_one(params: dict[str, Parameter], optimizer: torch.optim.Optimizer) -> None:
        train(params, optimizer, 1, 1)
        params["h.0.weight"].grad = None
        optimizer.step()
        train(params, optimizer, 3, 4)

    params, twins = parameters(), parameters()
    optimizer, twin = isolated(params, BASES["SGD"], dtype), adamw(twins, dtype)
    skip_one(params, optimizer)
    skip_one(twins, twin)
    assert same_state(kept(optimizer, params["h.1.weight"]), kept(twin, twins["h.1.weight"]))
    # EPIAdamW's clock of this parameter is one step behind
    assert not same_state(kept(optimizer, params["h.0.weight"]), kept(twin, twins["h.0.weight"]))
    plain, plain_twin = isolated(params, BASES["SGD"], None), adamw(twins, None)
    for each in (plain, plain_twin):
        each.state.clear()
    skip_one(params, plain)
    skip_one(twins, plain_twin)
    assert same_importances(params, plain, twins, plain_twin)


def test_groups_have_storages_and_seeds_of_their_own() -> None:
    params = parameters()
    names = list(params)
    groups = [
        {"params": [(names[0], params[names[0]])], "importance_dtype": "8bit", "rounding_seed": 5},
        {"params": [(names[1], params[names[1]])], "importance_dtype": torch.float32},
        {"params": [(name, params[name]) for name in names[2:4]]},
    ]
    optimizer = IsolatedOptimizer(
        torch.optim.SGD(groups, lr=0.1), isolation_ratio=0.2, mask_interval=3, importance_dtype=torch.bfloat16
    )
    optimizer.add_param_group({"params": [(names[4], params[names[4]])], "importance_dtype": None})
    train(params, optimizer, 1, 5)
    assert kept(optimizer, params[names[0]]).keys() == {"importance_codes", "importance_scales"}
    dtypes = [kept(optimizer, params[name])["importance"].dtype for name in names[1:]]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    twins = parameters()
    twin = isolated(twins, BASES["plain SGD"], "8bit")
    train(twins, twin, 1, 5)
    of_another_seed = kept(twin, twins[names[0]]), kept(optimizer, params[names[0]])
    assert not torch.equal(*(each["importance_codes"] for each in of_another_seed))
    assert torch.equal(kept(twin, twins[names[2]])["importance"], kept(optimizer, params[names[2]])["importance"])


@each_compact
@pytest.mark.parametrize("ours", [True, False], ids=["IsolatedOptimizer", "EPIAdamW"])
def test_a_seed_that_a_program_writes_holds_from_the_next_step_on_also_in_refreshes(dtype: Any, ours: bool) -> None:
    def made(params: dict[str, Parameter]) -> torch.optim.Optimizer:
        optimizer = isolated(params, BASES["SGD"], dtype) if ours else adamw(params, dtype)
        optimizer.param_groups[0]["mask_interval"] = 2
        return optimizer

    params, twins = parameters(), parameters()
    optimizer, twin = made(params), made(twins)
    train(params, optimizer, 1, 5)
    train(twins, twin, 1, 5)
    saved = copy.deepcopy(twin.state_dict())
    saved["param_groups"][0]["rounding_seed"] = optimizer.param_groups[0]["rounding_seed"] = 7
    twin.load_state_dict(saved)  # which prepares everything anew
    assert twin.param_groups[0]["rounding_seed"] == 7
    train(params, optimizer, 6, 9)
    train(twins, twin, 6, 9)
    assert same_importances(params, optimizer, twins, twin)


@each_base
@each_storage
def test_resumed_is_uninterrupted(make: Any, dtype: Any) -> None:
    straight = parameters()
    theirs = isolated(straight, make, dtype)
    train(straight, theirs, 1, 10)
    first = parameters()
    before = isolated(first, make, dtype)
    train(first, before, 1, 5)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    second = {n: Parameter(p.detach().clone()) for n, p in first.items()}
    after = isolated(second, make, dtype, isolation_ratio=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after.load_state_dict(torch.load(file, weights_only=True))
    train(second, after, 6, 10)
    assert all(torch.equal(second[name], straight[name]) for name in SHAPES)
    assert same_importances(second, after, straight, theirs)


@pytest.mark.parametrize("saved", [None, *COMPACT], ids=str)
@pytest.mark.parametrize("asked", [None, torch.float32, *COMPACT], ids=str)
def test_a_checkpoint_of_another_storage_is_converted_with_one_warning(saved: Any, asked: Any) -> None:
    first, second = parameters(), parameters()
    before, after = isolated(first, BASES["AdamW"], saved), isolated(second, BASES["AdamW"], asked)
    train(first, before, 1, 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        after.load_state_dict(copy.deepcopy(before.state_dict()))
    told = [str(one.message) for one in seen if "kept otherwise" in str(one.message)]
    same = (saved, asked) in [(None, torch.float32), (saved, saved)]
    # all are converted but those that "8bit" keeps in bfloat16
    more = "1 others" if {saved, asked} == set(COMPACT) else "4 others"
    text = f"this optimizer keeps its own: importance of h.0.weight and {more} were converted, rounded to nearest"
    assert [one[one.index("this") :] for one in told] == ([] if same else [text])
    assert after.param_groups[0].get("importance_dtype") == asked
    for name, param in second.items():
        assert torch.equal(after.isolation_mask(param), before.isolation_mask(first[name]))
        own, other = after.importance(param), before.importance(first[name])
        # neighbours in 8 bits are up to 2 c + 1 = 253 units of 126^2 apart; in bfloat16 2^-8 of the value
        assert ((own - other).abs() <= other.max() * 128 / 126**2).all() or name not in CODED
        assert ((own - other).abs() <= other * 2**-8).all() or name in CODED
    fresh = isolated(parameters(), BASES["AdamW"], asked)
    train(parameters_of(fresh), fresh, 1, 1)
    for param, one in zip(second.values(), parameters_of(fresh).values(), strict=True):
        assert {key: value.dtype for key, value in kept(after, param).items()} == {
            key: value.dtype for key, value in kept(fresh, one).items()
        }
    train(second, after, 5, 7)


def parameters_of(optimizer: IsolatedOptimizer) -> dict[str, Parameter]:
    return dict(zip(SHAPES, optimizer.param_groups[0]["params"], strict=True))


@each_storage
@pytest.mark.parametrize("kind", [pickle, copy], ids=["pickle", "deepcopy"])
def test_copies_go_on_as_the_original(kind: Any, dtype: Any) -> None:
    params = parameters()
    optimizer = isolated(params, BASES["AdamW"], dtype)
    train(params, optimizer, 1, 4)
    twin = copy.deepcopy(optimizer) if kind is copy else pickle.loads(pickle.dumps(optimizer))
    twins = parameters_of(twin)
    train(params, optimizer, 5, 8)
    train(twins, twin, 5, 8)
    assert all(torch.equal(params[name], twins[name]) for name in SHAPES)
    assert same_importances(params, optimizer, twins, twin)


@each_compact
@pytest.mark.parametrize("make", [*BASES.values(), Stateless], ids=[*BASES, "stateless"])
def test_the_base_sees_none_of_the_keys(make: Any, dtype: Any) -> None:
    params = parameters()
    optimizer = isolated(params, make, dtype)
    seen = []
    step = optimizer.base.step

    def looks() -> None:
        for entry in getattr(optimizer.base, "state", {}).values():
            seen.extend(entry)
        step()

    optimizer.base.step = looks  # type: ignore[method-assign,assignment]
    train(params, optimizer, 1, 4)
    assert not [key for key in seen if str(key).startswith("importance")]
    assert all(kept(optimizer, param) for param in params.values())


@each_storage
@pytest.mark.parametrize("last", [0, 1, 2, 5], ids=["the first step", "between refreshes", "at the first", "at one"])
def test_where_the_base_raises_masks_and_clock_are_as_before(last: int, dtype: Any) -> None:
    class Raises(torch.optim.SGD):
        out_of_memory = False

        def step(self, closure: Any = None) -> Any:
            super().step()
            if self.out_of_memory:
                raise MemoryError("of the base")

    params = parameters()
    optimizer = isolated(params, lambda p: Raises(p, lr=0.1, momentum=0.9), dtype)
    train(params, optimizer, 1, last)
    masks = {name: optimizer.isolation_mask(param) for name, param in params.items()}
    before = {name: param.detach().clone() for name, param in params.items()}
    groups, telemetry = copy.deepcopy(optimizer.state_dict()["param_groups"]), optimizer.telemetry()
    optimizer.base.out_of_memory = True  # type: ignore[attr-defined]
    with pytest.raises(MemoryError, match="of the base"):
        train(params, optimizer, last + 1, last + 1)
    for name, param in params.items():
        assert torch.equal(optimizer.isolation_mask(param), masks[name])
        assert torch.equal(param[masks[name]], before[name][masks[name]])
        assert last or not kept(optimizer, param)
    assert optimizer.state_dict()["param_groups"] == groups
    assert optimizer.telemetry() == telemetry
    optimizer.base.out_of_memory = False  # type: ignore[attr-defined]
    train(params, optimizer, last + 1, last + 2)


@each_compact
def test_places_are_looked_up_once_and_in_float32_never(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    place = HostedIsolation.place
    monkeypatch.setattr(HostedIsolation, "place", lambda *args: asked.append(args[2]) or place(*args))
    params, twins = parameters(), parameters()
    train(params, isolated(params, BASES["SGD"], None, mask_interval=None), 1, 3)
    assert not asked
    train(twins, isolated(twins, BASES["SGD"], dtype, mask_interval=None), 1, 3)
    assert len(asked) == len(SHAPES)


@pytest.mark.parametrize("change", ["written", "codes deleted", "in place", "another tensor"])
def test_what_a_program_writes_into_state_and_groups_holds(change: str) -> None:
    params = parameters()
    optimizer = isolated(params, BASES["SGD"], "8bit", mask_interval=None)
    train(params, optimizer, 1, 2)
    optimizer.refresh()
    param = params["h.0.weight"]
    mask, state = optimizer.isolation_mask(param), optimizer.state[param]
    assert mask.any()
    if change == "written":
        optimizer.param_groups[0]["importance_dtype"] = None
    elif change == "codes deleted":
        del state["importance_codes"]
        mask = torch.zeros_like(mask)
    else:
        mask = torch.rand(param.shape) < 0.5
        codes = state["importance_codes"]
        new = (codes & 127) | mask.to(torch.uint8) << 7
        state["importance_codes"] = codes.copy_(new) if change == "in place" else new
    before = param.detach().clone()
    train(params, optimizer, 3, 3)
    assert torch.equal(param == before, mask)
    assert kept(optimizer, param).keys() == (
        {"importance"} if change == "written" else {"importance_codes", "importance_scales"}
    )


# What is refused ----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "float64": (
        lambda p: p | {"extra": Parameter(torch.ones(3, dtype=torch.float64))},
        torch.bfloat16,
        NotImplementedError,
        r"importance_dtype=torch.bfloat16 and extra, which is torch.float64",
    ),
    "complex": (
        lambda p: p | {"extra": Parameter(torch.ones(3, dtype=torch.complex64))},
        "8bit",
        NotImplementedError,
        "importance_dtype='8bit' and extra, which is torch.complex64",
    ),
    "none large enough": (
        lambda p: {name: p[name] for name in ("head.weight", "head.scale")},
        "8bit",
        ValueError,
        "importance_dtype='8bit', and no parameter has 2 dimensions, 4096 entries and rows of 64",
    ),
    "no storage": (lambda p: p, torch.float16, ValueError, "Invalid importance_dtype: torch.float16"),
}


@pytest.mark.parametrize(("change", "dtype", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("when", ["constructed", "written", "loaded"])
def test_what_a_parameter_cannot_have_is_refused_and_changes_nothing(
    change: Any, dtype: Any, error: type[Exception], message: str, when: str
) -> None:
    params = change(parameters())
    base = BASES["SGD"](params.items())
    if when == "constructed":
        before = dict(base.param_groups[0])
        with pytest.raises(error, match=message):
            IsolatedOptimizer(base, importance_dtype=dtype)
        assert base.param_groups[0] == before
        return
    start = {"isolation_ratio": 0.0} if when == "loaded" else {"isolation_ratio": 0.2}
    if when == "loaded":
        if dtype is torch.float16:
            return  # a load takes no importance_dtype
        # an exempt group may ask for what its parameters cannot have, until its ratio is another
        optimizer = IsolatedOptimizer(base, importance_dtype=dtype, mask_interval=3, **start)
    else:
        optimizer = IsolatedOptimizer(base, mask_interval=3, **start)
    train(params, optimizer, 1, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    if when == "written":
        optimizer.param_groups[0]["importance_dtype"] = dtype
        values = {name: param.detach().clone() for name, param in params.items()}
        with pytest.raises(error, match=message):
            train(params, optimizer, 3, 3)
        assert all(torch.equal(param, values[name]) for name, param in params.items())
        del optimizer.param_groups[0]["importance_dtype"]
    else:
        wrong = copy.deepcopy(saved)
        wrong["param_groups"][0]["isolation_ratio"] = 0.2
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(wrong)
    assert same_state(optimizer.state_dict(), saved)
    train(params, optimizer, 3, 4)


def test_a_group_that_is_added_or_constructed_is_refused_whole() -> None:
    params = parameters()
    optimizer = isolated(params, BASES["SGD"], "8bit")
    train(params, optimizer, 1, 2)
    before = copy.deepcopy(optimizer.state_dict())
    wide = Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="importance_dtype='8bit' and wide, which is torch.float64"):
        optimizer.add_param_group({"params": [("wide", wide)]})
    assert same_state(optimizer.state_dict(), before)
    optimizer.add_param_group({"params": [("wide", wide)], "importance_dtype": torch.float32})
    groups = [{"params": list(params.items())}, {"params": [("wide", wide)], "rounding_seed": 1 << 70}]
    base = torch.optim.SGD(groups, lr=0.1)
    seen = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match="Invalid rounding_seed"):
        IsolatedOptimizer(base)
    assert base.param_groups == seen


MISFITS: dict[str, tuple[Any, str]] = {
    "scales of another shape": (
        lambda e: e.update(importance_scales=torch.zeros(64, 4)),
        r"importance_scales of h.0.weight has shape \(64, 4\) in the state, and \(64, 2\) here: blocks of 8 bits have ",
    ),
    "codes without scales": (
        lambda e: e.pop("importance_scales"),
        "the state of h.0.weight has importance_codes and no importance_scales",
    ),
    "scales without codes": (
        lambda e: e.pop("importance_codes"),
        "the state of h.0.weight has importance_scales and no importance_codes",
    ),
    "codes of another shape": (
        lambda e: e.update(importance_codes=torch.zeros(3, dtype=torch.uint8)),
        r"importance_codes of h.0.weight has shape \(3,\) in the state, and \(64, 128\) here",
    ),
    "codes that were cast and lost bits": (
        lambda e: e.update(importance_codes=e["importance_codes"].float() + 0.5),
        "importance_codes of h.0.weight in the state: it is torch.float32, and torch.uint8 here",
    ),
    "scales that were cast": (
        lambda e: e.update(importance_scales=e["importance_scales"].bfloat16()),
        "importance_scales of h.0.weight in the state: it is torch.bfloat16, and scales are float32",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("asked", ["8bit", None], ids=str)
def test_codes_that_do_not_fit_are_named_and_change_nothing(change: Any, message: str, asked: Any) -> None:
    params, others = parameters(), parameters()
    optimizer, other = isolated(params, BASES["AdamW"], "8bit"), isolated(others, BASES["AdamW"], asked)
    train(params, optimizer, 1, 4)
    train(others, other, 1, 2)
    wrong, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(other.state_dict())
    change(wrong["state"][0])
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(wrong)
    assert same_state(other.state_dict(), before)
    train(others, other, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_that_another_loader_has_cast_are_narrowed_where_nothing_is_lost(dtype: torch.dtype) -> None:
    params, others = parameters(), parameters()
    optimizer, other = isolated(params, BASES["AdamW"], "8bit"), isolated(others, BASES["AdamW"], "8bit")
    train(params, optimizer, 1, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        if "importance_codes" in entry:
            entry["importance_codes"] = entry["importance_codes"].to(dtype)
    other.load_state_dict(saved)
    assert same_importances(params, optimizer, others, other)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("importance_codes", lambda t: t.float()),
        ("importance_codes", lambda t: t[:3]),
        ("importance_scales", lambda t: t[:, :1]),
        ("importance_scales", lambda t: t.double()),
        ("importance_scales", None),
    ],
)
def test_codes_in_the_state_that_are_not_the_parameter_s_are_named_and_change_nothing(key: str, change: Any) -> None:
    params = parameters()
    optimizer = isolated(params, BASES["AdamW"], "8bit")
    train(params, optimizer, 1, 3)
    entry = optimizer.state[params["h.0.weight"]]
    own = entry.pop(key)
    entry.update({} if change is None else {key: change(own)})
    before = [p.detach().clone() for p in params.values()]
    with pytest.raises(ValueError, match=rf'state\[p\]\["{key}"\] of h.0.weight is '):
        train(params, optimizer, 4, 4)
    entry[key] = own
    assert same_state([p.detach() for p in params.values()], before)
    assert optimizer.param_groups[0]["isolation_clock"] == 3
    train(params, optimizer, 4, 4)


# Shards -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1])
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Return a mesh whose ranks but this one do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield init_device_mesh("cpu", (request.param,))
    dist.destroy_process_group()


def sharded(param: Tensor, mesh: DeviceMesh, dim: int = 0) -> Tensor:
    placements = [Shard(dim) if param.dim() else Replicate()]
    return distribute_tensor(param.detach().clone(), mesh, placements, src_data_rank=None)


@each_storage
@pytest.mark.parametrize("dim", [0, 1])
def test_dtensors_go_on_from_a_state_of_one_process_and_from_one_of_theirs(
    dtype: Any, dim: int, mesh: DeviceMesh
) -> None:
    params = {name: p for name, p in parameters().items() if dim == 0 or name == "h.0.weight"}
    optimizer = isolated(params, BASES["AdamW"], dtype)
    train(params, optimizer, 1, 4)
    shards = {name: Parameter(sharded(param, mesh, dim)) for name, param in params.items()}
    other = isolated(shards, BASES["AdamW"], dtype)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for last in (6, 8):
        for step in range(last - 1, last + 1):
            train(params, optimizer, step, step)
            for name, shard in shards.items():
                grad = params[name].grad
                assert grad is not None
                shard.grad = sharded(grad, mesh, dim)
            other.step()
        for name, param in params.items():
            assert torch.equal(param, shards[name].to_local())  # type: ignore[attr-defined]
            theirs = {key: value.to_local() for key, value in kept(other, shards[name]).items()}
            assert same_state(kept(optimizer, param), theirs)
        saved = other.state_dict()
        other = isolated(shards, BASES["AdamW"], dtype)
        other.load_state_dict(saved)


@pytest.mark.parametrize("mesh", [2], indirect=True)
def test_shards_that_cut_blocks_are_refused_and_change_nothing(mesh: DeviceMesh) -> None:
    shards = {"w": Parameter(sharded(torch.randn(64, 192), mesh, 1))}  # 96 entries of a row for each rank
    base = BASES["SGD"](shards.items())
    before = dict(base.param_groups[0])
    with pytest.raises(NotImplementedError, match="importance_dtype='8bit' and w, placed .* cut blocks of 64 entries"):
        IsolatedOptimizer(base, importance_dtype="8bit")
    assert base.param_groups[0] == before
    IsolatedOptimizer(base, importance_dtype=torch.bfloat16)


@pytest.mark.parametrize("mesh", [4], indirect=True)
@pytest.mark.usefixtures("mesh")
def test_shards_without_a_place_for_the_noise_are_refused_and_change_nothing() -> None:
    whole, squares = torch.randn(4, 8, 8), init_device_mesh("cpu", (2, 2))
    param = Parameter(distribute_tensor(whole, squares, [Shard(1), Shard(2)], src_data_rank=None))
    base = BASES["SGD"]([("w", param)])
    before = dict(base.param_groups[0])
    with pytest.raises(NotImplementedError, match="w is placed .* over several of its inner dimensions"):
        IsolatedOptimizer(base, importance_dtype=torch.bfloat16)
    assert base.param_groups[0] == before
    IsolatedOptimizer(base)
