"""docs/delta.md from its beginning to its end: its programs and its commands run, and its sizes are those of files."""

import re
from pathlib import Path

import pytest
import torch

from epi_kernels import delta
from epi_kernels.__main__ import main
from epi_kernels.delta import container

PAGE = (Path(__file__).parent.parent / "docs" / "delta.md").read_text()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    ran = set()
    for language, code in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL):
        if language == "python":
            exec(compile(code, "docs/delta.md", "exec"), names)
            continue
        for line in code.splitlines():
            arguments = line.removeprefix("$ python -m epi_kernels ").split()
            ran.add(arguments[1])
            main(arguments)
    assert ran == {"inspect", "merge", "apply", "undo", "combine", "export"}
    out = capsys.readouterr().out
    entries = sum(len(positions) for positions, _ in names["task"].values())  # type: ignore[attr-defined]
    assert f"{entries:,} in 2 parameters, bfloat16" in out
    assert f"out has {entries:,} entries" in out
    assert same(tmp_path / "base", names["base"])
    assert same(tmp_path / "out", names["model"])


def same(folder: Path, model: object) -> bool:
    _, tensors = container.read(folder / "model.safetensors")
    assert isinstance(model, torch.nn.Module)
    return all(torch.equal(tensors[name], param) for name, param in model.named_parameters())


def test_the_sizes_are_those_of_files(tmp_path: Path) -> None:
    count, k = 10**8, 10**5
    cases = [torch.randperm(count)[:k].sort().values, torch.cat([torch.arange(k - 1), torch.tensor([count - 1])])]
    said = re.findall(r"^\| .* \| (\d\.\d\d) \|$", PAGE, re.MULTILINE)
    for positions, size in zip(cases, said[:2], strict=True):
        path = tmp_path / "task"
        given = delta.Delta({"w": (positions, torch.zeros(k).bfloat16())}, shapes={"w": (count,)})
        delta.save(given, path)
        header = container.read_header(path).data
        assert f"{(path.stat().st_size - header) / k:.2f}" == size
