"""SparseAdamW.select(mask, keep_state=True): entries that stay go on as if nothing had happened, others start afresh.

- Bit for bit on every backend: an entry that stays moves as without a choice between, a new one as under a fresh
  optimizer, with the bias correction of its own number of steps. (With the parameter's, its first steps would be about
  three times too long.)
- The delta has all entries that the task has moved, those that have left included, and finds its base.
- Checkpoints resume bit for bit; one that was loaded in part is refused.
"""

import copy
from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharding import every_sharded_layout, full, names_of, pairs
from states import same_state
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter

from epi_kernels import SparseAdamW, delta, distributed
from epi_kernels.optim import release_gradients

SHAPES = {"a": (40, 30), "b": (64,), "c": (12, 5)}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": torch.bfloat16, "rounding": "stochastic"},
    "24 bits": {"master_weight_bits": 24},
}


def parameters(kind: str = "float32") -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    return {name: Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def masks(seed: int, share: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < share for name, shape in SHAPES.items()}


def give(params: dict[str, Any], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params.values():
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = distributed.shard_of(grad, param)


def train(params: dict[str, Any], optimizer: SparseAdamW, first: int, last: int) -> None:
    for step in range(first, last + 1):
        give(params, step)
        optimizer.step()


def made(params: dict[str, Parameter], kind: str, trainable: dict[str, Tensor], backend: str = "auto") -> SparseAdamW:
    return SparseAdamW(params.items(), lr=0.05, trainable=trainable, backend=backend, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_stay_go_on_and_new_ones_start_afresh(kind: str, backend: str) -> None:
    first, second = masks(1), masks(2)
    params = parameters(kind)
    optimizer = made(params, kind, first, backend)
    train(params, optimizer, 1, 6)
    between = {name: param.detach().clone() for name, param in params.items()}
    alone = copy.deepcopy(params)
    fresh = made(alone, kind, second, backend)
    optimizer.select(second, keep_state=True)
    train(params, optimizer, 7, 12)
    train(alone, fresh, 7, 12)
    going_on = parameters(kind)
    other = made(going_on, kind, first, backend)
    train(going_on, other, 1, 12)
    for name, param in params.items():
        stay, new = first[name] & second[name], second[name] & ~first[name]
        assert stay.any()
        assert new.any()
        assert torch.equal(param[stay], going_on[name][stay])
        assert torch.equal(param[new], alone[name][new])
        assert torch.equal(param[~second[name]], between[name][~second[name]])
        assert not torch.equal(param[second[name]], between[name][second[name]])
        # under a fresh optimizer those that stay would have moved otherwise
        assert not torch.equal(param[stay], alone[name][stay])


def test_first_steps_of_new_entries_are_not_longer_than_the_learning_rate() -> None:
    param = Parameter(torch.zeros(4))
    optimizer = SparseAdamW(
        [("w", param)], lr=0.1, weight_decay=0.0, trainable={"w": torch.tensor([True, True, False, False])}
    )
    for step in range(50):
        if step == 49:
            optimizer.select({"w": torch.tensor([True, False, True, False])}, keep_state=True)
        param.grad = torch.ones(4)
        optimizer.step()
    torch.testing.assert_close(param.data, torch.tensor([-5.0, -4.9, -0.1, 0.0]))


def test_an_entry_that_comes_back_starts_afresh() -> None:
    params, one, other = parameters(), masks(1), masks(2)
    optimizer = made(params, "float32", one)
    train(params, optimizer, 1, 3)
    optimizer.select(other, keep_state=True)
    train(params, optimizer, 4, 6)
    alone = copy.deepcopy(params)
    fresh = made(alone, "float32", one)
    optimizer.select(one, keep_state=True)
    train(params, optimizer, 7, 9)
    train(alone, fresh, 7, 9)
    for name, param in params.items():
        back = one[name] & ~other[name]
        assert torch.equal(param[back], alone[name][back])


@pytest.mark.parametrize("kind", ["float32", "24 bits"])
def test_the_delta_has_all_that_the_task_has_moved(kind: str) -> None:
    params = parameters(kind)
    base = nn.ParameterDict(copy.deepcopy(params))
    optimizer = made(params, kind, masks(1))
    for seed in range(2, 6):
        train(params, optimizer, 3 * seed, 3 * seed + 2)
        optimizer.select(masks(seed, share=0.1), keep_state=True)
    train(params, optimizer, 30, 32)
    given = optimizer.delta()
    start = {name: param.detach().clone() for name, param in base.items()}
    old = delta.apply(base, given)
    assert same_state(dict(base.items()), dict(params))
    delta.undo(base, old)
    assert same_state(dict(base.items()), start)
    with torch.no_grad():
        base["a"].view(-1)[int(given["a"][0][0])] += 1
    with pytest.raises(ValueError, match="a has other values"):
        delta.apply(base, given)
    # another task begins with what is trainable then
    optimizer.select(masks(9))
    assert optimizer.delta().keys() == masks(9).keys()
    assert all(len(optimizer.delta()[name][0]) == int(mask.sum()) for name, mask in masks(9).items())


def test_a_selection_that_stays_changes_nothing() -> None:
    params, twins = parameters(), parameters()
    optimizer, other = made(params, "float32", masks(1)), made(twins, "float32", masks(1))
    train(params, optimizer, 1, 3)
    train(twins, other, 1, 3)
    optimizer.select(masks(1), keep_state=True)
    assert all(
        state.keys() == other.state[twins[n]].keys() for n, state in zip(twins, optimizer.state.values(), strict=True)
    )
    train(params, optimizer, 4, 6)
    train(twins, other, 4, 6)
    assert same_state(dict(params), dict(twins))
    assert optimizer.delta().before == other.delta().before
    # and before the first step it is a selection as any
    early = made(parameters(), "float32", masks(1))
    early.select(masks(2), keep_state=True)
    assert {key for state in early.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq", "indices"}


def test_a_parameter_of_which_nothing_was_selected_joins() -> None:
    params = parameters()
    base = nn.ParameterDict(copy.deepcopy(params))
    optimizer = made(params, "float32", {"a": masks(1)["a"]})
    train(params, optimizer, 1, 4)
    optimizer.select({"b": masks(1)["b"]}, keep_state=True)
    alone = copy.deepcopy(params)
    train(params, optimizer, 5, 7)
    fresh = made(alone, "float32", {"b": masks(1)["b"]})
    train(alone, fresh, 5, 7)
    assert same_state(dict(params), dict(alone))
    found = optimizer.delta()
    assert found.keys() == found.before.keys() == {"a", "b"}
    delta.apply(base, found)
    assert same_state(dict(base.items()), dict(params))


def test_a_wrong_mask_changes_nothing() -> None:
    params = parameters()
    optimizer = made(params, "float32", masks(1))
    train(params, optimizer, 1, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="trainable has the unknown name 'd'"):
        optimizer.select({**masks(2), "d": torch.ones(1, dtype=torch.bool)}, keep_state=True)
    assert same_state(before["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["loaded", "copied", "released"])
def test_training_goes_on_from_a_checkpoint_a_copy_and_with_released_gradients(how: str, kind: str) -> None:
    params = parameters(kind)
    optimizer = made(params, kind, masks(1))
    train(params, optimizer, 1, 4)
    optimizer.select(masks(2), keep_state=True)
    train(params, optimizer, 5, 7)
    others = copy.deepcopy(params)
    if how == "copied":
        others, other = copy.deepcopy((params, optimizer))
    else:
        other = made(others, kind, {})
        saved = copy.deepcopy(optimizer.state_dict())
        assert {"joined", "departed"} <= saved["state"][0].keys()
        other.load_state_dict(saved)
    if how == "released":
        handle = release_gradients(nn.ParameterDict(others), other)
        for step in range(8, 11):
            give(params, step)
            optimizer.step()
            sum((param * params[name].grad).sum() for name, param in others.items()).backward()  # type: ignore[union-attr]
            other.step()
        handle.remove()
    else:
        train(params, optimizer, 8, 10)
        train(others, other, 8, 10)
    assert same_state(dict(params), dict(others))
    for name, (positions, values) in optimizer.delta().items():
        assert torch.equal(other.delta()[name][0], positions)
        assert torch.equal(other.delta()[name][1], values)


def test_a_state_that_was_loaded_in_part_is_refused() -> None:
    params = parameters()
    optimizer = made(params, "float32", masks(1))
    train(params, optimizer, 1, 4)
    optimizer.select(masks(2), keep_state=True)
    good = optimizer.state_dict()
    for change, message in (
        (lambda entry: [entry.pop("joined"), entry.pop("departed")], "without joined and departed, which it had"),
        (lambda entry: entry.update(joined=entry["joined"] + 1), "joined of a is no number of steps from 0 to 4.5"),
        (lambda entry: entry.update(joined=entry["joined"] - 5), "joined of a is no number of steps"),
        (lambda entry: entry.update(joined=entry["joined"].float()), "joined of a is no number of steps"),
        (lambda entry: entry.update(joined=entry["joined"][1:]), r"joined of a has shape"),
        (lambda entry: entry.update(departed=entry["departed"].flip(0)), "departed of a do not increase"),
        (lambda entry: entry.update(departed=entry["departed"] + 2000), "departed of a go from"),
    ):
        wrong = {**good, "state": {number: dict(entry) for number, entry in good["state"].items()}}
        change(wrong["state"][0])
        with pytest.raises(ValueError, match=message):
            made(params, "float32", masks(1)).load_state_dict(wrong)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_a_distributed_checkpoint_comes_back_whole_or_is_refused(flatten: bool, tmp_path: Any) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = nn.ParameterDict(parameters())
    optimizer = made(dict(model.items()), "float32", masks(1))
    train(dict(model.items()), optimizer, 1, 4)
    optimizer.select(masks(2), keep_state=True)
    train(dict(model.items()), optimizer, 5, 6)
    checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)

    def load(other: SparseAdamW, into: nn.Module) -> None:
        found = {"optimizer": get_optimizer_state_dict(into, other, options=options)}
        checkpoint.load(found, checkpoint_id=tmp_path)
        set_optimizer_state_dict(into, other, found["optimizer"], options=options)

    twin = copy.deepcopy(model)
    other = made(dict(twin.items()), "float32", masks(2))  # of as many entries
    with pytest.raises(ValueError, match="was loaded without joined and departed, which it had"):
        load(other, twin)
    # one that has evolved in the same way has the same keys
    ready = made(dict(twin.items()), "float32", masks(1))
    before = {name: param.detach().clone() for name, param in twin.items()}
    train(dict(twin.items()), ready, 1, 1)
    ready.select(masks(2), keep_state=True)
    with torch.no_grad():
        for name, param in twin.items():
            param.copy_(before[name])
    load(ready, twin)
    train(dict(model.items()), optimizer, 7, 9)
    train(dict(twin.items()), ready, 7, 9)
    assert same_state(dict(model.items()), dict(twin.items()))
    assert optimizer.delta().keys() == ready.delta().keys()


@every_sharded_layout
@on_ranks()
def test_shards_evolve_as_one_process(rank: int, size: int, layout: str) -> None:
    model, whole, _ = pairs(layout)
    base, params = names_of(pairs(layout)[0]), names_of(model)

    def chosen(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(param.shape, generator=generator) < 0.4 for name, param in whole.named_parameters()}

    def mine(seed: int) -> dict[Any, Tensor]:
        return {params[name]: distributed.shard_of(mask, params[name]) for name, mask in chosen(seed).items()}

    optimizer = SparseAdamW(model.named_parameters(), lr=0.02, trainable=mine(1))
    reference = SparseAdamW(whole.named_parameters(), lr=0.02, trainable=chosen(1))
    for seed in range(2, 4):
        train(params, optimizer, 3 * seed, 3 * seed + 2)
        train(names_of(whole), reference, 3 * seed, 3 * seed + 2)
        optimizer.select(mine(seed), keep_state=True)
        reference.select(chosen(seed), keep_state=True)
    saved = optimizer.state_dict()
    again = SparseAdamW(model.named_parameters(), lr=0.02, trainable={})
    again.load_state_dict(saved)
    whole_state = {
        **saved,
        "state": {i: {key: full(value).clone() for key, value in entry.items()} for i, entry in saved["state"].items()},
    }
    from_shards = SparseAdamW(whole.named_parameters(), lr=0.02, trainable={})
    from_shards.load_state_dict(whole_state)
    train(params, again, 20, 22)
    train(names_of(whole), from_shards, 20, 22)
    for name, param in params.items():
        assert torch.equal(full(param), names_of(whole)[name]), name
    found, expected = again.delta(), reference.delta()
    assert found.keys() == expected.keys()
    for name, (positions, values) in expected.items():
        assert torch.equal(found[name][0], positions)
        assert torch.equal(found[name][1], values)
    assert optimizer.delta().before == expected.before
    restored = nn.Module()
    for name, param in base.items():
        restored.register_parameter(name.replace(".", "_"), param)
    delta.apply(restored, delta.rename(optimizer.delta(), lambda name: name.replace(".", "_")))
    for name, param in base.items():
        assert torch.equal(full(param), full(params[name])), name
