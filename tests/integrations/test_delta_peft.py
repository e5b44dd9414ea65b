"""Deltas of transformers' models: merged for from_pretrained, and as an adapter that PEFT loads, merges and takes out.

- A checkpoint of save_pretrained, in several files, loads with the trained weights after `merge`.
- PEFT computes the trained weights from the adapter, bit for bit, in float32 and in bfloat16, and gives the base back.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small import llama, rows
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from epi_kernels import SparseAdamW, delta
from epi_kernels.delta import checkpoint, export

LINEAR = ("q_proj.weight", "gate_proj.weight", "down_proj.weight")


def trained(model: LlamaForCausalLM, share: float, linear: bool) -> delta.Delta:
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(param.shape, generator=generator) < share
        for name, param in model.named_parameters()
        if name.endswith(LINEAR) or not linear
    }
    optimizer = SparseAdamW(model.named_parameters(), lr=0.01, trainable=masks)
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in ("input_ids", "labels")}
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.delta()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours
    )


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_checkpoint_loads_with_the_trained_weights(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    base = delta.digest(model)
    assert checkpoint.digest(tmp_path / "base") == base
    given = trained(model, 0.01, linear=False)
    given.base = base
    delta.save(given, tmp_path / "task.safetensors")
    read = delta.load(tmp_path / "task.safetensors")
    assert checkpoint.merge(tmp_path / "base", read, tmp_path / "out", digest=True) == []
    assert same(from_(tmp_path / "out", dtype), model)
    again = from_(tmp_path / "base", dtype)
    old = delta.apply(again, read, digest=True)
    assert same(again, model)
    delta.undo(again, old)
    assert delta.digest(again) == base


def from_(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.stack([row["input_ids"] for row in rows(4)])).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_gets_the_trained_weights_from_the_adapter(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama().to(dtype)
    model.save_pretrained(tmp_path / "base")
    given = trained(model, 0.05, linear=True)
    if dtype == torch.float32:
        # float32 has a number for a change that is small against the weight, and not for every other one
        with pytest.raises(ValueError, match="would not bring to the bits of the delta; merge the delta"):
            export.peft(tmp_path / "base", given, tmp_path / "adapter")
        params = dict(from_(tmp_path / "base", dtype).named_parameters())
        for name, (positions, _) in given.items():
            given[name] = (positions, params[name].detach().take(positions.long()) * 1.25)
    export.peft(tmp_path / "base", given, tmp_path / "adapter", base_model_name_or_path="base")
    expected, base = from_(tmp_path / "base", dtype), from_(tmp_path / "base", dtype)
    delta.apply(expected, given)
    adapted = PeftModel.from_pretrained(from_(tmp_path / "base", dtype), tmp_path / "adapter")
    assert not torch.equal(logits(base), logits(expected))
    assert torch.equal(logits(adapted), logits(expected))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(base))
    # what PEFT saves again is what was written
    adapted.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base, tmp_path / "again")
    assert torch.equal(logits(again), logits(expected))
    assert same(adapted.merge_and_unload(), expected)


def test_a_layer_that_is_not_linear_is_refused_by_peft(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    name = "model.embed_tokens.weight"
    export.peft(tmp_path / "base", {name: (torch.tensor([3]), torch.tensor([0.5]))}, tmp_path / "adapter")
    with pytest.raises(TypeError, match="not supported"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")
