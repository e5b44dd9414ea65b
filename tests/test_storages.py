"""What the storages promise, on the plain torch that defines them: noise, bfloat16, blocks of 8 bits, split weights.

- Noise is uniform, and neither neighbours nor slots nor steps are correlated; it depends on the place in the whole
  tensor alone.
- Stochastic rounding is unbiased, and moves no value that the storage can represent.
- An average with beta 0.999 stalls in bfloat16 under rounding to nearest, and follows under stochastic rounding.
- A block of 8 bits: a value that is not finite damages its entry alone; a positive second moment never becomes 0, and
  no step exceeds 4 times that of float32; the sign bit is kept, that of a zero and of a NaN too.
- A split weight of 32 bits is exact, one of 24 bits has 24; a parameter that was written keeps what was written.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from epi_kernels.storage import block8, half, split
from epi_kernels.storage.noise import OF_SLOT, Noise, Place, key_of, whole

BF16, FP16 = torch.bfloat16, torch.float16
COUNT = 1 << 18


def noise(slot: int = 0, *, name: str = "w", step: float = 1.0, count: int = COUNT, seed: int = 0) -> Tensor:
    return Noise(whole(key_of(seed, name), torch.Size([count])), step, torch.arange(count)).of(slot)


def correlation(one: Tensor, other: Tensor) -> float:
    """Return the correlation of two noises in units of its standard error."""
    one, other = ((of.double() + 0.5) / 65536 - 0.5 for of in (one, other))
    return (one * other).mean().item() * 12 * math.sqrt(one.numel())


# Noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", range(6))
def test_every_value_of_the_noise_is_as_frequent(slot: int) -> None:
    values = noise(slot)
    for shift in (0, 4, 8, 12):  # each of the 4 digits, in 16 classes of 16384 values on average
        counts = torch.bincount(values >> shift & 15, minlength=16).double()
        chi_squared = ((counts - COUNT / 16) ** 2 / (COUNT / 16)).sum().item()
        assert 2.0 < chi_squared < 45.0  # 15 degrees of freedom: 1 in 10^4 on each side
    assert abs(values.double().mean().item() + 0.5 - 32768) < 5 * 65536 / math.sqrt(12 * COUNT)


@pytest.mark.parametrize("distance", [1, 2, 3, 8, 64, 4096])
def test_neighbours_have_no_correlation(distance: int) -> None:
    for slot in range(6):
        assert abs(correlation(noise(slot)[distance:], noise(slot)[:-distance])) < 5


def test_slots_steps_names_and_seeds_have_no_correlation() -> None:
    kinds = [noise(slot) for slot in range(6)]
    kinds += [noise(step=2.0), noise(step=3.0), noise(step=1e6), noise(name="v"), noise(name="layers.1"), noise(seed=1)]
    for one, other in itertools.combinations(kinds, 2):
        assert abs(correlation(one, other)) < 5


def test_a_correlation_would_be_seen() -> None:
    values = noise()
    assert abs(correlation(values, torch.where(torch.arange(COUNT) % 32 == 0, values, noise(1)))) > 5


def test_noise_depends_on_the_place_in_the_whole_tensor_alone() -> None:
    key = key_of(0, "w")
    of_whole = Noise(whole(key, torch.Size([6, 8])), 4.0, torch.arange(48)).of(3).view(6, 8)
    rows = Noise(Place(key, 16, 24, 0, 8), 4.0, torch.arange(24)).of(3).view(3, 8)
    columns = Noise(Place(key, 4, 2, 6, 2), 4.0, torch.arange(12)).of(3).view(6, 2)
    assert torch.equal(rows, of_whole[2:5])
    assert torch.equal(columns, of_whole[:, 4:6])


def test_offsets_beyond_2_to_the_32_have_noise_of_their_own() -> None:
    key = key_of(0, "w")
    for first in (1 << 32, 5 << 32, (1 << 32) - COUNT // 2):
        values = Noise(Place(key, first, COUNT, 0, 1), 1.0, torch.arange(COUNT)).of(0)
        assert abs(correlation(values, noise())) < 5
        assert abs(correlation(values[1:], values[:-1])) < 5


# bfloat16 and float16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("scale", [1.0, 3e-5, 1e-6])  # 2^-14 and 2^-24 are where float16 changes
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, scale: float) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).mul(scale).repeat_interleave(4096)
    rounded = half.stochastic(values, dtype, noise(3)).double()
    error = (rounded - values.double()).view(64, 4096)
    # at least that of a value which 1 of 4096 samples rounds the other way
    unit = (
        torch.finfo(dtype).eps * values.abs().double().clamp(min=2.0**-15 if dtype == FP16 else 0).view(64, 4096)[:, 0]
    )
    spread = torch.maximum(error.std(1), unit / 64)
    assert (error.mean(1) / spread * 64).abs().max() < 4.5
    below, above = values.to(dtype).double(), rounded
    assert ((above - below).abs() <= 2 * torch.finfo(dtype).eps * values.abs().double().clamp(min=2.0**-15)).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_value_of_16_bits_is_never_moved(dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    for bits in (0, 1, 32767, 65535):
        rounded = half.stochastic(values.float(), dtype, torch.full((1 << 16,), bits))
        assert torch.equal(rounded.isnan(), values.isnan())
        assert torch.equal(rounded[~values.isnan()].view(torch.int16), values[~values.isnan()].view(torch.int16))


@pytest.mark.parametrize("beta", [0.99, 0.999])
def test_an_average_stalls_under_rounding_to_nearest_and_follows_under_stochastic_rounding(beta: float) -> None:
    target, steps = 1.0, round(3 / (1 - beta))
    nearest = torch.full((4096,), 0.5, dtype=BF16)
    stochastic, exact = nearest.clone(), nearest.float()
    for step in range(steps):
        exact = exact * beta + (1 - beta) * target
        nearest = (nearest.float() * beta + (1 - beta) * target).to(BF16)
        moved = stochastic.float() * beta + (1 - beta) * target
        stochastic = half.stochastic(moved, BF16, noise(1, step=float(step), count=4096))
    assert exact[0] > 0.97
    assert nearest.float().max() < (0.9 if beta == 0.99 else 0.51)
    assert abs(stochastic.float().mean().item() - exact[0].item()) < 0.01


# Blocks of 8 bits ----------------------------------------------------------------------------------------------------


def coded(values: Tensor, slot: int = 0, step: float = 1.0, *, positive: bool = False) -> tuple[Tensor, Tensor]:
    bits = noise(slot, step=step, count=values.numel()).view(values.shape)
    return block8.encoded(values, bits, positive=positive)


def test_codes_and_scales_of_a_block_computed_by_hand() -> None:
    values = torch.zeros(1, 64)
    values[0, :4] = torch.tensor([15876.0, 4.0, -9.0, 1.0])
    codes, scales = coded(values)
    assert scales.tolist() == [[1.0]]  # 126^2 / 126^2
    assert codes[0, :5].tolist() == [126, 2, 128 + 3, 1, 0]
    assert torch.equal(block8.decoded(codes, scales), values)


@pytest.mark.parametrize("row", [64, 65, 100, 127, 128, 4000])
def test_blocks_begin_at_each_row(row: int) -> None:
    values = torch.rand(3, row, generator=torch.Generator().manual_seed(row)) + 0.5
    whole_codes, whole_scales = coded(values)
    assert whole_scales.shape == (3, -(-row // 64))
    for i in range(3):
        for block, start in enumerate(range(0, row, 64)):
            largest = values[i, start : start + 64].max()
            assert whole_scales[i, block] == largest / 15876
    bits = noise(0, count=values.numel()).view(values.shape)
    codes, scales = block8.encoded(values[1:].contiguous(), bits[1:], positive=False)
    assert torch.equal(codes, whole_codes[1:])
    assert torch.equal(scales, whole_scales[1:])


def test_codes_are_unbiased_in_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 64, generator=generator) * torch.logspace(-3, 0, 64)
    decoded = torch.stack([block8.decoded(*coded(values, step=float(step))) for step in range(4000)]).double()
    error = decoded.mean(0) - values.double()
    spread = decoded.std(0) / math.sqrt(4000) + 1e-9
    assert (error / spread).abs().max() < 4.5


def test_an_error_of_2_to_the_minus_23_in_the_root_changes_no_code() -> None:
    """An approximate root, rounded down, is the wrong whole number only next to a square; both give the same code."""
    squares = torch.arange(1, block8.LARGEST + 1, dtype=torch.float64)[:, None] ** 2
    # all float32 numbers whose root an error of 2^-23 can take across the whole number
    steps = torch.arange(-8, 9, dtype=torch.int32)
    units = (squares.float().view(torch.int32) + steps).view(torch.float32).double()
    near = (units / squares - 1).abs() <= 2.0**-22 * (1 + 2.0**-20)
    assert (near.sum(1) >= 3).all()
    assert not (near[:, 0] | near[:, -1]).any()
    noise = torch.tensor([0.5, 1.5, 2.0**14 + 0.5, 2.0**15 - 0.5], dtype=torch.float64)[:, None, None] * 2.0**-15

    def code(below: Tensor) -> Tensor:
        return below + (units - below**2 > noise * (2 * below + 1))

    roots = squares.sqrt()
    assert torch.equal(torch.where(near, code(roots - 1), 0), torch.where(near, code(roots), 0))
    assert not torch.equal(code(roots - 1), code(roots))


def test_what_codes_represent_is_never_moved() -> None:
    values = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    for step in range(20):
        codes, scales = coded(values, step=float(step))
        decoded = block8.decoded(codes, scales)
        for slot in range(5):
            again, _ = coded(decoded, slot, step + 100.0)
            assert torch.equal(again, codes)


def test_a_value_that_is_not_finite_damages_its_entry_alone() -> None:
    values = torch.linspace(0.1, 1, 64).view(1, 64)
    codes, scales = coded(values)
    for bad in (math.nan, math.inf, -math.inf):
        damaged = values.clone()
        damaged[0, 5] = bad
        found, of_found = coded(damaged)
        read = block8.decoded(found, of_found)
        assert read[0, 5].isnan()
        assert torch.equal(found[0, 6:], codes[0, 6:])
        assert torch.equal(of_found, scales)
    everything = torch.full((1, 64), math.inf)
    assert block8.decoded(*coded(everything)).isnan().all()


def test_sign_bits_are_kept_those_of_zeros_and_of_nan_too() -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, -1.0, math.nan, -math.nan] + [1e-9, -1e-9] * 29])
    values = torch.copysign(values, torch.tensor([[1.0, -1.0] * 32]))
    assert torch.equal(torch.signbit(block8.decoded(*coded(values))), torch.signbit(values))


def test_a_positive_second_moment_never_becomes_0_and_steps_stay_within_4_times_those_of_float32() -> None:
    gradient = torch.logspace(0, -5, 64).view(1, 64)
    exact_m, exact_v = torch.zeros(1, 64), torch.zeros(1, 64)
    m, v = coded(exact_m), coded(exact_v, positive=True)
    largest = 0.0
    for step in range(1, 300):
        read_m, read_v = block8.decoded(*m), block8.decoded(*v)
        exact_m, exact_v = exact_m * 0.9 + 0.1 * gradient, exact_v * 0.999 + 0.001 * gradient**2
        new_m, new_v = read_m * 0.9 + 0.1 * gradient, read_v * 0.999 + 0.001 * gradient**2
        m, v = coded(new_m, 0, float(step)), coded(new_v, 1, float(step), positive=True)
        assert (v[0] > 0).all()
        correction = math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        steps = correction * new_m / (new_v.sqrt() + 1e-8 * math.sqrt(1 - 0.999**step))
        exact = correction * exact_m / (exact_v.sqrt() + 1e-8 * math.sqrt(1 - 0.999**step))
        largest = max(largest, (steps / exact).max().item())
    assert 1.0 < largest < 4.0


def test_without_the_smallest_code_a_second_moment_becomes_0() -> None:
    values = torch.logspace(0, -10, 64).view(1, 64)
    assert (coded(values, positive=False)[0] == 0).any()


def test_scales_below_twice_the_smallest_normal_number_are_0() -> None:
    codes, scales = coded(torch.full((1, 64), 1e-36))
    assert scales.tolist() == [[0.0]]
    assert not codes.any()
    assert (coded(torch.full((1, 64), 1e-36), positive=True)[0] == 1).all()
    assert coded(torch.full((1, 64), 1e-30))[1].item() > 0


# Split weights -------------------------------------------------------------------------------------------------------


def every_kind_of_float() -> Tensor:
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0x0, 0x1, 0x7FFF, 0x8000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000])
    return torch.cat([random, edges, edges - (1 << 31)]).to(torch.int32).view(torch.float32)


def nothing(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, dtype=BF16), torch.zeros(count, dtype=dtype)


def test_32_bits_are_exact_and_the_parameter_is_the_weight_rounded_to_nearest_ties_away() -> None:
    weights = every_kind_of_float()
    param, rest = split.split(weights, *nothing(len(weights), torch.int16), None)
    back, number = split.joined(param, rest), ~weights.isnan()
    assert torch.equal(back[number].view(torch.int32), weights[number].view(torch.int32))
    assert back[~number].isnan().all()
    bits = weights[number].view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    wanted = (bits + 0x8000 >> 16).to(torch.int16)
    assert torch.equal(param[number].view(torch.int16), wanted)


def test_24_bits_are_within_half_of_the_last_and_representable_weights_never_move() -> None:
    weights = every_kind_of_float()
    for bits in (None, torch.zeros(len(weights)).long(), torch.full((len(weights),), 65535)):
        param, rest = split.split(weights, *nothing(len(weights), torch.int8), bits)
        back = split.joined(param, rest)
        normal = weights.isfinite() & (weights.abs() > 1e-30) & back.isfinite()
        share = 0.5 if bits is None else 1.0
        assert ((back - weights).abs()[normal] <= share * 2.0**-15 * weights.abs()[normal]).all()
        again = split.split(back, param, rest, bits)
        assert torch.equal(again[0].view(torch.int16), param.view(torch.int16))
        assert torch.equal(again[1], rest)


def test_24_bits_are_unbiased_under_stochastic_rounding() -> None:
    weights = torch.randn(64, generator=torch.Generator().manual_seed(1)).repeat_interleave(4096)
    param, rest = split.split(weights, *nothing(len(weights), torch.int8), noise(3))
    error = (split.joined(param, rest).double() - weights.double()).view(64, 4096)
    assert (error.mean(1) / (error.std(1) + 1e-30) * 64).abs().max() < 4.5


@pytest.mark.parametrize("dtype", split.RESTS.values())
def test_what_is_written_into_a_parameter_takes_hold(dtype: torch.dtype) -> None:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    _, rest = split.split(weights, *nothing(1000, dtype), None)
    written = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(BF16)
    written[:4] = torch.tensor([0.0, -0.0, math.inf, -math.inf], dtype=BF16)
    back = split.joined(written, rest)
    exact = written.float()
    assert ((back - exact).abs()[4:] <= 2.0**-8 * exact.abs()[4:]).all()  # half a unit of bfloat16
    assert (back[:2].abs() < 1e-38).all()
    assert not back[:4].isnan().any()
    zeros = split.joined(torch.zeros(1000, dtype=BF16), torch.full((1000,), -5, dtype=dtype))
    assert torch.equal(zeros, torch.zeros(1000))


def test_a_nan_keeps_parameter_and_rest() -> None:
    param = torch.tensor([0x7FC0, 0x7F81, -1], dtype=torch.int16).view(BF16)
    rest = torch.tensor([3, -4, 5], dtype=torch.int16)
    found = split.split(split.joined(param, rest), param, rest, None)
    assert torch.equal(found[0].view(torch.int16), param.view(torch.int16))
    assert torch.equal(found[1], rest)
    fresh = split.split(torch.tensor([math.nan]), torch.ones(1, dtype=BF16), torch.ones(1, dtype=torch.int16), None)
    assert split.joined(*fresh).isnan().all()


def test_the_slots_of_a_rule_have_noise_of_their_own() -> None:
    assert len({*OF_SLOT, 2, 3}) == len(OF_SLOT) + 2
