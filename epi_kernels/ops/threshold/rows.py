"""What the backends on a GPU share: the table of importances."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.ops.table import Table
from epi_kernels.schema import SCORE


def table_of(
    importances: Sequence[Tensor | None],
    layers: Sequence[int],
    budgets: Sequence[int],
    chunk: int,
    device: torch.device,
) -> Table:
    """Return the table of flat importances, each with its layer and its budget."""
    table = Table(SCORE.words, [0 if tensor is None else tensor.numel() for tensor in importances], chunk, device)
    table.point("importance", importances)
    table.set("layer", layers)
    table.set("budget", budgets)
    return table
