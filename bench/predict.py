"""What a step and a refresh should take on a GPU, from the bytes that they move: predictions, made before any run.

    python bench/predict.py                                        # both tables for A100, H100, H200 and B200
    python bench/predict.py --model llama-3-8b --ranks 8           # a step and a refresh of one rank

Nothing here was measured on a GPU: `bench/gpu.py` writes these predictions beside what it measures. A kernel takes the
longer of two times, that of its bytes and that of its instructions, and its last blocks a little more:

    seconds = max(bytes / (share x copy bandwidth), instructions / issued per second) + TAIL

Tensors are taken to be large and aligned: for 2000 tiny ones the host decides, of which the model knows nothing.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cases import (
    BASELINE,
    BYTES,
    COMPACT,
    COMPILED_EAGER,
    DEFAULT,
    EAGER,
    EPI,
    REFRESH,
    bytes_of,
)

from epi_kernels import memory

RESULTS = Path(__file__).parent / "results"

# Seconds from the first free processor to the end of a launch. A block of 4096 entries that has the device to itself
# takes as long: a launch, the words of the table, the entries, one after the other.
TAIL = 6e-6

# The share of its instruction slots that a kernel fills which is bound by them. The rest is lost to waits for shared
# memory and between dependent instructions.
ISSUE = 0.825

# Bytes of each entry in float32. torch's foreach AdamW goes through memory in 8 passes: two products in place (8 each),
# a lerp (12), an addcmul (12), a root, a division and a sum (8 each), an addcdiv (16).
FOREACH_BYTES = 8 + 12 + 8 + 12 + 8 + 8 + 8 + 16
# a product and an addcmul for the importance, then AdamW; protected entries, 1%, are left out
EAGER_BYTES = 8 + 12 + FOREACH_BYTES

# Instructions of a thread for each entry. Steps of float32 states need a third of what a card issues meanwhile, and are
# left out; compact ones are those of `bench/aot.py` on sm_80, for states of bfloat16 also where only S has them.
INSTRUCTIONS = dict(zip(COMPACT, (122, 122, 270, 218), strict=True))
# CUDA's histograms. The first counts every entry; the others only those that begin with the digits found before.
FIRST_HISTOGRAM, LATER_HISTOGRAM = 43, 36

# seconds in which one block selects a digit, of one histogram (CUDA's) or of 32 parts (Triton's)
SELECT = {"cuda": 5e-6, "triton": 32e-6}

# candidates of `bench/cases.py` without a prediction
NOT_PREDICTED = {COMPILED_EAGER: "which passes the compiler joins is up to its version"}


@dataclass(frozen=True)
class Card:
    """A GPU as the model knows it.

    Args:
        name: occurs in the name that torch gives the device.
        copy: bytes per second that a large copy reads and writes together.
        share: of `copy`, what one of our kernels has before its tail. A faster memory waits more often for addresses.
        torch_share: what torch's multi-tensor kernels have. They launch at most 320 blocks of 512 threads, 65,536
            entries each, so that every 21 million entries have a tail of their own, which is in this share.
        issued: instructions of threads per second: processors x 4 schedulers x 32 lanes x clock x ISSUE. The clocks are
            the boost clocks of NVIDIA's white papers, for H100 and H200 that of tensor cores, 1.83 GHz.
        additions: 64-bit additions per second in the L2 cache, at worst and at best. Triton's first histogram adds once
            for each entry that is not 0; how fast depends on how many entries share a bin.
    """

    name: str
    copy: float
    share: float
    torch_share: float
    issued: float
    additions: tuple[float, float]


A100 = Card("A100", 1.75e12, 0.93, 0.86, 108 * 4 * 32 * 1.41e9 * ISSUE, (5.0e10, 1.33e11))
H100 = Card("H100", 3.0e12, 0.93, 0.86, 132 * 4 * 32 * 1.83e9 * ISSUE, (5.3e10, 1.6e11))
H200 = Card("H200", 4.3e12, 0.90, 0.83, 132 * 4 * 32 * 1.83e9 * ISSUE, (5.7e10, 1.6e11))
B200 = Card("B200", 6.8e12, 0.88, 0.81, 148 * 4 * 32 * 1.85e9 * ISSUE, (5.9e10, 1.8e11))
CARDS = (A100, H100, H200, B200)

# Seconds of an all-reduce of a few KiB for each doubling of the number of ranks, up the tree or down again: over NVLink
# for the first 8 ranks, then over a network.
HOP, NETWORK_HOP, IN_A_NODE = 4e-6, 1.2e-5, 8
COLLECTIVES = 5  # of a refresh: ranges, three histograms, counts

# entries of models that are only extrapolated to, with their ranks
FAR = {"70B on 64": (70.6e9, 64), "1T on 4096": (1e12, 4096)}


def pass_seconds(card: Card, entries: float, size: float, instructions: float = 0.0) -> float:
    """Return the seconds of one of our kernels, without its tail.

    Args:
        card: the GPU.
        entries: that it goes through.
        size: bytes that it reads and writes for each entry.
        instructions: of a thread for each entry.

    Example:
        >>> round(pass_seconds(H100, 1 << 26, 36) * 1e3, 2)  # EPI's step in float32, ms
        0.87
    """
    return max(size * entries / (card.share * card.copy), instructions * entries / card.issued)


def refresh_passes(
    card: Card, entries: float, grad_bytes: float = 4, additions: float | None = None
) -> dict[str, float]:
    """Return the seconds of each pass of a refresh, without tails, and what it spares the sweep; importance in float32.

    Args:
        card: the GPU.
        entries: that compete.
        grad_bytes: of the gradient of each entry.
        additions: per second, of Triton's first histogram (`Card.additions`); None: CUDA counts the histograms. The
            later histograms are taken to be as fast either way: few entries are added up.
    """
    first = pass_seconds(card, entries, 4, FIRST_HISTOGRAM)
    if additions is not None:
        first = max(first, entries / additions)
    return {
        "importance, ranges": pass_seconds(card, entries, grad_bytes + 8),
        "histogram 1": first,
        "histograms 2 and 3": 2 * pass_seconds(card, entries, 4, LATER_HISTOGRAM),
        "3 selects": 3 * SELECT["cuda" if additions is None else "triton"],
        "lock": pass_seconds(card, entries, 8),
        "less: S not written in the sweep": -pass_seconds(card, entries, 4),
    }


def step_seconds(card: Card, name: str, entries: float, dtype: torch.dtype = torch.float32) -> float:
    """Return the seconds of a step of a candidate; CUDA counts the histograms of a refresh.

    Args:
        card: the GPU.
        name: of a candidate of `bench/cases.py`.
        entries: of all tensors.
        dtype: of parameters and gradients.

    Raises:
        ValueError: there is no prediction; the message says why.

    Example:
        >>> round(step_seconds(H100, BASELINE, 1 << 26) * 1e3, 2)  # ms
        0.73
    """
    if name in NOT_PREDICTED:
        raise ValueError(f"no prediction for {name!r}: {NOT_PREDICTED[name]}")
    if name == REFRESH:
        passes = refresh_passes(card, entries, dtype.itemsize)
        launches = 5  # that go through all entries, besides the sweep
        return step_seconds(card, EPI, entries, dtype) + sum(passes.values()) + launches * TAIL
    torchs = {DEFAULT: FOREACH_BYTES, "torch AdamW, foreach": FOREACH_BYTES, EAGER: EAGER_BYTES}
    size = torchs[name] * dtype.itemsize / 4 if name in torchs else bytes_of(name, dtype, "cuda")
    assert size is not None
    if name == BASELINE or name in torchs:  # states in the dtype of the parameters
        return size * entries / (card.torch_share * card.copy)
    return pass_seconds(card, entries, size, INSTRUCTIONS.get(name, 0.0)) + TAIL


def predicted_ms(name: str, entries: int, dtype: torch.dtype, device: str, copy: float) -> float | None:
    """Return the milliseconds that the model gives a step on this machine's GPU; None where it has no prediction.

    Args:
        name: of a candidate of `bench/cases.py`.
        entries: of all tensors.
        dtype: of parameters and gradients.
        device: "cuda"; for any other, and for a GPU that is not one of CARDS, there is no prediction.
        copy: bytes per second of a copy, as measured on that GPU: it may have another memory than the card in CARDS.
    """
    about = torch.cuda.get_device_name() if device == "cuda" else ""
    card = next((card for card in CARDS if card.name in about), None)
    if card is None or name in NOT_PREDICTED:
        return None
    return step_seconds(replace(card, copy=copy), name, entries, dtype) * 1e3


def collectives_seconds(ranks: int) -> float:
    """Return the seconds that the all-reduces of a refresh add, whose sizes the number of ranks does not change.

    Example:
        >>> collectives_seconds(1), round(collectives_seconds(64) * 1e3, 2)  # ms
        (0.0, 0.48)
    """
    inside = math.log2(min(ranks, IN_A_NODE))
    outside = math.log2(max(1.0, ranks / IN_A_NODE))
    return COLLECTIVES * 2 * (HOP * inside + NETWORK_HOP * outside)


def rank_table(title: str, entries: float, ranks: int) -> list[list[str]]:
    """Return what a rank of a sharded model takes, in ms, as rows of text: a column for each card."""
    own = entries / ranks
    rows = [[f"{title}: {own:,.0f} entries for each rank", *(card.name for card in CARDS)]]
    for name in (BASELINE, EPI, "EPI, S = exp_avg_sq"):
        rows.append([name, *(f"{step_seconds(card, name, own) * 1e3:.3g}" for card in CARDS)])
    added = [sum(refresh_passes(card, own).values()) + collectives_seconds(ranks) for card in CARDS]
    rows.append(["added by a refresh", *(f"{seconds * 1e3:.3g}" for seconds in added)])
    rows.append(["of that, collectives", *([f"{collectives_seconds(ranks) * 1e3:.3g}"] * len(CARDS))])
    share = [seconds / 500 / step_seconds(card, EPI, own) for seconds, card in zip(added, CARDS, strict=True)]
    rows.append(["a refresh at every 500 steps, of the step", *(f"{of:.2%}" for of in share)])
    return rows


def compared(folder: Path = RESULTS) -> list[list[str]]:
    """Return what was measured and committed beside what bytes alone predict: a row for each step of each result.

    On a CPU the prediction is that of the bandwidth that torch's fused AdamW had in the same rounds.
    """
    rows = [["result", "entries", "threads", "step", "measured / torch's", "by bytes", "measured / predicted"]]
    for path in sorted(folder.glob("*.json")):
        cases = json.loads(path.read_text()).get("results", [])
        for case in cases if isinstance(cases, list) else []:
            steps = {step["step"]: step for step in case.get("steps", []) if isinstance(step, dict) and "step" in step}
            base = steps.get(BASELINE, {}).get("bytes_per_entry")
            for name, step in steps.items():
                size = step.get("bytes_per_entry")
                if name != BASELINE and size and base:
                    predicted = size / base
                    cells = [f"{case['entries']:,}", str(case.get("threads", "GPU")), name]
                    figures = (step["ratio"], predicted, step["ratio"] / predicted)
                    rows.append([path.stem, *cells, *(f"{figure:.2f}" for figure in figures)])
    return rows


def refresh_table(entries: float = 8e9) -> list[list[str]]:
    """Return what a refresh takes, in ms, as rows of text: a column for each card."""
    rows = [["pass", *(card.name for card in CARDS)]]
    passes = [refresh_passes(card, entries) for card in CARDS]
    for name in passes[0]:
        rows.append([name, *(f"{of_card[name] * 1e3:.3g}" for of_card in passes)])
    rows.append(["added by a refresh, CUDA", *(f"{sum(of_card.values()) * 1e3:.0f}" for of_card in passes)])
    triton = [
        [sum(refresh_passes(card, entries, additions=speed).values()) * 1e3 for speed in reversed(card.additions)]
        for card in CARDS
    ]
    rows.append(["added by a refresh, Triton", *(f"{best:.0f}-{worst:.0f}" for best, worst in triton)])
    rows.append(["EPI's step", *(f"{step_seconds(card, EPI, entries) * 1e3:.0f}" for card in CARDS)])
    return rows


def step_table(entries: int = 1 << 26, dtype: torch.dtype = torch.float32) -> list[list[str]]:
    """Return what a step of each candidate takes, in ms, as rows of text: a column for each card."""
    rows = [["step", *(card.name for card in CARDS)]]
    for name in BYTES:
        known = name not in NOT_PREDICTED
        rows.append(
            [name, *(f"{step_seconds(card, name, entries, dtype) * 1e3:.3g}" if known else "-" for card in CARDS)]
        )
    return rows


def text_of(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table in text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=memory.MODELS, help="a model, on --ranks; without: the usual tables")
    parser.add_argument("--ranks", type=int, default=1, help="that share out the model (FSDP2) [1]")
    arguments = parser.parse_args()
    if arguments.model:
        entries = sum(map(math.prod, memory.MODELS[arguments.model]))
        title = f"{arguments.model} on {arguments.ranks}"
        print(f"Float32; predicted ms\n\n{text_of(rank_table(title, entries, arguments.ranks))}")
        return
    print(
        f"A refresh of 8e9 entries, importance in float32, exact threshold; predicted ms\n\n{text_of(refresh_table())}"
    )
    print(f"\nA step over 2^26 float32 entries; predicted ms\n\n{text_of(step_table())}")
    for name, reason in NOT_PREDICTED.items():
        print(f"\nnot predicted: {name}, because {reason}")
    print("\nOn paper, float32; predicted ms")
    for title, (entries, ranks) in FAR.items():
        print(f"\n{text_of(rank_table(title, entries, ranks))}")
    print(f"\nMeasured so far, against bytes alone\n\n{text_of(compared())}")


if __name__ == "__main__":
    main()
