"""The target of a backend: who made the device of the tensors, and which kind of it.

Only this module asks torch for the vendor or the architecture of a device.
"""

from dataclasses import dataclass

import torch

_TEXTS = {"cpu": "the CPU", "nvidia": "an NVIDIA GPU", "amd": "an AMD GPU"}


@dataclass(frozen=True)
class Target:
    """What a backend has to know of the device on which the tensors are. As a text: "an NVIDIA GPU".

    Args:
        vendor: "cpu", "nvidia" or "amd"; for any other device torch's name of its type, such as "mps" or "meta".
        architecture: the compute capability of an NVIDIA GPU, (9, 0) for an H100; empty for every other device, whose
            architecture no backend asks for.
    """

    vendor: str
    architecture: tuple[int, ...] = ()

    def __str__(self) -> str:
        return _TEXTS.get(self.vendor, self.vendor)


def target_of(device: torch.device) -> Target:
    """Return the target that a device is. Of a GPU, this very one is asked and not the current one.

    torch calls the GPUs of AMD "cuda", too, and gives them capabilities: (9, 4) is an MI300, and no NVIDIA GPU.
    """
    if device.type != "cuda":
        return Target(device.type)
    if torch.version.hip is not None:
        return Target("amd")
    return Target("nvidia", torch.cuda.get_device_capability(device))


def with_index(device: torch.device) -> torch.device:
    """Return the device, and for "cuda" without an index the GPU that is the current one now."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
