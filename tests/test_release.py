"""Gradient release: every parameter steps as its gradient is ready, to the same bits, and the gradient is freed.

- Isolation off, and a fixed mask: the run without release, bit for bit. Evolving isolation: the same, with each mask
  one update later, which an explicit loop shows.
- At no time are there more gradients than one.
- What cannot work is refused, with the reason.
"""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from states import same_state
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from epi_kernels import EPIAdamW, EPILion, MaskedAdamW
from epi_kernels.optim import release_gradients


def model_of() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(*[torch.nn.Linear(12, 12) for _ in range(4)])


def loss_of(model: torch.nn.Module, step: int) -> Tensor:
    torch.manual_seed(step)
    return model(torch.randn(8, 12)).square().mean()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


BUILD: dict[str, Any] = {
    "isolation off": lambda m: EPIAdamW(m.named_parameters(), lr=0.01, isolation_ratio=0.0),
    "amsgrad": lambda m: EPIAdamW(m.named_parameters(), lr=0.01, isolation_ratio=0.0, amsgrad=True, fused=True),
    "EPILion": lambda m: EPILion(m.named_parameters(), lr=0.01, isolation_ratio=0.0),
    "MaskedAdamW": lambda m: MaskedAdamW(
        m.named_parameters(), lr=0.01, frozen={"1.weight": torch.arange(144).view(12, 12) % 5 == 0}
    ),
}


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_the_run_is_the_same_bit_for_bit(build: Any) -> None:
    ours, theirs = model_of(), model_of()
    optimizer = build(ours)
    release_gradients(ours, optimizer)
    train(ours, optimizer, range(10))
    train(theirs, build(theirs), range(10))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("importance", ["ema", "exp_avg_sq"])
def test_masks_are_chosen_between_iterations_from_the_same_importance(importance: str) -> None:
    ours, theirs = model_of(), model_of()
    settings: dict[str, Any] = {"lr": 0.01, "isolation_ratio": 0.2, "importance": importance}
    optimizer = EPIAdamW(ours.named_parameters(), mask_interval=3, **settings)
    release_gradients(ours, optimizer)
    train(ours, optimizer, range(10))
    twin = EPIAdamW(theirs.named_parameters(), mask_interval=None, **settings)
    for step in range(10):
        train(theirs, twin, range(step, step + 1))
        if (step + 1) % 3 == 0:
            twin.refresh()
    assert [record["step"] for record in optimizer.telemetry()] == [3, 6, 9]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.isolation_mask(p), twin.isolation_mask(q))
    assert sum(int(optimizer.isolation_mask(p).sum()) for p in ours.parameters()) == int(0.2 * 624)


def test_there_is_never_more_than_one_gradient() -> None:
    model = model_of()
    optimizer = BUILD["isolation off"](model)
    release_gradients(model, optimizer)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():
        param.register_hook(count)
        param.register_post_accumulate_grad_hook(count)
    train(model, optimizer, range(3))
    assert most <= 1
    assert all(p.grad is None for p in model.parameters())


def test_a_tied_weight_takes_one_step() -> None:
    model = model_of()
    model[3].weight = model[0].weight
    optimizer = BUILD["isolation off"](model)
    release_gradients(model, optimizer)
    train(model, optimizer, range(3))
    assert optimizer.state[model[0].weight]["step"].item() == 3.0


def test_a_parameter_without_a_gradient_keeps_its_state_and_masks_go_on() -> None:
    model = model_of()
    optimizer = EPIAdamW(model.named_parameters(), isolation_ratio=0.2, mask_interval=2)
    release_gradients(model, optimizer)
    train(model, optimizer, range(4))
    before = copy.deepcopy(optimizer.state[model[3].bias])
    for step in range(4, 8):
        torch.manual_seed(step)
        model[:3](torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(optimizer.state[model[3].bias][k].abs(), v.abs()) for k, v in before.items())
    assert [record["step"] for record in optimizer.telemetry()] == [2, 4, 6, 8]
    optimizer.step()  # no gradient, no iteration: nothing is due again
    assert len(optimizer.telemetry()) == 4


def test_checkpoints_and_schedules_go_on_under_release() -> None:
    straight, resumed = model_of(), model_of()
    for model in (straight, resumed):
        optimizer = EPIAdamW(model.named_parameters(), lr=0.01, isolation_ratio=0.2, mask_interval=3)
        release_gradients(model, optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
        for step in range(8):
            train(model, optimizer, range(step, step + 1))
            scheduler.step()
            if model is resumed and step == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_accumulation_is_refused_before_anything_is_applied_twice() -> None:
    model = model_of()
    optimizer = BUILD["isolation off"](model)
    release = release_gradients(model, optimizer)
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="3.bias got a second gradient before optimizer.step()"):
        loss_of(model, 1).backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    release.remove()
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_is_refused_with_the_reason(fused: bool | None) -> None:
    model = model_of()
    optimizer = EPIAdamW(model.named_parameters(), fused=fused)
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="a gradient scaler cannot work with released gradients"):
        scaler.step(optimizer)


def test_a_scaler_is_refused_after_a_load_too_and_works_after_a_removal() -> None:
    for fused in (None, True):
        model = model_of()
        optimizer = EPIAdamW(model.named_parameters(), fused=fused)
        release = release_gradients(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer._step_supports_amp_scaling
        release.remove()
        assert optimizer._step_supports_amp_scaling == bool(fused)


def test_the_amp_flag_is_that_of_any_group_as_with_torch() -> None:
    # torch's constructor goes by its argument; a state or a group may bring others
    params = list(model_of().named_parameters())
    optimizer = EPIAdamW([{"params": params[:2], "fused": True}, {"params": params[2:]}])
    assert optimizer._step_supports_amp_scaling


def test_a_parameter_that_thaws_after_release_trains() -> None:
    ours, theirs = model_of(), model_of()
    for model in (ours, theirs):
        optimizer = BUILD["isolation off"](model)
        model[1].requires_grad_(False)
        if model is ours:
            release_gradients(model, optimizer)
        assert not any(p.requires_grad for p in model[1].parameters())
        train(model, optimizer, range(3))
        model[1].requires_grad_()
        train(model, optimizer, range(3, 6))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_parameter_that_joins_after_release_is_refused_by_name() -> None:
    model = model_of()
    optimizer = EPIAdamW(list(model[:2].named_parameters()), isolation_ratio=0.2, mask_interval=1)
    release = release_gradients(model, optimizer)
    late = [(f"late.{name}", param) for name, param in model[2:].named_parameters()]
    optimizer.add_param_group({"params": late})
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="late.2.weight joined the optimizer after release_gradients"):
        optimizer.step()
    assert optimizer.telemetry() == []
    release.remove()
    optimizer.zero_grad()
    before = model[2].weight.detach().clone()
    release_gradients(model, optimizer)
    train(model, optimizer, range(1, 2))
    assert not torch.equal(model[2].weight, before)


def test_a_gradient_that_was_set_by_hand_is_refused_by_name() -> None:
    model = model_of()
    optimizer = BUILD["isolation off"](model)
    release_gradients(model, optimizer)
    model[2].bias.grad = torch.ones(12)
    with pytest.raises(RuntimeError, match="2.bias has a gradient that backward"):
        optimizer.step()


@pytest.mark.parametrize(
    ("setting", "value"), [("clip_grad_norm", 1.0), ("capturable", True), ("differentiable", True)]
)
def test_settings_that_come_after_release_are_refused_before_anything_moves(setting: str, value: Any) -> None:
    model = model_of()
    optimizer = EPIAdamW(model.named_parameters())
    release_gradients(model, optimizer)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["param_groups"][0][setting] = value
    with pytest.raises(ValueError, match=f"parameter group 0 of the state: {setting}="):
        optimizer.load_state_dict(wrong)
    optimizer.param_groups[0][setting] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{setting}="):
        loss_of(model, 0).backward()
    assert same_state(dict(model.state_dict()), dict(before))


def test_removed_between_backward_and_step_a_refresh_that_is_due_is_not_lost() -> None:
    model = model_of()
    optimizer = EPIAdamW(model.named_parameters(), isolation_ratio=0.2, mask_interval=2)
    release = release_gradients(model, optimizer)
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    release.remove()
    optimizer.step()
    assert [record["step"] for record in optimizer.telemetry()] == [2]


def of_one_rank(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Return the average over one rank."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_gradients_that_distributed_data_parallel_averages_are_refused() -> None:
    # not gloo: taken down within a process, its threads and Python's lock can wait for each other for ever
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = model_of()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel.register_comm_hook(None, of_one_rank)
        optimizer = BUILD["isolation off"](model)
        for whole in (parallel, torch.nn.Sequential(parallel)):
            with pytest.raises(ValueError, match="DistributedDataParallel averages gradients"):
                release_gradients(whole, optimizer)
        release_gradients(model, optimizer)  # which says nothing of what is around it
        loss_of(parallel, 0).backward()
        with pytest.raises(RuntimeError, match="has a gradient that backward.* or by DistributedDataParallel"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


def test_slices_of_fsdp1_are_refused() -> None:
    model = model_of()
    model[1].bias._fsdp_flattened = True
    with pytest.raises(ValueError, match="1.bias is a slice that FSDP1 made"):
        release_gradients(model, EPIAdamW(model.named_parameters()))


def test_what_cannot_work_is_refused_when_it_is_asked_for() -> None:
    model = model_of()
    names = list(model.named_parameters())
    for kwargs, reason in (
        ({"clip_grad_norm": 1.0}, "clip_grad_norm=1.0 needs the norm of all gradients"),
        ({"differentiable": True}, "differentiable=True and released gradients"),
        ({"capturable": True}, "capturable=True and released gradients"),
    ):
        with pytest.raises(ValueError, match=reason):
            release_gradients(model, EPIAdamW(names, **kwargs))
    with pytest.raises(TypeError, match="SGD cannot step a parameter alone"):
        release_gradients(model, torch.optim.SGD(names))
    with pytest.raises(ValueError, match="3.weight is not a parameter of the model"):
        release_gradients(model[:3], EPIAdamW(names))
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="0.weight has a gradient already"):
        release_gradients(model, EPIAdamW(names))
    model.zero_grad()
    optimizer = EPIAdamW(names)
    release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="releases its gradients already"):
        release_gradients(model, optimizer)


# What goes wrong in the middle ------------------------------------------------------------------------------------


class _Raises(torch.autograd.Function):
    """What runs out of memory in the middle of a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise MemoryError("out of memory")


def half_a_backward(model: torch.nn.Sequential) -> None:
    """Let the last layer get its gradients and raise before the first."""
    with pytest.raises(MemoryError):
        model[3](_Raises.apply(model[:3](torch.randn(8, 12)))).square().mean().backward()


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize("tried", [False, True], ids=["zero_grad at once", "after another backward"])
def test_zero_grad_alone_starts_over_after_a_backward_that_raised(build: Any, tried: bool) -> None:
    model = model_of()
    optimizer = build(model)
    release_gradients(model, optimizer)
    train(model, optimizer, range(2))
    half_a_backward(model)
    kept = model[3].bias.detach().clone()
    if tried:
        with pytest.raises(RuntimeError, match=r"second gradient before .*optimizer\.zero_grad\(\) starts over"):
            loss_of(model, 2).backward()
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    assert torch.equal(model[3].bias, kept)  # it keeps the step that it has taken
    train(model, optimizer, range(2, 4))
    assert optimizer.state[model[0].weight]["step"].item() == 4.0
    assert optimizer.state[model[3].bias]["step"].item() == 5.0


def test_a_second_release_of_the_same_parameters_is_refused_until_the_first_is_removed() -> None:
    model = model_of()
    first = EPIAdamW(model.named_parameters(), lr=0.1)
    release = release_gradients(model, first)
    train(model, first, range(2))
    second = EPIAdamW(model.named_parameters(), lr=0.0)
    with pytest.raises(ValueError, match=r"0\.weight is released to another optimizer.*remove\(\) that release first"):
        release_gradients(model, second)
    assert second._released is None
    loss_of(model, 2).backward()
    first.step()
    with pytest.raises(RuntimeError, match=r"0\.weight is released to another optimizer, .* nothing for this one"):
        second.step()
    release.remove()
    release_gradients(model, second)
    before = copy.deepcopy(model.state_dict())
    train(model, second, range(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # lr=0
    assert second.state[model[0].weight]["step"].item() == 2.0
    assert first.state[model[0].weight]["step"].item() == 3.0


def test_two_optimizers_may_release_each_its_own_part_of_a_model() -> None:
    model = model_of()
    parts = [EPIAdamW(model[i].named_parameters(f"{i}"), lr=0.01) for i in (0, 3)]
    for part in parts:
        release_gradients(model, part)
    for step in range(2):
        loss_of(model, step).backward()
        for part in parts:
            part.step()
    assert [part.state[model[i].weight]["step"].item() for part, i in zip(parts, (0, 3), strict=True)] == [2.0, 2.0]


def test_hooks_of_others_are_left_alone() -> None:
    model = model_of()
    seen: list[Tensor] = []
    model[0].weight.register_post_accumulate_grad_hook(seen.append)
    optimizer = EPIAdamW(model.named_parameters())
    release_gradients(model, optimizer).remove()
    release_gradients(model, optimizer)
    train(model, optimizer, range(1))
    assert len(seen) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_step_once_and_to_the_same_bits(use_reentrant: bool) -> None:
    models = [model_of(), model_of()]
    for i, model in enumerate(models):
        optimizer = EPIAdamW(model.named_parameters(), lr=0.01, isolation_ratio=0.0)
        if i:
            release_gradients(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            x = torch.randn(8, 12).requires_grad_()
            hidden = torch.utils.checkpoint.checkpoint(model[:3], x, use_reentrant=use_reentrant)
            model[3](hidden).square().mean().backward()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_docstring_says_what_cannot_be_noticed() -> None:
    model = model_of()
    optimizer = EPIAdamW(model.named_parameters())
    release_gradients(model, optimizer)
    loss_of(model, 0).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) == 0.0
    assert "returns a norm of 0.0 and clips nothing" in " ".join((release_gradients.__doc__ or "").split())
