"""Writes the README's tables of speed from the committed results, each row with its bytes, its spread and its source.

python bench/tables.py            # rewrites what stands between the marks in README.md
python bench/tables.py --print
"""

import argparse
import json
from pathlib import Path
from typing import Any

from cases import (
    BASELINE,
    COMPILED_EAGER,
    DEFAULT,
    EAGER,
    EPI,
    IN_EXP_AVG_SQ,
    ISOLATED,
    LION,
    SPARSE,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- written by bench/tables.py: begin -->", "<!-- written by bench/tables.py: end -->"

# the results that the README shows: file -> what the README calls the machine
MACHINES = {
    "epyc-2-cores.json": "AMD EPYC (Zen 5, 2.6 GHz, AVX-512)",
    "xeon-2.6ghz-2-cores.json": "Intel Xeon (2.6 GHz, 480 MiB of L3 cache, AVX-512)",
    "epyc-avx512-2-cores.json": "another AMD EPYC (32 MiB of L3 cache, AVX-512), with noisy neighbours",
}
ORDINALS = ("first", "second", "third")
ENTRIES, THREADS = 1 << 26, 2

# candidate -> what the README calls it
STEPS = {
    BASELINE: "`torch.optim.AdamW(fused=True)`",
    "isolation off": "`EPIAdamW(isolation_ratio=0)`",
    EPI: "`EPIAdamW`",
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


def results(file: str, entries: int = ENTRIES) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the machine of a file of results, and candidate -> figures, with all threads."""
    found = json.loads((RESULTS / file).read_text())
    (case,) = (one for one in found["results"] if one["entries"] == entries and one["threads"] == THREADS)
    return found["machine"], {step["step"]: step for step in case["steps"]}


def spread(figures: dict[str, Any]) -> str:
    """Return a ratio with the least and the greatest of its rounds."""
    digits = 1 if figures["ratio"] >= 1.5 else 2
    middle, least, greatest = (f"{figures[key]:.{digits}f}" for key in ("ratio", "ratio_least", "ratio_greatest"))
    return f"{middle} [{least}, {greatest}]" if figures["step"] != BASELINE else "1"


def number(value: float | None, digits: int) -> str:
    """Return a number with so many significant digits; "" for None."""
    return "" if value is None else f"{float(f'{value:.{digits}g}'):g}"


def source(file: str) -> str:
    """Return a sentence on where figures come from."""
    machine, _ = results(file)
    return (
        f"{MACHINES[file]}, {machine['cores']} cores, torch {machine['torch'].removesuffix('+cpu')},\n"
        f"  {machine['date']}, commit {machine['commit']} ([results](bench/results/{file}))"
    )


def steps_table() -> str:
    """Return the table of steps: the figures of the first machine, and the ratios of the others."""
    first, *others = MACHINES
    _, figures = results(first)
    beside = [results(file)[1] for file in others]
    head = ["step", "bytes of state", "bytes moved", "ns", "GB/s", "time, torch's fused AdamW: 1"]
    head += [f"on the {ordinal}" for ordinal in ORDINALS[1 : len(MACHINES)]]
    rows = [head, ["---"] * len(head)]
    for name, title in STEPS.items():
        own = figures.get(name)
        if own is None and not any(name in other for other in beside):
            continue
        of_any = next(of[name] for of in (figures, *beside) if name in of)
        cells = [
            number(of_any["state_bytes_per_entry"], 3 if of_any["state_bytes_per_entry"] > 1 else 2),
            number(of_any["bytes_per_entry"], 2),
            *["", "", ""],
        ]
        if own is not None:
            cells[2:] = [
                f"{own['ns_per_entry']:.2f}" if own["ns_per_entry"] > 0.1 else number(own["ns_per_entry"], 2),
                f"{own['gb_per_s']:.0f}" if own["gb_per_s"] else "",
                spread(own),
            ]
        rows.append([title, *cells, *(spread(other[name]) if name in other else "" for other in beside)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
    rows = [["step", "bytes of state", "time, torch's fused AdamW: 1"], ["---"] * 3]
    for name, title in PEERS.items():
        rows.append([title, number(steps[name]["state_bytes_per_entry"], 2), spread(steps[name])])
    rows += [[name, "", f"not measured: {reason}"] for name, reason in found["missing"].items()]
    about = (
        f"Other packages, over 2^{found['entries'].bit_length() - 1} float32 entries in 16 matrices on the third "
        f"machine, {found['machine']['date']}\n([results](bench/results/peers.json)). Those of "
        "torchao and bitsandbytes are made for GPUs."
    )
    return about + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def text() -> str:
    """Return what stands between the marks."""
    sources = "\n".join(
        f"- {ordinal.capitalize()}: {source(file)}." for ordinal, file in zip(ORDINALS, MACHINES, strict=True)
    )
    return (
        "One step over 2^26 float32 entries in 16 tensors on two threads; bytes and times are for each entry. Ratios "
        f"are\ntaken within interleaved rounds: the median of 9, and the extremes.\n\n{steps_table()}\n\n{sources}\n\n"
        f"{peers_table()}"
    )


def main() -> None:
    """Write or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the text and leave the README as it is")
    if parser.parse_args().print:
        print(text())
        return
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n\n{text()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
