"""Writes the tables of speed from the committed results, each row with its bytes, its spread and its source.

python bench/tables.py            # rewrites what stands between the marks in README.md and in bench/README.md
python bench/tables.py --print

README.md has what decides which optimizer to take, bench/README.md every figure. Results of before a figure was
measured lack it: its cell is empty.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import (
    BASELINE,
    COMPACT,
    COMPILED_EAGER,
    DEFAULT,
    EAGER,
    EPI,
    IN_EXP_AVG_SQ,
    ISOLATED,
    LION,
    REFRESH,
    SCORING,
    SPARSE,
)
from pages import table, write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
MARKS = ("<!-- written by bench/tables.py: begin -->", "<!-- written by bench/tables.py: end -->")

# the results that the README shows: file -> what the README calls the machine
MACHINES = {
    "epyc-2-cores.json": "AMD EPYC (Zen 5, 2.6 GHz, AVX-512)",
    "xeon-2.6ghz-2-cores.json": "Intel Xeon (2.6 GHz, 480 MiB of L3 cache, AVX-512)",
    "epyc-avx512-2-cores.json": "AMD EPYC (Zen 4, 2.6 GHz, 32 MiB of L3 cache, AVX-512)",
}
ORDINALS = ("first", "second", "third")
ENTRIES, THREADS = 1 << 26, 2

# candidate -> what the README calls it
STEPS = {
    BASELINE: "`torch.optim.AdamW(fused=True)`",
    "isolation off": "`EPIAdamW(isolation_ratio=0)`",
    EPI: "`EPIAdamW`",
    REFRESH: "`EPIAdamW`, a step that refreshes",
    IN_EXP_AVG_SQ: '`EPIAdamW(importance="exp_avg_sq")`',
    LION: "`EPILion`",
    "fixed mask": "`MaskedAdamW`",
    ISOLATED: "`IsolatedOptimizer` around the first",
    SPARSE: "`SparseAdamW` of 0.1%",
    DEFAULT: "`torch.optim.AdamW()`, a loop on the CPU",
    "torch AdamW, foreach": "`torch.optim.AdamW(foreach=True)`",
    EAGER: "EPI in eager torch around AdamW",
    COMPILED_EAGER: "the same under `torch.compile`",
}
# candidates that are in the complete tables alone
OTHERS = {SCORING: "`epi_kernels.importance`: sums of one example"}
# the results of bench/cpu.py --compact: file -> what bench/README.md calls the machine
COMPACT_MACHINES = {
    "epyc-avx512-compact.json": "The third machine",
    "epyc-avx2-compact.json": "Another AMD EPYC, with AVX2",
}
COMPACT_ENTRIES = 1 << 24


def results(file: str, entries: int = ENTRIES) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the machine of a file of results, its case with all threads, and candidate -> figures in that case."""
    found = json.loads((RESULTS / file).read_text())
    (case,) = (one for one in found["results"] if one["entries"] == entries and one["threads"] == THREADS)
    return found["machine"], case, {step["step"]: step for step in case["steps"]}


def spread(figures: dict[str, Any]) -> str:
    """Return a ratio with the least and the greatest of its rounds."""
    digits = 1 if figures["ratio"] >= 1.5 else 2
    middle, least, greatest = (f"{figures[key]:.{digits}f}" for key in ("ratio", "ratio_least", "ratio_greatest"))
    return f"{middle} [{least}, {greatest}]" if figures["step"] != BASELINE else "1"


def share_of_copy(figures: dict[str, Any]) -> str:
    """Return a share of the bandwidth of a copy, with the least and the greatest of its rounds; "" without one."""
    if figures.get("share_of_copy") is None:
        return ""
    middle, least, greatest = (figures[f"share_of_copy{key}"] for key in ("", "_least", "_greatest"))
    return f"{middle:.0%} [{least:.0%}, {greatest:.0%}]"


def number(value: float | None, digits: int) -> str:
    """Return a number with so many significant digits; "" for None."""
    return "" if value is None else f"{float(f'{value:.{digits}g}'):g}"


def state(figures: dict[str, Any]) -> str:
    """Return the bytes of state."""
    size = figures["state_bytes_per_entry"]
    return number(size, 3 if size > 1 else 2)


def peak(figures: dict[str, Any]) -> str:
    """Return the bytes that a step takes at most beyond what it keeps; pages are counted, so less than 0.05 is 0."""
    size = figures.get("peak_bytes_per_entry")
    return "" if size is None else number(round(size, 1), 2)


def source(about: str, machine: dict[str, Any], place: str) -> str:
    """Return a sentence on where figures come from; `place` is the way to the file of results."""
    return (
        f"{about}, {machine['cores']} cores, torch {machine['torch'].removesuffix('+cpu')},\n"
        f"  {machine['date']}, commit {machine['commit']} ([results]({place}))"
    )


def steps_table() -> str:
    """Return the table of steps: bytes, and the ratios on every machine."""
    figures = [results(file)[2] for file in MACHINES]
    on = [f"on the {ordinal}" for ordinal in ORDINALS[1 : len(MACHINES)]]
    titles, rows = ["step", "bytes of state", "more during a step", "time, torch's fused AdamW: 1", *on], []
    for name, title in STEPS.items():
        own = [of[name] for of in figures if name in of]
        if own:
            taken = next(filter(None, map(peak, own)), "")
            rows.append([title, state(own[0]), taken, *(spread(of[name]) if name in of else "" for of in figures)])
    return table(titles, rows)


def complete_table(figures: dict[str, dict[str, Any]]) -> str:
    """Return the table of all figures of one machine."""
    head = ["step", "bytes of state", "more during a step", "bytes moved", "ns", "GB/s", "share of a copy's GB/s"]
    titles, rows = [*head, "time, torch's fused AdamW: 1", "CPU time / time"], []
    for name, title in (STEPS | OTHERS | {name: name for name in COMPACT}).items():
        if name not in figures:
            continue
        own = figures[name]
        ns, speed = own["ns_per_entry"], own["gb_per_s"]
        cells = [state(own), peak(own), number(own["bytes_per_entry"], 2)]
        cells += [f"{ns:.2f}" if ns > 0.1 else number(ns, 2), f"{speed:.0f}" if speed else "", share_of_copy(own)]
        rows.append([title, *cells, spread(own), f"{own['cpu_per_wall']:.2f}"])
    return table(titles, rows)


# of the results of bench/peers.py -> what the README calls it
PEERS = {
    EPI: "`EPIAdamW`",
    "EPI, 8-bit m, v and S": '`EPIAdamW(state_dtype="8bit")`',
    "torch-optimi AdamW": "torch-optimi 0.3.3 `AdamW`",
    "pytorch_optimizer StableAdamW": "pytorch_optimizer 4.1.0 `StableAdamW`",
    "torchao AdamW8bit": "torchao 0.18.0 `AdamW8bit`",
    "bitsandbytes AdamW8bit": "bitsandbytes 0.50.2 `AdamW8bit`",
    SPARSE: "0.1%: `SparseAdamW`",
    "0.1%: gradients times a mask, torch AdamW, fused": "0.1%: gradients times a mask, torch's fused AdamW",
    "0.1%: torch AdamW, fused, on vectors, as SHiRA": "0.1%: torch's fused AdamW on vectors, as PEFT's SHiRA has them",
}


def peers_table() -> str:
    """Return the table of other packages' steps."""
    found = json.loads((RESULTS / "peers.json").read_text())
    steps = {step["step"]: step for step in found["steps"]}
    titles, rows = ["step", "bytes of state", "time, torch's fused AdamW: 1"], []
    for name, title in PEERS.items():
        rows.append([title, number(steps[name]["state_bytes_per_entry"], 2), spread(steps[name])])
    rows += [[name, "", f"not measured: {reason}"] for name, reason in found["missing"].items()]
    about = (
        f"Other packages, over 2^{found['entries'].bit_length() - 1} float32 entries in 16 matrices on the third "
        f"machine, {found['machine']['date']}\n([results](bench/results/peers.json)). Those of "
        "torchao and bitsandbytes are made for GPUs."
    )
    return f"{about}\n\n{table(titles, rows)}"


def host_sentence() -> str:
    """Return what Python's part of a step takes."""
    found = json.loads((RESULTS / "host.json").read_text())

    def times(kind: str) -> str:
        figures = found["results"]["steps"][kind]
        ours, torchs = figures["milliseconds"].values()
        quartiles = f"[{figures['ratio_lower_quartile']:.2f}, {figures['ratio_upper_quartile']:.2f}]"
        return f"{ours:.2f} ms and torch's fused AdamW {torchs:.2f} ms, ratio {figures['ratio']:.2f} {quartiles}"

    return (
        f"Python's part of a step shows in {found['tensors']} tensors of {found['entries']} entries. On one thread of "
        f"the third machine `EPIAdamW` takes\n{times('plain')}; where the tensors are DTensors,\n{times('DTensor')} "
        "(medians, and quartiles;\n[results](bench/results/host.json))."
    )


def for_users() -> str:
    """Return what stands between the marks in README.md."""
    sources = "\n".join(
        f"- {ordinal.capitalize()}: {source(MACHINES[file], results(file)[0], f'bench/results/{file}')}."
        for ordinal, file in zip(ORDINALS, MACHINES, strict=True)
    )
    return (
        "One step over 2^26 float32 entries in 16 tensors on two threads. Bytes are for each entry; "
        '"more during a step" is what\na step takes at most beyond parameters, gradients and states. Ratios are taken '
        "within interleaved rounds: the median\nof 9, and the extremes. "
        "[The complete tables](bench/README.md#every-figure) have times, bandwidths and shares of a copy's.\n\n"
        f"{steps_table()}\n\n{sources}\n\n{host_sentence()}\n\n{peers_table()}"
    )


def complete() -> str:
    """Return what stands between the marks in bench/README.md."""
    files = [(file, about, ENTRIES) for file, about in MACHINES.items()]
    files += [(file, about, COMPACT_ENTRIES) for file, about in COMPACT_MACHINES.items()]
    parts = []
    for file, about, entries in files:
        machine, case, figures = results(file, entries)
        size = f"2^{entries.bit_length() - 1} entries"
        copy = f" A copy: {case['copy_gb_per_s']:.0f} GB/s." if "copy_gb_per_s" in case else ""
        said = f"{size}. {source(about, machine, f'results/{file}')}.{copy}".replace("\n  ", "\n")
        parts.append(f"{said}\n\n{complete_table(figures)}")
    return "\n\n".join([*parts, growth_table()])


def growth_table() -> str:
    """Return how times grow: over linear growth from the first value, at the last and, if more, in between."""
    found = json.loads((RESULTS / "scaling.json").read_text())
    names = (BASELINE, EPI, REFRESH, SPARSE)
    titles, rows = ["what grows", "from", "to", *(STEPS[name] for name in names)], []
    for one in found["results"].values():
        cells = []
        for name in names:
            growth = [of for of in one["growth"].get(name, ()) if of is not None]
            last, greatest = (number(of, 2) for of in (growth[-1], max(growth[1:]))) if growth else ("", "")
            cells.append(f"{last} ({greatest} between)" if last and float(greatest) > max(1, float(last)) else last)
        if any(cells):
            rows.append([one["label"], *(f"{one['values'][i]:,}" for i in (0, -1)), *cells])
    date, commit = (found["machine"][key] for key in ("date", "commit"))
    about = f"The time at the last value, where linear growth from the first gives 1; {date}, commit {commit}"
    return f"{about}\n([results](results/scaling.json)):\n\n{table(titles, rows)}"


# page -> what stands there between the marks
PAGES: dict[str, Callable[[], str]] = {"README.md": for_users, "bench/README.md": complete}


def main() -> None:
    """Write or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the texts and leave the pages as they are")
    printed = parser.parse_args().print
    for name, text in PAGES.items():
        if printed:
            print(f"{name}\n\n{text()}\n")
            continue
        write_between(ROOT / name, MARKS, text())


if __name__ == "__main__":
    main()
