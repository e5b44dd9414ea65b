"""Learn two tasks in a row by training 0.1% of the entries, and compare with training all of them.

PIECE (arXiv 2511.15375) trains the entries that matter most to the new task, by Fisher information (PIECE-F) or by the
second-order score (PIECE-S); MIGU those behind the largest outputs; LayerNorm the norms alone; EPI all but the most
important ones; AdamW all. Every method starts from the same pre-trained weights and sees the same batches. Prints the
performance (OP, BWT, AP), and what each method costs. `python examples/piece.py --help` lists the options.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo
import torch
from model import ByteTransformer
from tasks import CONTEXT, IGNORED, Task, make_tasks
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from epi_kernels import EPIAdamW, SparseAdamW
from epi_kernels.delta import apply_delta, load_delta, save_delta
from epi_kernels.importance import fisher, output_magnitude, second_order
from epi_kernels.metrics import average_performance, backward_transfer, overall_performance
from epi_kernels.select import top_k

LEARNING_RATE = 5e-4
SPARSE_RATE = 1e-2  # a thousandth of the entries must each move further
SCORED = 64  # examples of a batch of the importance pass


@dataclass
class Result:
    """What one method did, and what it cost."""

    performance: list[list[float]] = field(default_factory=list)  # row t: on every task, after learning t, in percent
    trained: int = 0  # entries
    state: int = 0  # bytes of the optimizer
    scoring: float = 0.0  # seconds of all importance passes
    training: float = 0.0  # seconds
    files: list[Path] = field(default_factory=list)  # a delta for each task


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison with these command-line arguments."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    weights = demo.pretrained(options)
    every = {task.name: task for task in make_tasks()}
    tasks = [every["Python source"], every["doubling"]]
    results = {}
    with tqdm(total=len(METHODS) * len(tasks) * options.steps, desc="two tasks, every method", unit="step") as progress:
        for name, method in METHODS.items():
            results[name] = learn(name, method, weights, tasks, options, progress.update)
    report(results, tasks, weights)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=120, help="optimizer steps for each task [%(default)s]")
    add("--ratio", type=float, default=0.001, help="share of the entries that the sparse methods train [%(default)s]")
    add("--examples", type=int, default=256, help="examples that a task's entries are scored by [%(default)s]")
    add("--pretrain-steps", type=int, default=300, help="steps that make the starting weights [%(default)s]")
    add("--seed", type=int, default=0, help="of the weights and the batches [%(default)s]")
    add("--threads", type=int, default=torch.get_num_threads(), help="[%(default)s]")
    add("--out", type=Path, default=Path("out"), help="folder of the starting weights and the deltas [%(default)s]")
    return parser.parse_args(arguments)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


# A method chooses the mask of a task, or is a way to build an optimizer of its own ------------------------------------

Batches = list[tuple[Tensor, Tensor]]


def piece_f(model: nn.Module, batches: Batches, ratio: float) -> dict[str, Tensor]:
    """Return the entries with the largest Fisher information."""
    return top_k(fisher(model, batches, loss_of, progress=False), ratio)


def piece_s(model: nn.Module, batches: Batches, ratio: float) -> dict[str, Tensor]:
    """Return the entries with the largest second-order score."""
    return top_k(second_order(model, batches, loss_of, progress=False), ratio)


def migu(model: nn.Module, batches: Batches, ratio: float) -> dict[str, Tensor]:
    """Return the rows of every linear layer with the largest outputs."""
    return top_k(output_magnitude(model, batches, forward=lambda m, batch: m(batch[0])), ratio, scope="layer")


def layer_norms(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW of the norms alone."""
    norms = [p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()]
    return torch.optim.AdamW(norms, lr=SPARSE_RATE)


def epi(model: nn.Module) -> torch.optim.Optimizer:
    """Return EPI, which trains all but 1%."""
    return EPIAdamW(model.named_parameters(), lr=LEARNING_RATE, mask_interval=24, importance_beta=0.95, layers="block")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW of everything."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


METHODS: dict[str, Callable[..., Any]] = {
    "PIECE-F": piece_f,
    "PIECE-S": piece_s,
    "MIGU": migu,
    "LayerNorm": layer_norms,
    "EPI, p = 1%": epi,
    "AdamW": adamw,
}
SPARSE = (piece_f, piece_s, migu)


def learn(
    name: str,
    method: Callable[..., Any],
    weights: Mapping[str, Tensor],
    tasks: list[Task],
    options: argparse.Namespace,
    progress: Callable[[], object],
) -> Result:
    """Learn the tasks in order."""
    model = ByteTransformer(CONTEXT)
    model.load_state_dict(weights)
    result = Result()
    sparse = method in SPARSE
    optimizer = SparseAdamW(model.named_parameters(), lr=SPARSE_RATE, trainable={}) if sparse else method(model)
    for number, task in enumerate(tasks):
        seed = len(tasks) * options.seed + number
        drawn = torch.Generator().manual_seed(seed)
        if sparse:
            scored = torch.Generator().manual_seed(seed + (1 << 32))
            sizes = [min(SCORED, options.examples - first) for first in range(0, options.examples, SCORED)]
            started = time.perf_counter()
            mask = method(model, [task.batch(size, scored) for size in sizes], options.ratio)
            result.scoring += time.perf_counter() - started
            optimizer.select(mask)  # the next task starts with fresh moments
        started = time.perf_counter()
        for _ in range(options.steps):
            loss_of(model, task.batch(demo.BATCH, drawn)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
            progress()
        result.training += time.perf_counter() - started
        result.performance.append(demo.examine(model, tasks))
        if sparse:
            result.files.append(options.out / f"{name.lower()}-task-{number + 1}.safetensors")
            save_delta(optimizer.delta(), result.files[-1])
    result.state = sum(
        value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
    )
    if sparse:
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


def report(results: Mapping[str, Result], tasks: list[Task], weights: Mapping[str, Tensor]) -> None:
    """Print what each method learned, forgot and cost."""
    size = sum(value.numel() * value.element_size() for value in weights.values())
    print(f"\nTasks: {', then '.join(task.name for task in tasks)}. Held-out accuracy in percent.")
    print(
        "OP: on both at the end. BWT: change of the first by the second, over 2. AP: on each right after learning it.\n"
    )
    titles = ("OP", "BWT", "AP", "trained", "state, KB", "scoring, s", "training, s", "delta")
    print(f"{'':14}" + "".join(f"{title:>13}" for title in titles))
    for name, result in results.items():
        measures = [f(result.performance) for f in (overall_performance, backward_transfer, average_performance)]
        delta = max((file.stat().st_size for file in result.files), default=0) / size
        cells = [f"{value:.1f}" for value in measures]
        cells += [
            f"{result.trained:,}",
            f"{result.state / 1e3:,.1f}",
            f"{result.scoring:.1f}",
            f"{result.training:.1f}",
        ]
        print(f"{name:14}" + "".join(f"{cell:>13}" for cell in [*cells, f"{delta:.2%}" if delta else ""]))
    print(f"\ndelta: the largest file of a task, of {size / 1e6:.1f} MB of weights. Put onto them in order, the deltas")
    print("restored the trained weights bit for bit. One small model and one seed: this shows the tools and their")
    print("cost, not what the methods are worth.")


if __name__ == "__main__":
    main()
