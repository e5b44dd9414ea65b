"""Times several ways to do the same thing, so that the ratios of their times can be trusted.

Machines drift: a neighbour, a hot core, a lower clock. Every round therefore runs each candidate once, in an order
that rotates, and a ratio is taken within a round. Reports quote the median over the rounds, with the extremes beside
it.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import trange

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@dataclass
class Timing:
    """The times of one candidate in seconds, a value for each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of the whole process: all its threads

    def record(self, run: Callable[[], object]) -> None:
        """Run once and note both clocks."""
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def clock(self, name: str) -> list[float]:
        """Return the values of one clock, "wall" or "cpu"."""
        return self.wall if name == "wall" else self.cpu


# The device is kept busy for this many cycles, 5 to 7 ms, before a measurement. An idle device would pass the first
# event at once and then wait for the host between the events: 0.2 ms of Python in a step of 1 ms.
HEAD_START = 10_000_000


@dataclass
class GPUTiming(Timing):
    """The times on a CUDA device: `wall` is measured by the device, `cpu` is the time until the host is free again.

    A step that keeps the host for longer than the head start, or sends more launches than the driver queues (about
    1000), is timed together with the device's waits for the host.
    """

    def record(self, run: Callable[[], object]) -> None:
        """Run once between two events, queued behind HEAD_START."""
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        before = time.perf_counter()
        run()
        self.cpu.append(time.perf_counter() - before)
        end.record()
        end.synchronize()
        self.wall.append(start.elapsed_time(end) / 1e3)


@dataclass
class RankTiming(Timing):
    """The times on one rank of a process group, all of whose ranks run the same candidates in the same order."""

    def record(self, run: Callable[[], object]) -> None:
        """Wait for the other ranks, so that all begin together, then run once."""
        dist.barrier()
        super().record(run)


# The number of dummy kernels before the kernels that are counted. Profilers before CUDA 13.1 may lose the first kernels
# of a session, and more of them later in a process (github.com/pytorch/pytorch/issues/192021).
SENTINELS = 512


def kernels(step: Callable[[], object]) -> list[str] | None:
    """Return the names of the kernels that a step launches on a CUDA device, without the driver's copies and fills.

    None if the profiler has lost all dummy kernels (sentinels), and so perhaps also kernels of the step.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(SENTINELS):
            torch.cuda._sleep(1)
        torch.cuda.synchronize()
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not any("spin_kernel" in name for name in names):
        return None
    # torch's own annotation of a step is also an event on the device
    others = ("Memcpy", "Memset", "Optimizer.")
    return [name for name in names if "spin_kernel" not in name and not name.startswith(others)]


def interleave(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    title: str,
    warm_up: int = 2,
    timing: type[Timing] = Timing,
) -> dict[str, Timing]:
    """Return the timings of every candidate, `rounds` values each, after `warm_up` runs that are not counted.

    `title` stands beside a progress bar; "" shows none.
    """
    timings = {name: timing() for name in candidates}
    names = list(candidates)
    for _ in range(warm_up):
        for name in names:
            candidates[name]()
    for number in trange(rounds, desc=title, leave=False, disable=not title):
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            timings[name].record(candidates[name])
    return timings


def ratio(of: list[float], to: list[float]) -> tuple[float, float, float]:
    """Return (median, least, greatest) of the ratios within rounds."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def quartiles(of: list[float], to: list[float]) -> tuple[float, float, float]:
    """Return (median, lower quartile, upper quartile) of the ratios within rounds, of which there are two or more."""
    lower, median, upper = statistics.quantiles([a / b for a, b in zip(of, to, strict=True)], method="inclusive")
    return median, lower, upper


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Run once, and return how many bytes of memory the process had at most beyond what it had before.

    Linux counts whole pages, to within 1 MiB. Memory that is free but still the process's is given back first: a run
    that took it again would look as if it needed none. None where the system does not count (/proc/self/clear_refs).
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what the process has
    except (AttributeError, OSError):
        return None
    before = _peak()
    run()
    return _peak() - before


def _peak() -> int:
    """Return the most bytes of memory that this process has had since the peak was last set back."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
