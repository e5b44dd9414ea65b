"""The importance estimators of PIECE, and those of its baselines.

- Scores equal a loop over examples in float64 to SCORE_ERROR, by every method; micro-batches, corrected, come close and
  uncorrected would not.
- A case by hand; 16-bit accumulators keep the mean; the model is left as it was.
- The same for models whose parameters share a gradient, have none, are recurrent, or that vmap gives up half-way.
- Too few examples, ragged batches, reentrant checkpointing and hooks that take the gradients are refused.
"""

import math
from typing import Any

import pytest
import torch
from tolerances import SCORE_ERROR
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from epi_kernels import SparseAdamW, per_example
from epi_kernels.importance import fisher, output_magnitude, second_order, update_magnitude
from epi_kernels.optim import release_gradients


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.block(x) * self.scale)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["tokens"])
    return functional.cross_entropy(logits.flatten(0, -2), batch["targets"].flatten())


def data(count: int = 24, size: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {name: torch.randint(11, (size, 5), generator=generator) for name in ("tokens", "targets")}
        for _ in range(count // size)
    ]


def truth(model: nn.Module, batches: list[dict[str, Tensor]], microbatch: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {name: (mean of g, mean of g^2)} in float64, gradient by gradient."""
    model = model.double()
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in names.items()}
    count = 0
    for batch in batches:
        for first in range(0, len(batch["tokens"]), microbatch):
            example = {k: v[first : first + microbatch] for k, v in batch.items()}
            grads = torch.autograd.grad(loss_of(model, example), list(names.values()))
            count += 1
            for (total, squares), grad in zip(found.values(), grads, strict=True):
                total += grad
                squares += grad.square()
    return {n: (total / count, squares / count) for n, (total, squares) in found.items()}


def net() -> _Net:
    torch.manual_seed(0)
    return _Net()


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to the largest score of its tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[n].double() - expected[n]).abs().max() / expected[n].max()) for n in expected)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_fisher_is_the_mean_of_squared_gradients_of_examples(method: Any, backend: str) -> None:
    expected = {name: squares for name, (_, squares) in truth(net(), data()).items()}
    found = fisher(net(), data(), loss_of, method=method, progress=False, backend=backend)
    assert error(found, expected) <= SCORE_ERROR
    assert all(values.dtype == torch.float32 for values in found.values())
    # in units of each entry, where there is anything to it
    for name, values in found.items():
        big = expected[name] > 1e-12
        assert ((values.double() - expected[name]).abs()[big] / expected[name][big]).max() <= SCORE_ERROR


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("xi", [None, 1e-3, 1.0])
def test_second_order_is_equation_10(method: Any, xi: float | None, backend: str) -> None:
    offset = 1 / 24 if xi is None else xi
    expected = {n: mean.abs() / (squares + offset).sqrt() for n, (mean, squares) in truth(net(), data()).items()}
    found = second_order(net(), data(), loss_of, xi=xi, method=method, progress=False, backend=backend)
    assert error(found, expected) <= SCORE_ERROR


def test_second_order_ranks_as_the_released_code() -> None:
    found = second_order(net(), data(), loss_of, progress=False)
    for name, (mean, squares) in truth(net(), data()).items():
        released = (24 * mean).abs() / (24 * squares + 1).sqrt()
        torch.testing.assert_close(found[name].double() * math.sqrt(24), released, rtol=1e-4, atol=1e-6)


def test_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[1.0], [2.0], [-3.0], [0.0], [1.0], [2.0], [-3.0], [4.0]])  # g_i = x_i
    assert fisher(model, [x], lambda m, b: m(b).mean(), progress=False)["weight"].item() == 44 / 8
    found = second_order(model, [x], lambda m, b: m(b).mean(), xi=0.5, progress=False)["weight"].item()
    assert found == pytest.approx(0.5 / math.sqrt(6.0), rel=1e-6)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_micro_batches_are_corrected_for_the_noise_that_cancels_in_them(method: Any) -> None:
    batches = data(960, 48)
    exact = fisher(net(), batches, loss_of, progress=False)
    found = fisher(net(), batches, loss_of, microbatch=4, method=method, progress=False)
    for name, values in found.items():
        ratio = float(values.sum() / exact[name].sum())
        assert 0.8 < ratio < 1.25, (name, ratio)
        # as the formula says, from the same gradients
        mean, squares = truth(net(), batches[:3], 4)[name]
        some = fisher(net(), batches[:3], loss_of, microbatch=4, method=method, progress=False)[name]
        expected = (4 * squares - 3 * mean.square()).clamp(min=0)
        assert float((some.double() - expected).abs().max() / expected.max()) <= SCORE_ERROR
    uncorrected = truth(net(), batches, 4)
    assert float(uncorrected["block.0.weight"][1].sum() / exact["block.0.weight"].sum()) < 0.6


def test_16_bit_accumulators_keep_the_mean() -> None:
    batches = data(480, 48)
    exact = fisher(net(), batches, loss_of, progress=False)
    found = fisher(net(), batches, loss_of, dtype=torch.bfloat16, progress=False, method="loop")
    for name, values in found.items():
        assert float(values.sum() / exact[name].sum()) == pytest.approx(1.0, abs=0.02)
    # to the nearest, 480 times 1/512 of the first would have changed nothing
    model = nn.Linear(1, 1, bias=False)
    x = torch.cat([torch.tensor([[16.0]]), torch.full((479, 1), 0.5)])
    found = fisher(model, [x], lambda m, b: m(b).mean(), dtype=torch.bfloat16, method="loop", progress=False)
    assert found["weight"].item() * 480 == pytest.approx(256 + 479 / 4, rel=0.05)


def test_a_model_that_vmap_cannot_take_goes_by_the_loop() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else -2 * self.linear(x)  # data-dependent

    torch.manual_seed(0)
    model, x = Branches(), torch.randn(16, 3)
    found = fisher(model, [x], lambda m, b: m(b).mean(), progress=False)
    weight = torch.where(x.sum(1, keepdim=True) > 0, 1.0, -2.0) * x
    torch.testing.assert_close(found["linear.weight"][0], weight.square().mean(0))
    with pytest.raises(RuntimeError):
        fisher(model, [x], lambda m, b: m(b).mean(), method="vmap", progress=False)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_the_model_is_left_as_it_was(method: Any) -> None:
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    fisher(model, data(), loss_of, method=method, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert model.training
    loss_of(model, data()[0]).backward()
    assert model.scale.grad is not None


class _Late(nn.Module):
    """torch.func takes it as long as inputs are short."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).sum(-2)
        return y * 2 if x.shape[-2] > 5 and bool(y.sum() > 1e9) else y


def mean_of(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def test_what_vmap_gives_up_on_half_way_goes_on_by_the_loop_and_counts_once() -> None:
    torch.manual_seed(0)
    model, batches = _Late(), [torch.randn(8, length, 3) for length in (4, 9, 4)]
    found = fisher(model, batches, mean_of, progress=False)
    expected = fisher(model, batches, mean_of, method="loop", progress=False)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)
    with pytest.raises(RuntimeError):
        fisher(model, batches, mean_of, method="vmap", progress=False)


@pytest.mark.parametrize("fails_at", [None, 3])
def test_many_examples_go_through_vmap_some_at_a_time(monkeypatch: pytest.MonkeyPatch, fails_at: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    monkeypatch.setattr(per_example, "_WORTH_VMAP", 2)
    monkeypatch.setattr(per_example, "_AT_ONCE", 3 * 36)  # 3 examples of 36 parameters: 4 chunks of 10, the last of 1
    calls = 0
    vmap = torch.func.vmap

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("no more")
        return vmap(*args, **kwargs)

    monkeypatch.setattr(torch.func, "vmap", counted)
    found = fisher(model, examples(2, 10), entropy, progress=False)
    assert calls == (8 if fails_at is None else fails_at)
    expected = scores_in_float64(model, examples(2, 10))
    for name, score in expected.items():
        assert (found[name] - score).abs().max() <= SCORE_ERROR * score.max()


def test_xi_counts_examples_and_not_micro_batches() -> None:
    found = second_order(net(), data(), loss_of, microbatch=2, progress=False)
    given = second_order(net(), data(), loss_of, microbatch=2, xi=1 / 24, progress=False)
    assert all(torch.equal(found[name], given[name]) for name in found)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_16_bit_sums_of_negative_gradients_score_as_those_of_positive_ones(method: Any) -> None:
    x = torch.rand(400, 1) + 1.0
    for sign in (1.0, -1.0):
        model = nn.Linear(1, 1, bias=False)
        scores = second_order(
            model, [sign * x], lambda m, b: m(b).mean(), dtype=torch.bfloat16, method=method, progress=False
        )
        assert scores["weight"].item() == pytest.approx(float(x.mean() / x.square().mean().sqrt()), rel=0.02)


def test_scores_are_had_where_gradients_are_off() -> None:
    expected = fisher(net(), data(), loss_of, method="loop", progress=False)
    with torch.no_grad():
        for method in ("vmap", "loop"):
            found = fisher(net(), data(), loss_of, method=method, progress=False)  # type: ignore[arg-type]
            assert error(found, {name: score.double() for name, score in expected.items()}) <= SCORE_ERROR


def test_dropout_is_another_for_each_example() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(x * self.weight, 0.5, training=True)

    torch.manual_seed(0)
    # a gradient is 0 or 2: with one mask for all, the mean of squares would be 0 or 4
    score = fisher(Dropped(), [torch.ones(256, 1)], lambda m, b: m(b).mean(), method="vmap", progress=False)
    assert 1.0 < score["weight"].item() < 3.0


def test_nothing_is_left_of_a_pass_that_fails() -> None:
    model = nn.Linear(8, 4)

    def fails(m: nn.Module, batch: Any) -> Tensor:
        if m.weight.grad is None:
            m.weight.grad = torch.ones_like(m.weight)  # as of a backward pass that was cut off
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fisher(model, examples(), fails, method="loop", progress=False)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_loss_that_depends_on_nothing_is_refused() -> None:
    model = nn.Linear(8, 4)
    for method in ("vmap", "loop"):
        for loss in (lambda m, b: entropy(m, b).detach(), lambda m, b: 1.0):
            with pytest.raises(ValueError, match="loss_fn returned what depends on no parameter"):
                fisher(model, examples(), loss, method=method, progress=False)  # type: ignore[arg-type]
    for method in ("auto", "loop"):
        with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
            fisher(nn.Linear(8, 4).requires_grad_(False), examples(), entropy, method=method, progress=False)  # type: ignore[arg-type]


def test_no_more_than_one_gradient_is_held() -> None:
    model, most = net(), 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():
        if param.requires_grad:
            param.register_hook(count)
    fisher(model, data(), loss_of, method="loop", progress=False)
    assert most <= 1


def test_a_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    fisher(net(), data(), loss_of)
    assert "importance: 100%" in capsys.readouterr().err
    fisher(net(), data(), loss_of, progress=False)
    assert not capsys.readouterr().err


class _Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.linear, x.requires_grad_(), use_reentrant=True)
        return checkpoint(self.linear, x, use_reentrant=True)


def test_what_cannot_give_a_score_is_refused() -> None:
    model, x = nn.Linear(2, 1), torch.randn(16, 2)

    def mean(m: nn.Module, b: Any) -> Tensor:
        return m(b).mean()

    with pytest.raises(ValueError, match="7 gradients cannot rank entries: at least 8"):
        fisher(model, [x[:7]], mean, progress=False)
    with pytest.raises(ValueError, match="4 gradients cannot rank"):
        second_order(model, [x], mean, microbatch=4, progress=False)
    with pytest.raises(ValueError, match="16 examples, which do not divide into micro-batches of 3"):
        fisher(model, [x], mean, microbatch=3, progress=False)
    with pytest.raises(ValueError, match=r"first dimensions \[8, 16\]"):
        fisher(model, [(x, x[:8])], mean, progress=False)
    with pytest.raises(ValueError, match=r"batches is a tensor, whose rows would be batches; pass \[tensor\]"):
        fisher(model, x, mean, progress=False)
    for name, value in (("method", "fast"), ("microbatch", 0), ("microbatch", 2.0), ("dtype", torch.float16)):
        with pytest.raises(ValueError, match=f"Invalid {name}: {value!r}"):
            fisher(model, [x], mean, progress=False, **{name: value})
    with pytest.raises(ValueError, match="Invalid xi: 0.0"):
        second_order(model, [x], mean, xi=0.0, progress=False)
    reentrant = _Reentrant()
    with pytest.raises(RuntimeError, match="linear.* got two gradients in one backward pass"):
        fisher(reentrant, [torch.randn(8, 3)], mean, method="loop", progress=False)
    assert all(p.grad is None for p in reentrant.parameters())
    mean(model, x).backward()
    with pytest.raises(ValueError, match="weight has a gradient, which would be added to"):
        fisher(model, [x], mean, progress=False)


def test_update_magnitude() -> None:
    before = {"a": torch.tensor([1.0, -2.0]), "steps": torch.tensor(3)}
    after = {"a": torch.tensor([0.5, 2.0]).bfloat16(), "steps": torch.tensor(4)}
    found = update_magnitude(before, after)
    assert {name: values.tolist() for name, values in found.items()} == {"a": [0.5, 4.0]}
    with pytest.raises(ValueError, match="before and after differ in b"):
        update_magnitude(before, {**after, "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"a has shape \(2,\) before, \(3,\) after"):
        update_magnitude(before, {**after, "a": torch.ones(3)})


def test_output_magnitude_is_the_l1_norm_of_each_channel() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -2.0], [1.0, 1.0]]))
    found = output_magnitude(model, [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
    assert found["0.weight"].tolist() == [[4.0, 4.0], [6.0, 6.0], [7.0, 7.0]]
    assert found["2.weight"].shape == (1, 3)
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="no torch.nn.Linear of the model was run"):
        output_magnitude(nn.ReLU(), [torch.ones(1)])


class _Summed(nn.Module):
    """Two parameters whose gradient is one tensor, and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.delta = nn.Parameter(torch.zeros(4, 8))
        self.bias = nn.Parameter(torch.zeros(4))
        self.shift = nn.Parameter(torch.zeros(4))
        self.unused = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.delta).t() + (self.bias + self.shift)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, state = self.cell(x)
        return self.cell(x, (hidden, state))[0]


class _Stubborn(nn.Module):
    """torch.func cannot take it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if bool(y.sum() > 1e9) else y


def examples(count: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 8, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def scores_in_float64(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the mean square of the gradients of examples, one by one."""
    model = model.double()
    names = dict(model.named_parameters())
    found = {name: torch.zeros_like(param) for name, param in names.items()}
    for inputs, targets in batches:
        for x, y in zip(inputs.double(), targets, strict=True):
            loss = entropy(model, (x[None], y[None]))
            grads = torch.autograd.grad(loss, list(names.values()), materialize_grads=True)
            for name, grad in zip(names, grads, strict=True):
                found[name] += grad.square() / sum(map(len, (b[1] for b in batches)))
    return found


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("kind", [_Summed, _Recurrent, _Stubborn])
def test_gradients_that_are_shared_or_absent_count_once_for_each_parameter(kind: Any, method: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    found = fisher(model, examples(), entropy, method=method, progress=False)
    agreement = second_order(model, examples(), entropy, method=method, progress=False)
    expected = scores_in_float64(model, examples())
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        assert (found[name] - score).abs().max() <= SCORE_ERROR * score.max()
        assert (agreement[name] < 1).all()
        if "unused" in name:
            assert not found[name].any()
        else:
            assert found[name].any()


def test_batches_may_hold_more_than_tensors_and_be_any_mapping() -> None:
    from collections import UserDict

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert batch["mask"] is None
        assert batch["text"] == "as it is"
        return entropy(model, (batch["inputs"], batch["targets"]))

    batches = [UserDict(inputs=inputs, targets=targets, mask=None, text="as it is") for inputs, targets in examples()]
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    plain = fisher(model, examples(), entropy, progress=False)
    for method in ("vmap", "loop"):
        found = fisher(model, batches, loss, method=method, progress=False)  # type: ignore[arg-type]
        for name, score in plain.items():
            assert (found[name] - score).abs().max() <= SCORE_ERROR * score.max()


def test_buffers_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=0.5), nn.Linear(4, 4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fisher(model, examples(4, 8), entropy, microbatch=4, progress=False)
    output_magnitude(model, [inputs for inputs, _ in examples()])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_an_example_without_a_finite_gradient_is_told_of_by_name() -> None:
    batches = examples()
    batches[1][0][2] = torch.nan
    with pytest.warns(UserWarning, match="NaN or infinite, and so are scores of weight, bias"):
        fisher(nn.Linear(8, 4), batches, entropy, progress=False)


def test_hooks_that_take_gradients_and_gradients_that_cannot_be_squared_are_refused() -> None:
    model = nn.Linear(8, 4)
    trainable = {name: torch.ones_like(param, dtype=torch.bool) for name, param in model.named_parameters()}
    release = release_gradients(model, SparseAdamW(model.named_parameters(), trainable=trainable))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for method in ("vmap", "loop"):
        with pytest.raises(ValueError, match="weight has a hook that would take the gradients of the examples"):
            fisher(model, examples(), entropy, method=method, progress=False)  # type: ignore[arg-type]
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    release.remove()
    fisher(model, examples(), entropy, method="loop", progress=False)

    table = nn.Embedding(9, 4, sparse=True)
    words = [(torch.randint(9, (8,)), torch.randint(4, (8,)))]
    with pytest.raises(NotImplementedError, match="the gradient of weight is sparse"):
        fisher(table, words, entropy, method="loop", progress=False)
    with pytest.raises(NotImplementedError, match=r"weight is torch.complex64"):
        fisher(nn.Linear(8, 4, dtype=torch.complex64), examples(), entropy, progress=False)


def test_output_magnitude_sums_16_bit_outputs_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    found = output_magnitude(model, [torch.full((1001, 1), 3.0, dtype=torch.bfloat16)])
    assert found["weight"].item() == 3003.0


def test_output_magnitude_names_a_tied_weight_as_the_model_does() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    assert list(output_magnitude(model, [torch.arange(9)])) == ["0.weight"] == [n for n, _ in model.named_parameters()]


def test_the_same_tensor_before_and_after_has_not_moved_and_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"weight is one tensor before and after; clone\(\)"):
        update_magnitude(dict(model.named_parameters()), dict(model.named_parameters()))
