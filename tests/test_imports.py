"""Imports run one way, each module only to a lower tier.

optim -> ops (functional) -> ops/<stem>/<backend> -> ops/equations, ops/flat, dispatch -> contract, lock, native, layers

Backends of one operation never import another operation's, nor each other's. Heavy optional packages are imported by
nobody at import time.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import epi_kernels

ROOT = Path(epi_kernels.__file__).parent

# first match decides; a module may import only from tiers above its own line in the file, that is, a lower number
TIERS = [
    ("epi_kernels.library", -1),
    ("epi_kernels.notices", -1),
    ("epi_kernels.private", -1),
    ("epi_kernels._version", 0),
    ("epi_kernels.lock", 0),
    ("epi_kernels.contract", 0),
    ("epi_kernels.native", 0),
    ("epi_kernels.cuda", 0),
    ("epi_kernels.metrics", 0),
    ("epi_kernels.layers", 0),
    ("epi_kernels.integrations.", 0),
    ("epi_kernels.integrations", 0),
    ("epi_kernels.telemetry", 0),
    ("epi_kernels.distributed", 0),
    ("epi_kernels.plots", 1),
    ("epi_kernels.ops.equations", 1),
    ("epi_kernels.ops.flat", 0),
    ("epi_kernels.ops.table", 0),
    ("epi_kernels.ops.tiles", 1),
    ("epi_kernels.ops.equations_triton", 0),
    ("epi_kernels.dispatch", 1),
    ("epi_kernels.ops.functional", 3),
    ("epi_kernels.ops.masked_adamw.sweep", 1),
    ("epi_kernels.ops.sparse_adamw.offsets", 0),
    ("epi_kernels.ops.threshold.rows", 1),
    ("epi_kernels.ops.", 2),  # ops/<stem>/<backend>
    ("epi_kernels.ops", 4),
    ("epi_kernels.importance", 5),
    ("epi_kernels.select", 5),
    ("epi_kernels.delta", 1),
    ("epi_kernels.optim.refusals", 0),
    ("epi_kernels.optim.plain", 0),
    ("epi_kernels.optim.groups", 1),
    ("epi_kernels.optim.compiled", 0),
    ("epi_kernels.optim.checkpoint", 2),
    ("epi_kernels.optim.clocks", 1),
    ("epi_kernels.optim.differentiable", 1),
    ("epi_kernels.optim.scaling", 1),
    ("epi_kernels.optim.complex", 5),
    ("epi_kernels.optim.nonfinite", 4),
    ("epi_kernels.optim.refresh", 5),
    ("epi_kernels.optim.drop_in", 3),
    ("epi_kernels.optim.prepared", 6),
    ("epi_kernels.optim.isolation", 6),
    ("epi_kernels.optim.places", 7),
    ("epi_kernels.optim.base", 7),
    ("epi_kernels.optim.", 8),
    ("epi_kernels.optim", 9),
    ("epi_kernels", 10),
    ("epi_kernels.__main__", 11),
]


def tier(module: str) -> int:
    for prefix, number in TIERS:
        if module == prefix or (prefix.endswith(".") and module.startswith(prefix)):
            return number
    raise AssertionError(f"{module} is in no tier: say in TIERS where it belongs")


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


def upward(name: str, imported: str) -> bool:
    """Return whether an import goes up, or sideways between modules of one tier."""
    return tier(imported) >= tier(name)


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules().items()
        for imported in imports(path)
        if upward(name, imported)
    ]
    assert not wrong, wrong


def test_the_rule_sees_an_upward_and_a_sideways_import() -> None:
    assert upward("epi_kernels.contract", "epi_kernels.dispatch")
    assert upward("epi_kernels.ops.threshold.reference", "epi_kernels.ops.importance.reference")
    assert not upward("epi_kernels.optim.epi", "epi_kernels.optim.base")


def test_importing_the_package_needs_torch_alone() -> None:
    script = (
        "import sys, epi_kernels, epi_kernels.metrics, epi_kernels.plots\n"
        "heavy = {'matplotlib', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
