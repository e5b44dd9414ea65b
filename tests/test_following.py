"""Masks and selections belong to parameters, not to the objects that stand for them at the moment.

- Wrappers put other Parameters into `param_groups`: MaskedAdamW's mask and SparseAdamW's state follow by name, else by
  position, to the shard where a DTensor came; to what they cannot go, the step raises before anything has moved.
- A state that is cleared, deleted, replaced or not in a checkpoint is a reset of moments, not of masks.
- A parameter that was given another shape is refused with its name, both shapes and the way out.
"""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn import Parameter

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW
from epi_kernels.optim import release_gradients

KINDS = ["masked", "sparse"]


class Net(nn.Module):
    """Layers of equal shapes, so that a mask that goes to the wrong one is not noticed by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def free_of(model: nn.Module) -> dict[str, Tensor]:
    """Return which entries move: some of a.weight and b.bias, all of the others."""
    generator = torch.Generator().manual_seed(1)
    free = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    for name in ("a.weight", "b.bias"):
        free[name] = torch.rand(free[name].shape, generator=generator) < 0.4
    return free


def make(kind: str, model: nn.Module, *, named: bool = True, by_name: bool = True, groups: int = 1) -> Any:
    members = list(model.named_parameters() if named else model.parameters())
    params = [{"params": members[i::groups]} for i in range(groups)]
    keys = list(dict(model.named_parameters())) if by_name else list(model.parameters())
    free = dict(zip(keys, free_of(model).values(), strict=True))
    if kind == "masked":
        frozen = {key: ~mask for key, mask in free.items() if not mask.all()}
        return MaskedAdamW(params, lr=0.1, frozen=frozen)
    return SparseAdamW(params, lr=0.1, trainable=free)


def moved_by_a_step(model: nn.Module, optimizer: Any, seed: int = 0) -> dict[str, Tensor]:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else grad
    optimizer.step()
    found = {n: whole(p.detach()) != whole(before[n]) for n, p in model.named_parameters()}
    return found


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_moves_as_it_should(model: nn.Module, optimizer: Any) -> None:
    free = free_of(model)
    for name, moved in moved_by_a_step(model, optimizer).items():
        assert torch.equal(moved, free[name]), name


def replaced(model: nn.Module, change: Callable[[Parameter], Tensor]) -> dict[Tensor, Parameter]:
    """Replace every parameter of a model, as wrappers do; return {old: new}."""
    found: dict[Tensor, Parameter] = {}
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param not in found:  # else it is tied
                found[param] = Parameter(change(param))
            setattr(module, name, found[param])
    return found


def switch(optimizer: torch.optim.Optimizer, new_of: dict[Tensor, Parameter]) -> None:
    """Do as accelerate's fsdp2_switch_optimizer_parameters: the groups have new lists of new parameters."""
    for group in optimizer.param_groups:
        group["params"] = [new_of[param] for param in group["params"]]


def a_copy(param: Tensor) -> Tensor:
    return param.detach().clone()


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh: Any) -> Callable[[Tensor], Tensor]:
    from torch.distributed.tensor import Shard

    return lambda param: distribute_tensor(param.detach().clone(), mesh, [Shard(0)])


# Other objects in param_groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("named", "by_name"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_follow_parameters_that_are_replaced(kind: str, named: bool, by_name: bool, groups: int) -> None:
    model = net()
    optimizer = make(kind, model, named=named, by_name=by_name, groups=groups)
    switch(optimizer, replaced(model, a_copy))
    assert_moves_as_it_should(model, optimizer)
    free = free_of(model)
    for name, param in model.named_parameters():
        mask = ~optimizer.isolation_mask(param) if kind == "masked" else optimizer.trainable_mask(param)
        assert torch.equal(mask, free[name])
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_masks_follow_to_the_shards_of_dtensors(kind: str, mesh: Any) -> None:
    model = net()
    optimizer = make(kind, model)
    switch(optimizer, replaced(model, sharded(mesh)))
    assert_moves_as_it_should(model, optimizer)
    twin = net()
    other = make(kind, twin)
    moved_by_a_step(twin, other)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(p), q)


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_parameters_are_not_kept(kind: str) -> None:
    import weakref

    model = net()
    optimizer = make(kind, model)
    old = [weakref.ref(param) for param in model.parameters()]
    switch(optimizer, replaced(model, a_copy))
    optimizer.zero_grad()
    optimizer.step()
    assert not any(ref() is not None for ref in old)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_can_be_swapped(kind: str) -> None:
    """As `model.to()` does with DTensors, which it refuses where anybody has a weak reference."""
    model = net()
    optimizer = make(kind, model)
    for stepped in (False, True):
        for param in model.parameters():
            torch.utils.swap_tensors(param, Parameter(param.detach().clone()))
        assert_moves_as_it_should(model, optimizer)
        assert all(int(optimizer.state[p]["step"]) == 1 + stepped for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_in_between_do_not_matter(kind: str) -> None:
    """As accelerate, which lets go of the parameters before it shards them."""
    model = net()
    optimizer = make(kind, model)
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            group["params"][i] = torch.empty(1)
            group["params"][i].data_ptr = param.data_ptr()
    addresses = {param.data_ptr(): name for name, param in model.named_parameters()}
    replaced(model, a_copy)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[addresses[p.data_ptr]] for p in group["params"]]
    assert_moves_as_it_should(model, optimizer)


def test_sparse_moments_follow_after_some_steps(mesh: Any) -> None:
    model, twin = net(), net()
    optimizer, other = make("sparse", model), make("sparse", twin)
    for change in (None, a_copy, None, sharded(mesh), None):
        if change is not None:
            switch(optimizer, replaced(model, change))
        moved_by_a_step(model, optimizer)
        moved_by_a_step(twin, other)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(p), q)
    assert len(optimizer.state_dict()["state"]) == 6


def test_masked_moments_start_over_as_torchs_and_the_mask_stays() -> None:
    model, twin = net(), net()
    optimizer, other = make("masked", model), torch.optim.AdamW(twin.parameters(), lr=0.1)
    for _ in range(3):
        moved_by_a_step(model, optimizer)
        moved_by_a_step(twin, other)
    for one, of in ((model, optimizer), (twin, other)):
        switch(of, replaced(one, a_copy))
    assert_moves_as_it_should(model, optimizer)
    moved_by_a_step(twin, other)
    for name, free in free_of(model).items():
        if free.all():
            torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name))
    assert all(int(optimizer.state[p]["step"]) == 1 for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_parameters_in_another_order(kind: str) -> None:
    model = net()
    optimizer = make(kind, model, named=False, by_name=False, groups=3)
    optimizer.param_groups.reverse()
    for group in optimizer.param_groups:
        group["params"] = group["params"][::-1]
    assert_moves_as_it_should(model, optimizer)
    # in another order and replaced at once: names tell them apart
    model = net()
    optimizer = make(kind, model, groups=3)
    switch(optimizer, replaced(model, a_copy))
    optimizer.param_groups.reverse()
    assert_moves_as_it_should(model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_names_with_a_wrappers_prefix_are_the_same_names(kind: str) -> None:
    model = net()
    optimizer = make(kind, model)
    switch(optimizer, replaced(model, a_copy))
    (group,) = optimizer.param_groups
    group["params"] = group["params"][::-1]
    group["param_names"] = ["_orig_mod.module." + name for name in group["param_names"][::-1]]
    assert_moves_as_it_should(model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_joins_takes_nobodys_place(kind: str) -> None:
    model = net()
    optimizer = make(kind, model, named=False, by_name=False, groups=6)
    gone = optimizer.param_groups.pop(0)["params"][0]  # a.weight
    extra = Parameter(torch.ones(6, 6))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(6, 6)
    optimizer.step()
    if kind == "masked":
        assert not optimizer.isolation_mask(extra).any()
    else:
        assert not optimizer.trainable_mask(extra).any()
    # the one that left comes back, with what belongs to it
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": [gone]})
    assert_moves_as_it_should(model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_name_that_two_parameters_have_the_position_counts(kind: str) -> None:
    params = [Parameter(torch.ones(4)) for _ in range(3)]
    free = {p: torch.arange(4) < i + 1 for i, p in enumerate(params)}
    groups = [{"params": [("w", params[0])]}, {"params": [("w", params[1]), ("v", params[2])]}]
    if kind == "masked":
        optimizer: Any = MaskedAdamW(groups, lr=0.1, frozen={p: ~m for p, m in free.items()})
    else:
        optimizer = SparseAdamW(groups, lr=0.1, trainable=free)
    new = {p: Parameter(torch.ones(4)) for p in params[1:]}
    optimizer.param_groups[1]["params"] = list(new.values())  # of one group alone
    for i, p in enumerate([params[0], *new.values()]):
        p.grad = torch.ones(4)
        optimizer.step()
        p.grad = None
        assert torch.equal(p != 1, torch.arange(4) < i + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_follows(kind: str) -> None:
    torch._dynamo.reset()
    model = net()
    optimizer = make(kind, model)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    free = free_of(model)
    for _ in range(3):
        switch(optimizer, replaced(model, a_copy))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        step()
        for name, param in model.named_parameters():
            assert torch.equal(param != before[name], free[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_tied_parameters_follow_once(kind: str) -> None:
    model = net()
    model.c.weight = model.a.weight
    optimizer = make(kind, model)
    switch(optimizer, replaced(model, a_copy))
    assert model.c.weight is model.a.weight
    assert_moves_as_it_should(model, optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_has_what_the_original_has(kind: str, copied: Any, when: str) -> None:
    model = net()
    optimizer = make(kind, model, named=False, by_name=False)
    if when == "before":
        switch(optimizer, replaced(model, a_copy))
    model, optimizer = copied((model, optimizer))
    if when == "after":
        switch(optimizer, replaced(model, a_copy))
    assert_moves_as_it_should(model, optimizer)
    optimizer.state.clear()
    assert_moves_as_it_should(model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_model_is_stepped_by_the_same_optimizer(kind: str) -> None:
    model = net()
    optimizer = make(kind, model)
    moved_by_a_step(model, optimizer)
    twin = copy.deepcopy(model)
    switch(optimizer, dict(zip(model.parameters(), twin.parameters(), strict=True)))
    assert_moves_as_it_should(twin, optimizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["step", "state_dict", "mask", "deepcopy", "add_param_group", "load_state_dict"])
@pytest.mark.parametrize("named", [True, False])
def test_flat_partitions_are_refused_before_anything_changes(kind: str, method: str, named: bool) -> None:
    """As DeepSpeed ZeRO: one tensor of another shape in the place of all, and the names left over."""
    model = net()
    optimizer = make(kind, model, named=named, by_name=named)
    saved = optimizer.state_dict()
    flat = Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    flat.grad = torch.ones_like(flat)
    calls: dict[str, Callable[[], Any]] = {
        "step": optimizer.step,
        "state_dict": optimizer.state_dict,
        "mask": lambda: (optimizer.isolation_mask if kind == "masked" else optimizer.trainable_mask)(flat),
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "add_param_group": lambda: optimizer.add_param_group({"params": [Parameter(torch.ones(1))]}),
        "load_state_dict": lambda: optimizer.load_state_dict(saved),
    }
    name = "a.weight" if named else "0.0"
    with pytest.raises(ValueError, match=rf"{name} is no longer .* shape \(126,\) .*DeepSpeed ZeRO.*stage 0.*FSDP2"):
        calls[method]()
    assert torch.equal(flat, before)
    assert flat not in optimizer.state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", [True, False])
def test_a_replacement_of_another_shape_is_refused(kind: str, named: bool) -> None:
    model = net()
    optimizer = make(kind, model, named=named, by_name=named)
    moved_by_a_step(model, optimizer)
    (group,) = optimizer.param_groups
    group["params"][0] = Parameter(torch.ones(7, 6))
    group["params"][0].grad = torch.ones(7, 6)
    before = [p.detach().clone() for p in group["params"]]
    name = "a.weight" if named else "0.0"
    way_out = "frozen.*construct MaskedAdamW again" if kind == "masked" else r"select\(\) again"
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError, match=rf"{name} has shape \(7, 6\) now.* mask \(6, 6\).*{way_out}"):
            call()
    assert all(map(torch.equal, before, group["params"]))


def test_select_is_a_way_out_and_one_that_fails_leaves_the_refusal() -> None:
    model = net()
    optimizer = make("sparse", model)
    moved_by_a_step(model, optimizer)
    model.a.weight = Parameter(torch.ones(7, 6))
    optimizer.param_groups[0]["params"][0] = model.a.weight
    model.a.weight.grad = torch.ones(7, 6)
    for wrong in ({"a.weight": torch.ones(6, 6, dtype=torch.bool)}, {"nobody": torch.ones(1, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="trainable"):
            optimizer.select(wrong)
        with pytest.raises(ValueError, match="a.weight has shape"):
            optimizer.step()
    rows = torch.arange(7)[:, None].expand(7, 6) == 6
    optimizer.select({"a.weight": rows})
    optimizer.step()
    assert torch.equal(model.a.weight != 1, rows)
    assert set(optimizer.state) == set(model.parameters())


def test_a_replacement_without_a_mask_may_have_any_shape() -> None:
    model = net()
    optimizer = make("masked", model)
    optimizer.param_groups[0]["params"][2] = Parameter(torch.ones(9, 6))
    optimizer.param_groups[0]["params"][2].grad = torch.ones(9, 6)
    optimizer.step()
    assert (optimizer.param_groups[0]["params"][2] != 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_another_named_parameter_does_not_get_the_mask_of_the_one_it_replaces(kind: str) -> None:
    model = net()
    optimizer = make(kind, model)
    optimizer.param_groups[0]["params"][0] = Parameter(torch.ones(6, 6))
    optimizer.param_groups[0]["param_names"][0] = "elsewhere"
    with pytest.raises(ValueError, match="a.weight is no longer a parameter of the optimizer"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_released_gradients_after_a_switch(kind: str) -> None:
    model = net()
    optimizer = make(kind, model)
    switch(optimizer, replaced(model, a_copy))
    release_gradients(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    free = free_of(model)
    for name, param in model.named_parameters():
        assert torch.equal(param != before[name], free[name])


# States that go -------------------------------------------------------------------------------------------------------


def cleared(optimizer: Any) -> None:
    optimizer.state.clear()


def deleted(optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def assigned(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def emptied(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state.clear()


def without_a_moment(optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reset", [cleared, deleted, assigned, emptied])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_reset_of_the_state_keeps_the_mask_and_starts_the_moments_over(kind: str, reset: Any, loaded: bool) -> None:
    model = net()
    optimizer = make(kind, model)
    moved_by_a_step(model, optimizer)
    if loaded:
        saved = optimizer.state_dict()
        weight = {"a.weight": torch.zeros(6, 6, dtype=torch.bool)}  # the checkpoint's masks are the ones that count
        if kind == "masked":
            optimizer = MaskedAdamW(model.named_parameters(), lr=0.1, frozen=weight)
        else:
            optimizer = SparseAdamW(model.named_parameters(), lr=0.1, trainable=weight)
        optimizer.load_state_dict(saved)
    reset(optimizer)
    free = free_of(model)
    for name, param in model.named_parameters():
        mask = ~optimizer.isolation_mask(param) if kind == "masked" else optimizer.trainable_mask(param)
        assert torch.equal(mask, free[name])
    if kind == "sparse":
        reset(optimizer)
        assert len(optimizer.state_dict()["state"]) == 6
        reset(optimizer)
    assert_moves_as_it_should(model, optimizer)
    assert int(optimizer.state[model.a.weight]["step"]) == 1


def test_sparse_without_a_moment_starts_over() -> None:
    model = net()
    optimizer = make("sparse", model)
    moved_by_a_step(model, optimizer)
    without_a_moment(optimizer)
    assert_moves_as_it_should(model, optimizer)
    assert int(optimizer.state[model.a.weight]["step"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_under_released_gradients(kind: str) -> None:
    model = net()
    optimizer = make(kind, model)
    release_gradients(model, optimizer)
    free = free_of(model)
    for _ in range(2):
        optimizer.state.clear()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        for name, param in model.named_parameters():
            assert torch.equal(param != before[name], free[name])


def test_the_mask_that_a_state_has_is_the_mask() -> None:
    """A program may write it, as one that offloads states does; there is no second one."""
    model = net()
    optimizer = make("masked", model)
    moved_by_a_step(model, optimizer)
    state = optimizer.state[model.a.weight]
    state["frozen"] = state["frozen"].clone().zero_()
    assert not optimizer.isolation_mask(model.a.weight).any()
    assert moved_by_a_step(model, optimizer)["a.weight"].all()
    optimizer.state.clear()
    assert moved_by_a_step(model, optimizer)["a.weight"].all()
    assert not optimizer.isolation_mask(model.a.weight).any()


def test_a_state_without_masks_leaves_those_of_the_constructor() -> None:
    model = net()
    theirs = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    moved_by_a_step(model, theirs)
    optimizer = make("masked", model)
    optimizer.load_state_dict(theirs.state_dict())
    assert_moves_as_it_should(model, optimizer)


@pytest.mark.parametrize("how", ["plain", "nested", "flat"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_is_frozen_at_a_load_keeps_its_mask(kind: str, how: str) -> None:
    """torch.distributed.checkpoint takes no state of what requires no gradient."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
    model = net()
    optimizer = make(kind, model)
    moved_by_a_step(model, optimizer)
    optimizer.zero_grad()  # torch makes no state to load into where there are gradients
    model.a.weight.requires_grad_(False)
    again = make(kind, model)
    warns = pytest.warns(UserWarning, match="no entry for a.weight, which requires no gradient: its .* trainable")
    with warns if kind == "sparse" else nullcontext():
        if how == "plain":
            saved = copy.deepcopy(optimizer.state_dict())
            del saved["state"][0]
            again.load_state_dict(saved)
        else:
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            set_optimizer_state_dict(model, again, saved, options=options)
    model.a.weight.requires_grad_(True)
    assert_moves_as_it_should(model, again)
    assert int(again.state[model.a.weight]["step"]) == 1
    assert int(again.state[model.a.bias]["step"]) == 2


# Shapes and layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["constructed", "stepped", "loaded"])
@pytest.mark.parametrize("shape", [(6, 8), (4, 9), (36,), (8, 6)])
def test_data_of_another_shape_is_refused_by_name(kind: str, when: str, shape: tuple[int, ...]) -> None:
    model = net()
    optimizer = make(kind, model)
    if when != "constructed":
        moved_by_a_step(model, optimizer)
    if when == "loaded":
        saved = optimizer.state_dict()
        optimizer = make(kind, model)
        optimizer.load_state_dict(saved)
    model.a.weight.data = torch.ones(shape)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"a.weight has shape .* now, and its (frozen|trainable) mask \(6, 6\)"):
        optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq", None])
def test_moments_extended_by_hand_go_on_and_a_forgotten_one_is_named(importance: str | None) -> None:
    """As 3D Gaussian splatting adds rows: another Parameter, its moments extended."""

    def make_one(param: Parameter) -> Any:
        named = [("xyz", param)]
        if importance is None:
            return MaskedAdamW(named, lr=0.1, frozen={"xyz": torch.eye(5, 3, dtype=torch.bool)})
        return EPIAdamW(named, lr=0.1, isolation_ratio=0.3, mask_interval=1, importance=importance)

    for forgotten in (True, False):
        param = Parameter(torch.ones(5, 3))
        optimizer = make_one(param)
        param.grad = torch.rand(5, 3)
        optimizer.step()
        (group,) = optimizer.param_groups
        stored = optimizer.state.pop(param)
        own = {"ema": "importance", None: "frozen"}.get(importance)
        for key in ("exp_avg", "exp_avg_sq", *([own] if own and not forgotten else [])):
            stored[key] = torch.cat([stored[key], torch.zeros(2, 3, dtype=stored[key].dtype)])
        group["params"][0] = new = Parameter(torch.cat([param.detach(), torch.ones(2, 3)]))
        optimizer.state[new] = stored
        new.grad = torch.rand(7, 3)
        locked = None if own is None or forgotten else optimizer.isolation_mask(new)
        before = new.detach().clone()
        if forgotten and own is not None:
            with pytest.raises(ValueError, match=rf"xyz.*\(7, 3\).*{own}"):
                optimizer.step()
            assert torch.equal(new, before)
        else:
            optimizer.step()
            if importance is None:
                assert torch.equal(new == before, locked)


@pytest.mark.parametrize("kind", ["epi", *KINDS])
def test_entries_that_share_memory_are_refused_before_anything_changes(kind: str) -> None:
    for shared in (
        torch.ones(3, 1).expand(3, 4),
        torch.ones(20).as_strided((4, 3), (2, 1)),
        torch.ones(20).as_strided((2, 3, 2), (3, 2, 2)),
    ):
        first, last = Parameter(torch.ones(4)), Parameter(torch.ones(4))
        middle = shared.requires_grad_()
        params = [first, middle, last]
        if kind == "epi":
            optimizer: Any = EPIAdamW(params, layers="tensor")
        elif kind == "masked":
            optimizer = MaskedAdamW(params, frozen={})
        else:
            optimizer = SparseAdamW(params, trainable={p: torch.ones(p.shape, dtype=torch.bool) for p in params})
        for p in params:
            p.grad = torch.ones(p.shape)
        with pytest.raises(RuntimeError, match=r"0.1 .*clone\(\) it first"):
            optimizer.step()
        assert all((p == 1).all() for p in params)


@pytest.mark.parametrize("kind", ["epi", *KINDS])
def test_strides_that_interleave_without_sharing_are_taken(kind: str) -> None:
    param = torch.ones(20).as_strided((3, 2), (2, 3)).requires_grad_()
    transposed = torch.ones(4, 5).t()[:, ::2].requires_grad_()
    single = torch.ones(1).as_strided((1, 1), (0, 0)).requires_grad_()
    params = [param, transposed, single]
    if kind == "epi":
        optimizer: Any = EPIAdamW(params, layers="tensor", isolation_ratio=0.0)
    elif kind == "masked":
        optimizer = MaskedAdamW(params, frozen={})
    else:
        optimizer = SparseAdamW(params, trainable={p: torch.ones(p.shape, dtype=torch.bool) for p in params})
    for p in params:
        p.grad = torch.ones(p.shape)
    optimizer.step()
    assert all((p != 1).all() for p in params)


@pytest.mark.parametrize("kind", ["epi", *KINDS])
def test_data_that_is_negated_lazily_after_the_first_step_is_refused(kind: str) -> None:
    param = Parameter(torch.ones(4))
    if kind == "epi":
        optimizer: Any = EPIAdamW([param], layers="tensor")
    elif kind == "masked":
        optimizer = MaskedAdamW([param], frozen={})
    else:
        optimizer = SparseAdamW([param], trainable={param: torch.ones(4, dtype=torch.bool)})
    param.grad = torch.ones(4)
    optimizer.step()
    with torch.no_grad():
        param.data = torch._neg_view(param.data)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="is negated lazily"):
        optimizer.step()
    assert torch.equal(param, before)
