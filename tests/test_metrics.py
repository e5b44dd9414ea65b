"""Claims about `epi_kernels.metrics`.

Every value equals a case computed by hand. Jaccard and flip rate are symmetric, lie in [0, 1] and are 1 and 0 for equal
masks, empty ones included; the Hamming distance counts differing entries; a mapping counts as one long mask. Wrong
names, shapes, dtypes and lengths are errors that name what is wrong. On sharded masks and gradients every rank gets the
measure of the whole.

Gradient conflict is that of float64, symmetric, in [0, 1], and blind to the length of a gradient and to how it is cut
into tensors. Placement counts every entry once. Correlations equal numpy's and cases by hand. Of a loss of degree 5 the
importance's validity has the exact expected change under Gaussian noise; parameters and buffers keep their bits, also
where the loss raises; the same seed gives the same points.
"""

import math

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from epi_kernels.metrics import (
    average_performance,
    backward_transfer,
    conflict_matrix,
    flip_rate,
    flip_rates,
    forgetting_ratio,
    gradient_conflict,
    importance_validity,
    mask_hamming,
    mask_jaccard,
    overall_performance,
    overlap_matrix,
    pearson,
    placement,
    spearman,
)

MEASURES = (mask_jaccard, mask_hamming, flip_rate)
NUMBERS = st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=30)
PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40)


def bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)


@pytest.mark.parametrize(
    ("initial", "after", "expected"),
    [(0.8, 0.6, 25.0), (50, 50, 0.0), (0.5, 0.0, 100.0), (0.5, 0.75, -50.0), ([0.5, 0.4], [0.25, 0.5], [50.0, -25.0])],
)
def test_forgetting_ratio_by_hand(initial, after, expected) -> None:
    assert forgetting_ratio(initial, after) == pytest.approx(expected)


@pytest.mark.parametrize("initial", [0.0, -1.0, float("nan")])
def test_nothing_to_forget_is_an_error(initial: float) -> None:
    with pytest.raises(ValueError, match="needs one above 0"):
        forgetting_ratio(initial, 0.5)
    with pytest.raises(ValueError, match="needs one above 0"):
        forgetting_ratio([0.5, initial], [0.5, 0.5])


@pytest.mark.parametrize(("initial", "after"), [([0.5], [0.5, 0.4]), (0.5, [0.5]), ([0.5], 0.5)])
def test_forgetting_ratio_needs_equal_lengths(initial, after) -> None:
    with pytest.raises(ValueError, match="as many numbers"):
        forgetting_ratio(initial, after)


@pytest.mark.parametrize(
    ("a", "b", "jaccard", "hamming", "flips"),
    [
        ("1100", "1100", 1.0, 0, 0.0),
        ("1100", "0011", 0.0, 4, 1.0),
        ("1110", "0111", 1 / 2, 2, 1 / 3),
        ("1000", "1111", 1 / 4, 3, 3 / 5),
        ("0000", "0100", 0.0, 1, 1.0),
        ("0000", "0000", 1.0, 0, 0.0),
        ("", "", 1.0, 0, 0.0),
    ],
)
def test_masks_by_hand(a: str, b: str, jaccard: float, hamming: int, flips: float) -> None:
    measured = [measure(bits(a), bits(b)) for measure in MEASURES]
    assert measured == pytest.approx([jaccard, hamming, flips])


@given(PAIRS, st.integers(0, 40))
def test_properties_of_masks(pairs: list[tuple[bool, bool]], cut: int) -> None:
    a, b = (torch.tensor([pair[side] for pair in pairs], dtype=torch.bool) for side in (0, 1))
    assert 0 <= mask_jaccard(a, b) <= 1
    assert 0 <= flip_rate(a, b) <= 1
    assert mask_hamming(a, b) == sum(left != right for left, right in pairs)
    assert (mask_jaccard(a, b) == 1) == (flip_rate(a, b) == 0) == (mask_hamming(a, b) == 0) == torch.equal(a, b)
    for measure in MEASURES:
        assert measure(a, b) == measure(b, a)
        # reordering the names must not pair the wrong tensors
        whole = measure({"x": a[:cut], "y": a[cut:]}, {"y": b[cut:], "x": b[:cut]})
        assert whole == measure(a, b)


@pytest.mark.parametrize("measure", MEASURES)
def test_masks_that_do_not_match_are_errors(measure) -> None:
    with pytest.raises(ValueError, match=r"\['bias'\]"):
        measure({"weight": bits("1"), "bias": bits("1")}, {"weight": bits("1")})
    with pytest.raises(ValueError, match=r"'weight' has shape \(2,\) in one and \(1,\)"):
        measure({"weight": bits("11")}, {"weight": bits("1")})
    with pytest.raises(ValueError, match=r"'weight' is torch.uint8"):
        measure({"weight": bits("1")}, {"weight": torch.ones(1, dtype=torch.uint8)})


def test_measures_of_a_sequence_of_tasks_by_hand() -> None:
    results = [[80.0, 10.0, 0.0], [60.0, 90.0, 5.0], [50.0, 95.0, 70.0]]
    assert overall_performance(results) == pytest.approx((50 + 95 + 70) / 3)
    assert backward_transfer(results) == pytest.approx((-30 + 5) / 3)
    assert average_performance(results) == pytest.approx((80 + 90 + 70) / 3)
    # of one task nothing can be forgotten
    assert (overall_performance([[4.0]]), backward_transfer([[4.0]]), average_performance([[4.0]])) == (4.0, 0.0, 4.0)


@pytest.mark.parametrize("measure", [overall_performance, backward_transfer, average_performance])
@pytest.mark.parametrize("results", [[], [[1.0, 2.0]], [[1.0, 2.0], [1.0]]])
def test_results_that_are_no_square_are_errors(measure, results) -> None:
    with pytest.raises(ValueError, match="pass a square"):
        measure(results)


def test_flip_rates_by_hand() -> None:
    before = {"layers.0.a": bits("11"), "layers.1.a": bits("10"), "layers.0.b": bits("0"), "head.weight": bits("0")}
    after = {"layers.0.a": bits("10"), "layers.1.a": bits("01"), "layers.0.b": bits("1"), "head.weight": bits("0")}
    assert flip_rates(before, after) == {"layers.0": 2 / 4, "layers.1": 1.0, "head": 0.0}
    assert flip_rates(before, after, "tensor")["layers.0.a"] == pytest.approx(1 / 3)
    halves = flip_rates(before, after, lambda name: "upper" if "1" in name else "lower")
    assert halves == {"lower": 2 / 4, "upper": 1.0}
    with pytest.raises(ValueError, match=r"\['head.weight'\]"):
        flip_rates({name: mask for name, mask in before.items() if "layers" in name}, after)
    with pytest.raises(ValueError, match="Invalid layers: 'blocks'"):
        flip_rates(before, after, "blocks")


def test_overlap_matrix_by_hand() -> None:
    masks = {"prose": {"w": bits("1110")}, "code": {"w": bits("0111")}, "math": {"w": bits("0001")}}
    found = overlap_matrix(masks)
    assert [list(found), *(list(row) for row in found.values())] == [list(masks)] * 4
    assert [list(row.values()) for row in found.values()] == [[1.0, 0.5, 0.0], [0.5, 1.0, 1 / 3], [0.0, 1 / 3, 1.0]]
    assert overlap_matrix({}) == {}
    with pytest.raises(ValueError, match=r"prose and code: only one of the masks has \['b', 'w'\]"):
        overlap_matrix({"prose": {"w": bits("1")}, "code": {"b": bits("1")}})


def test_placement_by_hand() -> None:
    mask = {
        "module.model.layers.2.self_attn.q_proj.weight": torch.eye(2, dtype=torch.bool),
        "model.layers.10.mlp.0.bias": bits("110"),
        "model.norm.weight": bits("0"),
        "scales.1": bits("1"),
        "empty": bits(""),
    }
    assert [tuple(place) for place in placement(mask)] == [
        ("model.layers.2", "self_attn.q_proj.weight", 4, 2, 0.5, 0.4),
        ("model.layers.10", "mlp.0.bias", 3, 2, pytest.approx(2 / 3), 0.4),
        ("model.norm", "model.norm.weight", 1, 0, 0.0, 0.0),
        ("scales.1", "scales.1", 1, 1, 1.0, 0.2),
        ("", "empty", 0, 0, 0.0, 0.0),
    ]
    assert placement({"w": bits("00")})[0].share_of_mask == 0.0
    with pytest.raises(ValueError, match=r"'w' is torch.float32"):
        placement({"w": torch.ones(1)})


@given(PAIRS, st.integers(0, 40))
def test_placement_counts_every_entry_once(pairs: list[tuple[bool, bool]], cut: int) -> None:
    mask = torch.tensor([pair[0] for pair in pairs], dtype=torch.bool)
    rows = placement({"layers.0.a": mask[:cut], "layers.1.a": mask[cut:]})
    assert sum(row.entries for row in rows) == len(pairs)
    assert sum(row.selected for row in rows) == int(mask.sum())
    assert sum(row.share_of_mask for row in rows) == pytest.approx(float(mask.any()))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 0], [-3, 4], 3 / 5),
        ([1, 2], [2, 4], 0.0),
        ([1, 2], [-2, -4], 1.0),
        ([1, 0], [0, -1], 0.0),
        ([3, 4, 0], [-4, -3, 12], 24 / 65),
    ],
)
def test_gradient_conflict_by_hand(a: list[int], b: list[int], expected: float) -> None:
    a, b = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.bfloat16)
    assert gradient_conflict(a, b) == pytest.approx(expected, abs=1e-15)
    assert gradient_conflict({"x": a[:1], "y": a[1:]}, {"y": b[1:], "x": b[:1]}) == gradient_conflict(a, b)


@given(NUMBERS, st.integers(-30, 30))
def test_properties_of_gradient_conflict(numbers: list[float], exponent: int) -> None:
    a, b = torch.tensor([*numbers, 1.0]), torch.tensor([*reversed(numbers), -2.0])
    found = gradient_conflict(a, b)
    cosine = nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    assert 0 <= found <= 1
    assert found == pytest.approx(max(0.0, -float(cosine)), abs=1e-12)
    assert found == gradient_conflict(b, a)
    assert gradient_conflict(a * 2.0**exponent, b) == pytest.approx(found, rel=1e-12)
    # of two gradients at most one sign conflicts
    assert found * gradient_conflict(a, -b) == 0
    assert gradient_conflict(a, -a) == pytest.approx(1.0, rel=1e-12)


def test_gradient_conflict_adds_in_float64() -> None:
    # the sum of the products is -1; in float32 the large ones would swallow it
    a, b = torch.tensor([1e8, 1.0, 1e8]), torch.tensor([1.0, -1.0, -1.0])
    assert gradient_conflict(a, b) == pytest.approx(1 / math.sqrt((2e16 + 1) * 3), rel=1e-12)


def test_a_parameter_that_took_no_part_counts_as_zeros() -> None:
    a = {"shared": torch.tensor([1.0]), "adapter": torch.tensor([1.0, 1.0])}
    without = {"shared": torch.tensor([-1.0]), "adapter": None}
    zeros = {"shared": torch.tensor([-1.0]), "adapter": torch.zeros(2)}
    assert gradient_conflict(a, without) == gradient_conflict(a, zeros) == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"w": torch.ones(1)}, {"w": torch.ones(1), "b": torch.ones(1)}, r"only one of the gradients has \['b'\]"),
        ({"w": torch.ones(2)}, {"w": torch.ones(1)}, r"'w' has shape \(2,\) in one and \(1,\)"),
        ({"w": torch.ones(2)}, {"w": torch.ones(2).int()}, r"'w' is torch.int32; pass a dense floating dtype"),
        ({"w": torch.ones(2).to_sparse()}, {"w": torch.ones(2)}, r"'w' is sparse; .*to_dense\(\)"),
        (
            {"w": torch.ones(2)},
            {"w": torch.tensor([1.0, math.nan])},
            "squares of the second gradient 'w' add up to nan",
        ),
        ({"w": torch.tensor([math.inf])}, {"w": torch.ones(1)}, "squares of the first gradient 'w' add up to inf"),
        ({"w": torch.zeros(2)}, {"w": torch.ones(2)}, "the first gradient is 0 in all"),
        ({"w": torch.ones(2)}, {"w": None}, "the second gradient is 0 in all"),
    ],
)
def test_gradients_without_a_conflict_are_errors(a, b, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_conflict(a, b)


def test_conflict_matrix_by_hand() -> None:
    gradients = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-3.0, 4.0]), "c": torch.tensor([0.0, -2.0])}
    found = conflict_matrix(gradients)
    expected = [[0.0, 0.6, 0.0], [0.6, 0.0, 0.8], [0.0, 0.8, 0.0]]
    assert [list(row.values()) for row in found.values()] == [pytest.approx(row) for row in expected]
    with pytest.raises(ValueError, match="a and b: the second gradient is 0"):
        conflict_matrix({"a": torch.ones(1), "b": torch.zeros(1)})


@ranks.on_ranks(2)
def test_sharded_masks_and_gradients_are_measured_whole(rank: int, size: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))

    def placed(tensor: Tensor) -> list[dict[str, Tensor]]:
        return [{"layers.0.w": distribute_tensor(tensor, mesh, [how])} for how in (Shard(0), Replicate())]

    for a, b in zip(placed(bits("1110")), placed(bits("1001")), strict=True):
        assert (mask_jaccard(a, b), mask_hamming(a, b), flip_rate(a, b)) == (1 / 4, 3, 3 / 5)
        assert placement(a)[0][2:] == (4, 3, 0.75, 1.0)
    for a, b in zip(placed(torch.tensor([3.0, 4.0, 0.0])), placed(torch.tensor([-4.0, -3.0, 12.0])), strict=True):
        assert gradient_conflict(a, b) == pytest.approx(24 / 65)
        with pytest.raises(ValueError, match="DTensor in only one"):
            gradient_conflict(a, {"layers.0.w": torch.ones(3)})
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(NotImplementedError, match="weight is a DTensor"):
        importance_validity(model, [0], loss_of_degree_5, {"weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("x", "y", "linear", "ranks"),
    [
        ([1, 2, 3], [1, 2, 6], 5 / math.sqrt(28), 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0, -1.0),
        ([1, 2, 2, 4], [1, 2, 3, 4], 4.5 / math.sqrt(4.75 * 5), 4.5 / math.sqrt(4.5 * 5)),  # ranks 1, 2.5, 2.5, 4
        ([0, 1, 0, 1], [0, 0, 1, 1], 0.0, 0.0),
        ([1e-200, 3e-200], [-1e200, 1e200], 1.0, 1.0),
    ],
)
def test_correlations_by_hand(x, y, linear: float, ranks: float) -> None:
    assert pearson(x, y) == pytest.approx(linear, abs=1e-15)
    assert spearman(x, y) == pytest.approx(ranks, abs=1e-15)


@given(NUMBERS, st.integers(1, 9), st.integers(-9, 9))
def test_properties_of_correlations(x: list[float], scale: int, offset: int) -> None:
    x, y = [*x, 20.0], [value**2 + index for index, value in enumerate([*x, 0.0])]
    if len(set(y)) < 2:
        return
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert pearson(y, x) == pytest.approx(pearson(x, y), abs=1e-12)
    assert pearson([scale * value + offset for value in x], y) == pytest.approx(pearson(x, y), abs=1e-12)
    # ranks know the order alone, and of equal numbers each has the mean of what they would have in any order
    assert spearman([math.exp(value) for value in x], y) == pytest.approx(spearman(x, y), abs=1e-12)
    ranked = [[sum(o < v for o in values) + (values.count(v) + 1) / 2 for v in values] for values in (x, y)]
    assert spearman(x, y) == pytest.approx(np.corrcoef(*ranked)[0, 1], abs=1e-12)
    assert max(abs(pearson(x, y)), abs(spearman(x, y))) <= 1


@pytest.mark.parametrize("measure", [pearson, spearman])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0], [1.0], "there are 2 and 1 numbers"),
        ([1.0, math.nan], [1.0, 2.0], "one is nan"),
        ([1.0, 2.0], [math.inf, 2.0], "one is inf"),
        ([3.0, 3.0], [1.0, 2.0], "needs two different numbers"),
        ([], [], "needs two different numbers"),
    ],
)
def test_numbers_without_a_correlation_are_errors(measure, x, y, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(x, y)


class Powers(nn.Module):
    """Two layers of entries w, and a buffer that counts runs; the loss is a polynomial of each entry."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in [(3, 4), (5,), ()]
        )
        self.layers[0].data = self.layers[0].data.t()  # not contiguous
        self.register_buffer("runs", torch.zeros(()))


def loss_of_degree_5(model: nn.Module, factor: float) -> Tensor:
    model.runs += 1
    powers = (sum(w**power for power in range(1, 6)) for w in model.parameters())
    return factor * sum(each.sum() for each in powers)


def expected_change(w: float, variance: float, factor: float = 1.0) -> float:
    """E[L(w + e) - L(w)] from the moments of a Gaussian: E e^2 = v, E e^4 = 3 v^2."""
    second = 2 + 6 * w + 12 * w**2 + 20 * w**3
    fourth = 24 + 120 * w
    return factor * (second / 2 * variance + fourth / 24 * 3 * variance**2)


def squares(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() ** 2 for name, param in model.named_parameters()}


def saved(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert value.numpy().tobytes() == before[name].numpy().tobytes(), name


@pytest.mark.parametrize("deviation", [0.03, 0.5])
def test_the_change_is_the_expected_one_under_gaussian_noise(deviation: float) -> None:
    model = Powers()
    before = saved(model)
    # the mean of the batches: a factor of 2
    found = importance_validity(model, iter([1.0, 3.0]), loss_of_degree_5, squares(model), deviation=deviation)
    entries = sorted(
        (float(w) ** 2, expected_change(float(w), deviation**2, 2.0))
        for p in model.layers
        for w in p.detach().flatten()
    )
    assert sorted(zip(found.scores, found.changes, strict=True)) == [pytest.approx(pair, rel=1e-6) for pair in entries]
    assert found.pearson == pearson(found.scores, found.changes)
    assert found.spearman == spearman(found.scores, found.changes)
    assert_same_bits(model, before)


def test_a_gradient_hides_no_curvature() -> None:
    curvature = torch.arange(1.0, 9.0, dtype=torch.float64)
    model = nn.Linear(8, 1, bias=False).double()

    def loss(model: nn.Module, slope: float) -> Tensor:
        return (slope * model.weight + curvature * model.weight**2 / 2).sum()

    found = importance_validity(model, [1000.0], loss, {"weight": curvature[None]})
    assert found.changes == pytest.approx([float(c) * 0.03**2 / 2 for c in curvature], rel=1e-6)
    assert found.pearson == pytest.approx(1.0, abs=1e-9)
    assert found.spearman == 1.0


def test_every_layer_gives_as_many_entries_and_a_seed_repeats_them() -> None:
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), "head": nn.Linear(2, 1)}
    ).double()
    names = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    # a score that says which parameter and which entry it is of
    scores = {n: 1000.0 * names[n] + torch.arange(p.numel()).view(p.shape) for n, p in model.named_parameters()}

    def loss(model: nn.Module, _: int) -> Tensor:
        return sum((p**4).sum() for p in model.parameters())

    def run(seed: int, scores=scores, **options):
        return importance_validity(model, [0], loss, scores, per_layer=5, seed=seed, **options)

    first = run(0)
    numbers = [int(score) // 1000 for score in first.scores]
    assert [sum(number // 2 == layer for number in numbers) for layer in range(4)] == [5, 5, 5, 3]
    assert len(set(first.scores)) == 18
    assert run(0) == first
    assert run(0, dict(reversed(scores.items()))) == first
    assert run(1).scores != first.scores
    by_tensor = run(0, layers="tensor")
    assert [sum(score // 1000 == number for score in by_tensor.scores) for number in range(8)] == [5] * 6 + [2, 1]
    part = run(0, {"head.weight": scores["head.weight"]})
    assert sorted(part.scores) == scores["head.weight"].flatten().tolist()


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, math.nan])
def test_parameters_and_buffers_keep_their_bits_where_the_loss_fails(at: int, fault) -> None:
    model = Powers(torch.float32)
    scores, before, calls = squares(model), saved(model), 0

    def loss(model: nn.Module, batch: float) -> Tensor:
        nonlocal calls
        calls += 1
        if calls < at:
            return loss_of_degree_5(model, batch)
        if fault is KeyboardInterrupt:
            raise fault
        return torch.tensor(fault)

    with pytest.raises(KeyboardInterrupt if fault is KeyboardInterrupt else ValueError):
        importance_validity(model, [1.0], loss, scores)
    assert calls == at
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {}}, "there are no scores"),
        ({"scores": {"weight": torch.ones(1, 3)}}, "no parameter 'weight'"),
        ({"scores": {"0.weight": torch.ones(3)}}, r"0.weight has scores of shape \(3,\) and is \(1, 3\)"),
        ({"scores": {"0.weight": torch.tensor([[1.0, -1.0, 1.0]])}}, "0.weight has scores below 0; pass magnitudes"),
        ({"scores": {"0.weight": torch.tensor([[1.0, math.nan, 1.0]])}}, "0.weight has scores that are NaN"),
        ({"scores": {"0.weight": torch.ones(1, 3)}}, r"all 3 scores drawn are equal, \[1.0\]"),
        ({"model": nn.Sequential(nn.Linear(3, 1).bfloat16())}, r"0.weight is torch.bfloat16.*double\(\)"),
        ({"batches": []}, "there are no batches"),
        ({"batches": torch.ones(2, 3)}, r"pass \[tensor\]"),
        ({"deviation": 0.0}, "Invalid deviation: 0.0"),
        ({"deviation": math.inf}, "Invalid deviation: inf"),
        ({"per_layer": 0}, "Invalid per_layer: 0"),
        ({"layers": "blocks"}, "Invalid layers: 'blocks'"),
        ({"loss_fn": lambda model, x: model(x)}, "loss_fn must return one finite number"),
        ({"loss_fn": lambda model, x: model(x).mean() + torch.rand(())}, r"when taken again; call model.eval\(\)"),
        ({"loss_fn": lambda model, x: torch.ones(())}, "the loss changes by 0.0 at every entry"),
    ],
)
def test_validity_refuses_what_has_no_answer(change, message: str) -> None:
    arguments = {
        "model": nn.Sequential(nn.Linear(3, 1)),
        "batches": [torch.ones(2, 3)],
        "loss_fn": lambda model, x: model(x).square().mean(),
        "scores": {"0.weight": torch.tensor([[1.0, 2.0, 3.0]])},
    }
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        importance_validity(**arguments)
