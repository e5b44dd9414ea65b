"""Random programs over the optimizers: what a training program may do, in orders that nobody thought of.

    python tests/fuzzer.py --seed 17            repeat one program: print its lines, and what it shows
    python tests/fuzzer.py --seed 17 --shrink   leave out what it does not need for that
    python tests/fuzzer.py --minutes 10         new programs, in processes of their own; the seeds that fail at the end

A program is a `Case` and a list of actions, printed as lines of Python that can be pasted into a file beside this one.
The case holds an optimizer and its twin: the same on the reference backend, with contiguous parameters, in the ordinary
state of the process, never saved, loaded, copied or moved. After each action

- both have the same bits: parameters, moments, importance, masks; NaN is NaN;
- protected, frozen and untrained entries have kept their bits, and the others moved as torch.optim.AdamW moves them;
- masks are those of the paper, computed here from the importance, and refreshed when the number of steps says so;
- what was raised was raised by both, is a sentence of a kind that the documents name, and has changed nothing;
- warnings are known ones, and nothing is kept that was moved away.
"""

import argparse
import contextlib
import copy
import faulthandler
import functools
import gc
import inspect
import io
import itertools
import json
import math
import os
import pickle
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tolerances import LARGE_STEP_ULPS, STEP_ULPS, step_ulps
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Module, Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW
from epi_kernels.distributed import local
from epi_kernels.engine.plan import KEPT_PLANS
from epi_kernels.isolation.telemetry import Record
from epi_kernels.optim.release import release_gradients

# what is open: pattern of a finding -> why it is known. A program goes on behind such a one where it can
KNOWN: dict[str, str] = {}

CLEAN = (ValueError, TypeError, NotImplementedError, RuntimeError)

# sentences that one backend or one kind of storage may raise where its twin runs
REFUSALS = (
    r"backend='native' cannot run",
    r"which is shared out over ranks: not in this version",
)

# what a state may be refused for that was changed by `set` between two steps
ALLOWED_AT_LOAD = (r"has no max_exp_avg_sq and is not AdamW's with amsgrad", r"lr as a Tensor is not supported")

# warnings that may come, wherever they point
WARNINGS = (
    r"squared gradients were NaN or infinite",
    r"was given no parameter names",
    r"requires no gradient: its \d+ trainable entries stay those of this optimizer",
    r"lr_scheduler",
    r"grad attribute of a Tensor that is not a leaf",
    r"TypedStorage is deprecated",
    r"torch\.distributed|process group|_all_gather_base|_reduce_scatter_base|barrier",
)

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **s: torch.optim.SGD(p, **s),
    "momentum": lambda p, **s: torch.optim.SGD(p, momentum=0.9, **s),
    "AdamW": lambda p, **s: torch.optim.AdamW(p, **s),
    "Adagrad": lambda p, **s: torch.optim.Adagrad(p, **s),
    "Adafactor": lambda p, **s: torch.optim.Adafactor(p, **{k: v for k, v in s.items() if k != "foreach"}),
    "RMSprop": lambda p, **s: torch.optim.RMSprop(p, **s),
}

Spec = tuple[str, tuple[int, ...], str, str, int]  # name, shape, dtype, layout, group


def by_first_letter(name: str) -> str:
    """Group parameters into layers by the first letter of their names."""
    return name[0]


class Finding(Exception):  # noqa: N818
    """A program showed what must not be."""


# Ambient state -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ambient(state: str | None) -> Iterator[None]:
    """Be in a state of the process, and then in the ordinary one again."""
    with contextlib.ExitStack() as stack:
        if state in ("float64", "bfloat16", "float16"):
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(getattr(torch, state))
        elif state == "meta":
            stack.enter_context(torch.device("meta"))
        elif state == "flush":
            stack.callback(torch.set_flush_denormal, False)
            torch.set_flush_denormal(True)
        elif state == "deterministic":
            stack.callback(torch.use_deterministic_algorithms, False)
            torch.use_deterministic_algorithms(True)
        elif state == "threads":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(2)
        elif state == "inference":
            stack.enter_context(torch.inference_mode())
        elif state == "no_grad":
            stack.enter_context(torch.no_grad())
        elif state == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        else:
            assert state in (None, "thread"), state
        yield


AMBIENT = (
    "float64",
    "bfloat16",
    "float16",
    "meta",
    "flush",
    "deterministic",
    "threads",
    "inference",
    "no_grad",
    "autocast",
    "thread",
)


# Tensors -------------------------------------------------------------------------------------------------------------


def mesh() -> Any:
    """Return a mesh of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor's values as a plain tensor, without history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bits(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor's bytes."""
    plain = whole(tensor).resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.view(-1).view(torch.uint8)


def same(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits; NaN is NaN."""
    left, right = whole(left), whole(right)
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if torch.equal(bits(left), bits(right)):
        return True
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    if not left.is_floating_point():
        return False
    zeros = torch.zeros((), dtype=left.dtype, device="cpu")
    nan = left.isnan() & right.isnan()
    return torch.equal(bits(torch.where(nan, zeros, left)), bits(torch.where(nan, zeros, right)))


def placed(values: Tensor, layout: str) -> Tensor:
    """Return a copy of a tensor in another layout."""
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and values.dim() >= 1:
        held = torch.zeros(*values.shape[:-1], values.shape[-1] * 2, dtype=values.dtype, device="cpu")
        return held[..., ::2].copy_(values)
    if layout == "channels_last" and values.dim() == 4:
        return values.clone(memory_format=torch.channels_last)
    if layout == "offset":
        held = torch.zeros(values.numel() + 3, dtype=values.dtype, device="cpu")
        return held[3:].view(values.shape).copy_(values)
    if layout == "negated" and not values.is_complex():
        return torch._neg_view(-values)
    if layout == "expanded" and values.numel():
        return values.flatten()[:1].reshape([1] * values.dim()).expand(values.shape)
    return values.clone(memory_format=torch.contiguous_format)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return normal numbers that depend on the seed alone."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if dtype.is_complex:
        return torch.view_as_complex(
            torch.randn((*shape, 2), generator=generator, dtype=torch.float32, device="cpu")
        ).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def gradient(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return a gradient of a kind; see GRADIENTS."""
    values = drawn(shape, torch.complex64 if dtype.is_complex else torch.float32, seed)
    values = values * 10.0 ** (seed % 4 - 2)
    flat = values.view(-1)
    if kind == "zeros":
        values = torch.zeros_like(values)
    elif kind == "rows":  # of an embedding of which few occur
        flat[len(flat) // 3 :] = 0.0
    elif kind == "ties":
        values = torch.ones_like(values)
    elif kind in ("nan", "inf") and len(flat):
        flat[seed % len(flat)] = float(kind)
    elif kind == "huge":
        values = values * 1e25
    elif kind == "tiny":  # its square is 0, it is not subnormal
        values = values * 1e-28
    elif kind == "subnormal":
        values = values * 1e-20
        flat = values.view(-1)
        flat[::2] *= 1e-20
    elif kind == "integers":  # sums of their squares are exact: a norm is the same in every order
        values = (drawn(shape, values.dtype, seed) * 4).real.round().to(values.dtype)
    return values.to(dtype)


GRADIENTS = ("normal", "normal", "normal", "zeros", "rows", "ties", "nan", "inf", "huge", "tiny", "subnormal", "none")
PLAIN_GRADIENTS = frozenset({"normal", "zeros", "rows", "ties", "none", "integers"})


# The paper, once more ------------------------------------------------------------------------------------------------


def layer_of(name: str, layers: str) -> str:
    """Return the layer of a parameter: its tensor, or its block, or the module that it is in."""
    if layers == "tensor":
        return name
    if layers == "callable":
        return by_first_letter(name)
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


# the smallest normal number; what is below counts as 0 in importance, distances and scores
TINY = np.finfo(np.float32).tiny


def chosen(importance: dict[str, np.ndarray], groups: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the mask of each parameter by EPI Eq. 7-9, from the importance of all that are eligible.

    Args:
        importance: name -> float32 array.
        groups: name -> (isolation_ratio, layer).
        settings: normalize, scope.
    """
    scores = {}
    for name, values in importance.items():
        values = np.where(values < TINY, np.float32(0), values)
        if settings["normalize"] == "layer":
            of_layer = [v for n, v in importance.items() if groups[n][1] == groups[name][1] and v.size]
            low = min((float(v.min()) for v in of_layer), default=0.0)
            high = max((float(v.max()) for v in of_layer), default=0.0)
            low, high = (np.float32(0) if x < TINY else np.float32(x) for x in (low, high))
            with np.errstate(all="ignore"):
                distance, span = values - low, high - low
                values = np.where(distance >= TINY, distance / span, 0) if span >= TINY else np.zeros_like(values)
                values = np.where(values < 2 * TINY, np.float32(0), values).astype(np.float32)
        scores[name] = values
    budgets = defaultdict(list)
    for name, (ratio, layer) in groups.items():
        budgets[ratio, layer if settings["scope"] == "layer" else None].append(name)
    masks = {}
    for (ratio, _), names in budgets.items():
        together = np.sort(np.concatenate([scores[name].ravel() for name in names]))[::-1]
        k = math.floor(ratio * len(together) + 1e-9)
        tau = together[k - 1] if k else np.float32(np.inf)
        for name in names:
            masks[name] = (scores[name] >= tau) & (scores[name] > 0)
    return masks


# The machine ---------------------------------------------------------------------------------------------------------


class Side:
    """An optimizer, its parameters, and the model that they are in."""

    def __init__(self, params: list[Parameter], names: list[str]) -> None:
        self.params, self.names = params, names
        self.model = Module()
        self.register()
        self.optimizer: Any = None
        self.release: Any = None
        self.scaler: Any = None

    def register(self) -> None:
        for name, param in zip(self.names, self.params, strict=True):
            *path, leaf = name.split(".")
            module = self.model
            for part in path:
                if part not in module._modules:
                    module.add_module(part, Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(leaf, param)


class Case:
    """An optimizer of one of the classes, its twin, and the actions of a program on both.

    Args:
        kind: "EPIAdamW", "MaskedAdamW", "SparseAdamW", or "Isolated " and a key of BASES.
        params: (name, shape, dtype, layout, group) of each.
        groups: the settings of each group.
        settings: of the optimizer.
        named: whether the optimizer hears the names.
        backend: of the optimizer; the twin's is "reference".
        grads: layout and dtype of the gradients; dtype None: the parameter's.
        dtensor: the parameters are DTensors, of a mesh of one process.
        seed: of parameters and masks.
    """

    def __init__(
        self,
        kind: str,
        params: list[Spec],
        groups: list[dict[str, Any]],
        settings: dict[str, Any],
        named: bool = True,
        backend: str = "auto",
        grads: tuple[str, str | None] = ("contiguous", None),
        dtensor: bool = False,
        seed: int = 0,
        ambient: str | None = None,
    ) -> None:
        self.kind, self.settings, self.named, self.backend, self.grads = kind, dict(settings), named, backend, grads
        self.dtensor, self.seed = dtensor, seed
        self.specs, self.group_settings = list(params), list(groups)
        self.first_specs = len(params)  # those that masks were given of
        self.isolated, self.sparse = kind.startswith("Isolated"), kind == "SparseAdamW"
        self.evolving = kind == "EPIAdamW" or self.isolated
        self.steps_taken = 0  # that the clock of a refresh counts
        self.found: list[str] = []  # of what is known, or what a program can go on behind
        self.over = False
        self.action = "construction"
        self.on_time = True  # the refreshes, so far
        self.loaded = False  # into a fresh optimizer
        self.replaced = False  # Parameter objects, by others
        self.kinds: list[str] = []  # of the gradients that are there
        self.ratios_set = False  # an isolation_ratio, since the optimizer was made
        values = [drawn(s[1], getattr(torch, s[2]), seed * 100 + i) for i, s in enumerate(params)]
        self.twin = self.side(values, twin=True)
        self.ours = self.side(values, twin=False)
        self.both(
            lambda side: setattr(side, "optimizer", self.optimizer(side, side is self.twin)), ambient, snapshot=False
        )

    # Construction ----------------------------------------------------------------------------------------------------

    def side(self, values: list[Tensor], twin: bool) -> Side:
        return Side(
            [self.parameter(v, s, twin) for v, s in zip(values, self.specs, strict=True)], [s[0] for s in self.specs]
        )

    def parameter(self, values: Tensor, spec: Spec, twin: bool) -> Parameter:
        # torch's own arithmetic may go by the layout
        layout = spec[3] if not twin or self.isolated else "contiguous"
        if self.dtensor and (self.isolated or not twin):
            values = distribute_tensor(values.clone(), mesh(), [Shard(0) if values.dim() else Replicate()])
        else:
            values = placed(values, layout)
        param = Parameter(values, requires_grad="frozen" not in spec[3])
        if self.grads[1] is not None:
            param.grad_dtype = None
        return param

    def optimizer(self, side: Side, twin: bool) -> Any:
        groups: list[dict[str, Any]] = []
        for i, settings in enumerate(self.group_settings):
            members = [j for j, spec in enumerate(self.specs) if spec[4] == i]
            params = [(side.names[j], side.params[j]) if self.named else side.params[j] for j in members]
            groups.append({"params": params, **copy.deepcopy(settings)})
        settings = copy.deepcopy(self.settings)
        if settings.get("layers") == "callable":
            settings["layers"] = by_first_letter
        backend = "reference" if twin else self.backend
        if self.isolated:
            base = settings.pop("base")
            ours = ("isolation_ratio", "importance_beta", "mask_interval", "layers", "normalize", "scope", "threshold")
            own = {key: settings.pop(key) for key in ours if key in settings}
            return IsolatedOptimizer(BASES[self.kind.split()[1]](groups, **base, **settings), **own, backend=backend)
        if self.kind == "EPIAdamW":
            return EPIAdamW(groups, **settings, backend=backend)
        masks = {
            (side.names[j] if self.named else side.params[j]): mask for j, mask in self.masks(settings.pop("share"))
        }
        if self.sparse:
            return SparseAdamW(groups, trainable=masks, **settings, backend=backend)
        return MaskedAdamW(groups, frozen=masks, **settings, backend=backend)

    def masks(self, share: float) -> Iterator[tuple[int, Tensor]]:
        for j, spec in enumerate(self.specs[: self.first_specs]):
            if j % 3 != 2:
                generator = torch.Generator(device="cpu").manual_seed(self.seed + j)
                yield j, torch.rand(spec[1], generator=generator, dtype=torch.float32, device="cpu") < share

    # Running one action on both --------------------------------------------------------------------------------------

    def sides(self) -> list[Side]:
        return [self.ours, self.twin]

    def both(
        self,
        action: Callable[[Side], Any],
        state: str | None = None,
        snapshot: bool = True,
        twins_state: str | None = None,
    ) -> bool:
        """Do something to both, the twin in the ordinary state; return whether it was done, by both.

        What only one of them raises is a finding, unless it is a refusal that is known.
        """
        raised: list[BaseException | None] = []
        for side, where in ((self.ours, state), (self.twin, twins_state)):
            before = self.snapshot(side) if snapshot else None
            raised.append(self.attempt(lambda: action(side), where))  # noqa: B023
            changed = before is not None and not unchanged(before, self.snapshot(side))
            if raised[-1] is not None and changed and not self.of_a_base(raised[-1]):
                self.finding(f"raised after something had changed: {self.text(raised[-1])}")
        ours, twins = raised
        if ours is None and twins is None:
            return True
        self.over = True
        for error in (ours, twins):
            if error is not None:
                self.check_clean(error)
        if ours is None or twins is None:
            text = self.text(ours or twins)
            if self.of_a_base(ours or twins):
                self.over = True  # only one of the two took the step
            elif not any(re.search(pattern, text) for pattern in REFUSALS):
                self.finding(f"{'the twin' if ours is None else 'ours'} alone raised {text}")
        elif type(ours) is not type(twins):
            self.finding(f"raised {self.text(ours)}, and the twin {self.text(twins)}")
        return False

    def attempt(self, action: Callable[[], Any], state: str | None) -> BaseException | None:
        """Do something in a state of the process, and return what it raised."""
        raised: list[BaseException] = []

        def body() -> None:
            try:
                with ambient(state):
                    action()
            except Finding:
                raise
            except Exception as error:
                raised.append(error)

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            if state == "thread":
                thread = threading.Thread(target=body)
                thread.start()
                thread.join()
            else:
                body()
        for warning in heard:
            text = str(warning.message)
            if not any(re.search(pattern, text) for pattern in WARNINGS):
                self.finding(f"warned {warning.category.__name__}: {text[:200]} ({warning.filename}:{warning.lineno})")
        return raised[0] if raised else None

    def alone(self, action: Callable[[], Any], state: str | None = None, allowed: tuple[str, ...] = ()) -> bool:
        """Do something to ours that the twin is spared, and return whether it was done."""
        before = self.snapshot(self.ours)
        error = self.attempt(action, state)
        if error is None:
            return True
        if not unchanged(before, self.snapshot(self.ours)):
            self.finding(f"raised after something had changed: {self.text(error)}")
        self.check_clean(error)
        if not any(re.search(pattern, str(error)) for pattern in (*REFUSALS, *allowed)):
            self.finding(f"ours alone raised {self.text(error)}")
        return False

    def text(self, error: BaseException | None) -> str:
        assert error is not None
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
        own = [f for f in frames if "epi_kernels" in f[0] and "tests" not in f[0]]
        where = f" at {os.path.relpath(own[-1][0])}:{own[-1][1]}" if own else ""
        return f"{type(error).__name__}{where}: {str(error).splitlines()[0][:200] if str(error) else ''}"

    def check_clean(self, error: BaseException) -> None:
        if type(error) not in CLEAN and not isinstance(error, NotImplementedError):
            self.finding(f"raised {self.text(error)}")

    def finding(self, text: str, goes_on: bool = False) -> None:
        """Report; the program goes on where that is known, or makes sense."""
        text = f"{self.action}: {text}{' (Parameter objects were replaced)' if self.replaced else ''}"
        if goes_on:
            if text not in self.found:
                self.found.append(text)
            return
        raise Finding(text)

    def snapshot(self, side: Side) -> list[Any]:
        """Return a copy of all that an optimizer can change."""
        state = side.optimizer.state if side.optimizer is not None else {}
        groups = [] if side.optimizer is None else side.optimizer.param_groups
        return [
            [whole(p).clone() for p in side.params],
            [
                {k: whole(v).clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in state.get(p, {}).items()}
                for p in side.params
            ],
            [{k: v for k, v in group.items() if k not in ("params", "layers")} for group in groups],
        ]

    # Actions ---------------------------------------------------------------------------------------------------------

    def backward(self, seed: int, kinds: list[str], accumulate: bool = False) -> None:
        """Give gradients of these kinds, in turn, to the parameters that require them."""
        if self.ours.release is not None and any(p.grad is not None for p in self.ours.params):
            return
        if not accumulate:
            self.kinds = []
        given: dict[int, list[tuple[Parameter, Tensor]]] = {0: [], 1: []}
        for j, spec in enumerate(self.specs):
            kind = kinds[j % len(kinds)]
            if not self.ours.params[j].requires_grad or kind == "none":
                continue
            own = self.ours.params[j].dtype
            dtype = own if self.grads[1] is None or own.is_complex else getattr(torch, self.grads[1])
            values = gradient(kind, spec[1], dtype, seed * 100 + j)
            self.kinds.append(kind)
            layout = spec[3] if self.grads[0] == "as the parameter" else self.grads[0]
            shown = placed(values, layout)
            values = shown.resolve_neg().clone(memory_format=torch.contiguous_format)
            for number, side in enumerate(self.sides()):
                param = side.params[j]
                grad = values if side is self.twin and not self.isolated else shown
                if isinstance(param, DTensor):
                    grad = distribute_tensor(values, param.device_mesh, param.placements)
                given[number].append((param, grad))
        for number, side in enumerate(self.sides()):
            if side.release is None:
                for param, grad in given[number]:
                    before = param.grad
                    param.grad = grad.clone() if grad.is_contiguous() else grad
                    if accumulate and before is not None:
                        param.grad = before + grad
        if self.ours.release is not None and given[0]:
            before = [whole(p).clone() for p in self.ours.params]
            masks = [self.held(self.ours, j) for j in range(len(self.specs))]

            def run(side: Side) -> None:
                pairs = given[self.sides().index(side)]
                torch.autograd.backward([p for p, _ in pairs], [g for _, g in pairs])

            if self.both(run, snapshot=False):
                self.check_kept(before, masks)
                self.check()

    def step(self, how: str = "plain", times: int = 1, ambient: str | None = None) -> None:
        """Step once or several times by the gradients that are there."""
        if self.ours.release is not None:
            times, how = 1, "plain"
        for _ in range(times):
            if not self.over:
                self._step(how, ambient)

    def _step(self, how: str, state: str | None) -> None:
        made_there = state == "inference" or (state == "meta" and self.isolated)
        made = all(set(self.ours.optimizer.state.get(p, ())) - {"importance"} for p in self.ours.params)
        if made_there and not made and self.kind != "Isolated SGD":
            state = None  # as with torch's, a state that is made there is of no use elsewhere
        grads = [None if p.grad is None else whole(p.grad).clone() for p in self.ours.params]
        before = [whole(p).clone() for p in self.ours.params]
        states = self.snapshot(self.ours)[1]
        held_before = [self.held(self.ours, j) for j in range(len(self.specs))]
        telemetry = [self.telemetry(side) for side in self.sides()]
        skipped = how == "scaled" and not all(
            bool((whole(g).float() if not g.is_complex() else g).isfinite().all()) for g in grads if g is not None
        )
        if how == "scaled" and (
            self.dtensor or any(p.is_complex() for p in self.ours.params) or all(g is None for g in grads)
        ):
            how, skipped = "plain", False
        if how == "compiled" and (self.dtensor or self.grads[1] is not None):
            how = "plain"
        if how == "scaled":
            for p in (p for side in self.sides() for p in side.params if p.grad is not None):
                p.grad = p.grad.resolve_neg().clone(memory_format=torch.contiguous_format)  # it is written

        def run(side: Side) -> None:
            optimizer = side.optimizer
            if how == "scaled":
                if side.scaler is None:
                    side.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
                    side.scaler.scale(torch.ones((), dtype=torch.float32, device="cpu"))
                side.scaler.step(optimizer)
                side.scaler._per_optimizer_states.clear()
            elif how == "closure":
                value = torch.ones((), dtype=torch.float32, device="cpu")
                if optimizer.step(lambda: value) is not value:
                    raise Finding("step did not return what the closure returned")
            elif how == "compiled" and side is self.ours:
                torch._dynamo.reset()
                torch.compile(optimizer.step, backend="eager")()
            else:
                optimizer.step()

        # what torch's own optimizer does there is torch's
        twins = state if self.isolated and state not in (None, "meta", "float64", "thread") else None
        if not self.both(run, state, twins_state=twins):
            return
        self.flushed = state == "flush"
        if not skipped:
            self.steps_taken += 1
        grown = [len(self.telemetry(side)) - len(t) for side, t in zip(self.sides(), telemetry, strict=True)]
        if self.evolving:
            self.check_refresh(grown, skipped)
        # with released gradients the parameters have moved before
        held = held_before if self.ours.release is not None else [self.held(self.ours, j) for j in range(len(grads))]
        self.check_kept(before, held)
        if self.ours.release is None and not skipped and how != "scaled" and state != "flush":
            self.check_against_torch(before, states, grads, held)
        self.check()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with zeros."""
        if not set_to_none and self.grads[0] in ("expanded", "negated"):
            return
        self.both(lambda side: side.optimizer.zero_grad(set_to_none), snapshot=False)
        self.kinds = [] if set_to_none else ["zeros"]

    def refresh(self, ambient: str | None = None) -> None:
        """Refresh the masks by hand."""
        if not self.evolving:
            return
        telemetry = [self.telemetry(side) for side in self.sides()]
        if self.both(lambda side: side.optimizer.refresh(), ambient):
            grown = [len(self.telemetry(side)) - len(t) for side, t in zip(self.sides(), telemetry, strict=True)]
            competes = any(self.has_importance(p) for p, _ in self.eligible())
            if grown[0] != grown[1] and competes:
                self.finding(f"refresh() left {grown[0]} records, and the twin's {grown[1]}")
            if grown[0] and competes:
                self.check_masks()
            self.check()

    def freeze(self, param: int) -> None:
        """Let a parameter require no gradient."""
        for side in self.sides():
            p = side.params[param % len(side.params)]
            p.grad = None
            p.requires_grad_(False)

    def thaw(self, param: int) -> None:
        """Let a parameter require a gradient again."""
        for side in self.sides():
            side.params[param % len(side.params)].requires_grad_(True)

    def add_param_group(self, params: list[Spec], settings: dict[str, Any], ambient: str | None = None) -> None:
        """Add a group of new parameters."""
        if self.ours.release is not None or len(self.group_settings) > 4:
            return
        number = len(self.group_settings)
        specs = [(f"{s[0]}_{number}", *s[1:4], number) for s in params]
        start = len(self.specs)
        values = [drawn(s[1], getattr(torch, s[2]), self.seed * 100 + start + i) for i, s in enumerate(specs)]
        added = {
            id(side): [self.parameter(v, s, side is self.twin) for v, s in zip(values, specs, strict=True)]
            for side in self.sides()
        }

        def run(side: Side) -> None:
            new = added[id(side)]
            named = [(s[0], p) for s, p in zip(specs, new, strict=True)]
            side.optimizer.add_param_group({"params": named if self.named else new, **copy.deepcopy(settings)})

        if not self.both(run, ambient):
            return
        self.specs.extend(specs)
        self.group_settings.append(settings)
        for side in self.sides():
            side.params.extend(added[id(side)])
            side.names.extend(s[0] for s in specs)
            side.register()
        self.check()

    def set(self, key: str, value: Any, group: int | None = None) -> None:
        """Write a setting into one group, or into all of them."""
        self.ratios_set |= key == "isolation_ratio"
        for side in self.sides():
            groups = side.optimizer.param_groups
            for g in groups if group is None else [groups[group % len(groups)]]:
                if key in g:
                    g[key] = copy.deepcopy(value)

    def schedule(self, gamma: float, ambient: str | None = None) -> None:
        """Let a scheduler of torch's set the learning rate."""

        def run(side: Side) -> None:
            for group in side.optimizer.param_groups:
                group.pop("initial_lr", None)
            torch.optim.lr_scheduler.ExponentialLR(side.optimizer, gamma).step()
            side.optimizer.__dict__.pop("step", None)  # which it has wrapped

        self.both(run, ambient, snapshot=False)

    def clocks_at_zero(self) -> bool:
        """Return whether the optimizer has taken no step."""
        groups = self.ours.optimizer.param_groups
        return not any(group.get("isolation_clock", 1) for group in groups)

    def save_and_load(self, via: str, into: str = "fresh", ambient: str | None = None) -> None:
        """Save the state and go on from it: in the same optimizer, or in a fresh one over copies of the parameters."""
        if self.ours.release is not None:
            return
        if via in ("pickle", "deepcopy"):
            self.copies(via)
            return
        nested = via.startswith("dcp")
        # a checkpoint loads what has a place: an optimizer that exempts a parameter has none for its importance
        if nested and self.clocks_at_zero():
            return  # torch takes a step of zeros first, which counts
        if nested and (not self.fits_dcp() or (self.ratios_set and into == "fresh")):
            return
        names, lost = self.ours.names, []
        if nested:
            # as with torch: the state of what requires no gradient is not in the file
            lost = [
                j for j, p in enumerate(self.ours.params) if not p.requires_grad and self.ours.optimizer.state.get(p)
            ]
        target = self.ours
        if into == "fresh":
            values = [whole(p).clone() for p in self.ours.params]
            target = Side([self.parameter(v, s, False) for v, s in zip(values, self.specs, strict=True)], list(names))
            for p, q in zip(self.ours.params, target.params, strict=True):
                q.requires_grad_(p.requires_grad)
                q.grad_dtype = p.grad_dtype if not isinstance(q, DTensor) else None
        masks = [self.masks_of(self.ours, j) for j in range(len(self.specs))]

        def run() -> None:
            if nested:
                self.through_dcp(target, flattened="flattened" in via)
                return
            saved = self.ours.optimizer.state_dict()
            if via == "deepcopied":
                saved = copy.deepcopy(saved)
            elif via == "file":
                saved = through_a_file(saved)
            if target is not self.ours:
                target.optimizer = self.optimizer(target, twin=False)
            target.optimizer.load_state_dict(saved)

        if not self.alone(run, ambient, allowed=ALLOWED_AT_LOAD):
            return
        grads = [p.grad for p in self.ours.params]
        for p, grad in zip(target.params, grads, strict=True):
            p.grad = grad
        target.scaler = self.ours.scaler
        self.loaded |= target is not self.ours
        self.ours = target
        for j in lost:
            p, q = self.ours.params[j], self.twin.params[j]
            if self.sparse and not torch.equal(masks[j], self.masks_of(self.ours, j)):
                self.finding(f"{names[j]}, which required no gradient, has lost its selection")
            self.twin.optimizer.state.pop(q, None)
            if self.sparse:
                state = {k: whole(v).clone() for k, v in self.ours.optimizer.state[p].items()}
                state["indices"] = state.pop("trainable", state.get("indices"))  # of a DTensor's shard
                self.twin.optimizer.state[q] = state
        self.check()

    def fits_dcp(self) -> bool:
        """Return whether torch.distributed.checkpoint takes a state: as torch, only one that is complete."""
        state = self.ours.optimizer.state
        trained = [p for p in self.ours.params if p.requires_grad]
        if any(p.grad is not None for p in self.ours.params) and not all(state.get(p) for p in self.ours.params):
            return False
        if self.isolated and any(p.dtype == torch.float16 for p in self.ours.params):
            return False  # torch makes the state by a step of zeros, in which torch's optimizers divide 0 by 0
        if self.isolated and not all(bool(whole(p).isfinite().all()) for p in self.ours.params):
            return False  # with lr=0 too, torch's SGD moves what is infinite, by 0 times infinity
        if any(not p.requires_grad and not state.get(p) for p in self.ours.params):
            return False
        if self.kind == "Isolated Adagrad" and any("sum" not in state.get(p, ()) for p in self.ours.params):
            return False  # torch's Adagrad makes a state when it is constructed, and none for what is added
        if self.isolated and any(
            g["isolation_ratio"] and p.requires_grad and "importance" not in state.get(p, ())
            for g in self.ours.optimizer.param_groups
            for p in g["params"]
        ):
            return False
        if self.kind == "Isolated SGD" and not all(state.get(p) for p in trained):
            return False  # torch loads the states of all or of none
        if any(isinstance(v, Tensor) for g in self.ours.optimizer.param_groups for v in (g["lr"],)):
            return False
        moments = all(
            ("step" in state.get(p, ()) and len(state[p]) > 1) or self.kind in ("Isolated SGD",) for p in trained
        )
        return bool(trained) and moments and all(p.numel() for p in self.ours.params)

    def through_dcp(self, target: Side, flattened: bool) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=flattened)
        with tempfile.TemporaryDirectory() as folder:
            saved = get_optimizer_state_dict(self.ours.model, self.ours.optimizer, options=options)
            dcp.save({"optimizer": saved}, checkpoint_id=folder)
            if target is not self.ours:
                target.optimizer = self.optimizer(target, twin=False)
            state = {"optimizer": get_optimizer_state_dict(target.model, target.optimizer, options=options)}
            dcp.load(state, checkpoint_id=folder)
            set_optimizer_state_dict(target.model, target.optimizer, state["optimizer"], options=options)

    def copies(self, via: str) -> None:
        """Go on with a copy of the optimizer and its model."""
        if self.dtensor and via == "pickle":
            return
        kept = (self.ours.model, self.ours.params, self.ours.optimizer)
        grads = [p.grad for p in self.ours.params]

        def run() -> None:
            for p in self.ours.params:
                p.grad = None
            copied = pickle.loads(pickle.dumps(kept)) if via == "pickle" else copy.deepcopy(kept)
            self.ours.model, self.ours.params, self.ours.optimizer = copied

        if self.alone(run):
            for p, grad in zip(self.ours.params, grads, strict=True):
                if self.grads[1] is not None:
                    p.grad_dtype = None
                p.grad = grad
            self.check()

    def move_state(self) -> None:
        """Put the state into another place in memory, as those do who offload it between steps."""
        if self.ours.release is not None:
            return
        old = []
        for entry in self.ours.optimizer.state.values():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    # a mask or selection stays until the next step: a state that is cleared keeps it
                    if value.dim() and key not in ("frozen", "indices", "trainable"):
                        old.append((key, weakref.ref(value)))
                    entry[key] = value.clone()
        value = entry = None
        if any(ref() is not None for _, ref in old):
            gc.collect()
        alive = sorted({key for key, ref in old if ref() is not None})
        if alive:
            self.finding(f"still holds the old {', '.join(alive)}", goes_on=True)
        self.check()

    def move_parameters(self, param: int) -> None:
        """Put the values of a parameter into another place in memory, under the same Parameter."""
        j = param % len(self.specs)
        values = whole(self.ours.params[j]).clone()
        if isinstance(self.ours.params[j], DTensor):
            p = self.ours.params[j]
            p.data = distribute_tensor(values, p.device_mesh, p.placements)
        else:
            self.ours.params[j].data = placed(values, self.specs[j][3])

    def replace_parameters(self) -> None:
        """Put new Parameter objects of the same values into the groups, as wrappers do."""
        if self.ours.release is not None:
            return
        optimizer, state = self.ours.optimizer, self.ours.optimizer.state
        new = []
        for p, spec in zip(self.ours.params, self.specs, strict=True):
            q = self.parameter(whole(p).clone(), spec, False)
            q.requires_grad_(p.requires_grad)
            q.grad = p.grad
            new.append(q)
        replaced = dict(zip(self.ours.params, new, strict=True))
        for group in optimizer.param_groups:
            group["params"] = [replaced[p] for p in group["params"]]
        for p, q in replaced.items():
            if p in state:
                state[q] = state.pop(p)
        self.ours.params = new
        self.ours.register()
        self.replaced = True
        self.check()

    def reset(self, how: str) -> None:
        """Start over with fresh states."""
        if self.ours.release is not None:
            return
        optimizer, twin = self.ours.optimizer, self.twin.optimizer
        if how == "assign":
            optimizer.state = defaultdict(dict)
            twin.state.clear()
        elif how == "clear":
            optimizer.state.clear()
            twin.state.clear()
        else:
            for side in self.sides():
                side.optimizer.state.pop(side.params[0], None)
        gone = range(len(self.specs)) if how != "delete" else [0]
        for j in gone:
            if self.evolving and not self.sparse and bool(self.masks_of(self.ours, j).any()):
                self.finding(f"{self.specs[j][0]} is protected by a state that is gone")
            if optimizer.state.get(self.ours.params[j]):
                self.finding(f"{self.specs[j][0]} has its state still")
        self.check()

    def replace_groups(self, lr: float) -> None:
        """Put other dicts in the place of the groups, with another learning rate."""
        for side in self.sides():
            side.optimizer.param_groups = [{**group, "lr": lr} for group in side.optimizer.param_groups]
        if any(group["lr"] != lr for group in self.ours.optimizer.param_groups):
            self.finding("param_groups were assigned, and stayed as they were")

    def release(self) -> None:
        """Let backward step."""
        if self.ours.release is not None or self.grads[1] is not None or self.isolated:
            return
        if any(p.grad is not None for p in self.ours.params):
            self.zero_grad()

        def run(side: Side) -> None:
            side.release = release_gradients(side.model, side.optimizer)

        self.both(run, snapshot=False)

    def end_release(self) -> None:
        """Let step step again."""
        if self.ours.release is None:
            return

        def run(side: Side) -> None:
            side.release.remove()
            side.release = None

        telemetry = self.telemetry(self.ours), self.steps_taken
        if self.both(run, snapshot=False):
            if len(self.telemetry(self.ours)) > len(telemetry[0]):
                self.check_masks()
            self.check()

    def junk(self, seed: int) -> None:
        """Load a state in which a value was replaced: it is refused and changes nothing, or it is taken and steps."""
        if self.ours.release is not None or self.dtensor:
            return
        rng = random.Random(seed)
        copied = copy.deepcopy((self.ours.params, self.ours.optimizer))
        side = Side(copied[0], list(self.ours.names))
        side.optimizer = copied[1]
        state = copy.deepcopy(side.optimizer.state_dict())
        values: list[Any] = [None, "x", -1, 1.5, [1.0], {}, torch.ones(2), torch.ones(()), math.nan, True, (1, 2)]
        value = rng.choice(values)
        places: list[tuple[Any, Any]] = [(group, key) for group in state["param_groups"] for key in group]
        places += [(entry, key) for entry in state["state"].values() for key in entry]
        place, key = places[rng.randrange(len(places))]
        of_the_same_type = not isinstance(place[key], (type(None), Tensor)) and type(value) is type(place[key])
        if key in ("params", "param_names") or of_the_same_type:
            return
        place[key] = value
        before = self.snapshot(side)
        self.action = f"junk({key}={value!r})"
        error = self.attempt(lambda: side.optimizer.load_state_dict(state), None)
        if error is not None:
            if not unchanged(before, self.snapshot(side)):
                self.finding(f"refused after something had changed: {self.text(error)}", goes_on=True)
            if type(error) not in CLEAN:
                self.finding(f"load_state_dict raised {self.text(error)}", goes_on=True)
            return
        for j, p in enumerate(side.params):
            if p.requires_grad:
                p.grad = None
                p.grad = gradient("normal", self.specs[j][1], p.dtype, seed + j)
        error = self.attempt(side.optimizer.step, None)
        if error is not None and not self.of_a_base(error):
            self.finding(f"was loaded, and then step raised {self.text(error)}", goes_on=True)

    def of_a_base(self, error: BaseException) -> bool:
        """Return whether torch's own optimizer raised within IsolatedOptimizer: what it has changed is its business."""
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        return self.kind.startswith("Isolated") and any("/torch/optim/" in file for file in files)

    def soak(self, seed: int) -> None:
        """Take steps with ever other subsets of the gradients: nothing may grow with their number."""
        rng, sizes = random.Random(seed), []
        for number in range(60):
            self.zero_grad()
            measured = number in (19, 59)  # after the same gradients
            kinds = ["normal"] if measured else rng.choices(["normal", "none"], k=len(self.specs))
            self.backward(rng.randrange(1000), kinds)
            self.step()
            if self.over:
                return
            if measured:
                own = dict(vars(self.ours.optimizer))
                planner = own.pop("_planner", None)
                own |= {} if planner is None else vars(planner)
                own |= vars(own.pop("method", None) or own.pop("_method"))
                # records and plans have bounds of their own, and a release leads to the optimizer again
                apart = ("state", "base", "records", "_plans", "_released")
                sizes.append(held_by({key: value for key, value in own.items() if key not in apart}))
                if len(own.get("_plans", ())) > KEPT_PLANS:
                    self.finding(f"the optimizer keeps {len(own['_plans'])} plans", goes_on=True)
        if sizes[1] > sizes[0] + 30:  # one item of each step would be 40
            self.finding(f"the optimizer holds {sizes[0]} items after 20 steps and {sizes[1]} after 60", goes_on=True)

    # What must hold --------------------------------------------------------------------------------------------------

    def telemetry(self, side: Side) -> list[dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return side.optimizer.telemetry() if self.evolving else []

    def masks_of(self, side: Side, j: int) -> Tensor:
        """Return the mask of a parameter: protected, frozen, or trainable."""
        param, optimizer = side.params[j], side.optimizer
        return optimizer.trainable_mask(param) if self.sparse else optimizer.isolation_mask(param)

    def held(self, side: Side, j: int) -> Tensor | None:
        """Return which entries of a parameter a step must leave; None: there is no telling."""
        if self.sparse and not {"indices", "trainable"} & side.optimizer.state.get(side.params[j], {}).keys():
            return None
        mask = self.masks_of(side, j)
        return ~mask if self.sparse else mask

    def check(self) -> None:
        """Compare ours with its twin."""
        if self.over:
            return
        for j, spec in enumerate(self.specs):
            p, q = self.ours.params[j], self.twin.params[j]
            if not same(p, q):
                self.finding(f"{spec[0]} differs from the twin's: {differences(p, q)}")
            one, two = (side.optimizer.state.get(param, {}) for side, param in ((self.ours, p), (self.twin, q)))
            masks = [self.held(side, j) for side in self.sides()]
            if masks[0] is not None and masks[1] is not None and not torch.equal(*masks):
                counts = [int(mask.sum()) for mask in masks]
                self.finding(f"the mask of {spec[0]} differs from the twin's: {counts[0]} and {counts[1]} entries")
            if self.sparse:
                one = {"indices" if k == "trainable" else k: v for k, v in one.items()}  # of a DTensor's shard
                if not one or not two:  # it was cleared, and is made when it is read
                    continue
            if self.settings.get("importance") == "exp_avg_sq":  # one tensor of two names
                one, two = (
                    {k: v.abs() if k == "exp_avg_sq" else v for k, v in state.items() if k != "importance"}
                    for state in (one, two)
                )
            if self.kind.startswith("Isolated"):
                # an importance of nothing is made with the first step, or where a checkpoint needs a place
                one, two = (
                    {k: v for k, v in state.items() if k != "importance" or local(v).view(torch.int32).any()}
                    for state in (one, two)
                )
            if one.keys() != two.keys():
                self.finding(f"the state of {spec[0]} has {sorted(one)}, and the twin's {sorted(two)}")
            for key in one:
                ours, theirs = one[key], two[key]
                if not isinstance(ours, Tensor):
                    equal = ours == theirs
                elif key == "step":
                    # a shard of which nothing is selected may count or not
                    equal = float(ours) == float(theirs) or (self.sparse and self.dtensor and not len(one["exp_avg"]))
                else:
                    equal = same(ours, theirs)
                if not equal:
                    self.finding(f"{key} of {spec[0]} differs from the twin's: {differences(ours, theirs)}")
            if self.isolated and not same(self.ours.optimizer.importance(p), self.twin.optimizer.importance(q)):
                self.finding(f"the importance of {spec[0]} differs from the twin's")
        for i, (one, two) in enumerate(
            zip(self.ours.optimizer.param_groups, self.twin.optimizer.param_groups, strict=True)
        ):
            keys = ("lr", "weight_decay", "eps", "betas", "isolation_ratio", "importance_beta", "mask_interval")
            for key in (*keys, "isolation_clock", "amsgrad", "maximize", "clip_grad_norm"):
                if plain(one.get(key)) != plain(two.get(key)):
                    self.finding(f"{key} of group {i} is {one.get(key)!r}, and the twin's {two.get(key)!r}")

    def check_kept(self, before: list[Tensor], held: list[Tensor | None]) -> None:
        for j, spec in enumerate(self.specs):
            mask = held[j]
            if mask is None or not mask.any():
                continue
            now = whole(self.ours.params[j])
            if not torch.equal(bits(now[mask]), bits(before[j][mask])):
                self.finding(f"entries of {spec[0]} that must keep their bits have moved")

    def check_refresh(self, grown: list[int], skipped: bool) -> None:
        interval = self.ours.optimizer.param_groups[0]["mask_interval"]
        competes = [p for p, g in self.eligible() if self.has_importance(p)]
        due = not skipped and interval is not None and self.steps_taken % interval == 0
        if grown[0] != grown[1] and competes:
            self.finding(f"step {self.steps_taken} left {grown[0]} records, and the twin's {grown[1]}")
        if bool(grown[0]) != due and competes and self.on_time:
            self.on_time = False  # said once
            self.finding(
                f"step {self.steps_taken} of mask_interval={interval} has {'' if grown[0] else 'not '}refreshed",
                goes_on=True,
            )
        if grown[0] and competes:
            self.check_masks()

    def has_importance(self, param: Tensor) -> bool:
        if self.isolated:
            return True
        key = "importance" if self.settings.get("importance", "ema") == "ema" else "exp_avg_sq"
        return key in self.ours.optimizer.state.get(param, ())

    def eligible(self) -> list[tuple[Tensor, dict[str, Any]]]:
        groups = self.ours.optimizer.param_groups
        return [(p, g) for g in groups for p in g["params"] if p.requires_grad and g["isolation_ratio"] > 0]

    def check_masks(self) -> None:
        """Compare the masks just chosen with the paper's and with the record of the refresh."""
        optimizer = self.ours.optimizer
        record, twins = (self.telemetry(side)[-1] for side in self.sides())
        if self.loaded:  # a fresh optimizer counts anew
            record["nonfinite"] = twins["nonfinite"]
        if repr(record) != repr(twins):
            changed = [key for key in record if repr(record[key]) != repr(twins[key])]
            self.finding(f"the record of the refresh differs from the twin's in {', '.join(changed)}")
        importance, groups, masks = {}, {}, {}
        for p, group in self.eligible():
            j = next(i for i, q in enumerate(self.ours.params) if q is p)
            name = self.specs[j][0]
            importance[name] = whole(optimizer.importance(p)).numpy()
            layers = group["layers"] if isinstance(group["layers"], str) else "callable"
            groups[name] = (group["isolation_ratio"], layer_of(name, layers))
            masks[name] = self.masks_of(self.ours, j).numpy()
        protected = sum(int(mask.sum()) for mask in masks.values())
        if record["protected"] != protected:
            self.finding(f"the record of the refresh says {record['protected']} protected, and {protected} are")
        if any(bool((mask & ~(importance[name] > 0)).any()) for name, mask in masks.items()):
            self.finding("entries without importance are protected")
        if any(v.dtype != np.float32 or not np.isfinite(v).all() for v in importance.values()):
            return
        shared = optimizer.param_groups[0]
        if not importance:
            return
        for name, mask in chosen(importance, groups, shared).items():
            wrong = (mask & ~masks[name]) if shared["threshold"] == "histogram" else (mask != masks[name])
            if wrong.any():
                self.finding(f"the mask of {name} is not the paper's: {int(wrong.sum())} entries of {mask.size} differ")

    def check_against_torch(
        self, before: list[Tensor], states: list[dict[str, Any]], grads: list[Tensor | None], held: list[Any]
    ) -> None:
        """Compare the step of what was free with that of torch.optim.AdamW from the same point."""
        if self.isolated or not set(self.kinds) <= PLAIN_GRADIENTS or self.settings.get("clip_grad_norm") is not None:
            return
        keys = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
        for group in self.ours.optimizer.param_groups:
            for p in group["params"]:
                j = next(i for i, q in enumerate(self.ours.params) if q is p)
                grad, state = grads[j], dict(states[j])
                if grad is None or p.dtype != torch.float32 or grad.dtype != torch.float32 or held[j] is None:
                    continue
                twin = Parameter(before[j].clone(memory_format=torch.contiguous_format))
                theirs = torch.optim.AdamW([twin], fused=True, **{key: plain(group[key]) for key in keys})
                if self.sparse and "exp_avg" in state:
                    positions = state.get("indices", state.get("trainable")).long()
                    for key in ("exp_avg", "exp_avg_sq"):
                        dense = torch.zeros(twin.numel(), dtype=torch.float32, device="cpu")
                        dense[positions] = state[key]
                        state[key] = dense.view(twin.shape)
                if "exp_avg" in state:
                    known = {k: state[k].contiguous() for k in ("step", "exp_avg", "exp_avg_sq") if k in state}
                    known["step"] = known["step"].float()
                    known["exp_avg_sq"] = known["exp_avg_sq"].abs()
                    if group["amsgrad"]:
                        known["max_exp_avg_sq"] = state.get(
                            "max_exp_avg_sq", torch.zeros(twin.shape, dtype=torch.float32, device="cpu")
                        ).contiguous()
                    if not all(bool(v.isfinite().all()) for v in known.values()):
                        continue
                    theirs.state[twin] = {k: v.clone() for k, v in known.items()}
                twin.grad = grad.clone(memory_format=torch.contiguous_format)
                theirs.step()
                free = ~held[j]
                if not free.any() or not before[j].isfinite().all():
                    continue
                now = whole(p)
                small, large = step_ulps(now[free], twin.detach()[free], before[j][free])
                if small > STEP_ULPS or large > LARGE_STEP_ULPS:
                    self.finding(f"{self.specs[j][0]} is {max(small, large):.3g} ulp from torch.optim.AdamW's step")


def held_by(root: Any) -> int:
    """Return the number of items in the containers and objects of the package that an attribute leads to."""
    seen, todo, count = set(), [root], 0
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (Tensor, str, type, Record)) or callable(value):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo.extend(value.values())
            count += len(value)
        elif isinstance(value, (list, tuple, set, deque)):
            todo.extend(value)
            count += len(value)
        elif type(value).__module__.startswith("epi_kernels"):
            todo.append(getattr(value, "__dict__", {}))
            todo.extend(getattr(value, slot, None) for slot in getattr(type(value), "__slots__", ()))
    return count


def unchanged(before: Any, after: Any) -> bool:
    """Return whether two snapshots, or parts of them, hold the same keys and bits."""
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(unchanged(before[key], after[key]) for key in before)
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and same(before, after)
    return bool(before == after)


def plain(value: Any) -> Any:
    """Return a setting as numbers."""
    if isinstance(value, Tensor):
        return float(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    return value


def differences(left: Any, right: Any) -> str:
    """Return one line on where two tensors differ."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return f"{left!r} and {right!r}"
    left, right = whole(left), whole(right)
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return f"{left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
    if not left.dim():
        return f"{left.item()!r} and {right.item()!r}"
    other = ~((left == right) | (left.isnan() & right.isnan()))
    if not other.any():
        return "in the sign of zeros"
    where = other.nonzero()[0].tolist()
    return f"{int(other.sum())} of {other.numel()} entries, {where} is {left[other][0]!r} and {right[other][0]!r}"


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Save a state and load it as torch does by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Programs ------------------------------------------------------------------------------------------------------------

Action = tuple[str, dict[str, Any]]


class Program:
    """The arguments of a `Case` and its actions."""

    def __init__(self, case: dict[str, Any], actions: list[Action]) -> None:
        self.case, self.actions = case, actions

    def lines(self) -> list[str]:
        """Return the program as lines of Python."""
        calls = [("case = Case", self.case), *((f"case.{name}", kwargs) for name, kwargs in self.actions)]
        return [f"{name}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())})" for name, kwargs in calls]

    def run(self, tell: Callable[[str], None] = lambda action: None) -> list[str]:
        """Run it and return what it shows; `tell` hears of each action before it is done."""
        torch.manual_seed(0)
        case = Case.__new__(Case)
        case.replaced = False
        case.found, case.action = [], f"Case(ambient={self.case['ambient']!r})"
        tell(case.action)
        try:
            case.__init__(**self.case)  # type: ignore[misc]
            for number, (name, kwargs) in enumerate(self.actions, 1):
                if case.over:
                    break
                case.action = f"{number} {name}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())})"
                tell(case.action)
                getattr(case, name)(**kwargs)
        except Finding as finding:
            case.found.append(str(finding))
        except Exception as error:  # of the fuzzer itself, or of what it calls unguarded
            trace = traceback.extract_tb(error.__traceback__)
            where = "; ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in trace[-4:])
            if "lr as a Tensor is not supported" not in str(error):  # with foreach: both were drawn
                case.found.append(f"{case.action}: unguarded {type(error).__name__}: {str(error)[:200]} ({where})")
        finally:
            if case.__dict__.get("ours") is not None and case.ours.release is not None:
                with contextlib.suppress(Exception):
                    case.ours.release.remove()
        return case.found


# how often an action is drawn
WEIGHTS = {
    "train": 40,
    "backward": 6,
    "step": 5,
    "zero_grad": 5,
    "refresh": 4,
    "freeze": 3,
    "thaw": 3,
    "add_param_group": 3,
    "set": 5,
    "schedule": 2,
    "save_and_load": 12,
    "move_state": 3,
    "move_parameters": 3,
    "replace_parameters": 1,
    "reset": 1.5,
    "replace_groups": 1.5,
    "release": 1.5,
    "end_release": 3,
    "junk": 2,
    "soak": 0.3,
}


class Draw:
    """Draws a program from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.flushes = self.chance(0.3)  # then no gradient is subnormal: a step would lose it

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def ambient(self, p: float = 0.25, without: tuple[str, ...] = ()) -> str | None:
        states = [*AMBIENT, *["flush"] * 4] if self.flushes else AMBIENT
        state = self.rng.choice(states) if self.chance(p) else None
        return None if state in without else state

    def spec(self, name: str, dtypes: list[str], group: int) -> Spec:
        shape = self.rng.choice([(), (1,), (7,), (33,), (4, 6), (5, 3), (3, 2, 4), (2, 3, 4, 5), (0, 3), (40, 9)])
        layout = self.rng.choice(["contiguous"] * 3 + ["transposed", "strided", "channels_last", "offset", "frozen"])
        return (name, shape, self.rng.choice(dtypes), layout, group)

    def program(self) -> Program:
        rng = self.rng
        kind = rng.choice(
            ["EPIAdamW"] * 5 + ["MaskedAdamW"] * 2 + ["SparseAdamW"] * 2 + [f"Isolated {base}" for base in BASES]
        )
        families = [["float32"]] * 4 + [["bfloat16"], ["float16"], ["float64"], ["float32", "bfloat16"]]
        families += [["complex64"], ["float32", "complex64"]]
        if kind == "SparseAdamW" or kind.startswith("Isolated"):
            families = [family for family in families if "complex64" not in family]
        self.dtypes = rng.choice(families)
        self.clips = kind in ("EPIAdamW", "MaskedAdamW") and self.chance(0.1)
        number_of_groups = rng.choice([1, 1, 1, 2, 3])
        names = ["blocks.0.w", "blocks.0.b", "blocks.1.w", "blocks.1.norm.b", "head.w", "embed.w"]
        params = [
            self.spec(
                name,
                self.dtypes,
                min(i, number_of_groups - 1) if i < number_of_groups else rng.randrange(number_of_groups),
            )
            for i, name in enumerate(names[: rng.randint(max(2, number_of_groups), 6)])
        ]
        dtensor = self.chance(0.12) and kind != "Isolated Adafactor" and not {"complex64"} & set(self.dtypes)
        named = self.chance(0.75)
        self.evolving = kind == "EPIAdamW" or kind.startswith("Isolated")
        settings = self.settings(kind, named)
        if kind.startswith("Isolated"):
            # torch's bits go by the layout, which copies change; Adafactor divides by the number of entries
            dense = {"strided": "contiguous", "offset": "contiguous"}
            params = [(n, s if 0 not in s else (2, 3), d, dense.get(lay, lay), g) for n, s, d, lay, g in params]
        if dtensor:
            params = [(n, s, d, "frozen" if "frozen" in lay else "contiguous", g) for n, s, d, lay, g in params]
            self.clips = False
        if self.clips:
            settings["clip_grad_norm"] = rng.choice([0.5, 10.0])
        grads = (rng.choice(["contiguous"] * 3 + ["as the parameter", "transposed", "expanded", "negated"]), None)
        taken = not (dtensor or kind.startswith("Isolated") or {"complex64", "float64"} & set(self.dtypes))
        if taken and self.chance(0.15):
            grads = (grads[0], rng.choice(["float32", "bfloat16"]))
        case = {
            "kind": kind,
            "params": params,
            "groups": [self.group(kind) if number_of_groups > 1 else {} for _ in range(number_of_groups)],
            "settings": settings,
            "named": named,
            "backend": rng.choice(["auto"] * 4 + ["reference"] + (["native"] if "float64" not in self.dtypes else [])),
            "grads": grads,
            "dtensor": dtensor,
            "seed": self.seed % 1000,
            "ambient": self.ambient(0.1, without=("inference", "meta")),
        }
        actions: list[Action] = []
        for _ in range(rng.randint(4, 24)):
            actions += self.action(kind, dtensor)
        return Program(case, actions)

    def settings(self, kind: str, named: bool) -> dict[str, Any]:
        rng = self.rng
        settings: dict[str, Any] = {}
        if self.evolving:
            settings["isolation_ratio"] = rng.choice([0.05, 0.2, 0.5, 0.0, 0.9])
            settings["importance_beta"] = rng.choice([0.0, 0.9, 0.99])
            settings["mask_interval"] = rng.choice([1, 2, 2, 3, 4, None])
            settings["layers"] = rng.choice(["auto", "block", "tensor", "callable"] if named else ["auto", "tensor"])
            settings["normalize"] = rng.choice(["layer", "layer", "none"])
            settings["scope"] = rng.choice(["global", "global", "layer"])
            settings["threshold"] = rng.choice(["exact", "exact", "exact", "histogram"])
        if kind.startswith("Isolated"):
            base: dict[str, Any] = {"lr": rng.choice([0.1, 1e-3])}
            if self.chance(0.5):
                base["weight_decay"] = rng.choice([0.0, 0.1])
            if kind.split()[1] == "AdamW" and self.chance(0.3):
                base["amsgrad"] = True
            if self.chance(0.2):
                base["maximize"] = True
            settings["base"] = base
            return settings
        settings["lr"] = rng.choice([0.1, 1e-2, 1e-3])
        settings["weight_decay"] = rng.choice([0.0, 0.01, 0.5])
        if self.chance(0.2) and kind != "SparseAdamW":
            settings["amsgrad"] = True
        if self.chance(0.2):
            settings["maximize"] = True
        if self.chance(0.2):
            settings["betas"] = rng.choice([(0.0, 0.99), (0.5, 0.9)])
        if self.chance(0.2):
            settings["fused"] = True
        elif self.chance(0.2):
            settings["foreach"] = rng.choice([True, False])
        if kind == "EPIAdamW":
            settings["importance"] = rng.choice(["ema", "ema", "exp_avg_sq"])
            if "complex64" in self.dtypes:
                settings["importance"] = "ema"
        else:
            settings["share"] = rng.choice([0.1, 0.5, 0.9])
        return settings

    def group(self, kind: str) -> dict[str, Any]:
        rng = self.rng
        group: dict[str, Any] = {}
        if self.chance(0.5):
            group["lr"] = rng.choice([0.05, 1e-3])
        if self.chance(0.3):
            group["weight_decay"] = rng.choice([0.0, 0.2])
        if self.evolving and self.chance(0.5):
            group["isolation_ratio"] = rng.choice([0.0, 0.1, 0.4])
        if self.evolving and self.chance(0.3):
            group["importance_beta"] = rng.choice([0.0, 0.5])
        return group

    def kinds(self) -> list[str]:
        if self.clips:
            return [self.rng.choice(["integers", "integers", "zeros", "none"]) for _ in range(self.rng.randint(1, 4))]
        allowed = [kind for kind in GRADIENTS if not (self.flushes and kind == "subnormal")]
        return [self.rng.choice(allowed) for _ in range(self.rng.randint(1, 6))]

    def action(self, kind: str, dtensor: bool) -> list[Action]:
        rng = self.rng
        without = () if self.flushes else ("flush",)
        choice = rng.choices(*zip(*WEIGHTS.items(), strict=True))[0]
        if choice == "train":
            return [
                ("backward", {"seed": rng.randrange(1000), "kinds": self.kinds()}),
                (
                    "step",
                    {"how": self.how(), "times": rng.choice([1, 1, 1, 2, 5]), "ambient": self.ambient(0.3, without)},
                ),
            ]
        if choice == "backward":
            return [
                (
                    "backward",
                    {
                        "seed": rng.randrange(1000),
                        "kinds": self.kinds(),
                        "accumulate": not self.clips and self.chance(0.5),
                    },
                )
            ]
        if choice == "step":
            return [("step", {"ambient": self.ambient(0.3, without)})]
        if choice == "zero_grad":
            return [("zero_grad", {"set_to_none": self.chance(0.6)})]
        if choice == "refresh":
            return [("refresh", {"ambient": self.ambient(0.3, (*without, "inference"))})]
        if choice in ("freeze", "thaw", "move_parameters"):
            return [(choice, {"param": rng.randrange(8)})]
        if choice == "add_param_group":
            names = rng.sample(["blocks.0.extra", "blocks.2.w", "late.w"], rng.randint(1, 2))
            specs = [self.spec(name, self.dtypes, 0) for name in names]
            if kind.startswith("Isolated"):
                specs = [(n, s if 0 not in s else (2, 3), d, "contiguous", g) for n, s, d, _, g in specs]
            if dtensor:
                specs = [(n, s, d, "contiguous", g) for n, s, d, _, g in specs]
            return [
                (
                    "add_param_group",
                    {"params": specs, "settings": self.group(kind), "ambient": self.ambient(0.2, ("inference",))},
                )
            ]
        if choice == "set":
            return [("set", self.setting(kind))]
        if choice == "schedule":
            return [("schedule", {"gamma": rng.choice([0.5, 0.9])})]
        if choice == "save_and_load":
            via = rng.choice(
                ["plain", "deepcopied", "file", "file", "dcp", "dcp flattened", "dcp flattened", "pickle", "deepcopy"]
            )
            into = rng.choice(["fresh", "fresh", "same"])
            state = None
            if via in ("plain", "deepcopied"):
                state = self.ambient(0.3, (*without, "inference"))
            return [("save_and_load", {"via": via, "into": into, "ambient": state})]
        if choice == "reset":
            return [("reset", {"how": rng.choice(["assign", "clear", "delete"])})]
        if choice == "replace_groups":
            return [("replace_groups", {"lr": rng.choice([0.02, 0.3])})]
        if choice in ("junk", "soak"):
            return [(choice, {"seed": rng.randrange(1000)})]
        return [(choice, {})]

    def how(self) -> str:
        return self.rng.choices(["plain", "closure", "scaled", "compiled"], [80, 6, 13, 0.5])[0]

    def setting(self, kind: str) -> dict[str, Any]:
        rng = self.rng
        group = rng.choice([None, rng.randrange(4)])
        options: list[tuple[str, list[Any]]] = [
            ("lr", [0.2, 1e-4, torch.tensor(0.01)] if not kind.startswith("Isolated") else [0.2, 1e-4]),
            ("weight_decay", [0.0, 0.3]),
        ]
        if kind in ("EPIAdamW", "MaskedAdamW", "SparseAdamW"):
            options += [("betas", [(0.8, 0.95)]), ("eps", [1e-6])]
        if kind in ("EPIAdamW", "MaskedAdamW"):
            options.append(("amsgrad", [True, False]))
        if self.evolving:
            options += [("isolation_ratio", [0.0, 0.3]), ("importance_beta", [0.3]), ("mask_interval", [1, 3, None])]
        key, values = rng.choice(options)
        return {"key": key, "value": rng.choice(values), "group": None if key == "mask_interval" else group}


def reason_of(text: str) -> str | None:
    """Return why a finding is known, or None."""
    return next((reason for pattern, reason in KNOWN.items() if re.search(pattern, text)), None)


def unknown(found: list[str]) -> list[str]:
    """Return the findings that are not in KNOWN."""
    return [text for text in found if reason_of(text) is None]


def program_of(seed: int) -> Program:
    """Return the program of a seed."""
    return Draw(seed).program()


def gist(text: str) -> str:
    """Return a finding without its action and its numbers: what a shorter program must show as well."""
    return re.sub(r"[\d.]+", "", text.split(": ", 1)[-1])[:60]


def shrunk(program: Program) -> Program:
    """Return a shorter program that shows the same as this one first.

    Each try of one that ends the interpreter, or hangs, is a process of its own.
    """
    apart = any(
        " ends the interpreter" in text or " hangs for" in text for _, texts in child(program) for text in texts
    )

    def shown(actions: list[Action]) -> str | None:
        shorter = Program(program.case, actions)
        found = next((texts for _, texts in child(shorter)), []) if apart else shorter.run()
        return gist(found[0]) if found else None

    wanted, actions = shown(program.actions), program.actions
    size = max(1, len(actions) // 2)
    while size and wanted is not None:
        start = 0
        while start < len(actions):
            candidate = actions[:start] + actions[start + size :]
            if shown(candidate) == wanted:
                actions = candidate
            else:
                start += size
        size //= 2
    return Program(program.case, actions)


# Processes -----------------------------------------------------------------------------------------------------------

# seconds without a word after which a program hangs
PATIENCE = 60


def environment() -> dict[str, str]:
    """Return the environment of a process that runs programs: memory that was not written has a pattern in it."""
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1"}


def run_programs(programs: Iterable[tuple[int, Program]]) -> None:
    """Run programs with their seeds, and write a line before and after each of them and before each action."""
    faulthandler.enable()
    torch.set_num_threads(1)

    def tell(what: str, said: Any) -> None:
        print(json.dumps({what: said}), flush=True)

    for seed, program in programs:
        tell("start", seed)
        tell("end", [seed, program.run(functools.partial(tell, "at"))])


def child(program: Program | None, first: int = 0, last: int = 1) -> Iterator[tuple[int, list[str]]]:
    """Run a program, or those of some seeds, in a process of its own, and in another one behind what ends the first.

    Yield the seed and the findings of each.
    """
    while first < last:
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--range", str(first), str(last)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("" if program is None else repr((program.case, program.actions)))
            process.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []

        def read(process: Any = process, lines: Any = lines) -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        def hear(process: Any = process, errors: Any = errors) -> None:
            errors.extend(process.stderr)

        readers = [threading.Thread(target=target, daemon=True) for target in (read, hear)]
        for reader in readers:
            reader.start()
        under_way, action, hung = first, "", False
        while True:
            try:
                line = lines.get(timeout=PATIENCE)
            except queue.Empty:
                hung = True
                process.kill()
                break
            if line is None:
                break
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            if "start" in said:
                under_way = said["start"]
            elif "at" in said:
                action = said["at"]
            else:
                seed, found = said["end"]
                first = seed + 1
                yield seed, found
        code = process.wait()
        readers[1].join(5)
        if first < last:
            own = [line.strip() for line in errors if "epi_kernels" in line and "File" in line]
            last_words = [line.strip() for line in errors if line.strip()]
            words = own[0] if own else (last_words[-1] if last_words else "no word")
            end = f"hangs for {PATIENCE} s" if hung else f"ends the interpreter, code {code}"
            yield under_way, [f"{action}: {end}: {words}"]
            first = under_way + 1


def run_seeds(first: int, last: int) -> dict[int, list[str]]:
    """Return what the programs of some seeds show: seed -> findings, of those that show any."""
    return {seed: unknown(found) for seed, found in child(None, first, last) if unknown(found)}


def run_minutes(minutes: float, first: int, jobs: int, chunk: int = 100) -> dict[int, list[str]]:
    """Run programs from a first seed on for some time, and print how it goes."""
    end = time.monotonic() + 60 * minutes
    starts = itertools.count(first, chunk)
    lock, found, known, done = threading.Lock(), {}, defaultdict(list), Counter()

    def work() -> None:
        while time.monotonic() < end:
            with lock:
                start = next(starts)
            for seed, texts in child(None, start, start + chunk):
                with lock:
                    done["programs"] += 1
                    if unknown(texts):
                        found[seed] = unknown(texts)
                    for text in texts:
                        if reason := reason_of(text):
                            known[reason].append(f"seed {seed}: {text}")
                if time.monotonic() > end:
                    break

    workers = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    start, last = ("\r", "") if sys.stdout.isatty() else ("", "\n")
    while any(worker.is_alive() for worker in workers):
        next(worker for worker in workers if worker.is_alive()).join(1 if start else 15)
        left = max(0, end - time.monotonic())
        print(f"{start}{done['programs']} programs, {len(found)} fail, {left:.0f} s left ", end=last, flush=True)
    print(end="\n" if start else "")
    for reason, seeds in known.items():
        print(f"known: {reason}: {len(seeds)} times, first {seeds[0]}")
    return dict(sorted(found.items()))


def report(found: dict[int, list[str]]) -> str:
    """Return a line for each seed, and what else it shows behind it."""
    return "\n".join(f"seed {seed}: {text}" for seed, texts in found.items() for text in texts)


def main() -> int:
    """Run what the command line asks for; the exit status says whether anything was found."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--seed", type=int, help="repeat one program and print its lines")
    parser.add_argument("--shrink", action="store_true", help="shorten it first")
    parser.add_argument("--minutes", type=float, help="run new programs for that long")
    parser.add_argument("--first", type=int, help="the first seed of --minutes; a random one without")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of --minutes")
    parser.add_argument("--range", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.range:
        given = sys.stdin.read()
        first, last = arguments.range
        drawn = [Program(*eval(given, {"tensor": torch.tensor}))] if given else map(program_of, range(first, last))
        run_programs(zip(range(first, last), drawn, strict=True))
        return 0
    if arguments.seed is not None:
        if "MALLOC_PERTURB_" not in os.environ:
            os.execve(sys.executable, [sys.executable, *sys.argv], environment())
        program = program_of(arguments.seed)
        if arguments.shrink:
            program = shrunk(program)
        print("\n".join(program.lines()))
        texts = [text for _, texts in child(program) for text in texts]
        found = {arguments.seed: texts} if texts else {}
    else:
        first = arguments.first if arguments.first is not None else random.SystemRandom().randrange(10**9)
        print(f"from seed {first}")
        found = run_minutes(arguments.minutes or 1.0, first, arguments.jobs)
    print(report(found) or "nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
