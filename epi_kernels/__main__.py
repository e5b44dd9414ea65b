"""``python -m epi_kernels``: what runs on this machine; what an optimizer holds and moves; a report; tasks as files.

``doctor``, or no command, says what runs here and why; ``memory`` counts bytes; ``report`` writes a page of HTML;
``delta`` prints, applies, undoes, combines, merges and exports the deltas of tasks.
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from epi_kernels import __version__, memory
from epi_kernels.backends import cuda, native, registry
from epi_kernels.backends.support import Spec
from epi_kernels.contract import arithmetic_dtype
from epi_kernels.delta import command as delta

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


def print_report(parser: argparse.ArgumentParser, options: dict[str, Any]) -> None:
    """Write a report of the refreshes that a file or a checkpoint has, and print its path."""
    from epi_kernels import report

    given: Path = options["run"]
    try:
        records = records_in(given)
        facts = {"of": given, "refreshes": len(records)}
        print(report.write(options["out"], options["title"], facts=facts, telemetry={"": records}))
    except (OSError, ValueError) as error:
        parser.error(str(error))


# where a folder has the records: by itself, in a checkpoint of a transformers Trainer, in examples/finetune.py's
_FILES = ("telemetry.json", "trainer_state.json", "progress.json")


def records_in(path: Path) -> list[Any]:
    """Return the records of refreshes in a file, or in a folder that has one of _FILES.

    Args:
        path: JSON, or what torch.save wrote: a list as ``optimizer.telemetry()`` returns it, or a dict that has it
            under "telemetry", such as ``optimizer.state_dict(telemetry=True)``, or in which such a dict is a value.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no records; the message says how to have them.
    """
    if path.is_dir():
        path = next((path / name for name in _FILES if (path / name).exists()), path / _FILES[0])
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a {_FILES[0]}, a folder with one, or a checkpoint")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # it is no JSON, nor text
        found = _of_torch(path)
    if not isinstance(found, list):
        found = _telemetry_of(found)
    if not isinstance(found, list):
        raise ValueError(
            f"{path} has no records of refreshes: save optimizer.state_dict(telemetry=True), or write "
            "json.dumps(optimizer.telemetry()), or give a Trainer the IsolationCallback"
        )
    return found


def _telemetry_of(found: object) -> object:
    """Return what a dict, or one within it, has under "telemetry"; None if there is no such key."""
    if isinstance(found, dict):
        if "telemetry" in found:
            return found["telemetry"]
        return next((of for of in map(_telemetry_of, found.values()) if of is not None), None)
    return None


def _of_torch(path: Path) -> object:
    """Return what torch.save wrote, without reading its tensors."""
    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is neither JSON nor a checkpoint that torch.load reads: {error}") from error


def _count(text: str) -> int:
    """Return a number of parameters, such as 8e9, or raise what argparse reports."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters, such as 8e9")
    return int(number)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the command line, and those of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m epi_kernels", description="Print what runs on this machine, and why; or do what a command says."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("doctor", help="what runs on this machine, and why, as without a command")
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

    about = "a page of HTML on what a run has protected"
    reported = commands.add_parser(
        "report",
        help=about,
        description=f"Write {about}, and print its path.",
        epilog="Example: python -m epi_kernels report out/checkpoint-500 --out out/report.html",
    )
    reported.add_argument(
        "run",
        type=Path,
        help="telemetry as JSON, a Trainer's checkpoint, or one of optimizer.state_dict(telemetry=True)",
    )
    reported.add_argument("--out", type=Path, default=Path("report.html"), help="the page (%(default)s)")
    reported.add_argument("--title", default="What the run has protected", help="of the page (%(default)s)")
    delta.add_to(
        commands.add_parser("delta", help="a task as a file: print, apply, undo, combine, merge and export deltas")
    )
    return parser, commands.choices


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: of the command line; None: those of the process.
    """
    parser, commands = _parsers()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if command == "memory":
        print_memory(commands[command], options)
    elif command == "report":
        print_report(commands[command], options)
    elif command == "delta":
        delta.run(commands[command], options)
    else:
        print_backends()


if __name__ == "__main__":
    main()
