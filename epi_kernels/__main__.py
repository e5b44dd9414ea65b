"""``python -m epi_kernels``: what runs on this machine, and why; ``memory``: what an optimizer holds and moves."""

import argparse
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from epi_kernels import __version__, memory
from epi_kernels.backends import cuda, native, registry
from epi_kernels.backends.support import Spec
from epi_kernels.contract import arithmetic_dtype

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STORAGES = {**_FLOATS, "8bit": "8bit"}


def loaded() -> str:
    """Return which compiler has built the native library, and which instruction set it uses."""
    return f"loaded, built by {native.compiler()}, uses {native.simd()}"


def print_backends() -> None:
    """Print versions, the machine, the backend of each operation, and the path that a step takes."""
    obstacle = native.obstacle()
    rows = [
        ("epi_kernels", __version__),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("python", f"{platform.python_version()} on {platform.platform(terse=True)} {platform.machine()}"),
        ("native library", f"none: {obstacle}" if obstacle else loaded()),
        ("CUDA library", f"not used: {cuda.obstacle()}" if cuda.obstacle() else f"loaded, built by {cuda.compiler()}"),
        ("triton", version("triton") if find_spec("triton") else "not installed"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"),
    ]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            backends = registry.explain(torch.device(device), "auto", dtype)
            name = f"{device}, {str(dtype).removeprefix('torch.')}"
            spec = Spec("sweep_", frozenset({dtype}), frozenset({arithmetic_dtype(dtype)}))
            rows += [(name, backends), (f"{name}, a step", registry.path_of(spec, torch.device(device), "auto"))]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def print_memory(parser: argparse.ArgumentParser, options: dict[str, Any]) -> None:
    """Print what one combination of options holds and moves or, without any, a line for each usual combination."""
    model, count = options.pop("model", None), options.pop("params", 8 * 10**9)
    shapes = memory.MODELS[model] if model else memory.ENTRIES
    if model:
        count = sum(math.prod(shape) for shape in shapes)
    what = f"{count:,} parameters" + (f" of {model}, in {len(shapes)} tensors" if model else "")
    dtypes = {name: _STORAGES[options[name]] for name in options if name.endswith("_dtype")}
    try:
        if options:
            settings = {**options, **dtypes}
            dtype = settings.pop("param_dtype", torch.float32)
            table = memory.details(shapes, count, dtype, memory.Settings(**settings))
        else:
            table = memory.comparison(shapes, count)
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    print(f"Bytes held for each parameter, GiB for {what}; bytes of a step\n\n{table}")


def _count(text: str) -> int:
    """Return a number of parameters, such as 8e9, or raise what argparse reports."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters, such as 8e9")
    return int(number)


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser of the command line, and that of ``memory``."""
    parser = argparse.ArgumentParser(
        prog="python -m epi_kernels", description="Print what runs on this machine, and why; or what a command says."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    about = "what an optimizer holds and moves, in bytes for each parameter"
    parsed = commands.add_parser(
        "memory",
        help=about,
        description=f"Print {about}. Of the options, --params and --model alone give a line for each usual "
        "combination, any other the details of one.",
        argument_default=argparse.SUPPRESS,
        epilog="Example: python -m epi_kernels memory --model llama-3-8b --param-dtype bfloat16 --state-dtype 8bit "
        "--master-weight-bits 24",
    )
    sizes = parsed.add_mutually_exclusive_group()
    sizes.add_argument(
        "--params",
        type=_count,
        metavar="NUMBER",
        help="of parameters, all in large matrices with rows of a multiple of 64 entries (8e9)",
    )
    sizes.add_argument("--model", choices=memory.MODELS, help="count its tensors one by one, vectors included")
    parsed.add_argument("--rule", choices=("adamw", "lion"), help="of the step (adamw)")
    parsed.add_argument("--param-dtype", choices=_FLOATS, help="of parameters (float32)")
    parsed.add_argument("--grad-dtype", choices=_FLOATS, help="of gradients (that of the parameters)")
    parsed.add_argument("--state-dtype", choices=_STORAGES, help="of moments (float32)")
    parsed.add_argument("--importance-dtype", choices=_STORAGES, help="of the importance (that of the moments)")
    parsed.add_argument("--importance", choices=("ema", "exp_avg_sq"), help="its own, or the second moment (ema)")
    parsed.add_argument(
        "--master-weight-bits", type=int, choices=(24, 32), help="bits of the weight behind a bfloat16 parameter"
    )
    parsed.add_argument("--amsgrad", action="store_true", help="AdamW's largest second moment, a state more")
    parsed.add_argument("--release", action="store_true", help="each gradient is freed once its parameter has stepped")
    masks = parsed.add_mutually_exclusive_group()
    masks.add_argument("--frozen", dest="mask", action="store_const", const="fixed", help="MaskedAdamW")
    masks.add_argument("--trainable", type=float, metavar="SHARE", help="SparseAdamW of this share of the entries")
    masks.add_argument("--no-isolation", dest="mask", action="store_const", const="none", help="isolation_ratio=0")
    return parser, parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: of the command line; None: those of the process.
    """
    parser, of_memory = _parsers()
    options = vars(parser.parse_args(arguments))
    if options.pop("command") == "memory":
        print_memory(of_memory, options)
    else:
        print_backends()


if __name__ == "__main__":
    main()
