"""SparseAdamW: the selected entries move as under AdamW on masked gradients, bit for bit; nothing else moves at all.

- 200 steps against the dense optimizer, on every backend; against torch's fused AdamW in step_ulps.
- Entries that are not selected keep their bits under weight decay, NaN and infinite gradients.
- State is 12 bytes for each selected entry. Checkpoints, release, tasks one after the other.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from states import same_state
from tolerances import STEP_ULPS, step_ulps
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, SparseAdamW
from epi_kernels.delta import entries
from epi_kernels.optim import release_gradients

SHAPES = {"h.0.weight": (30, 70), "h.0.bias": (30,), "head.weight": (110, 5), "scale": (), "untouched": (40,)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {n: Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def masks(share: float = 0.1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.rand(s, generator=generator) < share for n, s in SHAPES.items() if n != "untouched"}
    found["scale"] = torch.tensor(True)
    return found


def give(params: dict[str, Parameter], step: int, mask: dict[str, Tensor] | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, (name, param) in enumerate(params.items()):
        grad = (torch.randn(param.shape, generator=generator) * 10.0**-i).to(param.dtype)
        if mask is not None:
            grad = torch.where(mask.get(name, torch.tensor(False)), grad, 0.0)
        param.grad = None if (step + i) % 7 == 0 and i else grad


def train(params: dict[str, Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        give(params, step)
        optimizer.step()


@pytest.mark.parametrize("maximize", [False, True])
def test_200_steps_are_dense_adam_on_masked_gradients_bit_for_bit(maximize: bool, backend: str) -> None:
    params, twins, mask = parameters(), parameters(), masks()
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "maximize": maximize, "backend": backend}
    optimizer = SparseAdamW(params.items(), trainable=mask, **options)
    dense = EPIAdamW(twins.items(), isolation_ratio=0.0, **options)
    before = {n: p.detach().clone() for n, p in params.items()}
    for step in range(1, 201 if backend != "triton" else 21):
        give(params, step)
        give(twins, step, mask)
        optimizer.step()
        dense.step()
    for name, param in params.items():
        assert torch.equal(param, twins[name]), name
        moved = param != before[name]
        assert not (moved & ~mask.get(name, torch.tensor(False))).any()
        if name in mask:
            assert moved[mask[name]].all()


def test_with_weight_decay_the_selected_entries_are_those_of_dense_adamw(backend: str) -> None:
    params, twins, mask = parameters(), parameters(), masks()
    optimizer = SparseAdamW(params.items(), trainable=mask, lr=0.01, weight_decay=0.3, backend=backend)
    dense = EPIAdamW(twins.items(), isolation_ratio=0.0, lr=0.01, weight_decay=0.3, backend=backend)
    train(params, optimizer, 1, 10)
    train(twins, dense, 1, 10)
    for name, chosen in mask.items():
        assert torch.equal(params[name][chosen], twins[name][chosen])
        assert torch.equal(params[name][~chosen], parameters()[name][~chosen])


def test_a_step_is_torchs_fused_adamw() -> None:
    params = {"w": Parameter(torch.randn(4000) * 0.1)}
    mask = {"w": torch.rand(4000) < 0.5}
    optimizer = SparseAdamW(params.items(), trainable=mask, lr=0.001)
    twin = Parameter(params["w"].detach().clone())
    theirs = torch.optim.AdamW([twin], lr=0.001, fused=True)
    for _ in range(8):
        before = params["w"].detach().clone()
        twin.data.copy_(before)
        params["w"].grad = torch.randn(4000)
        twin.grad = params["w"].grad.clone()
        optimizer.step()
        theirs.step()
        chosen = mask["w"]
        assert max(step_ulps(params["w"].detach()[chosen], twin.detach()[chosen], before[chosen])) <= STEP_ULPS
        assert not torch.equal(params["w"][chosen], before[chosen])  # a step that does nothing would not pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_those_of_the_dense_optimizer(dtype: torch.dtype) -> None:
    params, twins, mask = parameters(dtype), parameters(dtype), masks()
    optimizer = SparseAdamW(params.items(), trainable=mask, lr=0.01, weight_decay=0.0)
    dense = EPIAdamW(twins.items(), isolation_ratio=0.0, lr=0.01, weight_decay=0.0)
    for step in range(1, 9):
        give(params, step)
        give(twins, step, mask)
        optimizer.step()
        dense.step()
    for name in SHAPES:
        assert torch.equal(params[name], twins[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_selected_keep_their_bits_under_any_gradient(bad: float, backend: str) -> None:
    param = Parameter(torch.tensor([1.0, -0.0, float("nan"), 3.0]))
    optimizer = SparseAdamW([param], trainable={param: torch.tensor([True, False, False, True])}, backend=backend)
    before = param.detach().clone().view(torch.int32)
    for _ in range(3):
        param.grad = torch.full((4,), bad)
        optimizer.step()
    assert torch.equal(param.detach().view(torch.int32)[1:3], before[1:3])
    assert param[0].isnan()
    assert optimizer.trainable_mask(param).tolist() == [True, False, False, True]


def test_state_is_12_bytes_for_each_selected_entry() -> None:
    params, mask = parameters(), masks()
    optimizer = SparseAdamW(params.items(), trainable=mask)
    train(params, optimizer, 1, 2)
    selected = sum(int(chosen.sum()) for chosen in mask.values())
    held = [t for state in optimizer.state.values() for t in state.values()]
    assert sum(t.numel() * t.element_size() for t in held) == 12 * selected + 4 * len(optimizer.state)
    assert optimizer.state[params["untouched"]]["indices"].numel() == 0
    assert f"Selected: {selected} of {sum(p.numel() for p in params.values())} entries, in 4 tensors" in repr(optimizer)


def test_parameters_of_any_layout_move_in_place() -> None:
    strided = torch.randn(6, 10)[:, ::2].t().requires_grad_()
    channels = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    chosen = {strided: torch.rand(strided.shape) < 0.5, channels: torch.rand(channels.shape) < 0.5}
    twins = [Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in chosen]
    ours = SparseAdamW(list(chosen), trainable=chosen, lr=0.1)
    theirs = SparseAdamW(twins, trainable=dict(zip(twins, chosen.values(), strict=True)), lr=0.1)
    for _ in range(3):
        for p, q in zip(chosen, twins, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(chosen, twins, strict=True):
        assert torch.equal(p, q)


def test_the_next_task_starts_with_fresh_moments() -> None:
    params = parameters()
    optimizer = SparseAdamW(params.items(), trainable=masks(seed=1), lr=0.01)
    train(params, optimizer, 1, 5)
    twins = {n: Parameter(p.detach().clone()) for n, p in params.items()}
    optimizer.select(masks(seed=2))
    fresh = SparseAdamW(twins.items(), trainable=masks(seed=2), lr=0.01)
    assert all(int(state["step"]) == 0 and not state["exp_avg"].any() for state in optimizer.state.values())
    train(params, optimizer, 6, 9)
    train(twins, fresh, 6, 9)
    for name in SHAPES:
        assert torch.equal(params[name], twins[name])


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (
            {"nobody": torch.ones(3, dtype=torch.bool)},
            "trainable has the unknown name 'nobody'; it has h.0.weight, h.0.bias, head.weight, ...",
        ),
        ({"h.0.bias": torch.ones(30)}, r"trainable\['h.0.bias'\] is torch.float32; pass a bool tensor, True = moves"),
        (
            {"h.0.bias": torch.ones(3, dtype=torch.bool)},
            r"trainable\['h.0.bias'\] has shape \(3,\), the parameter \(30,\)",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_the_selection_stays(trainable: Any, message: str) -> None:
    params = parameters()
    optimizer = SparseAdamW(params.items(), trainable=masks())
    train(params, optimizer, 1, 3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.select(trainable)
    assert same_state(optimizer.state_dict(), before)


def test_resumed_is_uninterrupted_and_brings_its_selection(tmp_path: Any) -> None:
    straight = parameters()
    train(straight, SparseAdamW(straight.items(), trainable=masks(), lr=0.01), 1, 20)
    first = parameters()
    before = SparseAdamW(first.items(), trainable=masks(), lr=0.01)
    train(first, before, 1, 11)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    second = {n: Parameter(p.detach().clone()) for n, p in first.items()}
    after = SparseAdamW(second.items(), trainable=masks(seed=5), lr=0.5)
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, param in second.items():
        assert torch.equal(after.trainable_mask(param), before.trainable_mask(first[name]))
    train(second, after, 12, 20)
    for name in SHAPES:
        assert torch.equal(second[name], straight[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0].pop("indices"), "the state of h.0.weight has no 1-D integer indices"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3)), r"exp_avg of h.0.weight has shape \(3,\) in the state"),
        (
            lambda s: s["state"][1].update(indices=torch.arange(500, 500 + len(s["state"][1]["indices"]))),
            "indices of h.0.bias go from 500 to",
        ),
        (
            lambda s: s["state"][1]["indices"].sub_(40),
            "indices of h.0.bias go from -",
        ),
        (
            lambda s: s["state"][0].update(indices=s["state"][0]["indices"].flip(0)),
            "indices of h.0.weight do not increase",
        ),
        (
            lambda s: s["state"][0].update(indices=torch.zeros(3, dtype=torch.int64, device="meta")),
            "the state of h.0.weight has no 1-D integer indices",
        ),
        (lambda s: s["state"].pop(2), "the state has no entry for head.weight, which would not train any more"),
        (lambda s: s["state"].update({2: {}}), "the state has no entry for head.weight"),
        (
            lambda s: s["param_groups"][0].update(capturable=True),
            "parameter group 0 of the state: capturable=True is not part",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(change: Any, message: str) -> None:
    params = parameters()
    optimizer = SparseAdamW(params.items(), trainable=masks())
    train(params, optimizer, 1, 3)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    change(wrong)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(wrong)
    dense = torch.optim.AdamW(parameters().values())
    give(dict(enumerate(dense.param_groups[0]["params"])), 1)
    dense.step()
    with pytest.raises(ValueError, match="it is not SparseAdamW's"):
        optimizer.load_state_dict(dense.state_dict())
    assert same_state(optimizer.state_dict(), before)


@pytest.mark.parametrize("kind", [pickle, copy], ids=["pickle", "deepcopy"])
def test_pickle_and_deepcopy_go_on_as_the_original(kind: Any) -> None:
    params = parameters()
    optimizer = SparseAdamW(params.items(), trainable=masks(), lr=0.01)
    train(params, optimizer, 1, 5)
    twin = copy.deepcopy(optimizer) if kind is copy else pickle.loads(pickle.dumps(optimizer))
    twins = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    train(params, optimizer, 6, 9)
    train(twins, twin, 6, 9)
    for name in SHAPES:
        assert torch.equal(params[name], twins[name])


def test_a_compiled_step_is_the_step() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = parameters()
        optimizer = SparseAdamW(params.items(), trainable=masks(), lr=0.01)
        step = torch.compile(optimizer.step, backend="eager", fullgraph=True) if compiled else optimizer.step
        for number in (1, 2, 3):
            give(params, 8 * number)
            step()
        results.append([p.detach() for p in params.values()])
    assert all(map(torch.equal, *results))


def test_released_gradients_are_gathered_one_by_one_to_the_same_bits() -> None:
    models = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(12, 12) for _ in range(4)])
        mask = {n: torch.rand(p.shape) < 0.2 for n, p in model.named_parameters() if "2" not in n}
        optimizer = SparseAdamW(model.named_parameters(), trainable=mask, lr=0.01)
        if released:
            release_gradients(model, optimizer)
        for step in range(6):
            torch.manual_seed(step)
            model(torch.randn(3, 12)).square().sum().backward()
            assert all((p.grad is None) == released for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


def test_a_delta_needs_names() -> None:
    param = Parameter(torch.ones(2))
    optimizer = SparseAdamW([param], trainable={param: torch.tensor([True, False])})
    with pytest.raises(ValueError, match=r"a delta goes by names, and the optimizer has none; pass it model.named_"):
        optimizer.delta()


def test_wide_positions_of_a_state_are_kept_narrow() -> None:
    params = parameters()
    optimizer = SparseAdamW(params.items(), trainable=masks())
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["indices"] = entry["indices"].long()
    optimizer.load_state_dict(saved)
    assert all(state["indices"].dtype == torch.int32 for state in optimizer.state.values())
    train(params, optimizer, 1, 2)


def test_a_group_that_joins_is_not_selected_until_it_is() -> None:
    params = parameters()
    optimizer = SparseAdamW([("w", params["h.0.weight"])], trainable={"w": masks()["h.0.weight"]}, lr=0.1)
    late = params["h.0.bias"]
    optimizer.add_param_group({"params": [("b", late)]})
    before = late.detach().clone()
    train(params, optimizer, 1, 2)
    assert torch.equal(late, before)
    # a distributed checkpoint loads into what is there
    assert len(optimizer.state_dict()["state"]) == 2
    optimizer.select({"b": torch.ones(30, dtype=torch.bool)})
    train(params, optimizer, 3, 4)
    assert (late != before).all()


def test_a_scaler_unscales_and_skips_by_itself_with_fused_too() -> None:
    params = {"w": Parameter(torch.ones(4))}
    optimizer = SparseAdamW(params.items(), trainable={"w": torch.ones(4, dtype=torch.bool)}, lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for gradient, moves in ((1.0, True), (float("inf"), False)):
        before = params["w"].detach().clone()
        scaler.scale((params["w"] * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert bool((params["w"] != before).all()) == moves
    assert int(optimizer.state[params["w"]]["step"]) == 1
    assert optimizer.state[params["w"]]["exp_avg"].tolist() == pytest.approx([0.1] * 4)  # of 1, not of 1024


def test_the_positions_of_each_tensor_are_as_narrow_as_it_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_NARROW", 100)  # as if at 2^31
    params, twins, mask = parameters(), parameters(), masks()
    optimizer = SparseAdamW(params.items(), trainable=mask, lr=0.01)
    assert {state["indices"].dtype for state in optimizer.state.values()} == {torch.int32, torch.int64}
    train(params, optimizer, 1, 3)
    monkeypatch.undo()
    train(twins, SparseAdamW(twins.items(), trainable=mask, lr=0.01), 1, 3)
    assert same_state(dict(params), dict(twins))


def test_what_this_version_lacks_is_named() -> None:
    for argument in ("amsgrad", "capturable", "differentiable"):
        with pytest.raises(NotImplementedError, match=f"{argument}=True is not part of this version"):
            SparseAdamW(parameters().items(), trainable={}, **{argument: True})
        group = {"params": list(parameters().items()), argument: True}
        with pytest.raises(NotImplementedError, match=f"{argument}=True is not part of this version"):
            SparseAdamW([group], trainable={})
        optimizer = SparseAdamW(
            params := [Parameter(torch.ones(2))], trainable={params[0]: torch.tensor([True, False])}
        )
        optimizer.param_groups[0][argument] = True
        params[0].grad = torch.ones(2)
        with pytest.raises(NotImplementedError, match=f"{argument}=True is not part of this version"):
            optimizer.step()
        assert params[0].tolist() == [1.0, 1.0]
    with pytest.raises(NotImplementedError, match="z is torch.complex64"):
        SparseAdamW([("z", Parameter(torch.ones(1, dtype=torch.complex64)))], trainable={})
    with pytest.raises(ValueError, match="SparseAdamW locks entries by itself"):
        IsolatedOptimizer(SparseAdamW(parameters().items(), trainable={}))


def test_gradients_that_cannot_be_taken_are_refused() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SparseAdamW(table.named_parameters(), trainable={"weight": torch.ones(4, 2, dtype=torch.bool)})
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step()
    assert int(optimizer.state[table.weight]["step"]) == 0


def test_with_nothing_selected_nothing_moves() -> None:
    params = parameters()
    optimizer = SparseAdamW(params.items(), trainable={})
    for param in params.values():
        assert not optimizer.state[param]["indices"].numel()
        param.grad = torch.ones_like(param)
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer.step()
    assert same_state(dict(params), before)
    assert not optimizer.delta()
    assert not any(optimizer.trainable_mask(param).any() for param in params.values())
    assert "Selected: 0 of" in repr(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
