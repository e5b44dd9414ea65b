"""Train the demo's model with Lightning: the optimizer is the one line that isolation changes. On a GPU or without any.

    pip install lightning
    python examples/lightning_module.py

Lightning's checkpoints, schedulers, accumulation, precisions and strategies take EPIAdamW as they take torch's AdamW.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from model import ByteTransformer
from tasks import CONTEXT, IGNORED, make_tasks
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from epi_kernels import EPIAdamW

BATCH = 12  # windows of CONTEXT bytes
REFRESH = 20  # steps from one choice of the protected entries to the next


class Bytes(LightningModule):
    """A byte-level transformer that predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ByteTransformer(CONTEXT)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return EPIAdamW in the place of ``torch.optim.AdamW(self.parameters(), lr=2e-3)``.

        With ``fused=True`` the optimizer unscales the gradients in its step. Under a mixed precision Lightning then
        refuses ``Trainer(gradient_clip_val=1.0)``, as it does for torch's: write ``clip_grad_norm=1.0`` here instead.
        """
        return EPIAdamW(self.named_parameters(), lr=2e-3, isolation_ratio=0.01, mask_interval=REFRESH)

    def on_train_batch_end(self, *batch: Any) -> None:
        """Log what the last refresh did; reading that waits for the device, so only where Lightning logs."""
        if self.global_step % self.trainer.log_every_n_steps == 0:
            record = self.optimizers(use_pl_optimizer=False).telemetry(last=True)
            if record is not None:
                keys = ("protected_share", "locked", "released", "jaccard", "nonfinite")
                self.log_dict({f"isolation/{key}": float(record[key]) for key in keys})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print what is protected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="[%(default)s]")
    parser.add_argument(
        "--out", type=Path, default=Path("out/lightning"), help="folder of log and checkpoint [%(default)s]"
    )
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    task, generator = make_tasks()[0], torch.Generator().manual_seed(0)
    batches = [task.batch(BATCH, generator) for _ in range(options.steps)]
    trainer = Trainer(max_epochs=1, logger=CSVLogger(options.out), log_every_n_steps=REFRESH, enable_progress_bar=False)
    module = Bytes()
    trainer.fit(module, DataLoader(batches, batch_size=None))
    last = module.optimizers(use_pl_optimizer=False).telemetry(last=True)
    print(
        f"step {trainer.global_step}: {last['protected']} of {last['eligible']} entries protected, "
        f"{last['released']} released at the last refresh; log in {trainer.log_dir}"
    )


if __name__ == "__main__":
    main()
