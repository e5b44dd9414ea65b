"""One description of the tables: the header, the structs and the words of kernels follow from it.

- csrc/schema.h is what the description makes.
- A compiler gives every field the place that numpy gives it.
- A library that was built from another description is not used.
- No kernel has a number where a word or a scalar has a name.
"""

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from epi_kernels import ops, schema
from epi_kernels.backends import cuda, library, native
from epi_kernels.engine.clocks import scalars_of
from epi_kernels.rules import ADAMW, RULES, rule_of
from epi_kernels.schema import SweepScalars, width_of

ROOT = Path(__file__).parents[1]


def test_the_header_is_what_the_description_makes() -> None:
    assert (ROOT / "csrc/schema.h").read_text() == schema.header(), "run `make schema`"


def printed(lines: list[str], folder: Path) -> list[int]:
    """Return the numbers that a C++ program prints, which has schema.h and prints these expressions."""
    if native.obstacle():
        pytest.skip(native.obstacle())  # whoever has no C++ compiler
    body = "".join(f'std::printf("%ld\\n", static_cast<long>({line}));\n' for line in lines)
    text = f'#include <cstddef>\n#include <cstdio>\n#include "schema.h"\nint main() {{\n{body}}}\n'
    (folder / "layout.cpp").write_text(text)
    command = ["c++", "-std=c++17", f"-I{ROOT / 'csrc'}", str(folder / "layout.cpp"), "-o", str(folder / "layout")]
    subprocess.run(command, check=True)
    run = subprocess.run([str(folder / "layout")], check=True, capture_output=True, text=True)
    return [int(number) for number in run.stdout.split()]


def test_a_compiler_puts_every_field_where_numpy_does(tmp_path: Path) -> None:
    expected: dict[str, int] = {}
    for row in schema.ROWS:
        name, struct = f"epi_{row.name}_tensor", row.struct
        expected[f"sizeof({name})"] = struct.itemsize
        fields: Any = struct.fields
        for field, (dtype, offset) in fields.items():
            expected[f"offsetof({name}, {field})"] = offset
            expected[f"sizeof({name}::{field})"] = dtype.itemsize
    for i, word in enumerate(schema.SCORE.words):
        expected[f"offsetof(epi_score_row, {word})"] = 8 * i
    for rule in RULES:
        for i, scalar in enumerate(rule.scalars._fields):
            expected[f"offsetof(epi_{rule.name}_scalars, {scalar})"] = 4 * i
    for i, scalar in enumerate(SweepScalars._fields):
        expected[f"offsetof(epi_sweep_scalars, {scalar})"] = 4 * i
    assert dict(zip(expected, printed(list(expected), tmp_path), strict=True)) == expected


def test_the_words_of_a_row_are_distinct_and_begin_with_the_size() -> None:
    for row in schema.ROWS:
        assert row.words[0] == "size"
        assert len(set(row.words)) == len(row.words)
        assert all(row.words[row.word(name)] == name for name in row.words)
    assert schema.SWEEP.word("slots") == schema.SWEEP.word("slots[0]") == schema.SWEEP.word("slots[1]") - 1


@pytest.mark.parametrize(("stem", "module"), [("_native", native), ("_cuda", cuda)])
def test_a_library_of_another_description_is_not_used(stem: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not list(Path(library.__file__).parents[1].glob(f"{stem}*.so")):
        pytest.skip("it was not built")
    load = getattr(module, "_load", None) or module.load
    assert isinstance(load(), ctypes.CDLL)
    monkeypatch.setattr(module, "VERSION", schema.VERSION + 1)
    assert "is of another version of the package; install it again" in load.__wrapped__()


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "epi_kernels").rglob("*triton.py"), ROOT / "epi_kernels/ops/tiles.py"]),
    ids=lambda path: str(path.relative_to(ROOT / "epi_kernels")),
)
def test_no_kernel_has_a_number_for_a_word_or_a_scalar(path: Path) -> None:
    bare = re.findall(r"(?:\b(?:row|rows|words|s|scalars)\s*\+\s*\d.*|scalars.*\*\s*\d.*)", path.read_text())
    assert not bare


# Scalars --------------------------------------------------------------------------------------------------------------


GROUP = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.5, "maximize": True, "importance_beta": 0.9}


def test_a_row_of_scalars_is_the_sweeps_and_then_the_rules() -> None:
    row = scalars_of(ADAMW, GROUP, 2)
    assert len(row) == width_of(ADAMW) == 12
    assert SweepScalars(*row[:4]) == (-1.0, 0.9, 1.0 - 0.9, 2)
    assert row[4:] == ADAMW.scalars(0.95, 0.5, 0.5, 0.75, 0.25, 0.1 / 0.75, (1 - 0.75**2) ** 0.5, 1e-3)


def test_the_beta_of_an_importance_in_a_slot_is_that_slots() -> None:
    own = SweepScalars(*scalars_of(ADAMW, {**GROUP, "importance": "exp_avg_sq"}, 1)[:4])
    assert (own.importance_beta, own.one_minus_importance_beta) == (0.75, 0.25)
    own = SweepScalars(*scalars_of(ADAMW, {**GROUP, "importance": "ema"}, 1)[:4])
    assert own.importance_beta == 0.9


def test_scalars_of_clocks_in_a_tensor_are_those_of_each_clock() -> None:
    steps = torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64)
    group = {**GROUP, "lr": torch.tensor(0.1, dtype=torch.float64)}
    values = [torch.as_tensor(value, dtype=torch.float64) for value in scalars_of(ADAMW, group, steps)]
    columns = [value.expand(3).tolist() for value in values]
    for i, step in enumerate(steps.tolist()):
        assert [column[i] for column in columns] == pytest.approx(scalars_of(ADAMW, GROUP, step), rel=1e-15)


# Rules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_keeps_what_it_promises(rule: Any) -> None:
    assert rule_of(rule.name) is rule
    assert [slot.option is not None for slot in rule.slots] == sorted(slot.option is not None for slot in rule.slots)
    named = {slot.name: slot for slot in rule.slots}
    assert len(named) == len(rule.slots)
    if rule.importance_slot is not None:
        assert not named[rule.importance_slot].option
    for twin in (f"epi_kernels/rules/{rule.name}_triton.py", f"csrc/rules/{rule.name}.h"):
        assert (ROOT / twin).exists()
    assert re.search(rf"RULE\(EPI_RULE_{rule.name.upper()}, ", (ROOT / "csrc/rules/all.h").read_text())


def test_slots_that_are_not_the_rules_are_refused() -> None:
    def sweep(slots: dict[str, list[Any]]) -> None:
        ops.prepared_sweep(
            ADAMW, ops.Tensors([torch.ones(2)] * 2, [torch.ones(2)] * 2, slots), "none", [False] * 2, "auto"
        )

    state = [torch.zeros(2), torch.zeros(2)]
    sweep({"exp_avg": state, "exp_avg_sq": state, "max_exp_avg_sq": [None, state[0]]})
    with pytest.raises(
        ValueError, match=r"the slots are \['exp_avg_sq', 'exp_avg'\]; the rule adamw has \['exp_avg', "
    ):
        sweep({"exp_avg_sq": state, "exp_avg": state})
    with pytest.raises(ValueError, match=r"exp_avg_sq\[0\] is None; the rule adamw keeps it for every parameter"):
        sweep({"exp_avg": state})
    with pytest.raises(ValueError, match=r"exp_avg\[1\] is None; the rule adamw keeps it for every parameter"):
        sweep({"exp_avg": [state[0], None], "exp_avg_sq": state})
    with pytest.raises(ValueError, match="the slots are .*'momentum'"):
        sweep({"exp_avg": state, "exp_avg_sq": state, "momentum": state})
