"""50 steps, saved, loaded in a new process, and 50 more are 100 straight: bit for bit, in every mode and dtype.

Rounding has one mode in this version, "nearest"; the others are refused by name.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import resume
import torch
from states import same_state


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return every run as the second process left it."""
    halves = []
    for mode, dtype in resume.RUNS:
        params = resume.parameters(dtype)
        optimizer = resume.optimizer_of(mode, params)
        resume.train(params, optimizer, 1, resume.HALF)
        halves.append({"params": {n: p.detach() for n, p in params.items()}, "optimizer": optimizer.state_dict()})
    path = tmp_path_factory.mktemp("resume") / "runs.pt"
    torch.save(halves, path)
    subprocess.run([sys.executable, str(Path(resume.__file__)), str(path)], check=True)
    return list(torch.load(path, weights_only=True))


@pytest.mark.parametrize("index", range(len(resume.RUNS)), ids=[f"{mode}, {dtype}" for mode, dtype in resume.RUNS])
def test_resumed_in_a_new_process_is_uninterrupted(index: int, finished: list[Any]) -> None:
    mode, dtype = resume.RUNS[index]
    params = resume.parameters(dtype)
    optimizer = resume.optimizer_of(mode, params)
    resume.train(params, optimizer, 1, resume.HALF)
    half = {n: p.detach().clone() for n, p in params.items()}
    resume.train(params, optimizer, resume.HALF + 1, resume.WHOLE)
    assert same_state({n: p.detach() for n, p in params.items()}, finished[index]["params"])
    assert same_state(optimizer.state_dict(), finished[index]["optimizer"])
    if hasattr(optimizer, "telemetry") and mode != "off":
        assert any(optimizer.isolation_mask(p).any() for p in params.values())
    assert any((p != half[n]).any() for n, p in params.items())
