"""An interpreter of PTX, the assembly language that Triton compiles kernels to, for a machine without a GPU.

The threads of many programs run in step, as numpy arrays: one value for each thread. Where they take different ways,
those that are furthest behind go first. `ptx_memory` checks what they read and write.

Example:
    >>> kernel = Kernel('''.entry five(.param .u64 out) .reqntid 1 {
    ...     .reg .b64 %rd<2>;
    ...     .reg .b32 %r<2>;
    ...     ld.param.b64 %rd1, [out];
    ...     mov.b32 %r1, 5;
    ...     st.global.b32 [%rd1], %r1;
    ...     ret;
    ... }''')
    >>> out = np.zeros(1, np.uint32)
    >>> memory = ProcessMemory([("out", out.ctypes.data, 4)])
    >>> kernel.run(1, [out.ctypes.data], memory)
    >>> memory.write_back()
    >>> out
    array([5], dtype=uint32)
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ptx_instructions import PREDICATE, TYPES, U16, U32, U64, UNSIGNED, Array, meaning
from ptx_memory import KernelError, Memory, ProcessMemory, moments

__all__ = ["Kernel", "KernelError", "ProcessMemory"]

WARP = 32

# the programs that run in step; those of a larger launch run one such group after the other
TOGETHER = 64

# more steps than any kernel of the project takes
LIMIT = 100_000

# what a register has that was not written: a NaN, an odd number, a wild address
_UNWRITTEN = 0x7FC0DEAD7FC0DEAD

# where the shared memory of each program begins
_SHARED_BITS = 32

Mask = Array | None  # the threads that take part; None: all
Instruction = Callable[["_Threads", Mask], None]


class _Guard(NamedTuple):
    """The predicate before an instruction, and whether it must be false."""

    register: str
    negated: bool


class _Block(NamedTuple):
    """Instructions without a label among them, and the one that ends them, if it decides where threads go on."""

    instructions: list[tuple[_Guard | None, Instruction]]
    end: tuple[_Guard | None, str, str]  # guard; "bra", "ret", "bar" or ""; the label


class Kernel:
    """The first kernel in a text of PTX.

    Raises:
        NotImplementedError: the kernel has an instruction that the interpreter does not know.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"//.*|/\*.*?\*/", "", text)
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{\s*\n(.*?)\n\s*\}\s*(\n|$)", text, re.S)
        assert entry, "there is no kernel"
        self.name, body = entry[1], entry[4]
        self.parameters = re.findall(r"(\w+)\s*(?:,|$)", entry[2].strip())
        self.threads = int(re.findall(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])[0])
        declared = re.findall(r"\.reg\s+\.(\w+)\s+(%\w+)<", body)
        self.kinds = {
            prefix: PREDICATE if kind == "pred" else UNSIGNED[TYPES[kind].itemsize] for kind, prefix in declared
        }
        self.blocks: list[_Block] = []
        self.labels: dict[str, int] = {}
        self._parse(re.sub(r"^\s*\..*$", "", body, flags=re.M))

    def run(self, programs: int, arguments: Sequence[int], memory: Memory, shared: int = 0) -> None:
        """Run all programs of a launch.

        Args:
            programs: how many.
            arguments: of the kernel: addresses and numbers; those that are left out are 0.
            memory: all that the kernel may access.
            shared: bytes of shared memory of each program.

        Raises:
            KernelError: an access is out of bounds or misaligned, threads race, not all threads of a program come to a
                barrier, or the kernel does not end.
        """
        given = dict(zip(self.parameters, [*arguments, *[0] * len(self.parameters)], strict=False))
        with np.errstate(all="ignore"):
            for first in range(0, programs, TOGETHER):
                numbers = range(first, min(first + TOGETHER, programs))
                own = Memory([("shared memory", n << _SHARED_BITS, shared) for n in numbers])
                _Threads(self, numbers, programs, given, memory, own).run()
                own.check_order()
            memory.check_order()

    def _parse(self, body: str) -> None:
        instructions: list[tuple[_Guard | None, Instruction]] = []

        def finish(end: tuple[_Guard | None, str, str]) -> None:
            self.blocks.append(_Block(instructions.copy(), end))
            instructions.clear()

        for label, statement in re.findall(r"\s*(?:(\$?\w+):(?!:)|([^;]+);)", body):
            if label:
                finish((None, "", ""))
                self.labels[label] = len(self.blocks)
                continue
            found = re.match(r"\s*(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*?)\s*$", statement, re.S)
            assert found, statement
            guard = _Guard(found[2], bool(found[1])) if found[2] else None
            root = found[3].split(".")[0]
            if root in ("bra", "ret", "exit", "bar", "barrier"):
                finish((guard, {"exit": "ret", "barrier": "bar"}.get(root, root), found[4]))
            else:
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[4])
                instructions.append((guard, _instruction(self, found[3], operands)))
        finish((None, "ret", ""))

    def kind_of(self, register: str) -> Any:
        """Return the dtype of a register: bool, or bits."""
        return self.kinds[register.rstrip("0123456789")]


class _Threads:
    """The threads of some programs of a launch, and their registers."""

    def __init__(
        self,
        kernel: Kernel,
        programs: range,
        all_programs: int,
        parameters: dict[str, int],
        memory: Memory,
        shared: Memory,
    ) -> None:
        self.kernel, self.parameters = kernel, parameters
        self.spaces = {"global": memory, "shared": shared}
        self.count = kernel.threads * len(programs)
        self.thread = np.tile(np.arange(kernel.threads), len(programs))
        self.program = np.repeat(np.array(programs), kernel.threads)
        self.phase = np.zeros(self.count, np.int64)  # how many barriers are behind a thread
        self.lane = np.arange(self.count)
        self.registers = _Registers(kernel, self.count)
        self.registers["%tid.x"] = self.thread.astype(U32)
        self.registers["%ctaid.x"] = self.program.astype(U32)
        self.registers["%ntid.x"] = np.full(self.count, kernel.threads, U32)
        self.registers["%nctaid.x"] = np.full(self.count, all_programs, U32)

    def run(self) -> None:
        """Run the threads to their end."""
        end = len(self.kernel.blocks)
        at = np.zeros(self.count, np.int64)  # the block of each thread
        waits = np.zeros(self.count, bool)
        for _ in range(LIMIT):
            ready = ~waits & (at < end)
            if not ready.any():
                if not waits.any():
                    return
                self._pass_barrier(at, waits)
                waits[:] = False
                continue
            here = int(at[ready].min())
            active = ready & (at == here)
            block = self.kernel.blocks[here]
            mask = None if active.all() else active
            for guard, instruction in block.instructions:
                some = self._guarded(guard, mask)
                if some is None or some.any():
                    instruction(self, None if some is None or some.all() else some)
            guard, what, label = block.end
            at[active] = here + 1
            some = self._guarded(guard, active)
            assert some is not None
            if what == "bra":
                at[some] = self.kernel.labels[label]
            elif what == "ret":
                at[some] = end
            elif what == "bar":
                waits |= some
        raise KernelError(f"{self.kernel.name} does not end")

    def _guarded(self, guard: _Guard | None, mask: Mask) -> Mask:
        if guard is None:
            return mask
        holds = self.registers[guard.register] ^ guard.negated
        return holds if mask is None else holds & mask

    def _pass_barrier(self, at: Array, waits: Array) -> None:
        """Let the threads pass the barriers at which they wait.

        Raises:
            KernelError: a thread of their program has ended, or waits at another barrier.
        """
        where = np.where(waits, at, -1).reshape(-1, self.kernel.threads)
        divergent = (where != where[:, :1]).any(1)
        if divergent.any():
            program = int(self.program[divergent.argmax() * self.kernel.threads])
            raise KernelError(f"divergent barrier: not all threads of program {program} come to it")
        self.phase += waits

    def when(self, lanes: Any) -> Array:
        """Return when the threads of some lanes act; see `ptx_memory.moments`."""
        return moments(self.program[lanes], self.phase[lanes], self.thread[lanes] // WARP)

    def spread(self, values: Array) -> Array:
        """Return a value for each thread, also of a constant."""
        return values if values.ndim and len(values) == self.count else np.broadcast_to(values, (self.count,))

    def write(self, register: str, values: Array, mask: Mask) -> None:
        """Write a register of the threads that take part; a narrower value is extended as its dtype says."""
        if register == "_":
            return
        kind = self.kernel.kind_of(register)
        if values.dtype != kind:
            if values.dtype.kind == "i":
                values = values.astype(f"i{kind.itemsize}")
            elif values.dtype.kind == "f":
                values = values.view(UNSIGNED[values.itemsize])
            values = values.astype(kind, copy=False) if values.itemsize != kind.itemsize else values.view(kind)
        if mask is not None:
            values = np.where(mask, values, self.registers[register])
        self.registers[register] = self.spread(values)


class _Registers(dict[str, Array]):
    """The registers that have been written; the others have a value that no kernel expects."""

    def __init__(self, kernel: Kernel, count: int) -> None:
        super().__init__()
        self._kernel, self._count = kernel, count

    def __missing__(self, register: str) -> Array:
        return np.full(self._count, _UNWRITTEN, U64).astype(self._kernel.kind_of(register))


@functools.cache
def _reader(operand: str, kind: Any) -> Callable[[_Threads], Array]:
    """Return a function that reads an operand as values of a dtype."""
    if operand.startswith("%"):

        def read(threads: _Threads) -> Array:
            values = threads.registers[operand]
            if values.dtype == kind:
                return values
            return values.astype(UNSIGNED[kind.itemsize], copy=False).view(kind)

        return read
    if operand.startswith("0f"):
        bits = int(operand[2:], 16)
    elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
        bits = int(operand.rstrip("U"), 0)
    else:
        bits = 0  # the shared memory, which begins there
    if kind == PREDICATE:
        constant = np.array(bits != 0)
    else:
        constant = np.array(bits % (1 << 8 * kind.itemsize), UNSIGNED[kind.itemsize]).view(kind)
    return lambda _: constant


def _instruction(kernel: Kernel, opcode: str, operands: list[str]) -> Instruction:
    """Return a function that executes an instruction."""
    root, *parts = opcode.split(".")
    if root in ("ld", "st"):
        return _parameter(operands) if parts[0] == "param" else _access(root, parts, operands)
    if root in ("atom", "red"):
        return _atomic(root, parts, operands)
    if root == "shfl":
        return _shuffle(parts, operands)
    if root == "redux":
        return _reduction(parts, operands)
    if root == "mov" and "{" in "".join(operands):
        return _pack(TYPES[parts[-1]], operands)
    if root == "setp" and opcode.endswith("x2"):
        return _compare_pairs(opcode, operands)
    kinds, function = meaning(opcode)
    to, *of = operands
    readers = [_reader(operand, kind) for operand, kind in zip(of, kinds, strict=True)]
    return lambda threads, mask: threads.write(to, function(*[read(threads) for read in readers]), mask)


def _vector(operand: str) -> list[str]:
    return operand.strip("{} ").replace(" ", "").split(",")


def _address(operand: str, space: str) -> Callable[[_Threads, Any], Array]:
    """Return a function that gives the addresses of some lanes."""
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    read, further = _reader(base, U64), U64.type(int(offset or 0) % (1 << 64))

    def address(threads: _Threads, lanes: Any) -> Array:
        values = threads.spread(read(threads) + further)[lanes]
        if space == "shared":
            return (values & U64.type((1 << _SHARED_BITS) - 1)) + (
                threads.program[lanes].astype(U64) << U64.type(_SHARED_BITS)
            )
        return values

    return address


def _parameter(operands: list[str]) -> Instruction:
    to, name = operands[0], operands[1].strip("[] ")

    def execute(threads: _Threads, mask: Mask) -> None:
        kind = threads.kernel.kind_of(to)
        threads.write(to, np.array(threads.parameters[name] % (1 << 8 * kind.itemsize), kind), mask)

    return execute


def _access(root: str, parts: list[str], operands: list[str]) -> Instruction:
    """Return a load or a store, of one value or of several that lie side by side."""
    space, kind = parts[0], TYPES[parts[-1]]
    place, registers = (operands[1], operands[0]) if root == "ld" else operands
    address, names = _address(place, space), _vector(registers)
    readers = [_reader(name, kind) for name in names] if root == "st" else []

    def execute(threads: _Threads, mask: Mask) -> None:
        lanes = slice(None) if mask is None else mask
        memory, when = threads.spaces[space], threads.when(lanes)
        if root == "st":
            values = [threads.spread(read(threads))[lanes] for read in readers]
            memory.store(address(threads, lanes), np.stack(values, 1), when)
            return
        loaded = memory.load(address(threads, lanes), kind, len(names), when)
        for name, column in zip(names, loaded.T, strict=True):
            values = np.zeros(threads.count, kind)
            values[lanes] = column
            threads.write(name, values, mask)

    return execute


def _atomic(root: str, parts: list[str], operands: list[str]) -> Instruction:
    space, kind = parts[0], TYPES[parts[-1]]
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[parts[-2]]
    to, place, operand = operands if root == "atom" else ["_", *operands]
    address, read = _address(place, space), _reader(operand, kind)

    def execute(threads: _Threads, mask: Mask) -> None:
        lanes = slice(None) if mask is None else mask
        values = threads.spread(read(threads))[lanes]
        result = np.zeros(threads.count, kind)
        result[lanes] = threads.spaces[space].update(address(threads, lanes), function, values, threads.when(lanes))
        threads.write(to, result, mask)

    return execute


def _whole_warps(threads: _Threads, mask: Mask, what: str) -> None:
    """Check that threads take part by whole warps.

    Raises:
        KernelError: they do not.
    """
    if mask is not None:
        of_warps = mask.reshape(-1, min(WARP, threads.kernel.threads))
        if (of_warps.any(1) & ~of_warps.all(1)).any():
            raise KernelError(f"divergent {what}: not all threads of a warp come to it")


def _shuffle(parts: list[str], operands: list[str]) -> Instruction:
    to, *of = operands
    how, (read, distance) = parts[1], (_reader(operand, U32) for operand in of[:2])
    assert how in ("bfly", "up"), how

    def execute(threads: _Threads, mask: Mask) -> None:
        _whole_warps(threads, mask, "shuffle")
        values, by = read(threads), distance(threads).astype(np.int64)
        within = threads.lane % WARP
        source = within ^ by if how == "bfly" else np.where(within >= by, within - by, within)
        threads.write(to, values[threads.lane - within + source], mask)

    return execute


def _reduction(parts: list[str], operands: list[str]) -> Instruction:
    kind = TYPES[parts[-1]]
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[parts[1]]
    to, read = operands[0], _reader(operands[1], kind)

    def execute(threads: _Threads, mask: Mask) -> None:
        _whole_warps(threads, mask, "reduction")
        of_warps = threads.spread(read(threads)).reshape(-1, WARP)
        threads.write(to, np.repeat(function.reduce(of_warps, axis=1, dtype=kind), WARP), mask)

    return execute


def _compare_pairs(opcode: str, operands: list[str]) -> Instruction:
    """Return a comparison of two pairs, which has a result for the low halves and one for the high halves."""
    compare = meaning(opcode.removesuffix("x2")).function
    results, readers = operands[0].split("|"), [_reader(operand, U32) for operand in operands[1:]]

    def execute(threads: _Threads, mask: Mask) -> None:
        pairs = [read(threads) for read in readers]
        for register, shift in zip(results, (0, 16), strict=True):
            threads.write(register, compare(*[(pair >> U32.type(shift)).astype(U16) for pair in pairs]), mask)

    return execute


def _pack(kind: Any, operands: list[str]) -> Instruction:
    """Return a move between one register and the parts of another."""
    to, of = map(_vector, operands)
    part = UNSIGNED[kind.itemsize // max(len(to), len(of))]
    readers = [_reader(name, kind if len(of) == 1 else part) for name in of]

    def execute(threads: _Threads, mask: Mask) -> None:
        values = [threads.spread(read(threads)) for read in readers]
        whole = np.stack(values, 1).view(part)
        if len(to) == 1:
            threads.write(to[0], np.ascontiguousarray(whole).view(kind)[:, 0], mask)
        else:
            for name, column in zip(to, whole.T, strict=True):
                threads.write(name, column, mask)

    return execute
