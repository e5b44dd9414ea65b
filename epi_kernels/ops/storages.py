"""How the reference reads and writes tensors in every storage, and the check of what belongs to a storage."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.ops.tensors import Tensors
from epi_kernels.rules import Rule
from epi_kernels.storage import block8, half, noise, split
from epi_kernels.storage.noise import Noise, Place


def read(tensor: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the values of a slot or an importance, with their sign bits, in the dtype of the arithmetic."""
    return tensor.to(dtype) if scales is None else block8.decoded(tensor, scales)


def write_(
    tensor: Tensor, scales: Tensor | None, value: Tensor, of: Noise | None, slot: int, *, positive: bool
) -> None:
    """Write the values of a slot or an importance, rounded as its storage says.

    Args:
        tensor: written.
        scales: of a tensor in blocks of 8 bits, written; else None.
        value: in the dtype of the arithmetic.
        of: the noise of this step; None where nothing is rounded stochastically.
        slot: whose noise it is.
        positive: see `epi_kernels.storage.block8.encoded`.
    """
    if scales is not None:
        assert of is not None
        codes, new = block8.encoded(value, of.of(slot), positive=positive)
        tensor.copy_(codes)
        scales.copy_(new)
    elif tensor.dtype == torch.bfloat16:
        tensor.copy_(value if of is None else half.stochastic(value, tensor.dtype, of.of(slot)))
        # torch gives a NaN of bfloat16 any sign, and the sign of an importance is its lock
        bits = tensor.view(torch.int16)
        bits.copy_(torch.where(torch.signbit(value), bits | -0x8000, bits & 0x7FFF))
    else:
        tensor.copy_(value)


def noise_of(place: Place, step: float, shape: torch.Size, device: torch.device) -> Noise:
    """Return the noise of all entries of a tensor."""
    return Noise(place, step, torch.arange(shape.numel(), device=device).view(shape))


def weight_of(param: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the weights of a parameter in the dtype of the arithmetic."""
    return param.to(dtype) if rest is None else split.joined(param, rest)


def stored_weight(
    value: Tensor, param: Tensor, rest: Tensor | None, of: Noise | None, stochastic: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (parameter, rest) as they are stored after a step.

    Args:
        value: the weights after the step, in the dtype of the arithmetic.
        param: the parameter before the step.
        rest: the rest before the step, or None.
        of: the noise of this step; None where nothing is rounded stochastically.
        stochastic: whether the weights are rounded stochastically.
    """
    bits = of.of(noise.PARAM) if of is not None and stochastic else None
    if rest is not None:
        return split.split(value, param, rest, bits)
    if bits is not None and param.dtype in (torch.bfloat16, torch.float16):
        return half.stochastic(value, param.dtype, bits), None
    return value.to(param.dtype), None


def check_storages(rule: Rule, tensors: Tensors, locks: Sequence[Tensor | None]) -> None:
    """Check that scales, rests and places are there where the dtypes of the tensors need them.

    Raises:
        TypeError: scales or rests have another dtype, or a parameter with a rest is not bfloat16.
        ValueError: scales or places are missing, or scales have another shape.
    """
    named = [(name, of_slot, tensors.scales.get(name, [])) for name, of_slot in tensors.slots.items()]
    named.append(("locks", list(locks), tensors.lock_scales))
    noisy = tensors.stochastic
    for name, of_slot, scales in named:
        check_scales(name, of_slot, scales)
        noisy = noisy or any(tensor is not None and tensor.dtype == torch.uint8 for tensor in of_slot)
    for i, rest in enumerate(tensors.rests):
        if rest is not None and rest.dtype not in split.RESTS.values():
            raise TypeError(f"rests[{i}] is {rest.dtype}; pass {' or '.join(map(str, split.RESTS.values()))}")
        if rest is not None and tensors.params[i].dtype != torch.bfloat16:
            raise TypeError(f"params[{i}] is {tensors.params[i].dtype} and has a rest; only bfloat16 has one")
    if noisy and not tensors.places:
        raise ValueError("places is empty, and tensors are rounded stochastically; pass the place of each parameter")


def check_scales(name: str, tensors: Sequence[Tensor | None], scales: Sequence[Tensor | None]) -> None:
    """Check that exactly the tensors in blocks of 8 bits have scales, and of the right shape.

    Raises:
        TypeError: scales are not float32.
        ValueError: scales are missing, or have another shape or device, or a tensor that needs none has them.
    """
    for i, tensor in enumerate(tensors):
        own = scales[i] if scales else None
        if (own is not None) != (tensor is not None and tensor.dtype == torch.uint8):
            has = "no scales" if own is None else "scales"
            raise ValueError(f"{name}[{i}] is {None if tensor is None else tensor.dtype} with {has}; uint8 has scales")
        if own is None or tensor is None:
            continue
        if own.dtype != torch.float32:
            raise TypeError(f"the scales of {name}[{i}] are {own.dtype}; pass torch.float32")
        if tensor.dim() < 2 or tuple(own.shape) != block8.scales_shape(tensor.shape) or own.device != tensor.device:
            wanted = block8.scales_shape(tensor.shape) if tensor.dim() > 1 else "a tensor of 2 dimensions"
            raise ValueError(f"the scales of {name}[{i}] are {tuple(own.shape)} on {own.device}; pass {wanted}")
