"""Writes README.md and its pictures from the records: tables of all that was run, then a verdict on each claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from intervals import Interval, interval
from pages import table, write_between

from claims.found import (
    Found,
    Measure,
    conflict,
    exact,
    forgetting,
    newest,
    performance,
    plasticity,
    retention,
    transfer,
)
from claims.language import SIZES
from claims.plan import (
    ABLATIONS,
    BUDGETS,
    CURVES,
    EPI_MAIN,
    PIECE_MAIN,
    SMOKE_TABLES,
    TABLES,
    choices,
    rate_of,
    read,
    scaled,
    source_of_rate,
)
from claims.studies import RATIOS
from claims.systems import CURVED, PERCENTS, SYSTEMS, at_rate, swept
from claims.verdicts import (
    CLAIMS,
    EPI,
    FEW_EPI,
    correlation,
    flips,
    higher,
    judged,
    lower,
    overlap_and_forgetting,
    overlaps,
)
from claims.world import Budget

ABOUT = """# The papers' claims, run again

Neither paper's code has been published in a form that runs. Here every system that EPI
([arXiv 2604.14010](https://arxiv.org/abs/2604.14010)) and PIECE
([arXiv 2511.15375](https://arxiv.org/abs/2511.15375)) compare learns the same five tasks in a row, on models that two
cores can train, with intervals. The papers' models are ten thousand times as large: what shows here need not show
there, and what does not show here may. `make claims` repeats everything; this page and its pictures are written from
[results.jsonl](results.jsonl), a line for each run.

## How it was done

- **Model**: a byte-level transformer of {parameters}, pre-trained once on English prose.
  All runs of a size start from the same [weights](weights).
- **Tasks**: German number words, English words to phonemes, sums in steps, German names of countries, Python source
  ([tasks.py](tasks.py)). {steps} steps of {rows} rows of 80 bytes each. The seed draws their order and the rows, and
  all systems of a seed get the same ones.
- **Score**: the share of an answer's bytes that are right, each after the right bytes before it, on held-out lines (of
  countries, whose names follow no rule, on the lines that were learned).
- **Learning rates**: each system's own, of three or more, by one rule: the highest mean score at the end of a run over
  three tasks, on a seed and on held-out lines that are in no table. Where the best was the highest or the lowest,
  another was tried beyond it, but for the rates that have a star in the tables. EWC's strength is chosen together with
  its rate. Ablations and sweeps have the rate of the system that they vary. The rate is constant; gradients are clipped
  to a norm of 1. At a higher rate every system learns more and forgets more: forgetting can be compared at one rate, or
  along the curves over rates.
- **EPI** chooses its mask every {interval} steps, by an average with beta = {beta}: the paper's 500 steps and 0.99 are
  for runs that are longer by as much. **Static isolation** freezes the entries that short probes of all tasks
  move most, before the first task.
- **PIECE** scores entries by {scored} rows of a task. Its paper trains 0.1%: 8 million entries of a model of 8 billion,
  and {thousandths} here. These are too few to learn much: the claims below are about 1%, and the tables have both.
- **Replay** after a task takes a tenth more steps, replay during a task one row more in a batch; both remember 1% of
  the rows, and so does **GEM**. **LoRA** has no dropout. Else all systems of a seed take the same steps.
- **Statistics**: differences are paired by seed, with 95% intervals of Student's t. There are {claims} claims below: of
  so many intervals about one in twenty misses its number by chance.

**AP** is the mean score right after learning a task (plasticity), **OP** the mean score at the end, **FR** the share of
what was learned that is lost at the end, of the tasks before the last stage (EPI Eq. 14), **BWT** the mean change after
learning, **prose** the share of the score on the pre-training's text that is left, **TGC** the mean conflict of the
tasks' gradients in the entries that may move (EPI Eq. 15), **exact** the share of whole answers that are right at the
end. A method that learns less has less to forget: read FR beside AP.
"""

ABOUT_ENCODER = """
Size E is a real model: the sentence encoder all-MiniLM-L6-v2 (22.6 million parameters) learns three tasks of
classification in a row, {steps} steps each ([encoder.py](encoder.py)); its score is the share of texts with the right
label, and "prose" is a quiz that it could answer before.
"""

PICTURES = ("trade_off.png", "ratio.png", "masks.png")
# where the README of the project has the summary
MARKS = ("<!-- written by bench/claims: begin -->", "<!-- written by bench/claims: end -->")


def write(results: Path, file: Path) -> None:
    """Write the page, and its pictures beside it."""
    found = Found(read(results))
    draw(found, file.parent)
    file.write_text(page(found))


def write_summary(results: Path, file: Path) -> None:
    """Write the summary into the README of the project, between its marks."""
    write_between(file, MARKS, summary(Found(read(results))))


def summary(found: Found) -> str:
    """Return what the README of the project has."""
    sizes = [size for size in found.sizes() if size in SIZES and len(found.runs(EPI, size)) >= 3]
    plain, random, static = (
        f"{name}, at EPI's rate" for name in ("sequential", "random mask, p = 10%", "static by update, p = 10%")
    )
    titles = [
        "",
        *(f"{count(size) / 1e6:.1f} million parameters, {len(found.runs(EPI, size))} seeds" for size in sizes),
    ]
    rows = [["fine-tuning loses, of what it has learned", *(f"{mean(found, s, plain, forgetting)}%" for s in sizes)]]
    for other, sign, measure, words in (
        (plain, lower, forgetting, "EPI (10% protected) loses less than fine-tuning, by"),
        (random, lower, forgetting, "EPI (10%) loses less than a random mask of as many entries, by"),
        (static, lower, forgetting, "EPI (10%) loses less than a static mask of as many entries, by"),
        (plain, higher, plasticity, "EPI (10%) learns more than fine-tuning, by"),
    ):
        rows.append([words, *(told(interval(sign(EPI, other, measure)(found, size)), 1) for size in sizes)])
    for name, words in (
        (FEW_EPI, "EPI (1%)"),
        (EPI, "EPI (10%)"),
        ("EWC", "EWC"),
        ("replay during", "replay of 1% of the earlier rows"),
        ("PIECE-F, 1%", "PIECE (1% trained)"),
    ):
        better = [interval(higher(name, "sequential", performance)(found, size)) for size in sizes]
        rows.append([f"{words} ends above fine-tuning, by", *(told(result, 1) or "not run" for result in better)])
    return (
        "We have run both papers' comparisons again, as far as two cores go: [what shows and what does\n"
        "not](bench/claims/README.md). Small models learn five tasks in a row. The first five lines are at one\n"
        "learning rate, the best for EPI with 10% protected: at a lower rate every method forgets less, and learns\n"
        "less. The others compare scores at the end, each method at its own best rate.\n\n"
        f"{table(titles, rows)}\n\n"
        "In points, with 95% intervals. A number below 0 says the opposite; where the interval contains 0, nothing\n"
        "shows."
    )


def page(found: Found) -> str:
    """Return the page."""
    budget = Budget()
    models = [f"{count(size) / 1e6:.2f} million parameters (size {size})" for size in found.sizes() if size in SIZES]
    about = ABOUT.format(
        parameters=" or ".join(models),
        steps=budget.steps,
        rows=budget.rows,
        interval=budget.interval,
        beta=budget.beta,
        scored=budget.scored,
        claims=len(CLAIMS),
        thousandths=" or ".join(f"{count(size) // 1000:,}" for size in found.sizes() if size in SIZES),
    )
    about += ABOUT_ENCODER.format(steps=BUDGETS["E"].steps) if "E" in found.sizes() else ""
    parts = [about, *verdicts(found), *comparisons(found), *masks(found), *entries(found), *origin(found)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def count(size: str) -> int:
    """Return the number of parameters of a size."""
    return sum(param.numel() for param in SIZES[size].model().parameters())


# Verdicts -------------------------------------------------------------------------------------------------------------


def verdicts(found: Found) -> Iterable[str]:
    """Yield a table of all claims."""
    sizes = found.sizes()
    yield "## What shows\n"
    yield (
        "The number is above 0 where the claim holds. Where an interval contains 0, the table says how many seeds\n"
        "would tell, if the mean stayed. A seed of one system takes the seconds that its line in results.jsonl has.\n"
        "\n"
        "**paper**: what the paper has for LLaMA-3-8B, the two sides of the claim. Scores of EPI's paper are of 10,\n"
        "all else is in percent or as the unit says. Plain sequential fine-tuning is Multi-Stage (Random) in EPI's\n"
        "paper and SeqFT in PIECE's, where PIECE trains 0.1%. Drawn: the paper has a\n"
        "picture without numbers.\n"
    )
    titles = ["source", "claim", "paper", "unit", *(cell for size in sizes for cell in (f"size {size}", "verdict"))]
    rows = []
    for claim in CLAIMS:
        cells = [claim.source, claim.says, claim.paper, claim.unit]
        for size in sizes:
            result, words = judged(claim, found, size)
            cells += [told(result, 3 if claim.unit in ("overlap", "flip rate", "TGC", "Pearson's r") else 2), words]
        rows.append(cells)
    yield table(titles, rows)


# Comparisons of systems -----------------------------------------------------------------------------------------------


def comparisons(found: Found) -> Iterable[str]:
    """Yield the tables of systems."""
    for size in found.sizes():
        for title, names, other in (
            ("EPI Tables 1, 6 and 7: isolation", EPI_MAIN, "sequential"),
            ("PIECE Table 1: few entries, and methods against forgetting", ("sequential", *PIECE_MAIN), "sequential"),
            ("EPI Tables 2 to 4: ablations at p = 10%, and EPI beyond the paper", (EPI, *ABLATIONS), EPI),
        ):
            if any(found.runs(name, size) for name in names if name != other):
                yield f"## {title}, size {size}\n"
                yield compared(found, size, names, other)
        if found.runs("EPI, H = 5, p = 10%", size):
            yield f"## EPI Table 5: the interval of the masks, p = 10%, size {size}\n"
            yield compared(found, size, [EPI, *(f"EPI, H = {steps}, p = 10%" for steps in (5, 40, 120))], EPI)
        if found.runs(swept("EPI", 5), size):
            yield f"## EPI Figure 6, Tables 10 and 14: the ratio, size {size}\n"
            yield by_ratio(found, size)
        if found.runs(CURVES[0], size):
            yield f"## Learning and forgetting by the rate, size {size}\n"
            yield compared(found, size, CURVES, CURVES[0])
        if found.runs("PIECE-F, 5%", size):
            yield f"## PIECE Figure 7: the share that is trained, size {size}\n"
            kinds = ("PIECE-F", "PIECE-S", "random entries")
            names = [f"{kind}, {share}%" for kind in kinds for share in ("0.1", "1", "5")]
            yield compared(found, size, ["sequential", *names], "sequential")
    yield "![What was learned and what was lost of it, every system](trade_off.png)\n"


def compared(found: Found, size: str, names: Sequence[str], other: str) -> str:
    """Return a table of systems with their differences to one of them."""
    chosen = choices(found.records)
    names = [name for name in names if name in planned(size)]
    titles = [
        "system",
        "rate",
        "AP",
        "OP",
        f"OP - {other}",
        "FR, %",
        f"FR - {other}",
        "BWT",
        "prose, %",
        "TGC",
        "exact, %",
    ]
    rows = []
    for name in names:
        runs = found.runs(name, size)
        if not runs:
            rows.append([name, "not run"])
            continue
        trial = dict(rate_of(name, size, chosen))
        rate = f"{trial['rate']:g}"
        if trial["rate"] in ends(name, size):
            rate += "*"
        if "strength" in trial:
            rate += f", strength {trial['strength']:g}"
        rows.append(
            [
                name,
                rate,
                *(mean(found, size, name, measure) for measure in (plasticity, performance)),
                versus(found, size, name, other, performance),
                mean(found, size, name, forgetting),
                versus(found, size, name, other, forgetting),
                *(mean(found, size, name, measure) for measure in (transfer, retention)),
                mean(found, size, name, conflict, 3),
                mean(found, size, name, exact),
            ]
        )
    counts = {len(runs) for name in names if (runs := found.runs(name, size))}
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return table(titles, rows) + f"\n{seeds} seeds. A rate with a star is the highest or the lowest that was tried.\n"


def planned(size: str) -> set[str]:
    """Return the systems that are to be run at a size."""
    return {name for table in (*TABLES, *SMOKE_TABLES) if table.size == size for name in table.systems}


def ends(name: str, size: str) -> set[float]:
    """Return the highest and the lowest rate that is tried for a system; none if there is one."""
    rates = {dict(scaled(trial, size))["rate"] for trial in SYSTEMS[source_of_rate(name)].trials}
    return {min(rates), max(rates)} if len(rates) > 1 else set()


def mean(found: Found, size: str, name: str, measure: Measure, digits: int = 1) -> str:
    """Return the mean of a measure over the seeds."""
    average = mean_of(found, size, name, measure)
    return "" if math.isnan(average) else f"{average:.{digits}f}"


def versus(found: Found, size: str, name: str, other: str, measure: Measure) -> str:
    """Return the paired difference of a measure, with its interval."""
    differences = found.differences(name, other, size, measure)
    return "" if name == other or any(map(math.isnan, differences)) else told(interval(differences))


def by_ratio(found: Found, size: str) -> str:
    """Return the table of EPI and static isolation by the share that they protect."""
    rows = []
    for percent in PERCENTS:
        row = [f"{percent:g}%"]
        for name in (swept("EPI", percent), swept("static by update", percent)):
            there = bool(found.runs(name, size))
            row += [
                mean(found, size, name, measure) if there else "not run"
                for measure in (performance, plasticity, newest, forgetting)
            ]
        rows.append(row)
    measures = ("OP", "AP", "last task", "FR")
    return (
        table(["p", *(f"EPI: {m}" for m in measures), *(f"static: {m}" for m in measures)], rows)
        + "\n![Performance and forgetting by the ratio](ratio.png)\n"
    )


# Masks ----------------------------------------------------------------------------------------------------------------


def masks(found: Found) -> Iterable[str]:
    """Yield how EPI's masks move."""
    for size in found.sizes():
        series = first_overlaps(found, size)
        if series:
            yield f"## EPI Tables 11 and 12: how masks move, p = 1%, size {size}\n"
            floor = interval([r["found"]["overlaps"]["0.01"] for r in found.runs("noise floor", size).values()])
            quarters = [
                told(interval([values[len(values) * q // 4 - 1] for values in series]), 3) for q in (1, 2, 3, 4)
            ]
            yield table(
                ["", "25% of the steps", "50%", "75%", "100%", "two masks at the same weights"],
                [
                    ["overlap with the first mask", *quarters, told(floor, 3)],
                    ["paper", "0.783", "0.621", "0.514", "0.447", ""],
                ],
            )
            rates = {layer: interval(values) for layer, values in flips(found, size).items()}
            yield table(
                ["layer", "share that a refresh changes"], [[layer, told(rate, 3)] for layer, rate in rates.items()]
            )
            yield "![Overlap with the first mask](masks.png)\n"


def first_overlaps(found: Found, size: str) -> list[list[float]]:
    """Return the overlaps with the first mask, refresh by refresh, for every seed."""
    return [
        [refresh["first"] for refresh in record["details"]["refreshes"]]
        for record in found.runs(FEW_EPI, size).values()
    ]


# Entries --------------------------------------------------------------------------------------------------------------


def entries(found: Found) -> Iterable[str]:
    """Yield what the studies at fixed weights found."""
    for size in found.sizes():
        if found.runs("overlap of tasks", size):
            yield f"## EPI Table 13, PIECE Figure 5: entries that two tasks share, size {size}\n"
            rows = [
                [f"{ratio:.1%}", *(told(interval(overlaps(found, size, f"{kind} {ratio}")), 3) for kind in "FS")]
                for ratio in RATIOS
            ]
            yield table(["top share", "Fisher information (PIECE-F)", "second-order score (PIECE-S)"], rows)
            yield (
                "Jaccard overlap of two tasks' entries, the mean over all pairs, at the pre-trained weights. EPI's\n"
                "paper has 0.28 to 0.42 for the top 1%.\n"
            )
            yield f"## PIECE Figure 3: where the entries are, size {size}\n"
            yield places(found, size)
        pairs = overlap_and_forgetting(found, size)
        if pairs:
            yield f"## PIECE Figure 6: does overlap predict forgetting, size {size}\n"
            yield (
                "Correlation, over pairs of tasks, of the overlap of PIECE-F's entries at 1% with what the later task\n"
                f"takes from the earlier one: {told(interval(pairs))}. The paper says that overlap does not predict\n"
                "forgetting.\n"
            )
        if found.runs("importance and perturbation", size):
            yield f"## EPI Table 15: importance and perturbation, size {size}\n"
            stages = ("early, task", "early, prose", "late, task", "late, prose")
            yield table(
                ["stage, loss of", "Pearson", "Spearman"],
                [
                    [
                        stage,
                        *(told(interval(correlation(found, size, stage, kind))) for kind in ("pearson", "spearman")),
                    ]
                    for stage in stages
                ],
            )
            yield (
                "Early: at the pre-trained weights. Late: after learning a task. The paper has 0.72 to 0.75 and 0.68\n"
                "to 0.71 for old tasks: here the old task is the prose of the pre-training.\n"
            )


def places(found: Found, size: str) -> str:
    """Return the share of the top 1% in each layer and each kind of module, the mean over tasks and seeds."""
    totals: dict[str, dict[str, list[float]]] = {"F": {}, "S": {}}
    for record in found.runs("overlap of tasks", size).values():
        for key, where in record["found"]["places"].items():
            kind, ratio, _ = key.split()
            if ratio == "0.01":
                for place, share in where.items():
                    totals[kind].setdefault(place, []).append(share)
    rows = [
        [place.removeprefix("kind "), *(f"{statistics.fmean(totals[kind][place]):.1%}" for kind in "FS")]
        for place in totals["F"]
    ]
    return table(["layer, or kind of module", "PIECE-F", "PIECE-S"], rows)


def origin(found: Found) -> Iterable[str]:
    """Yield what was run, where, and for how long."""
    yield "## What was run\n"
    rows = []
    for job in TABLES:
        names = (*job.systems, *job.studies)
        seeds = [len(found.runs(name, job.size)) for name in names]
        done = f"{min(seeds)} of {job.seeds} seeds"
        hours = sum(r["seconds"] for name in names for r in found.runs(name, job.size).values()) / 3600
        rows.append([job.title, job.size, str(len(names)), done, f"{hours:.1f}"])
    yield table(["table", "size", "systems or studies", "done", "hours of one core"], rows)
    versions = sorted({f"torch {record['torch']}" for record in found.records})
    yield f"With {', '.join(versions)}. Each line of results.jsonl has the commit that it was made with.\n"
    starts = {(record["size"], record.get("weights")) for record in found.records if record["kind"] != "trial"}
    tried = [record for record in found.records if record["kind"] == "trial"]
    other = sum((record["size"], record.get("weights")) not in starts for record in tried)
    if other:
        yield (
            f"{other} of {len(tried)} trials of learning rates started from other weights than the runs, which\n"
            "another CPU had made by the same pre-training.\n"
        )


# Form -----------------------------------------------------------------------------------------------------------------


def told(result: Interval, digits: int = 2) -> str:
    """Return a mean with half of its interval; "" if there is none."""
    if not result.count or math.isnan(result.mean):
        return ""
    if result.count == 1:
        return f"{result.mean:.{digits}f}"
    return f"{result.mean:.{digits}f} ± {result.half:.{digits}f}"


def draw(found: Found, folder: Path) -> None:
    """Write the pictures of the smallest size that was run."""
    import matplotlib.pyplot as plt

    for size in found.sizes()[:1]:
        for name, picture in zip(PICTURES, (trade_off, ratio, overlap), strict=True):
            figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
            picture(found, size, axes)
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)


def trade_off(found: Found, size: str, axes: Any) -> None:
    """Draw what every system of the main tables has learned, and what it has lost of that; curves are over rates."""

    def place(name: str) -> tuple[float, float]:
        return mean_of(found, size, name, plasticity), mean_of(found, size, name, forgetting)

    for kind, rates in CURVED.items():
        names = [name for rate in rates if found.runs(name := at_rate(kind, rate), size)]
        if names:
            axes.plot(*zip(*sorted(map(place, names)), strict=True), marker=".", label=f"{kind}, by the rate")
            axes.legend(frameon=False)
    points = {name: place(name) for name in (*EPI_MAIN, *PIECE_MAIN) if not math.isnan(place(name)[1])}
    # names stand in a column, as many points lie close together
    for rank, name in enumerate(sorted(points, key=lambda name: points[name][1])):
        color = "C3" if name.startswith("EPI") else "C0" if name.startswith("PIECE") else "0.4"
        axes.plot(*points[name], "o", color=color, markersize=4)
        axes.annotate(
            name,
            points[name],
            xytext=(1.03, (rank + 0.5) / len(points)),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            color=color,
            arrowprops={"arrowstyle": "-", "color": "0.85", "linewidth": 0.7},
        )
    axes.set(xlabel="AP: score right after learning (%)", ylabel="FR: share of it that is lost (%)")
    axes.set_title(f"Right and down is better. Size {size}")


def mean_of(found: Found, size: str, name: str, measure: Measure) -> float:
    """Return the mean of a measure over the seeds; NaN if there is no run."""
    values = found.values(name, size, measure)
    return statistics.fmean(values) if values else math.nan


def ratio(found: Found, size: str, axes: Any) -> None:
    """Draw OP and FR of EPI and static isolation by the share that they protect."""
    for kind, color in (("EPI", "C0"), ("static by update", "C1")):
        for measure, style, label in ((performance, "-", "OP"), (forgetting, "--", "FR")):
            points = [
                (percent, interval(found.values(swept(kind, percent), size, measure)))
                for percent in PERCENTS
                if found.runs(swept(kind, percent), size)
            ]
            x, y = [p for p, _ in points], [v.mean for _, v in points]
            axes.plot(x, y, style, marker="o", color=color, label=f"{kind}: {label}")
    axes.set(xscale="log", xlabel="share that is protected (%)", ylabel="percent", title=f"By the ratio. Size {size}")
    axes.legend(frameon=False)


def overlap(found: Found, size: str, axes: Any) -> None:
    """Draw the overlap with the first mask over the steps, a line for each seed, and the overlap by noise alone."""
    steps = [refresh["step"] for r in found.runs(FEW_EPI, size).values() for refresh in r["details"]["refreshes"]]
    for seed, values in enumerate(first_overlaps(found, size)):
        axes.plot(sorted(set(steps)), values, label=f"seed {seed}")
    for record in list(found.runs("noise floor", size).values())[:1]:
        axes.axhline(record["found"]["overlaps"]["0.01"], color="0.5", ls="--", label="two masks at the same weights")
    axes.set(
        xlabel="step", ylabel="overlap with the first mask (Jaccard)", ylim=(0, 1.02), title=f"p = 1%. Size {size}"
    )
    axes.legend(frameon=False, fontsize=8)
