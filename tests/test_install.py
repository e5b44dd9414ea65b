"""A package without its native library does not pass for one with it: in the wheel's name, and at run time.

pip keeps the wheels that it builds, and shows nothing of what a build prints.
"""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW
from epi_kernels.backends import library, native, registry

ROOT = Path(__file__).parents[1]

COMPILER = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done
"""


@pytest.mark.parametrize("compiler", [True, False], ids=["a compiler", "no compiler"])
def test_a_wheel_without_a_library_is_for_any_platform(compiler: bool, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("epi_kernels", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    script = tmp_path / "compiler"
    script.write_text(COMPILER)
    script.chmod(0o755)
    # no compiler on PATH either, nvcc included
    environment = {**os.environ, "CXX": str(script if compiler else tmp_path / "missing"), "PATH": "/nonexistent"}
    environment.pop("CUDA_HOME", None)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") != compiler
    assert ("epi_kernels: no native CPU backend" in done.stdout) != compiler


def test_the_way_to_the_library_goes_past_the_wheel_that_pip_has_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "backends" / "library.py"))
    reason = library.load("_native", "epi_abi_version", 1, {}, "a C++ compiler")
    assert isinstance(reason, str)
    assert "`pip cache remove epi_kernels` and `pip install --force-reinstall --no-deps epi-kernels`" in reason


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "obstacle", lambda: "it was not built")
    for cached in (registry._choose, registry._say_slow):
        cached.cache_clear()
    yield
    for cached in (registry._choose, registry._say_slow):
        cached.cache_clear()


MASK = torch.tensor([True, False, True], device="cpu")
KINDS: dict[str, Callable[..., Any]] = {
    "EPIAdamW": EPIAdamW,
    "MaskedAdamW": lambda named, **settings: MaskedAdamW(named, frozen={"h.w": MASK}, **settings),
    "SparseAdamW": lambda named, **settings: SparseAdamW(named, trainable={"h.w": MASK}, **settings),
    "IsolatedOptimizer": lambda named, **settings: IsolatedOptimizer(torch.optim.SGD(named, lr=0.1), **settings),
}
every_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


def step(build: Callable[..., Any], dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    param = Parameter(torch.ones(3, dtype=dtype))
    optimizer = build([("h.w", param)], **settings)
    for _ in range(2):
        param.grad = torch.ones(3, dtype=dtype)
        optimizer.step()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("no_library")
def test_the_first_step_on_the_slow_path_says_so_once_for_the_process(
    build: Callable[..., Any], dtype: torch.dtype
) -> None:
    with pytest.warns(UserWarning, match="the native library of epi_kernels is missing.*it was not built") as caught:
        step(build, dtype)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in KINDS.values():
            step(other, dtype)


@every_kind
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float32, "reference"), (torch.float64, "auto"), (torch.float64, "reference")]
)
@pytest.mark.usefixtures("no_library")
def test_who_asks_for_plain_torch_or_has_nothing_else_is_told_nothing(
    build: Callable[..., Any], dtype: torch.dtype, backend: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(build, dtype, backend=backend)


@every_kind
def test_with_the_library_nothing_is_said(build: Callable[..., Any]) -> None:
    if native.obstacle():
        pytest.skip(native.obstacle())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(build)
