"""Deltas: applying 0.1% of a bfloat16 model of 10^9 entries, undoing it, and its file.

    python bench/delta.py                      # half a minute, 2.2 GB of memory
    python bench/delta.py --entries 1e8 --threads 2 --json delta.json

The model has 250 tensors; the positions are drawn at random, the worst case for a cache. "values alone" writes the same
values with torch.Tensor.index_copy_: the entries are not read before, not compared with a checksum, and are lost. The
goal is less than 0.2 s for `apply` on the CPU. Times are wall time: the median and the extremes.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from cases import machine
from measure import Timing
from torch import nn
from tqdm import trange

from epi_kernels import delta
from epi_kernels.delta.container import read_header
from epi_kernels.delta.entries import checksum

TENSORS, GOAL = 250, 0.2


def model_of(entries: int) -> nn.ParameterDict:
    """Return a bfloat16 model of so many entries."""
    size = entries // TENSORS
    return nn.ParameterDict({f"layer{i}": torch.ones(size // 1000, 1000, dtype=torch.bfloat16) for i in range(TENSORS)})


def delta_of(model: nn.ParameterDict, share: float) -> delta.Delta:
    """Return a delta of a share of a model's entries, with checksums of what is there."""
    found = delta.Delta()
    for name, param in model.items():
        k = int(share * param.numel())
        positions = torch.randint(param.numel(), (k,)).unique().int()
        found[name] = (positions, torch.randn(len(positions)).bfloat16())
        found.shapes[name] = tuple(param.shape)
    found.before = {n: int(checksum(p, torch.ones(len(p)).bfloat16())) for n, (p, _) in found.items()}
    return found


def main() -> None:
    """Time everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=float, default=1e9, help="of the model (%(default)g)")
    parser.add_argument("--share", type=float, default=0.001, help="of the delta (%(default)g)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = model_of(int(options.entries))
    given = delta_of(model, options.share)
    wide = {name: (positions.long(), values) for name, (positions, values) in given.items()}
    timings = {name: Timing() for name in ("apply", "undo", "values alone", "save", "load")}

    def values_alone(values_of: Callable[[str], torch.Tensor]) -> None:
        with torch.no_grad():
            for name, (positions, _) in wide.items():
                model[name].view(-1).index_copy_(0, positions, values_of(name))

    olds: list[delta.Delta] = []
    before = delta.apply(model, given)
    delta.undo(model, before)
    for _ in trange(options.rounds, leave=False):
        timings["apply"].record(lambda: olds.append(delta.apply(model, given)))
        timings["undo"].record(lambda: delta.undo(model, olds.pop()))
        timings["values alone"].record(lambda: values_alone(lambda name: given[name][1]))
        values_alone(lambda name: before[name][1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.safetensors"
        for _ in range(options.rounds):
            timings["save"].record(lambda: delta.save(given, path))
            timings["load"].record(lambda: delta.load(path))
        size, header = path.stat().st_size, read_header(path).data
    count = sum(len(positions) for positions, _ in given.values())
    print(
        f"{count:,} of {options.entries:,.0f} entries; {(size - header) / count:.3f} bytes for each in the file, and a "
        f"header of {header:,}\n"
    )
    for name, timing in timings.items():
        times, median = timing.wall, statistics.median(timing.wall)
        goal = f"  goal {GOAL} s: {'met' if median < GOAL else 'NOT met'}" if name == "apply" else ""
        print(f"{name:<14}{median:7.3f} s  [{min(times):.3f}, {max(times):.3f}]{goal}")
    if options.json:
        seconds = {name: timing.wall for name, timing in timings.items()}
        figures = {"entries": count, "bytes": size, "bytes_of_header": header, "seconds": seconds}
        options.json.write_text(json.dumps({**machine(), **figures}, indent=1))


if __name__ == "__main__":
    main()
