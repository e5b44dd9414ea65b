"""The machine code of the Triton kernels keeps its budgets on A100, H100 and B200; compiled here, without a GPU.

- Nothing spills, no tile changes its layout, tensors move 128 bits at a time (64 of 16-bit dtypes), and registers and
  instructions for each entry stay below what each kernel's module allows.
- A sweep issues all reads of a tile's tensors before it waits for one, unless the variant's budget says otherwise.
- Every kernel has a variant.
- The checks see a kernel that is not aligned, one that mixes layouts, one that spills, one that does too much, and one
  that reads after it has waited.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("an interpreted kernel is not compiled", allow_module_level=True)

import aot  # noqa: E402
import triton.language as tl  # noqa: E402

from epi_kernels.ops import tiles  # noqa: E402
from epi_kernels.ops.tiles import Variant, located, pointer, read, write  # noqa: E402

pytestmark = pytest.mark.skipif(not aot.CUOBJDUMP.exists(), reason="this triton came without cuobjdump")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile everything: what an earlier version left in the cache proves nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def is_compact(variant: Variant) -> bool:
    return any(word in variant.name for word in ("bits", "stochastic", "bfloat16 states", "in bfloat16"))


def architectures(number: int, variant: Variant) -> list[str]:
    """Return for which architectures a variant is compiled, to save time: `make ptx` compiles all for all."""
    first, second, third = aot.ARCHITECTURES
    return [aot.ARCHITECTURES[number % 3]] if is_compact(variant) else [(first, second)[number % 2], third]


CASES = [
    pytest.param(variant, architecture, id=f"{variant.name}-{architecture}")
    for number, variant in enumerate(aot.variants())
    for architecture in architectures(number, variant)
]


@pytest.mark.parametrize(("variant", "architecture"), CASES)
def test_budget(variant: Variant, architecture: str) -> None:
    assert not aot.broken(variant, aot.examine(variant, architecture))


def test_every_kernel_has_a_variant() -> None:
    kernels = set()
    for path in Path(aot.tiles.__file__).parent.glob("*/triton.py"):
        kernels |= {line.split()[1].split("(")[0] for line in path.read_text().splitlines() if "_kernel(" in line[:60]}
    kernels = {name for name in kernels if name.endswith("_kernel")}
    assert len(kernels) >= 7
    assert {variant.kernel.fn.__name__ for variant in aot.variants()} == kernels


# a kernel that keeps its budget, and the ways to spoil it -----------------------------------------------------------


@triton.jit
def doubled_kernel(
    rows,
    chunks,
    PROMISE: tl.constexpr,
    ROUNDS: tl.constexpr,
    WAITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    _tensor, start = located(chunks, tl.program_id(0), BLOCK * TILES)
    if PROMISE:
        at = pointer(tl.load(rows), start, tl.float32)
        half_at = pointer(tl.load(rows + 1), start, tl.bfloat16)
    else:
        at = tl.load(rows).to(tl.pointer_type(tl.float32)) + start
        half_at = tl.load(rows + 1).to(tl.pointer_type(tl.bfloat16)) + start
    for tile in range(TILES):
        offsets = tile * BLOCK + tl.arange(0, BLOCK)
        value = read(at, offsets, 0, True)
        if WAITS:
            write(at, offsets, value + 1.0, 0, True)
        value += read(half_at, offsets, 0, True).to(tl.float32)
        for _ in tl.static_range(ROUNDS):
            value = tl.div_rn(value, value + 1.5)
        write(at, offsets, value, 0, True)


def doubled(**changes: Any) -> Variant:
    arguments = {"rows": "*i64", "chunks": "*i64", "PROMISE": True, "ROUNDS": 1, "WAITS": False, **changes}
    return Variant("doubled", doubled_kernel, arguments, 10, 30, {128: 1, 64: 1}, {128: 1}, registers=40, late_reads=0)


def found(variant: Variant, **options: Any) -> str:
    return "; ".join(aot.broken(variant, aot.examine(variant, "sm_80", **options)))


def test_the_control_keeps_its_budget() -> None:
    assert not found(doubled())


def test_without_the_promise_of_alignment_the_widths_are_seen() -> None:
    assert "writes by width: {32: 4}, to be {128: 1}" in found(doubled(PROMISE=False))


def test_eight_entries_to_a_thread_change_layouts() -> None:
    assert "layout conversions: " in found(doubled(BLOCK=8 * 128))


def test_too_much_arithmetic_is_seen() -> None:
    assert "instructions per entry: " in found(doubled(ROUNDS=4))


def test_a_read_after_a_wait_is_seen() -> None:
    assert "reads after the first wait: 1, at most 0" in found(doubled(WAITS=True))


# machine code of a loop -> its late reads
LOOPS = {
    "a word of the table, then its tensor": ("LDG.E.64 R2, [R8.64]", "LDG.E.128 R4, [R2.64]", "FADD R1, R7, R7", 0),
    "two tensors": ("LDG.E.128 R4, [R2.64]", "LDG.E.64 R12, [R10.64+0x8]", "FADD R1, R12, R7", 0),
    "a wait for the last register": ("LDG.E.128 R4, [R2.64]", "FADD R1, R7, R1", "@P0 LDG.E.64 R12, [R10.64]", 1),
    "a wait in a write": ("LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4", "LDG.E.64.CONSTANT R12, [R10.64]", 1),
    "a scalar": ("LDG.E R4, [R2.64]", "FADD R1, R4, R1", "LDG.E.128 R12, [R10.64]", 0),
    "a register used again": ("LDG.E.128 R4, [R2.64]", "MOV R4, R9", "LDG.E.128 R12, [R10.64]", 0),
    "another machine": ("LDG.E.128 R4, desc[UR4][R2.64]", "FADD R1, R4, R1", "LDG.E.64 R12, desc[UR4][R10.64]", 1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_late_reads_are_counted_in_machine_code(name: str) -> None:
    *loop, expected = LOOPS[name]
    assert aot.late_reads([str(text) for text in loop]) == expected


def test_a_spill_is_seen() -> None:
    sweep = next(variant for variant in aot.variants() if variant.name == "EPI, float32")
    assert "spilled bytes: " in found(sweep, maxnreg=32)


def test_too_many_registers_are_seen() -> None:
    sweep = next(variant for variant in aot.variants() if variant.name == "EPI, float32")
    assert "registers: " in found(sweep._replace(registers=tiles.OPTIONS["num_warps"]))
