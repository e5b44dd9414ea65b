"""The GPUs on which both the backends triton and cuda run."""

from epi_kernels.backends.support import Support
from epi_kernels.backends.target import Target

# the compute capability of an A100, the oldest GPU for which the tests compile the kernels and check the code
OLDEST = (8, 0)


def runs_on(target: Target) -> Support:
    """Return whether kernels for NVIDIA GPUs run on a target."""
    if target.vendor == "amd":
        return Support.no(
            "it runs on NVIDIA GPUs; this torch is built for ROCm, and nobody has tried the kernels on an AMD GPU yet"
        )
    if target.vendor != "nvidia":
        return Support.no(f"it runs on NVIDIA GPUs and the tensors are on {target}")
    if target.architecture < OLDEST:
        found, needed = (".".join(map(str, version)) for version in (target.architecture, OLDEST))
        return Support.no(f"it needs compute capability {needed} and this GPU has {found}")
    return Support.yes()
