"""Train the demo's model sharded over two processes with FSDP2, isolation included. On GPUs or without any.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Nothing is different from training in one process but `fully_shard`: the masks are those that one process would choose
by the same gradients, and a checkpoint of torch.distributed loads on any number of ranks.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from model import ByteTransformer
from tasks import CONTEXT, IGNORED, make_tasks
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from epi_kernels import EPIAdamW

BATCH = 12  # windows of CONTEXT bytes, on every rank


def main() -> None:
    """Train on this rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out/fsdp2"), help="folder of the checkpoint [%(default)s]")
    options = parser.parse_args()

    rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")

    torch.manual_seed(0)
    model = ByteTransformer(CONTEXT).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = EPIAdamW(model.named_parameters(), lr=2e-3, isolation_ratio=0.01, mask_interval=20)

    task = make_tasks()[0]
    batches = torch.Generator().manual_seed(dist.get_rank())  # each rank its own
    for step in range(1, options.steps + 1):
        inputs, targets = (t.to(device) for t in task.batch(BATCH, batches))
        loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 and dist.get_rank() == 0:
            last = optimizer.telemetry()[-1]
            print(f"step {step}: loss {loss.item():.2f}, {last['protected']} of {last['eligible']} entries protected")

    state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=options.out)
    held = sum(optimizer.isolation_mask(param).sum() for param in model.parameters())
    print(f"rank {dist.get_rank()} holds {int(held)} of the protected entries; checkpoint in {options.out}", flush=True)
    dist.barrier()  # no rank takes its connections down while another has use for them
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
