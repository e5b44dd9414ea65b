"""IsolatedOptimizer: protected entries keep their bits under any torch optimizer, and all else is the base's.

- Off, a run is the base's, bit for bit; on, protected entries stay and the others move as the base moves them.
- Its masks are EPIAdamW's, given the same gradients.
- Schedulers, scalers, checkpoints, pickling and groups work as with the base, whatever form its state has.
- The base sees the state that it made, and a step in which it raises has chosen no masks.
"""

import contextlib
import copy
import functools
import gc
import io
import pickle
import weakref
from collections import defaultdict
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
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from epi_kernels import EPIAdamW, IsolatedOptimizer, lock

SHAPES = {"h.0.weight": (30, 7), "h.0.bias": (30,), "head.weight": (11, 5), "head.scale": ()}
BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
}
each_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def train(params: dict[str, Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params.values()):
            grad = torch.randn(param.shape, generator=generator) * 10.0**-i
            param.grad = None if (step + i) % 5 == 0 and i else grad.to(param.dtype)
        optimizer.step()


def isolated(params: dict[str, Parameter], make: Any, **settings: Any) -> IsolatedOptimizer:
    return IsolatedOptimizer(make(params.items()), **{"isolation_ratio": 0.2, "mask_interval": 4, **settings})


@each_base
def test_off_it_is_the_base(make: Any) -> None:
    ours, theirs = parameters(), parameters()
    train(ours, isolated(ours, make, isolation_ratio=0.0), 1, 12)
    train(theirs, make(theirs.items()), 1, 12)
    for name in SHAPES:
        assert torch.equal(ours[name], theirs[name])


@each_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_protected_stay_and_the_others_move_as_the_base_moves_them(make: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = isolated(params, make)
    for step in range(1, 14):
        before = {name: p.detach().clone() for name, p in params.items()}
        twin = copy.deepcopy(optimizer.base)
        twins = dict(zip(params, twin.param_groups[0]["params"], strict=True))
        train(params, optimizer, step, step)
        train(twins, twin, step, step)
        for name, param in params.items():
            mask = optimizer.isolation_mask(param)
            assert torch.equal(param[mask], before[name][mask])
            assert torch.equal(param[~mask], twins[name][~mask])
    eligible = sum(p.numel() for p in params.values())
    assert optimizer.telemetry()[-1]["protected"] == int(0.2 * eligible)
    assert optimizer.telemetry()[-1]["step"] == 12


def test_around_muon_which_takes_matrices_alone() -> None:
    params = {name: p for name, p in parameters().items() if p.dim() == 2}
    twins = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    optimizer = isolated(params, lambda p: torch.optim.Muon(p, lr=0.1))
    twin = torch.optim.Muon(twins.items(), lr=0.1)
    for step in range(1, 6):
        for name, q in twins.items():
            q.data.copy_(params[name])
        train(params, optimizer, step, step)
        train(twins, twin, step, step)
        for name, param in params.items():
            free = ~optimizer.isolation_mask(param)
            assert torch.equal(param[free], twins[name][free])
    assert optimizer.telemetry()[-1]["protected"] == int(0.2 * sum(p.numel() for p in params.values()))


@pytest.mark.parametrize("settings", [{}, {"scope": "layer"}, {"normalize": "none"}, {"layers": "tensor"}], ids=str)
def test_masks_and_importance_are_those_of_epiadamw(settings: dict[str, Any], backend: str) -> None:
    params, twins = parameters(), parameters()
    optimizer = isolated(params, BASES["SGD"], backend=backend, **settings)
    twin = EPIAdamW(twins.items(), isolation_ratio=0.2, mask_interval=4, backend=backend, **settings)
    train(params, optimizer, 1, 10)
    train(twins, twin, 1, 10)
    for name in SHAPES:
        assert torch.equal(optimizer.isolation_mask(params[name]), twin.isolation_mask(twins[name]))
        assert torch.equal(optimizer.importance(params[name]), twin.importance(twins[name]))
    assert [r["step"] for r in optimizer.telemetry()] == [r["step"] for r in twin.telemetry()] == [4, 8]


def test_protected_bits_survive_a_base_that_writes_nan() -> None:
    param = Parameter(torch.tensor([1.0, 2.0, -0.0, float("nan")]))
    optimizer = IsolatedOptimizer(
        torch.optim.SGD([param], lr=1.0), isolation_ratio=0.5, mask_interval=1, layers="tensor"
    )
    param.grad = torch.tensor([0.1, 0.2, 3.0, 4.0])
    optimizer.step()
    assert optimizer.isolation_mask(param).tolist() == [False, False, True, True]
    before = param.detach().clone().view(torch.int32)
    optimizer.param_groups[0]["mask_interval"] = None
    param.grad = torch.full((4,), float("nan"))
    with pytest.warns(RuntimeWarning, match="squared gradients were NaN"):
        optimizer.step()
    assert torch.equal(param.detach().view(torch.int32)[2:], before[2:])
    assert param.isnan().tolist() == [True, True, False, True]


def test_any_layout_and_complex_parameters() -> None:
    strided = torch.randn(6, 10)[:, ::2].t().requires_grad_()
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    z = torch.randn(6, dtype=torch.complex64, requires_grad=True)
    params = [strided, channels_last, z, torch.randn(0, 3, requires_grad=True)]
    optimizer = IsolatedOptimizer(
        torch.optim.SGD(params, lr=0.1), isolation_ratio=0.3, mask_interval=1, layers="tensor"
    )
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, dtype=param.dtype)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for param, one in zip(params, before, strict=True):
            mask = optimizer.isolation_mask(param)
            assert torch.equal(param[mask], one[mask])
            assert (param[~mask] != one[~mask]).all()
    assert int(optimizer.isolation_mask(z).sum()) > 0


def test_it_takes_a_base_s_place_for_schedulers_and_groups() -> None:
    params = parameters()
    base = BASES["SGD"](list(params.items())[:2])
    optimizer = IsolatedOptimizer(base, isolation_ratio=0.2, mask_interval=2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    optimizer.add_param_group({"params": list(params.items())[2:], "isolation_ratio": 0.0, "lr": 0.01})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(params, optimizer, 1, 4)
    scheduler.step()
    assert [group["lr"] for group in base.param_groups] == [0.05, 0.005]
    assert not optimizer.isolation_mask(params["head.weight"]).any()
    assert optimizer.isolation_mask(params["h.0.weight"]).any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params.values())
    with pytest.raises(ValueError, match="Invalid isolation_ratio: 2"):
        optimizer.add_param_group({"params": [("x", Parameter(torch.ones(1)))], "isolation_ratio": 2})
    assert len(base.param_groups) == 2
    assert "IsolatedOptimizer of SGD" in repr(optimizer)


def test_under_a_scaler_importance_sees_unscaled_gradients_and_a_skipped_step_moves_nothing() -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = isolated(params, BASES["AdamW fused"]), isolated(twins, BASES["AdamW fused"])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(1, 6):
        for p, q in zip(params.values(), twins.values(), strict=True):
            q.grad = torch.randn(q.shape)
            p.grad = q.grad * 1024.0
        scaler.scale(torch.zeros(()))  # a scaler steps after it has scaled a loss
        if step == 3:
            params["head.weight"].grad[0, 0] = float("inf")
            before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params.values()]
        scaler.step(optimizer)
        scaler.update(1024.0)
        if step == 3:
            assert same_state(optimizer.state_dict(), before[0])
            assert same_state([p.detach() for p in params.values()], before[1])
        else:
            twin.step()
    assert optimizer.telemetry()[-1]["step"] == 4
    for name in SHAPES:
        assert torch.equal(optimizer.importance(params[name]), twin.importance(twins[name]))


@each_base
def test_resumed_is_uninterrupted(make: Any) -> None:
    straight = parameters()
    train(straight, isolated(straight, make), 1, 22)
    first = parameters()
    before = isolated(first, make)
    train(first, before, 1, 10)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    second = {n: Parameter(p.detach().clone()) for n, p in first.items()}
    after = isolated(second, make, isolation_ratio=0.01)
    after.load_state_dict(torch.load(file, weights_only=True))
    train(second, after, 11, 22)
    for name in SHAPES:
        assert torch.equal(second[name], straight[name]), name


@pytest.mark.parametrize("kind", [pickle, copy], ids=["pickle", "deepcopy"])
def test_pickle_and_deepcopy_go_on_as_the_original(kind: Any) -> None:
    params = parameters()
    optimizer = isolated(params, torch.optim.Adagrad)
    train(params, optimizer, 1, 10)
    twin = copy.deepcopy(optimizer) if kind is copy else pickle.loads(pickle.dumps(optimizer))
    twins = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    train(params, optimizer, 11, 20)
    train(twins, twin, 11, 20)
    for name in SHAPES:
        assert torch.equal(params[name], twins[name]), name


def test_states_of_the_base_load_and_the_base_loads_ours() -> None:
    params = parameters()
    base = BASES["SGD"](params.items())
    train(params, base, 1, 3)
    twins = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    optimizer = isolated(twins, BASES["SGD"])
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    assert optimizer.param_groups[0]["isolation_ratio"] == 0.2
    train(params, base, 4, 5)
    train(twins, optimizer, 4, 5)  # no refresh before its own fourth step
    for name in SHAPES:
        assert torch.equal(params[name], twins[name])
    base.load_state_dict(optimizer.state_dict())
    train(params, base, 6, 6)


MISFITS: dict[str, tuple[Any, str]] = {
    "an impossible ratio": (
        lambda s: s["param_groups"][0].update(isolation_ratio=3),
        "parameter group 0 of the state: Invalid isolation_ratio: 3",
    ),
    "an impossible interval": (
        lambda s: s["param_groups"][0].update(mask_interval=0),
        "parameter group 0 of the state: Invalid mask_interval: 0",
    ),
    "an impossible clock": (
        lambda s: s["param_groups"][0].update(isolation_clock=-1),
        "parameter group 0 of the state: Invalid isolation_clock: -1",
    ),
    "an importance elsewhere": (
        lambda s: s["param_groups"][0].update(importance="exp_avg_sq"),
        "parameter group 0 of the state: importance='exp_avg_sq': a base has no place for it",
    ),
    "an importance of integers": (
        lambda s: s["state"][0].update(importance=torch.zeros(30, 7, dtype=torch.int64)),
        "importance of h.0.weight is torch.int64 in the state, and torch.float32 here",
    ),
    "an importance of another shape": (
        lambda s: s["state"][1].update(importance=torch.zeros(3)),
        r"importance of h.0.bias has shape \(3,\) in the state, and \(30,\) here",
    ),
    "an importance that is none": (
        lambda s: s["state"][2].update(importance=3.0),
        "importance of head.weight is a float and not a tensor",
    ),
    "a moment of another shape": (
        lambda s: s["state"][0].update(exp_avg=torch.zeros(7, 30)),
        r"exp_avg of h.0.weight has shape \(7, 30\) in the state, and \(30, 7\) here",
    ),
    "an entry without what the base needs": (
        lambda s: s["state"][1].pop("exp_avg"),
        "AdamW, the base, cannot go on from the state of h.0.bias: KeyError: 'exp_avg'",
    ),
    "an entry without a step": (
        lambda s: s["state"][1].pop("step"),
        "AdamW, the base, cannot go on from the state of h.0.bias: KeyError: 'step'",
    ),
    "an entry that is a text": (
        lambda s: s["state"][2].update(exp_avg_sq="x"),
        "AdamW, the base, cannot go on from the state of head.weight: ",
    ),
    "a list where a number is wanted": (
        lambda s: s["param_groups"][0].update(lr=[0.1]),
        "parameter group 0 of the state: AdamW, the base, cannot go on from the settings: TypeError",
    ),
    "a number where two are wanted": (
        lambda s: s["param_groups"][0].update(betas=0.9),
        "parameter group 0 of the state: AdamW, the base, cannot go on from the settings: TypeError",
    ),
    "a list where a flag is wanted": (
        lambda s: s["param_groups"][0].update(capturable=[1]),
        r"parameter group 0 of the state: Invalid capturable: \[1\]; it is a flag",
    ),
    "a flag that is a tensor": (
        lambda s: s["param_groups"][0].update(foreach=torch.ones(2)),
        "parameter group 0 of the state: Invalid foreach: ",
    ),
    "an entry that is a list": (
        lambda s: s["state"].update({1: [1]}),
        "the state of h.0.bias is a list and not a dict",
    ),
    "no groups": (lambda s: s.pop("param_groups"), "the state has no 'param_groups'"),
    "a group without params": (
        lambda s: s["param_groups"][0].pop("params"),
        "parameter group 0 of the state has no list of params",
    ),
    "another number of groups": (
        lambda s: s["param_groups"].append(s["param_groups"][0]),
        "loaded state dict has a different number of parameter groups",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(change: Any, message: str) -> None:
    params = parameters()
    optimizer = isolated(params, BASES["AdamW"])
    train(params, optimizer, 1, 5)
    before, wrong = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    change(wrong)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(wrong)
    assert same_state(optimizer.state_dict(), before)
    train(params, optimizer, 6, 7)


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize(
    ("make", "foreign"),
    [
        (BASES["AdamW"], BASES["SGD"]),
        (BASES["SGD"], BASES["AdamW"]),
        (torch.optim.Adamax, BASES["AdamW"]),
        (torch.optim.RAdam, torch.optim.NAdam),
        (torch.optim.RMSprop, torch.optim.Adagrad),
    ],
)
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(make: Any, foreign: Any, stepped: bool) -> None:
    params, others = parameters(), parameters()
    other = foreign(others.items())
    train(others, other, 1, 2)
    optimizer = isolated(params, make)
    if stepped:
        train(params, optimizer, 1, 5)
    before = copy.deepcopy(optimizer.state_dict())
    groups = optimizer.base.param_groups
    with pytest.raises(ValueError, match="of the state has no |, the base, has no "):
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert same_state(optimizer.state_dict(), before)
    assert optimizer.base.param_groups is groups


def test_a_base_that_raises_while_it_loads_is_as_it_was() -> None:
    params = parameters()
    optimizer = isolated(params, BASES["SGD"])
    train(params, optimizer, 1, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    train(params, optimizer, 6, 7)
    before = copy.deepcopy(optimizer.state_dict())

    def give_up(base: torch.optim.Optimizer) -> None:
        raise KeyError("of the user's")

    handle = optimizer.base.register_load_state_dict_post_hook(give_up)
    with pytest.raises(KeyError, match="of the user's"):
        optimizer.load_state_dict(saved)
    assert same_state(optimizer.state_dict(), before)
    handle.remove()
    optimizer.load_state_dict(saved)
    assert same_state(optimizer.state_dict(), saved)


def test_a_state_after_a_scheduler_and_with_settings_of_the_user_s_loads() -> None:
    optimizer, other = isolated(parameters(), BASES["SGD"]), isolated(parameters(), BASES["SGD"])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    optimizer.param_groups[0]["name"] = "all"
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["max_lr"] == 1.0
    assert other.param_groups[0]["name"] == "all"


def test_the_old_importances_are_gone_before_new_ones_are_made() -> None:
    params = parameters()
    optimizer = isolated(params, BASES["SGD"])
    train(params, optimizer, 1, 1)
    old = [weakref.ref(optimizer.state[param]["importance"]) for param in params.values()]
    seen = []

    class OnAnotherDevice(Tensor):
        """Stands for a tensor whose copy takes memory."""

        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            gc.collect()
            seen.append([one() is None for one in old])
            return torch.zeros(self.shape)

    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["importance"] = entry["importance"].as_subclass(OnAnotherDevice)
    optimizer.load_state_dict(saved)
    assert seen == [[True] * len(SHAPES)] * len(SHAPES)


sharded = functools.partial(distribute_tensor, src_data_rank=None)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Return the mesh of one rank, which moves nothing and so needs no backend that can.

    Gloo's threads and Python's lock can wait for each other for ever where it is taken down within a process.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_a_state_of_one_process_loads_into_dtensors(base: str, mesh: DeviceMesh) -> None:
    params = parameters()
    optimizer = isolated(params, BASES[base])
    train(params, optimizer, 1, 5)
    shards = {
        n: Parameter(sharded(p.detach().clone(), mesh, [Shard(0) if p.dim() else Replicate()]))
        for n, p in params.items()
    }
    other = isolated(shards, BASES[base])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(6, 10):
        train(params, optimizer, step, step)
        for name, shard in shards.items():
            grad = params[name].grad
            shard.grad = None if grad is None else sharded(grad.clone(), mesh, shard.placements)
        other.step()
    for name, param in params.items():
        assert torch.equal(param, shards[name].to_local())
        assert torch.equal(optimizer.isolation_mask(param), other.isolation_mask(shards[name]))


def test_hooks_before_and_after_saving_and_loading_are_called_once_each() -> None:
    optimizer = isolated(parameters(), BASES["SGD"])
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": seen.append("save post")})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(f"load pre {'mark' in state}"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save pre", "save post", "load pre True", "load post"]


@pytest.mark.parametrize("given", ["a tensor", "a tensor of one zero", "a generator", "an empty list"])
def test_a_group_may_be_given_as_torch_takes_it(given: str) -> None:
    optimizer = IsolatedOptimizer(torch.optim.SGD([Parameter(torch.ones(3))], lr=0.1), layers="tensor")
    param = Parameter(torch.zeros(1) if "zero" in given else torch.ones(5))
    params: Any = {"a generator": (p for p in [param]), "an empty list": []}.get(given, param)
    optimizer.add_param_group({"params": params, "isolation_ratio": 0.5})
    expected = [] if given == "an empty list" else [param]
    assert len(optimizer.param_groups) == 2
    assert all(one is other for one, other in zip(optimizer.param_groups[1]["params"], expected, strict=True))
    assert optimizer.param_groups[1]["isolation_ratio"] == 0.5
    with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'list'>"):
        optimizer.add_param_group([param])


def test_a_base_of_several_groups_and_one_that_was_isolated_before() -> None:
    items = list(parameters().items())
    base = torch.optim.SGD([{"params": items[:2]}, {"params": items[2:]}], lr=0.1)
    assert "2 layers by 'block'" in repr(IsolatedOptimizer(base))
    assert "2 layers by 'block'" in repr(IsolatedOptimizer(base))


def test_a_group_that_was_added_to_the_base_itself_is_taken_over() -> None:
    params = parameters()
    items = list(params.items())
    optimizer = IsolatedOptimizer(torch.optim.SGD(items[:2], lr=0.1), isolation_ratio=0.3, mask_interval=2)
    train(dict(items[:2]), optimizer, 1, 2)
    optimizer.base.add_param_group({"params": items[2:]})
    assert not optimizer.isolation_mask(params["head.weight"]).any()
    train(params, optimizer, 3, 4)
    assert optimizer.telemetry()[-1]["eligible"] == sum(p.numel() for p in params.values())
    assert optimizer.param_groups[1]["isolation_ratio"] == 0.3


def test_what_cannot_be_isolated_is_refused_with_a_reason() -> None:
    param = Parameter(torch.ones(4))
    with pytest.raises(TypeError, match="base is a list; pass a torch.optim.Optimizer"):
        IsolatedOptimizer([param])
    with pytest.raises(ValueError, match="EPIAdamW locks entries by itself"):
        IsolatedOptimizer(EPIAdamW([("w", param)]))
    with pytest.raises(ValueError, match="LBFGS moves the parameters several times"):
        IsolatedOptimizer(torch.optim.LBFGS([param]))
    with pytest.raises(ValueError, match="Invalid importance_beta: 1.0"):
        IsolatedOptimizer(torch.optim.SGD([param]), importance_beta=1.0)
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = IsolatedOptimizer(torch.optim.SGD(table.named_parameters()))
    table(torch.tensor([1])).sum().backward()
    before: Tensor = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="weight has a sparse gradient"):
        optimizer.step()
    assert torch.equal(table.weight, before)


# The base's state, groups and methods -----------------------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """A base that keeps what its state was when it was asked to do something, and makes entries of its own kinds."""

    def __init__(self, params: Any, entry: Any = None, **kwargs: Any) -> None:
        super().__init__(params, **{"lr": 0.1, **kwargs})
        self.entry = entry
        self.seen: list[dict[Tensor, Any]] = []

    def see(self) -> None:
        self.seen.append({param: copy.copy(entry) for param, entry in self.state.items()})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.see()
        for param in self.param_groups[0]["params"]:
            if self.entry is not None and param not in self.state:
                self.state[param] = copy.copy(self.entry)
            if param.grad is not None:
                param.sub_(param.grad, alpha=self.param_groups[0]["lr"])

    def train(self, mode: bool = True) -> str:
        self.see()
        for param in self.param_groups[0]["params"]:
            param.data = param.data + 1.0  # as some replace what a parameter has
        return f"train {mode}"

    def refuse(self) -> None:
        for param in self.param_groups[0]["params"]:
            param.data.add_(1.0)
        raise KeyError("of the base")

    number = 7


@pytest.mark.parametrize("entry", [None, {}, {"own": 1}], ids=str)
def test_the_base_sees_the_state_that_it_made(entry: Any) -> None:
    params = parameters()
    optimizer = isolated(params, functools.partial(Recorder, entry=entry))
    base = optimizer.base
    train(params, optimizer, 1, 3)
    optimizer.train()
    base.state_dict = lambda: base.see() or {"of": "its own"}  # type: ignore[assignment]
    optimizer.state_dict()
    expected = {} if entry is None else dict.fromkeys(params.values(), entry)
    assert base.seen[0] == {}
    assert base.seen[1:] == [expected] * 4
    assert all(optimizer.state[p].keys() == {*(entry or ()), "importance"} for p in params.values())


def test_a_base_may_replace_its_state_and_keep_it_elsewhere() -> None:
    class Replaces(Recorder):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step()
            self.state = {"elsewhere": 1}  # type: ignore[dict-item,assignment]

    class Stateless(Recorder):
        @property  # type: ignore[override]
        def state(self) -> Any:
            raise AttributeError("there is none")

        @state.setter
        def state(self, state: Any) -> None: ...

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=self.param_groups[0]["lr"])

        def state_dict(self) -> Any:
            return {"mine": 1}

    params = {kind: parameters() for kind in (Recorder, Replaces, Stateless)}
    optimizers = [isolated(these, kind) for kind, these in params.items()]
    for these, optimizer in zip(params.values(), optimizers, strict=True):
        train(these, optimizer, 1, 9)
    assert optimizers[1].base.state["elsewhere"] == 1
    for name in SHAPES:
        assert torch.equal(params[Recorder][name], params[Replaces][name])
        assert torch.equal(params[Recorder][name], params[Stateless][name])
    assert optimizers[2].state[params[Stateless]["head.weight"]]["importance"].any()


def test_deleted_importance_starts_over_and_entries_of_the_program_s_own_do_no_harm() -> None:
    params = parameters()
    optimizer = isolated(params, BASES["AdamW"])
    train(params, optimizer, 1, 4)
    param = params["h.0.weight"]
    assert optimizer.isolation_mask(param).any()
    optimizer.state[param]["tag"] = 1.0
    del optimizer.state[param]["importance"]
    before = param.detach().clone()
    train(params, optimizer, 6, 6)
    assert not optimizer.isolation_mask(param).any()
    assert (param != before).all()
    assert optimizer.importance(param).any()
    other = isolated(parameters(), BASES["AdamW"])
    other.load_state_dict(optimizer.state_dict())
    assert other.state[other.param_groups[0]["params"][0]]["tag"] == 1.0


@pytest.mark.parametrize(
    "change",
    [lambda s: s[:3], lambda s: s.double(), lambda s: s.to("meta"), lambda s: s.tolist()],
    ids=["shape", "dtype", "device", "kind"],
)
def test_an_importance_that_is_not_the_parameter_s_is_named_and_changes_nothing(change: Any) -> None:
    params = parameters()
    optimizer = isolated(params, BASES["AdamW"])
    train(params, optimizer, 1, 3)
    entry = optimizer.state[params["h.0.weight"]]
    own = entry["importance"]
    saved = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in params.values()]
    entry["importance"] = change(own)
    with pytest.raises(ValueError, match=r'state\[p\]\["importance"\] of h.0.weight is '):
        optimizer.step()
    entry["importance"] = own
    assert same_state(optimizer.state_dict(), saved)
    assert same_state([p.detach() for p in params.values()], before)


@pytest.mark.parametrize("how", ["another tensor", "in place", "by a checkpoint", "by refresh"])
def test_a_mask_that_changed_between_two_refreshes_holds_at_the_next_step(how: str) -> None:
    params = parameters()
    optimizer = isolated(params, BASES["SGD"], mask_interval=None)
    train(params, optimizer, 1, 3)
    param = params["h.0.weight"]
    mask = torch.rand(param.shape) < 0.5
    signed = optimizer.state[param]["importance"]
    changed = lock.with_lock(signed, mask)
    if how == "another tensor":
        optimizer.state[param]["importance"] = changed
    elif how == "in place":
        signed.copy_(changed)
    elif how == "by a checkpoint":
        saved = optimizer.state_dict()
        saved["state"][0]["importance"] = changed
        optimizer.load_state_dict(saved)
    else:
        optimizer.refresh()
        mask = optimizer.isolation_mask(param)
    before = param.detach().clone()
    train(params, optimizer, 4, 4)
    assert torch.equal(param == before, mask)


def test_what_a_program_assigns_holds() -> None:
    params = parameters()
    optimizer = isolated(params, BASES["AdamW"])
    train(params, optimizer, 1, 5)
    optimizer.state = defaultdict(dict)
    assert optimizer.base.state == {}
    optimizer.param_groups = [
        {"params": list(params.values()), "param_names": list(params), **optimizer.defaults, "lr": 0.5}
    ]
    assert optimizer.base.param_groups[0]["lr"] == 0.5
    optimizer.defaults = {**optimizer.defaults, "lr": 0.25}
    assert optimizer.base.defaults["lr"] == 0.25
    train(params, optimizer, 6, 7)
    assert not any(optimizer.isolation_mask(param).any() for param in params.values())
    assert int(optimizer.base.state[params["h.0.weight"]]["step"]) == 2
    assert optimizer.param_groups[0]["isolation_clock"] == 7
    train(params, optimizer, 8, 8)
    assert optimizer.isolation_mask(params["h.0.weight"]).any()


def test_asking_for_the_groups_changes_nothing() -> None:
    params = parameters()
    items = list(params.items())
    optimizer = IsolatedOptimizer(torch.optim.SGD(items[:2], lr=0.1))
    optimizer.base.add_param_group({"params": items[2:]})
    before = dict(optimizer.base.param_groups[1])
    assert optimizer.param_groups[1] == before
    assert optimizer.state_dict()["param_groups"][1]["isolation_ratio"] == 0.01


def test_methods_of_the_base_are_passed_on_and_protected_entries_keep_their_bits() -> None:
    params = parameters()
    optimizer = isolated(params, Recorder)
    train(params, optimizer, 1, 4)
    before = {name: p.detach().clone() for name, p in params.items()}
    assert optimizer.train(False) == "train False"
    with pytest.raises(KeyError, match="of the base"):
        optimizer.refuse()
    for name, param in params.items():
        assert torch.equal(param == before[name], optimizer.isolation_mask(param))
    assert optimizer.number == 7
    plain = isolated(parameters(), BASES["SGD"])
    for one in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert not hasattr(one, "train")
        with pytest.raises(AttributeError, match="'IsolatedOptimizer' object has no attribute 'eval'"):
            one.eval()
    assert not hasattr(IsolatedOptimizer.__new__(IsolatedOptimizer), "anything")


class OfItsOwnForm(torch.optim.Optimizer):
    """A base around another, whose state_dict has a form of its own, as pytorch_optimizer's Lookahead."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}
        self._patch_step_function()
        self.optimizer, self.defaults = optimizer, dict(optimizer.defaults)
        self.state = defaultdict(dict)
        for param in self.param_groups[0]["params"]:
            self.state[param]["slow"] = param.detach().clone()

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def state_dict(self) -> Any:
        slow = {(0, i): dict(self.state[p]) for i, p in enumerate(self.param_groups[0]["params"])}
        return {"slow": slow, "inner": self.optimizer.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state["inner"])
        for i, param in enumerate(self.param_groups[0]["params"]):
            self.state[param] = dict(state["slow"][0, i])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        for param in self.param_groups[0]["params"]:
            param.lerp_(self.state[param]["slow"], 0.5)
            self.state[param]["slow"].copy_(param)


class WithHiddenDefaults(torch.optim.SGD):
    """A base whose groups have what its states do not, as heavyball's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.defaults["__class__"] = type(self)
        for group in self.param_groups:
            group["__class__"] = type(self)

    def state_dict(self) -> Any:
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group.pop("__class__", None)
        return packed


@pytest.mark.parametrize("make", [lambda p: OfItsOwnForm(BASES["SGD"](p)), WithHiddenDefaults])
@pytest.mark.parametrize("of_the_base", [False, True])
def test_states_of_a_form_of_the_base_s_own_go_on_bit_for_bit(make: Any, of_the_base: bool) -> None:
    straight, first = parameters(), parameters()
    settings = {"isolation_ratio": 0.0} if of_the_base else {}
    theirs = isolated(straight, make, **settings)
    train(straight, theirs, 1, 12)
    before = isolated(first, make, **settings)
    train(first, before, 1, 6)
    second = {name: Parameter(p.detach().clone()) for name, p in first.items()}
    after = isolated(second, make, **settings)
    after.load_state_dict(copy.deepcopy((before.base if of_the_base else before).state_dict()))
    train(second, after, 7, 12)
    for name in SHAPES:
        assert torch.equal(second[name], straight[name]), name
    assert same_state(after.state_dict(), theirs.state_dict())


def test_a_state_of_a_form_of_its_own_that_does_not_load_changes_nothing() -> None:
    params = parameters()
    optimizer = isolated(params, lambda p: OfItsOwnForm(BASES["SGD"](p)))
    train(params, optimizer, 1, 6)
    before, wrong = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    del wrong["base"]["slow"][0, 2]  # found after the inner one and two entries were loaded
    with pytest.raises(KeyError):
        optimizer.load_state_dict(wrong)
    assert same_state(optimizer.state_dict(), before)
    del wrong["base"]
    with pytest.raises(ValueError, match="the state has no 'base': it is not of IsolatedOptimizer around OfItsOwnForm"):
        optimizer.load_state_dict(wrong)
    assert same_state(optimizer.state_dict(), before)


# What raises in a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 2, 3, 7], ids=["the first step", "between refreshes", "at the first", "at one"])
def test_where_the_base_raises_clock_masks_telemetry_and_protected_entries_are_as_before(
    last: int, backend: str
) -> None:
    class Raises(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            if getattr(self, "out_of_memory", False):
                raise MemoryError("of the base")

    params = parameters()
    optimizer = isolated(params, functools.partial(Raises, lr=0.1, momentum=0.9), backend=backend)
    train(params, optimizer, 1, last)
    masks = {name: optimizer.isolation_mask(param) for name, param in params.items()}
    before = {name: param.detach().clone() for name, param in params.items()}
    saved = copy.deepcopy(optimizer.state_dict())
    telemetry = optimizer.telemetry()
    optimizer.base.out_of_memory = True  # type: ignore[attr-defined]
    with pytest.raises(MemoryError, match="of the base"):
        train(params, optimizer, last + 1, last + 1)
    optimizer.base.out_of_memory = False  # type: ignore[attr-defined]
    for name, param in params.items():
        assert torch.equal(optimizer.isolation_mask(param), masks[name])
        assert torch.equal(param[masks[name]], before[name][masks[name]])
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
    assert optimizer.telemetry() == telemetry
    if not last:
        assert not any(optimizer.importance(param).any() for param in params.values())
    train(params, optimizer, last + 1, last + 1)
    assert [record["step"] for record in optimizer.telemetry()] == [n for n in (4, 8) if n <= last + 1]
    after = {name: param.detach().clone() for name, param in params.items()}
    train(params, optimizer, last + 2, last + 2)
    for name, param in params.items():
        mask = optimizer.isolation_mask(param)
        assert torch.equal(param[mask], after[name][mask])


def test_where_the_closure_raises_nothing_has_changed() -> None:
    params = parameters()
    optimizer = isolated(params, BASES["SGD"])
    train(params, optimizer, 1, 3)
    before = copy.deepcopy((optimizer.state_dict(), list(params.values()), optimizer.telemetry()))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert same_state((optimizer.state_dict(), list(params.values()), optimizer.telemetry()), before)


def test_flat_partitions_in_the_place_of_named_parameters_are_refused() -> None:
    params = parameters()
    optimizer = isolated(params, BASES["SGD"])
    flat = Parameter(torch.cat([p.detach().view(-1) for p in params.values()]))
    optimizer.param_groups[0]["params"] = [flat]  # as DeepSpeed's ZeRO does it
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO has put flat partitions in their place"):
        optimizer.step()
    assert torch.equal(flat, before)


# The steady path ----------------------------------------------------------------------------------------------------


def test_between_refreshes_nothing_waits_for_a_device(backend: str) -> None:
    class Waits(TorchDispatchMode):
        """Raises at the operations that would wait for an accelerator, or index by a mask."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket.__name__ not in ("nonzero", "masked_scatter_", "masked_select"), func
            if func.overloadpacket.__name__ in ("index", "index_put_", "_index_put_impl_"):
                assert all(one is None or one.dtype == torch.int64 for one in args[1]), func
            return func(*args, **(kwargs or {}))

    params = {n: p for n, p in parameters().items() if p.dim()}
    params["strided"] = Parameter(torch.randn(6, 10)[:, ::2])
    optimizer = isolated(params, BASES["plain SGD"], mask_interval=3, backend=backend)
    for step in range(1, 10):
        for param in params.values():
            param.grad = torch.randn(param.shape)
        with contextlib.nullcontext() if step % 3 == 0 else Waits():
            optimizer.step()
    assert any(optimizer.isolation_mask(param).any() for param in params.values())
    optimizer.refresh()
    with pytest.raises(AssertionError, match="nonzero"), Waits():
        optimizer.step()


def test_positions_keep_no_state_alive_that_a_program_moved_away() -> None:
    params = parameters()
    optimizer = isolated(params, BASES["SGD"])
    train(params, optimizer, 1, 5)
    gone = [weakref.ref(optimizer.state[param]["importance"]) for param in params.values()]
    for param in params.values():
        optimizer.state[param]["importance"] = optimizer.state[param]["importance"].clone()
    gc.collect()
    assert all(one() is None for one in gone)


# Parameters without entries yet -------------------------------------------------------------------------------------


def test_lazy_parameters_join_once_they_have_entries() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 4))
    optimizer = IsolatedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1), isolation_ratio=0.5, mask_interval=1
    )
    assert "4 tensors in 2 layers by 'block'" in repr(optimizer)
    optimizer.step()
    model(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    assert optimizer.telemetry()[-1]["eligible"] == 5 * 4 + 4 + 20


def test_a_parameter_without_values_is_named() -> None:
    model = torch.nn.Linear(3, 3, device="meta")
    optimizer = IsolatedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), mask_interval=1)
    model(torch.empty(2, 3, device="meta")).sum().backward()
    with pytest.raises(RuntimeError, match="weight is on the meta device and has no values; materialise the model"):
        optimizer.step()


TORCHS = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and kind.__module__.startswith("torch.optim.")
    and kind.__name__ not in ("LBFGS", "Optimizer")
]


SET: dict[str, Any] = {
    "a tensor for lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, dtype=torch.float32, device="cpu")),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True, maximize=True),
}
KINDS = {**BASES, **SET, **{kind.__name__: kind for kind in TORCHS}}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_every_kind_of_torchs_load_and_go_on(make: Any, dtype: torch.dtype) -> None:
    params = {name: p for name, p in parameters(dtype).items() if p.dim() == 2}
    sparse = make is torch.optim.SparseAdam  # takes sparse gradients alone
    optimizer = isolated(params, make, isolation_ratio=0.0 if sparse else 0.2)
    train(params, optimizer, 1, 0 if sparse else 6)
    twins = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    other = isolated(twins, make, isolation_ratio=0.0 if sparse else 0.2)
    seen: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append(1))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    handle.remove()
    assert not seen
    train(params, optimizer, 7, 6 if sparse else 9)
    train(twins, other, 7, 6 if sparse else 9)
    if dtype == torch.float32:  # of bfloat16 parameters torch itself rounds some numbers at a load
        assert same_state(other.state_dict(), optimizer.state_dict())
        assert all(torch.equal(param, twins[name]) for name, param in params.items())
