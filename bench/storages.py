"""What it costs in quality to keep weights, moments and importances in fewer bits: in loss, and in the choice of masks.

    python bench/storages.py                 # everything that the results do not have yet; hours in all
    python bench/storages.py --workers 2     # two runs at a time, each with one thread
    python bench/storages.py --report        # only the tables, here and in bench/README.md, and the picture
    python bench/storages.py --quick         # a few steps, to see that it works

Both experiments learn Python source with the demo's model, from the demo's pre-trained weights rounded to bfloat16.
Each finished run is written at once, and a run that is in the results is not run again: an interrupted program can be
started again and loses only the runs that it was in.

LOSS. Every storage learns from the same batches, in the same number of steps. Forward and backward are in float32, at
the values that a user has in the parameters, which are bfloat16 where the weights are; clipped gradients reach the
optimizer in float32. So nothing but the storage differs. The final loss is the mean over the batches of the last 100
steps, each before its step; nearly all of that text is new to the model. The loss on held-out windows, after the last
step, is noted too. A storage is compared with float32 on the same seed: the mean of the differences, and its 95%
interval by Student's t. THE BAR: the interval ends below a tenth of what weights in bfloat16 lose that are rounded to
nearest, with states in float32.

MASKS. A float32 optimizer learns; others, which change nothing, get the same gradients and keep the importance in other
storages. At every refresh each mask is compared with that of float32 (Jaccard), and, to have a measure, a float32
importance fed with other batches at the same weights is compared with it as well. THE BARS: at every refresh a storage
is closer to float32 than the other batches are; and it protects at most 1% of k more entries than k.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cases import machine
from intervals import QUANTILES, Interval
from intervals import interval as interval_of
from pages import table, write_between
from torch import Tensor, nn
from torch.nn import Parameter, functional
from tqdm import tqdm

from epi_kernels import EPIAdamW
from epi_kernels.engine.storages import stored
from epi_kernels.metrics import mask_jaccard

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402
from model import ByteTransformer  # noqa: E402
from tasks import CONTEXT, Task, make_tasks  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "storages.json"
README = ROOT / "bench" / "README.md"
MARKS = ("<!-- tables of storages.py begin here -->", "<!-- tables of storages.py end here -->")
TASK = "Python source"
RATES = (1e-5, demo.LEARNING_RATE)  # one of fine-tuning a large model, and the demo's
LAST = 100  # steps whose losses make the final loss
BAR = 0.1  # of what bfloat16 weights rounded to nearest lose
LARGEST_EXCESS = 0.01  # protected entries beyond k, as a share of k
LEAST_SHARE = 0.8  # of the model's entries are to be in the storage that is tested
EXCESS = "(protected - k) / k"
MASK_RATE = demo.LEARNING_RATE


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a file of results have in common."""

    steps: int = 2000
    mask_steps: int = 1000
    # a third of the demo's batch: with the demo's own, the runs would take twice as long
    batch: int = 4
    mask_interval: int = 50
    isolation_ratio: float = 0.01
    held_out: int = 512  # windows
    pretrain_steps: int = 300


QUICK = Settings(steps=4, mask_steps=4, batch=1, mask_interval=2, held_out=2, pretrain_steps=2)


@dataclasses.dataclass(frozen=True)
class Storage:
    """One way to keep a model and its optimizer's states.

    Attributes:
        weights: dtype of the parameters.
        settings: arguments of EPIAdamW.
        expected: dtypes of first moment, second moment, importance and rest that its state must have, uint8 for codes;
            a second moment that is the importance counts as both.
        baseline: the storage in float32 that trains by the same rule.
    """

    weights: torch.dtype
    settings: Mapping[str, Any]
    expected: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]
    baseline: str


HALF, FULL, BYTE = torch.bfloat16, torch.float32, torch.uint8
FLOAT32 = "float32"
IN_SECOND_MOMENT = "float32, importance in exp_avg_sq"
NEAREST = "bf16 weights to nearest, float32 states"

STORAGES = {
    FLOAT32: Storage(FULL, {}, (FULL, FULL, FULL, None), FLOAT32),
    NEAREST: Storage(HALF, {}, (FULL, FULL, FULL, None), FLOAT32),
    "float32 weights, bf16 states": Storage(FULL, {"state_dtype": HALF}, (HALF, HALF, HALF, None), FLOAT32),
    "float32 weights, 8-bit states": Storage(FULL, {"state_dtype": "8bit"}, (BYTE, BYTE, BYTE, None), FLOAT32),
    "bf16 weights stochastic, float32 states": Storage(
        HALF, {"rounding": "stochastic"}, (FULL, FULL, FULL, None), FLOAT32
    ),
    "24-bit weights, 8-bit states": Storage(
        HALF, {"master_weight_bits": 24, "state_dtype": "8bit"}, (BYTE, BYTE, BYTE, torch.int8), FLOAT32
    ),
    IN_SECOND_MOMENT: Storage(FULL, {"importance": "exp_avg_sq"}, (FULL, FULL, FULL, None), IN_SECOND_MOMENT),
    "24-bit weights, 8-bit states, importance in exp_avg_sq": Storage(
        HALF,
        {"master_weight_bits": 24, "state_dtype": "8bit", "importance": "exp_avg_sq"},
        (BYTE, BYTE, BYTE, torch.int8),
        IN_SECOND_MOMENT,
    ),
    "32-bit weights, bf16 states": Storage(
        HALF, {"master_weight_bits": 32, "state_dtype": HALF}, (HALF, HALF, HALF, torch.int16), FLOAT32
    ),
    "32-bit weights, float32 states": Storage(
        HALF, {"master_weight_bits": 32}, (FULL, FULL, FULL, torch.int16), FLOAT32
    ),
}

# the masks that are compared: name -> (arguments of EPIAdamW, the name of the float32 mask that it is compared with)
OTHER_BATCHES = "float32, other batches"
MASKS: dict[str, tuple[Mapping[str, Any], str]] = {
    FLOAT32: ({}, FLOAT32),
    OTHER_BATCHES: ({}, FLOAT32),
    "bf16": ({"importance_dtype": HALF}, FLOAT32),
    "8 bits": ({"importance_dtype": "8bit"}, FLOAT32),
    IN_SECOND_MOMENT: ({"importance": "exp_avg_sq"}, IN_SECOND_MOMENT),
    f"{OTHER_BATCHES}, in exp_avg_sq": ({"importance": "exp_avg_sq"}, IN_SECOND_MOMENT),
    "bf16, in exp_avg_sq": ({"importance": "exp_avg_sq", "state_dtype": HALF}, IN_SECOND_MOMENT),
    "8 bits, in exp_avg_sq": ({"importance": "exp_avg_sq", "state_dtype": "8bit"}, IN_SECOND_MOMENT),
}


# The runs -------------------------------------------------------------------------------------------------------------


@functools.cache
def task() -> Task:
    """Return the task that is learned."""
    return next(task for task in make_tasks() if task.name == TASK)


def start(settings: Settings, folder: Path) -> dict[str, Tensor]:
    """Return the weights from which every run starts: values of bfloat16, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    options = argparse.Namespace(out=folder, pretrain_steps=settings.pretrain_steps, seed=0)
    return {name: value.bfloat16().float() for name, value in demo.pretrained(options).items()}


class Twin:
    """The model in float32 in which losses and gradients are computed, at the values of other parameters."""

    def __init__(self, weights: Mapping[str, Tensor], settings: Settings) -> None:
        self.model = ByteTransformer(CONTEXT)
        self.model.load_state_dict(weights)
        self.batch = settings.batch
        self.held_out = settings.held_out

    def take(self, params: Sequence[Tensor]) -> None:
        """Take the values of these parameters, which stand in the order of the model's."""
        with torch.no_grad():
            for own, param in zip(self.model.parameters(), params, strict=True):
                own.copy_(param)

    def gradients(self, generator: torch.Generator) -> tuple[float, list[Tensor]]:
        """Return the loss on the next batch, and the gradients with a norm of at most 1."""
        inputs, targets = task().batch(self.batch, generator)
        loss = self._loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        gradients = [param.grad for param in self.model.parameters() if param.grad is not None]
        self.model.zero_grad()
        return loss.item(), gradients

    @torch.no_grad()
    def examine(self) -> float:
        """Return the mean loss on the held-out windows, nats per byte."""
        inputs, targets = task().examination(self.held_out)
        pairs = zip(inputs.split(64), targets.split(64), strict=True)
        return sum(len(some) * self._loss(some, theirs).item() for some, theirs in pairs) / len(inputs)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())


def parameters(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Parameter]:
    """Return parameters that take gradients in float32, whatever their own dtype."""
    params = {name: Parameter(value.to(dtype, copy=True)) for name, value in weights.items()}
    for param in params.values():
        param.grad_dtype = None
    return params


def optimizer_over(params: Mapping[str, Parameter], settings: Settings, seed: int, **more: Any) -> EPIAdamW:
    """Return the optimizer of all runs, with the arguments of one."""
    return EPIAdamW(
        [{"params": list(params.items()), "rounding_seed": seed}],
        isolation_ratio=settings.isolation_ratio,
        mask_interval=settings.mask_interval,
        layers="block",
        **more,
    )


def step_with(optimizer: EPIAdamW, params: Mapping[str, Parameter], gradients: Sequence[Tensor]) -> None:
    """Take a step with these gradients, one for each parameter."""
    for param, gradient in zip(params.values(), gradients, strict=True):
        param.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def share_in(storage: Storage, params: Mapping[str, Parameter], optimizer: EPIAdamW) -> float:
    """Return which share of the entries is kept as the storage says, by the dtypes of parameters and states."""
    kept = 0
    for param in params.values():
        state = optimizer.state[param]
        first, second, importance = (stored(state, name)[0] for name in ("exp_avg", "exp_avg_sq", "importance"))
        # codes of a second moment that is the importance have one name
        tensors = (first, second, second if importance is None else importance, state.get("rest"))
        found = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        kept += param.numel() * (param.dtype == storage.weights and found == storage.expected)
    return kept / sum(param.numel() for param in params.values())


def bytes_per_entry(params: Mapping[str, Parameter], optimizer: EPIAdamW) -> float:
    """Return the bytes of weights and states for each entry."""
    tensors = list(params.values()) + [
        value for param in params.values() for key, value in optimizer.state[param].items() if key != "step"
    ]
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(sizes.values()) / sum(param.numel() for param in params.values())


def largest_excess(optimizer: EPIAdamW) -> float:
    """Return the largest (protected - k) / k of all refreshes."""
    records = optimizer.telemetry()
    return max(record["protected"] / record["budget"] - 1 for record in records)


def learned(
    name: str,
    seed: int,
    rate: float,
    settings: Settings,
    weights: Mapping[str, Tensor],
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Learn the task with a storage, and return the run as it stands in the results.

    Args:
        name: of the storage.
        seed: of the batches and of the noise of the rounding.
        rate: the learning rate.
        settings: of all runs.
        weights: see `start`.
        progress: called after every step.

    Raises:
        RuntimeError: less than `LEAST_SHARE` of the entries are in the storage.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    storage, twin = STORAGES[name], Twin(weights, settings)
    params = parameters(weights, storage.weights)
    optimizer = optimizer_over(params, settings, seed, lr=rate, **storage.settings)
    batches, losses = torch.Generator().manual_seed(seed), []
    for _ in range(settings.steps):
        twin.take(list(params.values()))
        loss, gradients = twin.gradients(batches)
        step_with(optimizer, params, gradients)
        losses.append(loss)
        progress()
    twin.take(list(params.values()))
    share = share_in(storage, params, optimizer)
    if share < LEAST_SHARE:
        raise RuntimeError(f"{name}: only {share:.1%} of the entries are in this storage")
    return {
        "storage": name,
        "seed": seed,
        "lr": rate,
        "loss": statistics.fmean(losses[-LAST:]),
        "held_out": twin.examine(),
        "share": share,
        "bytes_per_entry": bytes_per_entry(params, optimizer),
        "excess": largest_excess(optimizer),
        "cpu_seconds": time.process_time() - began,
    }


def compared_masks(settings: Settings, weights: Mapping[str, Tensor], progress: Callable[[], object]) -> dict[str, Any]:
    """Run the experiment with masks, and return it as it stands in the results.

    Returns:
        "lr", "refreshes" (steps), and "masks": name -> "against" (the float32 mask that it is compared with),
        "jaccard" and "excess", (protected - k) / k, with a value for each refresh.
    """
    torch.set_num_threads(1)
    twin = Twin(weights, settings)
    params = parameters(weights, FULL)
    leader = optimizer_over(params, settings, 0, lr=MASK_RATE)
    # shadows change nothing: their learning rate and weight decay are 0
    shadows = {}
    for name, (more, _) in MASKS.items():
        own = parameters(weights, FULL)
        shadows[name] = own, optimizer_over(own, settings, 0, lr=0.0, weight_decay=0.0, **more)
    batches, others = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    found: dict[str, Any] = {
        name: {"against": against, "jaccard": [], "excess": []} for name, (_, against) in MASKS.items()
    }
    refreshes = []
    for step in range(1, settings.mask_steps + 1):
        twin.take(list(params.values()))
        gradients, different = (twin.gradients(generator)[1] for generator in (batches, others))
        for name, (own, optimizer) in shadows.items():
            step_with(optimizer, own, different if name.startswith(OTHER_BATCHES) else gradients)
        step_with(leader, params, gradients)
        progress()
        if step % settings.mask_interval:
            continue
        refreshes.append(step)
        masks = {
            name: {key: optimizer.isolation_mask(param) for key, param in own.items()}
            for name, (own, optimizer) in shadows.items()
        }
        for name, row in found.items():
            record = shadows[name][1].telemetry()[-1]
            row["jaccard"].append(mask_jaccard(masks[name], masks[row["against"]]))
            row["excess"].append(record["protected"] / record["budget"] - 1)
        leading = {key: leader.isolation_mask(param) for key, param in params.items()}
        if mask_jaccard(leading, masks[FLOAT32]) != 1.0:
            raise RuntimeError("a shadow in float32 has another mask than the optimizer that it follows")
    for own, _ in shadows.values():
        if any(not torch.equal(param, weights[key]) for key, param in own.items()):
            raise RuntimeError("a shadow has changed its parameters")
    return {"lr": MASK_RATE, "refreshes": refreshes, "masks": found}


# The results ----------------------------------------------------------------------------------------------------------


def loaded(file: Path, settings: Settings) -> dict[str, Any]:
    """Return the results of a file, or empty ones with a description of this machine.

    Raises:
        ValueError: the results are of other settings.
    """
    ours = {**dataclasses.asdict(settings), "task": TASK}
    if not file.exists():
        return {"machine": {**machine(), "threads": 1}, "settings": ours, "runs": [], "masks": None}
    results = json.loads(file.read_text())
    if results["settings"] != ours:
        raise ValueError(f"{file} has results of other settings, {results['settings']}; choose another by --json")
    return results


def write(file: Path, results: Mapping[str, Any]) -> None:
    """Write results whole or not at all, so that an interrupted program leaves none broken."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(file)


def missing(results: Mapping[str, Any], seeds: int) -> list[tuple[str, int, float]]:
    """Return (storage, seed, learning rate) of the runs that are not there yet; whole seeds come first."""
    there = {(run["storage"], run["seed"], run["lr"]) for run in results["runs"]}
    wanted = [(name, seed, rate) for seed, rate, name in itertools.product(range(seeds), RATES, STORAGES)]
    return [run for run in wanted if run not in there]


def difference(runs: Sequence[Mapping[str, Any]], name: str, rate: float, field: str) -> Interval:
    """Return the mean and the interval of a storage's paired differences to its baseline.

    Only seeds that both have count.
    """
    values = {(run["storage"], run["seed"]): run[field] for run in runs if run["lr"] == rate}
    baseline = STORAGES[name].baseline
    pairs = [
        value - values[baseline, seed]
        for (own, seed), value in values.items()
        if own == name and (baseline, seed) in values
    ]
    return interval_of(pairs)


def rows(results: Mapping[str, Any], rate: float, field: str = "loss") -> Iterator[dict[str, Any]]:
    """Yield what is found of each storage at a learning rate, but for float32, and for storages without a run.

    Its "storage", "bytes" for each entry, the "mean" difference, "half" of the interval, "seeds", the difference
    "of_nearest", the largest "excess" of protected entries, and whether the bar is "met"; None for rounding to
    nearest, which sets the bar, and where there is one seed.
    """
    runs = results["runs"]
    nearest = difference(runs, NEAREST, rate, field)[0]
    for name, storage in STORAGES.items():
        mean, half, seeds = difference(runs, name, rate, field)
        if name == storage.baseline or not seeds:
            continue
        own = [run for run in runs if run["storage"] == name and run["lr"] == rate]
        yield {
            "storage": name,
            "bytes": own[0]["bytes_per_entry"],
            "mean": mean,
            "half": half,
            "seeds": seeds,
            "of_nearest": mean / nearest,
            "excess": max(run["excess"] for run in own),
            "met": None if name == NEAREST or seeds < 2 else mean + half < BAR * nearest,
        }


def report(results: Mapping[str, Any]) -> str:
    """Return the tables of bench/README.md."""
    tables = [
        table(
            [f"lr {rate:g}", "bytes", "loss - float32", "of nearest's", "held out - float32", "seeds", "bar", EXCESS],
            loss_cells(results, rate),
        )
        for rate in RATES
    ]
    if results["masks"]:
        titles = ["importance", "Jaccard, least", "mean", "closer than other batches", "bar", EXCESS]
        tables.append(table(titles, mask_cells(results["masks"]["masks"])))
    named, settings = results["machine"], results["settings"]
    tables.append(
        f"{len(results['runs'])} runs of {settings['steps']} steps; {named['device']}, {named['threads']} thread, "
        f"torch {named['torch']}, {named['date']}"
    )
    return "\n\n".join(tables)


def loss_cells(results: Mapping[str, Any], rate: float) -> Iterator[list[str]]:
    """Yield the cells of a row for each storage."""
    for row, held_out in zip(rows(results, rate), rows(results, rate, "held_out"), strict=True):
        cells = [row["storage"], f"{row['bytes']:.1f}", interval(row), f"{row['of_nearest']:.1%}"]
        yield [*cells, interval(held_out), str(row["seeds"]), said(row["met"]), beyond(row["excess"])]


def mask_cells(masks: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the cells of a row for each mask that is compared with another."""
    for name, row in masks.items():
        if row["against"] == name:
            continue
        other = next(
            own["jaccard"]
            for other, own in masks.items()
            if other.startswith(OTHER_BATCHES) and own["against"] == row["against"]
        )
        closer = sum(mine > theirs for mine, theirs in zip(row["jaccard"], other, strict=True))
        cells = [name, f"{min(row['jaccard']):.4f}", f"{statistics.fmean(row['jaccard']):.4f}"]
        if name.startswith(OTHER_BATCHES):
            yield [*cells, "", "", beyond(max(row["excess"]))]
        else:
            closer_than = f"{closer} of {len(other)} refreshes"
            yield [*cells, closer_than, said(closer == len(other)), beyond(max(row["excess"]))]


def interval(row: Mapping[str, Any]) -> str:
    """Return a mean and half of its interval, in thousandths of a nat for each byte."""
    half = "?" if math.isinf(row["half"]) else f"{1e3 * row['half']:.2f}"
    return f"{1e3 * row['mean']:+.2f} ± {half}"


def beyond(excess: float) -> str:
    """Return what a table says of the largest (protected - k) / k."""
    return f"{excess:.2%}" if excess <= LARGEST_EXCESS else f"**{excess:.2%}, not met**"


def said(met: bool | None) -> str:
    """Return what a table says of a bar."""
    return {None: "", True: "met", False: "**not met**"}[met]


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Write the picture: losses of the storages beside the bar, and the masks over the refreshes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    grid = figure.subplot_mosaic([[*map(str, RATES)], ["masks", "masks"]])
    names = [name for name, storage in STORAGES.items() if name not in (NEAREST, storage.baseline)]
    for rate in RATES:
        axes = grid[str(rate)]
        found = {row["storage"]: row for row in rows(results, rate)}
        shown = {names.index(name): row for name, row in found.items() if name != NEAREST}
        means = [1e3 * row["mean"] for row in shown.values()]
        halves = [0 if math.isinf(row["half"]) else 1e3 * row["half"] for row in shown.values()]
        axes.errorbar(means, list(shown), xerr=halves, fmt="o", color="#00517d", capsize=3)
        axes.axvline(0, color="#333333", linewidth=0.8)
        if NEAREST in found:
            axes.axvline(BAR * 1e3 * found[NEAREST]["mean"], color="#e69f00", linestyle="--")
        axes.set_yticks(range(len(names)), names if rate == RATES[0] else [], fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(f"learning rate {rate:g}: final loss - float32's, thousandths of a nat", fontsize=8)
    axes = grid["masks"]
    if results["masks"]:
        colours = iter(("#9a9a9a", "#56b4e9", "#00517d", "#d9a9a9", "#e69f00", "#cc79a7"))
        for name, row in results["masks"]["masks"].items():
            if row["against"] != name:
                axes.plot(results["masks"]["refreshes"], row["jaccard"], "o-", color=next(colours), ms=3, label=name)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("Jaccard with float32's mask")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, ncols=2, fontsize=8)
    figure.suptitle(
        "What it costs to keep numbers in fewer bits: in loss (mean, 95% interval; dashed: the bar), and in masks",
        fontsize=10,
    )
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, help="steps of each run that learns [2000]")
    add("--seeds", type=int, help="runs of each storage at each learning rate, at most 10 [5]")
    add("--workers", type=int, default=1, help="runs at a time, each with one thread [%(default)s]")
    add("--quick", action="store_true", help="a few steps of small batches")
    add("--report", action="store_true", help="run nothing")
    add("--json", type=Path, help="file of the results [bench/results/storages.json; out/quick.json with --quick]")
    add("--out", type=Path, default=ROOT / "out", help="folder of the starting weights [%(default)s]")
    options = parser.parse_args(arguments)
    seeds = options.seeds or (2 if options.quick else 5)
    if seeds > len(QUANTILES) + 1:
        parser.error(f"at most {len(QUANTILES) + 1} seeds")
    settings = QUICK if options.quick else Settings()
    if options.steps:
        settings = dataclasses.replace(settings, steps=options.steps)
    file = options.json or (options.out / "quick.json" if options.quick else RESULTS)
    results = loaded(file, settings)
    if not options.report:
        run(results, seeds, settings, options, file)
    print(report(results))
    draw(results, file.with_suffix(".png"))
    if file == RESULTS:
        write_between(README, MARKS, report(results))


def run(results: dict[str, Any], seeds: int, settings: Settings, options: argparse.Namespace, file: Path) -> None:
    """Run what is missing, and write each run when it is finished."""
    torch.set_num_threads(1)
    weights = start(settings, options.out)
    if not results["masks"]:
        with tqdm(total=settings.mask_steps, desc="masks", unit="step") as progress:
            results["masks"] = compared_masks(settings, weights, progress.update)
        write(file, results)
    left = missing(results, seeds)
    with tqdm(total=len(left) * settings.steps, desc=f"{len(left)} runs", unit="step") as progress:

        def keep(found: dict[str, Any]) -> None:
            results["runs"].append(found)
            write(file, results)

        if options.workers == 1:
            for chosen in left:
                keep(learned(*chosen, settings, weights, progress.update))
            return
        # processes that start anew: one that is forked from threads of torch may hang
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
            for future in as_completed([pool.submit(learned, *chosen, settings, weights) for chosen in left]):
                keep(future.result())
                progress.update(settings.steps)


if __name__ == "__main__":
    main()
