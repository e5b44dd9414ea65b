"""PIECE on a causal language model of transformers: train the most important entries, and keep them as a small file.

Batches are the dicts of a Trainer's collator. The model is small and random, made on the spot: this shows the calls, in
seconds, not what PIECE is worth. For a real one put `AutoModelForCausalLM.from_pretrained(...)` in its place.
"""

import argparse
import copy
from pathlib import Path
from pydoc_data.topics import topics  # the language reference behind help("if")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from epi_kernels import SparseAdamW
from epi_kernels.delta import apply_delta, load_delta, save_delta
from epi_kernels.importance import fisher
from epi_kernels.select import top_k

CONFIG = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def main(arguments: list[str] | None = None) -> None:
    """Run the example with these command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.05, help="share of the entries to train [%(default)s]")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the delta [%(default)s]")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "piece-transformers.safetensors"
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    model = copy.deepcopy(base)
    text = list("".join(topics.values()).encode())
    rows = torch.tensor(text[: len(text) // 64 * 64]).view(-1, 64)
    # labels are the inputs: transformers shifts them
    batches = [{"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in rows.split(16)]

    model.eval()  # dropout would add its noise to the scores
    mask = top_k(fisher(model, batches[:4], lambda model, batch: model(**batch).loss, progress=False), options.ratio)
    model.train()
    optimizer = SparseAdamW(model.named_parameters(), lr=1e-2, trainable=mask)
    for step, batch in enumerate(batches[4 : 4 + options.steps], 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, options.steps):
            print(f"step {step}: loss {loss.item():.3f}")

    save_delta(optimizer.delta(), file)
    apply_delta(base, load_delta(file))
    same = all(map(torch.equal, base.parameters(), model.parameters()))
    count = sum(int(chosen.sum()) for chosen in mask.values())
    print(f"{count:,} of {model.num_parameters():,} entries trained; the delta restores them: {same}")
