"""A loop of one's own with accelerate: accumulation, clipping, precision, save_state and load_state, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small import LAYERS, llama, rows
from torch.utils.data import DataLoader

from epi_kernels import EPIAdamW, SparseAdamW


def optimizer_of(model: torch.nn.Module, kind: str) -> Any:
    if kind == "epi":
        return EPIAdamW(model.named_parameters(), lr=0.01, isolation_ratio=0.1, mask_interval=3)
    torch.manual_seed(2)
    masks = {name: torch.rand(param.shape) < 0.1 for name, param in model.named_parameters()}
    return SparseAdamW(model.named_parameters(), lr=0.01, trainable=masks)


def prepared(kind: str, precision: str) -> tuple[Accelerator, Any, Any, list[Any]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = llama()
    model, optimizer, data = accelerator.prepare(model, optimizer_of(model, kind), DataLoader(rows(112), batch_size=4))
    return accelerator, model, optimizer, list(data)  # 28 batches, 14 steps


def train(accelerator: Accelerator, model: Any, optimizer: Any, batches: list[Any]) -> None:
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["epi", "sparse"])
def test_seven_steps_and_seven_more_are_fourteen(kind: str, precision: str, tmp_path: Path) -> None:
    accelerator, model, optimizer, batches = prepared(kind, precision)
    train(accelerator, model, optimizer, batches[:14])
    accelerator.save_state(str(tmp_path / "half"))
    train(accelerator, model, optimizer, batches[14:])

    accelerator, resumed, other, batches = prepared(kind, precision)
    accelerator.load_state(str(tmp_path / "half"))
    train(accelerator, resumed, other, batches[14:])
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    if kind == "epi":
        record = optimizer.optimizer.telemetry(last=True)
        assert record["step"] == 12
        assert {layer["layer"] for layer in record["layers"]} == set(LAYERS)
