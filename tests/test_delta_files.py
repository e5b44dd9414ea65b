"""Files of deltas: every byte counts, and what is no delta is refused with a message.

- What is saved is loaded, whatever lies between positions, and any reader of safetensors reads it.
- Sizes: 4 bytes for an entry of a bfloat16 parameter, with the worst of gaps 4.05 at 0.1%.
- Files with changed bytes, truncated or put together anew by somebody who knows the format: a ValueError, or the delta.
  ``python tests/test_delta_files.py 10000`` tries more of them.
- Files of earlier versions load.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epi_kernels import delta
from epi_kernels.delta import Delta, container
from epi_kernels.delta.entries import bits_of

ESCAPE = 65535


def same(one: Delta, other: Delta) -> bool:
    return (
        vars(one) == vars(other)
        and one.keys() == other.keys()
        and all(
            torch.equal(one[n][0].long(), other[n][0].long())
            and one[n][1].dtype == other[n][1].dtype
            and torch.equal(bits_of(one[n][1]), bits_of(other[n][1]))
            for n in one
        )
    )


def of(positions: list[int], count: int, dtype: torch.dtype = torch.float32) -> Delta:
    values = torch.randn(len(positions), generator=torch.Generator().manual_seed(0)).to(dtype)
    return Delta({"w": (torch.tensor(positions, dtype=torch.int64), values)}, shapes={"w": (count,)})


def example() -> Delta:
    """Return a delta with everything: several dtypes, escapes, no entries, no shape, digests."""
    wide = of([0, 1, 65535, 65536, 200_000, 5_000_000], 5_000_001, torch.bfloat16)
    found = Delta(wide, shapes={"w": (5_000_001,), "head.bias": (4,), "none": (3, 3)}, before={"w": -7, "head.bias": 9})
    found["head.bias"] = (torch.tensor([3]), torch.tensor([float("nan")]))
    found["none"] = (torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.float64))
    found["complex"] = (torch.tensor([70_000, 2]), torch.tensor([1 + 2j, -0.0], dtype=torch.complex64))
    found.base, found.target = "0" * 32, "f" * 32
    return found


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([], []),
        ([0], [0]),
        ([3, 4, 6], [3, 0, 1]),
        ([ESCAPE - 1], [ESCAPE - 1]),
        ([ESCAPE], [ESCAPE, 0]),
        ([2 * ESCAPE + 5, 2 * ESCAPE + 6], [ESCAPE, ESCAPE, 5, 0]),
        ([0, ESCAPE, 2 * ESCAPE + 1], [0, ESCAPE - 1, ESCAPE, 0]),
    ],
)
def test_gaps_computed_by_hand(positions: list[int], words: list[int], tmp_path: Path) -> None:
    delta.save(of(positions, 200_000), tmp_path / "task")
    tensors = load_file(tmp_path / "task")
    assert tensors["w.gaps"].tolist() == words
    assert tensors["w.gaps"].dtype == torch.uint16
    assert same(delta.load(tmp_path / "task"), of(positions, 200_000))


@given(st.sets(st.integers(0, 2**40), max_size=30), st.sampled_from([torch.bfloat16, torch.float64, torch.float8_e5m2]))
@settings(deadline=None, max_examples=200)
def test_any_positions_come_back(tmp_path_factory: Any, positions: set[int], dtype: torch.dtype) -> None:
    # gaps of 2^40 would be 16 million escapes
    ordered = [position % 2**25 if number else position % 2**16 for number, position in enumerate(sorted(positions))]
    ordered = sorted(set(ordered))
    path = tmp_path_factory.mktemp("any") / "task"
    delta.save(of(ordered, 2**25, dtype), path)
    assert same(delta.load(path), of(ordered, 2**25, dtype))


def test_everything_comes_back_and_positions_are_sorted(tmp_path: Path) -> None:
    given = example()
    delta.save(given, tmp_path / "task")
    found = delta.load(str(tmp_path / "task"))
    assert found["complex"][0].tolist() == [2, 70_000]
    assert found["complex"][1].tolist() == [0, 1 + 2j]
    given["complex"] = tuple(tensor.flip(0) for tensor in given["complex"])  # type: ignore[assignment]
    assert same(found, given)
    assert found["w"][0].dtype == torch.int32
    assert set(load_file(tmp_path / "task")) == {name + key for name in given for key in (".gaps", ".values")}
    delta.save({}, tmp_path / "none")
    assert delta.load(tmp_path / "none") == {}


def test_positions_from_2_to_the_31_on_are_wide(tmp_path: Path) -> None:
    delta.save(of([3], 1 << 31, torch.bfloat16), tmp_path / "task")
    assert delta.load(tmp_path / "task")["w"][0].dtype == torch.int64


@pytest.mark.parametrize("spread", ["random", "the worst: all gaps but few are short, the others as long as can be"])
def test_an_entry_of_bfloat16_takes_4_bytes(spread: str, tmp_path: Path) -> None:
    count, k = 10**8, 10**5
    if spread == "random":
        positions = torch.randint(count, (k,), generator=torch.Generator().manual_seed(0)).unique()
    else:
        positions = torch.cat([torch.arange(k - 1), torch.tensor([count - 1])])
    given = Delta({"w": (positions.int(), torch.zeros(len(positions)).bfloat16())}, shapes={"w": (count,)})
    delta.save(given, tmp_path / "task")
    header = container.read_header(tmp_path / "task").data
    size = ((tmp_path / "task").stat().st_size - header) / len(positions)
    assert header < 500
    assert size == 4 if spread == "random" else 4 < size <= 4.05
    assert same(delta.load(tmp_path / "task"), given)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    delta.save(example(), tmp_path / "task")
    before = (tmp_path / "task").read_bytes()
    for wrong, message in (
        (
            {"w": (torch.tensor([0]), torch.ones(1, dtype=torch.complex128))},
            "complex128, which safetensors does not have",
        ),
        ({"w": (torch.tensor([1, 1]), torch.ones(2))}, "positions of w twice"),
        ({"w": (torch.tensor([-1]), torch.ones(1))}, "positions from -1 to -1 in w"),
        (
            Delta({"w": (torch.tensor([4]), torch.ones(1))}, shapes={"w": (2, 2)}),
            "positions from 4 to 4 in w, which has 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            delta.save(wrong, tmp_path / "task")
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
    assert (tmp_path / "task").read_bytes() == before


def test_files_of_earlier_versions_load(tmp_path: Path) -> None:
    tensors = {"a.indices": torch.tensor([1, 5], dtype=torch.int32), "a.values": torch.tensor([1.0, 2.0]).bfloat16()}
    save_file(tensors, tmp_path / "task", metadata={"format": "pt"})
    assert same(delta.load(tmp_path / "task"), Delta({"a": (tensors["a.indices"], tensors["a.values"])}))
    for key, tensor, message in (
        ("a.indices", torch.tensor([5, 5]), "positions of a twice"),
        ("a.indices", torch.tensor([-1, 5]), "positions from -1 to 5 in a"),
        ("a.indices", torch.tensor([1.0, 5.0]), "positions of torch.float32"),
        ("a.indices", torch.tensor([1, 5]).to(torch.uint64), "positions of torch.uint64; they are signed integers"),
        ("a.values", torch.ones(3), r"positions of shape \(2,\) and values of \(3,\)"),
        ("b", torch.ones(3), "is no delta that save.. wrote: it holds"),
    ):
        save_file({**tensors, key: tensor}, tmp_path / "wrong")
        with pytest.raises(ValueError, match=message):
            delta.load(tmp_path / "wrong")


# Files that are no deltas ---------------------------------------------------------------------------------------------


def forged(path: Path, tensors: dict[str, Tensor], parameters: Any, version: str = "2") -> Path:
    """Write a file with a checksum that is right, as somebody does who knows the format."""
    said = parameters if isinstance(parameters, str) else json.dumps(parameters)
    container.write(path, tensors, {"epi_kernels.delta": version, "parameters": said}, sealed=True)
    return path


GAPS, VALUES = torch.tensor([3, 4], dtype=torch.uint16), torch.ones(2)


@pytest.mark.parametrize(
    ("gaps", "values", "about", "message"),
    [
        (GAPS, VALUES, {"shape": [8]}, "positions from 3 to 8 in w, which has 8 entries"),
        (GAPS, VALUES, {"shape": [2, -4]}, "no list of natural numbers"),
        (GAPS, VALUES, {"shape": [1 << 70]}, "no list of natural numbers"),
        (GAPS, VALUES, {"shape": "9"}, "no list of natural numbers"),
        (GAPS, VALUES, {"before": "x"}, "invalid literal"),
        (GAPS, VALUES, {"before": 3}, "is no delta that save"),
        (GAPS, VALUES, [], "is no delta that save"),
        (GAPS, torch.ones(3), {"shape": [9]}, r"positions of shape \(2,\) and values of \(3,\)"),
        (
            torch.full((5,), ESCAPE).to(torch.uint16),
            VALUES,
            {"shape": [9]},
            "w has no gaps of 16 bits, or they end in the middle of one",
        ),
        (torch.tensor([ESCAPE] * 4 + [0, 0]).to(torch.uint16), VALUES, {"shape": [9]}, "to 262141 in w, which has 9"),
        (GAPS.int(), VALUES, {"shape": [9]}, "w has no gaps of 16 bits"),
        (GAPS.view(1, 2), VALUES, {"shape": [9]}, "w has no gaps of 16 bits"),
        (GAPS, VALUES.view(1, 2), {"shape": [9]}, "both are 1-D"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    gaps: Tensor, values: Tensor, about: Any, message: str, tmp_path: Path
) -> None:
    path = forged(tmp_path / "task", {"w.gaps": gaps, "w.values": values}, {"w": about})
    with pytest.raises(ValueError, match=message):
        delta.load(path)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "its tensors are not those of its metadata: w.values, w.gaps"),
        ({"v": {}}, "its tensors are not those of its metadata"),
        (["w"], "is no delta that save"),
        ("[" * 100_000, "is no delta that save"),
        ("{", "Expecting property name"),
        ("7", "is no delta that save"),
    ],
    ids=["none", "other", "a list", "deep", "broken", "a number"],
)
def test_metadata_that_say_something_else_are_refused(parameters: Any, message: str, tmp_path: Path) -> None:
    path = forged(tmp_path / "task", {"w.gaps": GAPS, "w.values": VALUES}, parameters)
    with pytest.raises(ValueError, match=message):
        delta.load(path)


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file, or truncated: it has 0 bytes"),
        (b"PK\x03\x04 a zip of torch.save", "is no safetensors file"),
        (raw({}, length=1 << 62), "is no safetensors file, or truncated"),
        (raw({}, length=99_999_999), "is no safetensors file, or truncated"),
        (raw(b"[]"), "no list of tensors"),
        (raw(b"\xff\xff"), "is no JSON"),
        (raw(b"[" * 100_000), "is no JSON"),
        (raw(b'{"a": 1, "a": 1}'), "a name occurs twice"),
        (raw({"__metadata__": {"a": 1}}), "metadata that are no texts"),
        (raw({"a": 1}), "does not say what a is"),
        (raw({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)), "does not say what a is"),
        (raw({"a": {**ENTRY, "shape": [2.0]}}, bytes(8)), "does not say what a is"),
        (raw({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)), "does not say what a is"),
        (raw({"a": {**ENTRY, "data_offsets": [0, 8, 9]}}, bytes(8)), "does not say what a is"),
        (raw({"a": {**ENTRY, "more": 1}}, bytes(8)), "does not say what a is"),
        (raw({"a": {**ENTRY, "shape": [3]}}, bytes(8)), r"has 8 bytes of a, F32 of shape \[3\]"),
        (raw({"a": {**ENTRY, "dtype": "F5"}}, bytes(8)), "a dtype that is not known here"),
        (raw({"a": ENTRY}, bytes(7)), "is truncated, or was changed"),
        (raw({"a": ENTRY}, bytes(9)), "is truncated, or was changed"),
        (raw({"a": ENTRY, "b": ENTRY}, bytes(8)), "has b at byte .*, where .* is next"),
        (raw({"a": {"dtype": "F32", "shape": [0, (1 << 63) - 1, 4], "data_offsets": [0, 0]}}), "which no tensor has"),
        (raw({"a": ENTRY}, bytes(8)), "is no delta that save.. wrote: it holds a"),
        (raw({"__metadata__": {"epi_kernels.delta": "3"}}), "it is of version 3, and 2 is read here"),
        (raw({"__metadata__": {"epi_kernels.delta": "2", "parameters": "{}"}}), "it has no checksum"),
        (raw({"__metadata__": {"epi_kernels.checksum": "0" * 32}}), "has a checksum that cannot be found"),
    ],
)
def test_foreign_and_hostile_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "task").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        delta.load(tmp_path / "task")


# Changed files --------------------------------------------------------------------------------------------------------


def resigned(content: bytes) -> bytes:
    """Return a file with the checksum of its bytes, where it has the place for one."""
    place = content.find(container._MARK) + len(container._MARK)
    if place < len(container._MARK) or len(content) < place + 32:
        return content
    rest = content[place + 32 :]
    return content[:place] + container._digest(content[:place], bytes(32), rest).encode() + rest


def changed(content: bytes, source: random.Random) -> bytes:
    """Return a file in which something is changed: bytes, length or order."""
    found = bytearray(content)
    for _ in range(source.choice((1, 1, 2, 8))):
        place, end = source.randrange(len(found)), source.randrange(len(found) + 1)
        match source.randrange(7):
            case 0:
                found[place] ^= 1 << source.randrange(8)
            case 1:
                found[place] = source.choice((0, 9, 32, 48, 57, 255, source.randrange(256)))
            case 2 if place:
                del found[place:]
            case 3:
                found[place:place] = found[min(place, end) : max(place, end)]
            case 4 if abs(end - place) < len(found) - 8:
                del found[min(place, end) : max(place, end)]
            case 5:
                found[: 8 + source.randrange(8)] = source.randbytes(8)
            case _:
                found += source.randbytes(source.randrange(1, 9))
    return bytes(found)


def as_before(delta_: Delta, path: Path) -> None:
    """Write a delta as versions before did."""
    tensors = {}
    for name, (positions, values) in delta_.items():
        tensors[f"{name}.indices"], tensors[f"{name}.values"] = positions.int(), values
    save_file(tensors, path, metadata={"format": "pt"})


def tried(path: Path, count: int, seed: int, earlier: bool = False) -> dict[str, int]:
    """Load changed files and apply what loads; return how many of them were refused when.

    Args:
        path: of the files.
        count: of files.
        seed: of the changes.
        earlier: the files are of a version before, without a checksum.
    """
    source, made = random.Random(seed), example()
    model = nn.ParameterDict({"w": torch.zeros(5_000_001).bfloat16(), "none": torch.zeros(3, 3).double()})
    model |= {"complex": torch.zeros(80_000, dtype=torch.complex64), "head_bias": torch.zeros(4)}
    made["head_bias"] = made.pop("head.bias")
    made.shapes["head_bias"], made.before = made.shapes.pop("head.bias"), {}
    (as_before if earlier else delta.save)(made, path)
    content, counts = path.read_bytes(), {"refused": 0, "refused, signed again": 0, "no change": 0, "loaded": 0}
    for number in range(count):
        other = changed(content, source)
        signed = number % 2 == 1
        other = resigned(other) if signed else other
        path.write_bytes(other)
        try:
            found = delta.load(path)
        except ValueError as error:
            counts["refused, signed again" if signed else "refused"] += str(path) in str(error)
            continue
        if other == content:
            counts["no change"] += 1
            continue
        # who changes a byte and does not know the format is found out
        assert signed or earlier, number
        counts["loaded"] += 1
        before = {name: param.detach().clone() for name, param in model.items()}
        try:
            delta.undo(model, delta.apply(model, found))
        except ValueError:
            counts["refused, signed again"] += 1
        for name, param in model.items():
            assert torch.equal(param, before[name]), name
    return counts


def test_changed_files_are_refused_and_write_nothing(tmp_path: Path) -> None:
    counts = tried(tmp_path / "task", 400, seed=1)
    assert sum(counts.values()) >= 400  # each refusal has a message with the path
    assert counts["refused"] + counts["no change"] >= 200


def test_changed_files_of_earlier_versions_crash_nothing_and_write_nothing(tmp_path: Path) -> None:
    tried(tmp_path / "task", 300, seed=3, earlier=True)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for earlier in (False, True):
            print(tried(Path(folder) / "task", int(sys.argv[1]), seed=2, earlier=earlier))
