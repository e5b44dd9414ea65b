"""Deltas and checkpoints in files: what a model would get, without the model, and nothing where something does not fit.

- A sharded checkpoint is merged, patched and undone bit for bit; all other bytes and files are as they were.
- SGLang's versions and vLLM's patches are read by readers written from their sources, and give the same weights.
- The command line says what it did, and what is wrong.
"""

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epi_kernels import SparseAdamW, delta
from epi_kernels.__main__ import main
from epi_kernels.delta import Delta, checkpoint, export

# SGLang decompresses with this package; the reader here knows frames of raw blocks alone
try:
    import zstandard
except ModuleNotFoundError:
    zstandard = None


class Body(nn.Module):
    """Parameters of several dtypes, one of them tied, and one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8).bfloat16()
        self.up = nn.Linear(8, 33, bias=False).bfloat16()
        self.norm = nn.LayerNorm(33)
        self.scale = nn.Parameter(torch.tensor(2.0).half())
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def saved(model: nn.Module, folder: Path) -> Path:
    """Save a model in two files, as save_pretrained does, with what else is in such a folder."""
    folder.mkdir()
    tensors, map_ = state(model), {}
    for number, names in enumerate((["embed.weight", "scale"], ["up.weight", "norm.weight", "norm.bias"]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        map_ |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": map_}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "vocab.txt").write_text("a")
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def task(model: nn.Module) -> Delta:
    """Train a third of the entries."""
    masks = {n: torch.arange(p.numel()).view(p.shape) % 3 == 0 for n, p in model.named_parameters()}
    optimizer = SparseAdamW(model.named_parameters(), lr=0.1, trainable=masks)
    for step in range(3):
        torch.manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()
    return optimizer.delta()


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor], Delta]:
    """Return a checkpoint, the file of a delta, the trained parameters, and the delta."""
    model = Body()
    base = saved(model, tmp_path / "base")
    given = task(model)
    given.base = checkpoint.digest(base)
    delta.save(given, tmp_path / "task.safetensors")
    return base, tmp_path / "task.safetensors", state(model), given


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def test_a_merged_checkpoint_has_the_trained_weights_and_all_else_of_its_base(made: Any, tmp_path: Path) -> None:
    base, _, expected, given = made
    before = contents(base)
    for stale in ("pytorch_model.bin", "model.fp16.safetensors", ".gitattributes"):
        (base / stale).write_bytes(b"of the base")
    left_out = checkpoint.merge(base, given, tmp_path / "new" / "out", digest=True)
    assert left_out == [".gitattributes", "model.fp16.safetensors", "pytorch_model.bin"]
    out = tmp_path / "new" / "out"
    assert equal(loaded(out), expected)
    after = contents(out)
    assert after.keys() == before.keys()
    for name, content in after.items():
        if not name.endswith(".safetensors"):
            assert content == before[name]
    # headers are copied, byte for byte
    assert all(after[name][:64] == before[name][:64] for name in after)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert delta.digest({n: t for n, t in expected.items()}) == checkpoint.digest(out)


def test_a_delta_is_applied_in_place_and_undone_bit_for_bit(made: Any, tmp_path: Path) -> None:
    base, _, expected, given = made
    before = contents(base)
    old = checkpoint.apply(base, given, tmp_path / "old")
    assert equal(loaded(base), expected)
    assert old.before == delta.load(tmp_path / "old").before
    with pytest.raises(ValueError, match="other values .* than the model from which the delta was made"):
        checkpoint.apply(base, given, tmp_path / "again")
    with pytest.raises(FileExistsError, match="may be what undoes another delta"):
        checkpoint.apply(base, given, tmp_path / "old")
    checkpoint.undo(base, delta.load(tmp_path / "old"))
    assert contents(base) == before
    with pytest.raises(ValueError, match="have been overwritten since"):
        checkpoint.undo(base, old)
    assert contents(base) == before


def test_one_file_may_be_patched_whose_tensors_are_not_aligned(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode() + b" "
    content = len(text).to_bytes(8, "little") + text + b"abc" + struct.pack("<2f", 1.0, 2.0)
    (tmp_path / "m.safetensors").write_bytes(content)
    given = {"b": (torch.tensor([1]), torch.tensor([7.0]))}
    old = checkpoint.apply(tmp_path / "m.safetensors", given, tmp_path / "old")
    assert (tmp_path / "m.safetensors").read_bytes() == content[:-4] + struct.pack("<f", 7.0)
    checkpoint.undo(tmp_path / "m.safetensors", old)
    assert (tmp_path / "m.safetensors").read_bytes() == content


def test_what_does_not_fit_is_refused_and_nothing_is_written(made: Any, tmp_path: Path) -> None:
    base, _, _, given = made
    before = contents(base)
    good = (torch.tensor([0]), torch.tensor([9.0]).bfloat16())
    wrong = {"base": "f" * 32, "shapes": {"embed.weight": (8, 20)}}
    for one, options, message in (
        (
            {"embed.weight": good, "emned.weight": good},
            {},
            "the checkpoint has not; the nearest names are embed",
        ),
        ({"embed.weight": good, "module.embed.weight": good}, {}, "which are one parameter of the checkpoint"),
        ({"embed.weight": (torch.tensor([160]), good[1])}, {}, "from 160 to 160 in embed.weight, which has 160"),
        ({"embed.weight": (good[0], torch.ones(1))}, {}, "is torch.bfloat16 in the checkpoint and torch.float32"),
        (Delta({"embed.weight": good}, shapes=wrong["shapes"]), {}, r"shape \(20, 8\) in the checkpoint and \(8, 20\)"),
        (Delta({"embed.weight": good}, base="f" * 32), {"digest": True}, f"digest is {given.base} and that of"),
        (Delta({"embed.weight": good}, before={"embed.weight": 1}), {}, "other values .* Merge it into the base"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.merge(base, one, tmp_path / "out", **options)
        with pytest.raises(ValueError, match=message.replace("Merge it into", "Apply it to")):
            checkpoint.apply(base, one, tmp_path / "old", **options)
    assert contents(base) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "task.safetensors"}
    checkpoint.merge(base, {"embed.weight": (good[0], torch.ones(1) * 1.001)}, tmp_path / "out", convert=True)
    assert loaded(tmp_path / "out")["embed.weight"][0, 0] == 1


def test_checkpoints_that_are_none_are_refused(made: Any, tmp_path: Path) -> None:
    base, _, _, given = made
    first, second = sorted(base.glob("*.safetensors"))
    index = base / "model.safetensors.index.json"
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        checkpoint.merge(tmp_path / "nowhere", given, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="has no .*safetensors; save the model with save_pretrained"):
        checkpoint.merge(tmp_path / "empty", given, tmp_path / "out")
    with pytest.raises(FileExistsError, match="full exists and is not empty"):
        checkpoint.merge(base, given, tmp_path / "full")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        checkpoint.merge(first, given, tmp_path / "out")
    text = index.read_text()
    for wrong in ("{}", "[", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(wrong)
        with pytest.raises(ValueError, match="is no index of a sharded checkpoint"):
            checkpoint.merge(base, given, tmp_path / "out")
    index.write_text(text)
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="00002-of-00002.safetensors has .* truncated"):
        checkpoint.merge(base, given, tmp_path / "out")
    second.unlink()
    with pytest.raises(FileNotFoundError, match="names model-00002-of-00002.safetensors, which is not there"):
        checkpoint.merge(base, given, tmp_path / "out")
    (tmp_path / "blob").write_bytes(content)
    second.symlink_to(tmp_path / "blob")
    with pytest.raises(ValueError, match="is a link, and others may use its file; merge into a folder of its own"):
        checkpoint.apply(base, given, tmp_path / "old")
    assert not (tmp_path / "old").exists()
    checkpoint.merge(base, given, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_merge_that_fails_leaves_nothing(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, _, given = made

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.merge(base, given, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "task.safetensors"}


# SGLang ---------------------------------------------------------------------------------------------------------------


def decompressed(frame: bytes) -> bytes:
    """Return the content of a frame of zstandard of raw blocks, by RFC 8878."""
    assert frame[:4] == b"\x28\xb5\x2f\xfd"
    assert frame[4] == 0b11100000  # 8 bytes of content size, a single segment, no checksum and no dictionary
    size, at, found = int.from_bytes(frame[5:13], "little"), 13, b""
    while True:
        header = int.from_bytes(frame[at : at + 3], "little")
        assert header >> 1 & 3 == 0
        assert header >> 3 <= 1 << 17
        found += frame[at + 3 : at + 3 + (header >> 3)]
        at += 3 + (header >> 3)
        if header & 1:
            break
    assert (len(found), at) == (size, len(frame))
    if zstandard is not None:
        assert zstandard.ZstdDecompressor().decompress(frame) == found
    return found


def pulled(local: Path, version_dir: Path, applied: int) -> dict[str, bytes]:
    """Return the bytes of every tensor after an update, as sglang.srt.weight_sync.local_checkpoint makes them."""
    about = json.loads((version_dir / "model.safetensors.index.json").read_text())["metadata"]
    assert int(about["base_version"]) == applied
    assert int(about["version"]) == applied + 1
    assert about["compression_format"] == "zstd"
    assert about["delta_encoding"] == "overwrite"
    assert about["checksum_format"] == "adler32"
    found = {name: bytearray(t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in loaded(local).items()}
    for file in sorted(version_dir.glob("*.safetensors")):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        checksums = header.pop("__metadata__", {})
        for name, said in header.items():
            begin, end = (8 + length + offset for offset in said["data_offsets"])
            patch = decompressed(content[begin:end])
            count = int.from_bytes(patch[:4], "little")
            positions = struct.unpack(f"<{count}I", patch[4 : 4 + 4 * count])
            assert list(positions) == sorted(set(positions))
            for position, byte in zip(positions, patch[4 + 4 * count :], strict=True):
                found[name][position] = byte
            assert f"{zlib.adler32(found[name]):08x}" == checksums[name]
    return {name: bytes(content) for name, content in found.items()}


def test_sglang_gets_the_trained_weights_version_after_version(made: Any, tmp_path: Path) -> None:
    base, _, expected, given = made
    versions = tmp_path / "versions"
    made_version = export.sglang(base, given, versions)
    assert made_version == versions / "weight_v000001"
    after = pulled(base, made_version, 0)
    assert after == {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in expected.items()}
    index = json.loads((made_version / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == given.keys()
    # the next one starts from the merged checkpoint; what is not changed is left out
    checkpoint.merge(base, given, tmp_path / "merged")
    second = {"up.weight": given["up.weight"], "scale": (torch.tensor([0]), torch.tensor([3.0]).half())}
    pulled(tmp_path / "merged", export.sglang(tmp_path / "merged", second, versions, 2), 1)
    index = json.loads((versions / "weight_v000002" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {"scale"}
    with pytest.raises(FileExistsError, match="weight_v000002 exists and is not empty"):
        export.sglang(tmp_path / "merged", second, versions, 2)
    with pytest.raises(ValueError, match="version is 0; the checkpoint that a server starts with is 0"):
        export.sglang(base, given, versions, 0)
    with pytest.raises(ValueError, match="Give the checkpoint that its task began with"):
        export.sglang(tmp_path / "merged", given, versions, 3)


def test_a_large_patch_has_several_blocks() -> None:
    content = random.Random(0).randbytes(300_000)
    assert decompressed(export._frame(content)) == content


# vLLM -----------------------------------------------------------------------------------------------------------------


def test_vllm_gets_patches_that_its_sender_takes_and_that_give_the_trained_weights(made: Any) -> None:
    base, _, expected, given = made
    weights = loaded(base)
    patches = export.vllm(given)
    assert [patch.name for patch in patches] == list(given)
    for patch in patches:
        # what _validate_patch of vLLM's engine asks for, and that both are contiguous (vllm #57130)
        assert patch.indices.dtype == torch.int32
        assert patch.indices.ndim == patch.values.ndim == 1
        assert patch.indices.numel() == patch.values.numel()
        assert patch.indices.is_contiguous()
        assert patch.values.is_contiguous()
        assert patch.full_shape == tuple(weights[patch.name].shape)
        weights[patch.name].view(-1).index_copy_(0, patch.indices.long(), patch.values)
    assert equal(weights, expected)
    assert export.vllm({}, dict) == []
    assert list(export.vllm(given, dict)[0]) == ["name", "indices", "values", "full_shape"]


def test_what_vllm_cannot_take_is_refused() -> None:
    one, shapes = (torch.tensor([1]), torch.tensor([0.5])), {"w": (2, 1)}
    for given, message in (
        ({"w": one}, r"vLLM needs the shape of w; set delta.shapes\['w'\] ="),
        (
            Delta({"w": one}, shapes={"w": (1 << 16, 1 << 15)}),
            "w has 2147483648 entries, and vLLM has positions",
        ),
        (Delta({"w": (one[0], torch.tensor([1]))}, shapes=shapes), "values of torch.int64"),
        (
            Delta({"w": (one[0], one[1] * torch.nan)}, shapes=shapes),
            "w has a NaN, with which vLLM marks",
        ),
        (Delta({"w": (one[0] + 1, one[1])}, shapes=shapes), "positions from 2 to 2 in w, which has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            export.vllm(given)


# PEFT, of which tests/integrations/test_delta_peft.py is the other half ---------------------------------------------


def test_what_shira_cannot_say_exactly_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weights = {"up.weight": torch.full((8, 8), 1e-30), "norm.weight": torch.ones(8), "thin.weight": torch.ones(2, 40)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    one = (torch.tensor([3]), torch.tensor([2.0]))
    for given, message in (
        ({}, "the delta has no parameters"),
        ({"norm.weight": one}, r"norm.weight of shape \(8,\) is no weight of a linear layer"),
        (
            {"thin.weight": (torch.arange(43), torch.ones(43))},
            "has 80 entries, and SHiRA would change 84 .* for r=2; merge",
        ),
        ({"up.weight": (one[0], torch.tensor([torch.nan]))}, "would not bring to the bits"),
        ({"up.weight": (one[0], torch.tensor([-0.0]))}, "up.weight has entries that PEFT's sum"),
    ):
        with pytest.raises(ValueError, match=message):
            export.peft(tmp_path / "base", given, tmp_path / "out")
    zeros = {"up.weight": torch.full((8, 8), -0.0)}
    save_file(zeros, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="up.weight has too few entries that an added 0 leaves as they are"):
        export.peft(tmp_path / "base", {"up.weight": one}, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


# The command line -----------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["delta", *map(str, arguments)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as found:
        main(["delta", *map(str, arguments)])
    assert found.value.code == 2
    return capsys.readouterr().err


def test_a_task_from_the_command_line(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file, expected, given = made
    before = contents(base)
    entries = sum(len(positions) for positions, _ in given.values())
    out = told(capsys, "inspect", file)
    assert f"{entries} in 5 parameters, bfloat16, float16, float32" in out
    assert f"base        {given.base}" in out
    assert "known by a checksum in 5 of 5 parameters" in out
    assert "embed.weight  54 of 160 (33.750%)" in out
    assert f"{entries} entries of the delta" in told(capsys, "merge", base, file, tmp_path / "out", "--digest")
    assert equal(loaded(tmp_path / "out"), expected)
    assert "undo with" in told(capsys, "apply", base, file, "--undo", tmp_path / "old")
    assert equal(loaded(base), expected)
    assert f"{entries} entries written back" in told(capsys, "undo", base, tmp_path / "old")
    assert contents(base) == before
    assert "weight_v000001" in told(capsys, "export", base, file, tmp_path / "versions", "--to", "sglang")
    for old in ("embed", "nowhere"):
        message = refused(capsys, "merge", base, file, tmp_path / "no", "--rename", f"{old}.weight=body.weight")
        assert ("the checkpoint has not" if old == "embed" else "the delta has no such name") in message
    assert "is not OLD=NEW" in refused(capsys, "merge", base, file, tmp_path / "no", "--rename", "a")
    assert "is no weight of a linear layer" in refused(capsys, "export", base, file, tmp_path / "no", "--to", "peft")
    assert "--version is for sglang" in refused(
        capsys, "export", base, file, tmp_path / "no", "--to", "peft", "--version=2"
    )
    assert "does not exist" in refused(capsys, "merge", tmp_path / "none", file, tmp_path / "no")
    assert "is no safetensors file" in refused(capsys, "inspect", base / "config.json")
    assert "No such file" in refused(capsys, "inspect", tmp_path / "none")
    assert not (tmp_path / "no").exists()


def test_deltas_combine_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, values in enumerate(([1.0, 2.0], [1.0, 3.0])):
        entries = (torch.tensor([0, 4 + 0 * number]), torch.tensor(values))
        delta.save(Delta({"w": entries}, before={"w": 1}), tmp_path / str(number))
    out = told(capsys, "combine", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "both")
    assert "2 entries of 2 deltas; 1 conflicts" in out
    assert "w  1 have the value of the last delta" in out
    assert "1 parameters have no checksum of old values" in out
    assert delta.load(tmp_path / "both")["w"][1].tolist() == [1.0, 3.0]
    out = told(capsys, "combine", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "both", "--consecutive")
    assert "0 conflicts" in out
    save_file({"w": torch.zeros(5)}, tmp_path / "base.safetensors")
    for number in range(2):
        delta.save(delta.load(tmp_path / str(number)).copy(), tmp_path / str(number))  # without what they found
    out = told(
        capsys,
        "combine",
        tmp_path / "0",
        tmp_path / "1",
        "--out",
        tmp_path / "both",
        "--base",
        tmp_path / "base.safetensors",
    )
    assert "no checksum" not in out
    assert delta.load(tmp_path / "both").before.keys() == {"w"}
    many = {f"layer{i}": (torch.arange(i), torch.ones(i)) for i in range(12)}
    delta.save(many, tmp_path / "many")
    assert "and 2 more: --all" in told(capsys, "inspect", tmp_path / "many")
    out = told(capsys, "inspect", tmp_path / "many", "--all")
    assert "more" not in out
    assert "layer11  11\n" in out
