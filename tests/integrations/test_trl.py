"""TRL's trainers with one line changed: layers are blocks, masks are chosen, and with `peft_config` adapters train.

With an adapter only the adapter's entries compete for protection, in the blocks of the model beneath.
"""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from small import ARGUMENTS, LAYERS, VOCABULARY, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from epi_kernels import EPIAdamW
from epi_kernels.integrations.transformers import IsolationCallback, optimizer_cls_and_kwargs

USUAL: dict[str, Any] = {**ARGUMENTS, "output_dir": "run", "max_steps": 6, "bf16": False}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(seed: int) -> str:
    words = torch.randint(VOCABULARY - 3, (8,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in words.tolist())


def run(trainer: Trainer) -> dict[str, Any]:
    """Train, and return the last record of the optimizer, whose figures must be in the logs."""
    trainer.train()
    record: dict[str, Any] = trainer.optimizer.optimizer.telemetry(last=True)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["isolation/refreshed_at"] == record["step"] == 6
    assert last["isolation/released"] == record["released"] > 0
    return record


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(checkpointing: bool) -> None:
    args = SFTConfig(**USUAL, gradient_checkpointing=checkpointing)
    trainer = SFTTrainer(
        llama(),
        args,
        train_dataset=Dataset.from_list([{"text": text(seed)} for seed in range(32)]),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(EPIAdamW, args, isolation_ratio=0.1, mask_interval=2),
        callbacks=[IsolationCallback()],
    )
    record = run(trainer)
    assert [layer["layer"] for layer in record["layers"]] == LAYERS
    assert record["protected"] == int(0.1 * sum(param.numel() for param in trainer.model.parameters()))


def test_sft_with_an_adapter() -> None:
    args = SFTConfig(**USUAL)
    trainer = SFTTrainer(
        llama(),
        args,
        train_dataset=Dataset.from_list([{"text": text(seed)} for seed in range(32)]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(EPIAdamW, args, isolation_ratio=0.1, mask_interval=2),
        callbacks=[IsolationCallback()],
    )
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    record = run(trainer)
    moved = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert record["eligible"] == sum(before[name].numel() for name in moved)
    assert [layer["layer"] for layer in record["layers"]] == [f"base_model.model.model.layers.{i}" for i in range(2)]


def test_an_optimizer_from_before_the_adapter_is_refused() -> None:
    model = llama()
    trainer = SFTTrainer(
        model,
        SFTConfig(**USUAL),
        train_dataset=Dataset.from_list([{"text": text(seed)} for seed in range(32)]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        optimizers=(EPIAdamW(model.named_parameters()), None),
        callbacks=[IsolationCallback()],
    )
    with pytest.raises(
        ValueError, match="made before the trainer put an adapter into the model, and would train nothing"
    ):
        trainer.train()


@pytest.mark.parametrize("adapter", [False, True])
def test_dpo_which_takes_the_factory_as_an_attribute(adapter: bool) -> None:
    args = DPOConfig(**USUAL)
    pairs = [{"prompt": text(i), "chosen": f" {text(i + 100)}", "rejected": f" {text(i + 200)}"} for i in range(32)]
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if adapter else None
    trainer = DPOTrainer(
        llama(),
        None if adapter else llama(),
        args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        peft_config=lora,
        callbacks=[IsolationCallback()],
    )
    trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs(EPIAdamW, args, isolation_ratio=0.1, mask_interval=2)
    layers = [layer["layer"] for layer in run(trainer)["layers"]]
    assert layers == ([f"base_model.model.model.layers.{i}" for i in range(2)] if adapter else LAYERS)
