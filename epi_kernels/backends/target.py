"""The target of a backend: the vendor and the architecture of the tensors' device.

Only this module asks torch for the vendor, the architecture or the size of a device.
"""

from dataclasses import dataclass

import torch

_TEXTS = {"cpu": "the CPU", "nvidia": "an NVIDIA GPU", "amd": "an AMD GPU"}


@dataclass(frozen=True)
class Target:
    """What a backend has to know about the device of the tensors. ``str`` gives a text such as "an NVIDIA GPU".

    Args:
        vendor: "cpu", "nvidia" or "amd"; for any other device torch's name of its type, such as "mps" or "meta".
        architecture: the compute capability of an NVIDIA GPU, (9, 0) for an H100; empty for every other device, because
            no backend asks for the architecture there.
    """

    vendor: str
    architecture: tuple[int, ...] = ()

    def __str__(self) -> str:
        return _TEXTS.get(self.vendor, self.vendor)


def target_of(device: torch.device) -> Target:
    """Return the target for a device. If the device is a GPU, that GPU is asked, not the current one.

    torch also calls AMD GPUs "cuda" and gives them capabilities: (9, 4) is an MI300, not an NVIDIA GPU.
    """
    if device.type != "cuda":
        return Target(device.type)
    if torch.version.hip is not None:
        return Target("amd")
    return Target("nvidia", torch.cuda.get_device_capability(device))


def processors(device: torch.device) -> int:
    """Return the number of processors (SM) of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def with_index(device: torch.device) -> torch.device:
    """Return the device; for "cuda" without an index, return the current GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
