"""The CPU path against torch: times and bytes of a step for each entry, and ratios to torch's fused AdamW.

    python bench/cpu.py                      # 2^24 and 2^26 entries, with one thread and with all
    python bench/cpu.py --compact            # moments, importances and weights in fewer bytes
    python bench/cpu.py --entries 20 --rounds 3 --compile

Prints a table and, with --json, writes the table with the machine and the versions. All candidates share the parameters
and their gradients; each has its own state, allocated as its optimizer allocates it. A copy of a float32 tensor of as
many entries runs in the same rounds: a share of its bandwidth is taken within rounds. Peak memory is what one step more
takes at most beyond parameters, gradients and states.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from cases import BASELINE, TENSORS, Candidate, bytes_of, candidates, compact_candidates, machine
from measure import Timing, interleave, peak_bytes, ratio

COPY, COPY_BYTES = "copy", 8  # bytes for each entry: one read, one written


def row(name: str, candidate: Candidate, timings: dict[str, Timing], entries: int, clock: str) -> dict[str, Any]:
    """Return the figures of one candidate on one clock."""
    own = timings[name].clock(clock)
    median = statistics.median(own)
    to_torch = ratio(own, timings[BASELINE].clock(clock))
    size = bytes_of(name, torch.float32, "cpu")
    copies = ratio(timings[COPY].clock(clock), own)
    share, share_least, share_greatest = (of * size / COPY_BYTES if size else None for of in copies)
    peak = peak_bytes(candidate)
    return {
        "step": name,
        "ns_per_entry": median / entries * 1e9,
        "bytes_per_entry": size,
        "state_bytes_per_entry": candidate.state_bytes() / entries,
        "peak_bytes_per_entry": None if peak is None else peak / entries,
        "gb_per_s": size * entries / median / 1e9 if size else None,
        "share_of_copy": share,
        "share_of_copy_least": share_least,
        "share_of_copy_greatest": share_greatest,
        "ratio": to_torch[0],
        "ratio_least": to_torch[1],
        "ratio_greatest": to_torch[2],
        "cpu_per_wall": sum(timings[name].cpu) / sum(timings[name].wall),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, nargs="+", default=[24, 26], help="powers of two [24 26]")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also eager EPI under torch.compile (slow to start)")
    parser.add_argument("--compact", action="store_true", help="compact states instead, in tensors of 2 dimensions")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    results = []
    for power in arguments.entries:
        if arguments.compact:
            steps = compact_candidates([((1 << power) // TENSORS // 1024, 1024)] * TENSORS)
        else:
            steps = candidates([((1 << power) // TENSORS,)] * TENSORS, compiled=arguments.compile)
        source = torch.ones(1 << power)  # zeros would be one page of memory, read again and again
        copy = functools.partial(torch.empty_like(source).copy_, source)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            title = f"2^{power} entries, {threads} thread{'s' if threads > 1 else ''}"
            timings = interleave({**steps, COPY: copy}, arguments.rounds, title)
            # waiting threads use the processor, so with several threads only the wall clock is meaningful
            clock = "cpu" if threads == 1 else "wall"
            rows = [row(name, step, timings, 1 << power, clock) for name, step in steps.items()]
            speed_of_copy = COPY_BYTES * (1 << power) / statistics.median(timings[COPY].clock(clock)) / 1e9
            case = {"entries": 1 << power, "threads": threads, "clock": clock, "copy_gb_per_s": speed_of_copy}
            results.append({**case, "steps": rows})
            print(
                f"\n{title} ({clock} time; ratio to {BASELINE}: median [least, greatest] of {arguments.rounds} rounds; "
                f"a copy: {speed_of_copy:.1f} GB/s)"
            )
            for figures in rows:
                speed = " " * 24
                if figures["gb_per_s"]:
                    speed = f"{figures['gb_per_s']:6.1f} GB/s, {figures['share_of_copy']:5.0%} of copy"
                peak = figures["peak_bytes_per_entry"]
                print(
                    f"  {figures['step']:<38}{figures['state_bytes_per_entry']:8.3f} B/entry kept"
                    f"{'' if peak is None else f'{peak:7.2f} more at most'}"
                    f"{figures['ns_per_entry']:8.3f} ns/entry {speed}  "
                    f"{figures['ratio']:6.2f} [{figures['ratio_least']:.2f}, {figures['ratio_greatest']:.2f}]  "
                    f"cpu/wall {figures['cpu_per_wall']:.2f}"
                )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
