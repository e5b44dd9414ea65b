"""Our optimizers in a Lightning Trainer: the example, resumption, and clipping where Lightning refuses its own.

An epoch, a checkpoint and one epoch more are two epochs, bit for bit.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from epi_kernels import EPIAdamW, SparseAdamW

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lightning_module

    yield lightning_module
    for name in ("lightning_module", "model", "tasks"):
        sys.modules.pop(name, None)


def test_the_example_trains_protects_and_logs(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "REFRESH", 2)
    example.main(["--steps", "6", "--out", str(tmp_path)])
    assert "step 6: 4932 of 493248 entries protected, " in capsys.readouterr().out
    (log,) = tmp_path.rglob("metrics.csv")
    (*_, last) = csv.DictReader(log.open())
    assert float(last["isolation/protected_share"]) == pytest.approx(0.01, abs=1e-5)
    assert float(last["isolation/jaccard"]) < 1.0
    assert float(last["isolation/released"]) > 0


class Blocks(LightningModule):
    """Blocks of linear maps."""

    def __init__(self, kind: str = "epi", **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        self.kind, self.settings = kind, settings

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.blocks(batch).square().mean()

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        if self.kind == "sparse":
            masks = {name: torch.rand(param.shape) < 0.2 for name, param in named}
            optimizer: Any = SparseAdamW(named, lr=0.01, trainable=masks)
        else:
            optimizer = EPIAdamW(named, lr=0.01, isolation_ratio=0.1, mask_interval=3, **self.settings)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data() -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(torch.randn(7, 4, 8), batch_size=None)


def fitted(module: Blocks, folder: Path, checkpoint: Any = None, **settings: Any) -> Trainer:
    usual: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(logger=CSVLogger(folder), log_every_n_steps=1, **{**usual, "max_epochs": 2, **settings})
    trainer.fit(module, data(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("kind", ["epi", "sparse"])
@pytest.mark.parametrize("way", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}])
def test_an_epoch_and_one_more_are_two(kind: str, way: dict[str, Any], tmp_path: Path) -> None:
    straight, half, resumed = Blocks(kind), Blocks(kind), Blocks(kind)
    fitted(straight, tmp_path, **way)
    fitted(half, tmp_path, max_epochs=1, **way).save_checkpoint(tmp_path / "half.ckpt")
    assert fitted(resumed, tmp_path, tmp_path / "half.ckpt", **way).global_step == 14
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    first, second = (module.optimizers(use_pl_optimizer=False) for module in (straight, resumed))
    for one, other in zip(first.state.values(), second.state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    if kind == "epi":
        record = first.telemetry(last=True)
        assert record["step"] == 12
        assert [layer["layer"] for layer in record["layers"]] == [f"blocks.{i}" for i in range(3)]


def test_fused_clips_in_the_step_where_lightning_refuses_its_own_clipping(tmp_path: Path) -> None:
    way: dict[str, Any] = {"precision": "bf16-mixed"}  # as "16-mixed", for which Lightning wants a GPU
    with pytest.raises(RuntimeError, match="gradient clipping"):
        fitted(Blocks(fused=True), tmp_path, gradient_clip_val=1e-3, **way)
    clipped, free = Blocks(fused=True, clip_grad_norm=1e-3), Blocks(fused=True)
    for module in (clipped, free):
        fitted(module, tmp_path, **way)
    moments = [
        module.optimizers(use_pl_optimizer=False).state[module.blocks[0].weight]["exp_avg"]
        for module in (clipped, free)
    ]
    norms = [float(moment.norm()) for moment in moments]
    assert norms[0] <= 1e-3 < norms[1]
