"""Imports run one way: neither modules nor folders import each other in a circle.

What may import what follows from the folders. A folder is one node, and so is a module beside the folders; the Triton
twins of rules and storages, which stand on the kernels' tools, are nodes of their own. Backends of one operation never
import another operation's. Heavy optional packages are imported by nobody at import time.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import epi_kernels

ROOT = Path(epi_kernels.__file__).parent


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("epi_kernels"):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if is_module(submodule) else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("epi_kernels"))


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def folder_of(module: str) -> str:
    """Return the node of a module: its folder, itself beside the folders, or the twins of its folder."""
    folder = module.split(".")[1] if module.count(".") else module
    return f"{folder}, in Triton" if module.endswith("_triton") else folder


def graph() -> dict[str, set[str]]:
    """Return what each module imports. Importing a package's name is importing its modules, not the package itself."""
    return {name: set(imports(path)) - {name} for name, path in modules().items()}


def folders(modules: Mapping[str, set[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, imported in modules.items():
        node = folder_of(name)
        found.setdefault(node, set()).update(folder_of(other) for other in imported if folder_of(other) != node)
    return found


def circle(nodes: Mapping[str, set[str]]) -> list[str]:
    try:
        list(TopologicalSorter(nodes).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(graph()) == []


def test_no_folders_import_each_other_in_a_circle() -> None:
    assert circle(folders(graph())) == []


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("epi_kernels.engine.plan", "epi_kernels.isolation.refresh"),  # the engine is handed an isolation
        ("epi_kernels.contract", "epi_kernels.backends.registry"),
        ("epi_kernels.rules.adamw", "epi_kernels.ops.steps"),
        ("epi_kernels.ops.flat", "epi_kernels.engine.state"),
    ],
)
def test_an_import_that_runs_up_is_seen(name: str, imported: str) -> None:
    nodes = graph()
    nodes[name].add(imported)
    assert circle(folders(nodes))


def test_an_operation_imports_no_other_operation() -> None:
    for name, imported in graph().items():
        operation = name.split(".")[2:3]
        if name.startswith("epi_kernels.ops.") and name.count(".") == 3:
            others = {o.split(".")[2] for o in imported if o.startswith("epi_kernels.ops.") and o.count(".") == 3}
            assert others <= set(operation), name


def test_importing_the_package_needs_torch_alone() -> None:
    script = (
        "import sys, epi_kernels, epi_kernels.metrics, epi_kernels.plots\n"
        "heavy = {'matplotlib', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
