"""The private names of torch that the package uses are those of `epi_kernels/private.py`, and this torch has them.

- Every use is found in the code: imports, attributes, and names in strings (for getattr, or of a wrapper's modules). A
  name counts as torch's where no code of the package defines it, or where torch's own objects have it too.
- A use that is not on the list fails, and so does a name on the list that is not used.
- Each name is looked for in the torch that runs; so is each behaviour that is relied on.
"""

import ast
import functools
import importlib
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import epi_kernels
from epi_kernels.private import BEHAVIOURS, NAMES

ROOT = Path(epi_kernels.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("private.py", "deepspeed.py"))
LISTED = {name: entry for entry in NAMES for name in (entry.name, entry.older) if name}

# private names that are Python's, and strings of ours that look so: ends of the names of files, columns and keys
OF_PYTHON = {"_getframe", "_fields", "_replace", "_asdict"}
STRINGS = {"_", "_T", "_codes", "_cuda", "_native", "_dtype", "_scalars", "_triton"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


def definitions(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file defines: functions, classes, variables, attributes that it assigns, keys of dicts."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Dict):
            yield from (key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


@functools.cache
def of_the_package() -> frozenset[str]:
    return frozenset(name for path in FILES for name in definitions(ast.parse(path.read_text())))


@functools.cache
def of_optimizers() -> frozenset[str]:
    """Return the private names that torch's optimizers have."""
    param = [Parameter(torch.zeros(()))]
    examples = (torch.optim.AdamW(param, fused=True), torch.optim.SGD(param, lr=0.1))
    return frozenset(name for example in examples for name in dir(example) if is_private(name))


@functools.cache
def of_torch() -> frozenset[str]:
    """Return the private names of torch, its tensors, parameters and modules."""
    examples = (torch, Tensor, Parameter, nn.Linear(1, 1), torch.optim, torch.autograd)
    return of_optimizers() | {name for example in examples for name in dir(example) if is_private(name)}


def uses(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, name) for each use of a private name of torch in the text of a file."""
    own, optimizers, torchs = of_the_package(), of_optimizers(), of_torch()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Import):
            parts = [part for a in node.names if a.name.split(".")[0] == "torch" for part in a.name.split(".")]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OF_PYTHON:
            # our optimizers are torch's: what both have on self is one attribute
            on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr not in own or node.attr in (optimizers if on_self else torchs):
                yield node.lineno, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in optimizers:
            yield node.lineno, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            mine = node.value in STRINGS or node.value in own
            if node.value in optimizers or not mine:
                yield node.lineno, node.value


def test_every_private_name_that_is_used_is_listed() -> None:
    unlisted = [
        f"{path.relative_to(ROOT.parent)}:{line} uses {name}"
        for path in FILES
        for line, name in uses(path.read_text())
        if name not in LISTED
    ]
    assert not unlisted, (
        "\n".join(unlisted) + "\nuse what torch documents, or say in epi_kernels/private.py why that will not do"
    )


def test_every_listed_name_is_used() -> None:
    used = {name for path in FILES for _, name in uses(path.read_text())}
    unused = LISTED.keys() - used
    assert not unused, f"take {', '.join(sorted(unused))} off the list in epi_kernels/private.py: nothing uses them"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from torch.optim.optimizer import _to_scalar", "_to_scalar"),
        ("from torch._dynamo import config", "_dynamo"),
        ("import torch._inductor.config", "_inductor"),
        ("import torch\ntorch._foreach_add_([], 1)", "_foreach_add_"),
        ("def f(tensor): return tensor._backward_hooks", "_backward_hooks"),
        ("class A:\n  def _patch_step_function(self): ...", "_patch_step_function"),
        (
            "class A:\n  def f(self): self._warned_capturable_if_run_uncaptured = True",
            "_warned_capturable_if_run_uncaptured",
        ),
        ("def f(param): return getattr(param, '_fsdp_anything', None)", "_fsdp_anything"),
    ],
)
def test_a_use_is_found(code: str, name: str) -> None:
    assert [found for _, found in uses(code)] == [name]


def test_names_of_ours_and_of_python_are_not_taken_for_torchs() -> None:
    code = textwrap.dedent(
        '''
        """A text with a _private name."""
        import sys
        from epi_kernels._version import __version__
        class A(tuple):
            def f(self, other):
                self._settings, other._planner = sys._getframe(), self._replace(a=1)
                return self.__dict__, vars(self)["_planner"]
        '''
    )
    assert not list(uses(code))


# Whether this torch has them ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fsdp() -> Iterator[Any]:
    """Return a module under FSDP1, on a group of one rank."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a group that shards nothing
        module = FullyShardedDataParallel(nn.Linear(2, 2), use_orig_params=True, device_id=torch.device("cpu"))
    yield module
    dist.destroy_process_group()


def checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(nn.Linear(1, 1))


# the objects that `where` names in words
OBJECTS: dict[str, Callable[[], Any]] = {
    "an Optimizer": lambda: torch.optim.SGD([Parameter(torch.zeros(()))], lr=0.1),
    "an AdamW with fused=True": lambda: torch.optim.AdamW([Parameter(torch.zeros(()))], fused=True),
    "a module under activation checkpointing": checkpointed,
    "a compiled module": lambda: torch.compile(nn.Linear(1, 1)),
}


def imported(where: str) -> Any:
    """Return a module, or a class of a module, by its path."""
    try:
        return importlib.import_module(where)
    except ImportError:
        module, _, name = where.rpartition(".")
        return getattr(importlib.import_module(module), name)


def has(where: Any, name: str) -> bool:
    """Return whether a module, class or object has a name; of a package, whether it has a module of that name."""
    if hasattr(where, name):
        return True
    return inspect.ismodule(where) and importlib.util.find_spec(f"{where.__name__}.{name}") is not None


@pytest.mark.parametrize("entry", NAMES, ids=lambda entry: entry.name)
def test_this_torch_has_it(entry: Any, request: pytest.FixtureRequest) -> None:
    if "FullyShardedDataParallel" in entry.where:
        module = request.getfixturevalue("fsdp")
        where = next(module.parameters()) if entry.where.startswith("a parameter") else module
    else:
        where = OBJECTS[entry.where]() if entry.where in OBJECTS else imported(entry.where)
    names = [name for name in (entry.name, entry.older) if name]
    assert any(has(where, name) for name in names), (
        f"torch {torch.__version__} has no {' or '.join(names)} in {entry.where}, which the package uses since torch "
        f"{entry.since}. Why it does: {entry.reason} What happens now: {entry.without}"
    )


# Behaviours --------------------------------------------------------------------------------------------------------


def groups_are_added_one_by_one() -> None:
    class Noting(torch.optim.SGD):
        seen = 0

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            self.seen += 1
            super().add_param_group(param_group)

    assert Noting([{"params": [Parameter(torch.zeros(()))]} for _ in range(3)], lr=0.1).seen == 3


def hooks_of_a_load_are_called_in_order() -> None:
    order = []

    class Noting(torch.optim.SGD):
        def __setstate__(self, state: dict[str, Any]) -> None:
            order.append("__setstate__")
            super().__setstate__(state)

    optimizer = Noting([Parameter(torch.zeros(()))], lr=0.1)
    optimizer.register_load_state_dict_pre_hook(lambda *_: order.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: order.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == ["pre", "__setstate__", "post"]


def a_scaler_gives_its_scale() -> None:
    param = Parameter(torch.ones(()))
    seen = {}

    class Noting(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None) -> None:
            seen.update(scale=float(self.grad_scale), found_inf=float(self.found_inf))

    optimizer, scaler = Noting([param], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(param * 2).backward()
    scaler.step(optimizer)
    assert seen == {"scale": 8.0, "found_inf": 0.0}
    assert not hasattr(optimizer, "found_inf")


def a_missing_state_is_made_by_an_empty_step() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    seen = []

    def look(*_: Any) -> None:
        zero = all(param.grad is not None and not param.grad.any() for param in model.parameters())
        seen.append((zero, float(optimizer.param_groups[0]["lr"])))

    optimizer.register_step_pre_hook(look)
    get_optimizer_state_dict(model, optimizer)
    assert seen == [(True, 0.0)]


def a_handle_knows_its_hooks() -> None:
    param = Parameter(torch.zeros(()))
    handle = param.register_post_accumulate_grad_hook(lambda _: None)
    assert handle.hooks_dict_ref() is param._post_accumulate_grad_hooks
    assert handle.id in param._post_accumulate_grad_hooks


def the_function_of_adamw_takes_lists() -> None:
    from torch.optim.adamw import adamw

    lists = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"]
    assert list(inspect.signature(adamw).parameters)[: len(lists)] == lists


# a check, or the file of the tests that hold it
HELD_BY: dict[str, Callable[[], None] | str] = {
    "Optimizer's constructor adds each group by add_param_group": groups_are_added_one_by_one,
    "load_state_dict calls pre hooks, __setstate__ and post hooks in this order": hooks_of_a_load_are_called_in_order,
    "a scaler gives an optimizer found_inf and grad_scale for the time of a step": a_scaler_gives_its_scale,
    "get_optimizer_state_dict makes a missing state by a step with lr 0 and gradients of 0": (
        a_missing_state_is_made_by_an_empty_step
    ),
    "a flattened state is loaded into the keys of optimizer.state": "test_flattened_checkpoint.py",
    "hooks_dict_ref of a hook's handle returns the dict that has the hook": a_handle_knows_its_hooks,
    "torch.optim.adamw.adamw takes the tensors of a step as lists": the_function_of_adamw_takes_lists,
    "a compiler takes the attribute param_groups of an optimizer for torch's own": "test_drop_in.py",
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.what)
def test_this_torch_behaves_so(behaviour: Any) -> None:
    held_by = HELD_BY[behaviour.what]
    if isinstance(held_by, str):
        assert (Path(__file__).parent / held_by).exists()
        return
    try:
        held_by()
    except Exception as error:
        raise AssertionError(
            f"torch {torch.__version__} does not do this: {behaviour.what}. Why the package relies on it: "
            f"{behaviour.reason} What happens now: {behaviour.without}"
        ) from error
