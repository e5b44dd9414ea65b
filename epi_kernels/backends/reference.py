"""The backend reference: plain torch, which runs everything everywhere."""

from epi_kernels.backends.support import Spec, Support
from epi_kernels.backends.target import Target


def supports(spec: Spec, target: Target) -> Support:
    """Return yes: plain torch can run everything."""
    return Support.yes()
