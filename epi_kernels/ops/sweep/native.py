"""One step of a rule in which locked entries do not move, in C++ on the CPU; kernel: csrc/cpu/sweep.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epi_kernels import schema
from epi_kernels.backends import native
from epi_kernels.ops.flat import Flat
from epi_kernels.ops.tensors import Tensors
from epi_kernels.rules import RULES, Rule

_address = Tensor.data_ptr


class Sweep:
    """The step of a fixed list of tensors; contract: `epi_kernels.ops.prepared_sweep`."""

    table = None

    def __init__(self, rule: Rule, tensors: Tensors, lock_in: str, lockable: Sequence[bool]) -> None:
        self._rule, self._run = RULES.index(rule), native.function("epi_sweep")
        self._slots = [slot.name for slot in rule.slots]
        # noise depends on an entry's position in row-major order, and so does its block
        self._row_major = bool(tensors.places)
        flat = Flat(written=list(tensors.written()), read=[tensors.grads], row_major=self._row_major)
        self._strided = flat.strided
        self._table = table = native.table_of(schema.SWEEP.struct, param=flat.written[0], grad=flat.read[0])
        table["lock_in"] = [schema.LOCK_IN.index(lock_in) if can else 0 for can in lockable]
        table["row"] = native.rows_of(tensors.params)
        native.place(table, tensors.places)
        native.describe(table, self._slots, tensors.slots, tensors.rests, tensors.stochastic)
        if lock_in == "importance" and tensors.locks:
            table["lock_dtype"] = native.codes(tensors.locks)
        self._point(tensors, flat)

    def step_(
        self,
        tensors: Tensors,
        nonfinite: Tensor,
        scalars: Tensor,
        rows: Sequence[int],
        advanced: bool | Tensor,
        grad_factor: Tensor | None,
        found_inf: Tensor | None,
        moved: bool,
    ) -> bool:
        """Take the step."""
        if found_inf is not None and found_inf.item():
            return False
        table, flat, grads = self._table, None, tensors.grads
        if moved or self._strided:  # the copies have new addresses in each step
            flat = Flat(written=list(tensors.written()), read=[grads], strided=self._strided)
            self._point(tensors, flat)
            grads = flat.read[0]  # type: ignore[assignment]
        table["grad"] = list(map(_address, grads))
        values = scalars.to(torch.float32, copy=True).numpy()
        if grad_factor is not None:
            values[:, 0] *= grad_factor.item()  # the gradient's sign, a factor of the gradient wherever it is used
        table["scalars"][:, : values.shape[1]] = values if len(values) == 1 else values[rows]
        table["nonfinite"] = 0
        self._run(table.ctypes.data, len(table), self._rule, bool(advanced), torch.get_num_threads())
        counted = bool(table["nonfinite"].any())
        if counted:
            nonfinite += torch.from_numpy(table["nonfinite"].copy())
        if flat is not None:
            flat.write_back()
        return counted

    def _point(self, tensors: Tensors, flat: Flat) -> None:
        """Write into the table the addresses of the tensors that a step writes."""
        table = self._table
        params, *slots, locks, rests = flat.written
        table["param"] = native.addresses(params)
        for name, of_slot in zip(tensors.slots, slots, strict=True):
            if of_slot:
                table["slots"][:, self._slots.index(name)] = native.addresses(of_slot)
        for name, scales in tensors.scales.items():
            if scales:
                table["scales"][:, self._slots.index(name)] = native.addresses(scales)
        for field, of_field in (("lock", locks), ("lock_scales", tensors.lock_scales), ("rest", rests)):
            if of_field:
                table[field] = native.addresses(of_field)
