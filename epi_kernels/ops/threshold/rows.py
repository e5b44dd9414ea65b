"""The table of importances, which the backends on a GPU share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels.ops.flat import Flat
from epi_kernels.ops.table import Table, row_length, table_sizes
from epi_kernels.schema import SCORE
from epi_kernels.storage import CODES


def table_of(
    importances: Sequence[Tensor | None],
    layers: Sequence[int],
    budgets: Sequence[int],
    chunk: int,
    device: torch.device,
    scales: Sequence[Tensor | None] = (),
    tile: int = 1,
) -> Table:
    """Return the table of flat importances, each with its layer, its budget and its scales if it has some.

    The importances of one storage are one kind. `tile`: the entries of a tile, see `epi_kernels.ops.table.table_sizes`.
    """
    codes = [CODES[torch.float32 if tensor is None else tensor.dtype] for tensor in importances]
    table = Table(SCORE.words, table_sizes(importances, tile), chunk, device, codes)
    table.point("importance", importances)
    table.set("layer", layers)
    table.set("budget", budgets)
    table.set("importance_dtype", codes)
    table.set("row", [1 if tensor is None else row_length(tensor) for tensor in importances])
    if scales:
        table.point("scales", scales)
    return table


class Scored:
    """A fixed list of importances as a table on a GPU; copies replace those whose entries do not lie side by side."""

    tile = 1  # entries of a tile, where a backend takes blocks of 8 bits

    def chunk(self) -> int:
        """Return the number of entries in a chunk."""
        raise NotImplementedError

    def __init__(
        self,
        importances: Sequence[Tensor],
        layers: Sequence[int],
        budgets: Sequence[int],
        device: torch.device,
        scales: Sequence[Tensor | None] = (),
    ) -> None:
        self._row_major = any(own is not None for own in scales)
        flat = Flat(written=[importances], row_major=self._row_major)
        self._strided = flat.strided
        self.table = table_of(flat.written[0], layers, budgets, self.chunk(), device, scales, self.tile)

    def placed(self, importances: Sequence[Tensor]) -> Flat | None:
        """Point the table to new copies and return them, to be written back; None if no copies are needed."""
        if not self._strided:
            return None
        flat = Flat(written=[importances], strided=self._strided, row_major=self._row_major)
        self.table.point("importance", flat.written[0])
        return flat
