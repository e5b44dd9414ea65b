"""PyTorch's generic optimizer tests, on its own inputs for AdamW, pass for every optimizer of the package.

The inputs, error inputs and schedulers are those of `torch.testing._internal.common_optimizers`, which comes with
torch. A test here has the name and the claim of one in PyTorch's test/test_optim.py.

What varies: every test is run for each system, that is for each class and each place of a mask. Tests of arithmetic and
of what a state holds are run for each input too, since each of its settings takes another way through a step. Names of
parameters, hooks, printing, copies, schedulers and the number of dimensions of a learning rate know no settings, and
are tested once for each system.

Exceptions, with their reasons:

- test_complex, test_complex_2d with isolation on: a mask goes by complex entry and a real tensor has two for each, so
  other entries are protected. What holds instead stands in test_drop_in.py.
- differentiable inputs with S = exp_avg_sq: refused, see `epi_kernels.engine.differentiable`.
- amsgrad, differentiable and complex inputs with SparseAdamW: refused by name.
- isolation on, against a loop of torch's: only what is not protected is compared.
- test_*_cuda*, test_forloop_goes_right_direction_multigpu, test_mixed_device_dtype, test_cpu_load_state_dict,
  test_state_dict_with_cuda_params, test_*_large_tensor, test_peak_memory_foreach, capturable, MPS: they need a GPU
  (tests/test_gpu.py); large offsets are in test_large_offsets.py.
- test_defaults_changed_to_foreach: which of torch's own implementations runs by default, on a GPU; none of them does
  here.
- test_optim_infos_do_not_specify_global_cliquey_kwargs: of torch's table alone.
- test_fused_does_not_step_if_foundinf: in test_scaling.py, over all optimizers.
- test_fused_error_on_params_on_meta with SparseAdamW: of a tensor without values nothing can be selected.
- test_rosenbrock_sparse and other tests of sparse gradients: AdamW has none.
- test_less_mem_beta1_zero and tests of single other optimizers: not AdamW's.
"""

import copy
import functools
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW

pytest.importorskip("expecttest", reason="torch's inputs of optimizers are in a module that needs expecttest")

# torch's own arithmetic helpers warn while they are imported
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

ADAMW = next(info for info in common_optimizers.optim_db if info.optim_cls is torch.optim.AdamW)
PLAIN = ADAMW.optim_inputs_func("cpu", torch.float32)
INPUTS = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, ADAMW)
for plain in PLAIN:  # torch has no foreach of its own on the CPU, but takes the flag
    kwargs = {**plain.kwargs, "foreach": True}
    INPUTS.append(common_optimizers.OptimizerInput(params=None, kwargs=kwargs, desc=f"{plain.desc} & foreach"))
ERRORS = ADAMW.optim_error_inputs_func("cpu", torch.float32)
SCHEDULERS = ADAMW.scheduler_inputs


def epi(params: Any, **kwargs: Any) -> EPIAdamW:
    return EPIAdamW(params, **{"layers": "tensor", "mask_interval": 3, **kwargs})


def masked(params: Any, **kwargs: Any) -> MaskedAdamW:
    """Freeze every third entry of every parameter that can be reached."""
    given, thirds = every_third(params)
    return MaskedAdamW(given, frozen=thirds, **kwargs)


def sparse(params: Any, **kwargs: Any) -> SparseAdamW:
    """Train what `masked` leaves free."""
    given, thirds = every_third(params)
    return SparseAdamW(given, trainable={param: ~mask for param, mask in thirds.items()}, **kwargs)


def every_third(params: Any) -> tuple[Any, dict[Tensor, Tensor]]:
    """Return parameters that were given in any form, and a mask of each that can be reached."""
    given = list(params) if not isinstance(params, Tensor) else params
    flat = given
    if isinstance(given, list) and given and isinstance(given[0], dict):
        for group in given:
            group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        flat = [param for group in given for param in group["params"]]
    flat = [param[1] if isinstance(param, tuple) else param for param in flat]
    return given, {p: (torch.arange(p.numel()) % 3 == 0).view(p.shape) for p in flat}


SYSTEMS: dict[str, Callable[..., Any]] = {
    "isolation off": functools.partial(epi, isolation_ratio=0.0),
    "isolation on": functools.partial(epi, isolation_ratio=0.25),
    "S = exp_avg_sq": functools.partial(epi, isolation_ratio=0.25, importance="exp_avg_sq"),
    "MaskedAdamW": masked,
    "SparseAdamW": sparse,
}


def takes(name: str, kwargs: dict[str, Any]) -> bool:
    """Return whether a system takes these arguments: the exceptions above."""
    if name == "SparseAdamW" and kwargs.get("amsgrad"):
        return False
    return not kwargs.get("differentiable") or name not in ("S = exp_avg_sq", "SparseAdamW")


def still(optimizer: Any, param: Tensor) -> Tensor:
    """Return the entries that an optimizer does not move."""
    return ~optimizer.trainable_mask(param) if isinstance(optimizer, SparseAdamW) else optimizer.isolation_mask(param)


def cases(differentiable: bool) -> list[Any]:
    return [
        pytest.param(system, case.kwargs, id=f"{name}, {case.desc}")
        for (name, system), case in itertools.product(SYSTEMS.items(), INPUTS)
        if takes(name, case.kwargs) and (differentiable or not case.kwargs.get("differentiable"))
    ]


every_case = pytest.mark.parametrize(("system", "kwargs"), cases(differentiable=True))
# a differentiable step takes no leaf that requires a gradient, and these tests train such
every_leaf_case = pytest.mark.parametrize(("system", "kwargs"), cases(differentiable=False))
every_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)


def cloned(kwargs: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(kwargs)


def weight_and_bias(contiguous: bool = True) -> tuple[Parameter, Parameter]:
    if contiguous:
        return Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
    return Parameter(torch.randn(10, 5, 2)[..., 0]), Parameter(torch.randn(10, 2)[..., 0])


def closure_of(optimizer: Any, weight: Tensor, bias: Tensor, data: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(data) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def advance(scheduler: Any, closure: Callable[[], Tensor]) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(closure().detach())
    else:
        assert isinstance(scheduler, LRScheduler)
        scheduler.step()


def detached_closure(weight: Tensor, bias: Tensor, data: Tensor) -> Tensor:
    """Set the gradients without a graph through the parameters themselves: they may be no leaves."""
    leaves = [p.detach().requires_grad_() for p in (weight, bias)]
    loss = (leaves[0].mv(data) + leaves[1]).pow(2).sum()
    loss.backward()
    weight.grad, bias.grad = (leaf.grad for leaf in leaves)
    return loss.detach()


@every_system
@pytest.mark.parametrize("error", ERRORS, ids=[error.optimizer_error_input.desc for error in ERRORS])
def test_errors(system: Callable[..., Any], error: Any) -> None:
    given = error.optimizer_error_input
    params = [Parameter(torch.randn(1, 1))] if given.params is None else given.params
    if isinstance(params, list):  # torch writes into a group that it is given
        params = [dict(param) if isinstance(param, dict) else param for param in params]
    # its masks would be looked up in what is no parameter
    no_masks = {masked: (MaskedAdamW, {"frozen": {}}), sparse: (SparseAdamW, {"trainable": {}})}
    cls, given_masks = no_masks.get(system, (system, {}))
    build = functools.partial(cls, **given_masks)
    if error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
        raises = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with raises(error.error_type, match=error.error_regex):
            build(params, **cloned(given.kwargs))
    else:
        optimizer = build(params, **cloned(given.kwargs))
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


@every_case
@pytest.mark.parametrize(("contiguous", "with_lrsched"), [(True, False), (False, False), (True, True)])
def test_forloop_goes_right_direction(
    system: Callable[..., Any], kwargs: dict[str, Any], contiguous: bool, with_lrsched: bool
) -> None:
    for makers in SCHEDULERS if with_lrsched else [()]:
        weight, bias = weight_and_bias(contiguous)
        if kwargs.get("differentiable"):  # a leaf that requires a gradient is not written where autograd looks on
            weight, bias = weight.clone(), bias.clone()
            weight.retain_grad(), bias.retain_grad()
        optimizer = system([weight, bias], **cloned(kwargs))
        schedulers = [make(optimizer) for make in makers]
        data = torch.randn(5)

        closure = functools.partial(detached_closure, weight, bias, data)
        initial = closure().item()
        for _ in range(20):
            if kwargs.get("differentiable"):
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
            for scheduler in schedulers:
                advance(scheduler, closure)
        if kwargs.get("maximize"):
            assert closure().item() > initial
        else:
            assert closure().item() < initial


@every_system
@pytest.mark.parametrize("makers", [(), *SCHEDULERS], ids=["no scheduler", *map(str, range(len(SCHEDULERS)))])
def test_param_group_with_lrscheduler_goes_right_direction(system: Callable[..., Any], makers: Any) -> None:
    name = next(name for name, one in SYSTEMS.items() if one is system)
    for case in INPUTS:
        if case.kwargs.get("differentiable") or not takes(name, case.kwargs):
            continue
        weight, bias = weight_and_bias()
        optimizer = system([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **cloned(case.kwargs))
        schedulers = [make(optimizer) for make in makers]
        closure = closure_of(optimizer, weight, bias, torch.randn(5))
        initial = closure().item()
        for _ in range(20):
            optimizer.step(closure)
            for scheduler in schedulers:
                advance(scheduler, closure)
        assert (closure().item() > initial) == bool(case.kwargs.get("maximize"))


@every_leaf_case
def test_param_groups_weight_decay(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    weight, bias = weight_and_bias()
    optimizer = system([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], **cloned(kwargs))
    closure = closure_of(optimizer, weight, bias, torch.randn(5))
    initial = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert (closure().item() > initial) == bool(kwargs.get("maximize"))


@every_leaf_case
def test_param_groups_lr(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    weight, bias = weight_and_bias()
    irrelevant = Parameter(torch.randn(2))
    before = irrelevant.detach().clone()
    optimizer = system(
        [{"params": [weight], "lr": 0.01}, {"params": [bias, irrelevant]}], **{**cloned(kwargs), "lr": 1e-28}
    )
    closure = closure_of(optimizer, weight, bias, torch.randn(5))
    initial = closure().item()
    for _ in range(20):
        closure()
        irrelevant.grad = torch.rand_like(irrelevant)
        optimizer.step()
    assert (closure().item() > initial) == bool(kwargs.get("maximize"))
    torch.testing.assert_close(irrelevant.detach(), before)


def assert_a_tensor_lr_is_a_number(system: Callable[..., Any], kwargs: dict[str, Any], dims: int, makers: Any) -> None:
    results = []
    for lr in (kwargs["lr"], torch.tensor(kwargs["lr"]).view([1] * dims)):
        torch.manual_seed(1)
        weight, bias = weight_and_bias()
        optimizer = system([weight, bias], **{**cloned(kwargs), "lr": lr})
        schedulers = [make(optimizer) for make in makers]
        closure = closure_of(optimizer, weight, bias, torch.randn(5))
        for _ in range(10):
            optimizer.step(closure)
            for scheduler in schedulers:
                advance(scheduler, closure)
        results.append((weight, bias))
        if isinstance(lr, Tensor):
            assert optimizer.param_groups[0]["lr"] is lr
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_leaf_case
def test_tensor_lr(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    kwargs = {"lr": 1e-3, **kwargs, "foreach": None}  # torch refuses a tensor with it
    assert_a_tensor_lr_is_a_number(system, kwargs, 0, ())


@every_system
@pytest.mark.parametrize("num_dim", [0, 1, 2])
@pytest.mark.parametrize("makers", SCHEDULERS, ids=map(str, range(len(SCHEDULERS))))
def test_tensor_lr_of_any_dimension_under_a_scheduler(system: Callable[..., Any], makers: Any, num_dim: int) -> None:
    assert_a_tensor_lr_is_a_number(system, {"lr": 1e-3}, num_dim, makers)


@pytest.mark.parametrize("name", ["isolation off", "MaskedAdamW"])
def test_complex(name: str) -> None:
    for case in INPUTS:
        if case.kwargs.get("fused") or case.kwargs.get("differentiable"):
            continue
        param = Parameter(torch.randn(5, 5, dtype=torch.complex64))
        real = Parameter(torch.view_as_real(param).detach().clone())
        frozen = torch.arange(25).view(5, 5) % 3 == 0
        if name == "MaskedAdamW":
            ours = MaskedAdamW([param], frozen={param: frozen}, **case.kwargs)
            theirs = MaskedAdamW([real], frozen={real: frozen.unsqueeze(-1).expand(5, 5, 2)}, **case.kwargs)
        else:
            ours, theirs = (SYSTEMS[name]([p], **case.kwargs) for p in (param, real))
        for _ in range(3):
            param.grad = torch.randn_like(param)
            real.grad = torch.view_as_real(param.grad).clone()
            ours.step()
            theirs.step()
            assert torch.equal(torch.view_as_real(param), real)


def test_complex_2d() -> None:
    def rosenbrock(z: Tensor) -> Tensor:
        x, y = z
        return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs()

    for case in INPUTS:
        if case.kwargs.get("fused") or case.kwargs.get("differentiable"):
            continue
        z = torch.randn(2, dtype=torch.complex64, requires_grad=True)
        real, imag = (part.detach().clone().requires_grad_() for part in (z.real, z.imag))
        ours, theirs = (SYSTEMS["isolation off"](p, **case.kwargs) for p in ([z], [real, imag]))
        for _ in range(10):
            ours.zero_grad()
            theirs.zero_grad()
            rosenbrock(z).backward()
            rosenbrock(torch.complex(real, imag)).backward()
            ours.step()
            theirs.step()
            torch.testing.assert_close(torch.stack([z.real, z.imag]), torch.stack([real, imag]))


@every_system
def test_step_is_noop_when_params_have_no_grad(system: Callable[..., Any]) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    optimizer = system(params)
    optimizer.step()
    # SparseAdamW has its state, the selection, from the start; its clocks stand
    assert all(int(state["step"]) == 0 for state in optimizer.state.values())
    assert isinstance(optimizer, SparseAdamW) or not optimizer.state
    for param, one in zip(params, before, strict=True):
        assert torch.equal(param, one)


@every_case
def test_step_is_noop_for_zero_grads(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    param = torch.randn(5, requires_grad=not kwargs.get("differentiable"))
    before = param.detach().clone()
    optimizer = system([param], **{**cloned(kwargs), "weight_decay": 0.0})
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)
    assert int(optimizer.state[param]["step"]) == 1


@every_system
def test_optimizer_can_be_printed(system: Callable[..., Any]) -> None:
    text = repr(system([Parameter(torch.randn(2, 3))]))
    assert "Parameter Group 0" in text
    assert "differentiable" in text


def given(named: bool, *params: Parameter) -> list[Any]:
    return list(zip(("weight", "bias"), params, strict=True)) if named else list(params)


def assert_a_loaded_run_is_the_run(
    system: Callable[..., Any], kwargs: dict[str, Any], saving_has_names: bool, loading_has_names: bool
) -> None:
    weight, bias = weight_and_bias()
    data = torch.randn(5)
    optimizer = system(given(saving_has_names, weight, bias), **cloned(kwargs))
    closure = closure_of(optimizer, weight, bias, data)
    for _ in range(5):
        optimizer.step(closure)
    others = [Parameter(p.detach().clone()) for p in (weight, bias)]
    other = system(given(loading_has_names, *others), **cloned(kwargs))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_closure = closure_of(other, *others, data)
    for _ in range(5):
        optimizer.step(closure)
        other.step(other_closure)
    for ours, theirs in zip((weight, bias), others, strict=True):
        assert torch.equal(ours, theirs)
    saved, twin = optimizer.state_dict(), other.state_dict()
    torch.testing.assert_close(saved["state"], twin["state"], rtol=0, atol=0)
    for group in (*saved["param_groups"], *twin["param_groups"]):
        group.pop("param_names", None)
    assert saved["param_groups"] == twin["param_groups"]


@every_leaf_case
def test_state_dict_deterministic(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    assert_a_loaded_run_is_the_run(system, kwargs, False, False)


@every_system
@pytest.mark.parametrize(("is_named_optim0", "is_named_optim1"), [(True, True), (True, False), (False, True)])
def test_state_dict_deterministic_with_names(
    system: Callable[..., Any], is_named_optim0: bool, is_named_optim1: bool
) -> None:
    assert_a_loaded_run_is_the_run(system, {}, is_named_optim0, is_named_optim1)


@every_leaf_case
def test_can_load_older_state_dict(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    weight, bias = weight_and_bias()
    optimizer = system([weight, bias], **cloned(kwargs))
    closure = closure_of(optimizer, weight, bias, torch.randn(5))
    for _ in range(3):
        optimizer.step(closure)
    older = copy.deepcopy(optimizer.state_dict())
    for flag in ADAMW.not_og_supported_flags:
        for group in older["param_groups"]:
            group.pop(flag, None)
    optimizer.load_state_dict(older)
    optimizer.step(closure)


@every_system
@pytest.mark.parametrize("is_named_optim0", [True, False])
@pytest.mark.parametrize("is_named_optim1", [True, False])
def test_can_load_from_to_named_state_dict(
    system: Callable[..., Any], is_named_optim0: bool, is_named_optim1: bool
) -> None:
    weight, bias = weight_and_bias()

    def build(named: bool, names: tuple[str, str]) -> Any:
        return system(list(zip(names, (weight, bias), strict=True)) if named else [weight, bias])

    optimizer = build(is_named_optim0, ("weight", "bias"))
    closure = closure_of(optimizer, weight, bias, torch.randn(5))
    for _ in range(3):
        optimizer.step(closure)
    other = build(is_named_optim1, ("w", "b"))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.step(closure)
    names = other.param_groups[0].get("param_names")
    # torch's rule: the names of the state, and the optimizer's own where it has none
    assert names == (["weight", "bias"] if is_named_optim0 else ["w", "b"] if is_named_optim1 else None)


@every_leaf_case
def test_save_load_equality_with_weights_only(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    weight, bias = weight_and_bias()
    optimizer = system([weight, bias], **cloned(kwargs))
    closure = closure_of(optimizer, weight, bias, torch.randn(5))
    for _ in range(3):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    torch.testing.assert_close(loaded["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]


@every_system
def test_load_nontensor_step(system: Callable[..., Any]) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    for param in params:
        param.grad = torch.rand_like(param)
    optimizer = system(params)
    for _ in range(3):
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = entry["step"].item()
    optimizer.load_state_dict(saved)
    optimizer.step()
    for param in params:
        assert optimizer.state[param]["step"].dtype == torch.float32
        assert optimizer.state[param]["step"].item() == 4.0


@every_system
def test_step_hooks(system: Callable[..., Any]) -> None:
    seen = []
    optimizer = system([Parameter(torch.ones(2))])
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    optimizer.step()
    assert seen == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 4


@every_system
def test_state_dict_and_load_state_dict_hooks(system: Callable[..., Any]) -> None:
    seen = []
    param = Parameter(torch.ones(2))
    optimizer = system([param])
    param.grad = torch.ones(2)
    optimizer.step()
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": seen.append("save post")})
    saved = optimizer.state_dict()
    assert "mark" in saved

    def before(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("load pre")
        # what a hook returns is what is loaded
        changed = copy.deepcopy(state)
        changed["state"][0]["exp_avg"].fill_(5.0)
        return changed

    optimizer.register_load_state_dict_pre_hook(before)
    # and a hook after sees what was loaded
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[param]["exp_avg"].tolist()))
    optimizer.load_state_dict(saved)
    assert seen[:3] == ["save pre", "save post", "load pre"]
    assert set(seen[3]) == {5.0}


@every_system
def test_hooks_that_are_prepended_come_first(system: Callable[..., Any]) -> None:
    seen: list[str] = []
    optimizer = system([Parameter(torch.ones(2))])
    kinds = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
    for kind in kinds:
        register = getattr(optimizer, f"register_{kind}_hook")
        for name, prepend in (("second", False), ("first", True), ("third", False)):
            register(lambda *_, text=f"{kind} {name}": seen.append(text), prepend=prepend)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [f"{kind} {name}" for kind in kinds for name in ("first", "second", "third")]


@every_system
def test_hooks_after_saving_and_before_loading_may_return_nothing_or_another_state(system: Callable[..., Any]) -> None:
    param = Parameter(torch.ones(2))
    optimizer = system([param])
    param.grad = torch.ones(2)
    optimizer.step()

    def in_place(_: Any, state: dict[str, Any]) -> None:
        state["param_groups"][0]["lr"] *= 2.0

    def another(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [{**group, "lr": group["lr"] + 1.0} for group in state["param_groups"]]}

    optimizer.register_state_dict_post_hook(in_place)
    optimizer.register_state_dict_post_hook(another)
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.register_load_state_dict_pre_hook(another)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == (lr * 2.0 + 1.0) * 2.0 + 1.0
    assert int(optimizer.state[param]["step"]) == 1


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "SparseAdamW"])
def test_fused_error_on_params_on_meta(name: str) -> None:
    param = Parameter(torch.ones(2, device="meta"))
    optimizer = MaskedAdamW([param], frozen={}, fused=True) if "Masked" in name else SYSTEMS[name]([param], fused=True)
    param.grad = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors of"):
        optimizer.step()


@every_system
def test_deepcopy_copies_all_attrs(system: Callable[..., Any]) -> None:
    """Private ones too: ours all are. Both take a step first, which makes some of them."""

    def attributes(build: Callable[..., Any]) -> tuple[set[str], set[str]]:
        optimizer = build([Parameter(torch.randn(2))])
        copied = copy.deepcopy(optimizer)
        for one in (optimizer, copied):
            one.param_groups[0]["params"][0].grad = torch.ones(2)
            one.step()
        return set(vars(optimizer)), set(vars(copied))

    original, copied = attributes(torch.optim.AdamW)
    lost = original - copied
    original, copied = attributes(system)
    assert original - lost == copied - lost


@every_case
def test_grads_are_never_inplaced_into(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    params = [torch.randn(2, 3, requires_grad=not kwargs.get("differentiable")) for _ in range(2)]
    optimizer = system(params, **cloned(kwargs))
    for _ in range(4):
        for param in params:
            param.grad = torch.randn(2, 3)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        optimizer.step()
        for param, (grad, values, version) in zip(params, before, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, values)
            assert grad._version == version


@every_system
def test_non_empty_state(system: Callable[..., Any]) -> None:
    param = Parameter(torch.randn(2, 3))
    optimizer = system([param])
    assert isinstance(optimizer, SparseAdamW) or not optimizer.state
    param.grad = torch.rand(2, 3)
    optimizer.step()
    assert optimizer.state.keys() == {param}
    assert optimizer.state[param]


@every_case
def test_default_dtype_float64(system: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        param = torch.randn(5, requires_grad=not kwargs.get("differentiable"))
        ours, theirs = system([param], **cloned(kwargs)), torch.optim.AdamW([param.detach().clone()], **cloned(kwargs))
        twin = theirs.param_groups[0]["params"][0]
        for _ in range(2):
            param.grad = torch.randn(5)
            twin.grad = param.grad.clone()
            ours.step()
            theirs.step()
        assert ours.state[param]["step"].dtype == theirs.state[twin]["step"].dtype
        assert ours.state[param]["exp_avg"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        pair
        for pair in itertools.product(SYSTEMS, ("foreach", "fused", "differentiable"))
        if takes(pair[0], {pair[1]: True})
    ],
)
def test_implementations_match_forloop(name: str, flag: str) -> None:
    """Against torch's loop, from the same point at every step, where nothing is protected."""
    for case in PLAIN:
        if not takes(name, {**case.kwargs, flag: True}):
            continue
        mine = [torch.randn(s, requires_grad=flag != "differentiable") for s in ((3,), (4, 5), ())]
        twins = [p.detach().clone().requires_grad_() for p in mine]
        ours = SYSTEMS[name](mine, **cloned(case.kwargs), **{flag: True})
        theirs = torch.optim.AdamW(twins, **cloned(case.kwargs), foreach=False)
        for _ in range(7):
            for p, q in zip(mine, twins, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
                q.data.copy_(p.detach())
            ours.step()
            theirs.step()
            for p, q in zip(mine, twins, strict=True):
                free = ~still(ours, p)
                torch.testing.assert_close(p.detach()[free], q.detach()[free], rtol=1e-6, atol=1e-7)


@every_system
def test_mixed_dtypes_in_one_optimizer(system: Callable[..., Any]) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    name = next(name for name, one in SYSTEMS.items() if one is system)
    for case in PLAIN:
        if not takes(name, case.kwargs):
            continue
        params = [Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
        optimizer = system(params, **{**cloned(case.kwargs), "lr": 0.1})
        for _ in range(5):
            for param in params:
                param.grad = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=param.dtype)
            optimizer.step()
        for param in params:
            free = ~still(optimizer, param)
            assert (param.detach()[free] != 1.0).all()
            assert ((param.detach()[free] > 1.0) == bool(case.kwargs.get("maximize"))).all()


def differentiable_step(
    build: Callable[..., Any], amsgrad: bool, p: Tensor, grad: Tensor, *moments: Tensor
) -> tuple[Tensor, ...]:
    """Return what a step leaves, as a function of tensors for autograd."""
    p = p.clone()
    p.grad = grad
    optimizer = build([p], lr=0.9, amsgrad=amsgrad, differentiable=True)
    state = optimizer.state[p]
    state["step"] = torch.tensor(10.0, dtype=torch.float64)
    state.update(zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), (m.clone() for m in moments), strict=False))
    optimizer.step()
    return (p, *[value for value in state.values() if value.requires_grad])


@pytest.mark.parametrize("name", ["isolation off", "isolation on", "MaskedAdamW"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_differentiable_gradcheck(name: str, amsgrad: bool) -> None:
    tensors = [torch.rand(10, requires_grad=True, dtype=torch.float64) for _ in range(5 if amsgrad else 4)]
    assert torch.autograd.gradcheck(functools.partial(differentiable_step, SYSTEMS[name], amsgrad), tensors)


def test_differentiable_lets_a_learning_rate_be_learned() -> None:
    for build in (torch.optim.AdamW, SYSTEMS["isolation off"]):
        lr = torch.tensor(0.1, requires_grad=True)
        p = torch.tensor([1.0, 2.0])
        optimizer = build([p], lr=lr, differentiable=True)
        for _ in range(2):
            p.grad = torch.tensor([0.5, -0.5])
            optimizer.step()
        p.sum().backward()
        if build is torch.optim.AdamW:
            expected = lr.grad
    torch.testing.assert_close(lr.grad, expected)
