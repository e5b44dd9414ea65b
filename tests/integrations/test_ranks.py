"""Trainer on two processes: DDP on gloo, FSDP2 as accelerate prepares it, and DeepSpeed ZeRO-1, 2 and 3.

Records, weights and states are the same after seven steps, a checkpoint and seven more as after fourteen, bit for bit.
Layers are the model's, every entry competes once, and ranks agree. Under DeepSpeed the callback binds the optimizer,
and refuses one that Trainer has replaced. Masks of MaskedAdamW and SparseAdamW follow to the parameters that FSDP2
makes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WAYS = ["ddp", "fsdp2", "fsdp2-masked", "fsdp2-sparse", "zero-1", "zero-2", "zero-3", "zero-given"]


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_on_two_processes(way: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("trainer_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), way, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-8000:]
