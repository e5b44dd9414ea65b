"""50 steps, saved, loaded in a new process, and 50 more are 100 straight: bit for bit, in every mode and dtype."""

from pathlib import Path

import forked
import pytest
import resume
import torch
from states import same_state


@pytest.mark.parametrize(("mode", "dtype"), resume.RUNS, ids=[f"{mode}, {dtype}" for mode, dtype in resume.RUNS])
def test_resumed_in_a_new_process_is_uninterrupted(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    params = resume.parameters(dtype)
    optimizer = resume.optimizer_of(mode, params)
    resume.train(params, optimizer, 1, resume.HALF)
    half = {n: p.detach().clone() for n, p in params.items()}
    torch.save(resume.contents(params, optimizer), tmp_path / "run.pt")
    forked.run(resume.go_on, 1, tmp_path / "run.pt", mode, dtype)
    finished = torch.load(tmp_path / "run.pt", weights_only=True)
    resume.train(params, optimizer, resume.HALF + 1, resume.WHOLE)
    assert same_state({n: p.detach() for n, p in params.items()}, finished["params"])
    assert same_state(optimizer.state_dict(), finished["optimizer"])
    if hasattr(optimizer, "telemetry") and mode != "off":
        assert any(optimizer.isolation_mask(p).any() for p in params.values())
    assert any((p != half[n]).any() for n, p in params.items())
