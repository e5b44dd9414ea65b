"""A program may put one of our classes, or any other, in the place of torch.optim's: ours still find torch's own.

``torch.optim.AdamW = EPIAdamW`` is how a program takes an optimizer that a framework constructs by its name.
"""

import copy
import functools
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW

MASK = torch.arange(12).view(4, 3) % 2 == 0
PATCHES: dict[str, Any] = {
    "EPIAdamW": EPIAdamW,
    "MaskedAdamW": functools.partial(MaskedAdamW, frozen={"w": MASK}),
    "SparseAdamW": functools.partial(SparseAdamW, trainable={"w": MASK}),
    "a function": lambda *args, **kwargs: EPIAdamW(*args, **kwargs),
}


def weights() -> list[tuple[str, Parameter]]:
    return [("w", Parameter(torch.ones(4, 3))), ("b", Parameter(torch.ones(3)))]


def use(optimizer: Any, named: list[tuple[str, Parameter]]) -> list[torch.Tensor]:
    """Do what a training program does with an optimizer, and return the parameters."""
    for _ in range(3):
        for _, param in named:
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [("c", Parameter(torch.ones(2)))]})
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    repr(optimizer)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    assert type(twin) is type(optimizer)
    optimizer.step()
    return [param.detach().clone() for _, param in named]


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_one_of_ours_in_the_place_of_torchs_adamw_works_as_by_its_own_name(
    patch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = weights()
    expected = use(patch(named, lr=0.1), named)
    monkeypatch.setattr(torch.optim, "AdamW", patch)
    named = weights()
    found = use(torch.optim.AdamW(named, lr=0.1), named)
    assert all(map(torch.equal, expected, found))


def test_torchs_errors_stay_torchs_under_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", EPIAdamW)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        torch.optim.AdamW(weights(), lr=-1.0)
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 1: 1\.5"):
        torch.optim.AdamW(weights()).add_param_group({"params": [("c", Parameter(torch.ones(2)))], "betas": (0.9, 1.5)})


def test_a_step_compiles_under_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", EPIAdamW)
    named = weights()
    optimizer = torch.optim.AdamW(named, lr=0.1)
    for _, param in named:
        param.grad = torch.ones_like(param)
    torch.compile(optimizer.step, backend="eager")()
    assert all((param != 1).all() for _, param in named)


def test_a_wrapper_takes_what_is_torchs_when_every_name_in_torch_optim_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = torch.optim.SGD([p for _, p in weights()], lr=0.1)
    lbfgs = torch.optim.LBFGS([p for _, p in weights()])
    for name in ("Optimizer", "LBFGS", "AdamW", "SGD"):
        monkeypatch.setattr(torch.optim, name, functools.partial(EPIAdamW))
    IsolatedOptimizer(base, layers="tensor").step()
    with pytest.raises(ValueError, match="LBFGS moves the parameters several times"):
        IsolatedOptimizer(lbfgs, layers="tensor")
    with pytest.raises(TypeError, match=r"base is a float; pass a torch\.optim\.Optimizer"):
        IsolatedOptimizer(1.0)  # type: ignore[arg-type]


IMPORTS = {
    "another class is there before": "other()\nimport epi_kernels",
    "reloaded": (
        "import epi_kernels, importlib\n"
        "torch.optim.AdamW = torch.optim.Optimizer = epi_kernels.EPIAdamW\n"
        "for name in ('engine.optimizer', 'optim.epi', 'optim.masked', 'optim.sparse', 'optim.isolated'):\n"
        "    importlib.reload(sys.modules[f'epi_kernels.{name}'])\n"
        "importlib.reload(epi_kernels.optim)\n"
        "importlib.reload(epi_kernels)"
    ),
    "imported anew": (
        "import epi_kernels\n"
        "torch.optim.AdamW = epi_kernels.EPIAdamW\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'epi_kernels']:\n"
        "    del sys.modules[name]\n"
        "import epi_kernels"
    ),
}


@pytest.mark.parametrize("imported", IMPORTS.values(), ids=IMPORTS)
def test_the_package_may_be_imported_after_the_patch(imported: str) -> None:
    script = f"""
import pickle, sys, torch
def other():
    class Other(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            raise AssertionError("this is not torch's class")
    torch.optim.AdamW = torch.optim.Optimizer = torch.optim.LBFGS = Other
{imported}
from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW
p, mask = torch.nn.Parameter(torch.ones(3)), torch.tensor([True, False, False])
for make in (
    lambda: EPIAdamW([("p", p)]),
    lambda: MaskedAdamW([("p", p)], frozen={{"p": mask}}),
    lambda: SparseAdamW([("p", p)], trainable={{"p": mask}}),
    lambda: IsolatedOptimizer(torch.optim.SGD([("p", p)], lr=0.1)),
):
    torch.optim.AdamW = make
    optimizer = make()
    before, p.grad = p.detach().clone(), torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert (p != before).any()
    pickle.loads(pickle.dumps(optimizer)).step()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_state_that_was_saved_under_the_patch_is_an_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", EPIAdamW)
    named = weights()
    optimizer = torch.optim.AdamW(named)
    named[0][1].grad = torch.ones(4, 3)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    monkeypatch.undo()
    torchs(weights()).load_state_dict(state)
