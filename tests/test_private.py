"""The private names of torch that the package uses are listed with their reasons, and this torch has all of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import epi_kernels
from epi_kernels import private

ROOT = Path(epi_kernels.__file__).parent
LISTED = {one.name for one in private.PRIVATE}

# private names that are not torch's: Python's, of tuples with names, DeepSpeed's and those that wrappers add to names
OTHERS = {"_fields", "_replace", "_getframe", "_hp_mapping"}

# an older torch calls it so
OLDER = {"_cuda_graph_capture_health_check"}


def names_of_the_package(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a file defines or assigns, which are ours."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def used(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a file takes from something: attributes, imports, and names in getattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (alias.name for alias in node.names)
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def uses() -> dict[str, str]:
    """Return the private names of others that the package uses, each with a file that does."""
    trees = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
    own = {name for tree in trees.values() for name in names_of_the_package(tree)} - LISTED
    return {
        name: str(path)
        for path, tree in trees.items()
        for name in used(tree)
        if name.startswith("_") and not name.startswith("__") and name not in own | OTHERS | OLDER
    }


def test_every_private_name_of_torch_that_is_used_is_listed() -> None:
    assert {name: path for name, path in uses().items() if name not in LISTED} == {}


def test_a_use_that_is_not_listed_would_be_seen() -> None:
    tree = ast.parse("import torch\nfrom torch.optim.adamw import _fused_adamw\ntorch._inductor.config\n")
    assert {"_fused_adamw", "_inductor"} <= set(used(tree))


def test_no_name_is_listed_for_nothing() -> None:
    text = "".join(path.read_text() for path in ROOT.rglob("*.py") if path.name != "private.py")
    assert [name for name in LISTED if name not in text] == []


def test_this_torch_has_every_name() -> None:
    assert private.missing() == [], "this torch lacks names on which the package stands"


def test_a_name_that_is_gone_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_foreach_norm")
    (gone,) = private.missing()
    assert gone.startswith("torch._foreach_norm: the norms of many gradients")
