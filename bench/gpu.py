"""The GPU path against torch: time, bandwidth, launches and host time of a step, and the targets that it has.

    python bench/gpu.py --json bench/results     # or `make gpu`, which runs the tests first
    python bench/gpu.py --device cpu             # a rehearsal without a GPU: small, and its times mean nothing

All candidates of a case share parameters and gradients, and run once in every round, in an order that rotates. Times
are the device's own, between two events. Writes <folder>/<device>.json, anew after every case: what was measured is
there whatever happens later. A case that raises is recorded with its error, the next one goes on, and the exit status
is 1.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import (
    BASELINE,
    BYTES,
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
    machine,
    output_of,
)
from measure import GPUTiming, Timing, interleave, kernels, ratio
from tqdm import tqdm

INTERVAL = 500  # steps from one refresh to the next
ALL = tuple(name for name in BYTES if name not in (COMPILED_EAGER, DEFAULT))
LARGE = (BASELINE, EPI)  # where the states of all do not fit

# bytes of memory for each entry that the candidates of a case need, float32: p, g and every candidate's states
MEMORY = {ALL: 118, LARGE: 8 + 8 + 12 + 4}

# what a case has to reach: (candidate, figure, comparison, value, the entries from which it holds); a "ratio" holds in
# float32 alone, where torch's states are as wide as ours
TARGETS = (
    *[(name, "share_of_copy", ">=", 0.92, 1 << 26) for name in (EPI, IN_EXP_AVG_SQ, "isolation off", "fixed mask")],
    (EPI, "ratio", "<=", 1.30, 1 << 26),
    (IN_EXP_AVG_SQ, "ratio", "<=", 1.02, 1 << 26),
    (EAGER, "ratio_to_epi", ">=", 5.0, 1 << 26),
    (REFRESH, "amortised", "<=", 0.004, 1 << 26),
    (SPARSE, "times_faster_than_dense", ">=", 100.0, 1 << 26),
)


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
    # first, for its host times: the profiler that counts launches slows every launch after it
    found = [("Llama-3-8B at 1/8", llama(64 if rehearsal else 8), torch.bfloat16, ALL)]
    for power in (12, 16) if rehearsal else (22, 24, 26, 28):
        shapes = [((1 << power) // TENSORS,)] * TENSORS
        for dtype in (torch.float32, torch.bfloat16):
            found.append((f"2^{power} entries, {str(dtype)[6:]}", shapes, dtype, ALL))
    if not rehearsal:
        found.append(("2^30 entries, float32", [((1 << 30) // TENSORS,)] * TENSORS, torch.float32, LARGE))
    found.append(("2000 tiny tensors", tiny()[:: 50 if rehearsal else 1], torch.float32, ALL))
    return found


def copy_bandwidth(device: str) -> float:
    """Return the bytes per second of a large copy, read and written, the best of ten."""
    source = torch.empty(1 << (28 if device == "cuda" else 20), device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, 10, "copy", timing=timing_on(device))["copy"]
    return 2 * source.numel() * 4 / min(timing.wall)


def timing_on(device: str) -> type[Timing]:
    """Return the clocks of a device."""
    return GPUTiming if device == "cuda" else Timing


def launches(step: Callable[[], object], device: str) -> int | None:
    """Return how many kernels a step launches; None where that cannot be known."""
    launched = kernels(step) if device == "cuda" else None
    return None if launched is None else len(launched)


def figures(
    name: str,
    candidate: Candidate,
    timings: dict[str, Timing],
    entries: int,
    dtype: torch.dtype,
    copy: float,
    launched: int | None,
    device: str,
) -> dict[str, Any]:
    """Return what is reported of one candidate."""
    own = timings[name].wall
    median = statistics.median(own)
    middle, least, greatest = ratio(own, timings[BASELINE].wall)
    size = bytes_of(name, dtype, device)
    speed = size * entries / median if size else None
    found = {
        "step": name,
        "ms": median * 1e3,
        "ratio": middle,
        "ratio_least": least,
        "ratio_greatest": greatest,
        "bytes_per_entry": size,
        "state_bytes_per_entry": candidate.state_bytes() / entries,
        "gb_per_s": speed / 1e9 if speed else None,
        "share_of_copy": speed / copy if speed else None,
        "launches": launched,
        "host_ms": statistics.median(timings[name].cpu) * 1e3,
    }
    if name == EAGER:
        found["ratio_to_epi"] = ratio(own, timings[EPI].wall)[0]
    if name == REFRESH:
        # a step with a refresh against one without: what it adds, shared out over the steps from one to the next
        found["amortised"] = (ratio(own, timings[EPI].wall)[0] - 1) / INTERVAL
    if name == SPARSE:
        found["times_faster_than_dense"] = ratio(timings[BASELINE].wall, own)[0]
    return found


def verdicts(found: dict[str, Any], entries: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the targets that apply to a candidate, and whether it reaches them."""
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


def measured(
    title: str, shapes: Shapes, dtype: torch.dtype, names: tuple[str, ...], device: str, rounds: int, copy: float
) -> dict[str, Any]:
    """Measure one case, print it, and return the results."""
    entries = sum(torch.Size(shape).numel() for shape in shapes)
    about: dict[str, Any] = {"case": title, "entries": entries, "tensors": len(shapes)}
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 8 << 30
    if entries * MEMORY[names] > free:
        about["left_out"] = f"it takes {entries * MEMORY[names] >> 30} GiB and {free >> 30} are free"
        tqdm.write(f"\n{title}: left out, {about['left_out']}")
        return about
    steps = candidates(shapes, names=names, device=device, dtype=dtype)
    timings = interleave(steps, rounds, title, timing=timing_on(device))
    rows = []
    tqdm.write(f"\n{title} (ratio to {BASELINE}: median [least, greatest] of {rounds} rounds)")
    for name, step in steps.items():
        found = figures(name, step, timings, entries, dtype, copy, launches(step, device), device)
        found["targets"] = verdicts(found, entries, dtype)
        if title.startswith("Llama") and name == EPI:
            fused = statistics.median(timings[BASELINE].cpu) * 1e3
            met = found["host_ms"] <= fused
            target = {"figure": "host_ms", "target": f"<= {fused:.3g}, torch fused's", "met": met}
            found["targets"].append({**target, "reached": found["host_ms"]})
        rows.append(found)
        tqdm.write(line(found))
    return {**about, "steps": rows}


def run(device: str, rounds: int, write: Callable[[dict[str, Any]], None]) -> bool:
    """Measure every case that fits and print it; return whether none raised.

    Args:
        device: "cuda" or "cpu".
        rounds: how often each candidate runs.
        write: called after every case, with all results so far.
    """
    copy = copy_bandwidth(device)
    print(f"copy: {copy / 1e9:.0f} GB/s, read and written")
    results: list[dict[str, Any]] = []
    for title, shapes, dtype, names in tqdm(cases(device == "cpu"), desc="cases", leave=False):
        try:
            results.append(measured(title, shapes, dtype, names, device, rounds, copy))
        except Exception as error:  # of one case: the others are still worth their time on a GPU
            tqdm.write(f"\n{title}: FAILED\n{traceback.format_exc()}")
            results.append({"case": title, "error": f"{type(error).__name__}: {error}"})
        write({"copy_gb_per_s": copy / 1e9, "results": results})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return not any("error" in found for found in results)


def line(found: dict[str, Any]) -> str:
    """Return one candidate's figures as text, with the targets that it has."""
    speed = f"{found['gb_per_s']:6.0f} GB/s {found['share_of_copy']:5.0%} of copy" if found["gb_per_s"] else " " * 26
    launched = "" if found["launches"] is None else f"{found['launches']:5d} launches"
    marks = [
        f"{t['figure']} {t['reached']:.4g} {t['target']}: {'met' if t['met'] else 'NOT met'}" for t in found["targets"]
    ]
    return (
        f"  {found['step']:<28}{found['ms']:9.3f} ms  {found['ratio']:6.2f} [{found['ratio_least']:.2f}, "
        f"{found['ratio_greatest']:.2f}]  {speed}{launched}  host {found['host_ms']:.3f} ms  {'; '.join(marks)}"
    ).rstrip()


def gpu() -> dict[str, Any]:
    """Return what the figures were taken on."""
    import triton

    about = machine()
    return {
        **about,
        "device": torch.cuda.get_device_name(),
        "host": about["device"],
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write <device>.json into this folder")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA GPU and torch sees none; bench/cpu.py times the CPU path")
    about = gpu() if arguments.device == "cuda" else machine()
    path = None
    if arguments.json:
        path = arguments.json / f"{re.sub('[^a-z0-9]+', '-', about['device'].lower()).strip('-')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(results: dict[str, Any]) -> None:
        if path:
            path.write_text(json.dumps({"machine": about, **results}, indent=1) + "\n")

    complete = run(arguments.device, arguments.rounds if arguments.device == "cuda" else 2, write)
    if path:
        print(f"wrote {path}")
    if not complete:
        sys.exit("a case failed, see above; the others were measured")


if __name__ == "__main__":
    main()
