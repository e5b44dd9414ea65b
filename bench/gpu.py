"""The GPU path against torch: time, bandwidth, launches and host time of a step, and whether it meets its targets.

    python bench/gpu.py --json bench/results     # or `make gpu-bench`
    python bench/gpu.py --device cpu             # a small rehearsal without a GPU, whose times mean nothing

All candidates of a case share parameters and gradients, and run once in every round, in an order that rotates. Times
are measured on the device, between two events. Launches are counted in one case, when all times are known: the profiler
slows all later launches. Writes <folder>/<device>.json after every case, so that a run that is cut short loses only one
case; a case that fails is recorded as failed, and the next case is measured.
"""

import argparse
import gc
import json
import os
import re
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import (
    BASELINE,
    BYTES,
    COMPACT,
    COMPILED_EAGER,
    DEFAULT,
    EAGER,
    EPI,
    IN_EXP_AVG_SQ,
    REFRESH,
    SPARSE,
    TENSORS,
    Candidate,
    Shapes,
    bytes_of,
    candidates,
    compact_candidates,
    machine,
    said_by,
)
from measure import GPUTiming, Timing, interleave, kernels, ratio
from predict import predicted_ms
from tqdm import tqdm

INTERVAL = 500  # steps from one refresh to the next
ALL = tuple(name for name in BYTES if name not in (COMPILED_EAGER, DEFAULT))
LARGE = (BASELINE, EPI)  # candidates where the states of all do not fit
STORED = (BASELINE, EPI, *COMPACT)

# bytes of memory that the candidates of a case need for each entry, float32: p, g and every candidate's states
MEMORY = {ALL: 138, LARGE: 8 + 8 + 12 + 4, STORED: 84}

# the targets of a case: (candidate, figure, comparison, value, the number of entries from which the target applies); a
# "ratio" applies only in float32, where torch's states are as wide as ours
TARGETS = (
    *[(name, "share_of_copy", ">=", 0.92, 1 << 26) for name in (EPI, IN_EXP_AVG_SQ, "isolation off", "fixed mask")],
    (EPI, "ratio", "<=", 1.30, 1 << 26),
    (IN_EXP_AVG_SQ, "ratio", "<=", 1.02, 1 << 26),
    # it moves 100 bytes for each entry and EPI 36: 2.8 by bytes
    (EAGER, "ratio_to_epi", ">=", 2.5, 1 << 26),
    (REFRESH, "amortised", "<=", 0.004, 1 << 26),
    # at 2^26 a hundredth of the step of torch is 5 to 7 us on an H100 or H200: a launch and three dependent reads
    (SPARSE, "times_faster_than_dense", ">=", 100.0, 1 << 28),
)


LLAMA = "Llama-3-8B at 1/8"


def llama(fraction: int) -> Shapes:
    """Return the 291 shapes of Llama-3-8B with every width divided by `fraction`."""
    hidden, inner, heads, vocabulary = (width // fraction for width in (4096, 14336, 1024, 128256))
    attention = [(hidden, hidden), (heads, hidden), (heads, hidden), (hidden, hidden)]
    block = [*attention, (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *block * 32, (hidden,), (vocabulary, hidden)]


def tiny() -> Shapes:
    """Return the shapes of 2000 tensors of 64 to 4096 entries."""
    generator = torch.Generator().manual_seed(0)
    return [(int(size),) for size in torch.randint(64, 4097, (2000,), generator=generator)]


def cases(rehearsal: bool) -> list[tuple[str, Shapes, torch.dtype, tuple[str, ...]]]:
    """Return (title, shapes, dtype of parameters and gradients, candidates)."""
    found = [(LLAMA, llama(64 if rehearsal else 8), torch.bfloat16, ALL)]
    for power in (12, 16) if rehearsal else (22, 24, 26, 28):
        shapes = [((1 << power) // TENSORS,)] * TENSORS
        for dtype in (torch.float32, torch.bfloat16):
            found.append((f"2^{power} entries, {str(dtype)[6:]}", shapes, dtype, ALL))
    for power in (16,) if rehearsal else (26, 28):
        shapes = [((1 << power) // TENSORS // 1024, 1024)] * TENSORS
        found.append((f"2^{power} entries in rows of 1024, compact", shapes, torch.float32, STORED))
    if not rehearsal:
        found.append(("2^30 entries, float32", [((1 << 30) // TENSORS,)] * TENSORS, torch.float32, LARGE))
    found.append(("2000 tiny tensors", tiny()[:: 50 if rehearsal else 1], torch.float32, ALL))
    return found


def copy_bandwidth(device: str) -> float:
    """Return the bytes per second that large copies read and write, the median of ten."""
    source = torch.empty(1 << (28 if device == "cuda" else 20), device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, 10, "copy", timing=timing_on(device))["copy"]
    return 2 * source.numel() * 4 / statistics.median(timing.wall)


def timing_on(device: str) -> type[Timing]:
    """Return the class that times runs on a device."""
    return GPUTiming if device == "cuda" else Timing


def launches(device: str) -> dict[str, int | None]:
    """Return how many kernels the step of each candidate launches; None if that cannot be known."""
    _, shapes, dtype, names = next(case for case in cases(device == "cpu") if case[0] == LLAMA)
    found = {}
    for name, step in candidates(shapes, names=names, device=device, dtype=dtype).items():
        launched = kernels(step) if device == "cuda" else None
        found[name] = None if launched is None else len(launched)
        print(f"  {name:<38}{'unknown' if launched is None else len(launched):>7} launches")
    return found


def figures(
    name: str,
    candidate: Candidate,
    timings: dict[str, Timing],
    entries: int,
    dtype: torch.dtype,
    copy: float,
    device: str,
) -> dict[str, Any]:
    """Return the figures that are reported for one candidate."""
    own = timings[name].wall
    median = statistics.median(own)
    middle, least, greatest = ratio(own, timings[BASELINE].wall)
    size = bytes_of(name, dtype, device)
    speed = size * entries / median if size else None
    found = {
        "step": name,
        "ms": median * 1e3,
        "predicted_ms": predicted_ms(name, entries, dtype, device, copy),
        "ratio": middle,
        "ratio_least": least,
        "ratio_greatest": greatest,
        "bytes_per_entry": size,
        "state_bytes_per_entry": candidate.state_bytes() / entries,
        "gb_per_s": speed / 1e9 if speed else None,
        "share_of_copy": speed / copy if speed else None,
        "host_ms": statistics.median(timings[name].cpu) * 1e3,
    }
    if name == EAGER:
        found["ratio_to_epi"] = ratio(own, timings[EPI].wall)[0]
    if name == REFRESH:
        # what a refresh adds to a step, divided by the number of steps from one refresh to the next
        found["amortised"] = (ratio(own, timings[EPI].wall)[0] - 1) / INTERVAL
    if name == SPARSE:
        found["times_faster_than_dense"] = ratio(timings[BASELINE].wall, own)[0]
    return found


def verdicts(found: dict[str, Any], entries: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the targets that apply to a candidate, and whether the candidate reaches each target."""
    reached = []
    for name, figure, comparison, value, least in TARGETS:
        if figure == "ratio" and dtype != torch.float32:
            continue
        if name == found["step"] and entries >= least and found.get(figure) is not None:
            met = found[figure] >= value if comparison == ">=" else found[figure] <= value
            reached.append(
                {"figure": figure, "target": f"{comparison} {value:g}", "reached": found[figure], "met": met}
            )
    return reached


def run(device: str, rounds: int, keep: Callable[[dict[str, Any]], None]) -> bool:
    """Measure and print every case that fits into memory; return whether all were measured.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        rounds: the number of rounds of interleaved timings.
        keep: called with all results so far after every case, so that a run that is cut short loses only one case.
    """
    found: dict[str, Any] = {"copy_gb_per_s": copy_bandwidth(device) / 1e9, "results": []}
    print(f"copy: {found['copy_gb_per_s']:.0f} GB/s, read and written")
    keep(found)
    for title, shapes, dtype, names in tqdm(cases(device == "cpu"), desc="cases", leave=False):
        result: dict[str, Any] = {"case": title}
        try:
            result.update(measured(title, shapes, dtype, names, device, rounds, found["copy_gb_per_s"] * 1e9))
        except Exception as error:  # out of memory, or a kernel fails: the next case may run
            result["error"] = f"{type(error).__name__}: {error}"
            tqdm.write(f"\n{title}: FAILED\n{traceback.format_exc()}")
        found["results"].append(result)
        keep(found)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    failed = [result["case"] for result in found["results"] if "error" in result]
    print(f"\nlaunches of a step, {LLAMA}:")
    try:
        found["launches"] = launches(device)
        keep(found)
    except Exception:  # the times are written
        traceback.print_exc()
        failed.append("launches")
    if failed:
        print(f"not measured: {', '.join(failed)}")
    return not failed


def measured(
    title: str, shapes: Shapes, dtype: torch.dtype, names: Sequence[str], device: str, rounds: int, copy: float
) -> dict[str, Any]:
    """Measure one case, print it, and return its figures; or the reason why the case was left out."""
    entries = sum(torch.Size(shape).numel() for shape in shapes)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 8 << 30
    if entries * MEMORY[names] > free:
        reason = f"it takes {entries * MEMORY[names] >> 30} GiB and {free >> 30} are free"
        tqdm.write(f"\n{title}: left out, {reason}")
        return {"entries": entries, "left_out": reason}
    if names is STORED:
        steps = compact_candidates(shapes, device)
    else:
        steps = candidates(shapes, names=names, device=device, dtype=dtype)
    timings = interleave(steps, rounds, title, timing=timing_on(device))
    rows = []
    tqdm.write(f"\n{title} (ratio to {BASELINE}: median [least, greatest] of {rounds} rounds)")
    for name, step in steps.items():
        found = figures(name, step, timings, entries, dtype, copy, device)
        found["targets"] = verdicts(found, entries, dtype)
        if title.startswith("Llama") and name == EPI:
            fused = statistics.median(timings[BASELINE].cpu) * 1e3
            met = found["host_ms"] <= fused
            target = {"figure": "host_ms", "target": f"<= {fused:.3g}, torch fused's", "met": met}
            found["targets"].append({**target, "reached": found["host_ms"]})
        rows.append(found)
        tqdm.write(line(found))
    return {"entries": entries, "tensors": len(shapes), "steps": rows}


def line(found: dict[str, Any]) -> str:
    """Return one candidate's figures and targets as text."""
    speed = f"{found['gb_per_s']:6.0f} GB/s {found['share_of_copy']:5.0%} of copy" if found["gb_per_s"] else " " * 26
    predicted = "" if found["predicted_ms"] is None else f"  predicted {found['predicted_ms']:.3f}"
    marks = [
        f"{t['figure']} {t['reached']:.4g} {t['target']}: {'met' if t['met'] else 'NOT met'}" for t in found["targets"]
    ]
    return (
        f"  {found['step']:<38}{found['ms']:9.3f} ms{predicted}  {found['ratio']:6.2f} [{found['ratio_least']:.2f}, "
        f"{found['ratio_greatest']:.2f}]  {speed}  host {found['host_ms']:.3f} ms  {'; '.join(marks)}"
    ).rstrip()


def gpu() -> dict[str, Any]:
    """Return a description of the GPU and the software that gave the figures."""
    import triton

    about = machine()
    return {
        **about,
        "device": torch.cuda.get_device_name(),
        "host": about["device"],
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def main() -> None:
    """Measure, print, and write after every case; exit with 1 if a case was not measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write <device>.json into this folder")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA GPU and torch sees none; bench/cpu.py times the CPU path")
    about = gpu() if arguments.device == "cuda" else machine()
    name = re.sub("[^a-z0-9]+", "-", about["device"].lower()).strip("-")

    def keep(found: dict[str, Any]) -> None:
        if arguments.json:
            arguments.json.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": about, **found}, indent=1)
            # a run that ends while it writes leaves the file of before
            unfinished = arguments.json / f"{name}.json.unfinished"
            unfinished.write_text(text + "\n")
            os.replace(unfinished, arguments.json / f"{name}.json")

    complete = run(arguments.device, arguments.rounds if arguments.device == "cuda" else 2, keep)
    if arguments.json:
        print(f"wrote {arguments.json / name}.json")
    sys.exit(not complete)


if __name__ == "__main__":
    main()
