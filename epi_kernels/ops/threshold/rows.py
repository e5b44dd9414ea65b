"""The table of importances, which the backends on a GPU share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.ops.flat import Flat
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


class Scored:
    """A fixed list of importances as a table on a GPU; copies replace those whose entries do not lie side by side."""

    def chunk(self) -> int:
        """Return the number of entries in a chunk."""
        raise NotImplementedError

    def __init__(
        self, importances: Sequence[Tensor], layers: Sequence[int], budgets: Sequence[int], device: torch.device
    ) -> None:
        flat = Flat(written=[importances])
        self._strided = flat.strided
        self.table = table_of(flat.written[0], layers, budgets, self.chunk(), device)

    def placed(self, importances: Sequence[Tensor]) -> Flat | None:
        """Point the table to new copies and return them, to be written back; None if no copies are needed."""
        if not self._strided:
            return None
        flat = Flat(written=[importances], strided=self._strided)
        self.table.point("importance", flat.written[0])
        return flat
