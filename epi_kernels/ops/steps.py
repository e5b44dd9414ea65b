"""The steps of a rule, over whole tensors or over trainable entries: check, choose a backend, prepare, run.

They are registered with torch (``torch.ops.epi_kernels.*``), so that ``torch.compile`` sees one opaque node. An
optimizer, which steps the same tensors again and again, prepares a step once and keeps what the backend has made.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epi_kernels.backends.registry import choose
from epi_kernels.backends.support import Spec
from epi_kernels.contract import (
    check_indices,
    check_lists,
    check_one_device,
    check_one_dtype,
    check_rows,
    check_tensor,
    check_value,
)
from epi_kernels.ops.storages import check_storages
from epi_kernels.ops.tensors import Tensors, dtypes_of
from epi_kernels.rules import Rule, rule_of
from epi_kernels.schema import width_of


def prepared_sweep(rule: Rule, tensors: Tensors, lock_in: str, lockable: Sequence[bool], backend: str) -> Any:
    """Return a backend's `sweep_` of these tensors, with all prepared that stays the same from step to step.

    The returned object keeps no tensor. Its one function takes the tensors again in each step::

        step_(tensors, nonfinite, scalars, rows, advanced, grad_factor, found_inf, moved) -> bool

    Those tensors must have the same shapes, strides, dtypes, devices and slots as the tensors given here; that is not
    checked again. Pass `moved=True` if any of them except a gradient has another address than before. Where the host
    does not know `advanced`, it may be a float32 tensor of one value on the tensors' device, where not 0 means True;
    `scalars` may then be float32 on that device. The function returns whether `nonfinite` may have grown. The caller
    tells autograd what was written. Its ``table`` is the `epi_kernels.ops.table.Table` of the last step on a GPU; None
    on a backend for which the alignment of addresses makes no difference.

    Args:
        rule: how an entry moves.
        tensors: as `sweep_` takes them. None is returned if there is no parameter.
        lock_in: see `sweep_`.
        lockable: see `sweep_`.
        backend: "auto" or the name of one.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `sweep_`.
    """
    params, grads, locks = tensors.params, tensors.grads, tensors.locks
    _check_slots(rule, tensors)
    check_lists({**tensors.slots, "locks": locks, "rests": tensors.rests}, params=params, grads=grads)
    check_one_dtype(params=params, grads=grads)
    _check_locks(rule, locks, lock_in, lockable, len(params))
    if not params:
        return None
    check_one_device("params", params, params[0].device)
    check_storages(rule, tensors, [] if lock_in == "static" else locks)
    states = dtypes_of(*tensors.slots.values(), [] if lock_in == "static" else locks)
    chosen = choose(Spec("sweep_", dtypes_of(params, grads), states), params[0].device, backend)
    where = "slot" if lock_in == rule.importance_slot else lock_in
    return chosen.module.Sweep(rule, tensors, where, lockable)


@torch.library.custom_op("epi_kernels::sweep_", mutates_args=("params", "slots", "locks", "nonfinite"))
def sweep_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    locks: Sequence[Tensor | None],
    nonfinite: Tensor,
    scalars: Tensor,
    rows: Sequence[int],
    lock_in: str,
    lockable: Sequence[bool],
    advanced: bool,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    backend: str,
) -> None:
    """Take one step of a rule in place; locked entries keep their bits, but their slots advance too.

    ::

        g <- factor g
        S <- beta S + (1 - beta) g^2                       EPI (arXiv 2604.14010) Eq. 5
        theta', slots <- rule(theta, g, slots)             see `epi_kernels.rules`
        theta <- theta                                     where locked, EPI Eq. 12-13
        theta <- theta'                                    elsewhere

    Where the lock is in a slot of the rule, that slot is S, and the rule uses S as the second line has advanced it.

    Args:
        rule: the name of one of `epi_kernels.rules.RULES`.
        params: theta, floating point, of one dtype; written.
        grads: same shapes, any one floating dtype; read.
        slots: the first slot of every parameter, then the second of every one, and so on, in the rule's order; same
            shapes, written. None where a parameter lacks an optional slot; an optional slot that no parameter has may
            be left out. The slot that `lock_in` names is signed (see `epi_kernels.lock`).
        locks: for each lockable tensor, with ``lock_in="importance"`` the signed S, written; with ``"static"`` int8,
            read. None for the other tensors; with another `lock_in` all None, or an empty list.
        nonfinite: int64 [tensors]; the number of entries whose g^2 was NaN or infinite is added. Such an entry of S
            stays as it was, unless S is a slot of the rule.
        scalars: float64 [n, m] on the CPU; each row is from `epi_kernels.engine.clocks.scalars_of`.
        rows: the row of `scalars` that each tensor uses.
        lock_in: where the lock bit is: "none", "importance", "static", or the rule's importance slot, "exp_avg_sq" of
            AdamW.
        lockable: for each tensor, whether it has its lock there; the others have no lock.
        advanced: True if S has already been advanced with this step's g^2 (a refresh came first).
        grad_factor: float32, one value on the tensors' device, by which every gradient is multiplied first: 1 / scale
            of automatic mixed precision, a clip factor, or their product.
        found_inf: float32, one value on the tensors' device. Where it is not 0 nothing changes at all.
        backend: "auto" or the name of one.

    Here every tensor is rounded to nearest. Tensors in blocks of 8 bits, parameters with rests and stochastic rounding
    need more than this operation takes: see `prepared_sweep` and `epi_kernels.ops.Tensors`.

    Raises:
        ValueError: lists do not belong together, or `rule`, `lock_in` or the backend is unknown.
        TypeError: params or grads have several dtypes; a lock with ``lock_in="static"`` is not int8.
        NotImplementedError: the backend does not have this operation.
        RuntimeError: the backend cannot run on these tensors.
    """
    of = rule_of(rule)
    tensors = _tensors(of, params, grads, slots, locks)
    sweep = prepared_sweep(of, tensors, lock_in, lockable, backend)
    check_rows(scalars, rows, len(params), width_of(of))
    if sweep is not None:
        check_tensor("nonfinite", nonfinite, torch.int64, (len(params),), params[0].device)
        check_value("grad_factor", grad_factor, params[0].device)
        check_value("found_inf", found_inf, params[0].device)
        sweep.step_(tensors, nonfinite, scalars, rows, advanced, grad_factor, found_inf, False)
        _say_written(tensors)


sweep_.register_fake(lambda *_: None)


def prepared_gather(rule: Rule, tensors: Tensors, indices: Sequence[Tensor], backend: str) -> Any:
    """Return a backend's `gather_` of these tensors, with all prepared that stays the same from step to step.

    The returned object keeps no tensor. Its one function takes the tensors again:
    ``step_(tensors, indices, scalars, rows)``. All but the gradients must be the same tensors as here; the gradients
    must have the same shapes, strides, dtypes and devices as here. That is not checked again. Offsets that a backend
    computes from indices live as long as the indices. The caller tells autograd what was written.

    Args:
        rule: how an entry moves.
        tensors: as `gather_` takes them, without locks. Without a parameter None is returned.
        indices: see `gather_`.
        backend: "auto" or the name of one.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `gather_`.
    """
    params, grads = tensors.params, tensors.grads
    check_lists(params=params, grads=grads)
    check_one_dtype(params=params, grads=grads)
    _check_slots(rule, tensors)
    check_indices(params, indices, **tensors.slots, **({"rests": tensors.rests} if tensors.rests else {}))
    if not params:
        return None
    check_one_device("params", params, params[0].device)
    check_storages(rule, tensors, [])
    states = dtypes_of(*tensors.slots.values())
    if torch.uint8 in states:
        raise TypeError("a slot of selected entries is uint8: those are not kept in blocks of 8 bits; pass bfloat16")
    chosen = choose(Spec("gather_", dtypes_of(params, grads), states), params[0].device, backend)
    return chosen.module.Gather(rule, tensors, indices)


@torch.library.custom_op("epi_kernels::gather_", mutates_args=("params", "slots"))
def gather_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    scalars: Tensor,
    rows: Sequence[int],
    backend: str,
) -> None:
    """Take one step of a rule in place for the trainable entries; the others are not touched, and cost nothing.

    The equations are those of `sweep_` without a lock. State and time are proportional to the number of trainable
    entries.

    Args:
        rule: the name of one of `epi_kernels.rules.RULES`.
        params: theta, floating point, of one dtype; written at the trainable entries only.
        grads: same shapes, any one floating dtype; read.
        indices: 1-D, int64 or int32, for each parameter: the positions of its trainable entries in row-major order of
            its shape, whatever its strides; strictly increasing, which is not checked.
        slots: in the same order and with the same None as in `sweep_`; each 1-D, with one value for each index;
            written.
        scalars: float64 [n, m] on the CPU; each row is from `epi_kernels.engine.clocks.scalars_of`.
        rows: the row of `scalars` that each tensor uses.
        backend: "auto" or the name of one.

    Every tensor is rounded to nearest, as in `sweep_`.

    Raises:
        ValueError: lists do not belong together, or the rule or the backend is unknown. On the CPU also: the first or
            the last index of a tensor is out of range.
        TypeError: indices are not integers; params or grads have several dtypes.
        NotImplementedError: the backend does not have this operation.
        RuntimeError: the backend cannot run on these tensors.

    Example:
        >>> from epi_kernels.engine.clocks import scalars_of
        >>> group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0, "maximize": False}
        >>> scalars = torch.tensor([scalars_of(rule_of("adamw"), group, 1)], dtype=torch.float64)
        >>> theta, slots = torch.ones(2, 2), [torch.zeros(1), torch.zeros(1)]
        >>> gather_("adamw", [theta], [torch.ones(2, 2)], [torch.tensor([2])], slots, scalars, [0], "auto")
        >>> theta
        tensor([[1.0000, 1.0000],
                [0.9000, 1.0000]])
    """
    of = rule_of(rule)
    tensors = _tensors(of, params, grads, slots, [])
    gather = prepared_gather(of, tensors, indices, backend)
    check_rows(scalars, rows, len(params), width_of(of))
    if gather is not None:
        gather.step_(tensors, indices, scalars, rows)
        _say_written(tensors)


gather_.register_fake(lambda *_: None)


def _tensors(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    locks: Sequence[Tensor | None],
) -> Tensors:
    """Return the tensors of an operation as one record; the operation gets the slots as one flat list.

    Raises:
        ValueError: there are more slots than the rule has, or fewer.
    """
    count = len(params)
    names = [slot.name for slot in rule.slots]
    if len(slots) not in (count * rule.required, count * len(names)):
        optional = f"; {names[rule.required :]} may be left out" if rule.required < len(names) else ""
        raise ValueError(
            f"slots has {len(slots)} tensors for {count} params; pass all {names[0]}, then all of the next of "
            f"{names}{optional}"
        )
    present = names[: rule.required] if len(slots) == count * rule.required else names
    named = {name: list(slots[i * count : (i + 1) * count]) for i, name in enumerate(present)}
    return Tensors(list(params), list(grads), named, list(locks))


def _check_slots(rule: Rule, tensors: Tensors) -> None:
    """Check that the slots are those of the rule, in the rule's order, and that only optional slots are missing.

    Raises:
        ValueError: the slots are wrong, or a parameter has only some of the optional slots.
    """
    count = len(tensors.params)
    known = [slot.name for slot in rule.slots]
    names = list(tensors.slots)
    if names != [name for name in known if name in names]:
        raise ValueError(f"the slots are {names}; the rule {rule.name} has {known}, in this order")
    if not count:
        return
    for slot in rule.slots[: rule.required]:
        of_slot = tensors.slots.get(slot.name, [None] * count)
        for i, tensor in enumerate(of_slot):
            if tensor is None:
                raise ValueError(f"{slot.name}[{i}] is None; the rule {rule.name} keeps it for every parameter")
    optional = [tensors.slots.get(slot.name, [None] * count) for slot in rule.slots[rule.required :]]
    for i, of_param in enumerate(zip(*optional, strict=False)):
        if len({tensor is None for tensor in of_param}) > 1:
            wanted = [slot.name for slot in rule.slots[rule.required :]]
            raise ValueError(f"params[{i}] has some of the optional slots {wanted} of {rule.name}; pass all or none")


def _say_written(tensors: Tensors) -> None:
    """Tell autograd what a step has written."""
    written = [tensor for tensors_of in tensors.all_written() for tensor in tensors_of if tensor is not None]
    torch.autograd.graph.increment_version(written)


def _check_locks(
    rule: Rule, locks: Sequence[Tensor | None], lock_in: str, lockable: Sequence[bool], count: int
) -> None:
    known = ("none", "importance", *([rule.importance_slot] if rule.importance_slot else []), "static")
    if lock_in not in known:
        raise ValueError(f"Invalid lock_in: {lock_in!r}; choose one of {known}")
    if len(lockable) != count:
        raise ValueError(f"lockable has {len(lockable)} values for {count} params; pass one for each")
    for i, can in enumerate(lockable):
        fixed = locks[i] if locks else None
        if (fixed is not None) != (can and lock_in in ("importance", "static")):
            raise ValueError(f"locks[{i}] is {'None' if fixed is None else 'a tensor'} with {lock_in=}, lockable={can}")
        if fixed is not None and lock_in == "static" and fixed.dtype != torch.int8:
            raise TypeError(f"locks[{i}] is {fixed.dtype}; with lock_in='static' pass int8")
