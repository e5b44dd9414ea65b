"""The lock is the sign bit: it survives zero, NaN, infinity and every dtype, and the magnitude never changes."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from epi_kernels import lock

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_over_special_values(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor([0.0, tiny, tiny / 4, 1.0, torch.finfo(dtype).max, torch.inf, torch.nan], dtype=dtype)
    for locked in (torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool), values > 0.5):
        signed = lock.with_lock(values, locked)
        assert torch.equal(lock.is_locked(signed), locked)
        torch.testing.assert_close(lock.magnitude(signed), values, rtol=0, atol=0, equal_nan=True)
        assert signed.dtype == dtype


def test_locked_zero_is_negative_zero() -> None:
    signed = lock.with_lock(torch.zeros(1), torch.tensor([True]))
    assert signed.view(torch.int32).item() == -(2**31)
    assert not (signed < 0)  # reading the value instead of the bit would lose it


@hypothesis.given(st.lists(st.tuples(st.floats(0, width=32), st.booleans(), st.booleans()), min_size=1))
def test_locking_forgets_the_lock_before(entries: list[tuple[float, bool, bool]]) -> None:
    values, before, after = (torch.tensor(column) for column in zip(*entries, strict=True))
    signed = lock.with_lock(lock.with_lock(values, before), after)
    assert torch.equal(lock.is_locked(signed), after)
    assert torch.equal(lock.magnitude(signed), values)


def test_static_lock_is_one_byte() -> None:
    locked = torch.tensor([[True, False], [False, True]])
    signed = lock.static_lock(locked)
    assert signed.dtype == torch.int8
    assert torch.equal(lock.is_locked(signed), locked)
