"""What a program writes into the groups: a setting that is one for all holds where it is in all, or is refused.

A schedule may change ``mask_interval`` in every group; one that forgets a group, or changes what the masks are of, is
told so at the next step, and nothing has changed.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import same_state
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW
from epi_kernels.optim.release import release_gradients

SHAPE = (4, 3)


def epi(named: list[Any], **settings: Any) -> EPIAdamW:
    return EPIAdamW(named, lr=0.1, isolation_ratio=0.2, mask_interval=4, **settings)


def isolated(named: list[Any], **settings: Any) -> IsolatedOptimizer:
    return IsolatedOptimizer(torch.optim.AdamW(named, lr=0.1), isolation_ratio=0.2, mask_interval=4, **settings)


def built(build: Callable[..., Any], **settings: Any) -> tuple[Any, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(SHAPE, generator=generator, dtype=torch.float32)) for _ in range(3)]
    groups = [{"params": [("h.0.a", params[0]), ("h.1.a", params[1])]}, {"params": [("h.1.b", params[2])]}]
    return build(groups, **settings), params


def train(optimizer: Any, params: list[Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params):
            param.grad = torch.randn(SHAPE, generator=generator, dtype=torch.float32) * 10.0**-i
        optimizer.step()


def write(optimizer: Any, **settings: Any) -> None:
    for group in optimizer.param_groups:
        group.update(settings)


every_kind = pytest.mark.parametrize("build", [epi, isolated], ids=["EPIAdamW", "IsolatedOptimizer"])


@every_kind
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mask_interval", 3),
        ("mask_interval", None),
        ("threshold", "histogram"),
        ("normalize", "none"),
        ("scope", "layer"),
    ],
)
def test_what_is_written_into_all_groups_holds_as_if_constructed_with(
    build: Callable[..., Any], setting: str, value: Any
) -> None:
    optimizer, params = built(build)
    write(optimizer, **{setting: value})
    twin, twins = built(build)
    twin.load_state_dict(
        {**(state := twin.state_dict()), "param_groups": [{**group, setting: value} for group in state["param_groups"]]}
    )
    train(optimizer, params, 1, 9)
    train(twin, twins, 1, 9)
    assert all(map(torch.equal, params, twins))
    assert optimizer.telemetry() == twin.telemetry()
    assert len(optimizer.telemetry()) == (0 if value is None else 3 if value == 3 else 2)
    assert same_state(optimizer.state_dict(), twin.state_dict())
    optimizer.add_param_group({"params": [("h.2.a", Parameter(torch.ones(SHAPE, dtype=torch.float32)))]})
    assert optimizer.param_groups[-1][setting] == value  # whoever joins has it too
    optimizer.step()


@every_kind
@pytest.mark.parametrize("steps", [0, 3])
def test_a_group_that_is_added_has_what_was_written_into_all_before_any_further_step(
    build: Callable[..., Any], steps: int
) -> None:
    optimizer, params = built(build)
    train(optimizer, params, 1, steps)
    write(optimizer, mask_interval=3, scope="layer")
    added = {"params": [("h.2.a", Parameter(torch.ones(SHAPE, dtype=torch.float32)))]}
    optimizer.add_param_group(added)
    assert (optimizer.param_groups[-1]["mask_interval"], optimizer.param_groups[-1]["scope"]) == (3, "layer")
    optimizer.state_dict()
    optimizer.step()


@every_kind
def test_a_group_is_not_added_while_one_group_alone_has_a_setting(build: Callable[..., Any]) -> None:
    optimizer, params = built(build)
    optimizer.param_groups[1]["mask_interval"] = 3
    added = {"params": [("h.2.a", Parameter(torch.ones(SHAPE, dtype=torch.float32)))]}
    with pytest.raises(ValueError, match="mask_interval=3 in parameter group 1, and 4 in group 0"):
        optimizer.add_param_group(dict(added))
    assert len(optimizer.param_groups) == 2
    write(optimizer, mask_interval=3)
    optimizer.add_param_group(added)
    assert len(optimizer.param_groups) == 3
    train(optimizer, params, 1, 2)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("copied", [False, True])
def test_a_learning_rate_that_becomes_a_tensor_is_refused_where_the_constructor_refuses_it(
    steps: int, copied: bool
) -> None:
    optimizer, params = built(lambda named: EPIAdamW(named, lr=0.1, isolation_ratio=0.2, foreach=True))
    train(optimizer, params, 1, steps)
    write(optimizer, lr=torch.tensor(0.1))
    if copied:
        optimizer, params = copy.deepcopy((optimizer, params))
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
        train(optimizer, params, 3, 3)
    assert all(map(torch.equal, params, before))
    write(optimizer, foreach=None)
    train(optimizer, params, 3, 3)


@every_kind
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mask_interval", 3),
        ("threshold", "histogram"),
        ("normalize", "none"),
        ("scope", "layer"),
        ("mask_interval", None),
    ],
)
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("act", ["step", "state_dict", "refresh"])
def test_what_is_written_into_one_group_alone_is_refused_and_changes_nothing(
    build: Callable[..., Any], setting: str, value: Any, group: int, act: str
) -> None:
    optimizer, params = built(build)
    train(optimizer, params, 1, 3)
    before, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    old = optimizer.param_groups[group][setting]
    optimizer.param_groups[group][setting] = value
    with pytest.raises(
        ValueError, match=f"{setting}=.* in parameter group 1, and .* in group 0: .* into every one"
    ) as e:
        getattr(optimizer, act)()
    assert repr(old) in str(e.value)
    assert repr(value) in str(e.value)
    assert all(map(torch.equal, params, values))
    optimizer.param_groups[group][setting] = old
    assert same_state(optimizer.state_dict(), before)
    train(optimizer, params, 4, 5)


@every_kind
@pytest.mark.parametrize(
    ("setting", "value", "old"), [("importance", "exp_avg_sq", "ema"), ("layers", "tensor", "block")]
)
@pytest.mark.parametrize("act", ["step", "state_dict", "refresh"])
def test_what_the_masks_are_of_cannot_change(
    build: Callable[..., Any], setting: str, value: str, old: str, act: str
) -> None:
    optimizer, params = built(build)
    train(optimizer, params, 1, 5)
    before, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    write(optimizer, **{setting: value})
    with pytest.raises(
        ValueError, match=f"{setting} of parameter group 0 was changed to '{value}'.*Write '{old}' back"
    ):
        getattr(optimizer, act)()
    assert all(map(torch.equal, params, values))
    write(optimizer, **{setting: old})
    assert same_state(optimizer.state_dict(), before)
    train(optimizer, params, 6, 9)


@every_kind
@pytest.mark.parametrize(
    ("setting", "value"),
    [("mask_interval", 0), ("mask_interval", 2.5), ("isolation_ratio", 1.5), ("importance_beta", -1.0), ("scope", "x")],
)
def test_what_is_out_of_its_range_is_refused_at_the_next_step(
    build: Callable[..., Any], setting: str, value: Any
) -> None:
    optimizer, params = built(build)
    train(optimizer, params, 1, 5)
    values = [p.detach().clone() for p in params]
    write(optimizer, **{setting: value})
    with pytest.raises(ValueError, match=f"Invalid {setting}: {value!r}"):
        optimizer.step()
    assert all(map(torch.equal, params, values))


@pytest.mark.parametrize("build", [epi, lambda named: MaskedAdamW(named, frozen={})], ids=["EPIAdamW", "MaskedAdamW"])
def test_a_norm_to_clip_to_is_one_for_all_groups(build: Callable[..., Any]) -> None:
    optimizer, params = built(build)
    optimizer.param_groups[1]["clip_grad_norm"] = 1.0
    with pytest.raises(ValueError, match=r"clip_grad_norm=1.0 in parameter group 1, and None in group 0"):
        train(optimizer, params, 1, 1)
    write(optimizer, clip_grad_norm=1.0)
    train(optimizer, params, 1, 2)


def test_a_schedule_writes_into_all_groups_under_release_and_compiled_steps_too() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = EPIAdamW(
        [{"params": [("0.w", model.weight)]}, {"params": [("0.b", model.bias)]}], isolation_ratio=0.2, mask_interval=2
    )
    release = release_gradients(model, optimizer)
    optimizer.param_groups[1]["mask_interval"] = 1
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="mask_interval=1 in parameter group 1, and 2 in group 0"):
        model(torch.ones(1, 4)).sum().backward()
    assert torch.equal(model.weight, before)
    optimizer.zero_grad()
    release.remove()
    model(torch.ones(1, 4)).sum().backward()
    # torch leaves gradients disabled where an operation raises in what it has compiled
    with torch.enable_grad(), pytest.raises(ValueError, match="mask_interval=1 in parameter group 1, and 2 in group 0"):
        torch.compile(optimizer.step, backend="eager")()
    assert torch.equal(model.weight, before)


def test_an_ordinary_step_does_not_check_the_settings_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = built(epi)
    train(optimizer, params, 1, 2)
    monkeypatch.setattr(EPIAdamW, "_check_settings", lambda *_: pytest.fail("checked anew"))
    train(optimizer, params, 3, 9)


@every_kind
def test_numbers_of_numpys_are_taken_and_kept_as_pythons(build: Callable[..., Any]) -> None:
    np = pytest.importorskip("numpy")
    params = [("h.0.a", Parameter(torch.ones(SHAPE, dtype=torch.float32)))]
    settings = {"isolation_ratio": np.float32(0.25), "mask_interval": np.int64(2), "importance_beta": np.float64(0.5)}
    if build is epi:
        optimizer: Any = EPIAdamW(params, lr=np.float64(0.1), **settings)
    else:
        optimizer = IsolatedOptimizer(torch.optim.AdamW(params, lr=0.1), **settings)
    group = optimizer.param_groups[0]
    assert [type(group[key]) for key in ("lr", *settings)] == [float, float, int, float]
    optimizer.add_param_group(
        {"params": [("h.1.a", Parameter(torch.ones(SHAPE, dtype=torch.float32)))], "isolation_ratio": np.float16(0.5)}
    )
    assert type(optimizer.param_groups[1]["isolation_ratio"]) is float
    for setting, value in (("mask_interval", np.float64(2.0)), ("mask_interval", np.bool_(True))):
        with pytest.raises(ValueError, match=f"Invalid {setting}"):
            EPIAdamW(params, **{setting: value})
