"""compute-sanitizer finds nothing in a run of every Triton kernel; run by `make gpu-sanitize`: it takes minutes."""

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

SANITIZED = """
import torch
from torch.nn import Parameter
from epi_kernels import EPIAdamW, ops
params = [Parameter(torch.randn(size, device="cuda")) for size in (1, 37, 4096, 9001)]
params += [Parameter(torch.randn(5000, device="cuda").bfloat16())]
for p in params:
    p.grad = torch.randn_like(p)
optimizer = EPIAdamW(params, layers="tensor", isolation_ratio=0.1, mask_interval=2, amsgrad=True)
for _ in range(4):
    optimizer.step()
p, indices = torch.randn(1000, device="cuda"), torch.arange(0, 1000, 7, device="cuda")
state = [torch.zeros(len(indices), device="cuda") for _ in range(2)]
ops.sparse_adamw_([p], [p.clone()], [indices], *([s] for s in state), torch.ones(1, 11).double(), [0], "triton")
sums = [torch.zeros(9001, device="cuda") for _ in range(2)]
ops.gradient_sums_(*([s] for s in sums), [params[3].grad], "triton")
torch.cuda.synchronize()
print("done")
"""


def test_compute_sanitizer_finds_nothing() -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on PATH")
    # torch and triton ask the driver for what may not be there, which is no error of a kernel
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command = ["compute-sanitizer", *options, sys.executable, "-c", SANITIZED]
    # in a block of torch's cache an access beyond a tensor hits the next one
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if "not supported" in run.stdout:
        pytest.skip("compute-sanitizer does not know this device")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "done" in run.stdout
