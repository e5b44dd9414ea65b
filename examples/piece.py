"""Learn two tasks in a row by training 0.1%, 1% or 10% of the entries, and compare with training all of them.

PIECE (arXiv 2511.15375) trains the entries that matter most to the new task, by Fisher information (PIECE-F) or by the
second-order score (PIECE-S); MIGU those behind the largest outputs; LayerNorm the norms alone; EPI all but the most
important ones; AdamW all. Every method starts from the same pre-trained weights and sees the same batches. Entries are
scored in eval() mode: dropout would add its noise to the scores.

Each method's learning rate is chosen by one rule: of RATES, the one with the lowest loss right after learning, the mean
over both tasks, in a run of half the steps with other batches, on the last eighth of the training text, which that run
leaves out. The rule asks how well a method learns, not how much it forgets. Chosen rates are kept in out/.

Prints the performance (OP, BWT, AP) and the cost of each method, and draws what is forgotten. On 2 cores it takes about
six minutes, and three when the rates are there. `python examples/piece.py --help` lists the options.
"""

import argparse
import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import demo
import torch
from model import ByteTransformer
from tasks import CONTEXT, IGNORED, Task, make_tasks
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from epi_kernels import EPIAdamW, SparseAdamW, plots
from epi_kernels.delta import apply_delta, load_delta, save_delta
from epi_kernels.importance import fisher, output_magnitude, second_order
from epi_kernels.metrics import average_performance, backward_transfer, forgetting_ratio, overall_performance
from epi_kernels.select import top_k

RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
SCORED = 64  # examples of a batch of the importance pass
SCORING = threading.Lock()  # it silences a warning of torch meanwhile, in all threads of the process
Batch = tuple[Tensor, Tensor]


@dataclass
class Result:
    """What one method did, and what it cost."""

    performance: list[list[float]] = field(default_factory=list)  # row t: on every task, after learning t, in percent
    trained: int = 0  # entries
    state: int = 0  # bytes of the optimizer
    scoring: float = 0.0  # seconds of all importance passes
    training: float = 0.0  # seconds
    files: list[Path] = field(default_factory=list)  # a delta for each task

    def forgetting(self) -> float:
        """Return the share of the first task's accuracy that is lost at the end, in percent; NaN if it was 0."""
        initial = self.performance[0][0]
        return forgetting_ratio(initial, self.performance[-1][0]) if initial > 0 else math.nan


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison with these command-line arguments."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    # more threads than one cost more than they bring at this size
    torch.set_num_threads(1)
    weights = demo.pretrained(options)
    every = {task.name: task for task in make_tasks()}
    tasks = [every["Python source"], every["doubling"]]
    methods = make_methods(options.ratio)
    rates = chosen_rates(methods, weights, tasks, options)
    results = {}
    with tqdm(total=len(methods) * len(tasks) * options.steps, desc="two tasks, every method", unit="step") as progress:
        for name, method in methods.items():
            results[name] = learn(name, method, rates[name], weights, tasks, options, progress.update)
    report(results, rates, tasks, weights, options)
    draw(results, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=120, help="optimizer steps for each task [%(default)s]")
    add("--ratio", type=float, nargs="+", default=[0.001, 0.01, 0.1], help="shares to train [0.001 0.01 0.1]")
    add("--examples", type=int, default=256, help="examples that a task's entries are scored by [%(default)s]")
    add("--pretrain-steps", type=int, default=300, help="steps that make the starting weights [%(default)s]")
    add("--seed", type=int, default=0, help="of the weights and the batches [%(default)s]")
    add("--out", type=Path, default=Path("out"), help="folder of weights, rates, deltas and picture [%(default)s]")
    return parser.parse_args(arguments)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a batch."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


# A method scores the entries and trains some of them, or builds an optimizer of its own -------------------------------


def fisher_information(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Score as PIECE-F."""
    return fisher(model, batches, loss_of, progress=False)


def second_order_score(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Score as PIECE-S."""
    return second_order(model, batches, loss_of, progress=False)


def size_of_outputs(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Score as MIGU, the rows of every linear layer."""
    return output_magnitude(model, batches, forward=lambda model, batch: model(batch[0]))


def layer_norms(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW of the norms alone."""
    norms = [p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()]
    return torch.optim.AdamW(norms, lr=rate)


def epi(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return EPI, which trains all but 1%."""
    return EPIAdamW(model.named_parameters(), lr=rate, mask_interval=24, importance_beta=0.95, layers="block")


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW of everything."""
    return torch.optim.AdamW(model.parameters(), lr=rate)


@dataclass(frozen=True)
class Method:
    """One row of the table: with `score` it trains the share `ratio`, with `build` what that optimizer trains."""

    score: Callable[[nn.Module, list[Batch]], dict[str, Tensor]] | None = None
    ratio: float = 1.0
    scope: str = "global"  # of `ratio`
    build: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Return the optimizer; one that trains a share has none selected yet."""
        return self.build(model, rate) if self.build else SparseAdamW(model.named_parameters(), lr=rate, trainable={})

    def mask(self, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        """Return the entries to train for the task of these batches."""
        model.eval()
        with SCORING:
            scores = self.score(model, batches)
        model.train()
        return top_k(scores, self.ratio, scope=self.scope)


def row(name: str, ratio: float) -> str:
    """Return the title of a method that trains a share."""
    return f"{name}, {100 * ratio:.3g}%"


def make_methods(ratios: list[float]) -> dict[str, Method]:
    """Return the methods by name."""
    scores = {"PIECE-F": fisher_information, "PIECE-S": second_order_score}
    methods = {row(name, ratio): Method(score, ratio) for name, score in scores.items() for ratio in ratios}
    return methods | {
        # whole rows: fewer of them learn little
        row("MIGU", max(ratios)): Method(size_of_outputs, max(ratios), "layer"),
        "LayerNorm": Method(build=layer_norms),
        "EPI, p = 1%": Method(build=epi),
        "AdamW": Method(build=adamw),
    }


# Learning -------------------------------------------------------------------------------------------------------------


def steps_of(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    options: argparse.Namespace,
    seed: int,
    result: Result,
) -> Iterator[None]:
    """Learn a task, and yield after every optimizer step."""
    if method.score:
        drawn = torch.Generator().manual_seed(seed + (1 << 32))
        sizes = [min(SCORED, options.examples - first) for first in range(0, options.examples, SCORED)]
        started = time.perf_counter()
        mask = method.mask(model, [task.batch(size, drawn) for size in sizes])
        result.scoring += time.perf_counter() - started
        optimizer.select(mask)  # with fresh moments
    drawn = torch.Generator().manual_seed(seed)
    while True:
        started = time.perf_counter()
        loss_of(model, task.batch(demo.BATCH, drawn)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        result.training += time.perf_counter() - started
        yield


def learn(
    name: str,
    method: Method,
    rate: float,
    weights: Mapping[str, Tensor],
    tasks: list[Task],
    options: argparse.Namespace,
    progress: Callable[[], object],
) -> Result:
    """Learn the tasks in order."""
    model = ByteTransformer(CONTEXT)
    model.load_state_dict(weights)
    result, optimizer = Result(), method.optimizer(model, rate)
    for number, task in enumerate(tasks):
        steps = steps_of(method, model, optimizer, task, options, len(tasks) * options.seed + number, result)
        for _ in zip(range(options.steps), steps, strict=False):
            progress()
        result.performance.append(demo.examine(model, tasks))
        if method.score:
            file = name.lower().replace(", ", "-").replace("%", "-percent")
            result.files.append(options.out / f"{file}-task-{number + 1}.safetensors")
            save_delta(optimizer.delta(), result.files[-1])
    result.state = sum(
        value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
    )
    if method.score:
        result.trained = sum(len(state["indices"]) for state in optimizer.state.values())
        restored = ByteTransformer(CONTEXT)
        restored.load_state_dict(weights)
        for file in result.files:
            apply_delta(restored, load_delta(file))
        trained = model.state_dict()
        if not all(torch.equal(value, trained[key]) for key, value in restored.state_dict().items()):
            raise RuntimeError(f"the deltas of {name} have not restored the model that it trained")
    else:
        result.trained = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
        if isinstance(optimizer, EPIAdamW):
            result.trained -= sum(int(optimizer.isolation_mask(param).sum()) for param in model.parameters())
    return result


def chosen_rates(
    methods: Mapping[str, Method], weights: Mapping[str, Tensor], tasks: list[Task], options: argparse.Namespace
) -> dict[str, float]:
    """Return each method's learning rate by the rule above; kept under a name that changes with what chose them."""
    files = ("demo.py", "model.py", "piece.py", "tasks.py")
    sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in files)
    recipe = (options.steps, options.ratio, options.examples, options.pretrain_steps, options.seed)
    recipe = repr((*recipe, sys.version, torch.__version__, sources))
    file = options.out / f"rates-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.json"
    if file.exists():
        return json.loads(file.read_text())
    # a task's text is whole lines, and so are its parts
    cuts = [len(task.train) * 7 // 8 // task.unit * task.unit for task in tasks]
    parts = [
        Task(task.name, task.train[:cut], task.train[cut:], task.unit) for task, cut in zip(tasks, cuts, strict=True)
    ]
    steps = -(-options.steps // 2)
    runs = [(name, rate) for name in methods for rate in RATES]
    with (
        tqdm(total=len(runs) * len(tasks) * steps, desc="choosing rates, once", unit="step") as progress,
        ThreadPoolExecutor(2) as pool,
    ):
        jobs = [pool.submit(tried, methods[n], rate, weights, parts, steps, options, progress) for n, rate in runs]
        losses = dict(zip(runs, [job.result() for job in jobs], strict=True))
    rates = {name: min(RATES, key=lambda rate: losses[name, rate]) for name in methods}
    file.with_suffix(".part").write_text(json.dumps(rates))
    file.with_suffix(".part").replace(file)
    return rates


def tried(
    method: Method,
    rate: float,
    weights: Mapping[str, Tensor],
    tasks: list[Task],
    count: int,
    options: argparse.Namespace,
    progress: tqdm,
) -> float:
    """Return the loss right after `count` steps of a task, the mean over the tasks; infinity where it is not finite."""
    model = ByteTransformer(CONTEXT)
    model.load_state_dict(weights)
    optimizer, losses = method.optimizer(model, rate), []
    for number, task in enumerate(tasks):
        # no run of the report has this seed
        steps = steps_of(method, model, optimizer, task, options, (1 << 33) + number, Result())
        for _ in zip(range(count), steps, strict=False):
            progress.update()
        with torch.no_grad():
            losses.append(loss_of(model, task.examination(demo.EXAMINED)).item())
    loss = sum(losses) / len(losses)
    return loss if math.isfinite(loss) else math.inf


# What came out --------------------------------------------------------------------------------------------------------


def report(
    results: Mapping[str, Result],
    rates: Mapping[str, float],
    tasks: list[Task],
    weights: Mapping[str, Tensor],
    options: argparse.Namespace,
) -> None:
    """Print what each method learned, forgot and cost, and what that says."""
    size = sum(value.numel() * value.element_size() for value in weights.values())
    print(f"\nTasks: {', then '.join(task.name for task in tasks)}. Held-out accuracy in percent.")
    print(
        "OP: on both at the end. BWT: change of the first by the second, over 2. AP: on each right after learning it."
    )
    print(f"rate: of {', '.join(f'{rate:g}' for rate in RATES)}, the one with which the method learns best in shorter")
    print("runs (the rule is in this file's docstring). Entries are scored in eval() mode.\n")
    titles = ("rate", "OP", "BWT", "AP", "trained", "state, KB", "scoring, s", "training, s", "delta")
    print(f"{'':14}" + "".join(f"{title:>12}" for title in titles))
    for name, result in results.items():
        measures = [f(result.performance) for f in (overall_performance, backward_transfer, average_performance)]
        delta = max((file.stat().st_size for file in result.files), default=0) / size
        cells = [f"{rates[name]:g}"]
        cells += [f"{value:.1f}" for value in measures]
        cells += [
            f"{result.trained:,}",
            f"{result.state / 1e3:,.1f}",
            f"{result.scoring:.1f}",
            f"{result.training:.1f}",
        ]
        print(f"{name:14}" + "".join(f"{cell:>12}" for cell in [*cells, f"{delta:.2%}" if delta else ""]))
    untrained = ByteTransformer(CONTEXT)
    untrained.load_state_dict(weights)
    before = demo.examine(untrained, tasks)
    print(f"\ndelta: the largest file of a task, of {size / 1e6:.1f} MB of weights. Put onto them in order, the deltas")
    print("restored the trained weights bit for bit.")
    print(f"\nThe trade-off, from {before[0]:.1f} and {before[1]:.1f} before any training:")
    full = results["AdamW"]
    for name in [name for name in results if name.startswith("PIECE")] + ["AdamW"]:
        result = results[name]
        learned = " and ".join(f"{result.performance[number][number]:.1f}" for number in range(len(tasks)))
        state = result.state / full.state
        print(f"  {name:13} learns {learned}, then has lost {result.forgetting():.1f}% of the first; state {state:.2%}")
    few = results[row("PIECE-F", min(options.ratio))]
    if few.performance[1][1] < full.performance[1][1] / 2:
        print(f"{few.trained:,} entries cannot learn {tasks[1].name}: too few in a model of this size. What they lose")
        print("says nothing beside what methods lose that learn it. In a model of billions, 0.1% are millions.")
    nearly = 0.9 * average_performance(full.performance)
    for ratio in sorted(options.ratio):
        result = results[row("PIECE-F", ratio)]
        if average_performance(result.performance) >= nearly:
            state = result.state / full.state
            lost = "less" if result.forgetting() < full.forgetting() else "no less"
            print(f"{100 * ratio:.3g}% is the least share with nine tenths of AdamW's AP, with {state:.2%} of")
            print(f"its state, and {lost} forgotten: {result.forgetting():.1f}% against {full.forgetting():.1f}%.")
            break
    print(
        "One small model and one seed: this shows the tools, their cost and the trade-off, not what methods are worth."
    )


def draw(results: Mapping[str, Result], options: argparse.Namespace) -> None:
    """Draw what is forgotten at each share, and say below it what is learned."""
    full = results["AdamW"]
    bars = {"AdamW (trains all)": [full.forgetting()] * len(options.ratio)}
    bars |= {
        kind: [results[row(kind, ratio)].forgetting() for ratio in options.ratio] for kind in ("PIECE-F", "PIECE-S")
    }
    labels = [
        f"{100 * ratio:.3g}% trained\nPIECE-F learns {results[row('PIECE-F', ratio)].performance[1][1]:.0f}"
        for ratio in options.ratio
    ]
    title = f"Lost of the first task; below, learned of the second (AdamW: {full.performance[1][1]:.0f})"
    plots.forgetting(bars, labels, title).savefig(options.out / "piece.png")
    print(f"\nPicture: {options.out / 'piece.png'}")


if __name__ == "__main__":
    main()
