"""`top_k` selects exactly the k highest scores: the first by position among equals, whatever dtypes and layouts.

Against a stable sort, on ties, zeros, NaN and infinities; with hypothesis over sizes and ratios.
"""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from epi_kernels import select
from epi_kernels.backends.support import Spec
from epi_kernels.ops import functional
from epi_kernels.select import top_k


def by_sorting(scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Return the mask that a stable sort of all scores gives."""
    flat = torch.cat([values.float().reshape(-1) for values in scores.values()])
    flat = torch.where(flat.isfinite() & (flat >= torch.finfo(torch.float32).tiny), flat, 0.0)
    chosen = flat.sort(descending=True, stable=True).indices[: math.floor(ratio * flat.numel() + 1e-9)]
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[chosen] = True
    parts = mask.split([values.numel() for values in scores.values()])
    return {name: part.view(values.shape) for (name, values), part in zip(scores.items(), parts, strict=True)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
def test_random_scores(ratio: float, backend: str) -> None:
    scores = {"a": torch.rand(100, 37), "b": torch.rand(()), "c": torch.rand(0, 4), "d": 10 ** torch.randn(5001) * 1e-9}
    mask = top_k(scores, ratio, backend=backend)
    assert same(mask, by_sorting(scores, ratio))
    assert sum(int(m.sum()) for m in mask.values()) == math.floor(ratio * 8702 + 1e-9)


@hypothesis.given(
    values=st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 1e-40, math.nan, math.inf]), max_size=30), min_size=1),
    ratio=st.floats(0, 1),
)
def test_ties_are_taken_from_the_first_and_the_count_is_exact(values: list[list[float]], ratio: float) -> None:
    scores = {str(i): torch.tensor(row) for i, row in enumerate(values)}
    mask = top_k(scores, ratio)
    total = sum(map(len, values))
    assert sum(int(m.sum()) for m in mask.values()) == math.floor(ratio * total + 1e-9)
    assert same(mask, by_sorting(scores, ratio))


def test_all_equal_takes_the_first(backend: str) -> None:
    mask = top_k({"a": torch.ones(3), "b": torch.ones(5)}, 0.5, backend=backend)
    assert [m.tolist() for m in mask.values()] == [[True] * 3, [True, False, False, False, False]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_compared_as_float32(dtype: torch.dtype) -> None:
    scores = {"a": torch.rand(50, 7).to(dtype), "b": torch.rand(300).to(dtype)}
    assert same(top_k(scores, 0.1), by_sorting(scores, 0.1))


def test_positions_are_row_major_whatever_the_strides() -> None:
    scores = {"t": (torch.rand(40, 30) * 8).round().t(), "e": torch.tensor([[3.0], [5.0]]).expand(2, 50)}
    assert same(top_k(scores, 0.3), by_sorting(scores, 0.3))


def test_more_entries_than_are_looked_at_together() -> None:
    scores = {"a": (torch.rand(3 << 20) * 4).floor()}
    assert same(top_k(scores, 0.4), by_sorting(scores, 0.4))


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return found


def test_ties_at_the_threshold_take_no_memory_but_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_CHUNK", 1 << 10)
    scores = {"a": (torch.rand(1 << 16) * 4).floor()}
    with _Largest() as largest:
        mask = top_k(scores, 0.4)
    assert same(mask, by_sorting(scores, 0.4))
    # views of the scores themselves are of float32
    assert largest.bytes <= 4 << 16


def test_of_each_layer_by_itself() -> None:
    scores = {"h.0.a": torch.rand(40), "h.0.b": torch.rand(60) * 9, "h.1.a": torch.rand(100) * 1e-6}
    mask = top_k(scores, 0.1, scope="layer", layers="block")
    assert int(mask["h.0.a"].sum() + mask["h.0.b"].sum()) == 10
    assert same({"h.1.a": mask["h.1.a"]}, by_sorting({"h.1.a": scores["h.1.a"]}, 0.1))
    assert same({n: mask[n] for n in ("h.0.a", "h.0.b")}, by_sorting({n: scores[n] for n in ("h.0.a", "h.0.b")}, 0.1))
    mask = top_k(scores, 0.1, scope="layer")
    assert same({"h.0.b": mask["h.0.b"]}, by_sorting({"h.0.b": scores["h.0.b"]}, 0.1))
    assert [int(m.sum()) for m in mask.values()] == [4, 6, 10]
    mask = top_k(scores, 0.1, scope="layer", layers=lambda name: name[-1])
    assert int(mask["h.0.a"].sum() + mask["h.1.a"].sum()) == 14


def test_normalized_by_layer_is_equation_8(backend: str) -> None:
    scores = {"h.0.a": torch.rand(40) * 1e-9, "h.0.b": torch.rand(60) * 1e-9, "h.1.a": torch.rand(100)}
    low, high = (f(torch.cat([scores["h.0.a"], scores["h.0.b"]])) for f in (torch.min, torch.max))
    scaled = {n: (s - low) / (high - low) for n, s in scores.items() if n.startswith("h.0")}
    scaled["h.1.a"] = (scores["h.1.a"] - scores["h.1.a"].min()) / (scores["h.1.a"].max() - scores["h.1.a"].min())
    mask = top_k(scores, 0.2, normalize="layer", layers="block", backend=backend)
    assert same(mask, by_sorting(scaled, 0.2))
    assert not same(top_k(scores, 0.2), by_sorting(scaled, 0.2))


def test_scores_are_left_as_they_were() -> None:
    scores = {"a": torch.rand(100), "b": torch.rand(7, 7)}
    before = {name: values.clone() for name, values in scores.items()}
    top_k(scores, 0.3, normalize="layer")
    assert same(scores, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.5}, "Invalid ratio: 1.5"),
        ({"ratio": -0.1}, "Invalid ratio: -0.1"),
        ({"ratio": math.nan}, "Invalid ratio: nan"),
        ({"scope": "block"}, "Invalid scope: 'block'"),
        ({"normalize": "none"}, "Invalid normalize: 'none'"),
        ({"layers": "module"}, "Invalid layers: 'module'"),
        ({"scores": {}}, "there are no scores"),
        ({"scores": {"w": torch.tensor([1, 2])}}, "the scores of w are torch.int64"),
        ({"scores": {"w": torch.tensor([1.0, -2.0])}}, "w has scores below 0"),
        ({"backend": "cublas"}, "Invalid backend: 'cublas'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k(**{"scores": {"w": torch.ones(3)}, "ratio": 0.5, **changes})


@pytest.mark.parametrize("normalize", [None, "layer"])
def test_a_named_backend_runs_every_operation(backend: str, normalize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    choose = functional.choose

    def spy(spec: Spec, device: torch.device, requested: str) -> Any:
        asked.append((spec.operation, requested))
        return choose(spec, device, requested)

    monkeypatch.setattr(functional, "choose", spy)
    top_k({"a": torch.rand(40), "b": torch.rand(9)}, 0.3, normalize=normalize, backend=backend)
    assert {requested for _, requested in asked} == {backend}
    assert {"score_histogram", "select_digit_"} <= {operation for operation, _ in asked}
