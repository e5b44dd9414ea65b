"""Values at positions of tensors: `take_all` and `put_all_` are torch's indexing, bit for bit, on every path.

- Every dtype, NaN payloads and signed zeros included, and every layout that a parameter can have.
- The first and the last entry, no position, every position, more positions than a chunk, several threads.
- Memory is reached only where all positions are in it, and torch knows that a tensor was written.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from epi_kernels.backends import native
from epi_kernels.ops.positions import put_all_, take_all

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
)


@pytest.fixture(params=(1, 2, 3), ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=("native", "torch"))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the library move what it can, or nothing; skip where there is no library."""
    if request.param == "torch":
        monkeypatch.setattr(native, "obstacle", lambda: "it is not to be used")
    elif native.obstacle():
        pytest.skip(native.obstacle())
    return str(request.param)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of random bits, which for floating-point dtypes has NaNs of many payloads; bools are 0 and 1."""
    size = dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype)


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in row-major order."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def some(numel: int, count: int) -> Tensor:
    """Return `count` positions in increasing order, the first and the last entry among them."""
    between = torch.randperm(numel - 2)[: count - 2] + 1
    return torch.cat([torch.tensor([0]), between.sort().values, torch.tensor([numel - 1])])


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "contiguous": random_bits((40, 30), dtype),
        "a parameter": Parameter(random_bits((40, 30), dtype), requires_grad=False),
        "transposed": random_bits((40, 30), dtype).t(),
        "every other column": random_bits((40, 30), dtype)[:, ::2],
        "channels last": random_bits((2, 3, 5, 7), dtype).to(memory_format=torch.channels_last),
        "within other memory": random_bits((40, 30), dtype)[7:19],
        "one entry": random_bits((1,), dtype).view(()),
    }


def check(tensors: list[Tensor], where: list[Tensor]) -> None:
    """Compare with torch's indexing, entry by entry: the values taken, and what is written at and beside positions."""
    expected = [bits(t).view(-1, t.element_size())[q].flatten() for t, q in zip(tensors, where, strict=True)]
    taken = take_all(tensors, where)
    for tensor, values, wanted in zip(tensors, taken, expected, strict=True):
        assert values.dtype == tensor.dtype
        assert values.dim() == 1
        assert torch.equal(bits(values), wanted)
    new = [random_bits((max(len(q), 1),), t.dtype)[: len(q)] for t, q in zip(tensors, where, strict=True)]
    rows = [bits(tensor).view(-1, tensor.element_size()) for tensor in tensors]
    for of, q, values in zip(rows, where, new, strict=True):
        of[q] = bits(values).view(-1, of.shape[1])
    put_all_(tensors, where, new)
    for tensor, of in zip(tensors, rows, strict=True):
        assert torch.equal(bits(tensor), of.flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_keeps_its_bits(dtype: torch.dtype, path: str) -> None:
    tensors = list(layouts(dtype).values())
    check(tensors, [some(t.numel(), t.numel() // 3) if t.numel() > 2 else torch.tensor([0]) for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_positions_on_any_number_of_threads(dtype: torch.dtype, path: str, threads: int) -> None:
    tensors = [random_bits((size,), dtype) for size in (300_007, 5, 200, 70_001, 40)]
    where = [some(300_007, 150_003), torch.arange(5), torch.empty(0, dtype=torch.int64), some(70_001, 3), some(40, 39)]
    check(tensors, where)


def test_no_tensors(path: str) -> None:
    assert take_all([], []) == []
    put_all_([], [], [])


def test_it_is_allowed_where_torch_must_be_deterministic(path: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        check([random_bits((40, 30), torch.float32), random_bits((40, 30), torch.float32).t()], [some(1200, 70)] * 2)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle() or "it is built")
def test_the_library_moves_contiguous_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[int]] = []
    monkeypatch.setattr(native, "call", lambda function, table: called.append(table["entry_bytes"].tolist()))
    for dtype in DTYPES:
        tensors = layouts(dtype)
        take_all(list(tensors.values()), [torch.tensor([0])] * len(tensors))
        fast = sum(tensor.is_contiguous() for tensor in tensors.values()) if dtype.itemsize <= 8 else 0
        assert (called.pop() if fast else []) == [dtype.itemsize] * fast
    assert not called


@pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle() or "it is built")
def test_a_library_that_moves_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "call", lambda *_: None)
    with pytest.raises(AssertionError):
        check([torch.zeros(100)], [some(100, 7)])


def test_conjugates_and_negatives_have_their_values(path: str) -> None:
    real = torch.arange(12.0).view(torch.complex64)
    where = torch.tensor([1, 5])
    assert torch.equal(take_all([real.conj()], [where])[0], real.conj()[where])
    assert torch.equal(take_all([real.conj().imag], [where])[0], -real.imag[where])


@pytest.mark.parametrize("last", [12, 1 << 40])
def test_a_position_beyond_the_tensor_raises(last: int, path: str) -> None:
    tensor, where = torch.zeros(12), torch.tensor([3, last])
    with pytest.raises(IndexError):
        take_all([tensor], [where])
    with pytest.raises(IndexError):
        put_all_([tensor], [where], [torch.ones(2)])


def test_values_of_another_dtype_raise_and_write_nothing(path: str) -> None:
    tensor = torch.zeros(12)
    with pytest.raises(RuntimeError, match="dtype"):
        put_all_([tensor], [torch.tensor([3])], [torch.ones(1, dtype=torch.float64)])
    assert not tensor.any()


def test_torch_knows_what_was_written(path: str) -> None:
    tensor = torch.ones(12, requires_grad=True)
    loss = tensor.square().sum()
    with torch.no_grad():
        put_all_([tensor], [torch.tensor([3])], [torch.zeros(1)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
