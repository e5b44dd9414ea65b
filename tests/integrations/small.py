"""A small causal language model with random weights, and data for it."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


# what every run of a Trainer is given here
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 0.01,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def llama(**config: Any) -> LlamaForCausalLM:
    """Return a Llama of 2 blocks; the same weights at each call."""
    torch.manual_seed(0)
    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**usual, **config}))


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Return examples of 8 tokens, each to be predicted from those before it."""
    tokens = torch.randint(VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


LAYERS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head", "model.norm"]
