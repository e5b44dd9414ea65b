"""``python -m epi_kernels delta``: deltas and checkpoints in files, from the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epi_kernels.delta import checkpoint, export, file, life
from epi_kernels.delta.entries import Delta, rename

# parameters that `inspect` lists, unless all are asked for
_LISTED = 10


def add_to(parsed: argparse.ArgumentParser) -> None:
    """Give the parser of the command ``delta`` its own commands."""
    commands = parsed.add_subparsers(dest="action", metavar="action", required=True)

    def command(name: str, run: Callable[[dict[str, Any]], None], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        added.set_defaults(run=run)
        return added

    inspected = command("inspect", _inspect, "print what files of deltas hold and which base they ask for")
    inspected.add_argument("tasks", type=Path, nargs="+", metavar="task")
    inspected.add_argument("--all", action="store_true", help=f"list all parameters, and not the {_LISTED} largest")
    applied = command("apply", _apply, "write a delta into a checkpoint, in place, and what was there into a file")
    _checkpoint_and_task(applied)
    applied.add_argument("--undo", type=Path, required=True, metavar="FILE", help="what will undo it; written first")
    _options(applied)
    undone = command("undo", _undo, "write back what apply has replaced, unless it was overwritten since")
    _checkpoint_and_task(undone, "old", "the file that apply was given as --undo")
    combined = command("combine", _combine, "write one delta that does what several do, one after the other")
    combined.add_argument("tasks", type=Path, nargs="+", metavar="task")
    combined.add_argument("--out", type=Path, required=True, metavar="FILE", help="the delta; written")
    combined.add_argument(
        "--consecutive", action="store_true", help="each task began with the model with which the one before it ended"
    )
    combined.add_argument("--base", type=Path, help="the checkpoint with which the first task began, to compare with")
    merged = command("merge", _merge, "write a checkpoint that has a delta's values, file by file")
    merged.add_argument("base", type=Path, help="a folder of save_pretrained")
    _task(merged)
    merged.add_argument("out", type=Path, help="the new folder; written")
    _options(merged)
    exported = command("export", _export, "write a delta in the form of another program")
    exported.add_argument(
        "base", type=Path, help="the checkpoint that the other program has: a folder of save_pretrained"
    )
    _task(exported)
    exported.add_argument("out", type=Path, help="sglang: the folder of versions; peft: the new folder of the adapter")
    exported.add_argument("--to", choices=("sglang", "peft"), required=True)
    exported.add_argument("--version", type=int, help="of the weights, for sglang: one more than the server has (1)")
    _rename(exported)


def run(parser: argparse.ArgumentParser, options: dict[str, Any]) -> None:
    """Run an action of the command, or say what is wrong and exit with status 2."""
    try:
        options.pop("run")(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _checkpoint_and_task(parser: argparse.ArgumentParser, name: str = "task", about: str = "a file of a delta") -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder of save_pretrained, or a file of safetensors; written")
    parser.add_argument(name, type=Path, help=about)


def _task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", type=Path, help="a file of a delta")


def _rename(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rename",
        type=_pair,
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="a name in the delta, or the beginning of names up to a point, and what the checkpoint has there",
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--convert", action="store_true", help="round values to the checkpoint's dtype")
    parser.add_argument("--digest", action="store_true", help="compare all of the checkpoint with the delta's base")
    _rename(parser)


def _pair(text: str) -> tuple[str, str]:
    old, sign, new = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, new


def _renamed(options: dict[str, Any]) -> Delta:
    found = file.load(options["task"])
    return rename(found, dict(options["rename"])) if options["rename"] else found


def _inspect(options: dict[str, Any]) -> None:
    for number, path in enumerate(options["tasks"]):
        found = file.load(path)
        entries = sum(len(positions) for positions, _ in found.values())
        size = path.stat().st_size
        known = sum(name in found.before for name in found)
        dtypes = sorted({str(values.dtype).removeprefix("torch.") for _, values in found.values()})
        rows = [
            ("entries", f"{entries:,} in {len(found)} parameters, {', '.join(dtypes)}"),
            ("bytes", f"{size:,}" + (f", {size / entries:.2f} for each entry" if entries else "")),
            ("old values", f"known by a checksum in {known} of {len(found)} parameters"),
            ("base", found.base or "no digest"),
            ("target", found.target or "no digest"),
        ]
        print(("\n" if number else "") + str(path))
        _table(rows)
        largest = sorted(found, key=lambda name: -len(found[name][0]))
        listed = largest if options["all"] else largest[:_LISTED]
        _table([(name, _share(found, name)) for name in listed])
        if len(listed) < len(found):
            print(f"  and {len(found) - len(listed)} more: --all")


def _share(delta: Delta, name: str) -> str:
    count, shape = len(delta[name][0]), delta.shapes.get(name)
    if shape is None:
        return f"{count:,}"
    whole = 1
    for size in shape:
        whole *= size
    return f"{count:,} of {whole:,} ({count / whole:.3%})" if whole else "0 of 0"


def _table(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _apply(options: dict[str, Any]) -> None:
    given = _renamed(options)
    checkpoint.apply(
        options["checkpoint"], given, options["undo"], convert=options["convert"], digest=options["digest"]
    )
    print(f"{_count(given)} entries written; undo with {options['undo']}")


def _undo(options: dict[str, Any]) -> None:
    old = file.load(options["old"])
    checkpoint.undo(options["checkpoint"], old)
    print(f"{_count(old)} entries written back")


def _combine(options: dict[str, Any]) -> None:
    tasks = [file.load(path) for path in options["tasks"]]
    whole = life.combine(tasks, consecutive=options["consecutive"], base=options["base"])
    file.save(whole, options["out"])
    print(f"{_count(whole)} entries of {len(options['tasks'])} deltas; {sum(whole.conflicts.values()):,} conflicts")
    _table([(name, f"{count:,} have the value of the last delta") for name, count in whole.conflicts.items()])
    lost = sum(name not in whole.before for name in whole)
    if lost:
        print(f"{lost} parameters have no checksum of old values, so that another base is not refused there: --base")


def _merge(options: dict[str, Any]) -> None:
    given = _renamed(options)
    left_out = checkpoint.merge(
        options["base"], given, options["out"], convert=options["convert"], digest=options["digest"]
    )
    print(f"{options['out']} has {_count(given)} entries of the delta")
    if left_out:
        print(f"not copied: {', '.join(left_out)}")


def _export(options: dict[str, Any]) -> None:
    given, base, out = _renamed(options), options["base"], options["out"]
    if options["to"] == "sglang":
        print(export.sglang(base, given, out, 1 if options["version"] is None else options["version"]))
    elif options["version"] is not None:
        raise ValueError("--version is for sglang; an adapter has none")
    else:
        export.peft(base, given, out)
        print(out)


def _count(delta: Delta) -> str:
    return f"{sum(len(positions) for positions, _ in delta.values()):,}"
