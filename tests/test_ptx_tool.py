"""The interpreter of PTX reports what kernels must not do, and computes what a GPU computes.

- Races between programs and between warps, accesses out of bounds or misaligned, and divergent barriers, in a few lines
  of PTX and in a step of a real optimizer; the same without the fault is not reported.
- Every instruction on values whose results are known, and threads that take different ways.
- Arithmetic that does not say how it rounds, and unknown instructions, are refused.
"""

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_steps_agree, gradient, step, step_lists
from ptx import Kernel, KernelError, ProcessMemory

WORDS = "ld.param.b64 %rd1, [out]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd2, %r1, 4;"


def kernel(body: str, threads: int = 64) -> Kernel:
    """Return a kernel with a parameter `out`: %r1 is the thread, %r2 the program, %rd1 is out, %rd2 4 * thread."""
    return Kernel(
        f""".visible .entry kernel(.param .u64 out, .param .u32 number) .reqntid {threads} {{
            .reg .pred %p<9>; .reg .b16 %rs<9>;
            .reg .b32 %r<20>;
            .reg .b64 %rd<9>;
            {WORDS}
            {body}
            ret;
        }}
        """
    )


def run(body: str, entries: int = 64, *, threads: int = 64, programs: int = 1, shared: int = 1024) -> list[int]:
    """Return what the kernel leaves in `out`, uint32 that begin as 0, 1, 2 and so on."""
    out = np.arange(entries + 4, dtype=np.uint32)  # with memory beyond the entries
    memory = ProcessMemory([("out", out.ctypes.data, 4 * entries)])
    kernel(body, threads).run(programs, [out.ctypes.data, 7], memory, shared)
    memory.write_back()
    return out[:entries].tolist()


# what must be reported -----------------------------------------------------------------------------------------------


OWN_WORD = "add.s64 %rd1, %rd1, %rd2;"
STORE = "st.global.b32 [%rd1], %r2;"
ADD = "red.global.gpu.relaxed.add.u32 [%rd1], 1;"
FIRST_THREAD = "setp.ne.b32 %p1, %r1, 0;"


def test_a_race_of_programs_is_reported() -> None:
    for body in (f"{FIRST_THREAD} @!%p1 {STORE}", f"{OWN_WORD} {STORE}"):
        run(body)
        with pytest.raises(
            KernelError, match="race: programs that nothing orders at byte 0 of out; 0: store, 1: store"
        ):
            run(body, programs=2)


def test_programs_may_update_a_number_but_not_read_it_too() -> None:
    assert run(ADD, programs=3)[0] == 3 * 64
    with pytest.raises(KernelError, match="race: programs .* at byte 0 of out; .*load.*update"):
        run(f"{ADD} ld.global.b32 %r3, [%rd1];", programs=2)
    with pytest.raises(KernelError, match="race: programs .*store.*update"):
        run(f"{ADD} {FIRST_THREAD} @!%p1 {STORE}", programs=2)


# each thread leaves its number in shared memory, and takes that of the thread 32 further
EXCHANGE = """
    shl.b32 %r3, %r1, 2; mov.b32 %r4, global_smem; add.s32 %r3, %r3, %r4; st.shared.b32 [%r3], %r1;
    {barrier}
    xor.b32 %r3, %r3, 128; ld.shared.b32 %r5, [%r3];
    add.s64 %rd1, %rd1, %rd2; st.global.b32 [%rd1], %r5;
"""


def test_a_race_of_warps_is_reported() -> None:
    assert run(EXCHANGE.format(barrier="bar.sync 0;")) == [(thread + 32) % 64 for thread in range(64)]
    with pytest.raises(KernelError, match="race: warps of one program .* of shared memory; 0: (load|store), 1: "):
        run(EXCHANGE.format(barrier=""))


def test_shared_memory_is_each_programs_own() -> None:
    body = EXCHANGE.format(barrier="bar.sync 0;").replace("ld.param", "mov.u32 %r2, %ctaid.x; ld.param")
    body = "shl.b32 %r6, %r2, 8; cvt.u64.u32 %rd3, %r6; add.s64 %rd1, %rd1, %rd3;" + body
    assert run(body, 3 * 64, programs=3) == 3 * [(thread + 32) % 64 for thread in range(64)]


def test_two_threads_that_store_at_once_are_reported() -> None:
    with pytest.raises(KernelError, match="race: two threads of a warp store at once to byte 0 of out"):
        run(STORE)


def test_a_barrier_orders_warps_but_not_programs() -> None:
    shift = "xor.b32 %r3, %r1, 32; mul.wide.u32 %rd3, %r3, 4; add.s64 %rd4, %rd1, %rd3; st.global.b32 [%rd4], %r1;"
    run(f"add.s64 %rd5, %rd1, %rd2; st.global.b32 [%rd5], %r1; bar.sync 0; {shift}")
    with pytest.raises(KernelError, match="race: warps of one program"):
        run(f"add.s64 %rd5, %rd1, %rd2; st.global.b32 [%rd5], %r1; {shift}")
    with pytest.raises(KernelError, match="race: programs"):
        run("bar.sync 0; " + OWN_WORD + STORE, programs=2)


def test_an_access_out_of_bounds_is_reported() -> None:
    body = f"{OWN_WORD} {STORE}"
    assert run(body, 64) == [0] * 64
    with pytest.raises(
        KernelError, match="out of bounds: a store of 4 bytes by program 0 at byte 252 of out.* has 252"
    ):
        run(body, 63)
    with pytest.raises(KernelError, match="out of bounds: a load of 4 bytes .* below all tensors"):
        run("mov.b64 %rd3, 64; ld.global.b32 %r3, [%rd3];")
    with pytest.raises(KernelError, match="out of bounds: a load of 16 bytes .* at byte 244 of out"):
        run("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1+244];", 64)
    with pytest.raises(
        KernelError, match="out of bounds: a store of 4 bytes .* at byte 128 of shared memory, which has"
    ):
        run(EXCHANGE.format(barrier="bar.sync 0;"), shared=128)


def test_a_misaligned_access_is_reported() -> None:
    assert run("ld.global.v2.b32 {%r3, %r4}, [%rd1 + 8]; st.global.b32 [%rd1], %r4;", threads=1)[0] == 3
    with pytest.raises(KernelError, match="misaligned: a load of 8 bytes .* at byte 4 of out"):
        run("ld.global.v2.b32 {%r3, %r4}, [%rd1 + 4];")
    with pytest.raises(KernelError, match="misaligned: a store of 4 bytes .* at byte 2 of out"):
        run("st.global.b32 [%rd1 + 2], %r1;")


def test_a_divergent_barrier_is_reported() -> None:
    run(f"{FIRST_THREAD} bar.sync 0;")
    for body in (
        f"{FIRST_THREAD} @%p1 bra $over; bar.sync 0; $over: ret;",  # the others end
        f"{FIRST_THREAD} @%p1 bra $over; bar.sync 0; $over: bar.sync 0;",
        f"{FIRST_THREAD} @%p1 bar.sync 0;",
        f"{FIRST_THREAD} @%p1 ret; bar.sync 0;",
    ):
        with pytest.raises(KernelError, match="divergent barrier: not all threads of program 0 come to it"):
            run(body)


@pytest.mark.parametrize("what", ["shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", "redux.sync.add.s32 %r3, %r1, -1;"])
def test_a_warp_that_does_not_act_as_one_is_reported(what: str) -> None:
    run(what)
    run(f"setp.lt.u32 %p1, %r1, 32; @%p1 {what}")
    with pytest.raises(KernelError, match="divergent (shuffle|reduction)"):
        run(f"{FIRST_THREAD} @%p1 {what}")


def test_a_kernel_without_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx.LIMIT", 100)
    with pytest.raises(KernelError, match="kernel does not end"):
        run("$again: bra $again;")


def test_a_register_that_was_not_written_holds_what_no_kernel_expects() -> None:
    for body in ("", f"{FIRST_THREAD} @%p1 mov.b32 %r9, 1;"):
        assert run(f"{body} st.global.b32 [%rd1], %r9;", 1, threads=1) == [0x7FC0DEAD]


@pytest.mark.parametrize("opcode", ["add.f32", "mul.ftz.f32", "fma.rn.ftz.f32", "sin.approx.f32", "add.rn.f64"])
def test_other_instructions_are_refused(opcode: str) -> None:
    with pytest.raises(NotImplementedError, match=f"does not know {opcode}"):
        kernel(f"{opcode} %r3, %r1, %r1, %r1;")


# what instructions compute -------------------------------------------------------------------------------------------


def bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


NAN, TINY = 0x7FFFFFFF, bits(2.0**-149)

# instruction; its operands of 32 bits; its result
CASES: list[tuple[str, tuple[int, ...], int]] = [
    ("add.s32", (0xFFFFFFFF, 3), 2),
    ("sub.s32", (1, 3), 0xFFFFFFFE),
    ("mul.lo.s32", (0x10001, 0x10001), 0x20001),
    ("mul.hi.u32", (0xFFFFFFFF, 0x10000), 0xFFFF),
    ("mul.hi.s32", (-1 % 2**32, 0x10000), 0xFFFFFFFF),
    ("mad.lo.s32", (3, 5, 7), 22),
    ("div.s32", (-7 % 2**32, 2), -3 % 2**32),
    ("div.s32", (7, -2 % 2**32), -3 % 2**32),
    ("div.u32", (0xFFFFFFFF, 16), 0x0FFFFFFF),
    ("rem.s32", (-7 % 2**32, 4), -3 % 2**32),
    ("min.s32", (0xFFFFFFFF, 3), 0xFFFFFFFF),
    ("min.u32", (0xFFFFFFFF, 3), 3),
    ("max.s32", (0xFFFFFFFF, 3), 3),
    ("neg.s32", (5,), -5 % 2**32),
    ("abs.s32", (-5 % 2**32,), 5),
    ("not.b32", (0xF0F0F0F0,), 0x0F0F0F0F),
    ("and.b32", (12, 10), 8),
    ("or.b32", (12, 10), 14),
    ("xor.b32", (12, 10), 6),
    ("shl.b32", (3, 31), 0x80000000),
    ("shl.b32", (3, 32), 0),
    ("shr.u32", (0x80000000, 31), 1),
    ("shr.u32", (0x80000000, 40), 0),
    ("shr.s32", (0x80000000, 40), 0xFFFFFFFF),
    ("bfe.u32", (0xABCDEF12, 8, 12), 0xDEF),
    ("popc.b32", (0xF0F00001,), 9),
    ("prmt.b32", (0x33221100, 0x77665544, 0x7410), 0x77441100),
    ("prmt.b32", (0x00000080, 0, 0x8880), 0xFFFFFF80),
    ("add.rn.f32", (bits(1.0), bits(2.0**-24)), bits(1.0)),
    ("add.rn.f32", (bits(1.0), bits(2.0**-24 + 2.0**-40)), bits(1.0 + 2.0**-23)),
    ("sub.rn.f32", (bits(math.inf), bits(math.inf)), NAN),
    ("mul.rn.f32", (bits(2.0**-100), bits(2.0**-49)), TINY),
    ("div.rn.f32", (bits(1.0), bits(3.0)), 0x3EAAAAAB),
    ("div.rn.f32", (bits(0.0), bits(0.0)), NAN),
    # rounded once: the product alone would be 1 + 2^-11, and the sum 2^-11
    ("fma.rn.f32", (bits(1 + 2.0**-12), bits(1 + 2.0**-12), bits(-1.0)), bits(2.0**-11 + 2.0**-24)),
    ("sqrt.rn.f32", (bits(2.0),), 0x3FB504F3),
    ("sqrt.rn.f32", (bits(-1.0),), NAN),
    ("sqrt.rn.ftz.f32", (TINY,), 0),
    ("sqrt.approx.ftz.f32", (bits(4.0),), bits(2.0) - 1),  # one ulp below, in an even thread
    ("sqrt.approx.ftz.f32", (TINY,), 0),
    ("max.NaN.f32", (0xFFC00001, bits(1.0)), NAN),
    ("min.NaN.f32", (bits(-1.0), bits(1.0)), bits(-1.0)),
    ("abs.f32", (bits(-2.0),), bits(2.0)),
    ("neg.f32", (bits(2.0),), bits(-2.0)),
    ("copysign.f32", (bits(-0.0), 0x7FC00001), 0xFFC00001),
    ("abs.bf16x2", (0xBF80C000,), 0x3F804000),
    ("cvt.rn.bf16x2.f32", (bits(1.0), bits(-(1 + 2.0**-8))), 0x3F80BF80),
    ("cvt.rn.bf16x2.f32", (0xFFC00000, bits(1 + 3 * 2.0**-8)), 0x7FFF3F82),
    ("cvt.rn.f16x2.f32", (bits(65520.0), bits(-(2.0**-24))), 0x7C008001),
    ("cvt.rn.f32.u32", (0x01000001,), bits(2.0**24)),
    ("cvt.rmi.ftz.f32.f32", (bits(-1.5),), bits(-2.0)),
    ("cvt.rmi.ftz.f32.f32", (TINY | 0x80000000,), bits(-0.0)),
]


@pytest.mark.parametrize(("opcode", "operands", "expected"), CASES)
def test_an_instruction(opcode: str, operands: tuple[int, ...], expected: int) -> None:
    # from registers and as constants
    moves = " ".join(f"mov.b32 %r{i + 3}, {value};" for i, value in enumerate(operands))
    names = ", ".join(f"%r{i + 3}" for i in range(len(operands)))
    found = run(f"{moves} {opcode} %r9, {names}; st.global.b32 [%rd1], %r9;", 2, threads=1)[0]
    assert found == expected, hex(found)
    found = run(f"{opcode} %r9, {', '.join(map(str, operands))}; st.global.b32 [%rd1], %r9;", 2, threads=1)[0]
    assert found == expected, hex(found)


@pytest.mark.parametrize(
    ("comparison", "of_numbers", "of_nan"),
    [
        ("lt", True, False),
        ("ltu", True, True),
        ("ge", False, False),
        ("geu", False, True),
        ("eq", False, False),
        ("ne", True, False),
        ("neu", True, True),
        ("num", True, False),
        ("nan", False, True),
    ],
)
def test_comparisons_of_floats(comparison: str, of_numbers: bool, of_nan: bool) -> None:
    for right, expected in ((bits(2.0), of_numbers), (NAN, of_nan)):
        body = (
            f"setp.{comparison}.f32 %p1, 0f3F800000, 0f{right:08X}; selp.b32 %r3, 1, 0, %p1; st.global.b32 [%rd1], %r3;"
        )
        assert run(body, 1, threads=1) == [int(expected)]


def test_comparisons_of_whole_numbers_and_of_bfloat16() -> None:
    for comparison, expected in (("lt.s32", 1), ("lt.u32", 0), ("eq.b32", 0), ("ne.b32", 1), ("gt.s16", 0)):
        wide = "%r3, %r4" if "32" in comparison else "%rs1, %rs2"
        body = f"mov.b32 %r3, -1; mov.b32 %r4, 1; mov.b16 %rs1, -1; mov.b16 %rs2, 1; setp.{comparison} %p1, {wide};"
        assert run(f"{body} selp.b32 %r5, 1, 0, %p1; st.global.b32 [%rd1], %r5;", 1, threads=1) == [expected]
    # -0 is 0, and NaN is not itself
    body = "mov.b32 %r3, 0x80007FC0; mov.b32 %r4, 0x00007FC0; setp.eq.bf16x2 %p1|%p2, %r3, %r4;"
    body += "selp.b32 %r5, 1, 0, %p1; selp.b32 %r6, 1, 0, %p2; st.global.v2.b32 [%rd1], {%r5, %r6};"
    assert run(body, 2, threads=1) == [0, 1]


def test_conversions_and_parts_of_registers() -> None:
    body = """
        mov.b32 %r3, 0x8001FFFE; mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r4, {%rs2, %rs1};
        cvt.s32.s16 %r5, %rs1; cvt.u32.u16 %r6, %rs1; cvt.s8.s32 %rs3, %r3; cvt.u32.u16 %r7, %rs3;
        cvt.s64.s32 %rd3, %r3; mov.b64 {_, %r8}, %rd3; cvt.f32.bf16 %r9, 0x3F80; cvt.f32.f16 %r10, 0x3C00;
        mul.wide.s32 %rd4, %r3, 2; shr.s64 %rd4, %rd4, 32; cvt.u32.u64 %r11, %rd4; ld.param.b32 %r12, [number];
        st.global.v4.b32 [%rd1], {%r4, %r5, %r6, %r7}; st.global.v4.b32 [%rd1+16], {%r8, %r9, %r10, %r11};
        st.global.b32 [%rd1+32], %r12;
    """
    one = bits(1.0)
    expected = [0xFFFE8001, 0xFFFFFFFE, 0xFFFE, 0xFFFE, 0xFFFFFFFF, one, one, 0xFFFFFFFF, 7]
    assert run(body, 9, threads=1) == expected


def test_narrow_loads_fill_their_registers() -> None:
    body = "mov.b32 %r3, 0xFF80; st.global.b32 [%rd1], %r3; ld.global.s8 %r4, [%rd1]; ld.global.b8 %r5, [%rd1];"
    assert run(f"{body} st.global.v2.b32 [%rd1], {{%r4, %r5}};", 2, threads=1) == [0xFFFFFF80, 0x80]


def test_shuffles_and_reductions() -> None:
    body = """
        shfl.sync.bfly.b32 %r3, %r1, 5, 31, -1; shfl.sync.up.b32 %r4, %r1, 3, 0, -1; redux.sync.max.s32 %r5, %r1, -1;
        shl.b32 %r3, %r3, 16; shl.b32 %r4, %r4, 8; or.b32 %r3, %r3, %r4; or.b32 %r3, %r3, %r5;
        add.s64 %rd1, %rd1, %rd2; st.global.b32 [%rd1], %r3;
    """
    for thread, word in enumerate(run(body)):
        lane, warp = thread % 32, thread // 32 * 32
        assert word == (warp + (lane ^ 5)) << 16 | (thread - 3 * (lane >= 3)) << 8 | warp + 31


def test_threads_that_take_different_ways() -> None:
    # each thread adds its number as often as its number says, but for thread 40 which ends at once
    body = """
        setp.eq.b32 %p1, %r1, 40; @%p1 ret;
        mov.b32 %r3, 0; mov.b32 %r4, 0;
        $again: setp.ge.u32 %p2, %r3, %r1; @%p2 bra $done; add.s32 %r4, %r4, %r1; add.s32 %r3, %r3, 1; bra.uni $again;
        $done: add.s64 %rd1, %rd1, %rd2; st.global.b32 [%rd1], %r4;
    """
    assert run(body) == [thread * thread if thread != 40 else 40 for thread in range(64)]


def test_what_an_update_returns() -> None:
    body = "add.s64 %rd1, %rd1, %rd2; atom.global.gpu.relaxed.max.s32 %r3, [%rd1], 9; st.global.b32 [%rd1], %r3;"
    assert run(body, 12, threads=12) == list(range(12))
    assert run(body.split("st.")[0], 12, threads=12) == [9] * 10 + [10, 11]


# a step of an optimizer ----------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> Any:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("an interpreted kernel is not compiled")
    import ptx_device

    with ptx_device.interpreted("sm_80") as device:
        yield device


def a_step() -> Any:
    return step_lists([torch.randn(4096)], [gradient((4096,))], "importance", False)


def test_a_step_without_a_fault(device: Any) -> None:
    assert_steps_agree("triton", a_step(), "importance")
    (launch,) = device.launches
    assert launch.kernel == "sweep_kernel"
    assert launch.widths["param of tensor 0"] == {"load": {128}, "store": {128}}
    assert launch.entries["param of tensor 0"] == 32


def test_a_tensor_that_is_there_twice_is_a_race(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {name: tensors * 2 for name, tensors in a_step().items()}
    monkeypatch.setattr("agreement.clones", lambda lists: lists)
    with pytest.raises(KernelError, match="race: programs .* at byte 0 of .*; 0: .*1: .*"):
        step(lists, "triton", "importance")


@pytest.mark.parametrize("size", [4096, 4000])
def test_a_tensor_that_ends_early_is_out_of_bounds(device: Any, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    note = device.note
    monkeypatch.setattr(device, "note", lambda tensor: note(tensor[:-1]))
    lists = step_lists([torch.randn(size)], [gradient((size,))], "importance", False)
    with pytest.raises(KernelError, match=f"out of bounds: a load .* of param of tensor 0, which has {4 * size - 4}"):
        step(lists, "triton", "importance")


def test_an_unaligned_tensor_that_is_called_aligned_is_misaligned(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = a_step()
    lists["grads"] = [gradient((4097,))[1:]]
    assert_steps_agree("triton", lists, "importance")
    monkeypatch.setattr("epi_kernels.ops.table.ALIGNMENT", 4)
    with pytest.raises(KernelError, match="misaligned: a load of 16 bytes .* of grad of tensor 0"):
        step(lists, "triton", "importance")
