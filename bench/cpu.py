"""The CPU path against torch: a step's time for each entry, bytes moved and kept, and ratios to torch's fused AdamW.

    python bench/cpu.py                      # 2^24 and 2^26 entries, with one thread and with all
    python bench/cpu.py --compact            # moments, importances and weights in fewer bytes
    python bench/cpu.py --entries 20 --rounds 3 --compile

Prints a table and, with --json, writes the table with the machine and the versions. All candidates share the parameters
and their gradients; each has its own state, allocated as its optimizer allocates it.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from cases import BASELINE, TENSORS, Candidate, bytes_of, candidates, compact_candidates, machine
from measure import Timing, interleave, ratio


def row(name: str, candidate: Candidate, timings: dict[str, Timing], entries: int, clock: str) -> dict[str, Any]:
    """Return the figures of one candidate on one clock."""
    own = timings[name].clock(clock)
    median = statistics.median(own)
    to_torch = ratio(own, timings[BASELINE].clock(clock))
    size = bytes_of(name, torch.float32, "cpu")
    return {
        "step": name,
        "ns_per_entry": median / entries * 1e9,
        "bytes_per_entry": size,
        "state_bytes_per_entry": candidate.state_bytes() / entries,
        "gb_per_s": size * entries / median / 1e9 if size else None,
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
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            title = f"2^{power} entries, {threads} thread{'s' if threads > 1 else ''}"
            timings = interleave(steps, arguments.rounds, title)
            # waiting threads use the processor, so with several threads only the wall clock is meaningful
            clock = "cpu" if threads == 1 else "wall"
            rows = [row(name, step, timings, 1 << power, clock) for name, step in steps.items()]
            results.append({"entries": 1 << power, "threads": threads, "clock": clock, "steps": rows})
            print(
                f"\n{title} ({clock} time; ratio to {BASELINE}: median [least, greatest] of {arguments.rounds} rounds)"
            )
            for figures in rows:
                speed = f"{figures['gb_per_s']:6.1f} GB/s" if figures["gb_per_s"] else " " * 11
                print(
                    f"  {figures['step']:<38}{figures['state_bytes_per_entry']:8.3f} B/entry kept"
                    f"{figures['ns_per_entry']:8.3f} ns/entry {speed}  "
                    f"{figures['ratio']:6.2f} [{figures['ratio_least']:.2f}, {figures['ratio_greatest']:.2f}]  "
                    f"cpu/wall {figures['cpu_per_wall']:.2f}"
                )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
