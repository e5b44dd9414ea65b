"""A task as a small file: the values that it has changed, written into the base model when the task is wanted.

`SparseAdamW.delta` makes it. Positions and values are exact, so the model comes back bit for bit.
"""

from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from epi_kernels.distributed import is_dtensor, local, shard_of
from epi_kernels.ops.flat import put_

# name -> (positions in row-major order, values)
Delta = Mapping[str, tuple[Tensor, Tensor]]

_POSITIONS, _VALUES = ".indices", ".values"


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta) -> None:
    """Write a delta's values into the parameters of a model.

    Deltas of tasks that were trained one after the other are applied in that order.

    Args:
        model: as it was when the delta's task began; written. In a sharded model every rank writes its shards. A delta
            knows only the names and sizes of its model: another model with the same ones is accepted.
        delta: {name: (positions, values)}; names are those of ``model.named_parameters()``.

    Raises:
        ValueError: a name is unknown, positions or values do not fit the parameter, a position occurs twice, or the
            dtype differs; the model is then as it was.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> apply_delta(model, {"weight": (torch.tensor([1]), torch.tensor([0.5]))})
        >>> model.weight[0, 1].item()
        0.5
    """
    params = dict(model.named_parameters())
    for name, (positions, values) in delta.items():
        if name not in params:
            raise ValueError(f"the delta has {name}, which the model has not; it has {', '.join(params)}")
        param = params[name]
        if positions.shape != values.shape or positions.dim() != 1:
            raise ValueError(
                f"{name} has positions of shape {tuple(positions.shape)} and values of {tuple(values.shape)}; both are "
                "1-D and equally long"
            )
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise ValueError(f"{name} has positions of {positions.dtype}; they are integers")
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < param.numel():
            raise ValueError(
                f"the delta has positions from {int(positions.min())} to {int(positions.max())} in {name}, which has "
                f"{param.numel()} entries"
            )
        if positions.unique().numel() != positions.numel():
            raise ValueError(f"the delta has positions of {name} twice; it was changed, or put together from several")
        if values.dtype != param.dtype:
            raise ValueError(
                f"{name} is {param.dtype} in the model and {values.dtype} in the delta; convert one of them"
            )
    for name, (positions, values) in delta.items():
        _write(params[name], positions.long(), values)


def _write(param: Tensor, positions: Tensor, values: Tensor) -> None:
    if not is_dtensor(param):
        put_(param, positions.to(param.device), values.to(param.device))
        return
    # one whole tensor at a time, of which this rank's shard is taken
    here = [
        local(shard_of(put_(torch.zeros(param.shape, dtype=part.dtype, device="cpu"), positions, part), param))
        for part in (values, torch.ones(len(positions), dtype=torch.bool, device="cpu"))
    ]
    local(param).copy_(torch.where(here[1], here[0], local(param)))


def save_delta(delta: Delta, path: str | PathLike[str]) -> None:
    """Write a delta into a safetensors file: for every name ``<name>.indices`` and ``<name>.values``.

    Raises:
        ModuleNotFoundError: safetensors is not installed; ``pip install epi-kernels[delta]``.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, (positions, values) in delta.items():
        tensors[name + _POSITIONS], tensors[name + _VALUES] = positions.contiguous(), values.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def load_delta(path: str | PathLike[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the delta in a file that `save_delta` wrote.

    Raises:
        ValueError: the file has something else in it.
        ModuleNotFoundError: safetensors is not installed; ``pip install epi-kernels[delta]``.
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = [key.removesuffix(_POSITIONS) for key in tensors if key.endswith(_POSITIONS)]
    if {key for name in names for key in (name + _POSITIONS, name + _VALUES)} != tensors.keys():
        raise ValueError(f"{path} is no delta: it holds {', '.join(tensors)}")
    return {name: (tensors[name + _POSITIONS], tensors[name + _VALUES]) for name in names}
