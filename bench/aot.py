"""Compiles every Triton kernel, without a GPU, and checks its machine code against its budget.

    python bench/aot.py                          # A100, H100 and B200
    python bench/aot.py --arch sm_80 --markdown

The report has a row for each variant that an `ops/<stem>/triton.py` lists, with the specialisation that the launcher
uses: registers, bytes spilled to the stack, shared memory, changes of layout, the widths of the accesses to global
memory and the instructions for each entry. The widths and the instructions are counted in the loop over full tiles of
aligned tensors: the loop of the machine code that moves the most bits by its widest accesses. That loop also reads
words of the table (64 bits) and scalars (32 bits), but writes only tensors. "late reads" are those of tensors, at least
64 bits wide, that the loop issues only after it has waited for another: they cost a second time what memory takes to
answer. The exit status is 1 if a budget is broken.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from epi_kernels.ops import tiles

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
STEMS = ("sweep", "importance", "threshold", "gather")

# The number of instructions of a thread that an A100 issues in the time in which it moves one byte: 108 processors with
# 4 schedulers of 32 lanes at 1.41 GHz, over 2.0 TB/s
INSTRUCTIONS_PER_BYTE = 108 * 4 * 32 * 1.41e9 / 2.0e12

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

_THREADS = 32 * tiles.OPTIONS["num_warps"]


@dataclass(frozen=True)
class Facts:
    """What was found in the machine code of one variant for one architecture."""

    architecture: str
    name: str
    kernel: str
    registers: int
    spilled: int  # bytes of stack and local memory
    shared: int  # bytes
    conversions: int
    reads: dict[int, int]  # bits -> reads of global memory in the loop, including the table and scalars
    writes: dict[int, int]
    late_reads: int  # of tensors, issued after the first wait for a tensor
    instructions: float | None  # per thread and entry, in the loop
    bytes: float
    budget: float  # instructions that fit in the time to move the bytes of an entry


def variants() -> list[tiles.Variant]:
    """Return the variants of all modules."""
    modules = [importlib.import_module(f"epi_kernels.ops.{stem}.triton") for stem in STEMS]
    return [variant for module in modules for variant in module.VARIANTS]


def compiled(variant: tiles.Variant, architecture: str, **options: Any) -> Any:
    """Return the kernel as Triton compiles it at its first launch: with addresses that are multiples of 16."""
    names = variant.kernel.arg_names
    given = {**variant.arguments}
    for name, value in (("BLOCK", tiles.BLOCK), ("TILES", tiles.TILES)):
        if name in names:
            given.setdefault(name, value)
    types = {name: value for name, value in given.items() if isinstance(value, str)}
    source = ASTSource(
        variant.kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in given.items() if name not in types},
        {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")},
    )
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options={**tiles.OPTIONS, **options})


def examine(variant: tiles.Variant, architecture: str, **options: Any) -> Facts:
    """Compile a variant and return the facts about its machine code."""
    binary = compiled(variant, architecture, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (_dumped(option, file.name) for option in ("-res-usage", "-sass"))
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loop = _widest_loop(code)
    entries = binary_entries(variant)
    return Facts(
        architecture,
        variant.name,
        variant.kernel.fn.__name__,
        resources["REG"],
        resources["STACK"] + resources["LOCAL"],
        max(resources["SHARED"], binary.metadata.shared),
        binary.asm["ttgir"].count("ttg.convert_layout"),
        _widths("LDG", loop),
        _widths("STG", loop),
        late_reads(loop),
        len(loop) / entries if variant.instructions is not None else None,
        variant.bytes,
        variant.bytes * INSTRUCTIONS_PER_BYTE,
    )


def binary_entries(variant: tiles.Variant) -> float:
    """Return the entries of a tile that one thread takes."""
    return float(variant.arguments.get("BLOCK", tiles.BLOCK)) / _THREADS


def broken(variant: tiles.Variant, facts: Facts) -> list[str]:
    """Return the budgets that the machine code breaks, each with its value and its limit."""
    found = []
    for name, value, limit in (
        ("registers", facts.registers, variant.registers),
        ("spilled bytes", facts.spilled, 0),
        ("layout conversions", facts.conversions, 0),
        ("instructions per entry", facts.instructions or 0, variant.instructions or 0),
        ("reads after the first wait", facts.late_reads, variant.late_reads),
    ):
        if limit is not None and value > limit:
            found.append(f"{name}: {value:g}, at most {limit}")
    if variant.writes:
        if facts.writes != dict(variant.writes):
            found.append(f"writes by width: {facts.writes}, to be {dict(variant.writes)}")
        if facts.reads.get(128, 0) != variant.reads.get(128, 0):
            found.append(f"128-bit reads: {facts.reads.get(128, 0)}, to be {variant.reads.get(128, 0)}")
        if min(facts.reads, default=32) < 32:
            found.append(f"reads by width: {facts.reads}, none to be below 32")
    return [f"{facts.name} for {facts.architecture}: {text}" for text in found]


def _dumped(option: str, path: str) -> str:
    run = subprocess.run([str(CUOBJDUMP), option, path], check=True, capture_output=True, text=True)
    return run.stdout + run.stderr


def _widest_loop(code: str) -> list[str]:
    """Return the instructions of the loop that moves the most bits by its widest accesses; [] without a loop.

    Only a loop without a loop inside counts, one over the tiles of a chunk: another may go over chunks. The widths of
    writes come first: where tensors have few bits for each entry, the words of the table are the widest.
    """
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)
    position = {int(address, 16): i for i, (address, _) in enumerate(found)}
    ends = []
    for i, (_, text) in enumerate(found):
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if jump and position.get(int(jump[1], 16), i) < i:
            ends.append((position[int(jump[1], 16)], i + 1))
    innermost = [
        (start, end)
        for start, end in ends
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in ends)
    ]
    loops = [[text for _, text in found[start:end]] for start, end in innermost]
    return max(
        loops, key=lambda loop: (_widest(_widths("STG", loop)), _widest(_widths("(?:LDG|STG)", loop))), default=[]
    )


def _widest(widths: dict[int, int]) -> tuple[int, int]:
    bits = max(widths, default=0)
    return bits, widths.get(bits, 0)


def _widths(operation: str, code: list[str]) -> dict[int, int]:
    """Return a map from the bits of an access to the number of such accesses, widest first."""
    counts: Counter[int] = Counter()
    for text in code:
        access = re.search(rf"\b{operation}((?:\.\w+)*)", text)
        if access:
            bits = re.search(r"\.[US]?(8|16|64|128)\b", access[1])
            counts[int(bits[1]) if bits else 32] += 1
    return dict(sorted(counts.items(), reverse=True))


@dataclass
class _Instruction:
    """What an instruction does to registers, as far as loads are concerned."""

    operation: str
    written: set[int]
    read: set[int]
    address: set[int]  # of a load or a store

    @classmethod
    def parsed(cls, text: str) -> "_Instruction":
        """Return what a line of machine code says; the registers of a wide operand are its first and those behind."""
        operation, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
        bits = re.search(r"\.(64|128)\b", operation)
        width = int(bits[1]) // 32 if bits else 1
        address = {int(first) + i for first in re.findall(r"\[R(\d+)", operands) for i in (0, 1)}
        first, _, others = operands.partition(",")
        outside = re.compile(r"\bR(\d+)\b(?![^\[]*\])")  # not in an address
        if operation.startswith("LDG"):
            return cls(operation, {int(n) + i for n in outside.findall(first) for i in range(width)}, set(), address)
        if operation.startswith("STG"):
            return cls(operation, set(), {int(n) + i for n in outside.findall(others) for i in range(width)}, address)
        pair = 2 if "WIDE" in operation or width > 1 else 1
        written = {int(n) + i for n in outside.findall(first) for i in range(pair)}
        return cls(operation, written, {int(n) for n in outside.findall(others)}, address)


def late_reads(loop: list[str]) -> int:
    """Return how many reads of tensors a loop issues after its first wait for one.

    A read counts if it has 64 bits or more and is no word of the table. From a word an address is computed, or the word
    lies beside such a word.
    """
    code = [_Instruction.parsed(text) for text in loop]
    wide = [i for i, one in enumerate(code) if re.match(r"LDG\S*\.(64|128)\b", one.operation)]
    origins: dict[int, set[int]] = {}  # register -> the reads that its value was computed from
    written_by: dict[int, int] = {}  # register -> the instruction
    bases: dict[int, set[tuple[int, int]]] = {}  # read -> the values that are its address
    of_addresses: set[int] = set()
    for i, one in enumerate(code):
        of_addresses |= set().union(*(origins.get(register, set()) for register in one.address))
        found = {i} if i in wide else set().union(*(origins.get(register, set()) for register in one.read))
        bases[i] = {(register, written_by.get(register, -1)) for register in one.address}
        origins |= {register: found for register in one.written}
        written_by |= {register: i for register in one.written}
    rows = set().union(*(bases[i] for i in of_addresses))
    tensors = [i for i in wide if i not in of_addresses and not bases[i] & rows]
    awaited: set[int] = set()
    for i, one in enumerate(code):
        if awaited & one.read:
            return sum(later > i for later in tensors)
        awaited = awaited - one.written | (one.written if i in tensors else set())
    return 0


def _examine(job: tuple[int, str]) -> Facts:
    return examine(variants()[job[0]], job[1])


def examined(architectures: list[str]) -> Iterator[tuple[tiles.Variant, Facts]]:
    """Yield every variant with its facts, compiled on all cores."""
    known = variants()
    jobs = [(i, architecture) for architecture in architectures for i in range(len(known))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (i, _), facts in zip(jobs, tqdm(pool.map(_examine, jobs), total=len(jobs), leave=False), strict=True):
            yield known[i], facts


COLUMNS = {
    "arch": lambda f: f.architecture,
    "variant": lambda f: f.name,
    "registers": lambda f: f.registers,
    "spilled": lambda f: f.spilled,
    "shared": lambda f: f.shared,
    "conversions": lambda f: f.conversions,
    "reads, bits x count": lambda f: _product(f.reads),
    "writes": lambda f: _product(f.writes),
    "late reads": lambda f: f.late_reads,
    "instructions": lambda f: "" if f.instructions is None else f"{f.instructions:.0f}",
    "bytes": lambda f: f"{f.bytes:g}" if f.bytes else "",
    "time for": lambda f: f"{f.budget:.0f}" if f.budget else "",
}


def _product(widths: dict[int, int]) -> str:
    return " ".join(f"{bits}x{count}" for bits, count in widths.items())


def table(rows: list[Facts], *, markdown: bool) -> str:
    """Return the facts as text."""
    cells = [list(COLUMNS), *[[str(value(facts)) for value in COLUMNS.values()] for facts in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Compile all variants, print the facts, and report broken budgets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help=f"{' '.join(ARCHITECTURES)}")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--json", type=Path, help="write the facts here")
    arguments = parser.parse_args()
    if not CUOBJDUMP.exists():
        sys.exit(f"{CUOBJDUMP} is missing: install triton from its wheel, which brings cuobjdump along")

    found = list(examined(arguments.arch))
    print(table([facts for _, facts in found], markdown=arguments.markdown))
    if arguments.json:
        facts = [asdict(facts) for _, facts in found]
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "kernels": facts}, indent=1) + "\n")
    failures = [text for variant, facts in found for text in broken(variant, facts)]
    for text in failures:
        print(f"over budget: {text}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
