"""What `epi_kernels.memory` computes is what the optimizers hold, for every way to keep numbers that they take.

- The bytes of every kind of tensor equal those of the tensors that are there after a step, and what the computation
  refuses, the optimizer refuses.
- The bytes moved are those of the benchmarks, and of cases counted by hand.
- On the shapes of Llama-3-8B, compact storages keep the bounds that they were made for.
- The command prints these numbers, and the table of docs/memory.md is what it prints.
"""

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import epi_kernels
from epi_kernels import EPIAdamW, EPILion, MaskedAdamW, SparseAdamW
from epi_kernels.__main__ import main
from epi_kernels.memory import ENTRIES, MODELS, Settings, bytes_of, on_meta, total
from epi_kernels.optim import release_gradients
from epi_kernels.storage import BLOCK8

PAGE = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()

FP32, BF16 = torch.float32, torch.bfloat16

# large; large with ragged rows; three dimensions; one; few entries
SHAPES = [(64, 64), (45, 100), (16, 8, 40), (5000,), (8, 16)]
TRAINABLE = 0.25

BUILDS: dict[str, tuple[Settings, Callable[..., Any]]] = {
    "EPIAdamW": (Settings(), lambda params, **kw: EPIAdamW(params, layers="tensor", **kw)),
    "EPIAdamW, no isolation": (
        Settings(mask="none"),
        lambda params, **kw: EPIAdamW(params, isolation_ratio=0, layers="tensor", **kw),
    ),
    "EPILion": (Settings(rule="lion"), lambda params, **kw: EPILion(params, layers="tensor", **kw)),
    "MaskedAdamW": (
        Settings(mask="fixed"),
        lambda params, **kw: MaskedAdamW(params, frozen={p: one_in_four(p) for p in params}, **kw),
    ),
    "SparseAdamW": (
        Settings(trainable=TRAINABLE),
        lambda params, **kw: SparseAdamW(params, trainable={p: one_in_four(p) for p in params}, **kw),
    ),
}
CHOICES: dict[str, Sequence[Any]] = {
    "amsgrad": (False, True),
    "importance": ("ema", "exp_avg_sq"),
    "state_dtype": (None, BF16, "8bit"),
    "importance_dtype": (None, FP32, BF16, "8bit"),
    "master_weight_bits": (None, 24, 32),
}


def one_in_four(param: Tensor) -> Tensor:
    return torch.arange(param.numel(), device="cpu").view(param.shape) % 4 == 0


def combinations(kind: str) -> Iterator[dict[str, Any]]:
    """Yield every combination of the arguments in CHOICES that an optimizer has."""
    taken = inspect.signature(getattr(epi_kernels, kind.split(",")[0])).parameters
    names = [name for name in CHOICES if name in taken]
    for values in itertools.product(*(CHOICES[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def model() -> list[Parameter]:
    return [Parameter(torch.randn(shape, dtype=dtype)) for dtype in (FP32, BF16) for shape in SHAPES]


def held(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of the tensors that are there, clocks excluded."""
    found: Counter[str] = Counter()
    for param in params:
        state = {key: value for key, value in optimizer.state[param].items() if key != "step"}
        if state.get("importance") is not None and state["importance"] is state.get("exp_avg_sq"):
            del state["importance"]  # the other name of one tensor
        state |= {"weight": param.data} | ({} if param.grad is None else {"gradient": param.grad})
        for key, tensor in state.items():
            name = "scales" if key.endswith("_scales") else key.removesuffix("_codes")
            found[name] += tensor.numel() * tensor.element_size()
    return dict(found)


def computed(params: Sequence[Tensor], settings: Settings) -> dict[str, float]:
    return {name: part.held for name, part in bytes_of(params, settings).items() if part.held}


def settings_of(base: Settings, **changes: Any) -> Settings:
    return Settings(**{**{name: getattr(base, name) for name in ("rule", "mask", "trainable")}, **changes})


def per_entry(settings: Settings, dtype: torch.dtype = FP32, model: str | None = None) -> Any:
    params = on_meta(MODELS[model] if model else ENTRIES, dtype)
    return total(bytes_of(params, settings)).times(1 / sum(param.numel() for param in params))


@pytest.mark.parametrize("kind", BUILDS)
def test_the_bytes_computed_are_those_of_the_tensors_held_after_a_step(kind: str) -> None:
    base, build = BUILDS[kind]
    params = model()
    held_somewhere = set()
    for arguments in combinations(kind):
        settings = settings_of(base, **arguments)
        for param in params:
            param.grad = torch.randn_like(param)
        try:
            expected = computed(params, settings)
        except (ValueError, NotImplementedError) as refusal:
            with pytest.raises(type(refusal), match=re.escape(str(refusal)[:40])):
                build(params, backend="reference", **arguments)
            continue
        optimizer = build(params, backend="reference", **arguments)
        optimizer.step()
        assert held(params, optimizer) == expected, arguments
        held_somewhere |= set(expected)
    assert {"weight", "gradient", "exp_avg"} < held_somewhere
    assert kind == "SparseAdamW" or {"rest", "scales"} < held_somewhere


def test_torchs_adamw_holds_what_adamw_without_isolation_does() -> None:
    params = [param for param in model() if param.dtype == FP32]
    optimizer = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert held(params, optimizer) == computed(params, Settings(mask="none"))


def test_a_released_gradient_is_not_held() -> None:
    module = torch.nn.ParameterList(model())
    optimizer = EPIAdamW(module.named_parameters(), backend="reference")
    release_gradients(module, optimizer)
    sum(param.float().square().sum() for param in module).backward()  # type: ignore[union-attr]
    optimizer.step()
    params = list(module.parameters())
    assert held(params, optimizer) == computed(params, Settings(release=True))
    assert bytes_of(params, Settings(release=True))["gradient"].read > 0


def test_what_an_optimizer_does_not_take_is_refused_and_named() -> None:
    params = on_meta(SHAPES, FP32)
    for settings, message in [
        (Settings(rule="lion", amsgrad=True), "amsgrad=True: EPILion has no such argument"),
        (Settings(rule="lion", mask="fixed"), "neither frozen nor trainable"),
        (Settings(mask="fixed", importance_dtype="8bit"), "importance_dtype='8bit': MaskedAdamW has no such argument"),
        (Settings(trainable=0.0), "Invalid trainable: 0.0"),
        (Settings(master_weight_bits=24), "no parameter is bfloat16"),
        (Settings(state_dtype="8bit", amsgrad=True), "amsgrad=True with state_dtype='8bit'"),
    ]:
        with pytest.raises(ValueError, match=message):
            bytes_of(params, settings)
    with pytest.raises(ValueError, match="no parameter has 2 dimensions"):
        bytes_of(on_meta([(1 << 20,)], FP32), Settings(state_dtype="8bit"))  # as a wrapper flattens a model


@pytest.mark.parametrize(
    ("settings", "dtype", "read", "written"),
    [
        (Settings(mask="none"), FP32, 16, 12),
        (Settings(), FP32, 20, 16),
        (Settings(importance="exp_avg_sq"), FP32, 16, 12),
        (Settings(state_dtype=FP32), FP32, 20, 16),
        (Settings(state_dtype=BF16), FP32, 14, 10),
        (Settings(amsgrad=True), FP32, 24, 20),
        (Settings(mask="fixed"), FP32, 17, 12),
        (Settings(rule="lion"), FP32, 16, 12),
        (Settings(grad_dtype=FP32), BF16, 18, 14),
        (Settings(state_dtype="8bit", master_weight_bits=32), BF16, 2 + 2 + 3 + 12 / 64 + 2, 2 + 3 + 12 / 64 + 2),
    ],
)
def test_the_bytes_moved_are_those_counted_by_hand(
    settings: Settings, dtype: torch.dtype, read: float, written: float
) -> None:
    moved = per_entry(settings, dtype)
    assert (moved.read, moved.written) == (read, written)


def test_the_benchmarks_count_the_same_bytes() -> None:
    for name, settings in [
        (cases.BASELINE, Settings(mask="none")),
        (cases.EPI, Settings()),
        (cases.IN_EXP_AVG_SQ, Settings(importance="exp_avg_sq")),
        ("fixed mask", Settings(mask="fixed")),
        (cases.SPARSE, Settings(trainable=cases.SELECTED)),
    ]:
        moved = per_entry(settings)
        # trainable entries that happen to share a line count twice there
        assert moved.read + moved.written == pytest.approx(cases.bytes_of(name, FP32, "cpu"), rel=0.01)


def test_blocks_of_8_bits_hold_what_their_storage_says() -> None:
    parts = bytes_of(on_meta(ENTRIES, FP32), Settings(state_dtype="8bit"))
    assert sum(parts[name].held for name in ("exp_avg", "exp_avg_sq", "importance", "scales")) == (
        3 * BLOCK8.bytes * torch.Size(ENTRIES[0]).numel()
    )


PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_241_732_096,
    "gemma-2-9b": 9_241_705_984,
    "gpt2": 124_439_808,
}


@pytest.mark.parametrize(("name", "entries"), PUBLISHED.items())
def test_the_models_have_their_published_numbers_of_parameters(name: str, entries: int) -> None:
    assert sum(torch.Size(shape).numel() for shape in MODELS[name]) == entries


COMPACT: dict[str, Any] = {"state_dtype": "8bit", "master_weight_bits": 24}


@pytest.mark.parametrize(
    ("settings", "dtype", "bound"),
    [
        (Settings(state_dtype=BF16), FP32, 14),
        (Settings(importance_dtype=BF16), FP32, 18),
        (Settings(**COMPACT), BF16, 8.2),
        (Settings(**COMPACT, importance="exp_avg_sq"), BF16, 7.2),
        (Settings(**COMPACT, importance="exp_avg_sq", release=True), BF16, 5.2),
    ],
)
def test_llama_3_8b_fits_into_so_many_bytes_for_each_parameter(
    settings: Settings, dtype: torch.dtype, bound: float
) -> None:
    assert bound - 0.1 < per_entry(settings, dtype, "llama-3-8b").held <= bound


def test_the_readme_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 12
    assert f"```\n{printed}```\n" in PAGE


def rows(printed: str) -> dict[str, list[str]]:
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 5}


def test_the_command_prints_the_details_of_one_combination(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--params 8e9 --param-dtype bfloat16 --state-dtype 8bit --master-weight-bits 24"
    main(["memory", *options.split()])
    printed = capsys.readouterr().out
    assert "EPIAdamW(params, state_dtype='8bit', master_weight_bits=24), bfloat16 parameters" in printed
    assert "8,000,000,000 parameters" in printed
    found = rows(printed)
    assert found["weight"] == ["2", "14.90", "2", "2", "4"]
    assert found["gradient"] == ["2", "14.90", "2", "-", "2"]
    for name in ("exp_avg", "exp_avg_sq", "importance", "rest"):
        assert found[name] == ["1", "7.45", "1", "1", "2"]
    assert found["scales"] == ["0.188", "1.40", "0.188", "0.188", "0.375"]
    assert found["sum"] == ["8.188", "61.00", "8.188", "6.188", "14.375"]


@pytest.mark.parametrize(
    ("options", "call", "whole"),
    [
        ("--model llama-3-8b --state-dtype bfloat16", "EPIAdamW(params, state_dtype=torch.bfloat16)", ["14", "104.70"]),
        ("--importance-dtype bfloat16", "EPIAdamW(params, importance_dtype=torch.bfloat16)", ["18", "134.11"]),
        ("--rule lion --no-isolation", "EPILion(params, isolation_ratio=0)", ["12", "89.41"]),
        ("--importance exp_avg_sq --amsgrad", "EPIAdamW(params, amsgrad=True, importance='exp_avg_sq')", ["20"]),
        ("--frozen", "MaskedAdamW(params, frozen=masks)", ["17"]),
        ("--trainable 0.001 --release", "SparseAdamW(params, trainable=masks)", ["4.012"]),
        ("--param-dtype bfloat16 --grad-dtype float32", "EPIAdamW(params), bfloat16 parameters", ["18"]),
    ],
)
def test_every_option_counts(options: str, call: str, whole: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", *options.split()])
    printed = capsys.readouterr().out
    assert call in printed
    assert rows(printed)["sum"][: len(whole)] == whole


def test_what_is_small_is_not_printed_as_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "--trainable", "0.0001"])
    assert rows(capsys.readouterr().out)["indices"] == ["0.000", "0.00", "0.000", "-", "0.000"]


def test_released_gradients_leave_the_largest_which_the_command_names(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "--model", "llama-3-8b", "--release", "--grad-dtype", "bfloat16"])
    assert "one is held at a time, the largest of 0.98 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--params many", "'many' is not a number of parameters"),
        ("--params 0", "'0' is not a number of parameters"),
        ("--master-weight-bits 24", "no parameter is bfloat16"),
        ("--frozen --trainable 0.1", "not allowed with argument --frozen"),
        ("--trainable 0.1 --amsgrad", "amsgrad=True is not part of this version"),
    ],
)
def test_what_cannot_be_is_refused_on_the_command_line(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["memory", *options.split()])
    assert message in capsys.readouterr().err


def test_without_a_command_it_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out.startswith("epi_kernels ")
