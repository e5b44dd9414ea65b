"""One step of a rule over trainable entries in C++ on the CPU; kernel: csrc/cpu/gather.cpp."""

from collections.abc import Sequence

from torch import Tensor

from epi_kernels import schema
from epi_kernels.backends import native
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.gather.offsets import Offsets
from epi_kernels.ops.tensors import Tensors
from epi_kernels.rules import RULES, Rule


class Gather:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_gather`."""

    def __init__(self, rule: Rule, tensors: Tensors, indices: Sequence[Tensor]) -> None:
        self._rule = RULES.index(rule)
        self._slots = [slot.name for slot in rule.slots]
        flat = Flat(written=[*tensors.slots.values(), tensors.rests])
        self._strided = flat.strided
        offsets = Offsets(tensors.params, tensors.grads, indices, noisy=bool(tensors.places))
        self._table = native.table_of(
            schema.GATHER.struct,
            param_offsets=offsets.of_params,
            grad_offsets=offsets.of_grads,
            positions=offsets.positions,
            param=tensors.params,
            grad=tensors.grads,
        )
        self._table["wide_offsets"] = offsets.wide
        native.place(self._table, tensors.places)
        native.describe(self._table, self._slots, tensors.slots, tensors.rests, tensors.stochastic)
        self._point(tensors, flat)
        self._offsets = offsets.kept()

    def step_(self, tensors: Tensors, indices: Sequence[Tensor], scalars: Tensor, rows: Sequence[int]) -> None:
        """Take the step."""
        flat = Flat(written=[*tensors.slots.values(), tensors.rests], strided=self._strided)
        if self._strided:  # the copies have new addresses in each step
            self._point(tensors, flat)
        self._table["grad"] = native.addresses(tensors.grads)
        values = scalars.float().numpy()
        self._table["scalars"][:, : values.shape[1]] = values[rows]
        native.call("epi_gather", self._table, self._rule)
        flat.write_back()

    def _point(self, tensors: Tensors, flat: Flat) -> None:
        """Write the addresses of the slots and the rests."""
        *slots, rests = flat.written
        if rests:
            self._table["rest"] = native.addresses(rests)
        for name, of_slot in zip(tensors.slots, slots, strict=True):
            if of_slot:
                self._table["slots"][:, self._slots.index(name)] = native.addresses(of_slot)
