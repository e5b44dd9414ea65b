"""The processes of test_ambient.py, each of which runs every program in one state.

A state is what a process, or some library in it, has set for everybody: default dtype, default device, flushed
subnormals, threads. A program uses a class or function of the package and returns what came out. A process fails
with the programs whose results are not, bit for bit, those of the ordinary state.
"""

import contextlib
import copy
import io
import math
import os
import pickle
import tempfile
import threading
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from states import same_state
from torch import Tensor
from torch.nn import Parameter

from epi_kernels import EPIAdamW, IsolatedOptimizer, MaskedAdamW, SparseAdamW, metrics
from epi_kernels.delta import apply_delta, load_delta, save_delta
from epi_kernels.importance import fisher, output_magnitude, second_order, update_magnitude
from epi_kernels.optim import release_gradients
from epi_kernels.select import top_k

CPU: dict[str, Any] = {"device": "cpu"}
SHAPES = {"h.0.weight": (30, 7), "h.0.bias": (30,), "h.1.weight": (9, 8), "head.scale": ()}
EPI: dict[str, Any] = {"lr": 0.01, "isolation_ratio": 0.2, "mask_interval": 2}


# States ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def flushed_subnormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        raise SystemExit("this CPU cannot flush subnormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device": lambda: torch.device("meta"),
    "flushed subnormals": flushed_subnormals,
    "deterministic algorithms": deterministic,
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "two threads": lambda: threads(2),
}


# in which `in_and_out` takes steps
CURRENT: list[Callable[[], contextlib.AbstractContextManager[Any]]] = []


# Programs ----------------------------------------------------------------------------------------------------------


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    real = dtype.to_real() if dtype.is_complex else dtype
    pair = (2,) if dtype.is_complex else ()
    found = torch.randn((*shape, *pair), generator=generator, dtype=torch.float32, **CPU)
    return torch.view_as_complex(found.to(real)) if dtype.is_complex else found.to(real)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    return {name: Parameter(values(shape, i, dtype)) for i, (name, shape) in enumerate(SHAPES.items())}


def masks() -> dict[str, Tensor]:
    return {name: every_other(math.prod(shape), 3).view(shape) for name, shape in SHAPES.items()}


def every_other(count: int, distance: int = 2) -> Tensor:
    """Return a mask of `count` entries, True at every `distance`-th."""
    return torch.arange(count, dtype=torch.int64, **CPU) % distance == 0


def ordinary(step: int, name: str, param: Tensor) -> Tensor:
    return values(tuple(param.shape), 100 * step + len(name), param.dtype)


def tiny(step: int, name: str, param: Tensor) -> Tensor:
    """Return gradients whose squares are subnormal, next to subnormal, or 0, and a few that are not."""
    grad = values(tuple(param.shape), 100 * step + len(name), param.dtype).reshape(-1)
    scales = torch.tensor([1e-19, 3e-19, 1e-18, 1e-20, 0.0, 2e-19, 1e-22], dtype=torch.float32, **CPU)
    where = torch.arange(grad.numel(), dtype=torch.int64, **CPU)
    return (grad * scales[where % len(scales)]).view(param.shape)


def few_rows(step: int, name: str, param: Tensor) -> Tensor:
    """Return gradients of which less is above 0 than there are places, as of an embedding of rare words."""
    grad = ordinary(step, name, param)
    return grad if name == "h.0.bias" else torch.zeros_like(grad)


def trained(
    build: Callable[[dict[str, Parameter]], Any],
    dtype: torch.dtype = torch.float32,
    gradient: Callable[..., Tensor] = ordinary,
    masks_alone: bool = False,
) -> dict[str, Any]:
    """Return the parameters, state and masks of a run with a save and a load, copies and a refresh by hand."""
    params = parameters(dtype)
    optimizer = build(params)
    for step in range(1, 8):
        for name, param in params.items():
            param.grad = None if step == 3 and name == "h.0.bias" else gradient(step, name, param)
        optimizer.step()
        if step == 4:
            optimizer.load_state_dict(saved(optimizer.state_dict()))
            copy.deepcopy(optimizer)
            pickle.loads(pickle.dumps(optimizer))
    if hasattr(optimizer, "refresh"):
        optimizer.refresh()
    repr(optimizer)
    mask_of = optimizer.trainable_mask if isinstance(optimizer, SparseAdamW) else optimizer.isolation_mask
    found: dict[str, Any] = {"masks": {name: mask_of(param) for name, param in params.items()}}
    if isinstance(optimizer, (EPIAdamW, IsolatedOptimizer)):
        found["protected"] = [record["protected"] for record in optimizer.telemetry()]
    if not masks_alone:
        found["parameters"] = {name: param.detach() for name, param in params.items()}
        found["state"] = clocks_as_numbers(optimizer.state_dict()["state"])
    return found


def clocks_as_numbers(found: Any) -> Any:
    """Return results with every ``step`` as a number: where the default dtype is float64 it is float64, as in torch."""
    if isinstance(found, dict):
        return {key: float(value) if key == "step" else clocks_as_numbers(value) for key, value in found.items()}
    return [clocks_as_numbers(value) for value in found] if isinstance(found, (list, tuple)) else found


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def epi(backend: str, **settings: Any) -> Callable[[dict[str, Parameter]], Any]:
    return lambda params: EPIAdamW(params.items(), backend=backend, **{**EPI, **settings})


def isolated(base: Callable[[Any], torch.optim.Optimizer], backend: str) -> Callable[[dict[str, Parameter]], Any]:
    settings = {key: value for key, value in EPI.items() if key != "lr"}
    return lambda params: IsolatedOptimizer(base(params.items()), backend=backend, **settings)


def model_of() -> torch.nn.Module:
    """Return a model in float32 on the CPU, whatever the defaults are."""
    layers = [torch.nn.Linear(a, b, device="cpu", dtype=torch.float32) for a, b in ((6, 8), (8, 4))]
    with torch.no_grad():
        for i, param in enumerate(param for layer in layers for param in layer.parameters()):
            param.copy_(values(tuple(param.shape), i))
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])


def loss_of(model: torch.nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def in_and_out(build: Callable[[dict[str, Parameter]], Any]) -> Any:
    """Return a run of which every other step is taken in the state, and so is the first."""
    params = parameters()
    optimizer = build(params)
    for step in range(6):
        for name, param in params.items():
            param.grad = None if step == 3 and name == "h.0.bias" else ordinary(step, name, param)
        with contextlib.nullcontext() if step % 2 else CURRENT[-1]():
            optimizer.step()
    return [{name: param.detach() for name, param in params.items()}, saved(optimizer.state_dict())]


def released(backend: str) -> Any:
    model = model_of()
    optimizer = EPIAdamW(model.named_parameters(), backend=backend, **EPI)
    release_gradients(model, optimizer)
    for step in range(5):
        loss_of(model, values((5, 6), step)).backward()
        optimizer.step()
    return [dict(model.state_dict()), [optimizer.isolation_mask(param) for param in model.parameters()]]


def scored(backend: str) -> Any:
    model, batches = model_of(), [values((8, 6), step) for step in range(3)]
    found: dict[str, Any] = {}
    for name, score in (("fisher", fisher), ("second order", second_order)):
        for dtype in (torch.float32, torch.bfloat16):
            scores = score(model, batches, loss_of, progress=False, backend=backend, dtype=dtype, method="loop")
            found[f"{name}, {dtype}"] = scores
            for normalize in (None, "layer"):
                found[f"{name}, {dtype}, {normalize}"] = top_k(scores, 0.3, normalize=normalize, backend=backend)
    found["outputs"] = output_magnitude(model, batches)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    after = {name: param + 0.5 for name, param in before.items()}
    found["update"] = update_magnitude(before, after)
    found["half"] = top_k({name: score.bfloat16() for name, score in found["fisher, torch.float32"].items()}, 0.3)
    return found


def deltas(backend: str) -> Any:
    params = parameters()
    optimizer = SparseAdamW(params.items(), lr=0.1, trainable=masks(), backend=backend)
    for step in range(3):
        for name, param in params.items():
            param.grad = ordinary(step, name, param)
        optimizer.step()
    model = torch.nn.ParameterDict({name.replace(".", "_"): param for name, param in parameters().items()})
    delta = {name.replace(".", "_"): values for name, values in optimizer.delta().items()}
    with tempfile.TemporaryDirectory() as folder:
        save_delta(delta, Path(folder) / "task")
        apply_delta(model, load_delta(Path(folder) / "task"))
    return [delta, {name: model[name.replace(".", "_")].detach() for name in params}]


def measured(_: str) -> Any:
    left, right = masks(), {name: ~mask for name, mask in masks().items()}
    return [metrics.mask_jaccard(left, right), metrics.mask_hamming(left, right), metrics.flip_rate(left, right)]


# whose gradients come of autograd, which some states forbid or change
WITH_AUTOGRAD = ("released", "scored")

PROGRAMS: dict[str, Callable[[str], Any]] = {
    "EPIAdamW": lambda b: trained(epi(b)),
    "EPIAdamW, S = exp_avg_sq": lambda b: trained(epi(b, importance="exp_avg_sq")),
    "EPIAdamW, amsgrad, clipped": lambda b: trained(epi(b, amsgrad=True, clip_grad_norm=1.0)),
    "EPIAdamW, histogram, raw": lambda b: trained(epi(b, threshold="histogram", normalize="none")),
    "EPIAdamW, a budget for each layer": lambda b: trained(epi(b, scope="layer", layers="tensor")),
    "EPIAdamW, lr in a tensor": lambda b: trained(epi(b, lr=torch.tensor(0.01, dtype=torch.float32, **CPU))),
    "EPIAdamW, fused": lambda b: trained(epi(b, fused=True)),
    "EPIAdamW, bfloat16": lambda b: trained(epi(b), torch.bfloat16),
    "EPIAdamW, float16": lambda b: trained(epi(b), torch.float16),
    "EPIAdamW, complex64": lambda b: trained(epi(b), torch.complex64),
    "MaskedAdamW": lambda b: trained(lambda p: MaskedAdamW(p.items(), frozen=masks(), backend=b)),
    "SparseAdamW": lambda b: trained(lambda p: SparseAdamW(p.items(), trainable=masks(), backend=b)),
    "SparseAdamW, bfloat16": lambda b: trained(
        lambda p: SparseAdamW(p.items(), trainable=masks(), backend=b), torch.bfloat16
    ),
    "IsolatedOptimizer, SGD": lambda b: trained(isolated(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), b)),
    "IsolatedOptimizer, AdamW": lambda b: trained(isolated(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), b)),
    "EPIAdamW, few rows": lambda b: trained(epi(b), gradient=few_rows),
    "EPIAdamW, S = exp_avg_sq, few rows": lambda b: trained(epi(b, importance="exp_avg_sq"), gradient=few_rows),
    "EPIAdamW, tiny": lambda b: trained(epi(b), gradient=tiny, masks_alone=True),
    "EPIAdamW, raw, tiny": lambda b: trained(epi(b, normalize="none"), gradient=tiny, masks_alone=True),
    "EPIAdamW, histogram, tiny": lambda b: trained(epi(b, threshold="histogram"), gradient=tiny, masks_alone=True),
    "EPIAdamW, S = exp_avg_sq, tiny": lambda b: trained(
        epi(b, importance="exp_avg_sq"), gradient=tiny, masks_alone=True
    ),
    "IsolatedOptimizer, tiny": lambda b: trained(
        isolated(lambda p: torch.optim.SGD(p, lr=0.1), b), gradient=tiny, masks_alone=True
    ),
    "released": released,
    "scored": scored,
    "deltas": deltas,
    "measured": measured,
}
PROGRAMS_OF_REFERENCE = {"EPIAdamW, float64": lambda b: trained(epi(b), torch.float64)}


def programs_of(state: str, backend: str) -> dict[str, Callable[[str], Any]]:
    every = {**PROGRAMS, **(PROGRAMS_OF_REFERENCE if backend == "reference" else {})}
    without = WITH_AUTOGRAD if state in ("inference mode", "no gradients", "autocast") else ()
    return {name: program for name, program in every.items() if name not in without}


def everything(state: str, backend: str) -> list[str]:
    """Run all programs as usual and in a state; return those that differ, and how."""
    different = []
    for name, build in BUILDS.items():
        CURRENT.append(contextlib.nullcontext)
        expected = in_and_out(build(backend))
        CURRENT.append(STATES[state])
        try:
            found = in_and_out(build(backend))
        except Exception:
            different.append(f"{name}, in and out: {traceback.format_exc()}")
            continue
        if not same_state(clocks_as_numbers(found), clocks_as_numbers(expected)):
            different.append(f"{name}, in and out: other bits")
    for name, program in programs_of(state, backend).items():
        expected = program(backend)
        try:
            with STATES[state]():
                found = program(backend)
        except Exception:
            different.append(f"{name}: {traceback.format_exc()}")
            continue
        if not same_state(found, expected):
            different.append(f"{name}: other bits")
    return different


# Threads and processes ---------------------------------------------------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a thread of its own."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    return result[0]


def stepped(optimizer: Any, params: dict[str, Parameter], steps: range) -> dict[str, Any]:
    for step in steps:
        for name, param in params.items():
            param.grad = ordinary(step, name, param)
        optimizer.step()
    return {
        "parameters": {n: p.detach().clone() for n, p in params.items()},
        "state": copy.deepcopy(optimizer.state_dict()),
    }


BUILDS: dict[str, Callable[[str], Callable[[dict[str, Parameter]], Any]]] = {
    "EPIAdamW": lambda b: epi(b),
    "EPIAdamW, S = exp_avg_sq": lambda b: epi(b, importance="exp_avg_sq"),
    "MaskedAdamW": lambda b: lambda p: MaskedAdamW(p.items(), frozen=masks(), backend=b),
    "SparseAdamW": lambda b: lambda p: SparseAdamW(p.items(), trainable=masks(), backend=b),
    # whose momentum torch's SGD would make in inference mode, and not write outside of it
    "IsolatedOptimizer": lambda b: isolated(lambda p: torch.optim.SGD(p, lr=0.1), b),
}


def other_threads(backend: str) -> list[str]:
    """Construct in one thread, step in others, and step several optimizers at once."""
    different = []
    for name, build in BUILDS.items():
        params = parameters()
        expected = stepped(build(backend)(params), params, range(6))
        params = parameters()
        optimizer = build(backend)(params)
        in_a_thread(lambda o=optimizer, p=params: stepped(o, p, range(3)))
        found = in_a_thread(lambda o=optimizer, p=params: stepped(o, p, range(3, 6)))
        if not same_state(found, expected):
            different.append(f"{name}: constructed in another thread")
        results: dict[int, Any] = {}

        def one(number: int, build: Any = build, results: dict[int, Any] = results) -> None:
            params = parameters()
            results[number] = stepped(build(backend)(params), params, range(6))

        together = [threading.Thread(target=one, args=(i,)) for i in range(4)]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
        if not all(same_state(results.get(i), expected) for i in range(4)):
            different.append(f"{name}: four at once")
    return different


def forked(backend: str) -> list[str]:
    """Step in the parent on two threads of OpenMP, and in a child of fork()."""
    size = 1 << 17  # enough for a second thread to be woken
    different = []
    for name, of in {
        "EPIAdamW": lambda p: EPIAdamW([("a.w", p)], backend=backend, **EPI),
        "EPIAdamW, S = exp_avg_sq": lambda p: EPIAdamW([("a.w", p)], importance="exp_avg_sq", backend=backend, **EPI),
        "MaskedAdamW": lambda p: MaskedAdamW([("a.w", p)], frozen={"a.w": every_other(size)}, backend=backend),
        "SparseAdamW": lambda p: SparseAdamW([("a.w", p)], trainable={"a.w": every_other(size)}, backend=backend),
    }.items():
        torch.set_num_threads(2)
        param = Parameter(values((size,), 0))
        optimizer = of(param)
        grads = [values((size,), seed) for seed in range(1, 6)]  # the child makes no tensor by torch's threads
        for grad in grads[:3]:
            param.grad = grad
            optimizer.step()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for grad in grads[3:]:
                param.grad = grad
                optimizer.step()
            os.write(writer, str(checksum(param)).encode())
            os._exit(0)
        for grad in grads[3:]:
            param.grad = grad
            optimizer.step()
        os.waitpid(child, 0)
        if os.read(reader, 100).decode() != str(checksum(param)):
            different.append(f"{name}: the child's step is another")
    return different


def checksum(param: Tensor) -> int:
    return zlib.crc32(param.detach().numpy().data)


def run(number: int, folder: Path, state: str, backend: str) -> None:
    """Run all programs of a state, in a process of `forked`."""
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", message=".*torch.compile|.*Sparse invariant")
    if state == "other threads":
        different = other_threads(backend)
    elif state == "forked":
        different = forked(backend)
    else:
        different = everything(state, backend)
    assert not different, "\n".join(different)
