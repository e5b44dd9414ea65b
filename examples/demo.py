"""Learn four tasks one after the other, with AdamW and with EPI, and measure what is forgotten.

Every method starts from the same pre-trained weights and sees the same batches. Prints the accuracy on every task
after every task, and writes two pictures and a report. `python examples/demo.py --help` lists the options.
"""

import argparse
import hashlib
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from model import ByteTransformer
from tasks import CONTEXT, IGNORED, Task, docstrings, make_tasks
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from epi_kernels import EPIAdamW, plots, report
from epi_kernels.metrics import forgetting_ratio, mask_jaccard

BATCH = 12  # windows of CONTEXT bytes
PRETRAIN_RATE = 4e-3
LEARNING_RATE = 5e-4
IMPORTANCE_BETA = 0.95  # remembers 20 steps; the paper's 0.99 goes with masks that last 500 steps
EXAMINED = 128  # held-out windows of each task
LIMITS = """It shows how EPIAdamW is used and how its masks move with the task. It does not show what EPI is worth for a
language model: this is one small model ({parameters} parameters) and one seed, at a learning rate far above the
paper's. The gap between the methods changes by many points with the seed and the number of steps, and can change its
sign (try --seed 2 --steps 100)."""


@dataclass
class Result:
    """What one method did."""

    accuracy: list[list[float]]  # row t: on every task, after learning t of them, in percent
    overlap: dict[int, float] = field(default_factory=dict)  # step of a refresh -> Jaccard with the first mask
    telemetry: list[dict[str, Any]] = field(default_factory=list)  # of every refresh

    def learned(self) -> list[float]:
        """Return the accuracy on each task right after learning it, in percent: the plasticity."""
        return [self.accuracy[task + 1][task] for task in range(len(self.accuracy) - 1)]

    def forgetting(self) -> list[float]:
        """Return the forgetting ratio of each task but the last, in percent; NaN where nothing was learned."""
        pairs = zip(self.learned()[:-1], self.accuracy[-1], strict=False)
        return [forgetting_ratio(initial, after) if initial > 0 else math.nan for initial, after in pairs]


def main(arguments: list[str] | None = None) -> None:
    """Run the demo with these command-line arguments."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    # more threads than one cost more than they bring at this size; the methods run side by side instead
    torch.set_num_threads(1)
    weights = pretrained(options)
    tasks = make_tasks()
    methods = {"AdamW": None} | {f"EPI, p = {100 * ratio:.3g}%": ratio for ratio in options.isolation_ratio}
    with (
        tqdm(total=len(methods) * len(tasks) * options.steps, desc="four tasks, every method", unit="step") as progress,
        ThreadPoolExecutor(len(methods)) as pool,
    ):
        learning = [pool.submit(learn, ratio, weights, tasks, options, progress.update) for ratio in methods.values()]
        results = dict(zip(methods, [future.result() for future in learning], strict=True))
    parameters = sum(value.numel() for value in weights.values())
    tell(results, tasks, parameters)
    draw(results, tasks, options, parameters)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=120, help="optimizer steps for each task [%(default)s]")
    add("--pretrain-steps", type=int, default=300, help="steps that make the starting weights [%(default)s]")
    add("--isolation-ratio", type=float, nargs="+", default=[0.01, 0.1], help="EPI's p, a run for each [0.01 0.1]")
    add("--mask-interval", type=int, default=24, help="optimizer steps that a mask lasts, EPI's H [%(default)s]")
    add("--seed", type=int, default=0, help="of the weights and the batches [%(default)s]")
    add("--out", type=Path, default=Path("out"), help="folder of the pictures and the starting weights [%(default)s]")
    return parser.parse_args(arguments)


def pretrained(options: argparse.Namespace) -> Mapping[str, Tensor]:
    """Return weights that know some English; made once, and kept under a name that changes with what made them."""
    sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("demo.py", "model.py", "tasks.py"))
    recipe = repr((options.pretrain_steps, options.seed, sys.version, torch.__version__, sources))
    file = options.out / f"pretrained-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    torch.manual_seed(options.seed)
    model, text = ByteTransformer(CONTEXT), Task("docstrings", docstrings(), torch.empty(0, dtype=torch.uint8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_RATE, betas=(0.9, 0.95))
    batches = torch.Generator().manual_seed(options.seed)
    for step in tqdm(range(options.pretrain_steps), desc="pre-training, once", unit="step"):
        for group in optimizer.param_groups:  # warm-up, then down to a twentieth
            group["lr"] = PRETRAIN_RATE * min(1.0, (step + 1) / 30) * (1 - 0.95 * step / options.pretrain_steps)
        train(model, optimizer, *text.batch(BATCH, batches))
    # written whole or not at all: an interrupted run leaves no broken weights behind
    torch.save(model.state_dict(), file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
    return model.state_dict()


def learn(
    isolation_ratio: float | None,
    weights: Mapping[str, Tensor],
    tasks: list[Task],
    options: argparse.Namespace,
    progress: Callable[[], object],
) -> Result:
    """Learn the tasks in order: with torch's AdamW, or with EPI where an isolation ratio is given."""
    model = ByteTransformer(CONTEXT)
    model.load_state_dict(weights)
    if isolation_ratio is None:
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=LEARNING_RATE)
    else:
        optimizer = EPIAdamW(
            model.named_parameters(),
            lr=LEARNING_RATE,
            isolation_ratio=isolation_ratio,
            importance_beta=IMPORTANCE_BETA,
            mask_interval=options.mask_interval,
            layers="block",
        )
    result, first, step = Result([examine(model, tasks)]), {}, 0
    for number, task in enumerate(tasks):
        batches = torch.Generator().manual_seed(len(tasks) * options.seed + number)
        for _ in range(options.steps):
            step += 1
            train(model, optimizer, *task.batch(BATCH, batches))
            if isinstance(optimizer, EPIAdamW) and step % options.mask_interval == 0:
                mask = {name: optimizer.isolation_mask(parameter) for name, parameter in model.named_parameters()}
                first = first or mask
                result.overlap[step] = mask_jaccard(first, mask)
            progress()
        result.accuracy.append(examine(model, tasks))
    if isinstance(optimizer, EPIAdamW):
        result.telemetry = optimizer.telemetry()
    return result


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    """Make one optimizer step."""
    loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def examine(model: nn.Module, tasks: list[Task]) -> list[float]:
    """Return the accuracy on the held-out part of each task, in percent."""
    windows = [task.examination(EXAMINED) for task in tasks]
    pairs = zip(tasks, windows, strict=True)
    return [100 * task.accuracy(model(inputs), targets) for task, (inputs, targets) in pairs]


def tell(results: Mapping[str, Result], tasks: list[Task], parameters: int) -> None:
    """Print what each method learned and forgot."""
    rows = ["before", *(f"after {task.name}" for task in tasks)]

    def line(title: str, values: list[float]) -> None:
        print(f"  {title:24}" + "".join(f"{value:>16.1f}" for value in values))

    print("\nHeld-out accuracy in percent: of the next byte; of whole answers in the last task")
    for method, result in results.items():
        print(f"\n{method}\n  {'':24}" + "".join(f"{task.name:>16}" for task in tasks))
        for title, accuracy in zip(rows, result.accuracy, strict=True):
            line(title, accuracy)
        line("forgetting ratio, %", result.forgetting())
        print(f"  average forgetting ratio {average(result.forgetting()):.1f}%, ", end="")
        print(f"average accuracy right after learning {average(result.learned()):.1f}%")
        if result.telemetry:
            share = result.telemetry[-1]["protected_share"]
            print(f"  {len(result.telemetry)} refreshes; {share:.2%} of the entries protected in the last")
    print("\nForgetting ratio: share of the accuracy right after learning that is lost at the end (Eq. 14).")
    print(LIMITS.format(parameters=f"{parameters:,}"))


def draw(results: Mapping[str, Result], tasks: list[Task], options: argparse.Namespace, parameters: int) -> None:
    """Write the two pictures and the report."""
    names, out = [task.name for task in tasks], options.out
    ratios = {method: [*result.forgetting(), average(result.forgetting())] for method, result in results.items()}
    title = "Share of what was learned that is lost after all four tasks"
    plots.forgetting(ratios, [*names[:-1], "average"], title).savefig(out / "forgetting.png")
    overlaps = {method: result.overlap for method, result in results.items() if result.overlap}
    starts = {name: number * options.steps for number, name in enumerate(names)}
    overlap = partial(plots.mask_overlap, overlaps, starts, "How much of the first mask is still protected")
    overlap().savefig(out / "mask_overlap.png")
    page = report.write(
        out / "report.html",
        "Four tasks in a row: AdamW and EPI",
        facts={
            "model": "byte-level transformer",
            "parameters": f"{parameters:,}",
            "steps for each task": options.steps,
            "steps from refresh to refresh": options.mask_interval,
            "learning rate": LEARNING_RATE,
            "seed": options.seed,
        },
        tasks=names,
        results={method: result.accuracy[1:] for method, result in results.items()},
        measure="held-out accuracy (%)",
        telemetry={method: result.telemetry for method, result in results.items() if result.telemetry},
        more=[
            report.Picture(
                "A line that falls at the start of a task means that the new task uses other entries: a mask that did "
                "not follow would protect what matters no longer.",
                overlap,
            )
        ],
        note=LIMITS.format(parameters=f"{parameters:,}"),
    )
    print(f"\nPictures: {out / 'forgetting.png'}, {out / 'mask_overlap.png'}\nReport, to open in a browser: {page}")


def average(values: list[float]) -> float:
    """Return the mean of the values that are defined; NaN where none is."""
    defined = [value for value in values if not math.isnan(value)]
    return statistics.fmean(defined) if defined else math.nan


if __name__ == "__main__":
    main()
