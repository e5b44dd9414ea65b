"""DeepSpeed ZeRO-1, 2 and 3 with an optimizer of ours as its client optimizer, on two processes of the CPU.

Bound, EPIAdamW and EPILion train, refresh with the model's layers, every entry counted once and padding never, save,
load and go on bit for bit. Unbound, a warning says that flat partitions are layers. Masks of MaskedAdamW and
SparseAdamW follow at stage 0, and flat partitions are refused, by IsolatedOptimizer too. Run by ``make deepspeed``,
which installs it.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="make deepspeed installs it")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bound", ["bound", "unbound", "lion"])
def test_zero(stage: int, bound: str, tmp_path: Path) -> None:
    run(stage, bound, tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["masked", "sparse"])
def test_fixed_masks_follow_or_are_refused(stage: int, kind: str, tmp_path: Path) -> None:
    run(stage, kind, tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_isolated_optimizer_protects_or_refuses(stage: int, tmp_path: Path) -> None:
    run(stage, "isolated", tmp_path)


def run(stage: int, what: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("deepspeed_ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(stage), what, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    failed = [f"rank {r}:\n{out}" for r, (p, out) in enumerate(zip(processes, outputs, strict=True)) if p.returncode]
    assert not failed, "\n".join(failed)
