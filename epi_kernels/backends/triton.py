"""The backend triton: kernels that Triton compiles on the machine where they run."""

import importlib.util
import os

from torch.torch_version import TorchVersion

from epi_kernels.backends import nvidia
from epi_kernels.backends.support import Spec, Support
from epi_kernels.backends.target import Target
from epi_kernels.storage import STATES, VALUES

# Triton 3.5 compiles divisions and roots so that subnormal numbers become 0, and steps and masks would differ
OLDEST = "3.6"


def supports(spec: Spec, target: Target) -> Support:
    """Return whether the kernels run what `spec` says on `target`."""
    return spec.within(VALUES, STATES) and _runs_on(target) and _installed()


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU: TRITON_INTERPRET=1, which a program may change.

    Interpreting is for tests: it is about ten thousand times slower than a compiled kernel.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def _runs_on(target: Target) -> Support:
    if target.vendor != "cpu":
        return nvidia.runs_on(target)
    refusal = "it runs on a GPU, and on the CPU only with TRITON_INTERPRET=1, for tests"
    return Support.unless("" if interpreted() else refusal)


def _installed() -> Support:
    if importlib.util.find_spec("triton") is None:
        return Support.unless("triton is not installed; pip install triton")
    import triton

    version = triton.__version__
    old = f"triton {version} divides subnormal numbers as 0; it needs triton {OLDEST} or newer, which torch 2.10 brings"
    return Support.unless(old if TorchVersion(version) < OLDEST else "")
