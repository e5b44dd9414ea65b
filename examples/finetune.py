"""Fine-tune a causal language model on several tasks in a row, with AdamW, EPI or PIECE, and report what is forgotten.

    python examples/finetune.py --model ./llama --tasks orders.jsonl code.jsonl --method epi
    torchrun --nproc-per-node 4 examples/finetune.py --shard fsdp2 ...      (or `accelerate launch`)

A model is a folder or a name on the Hugging Face hub. A task is a file of JSON lines, {"prompt": ..., "completion":
...} or {"text": ...}; only completions, or the whole text, are learned. Every tenth line is held out, and what is
measured is the share of its tokens that the model predicts, given the tokens before them. A run that was interrupted
goes on where it was when the same command is given again. Needs `pip install transformers tqdm epi-kernels[plots]`.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401  the report needs it: better to know before the run
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from epi_kernels import EPIAdamW, SparseAdamW, report
from epi_kernels.delta import save_delta
from epi_kernels.importance import fisher
from epi_kernels.metrics import average_performance, backward_transfer, overall_performance
from epi_kernels.select import top_k

IGNORED = -100  # what transformers leaves out of the loss
HELD_OUT = 10  # every tenth line
WARM_UP = 0.03  # share of a task's steps, as in arXiv 2604.14010; then down along a cosine
NOTE = """One run with one seed: the difference between two methods is worth nothing without a few more. A method that
learns less has less to forget: compare what was learned before what was lost."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or name on the hub of a causal language model")
    add("--tasks", type=Path, nargs="+", required=True, help="files of JSON lines, in the order to be learned")
    add("--method", choices=("epi", "piece", "adamw"), default="epi", help="how to train")
    add("--out", type=Path, default=Path("out/finetune"), help="folder of checkpoints, model and report")
    add("--steps", type=int, help="optimizer steps for each task; if not given, --epochs counts")
    add("--epochs", type=float, default=1.0, help="passes over each task")
    add("--batch-size", type=int, default=16, help="examples of a step, over all ranks")
    add("--max-length", type=int, default=512, help="tokens of an example; longer ones are cut, and counted")
    add("--learning-rate", type=float, default=1e-5, help="at the end of the warm-up")
    add("--weight-decay", type=float, default=0.01, help="of matrices, not of biases and norms")
    add("--clip", type=float, default=1.0, help="largest norm of the gradients")
    add("--isolation-ratio", type=float, default=0.01, help="epi: share of the entries to protect")
    add("--mask-interval", type=int, default=500, help="epi: steps from one choice of these entries to the next")
    add("--importance-beta", type=float, default=0.99, help="epi: smoothing of the importance")
    add("--share", type=float, default=0.001, help="piece: share of the entries to train")
    add("--examples", type=int, default=256, help="piece: examples by which entries are chosen")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    add("--shard", choices=("ddp", "fsdp2"), default="ddp", help="what several processes do")
    add("--checkpoint-every", type=int, default=200, help="steps from one checkpoint to the next; also after each task")
    add("--seed", type=int, default=0, help="of the order of the examples")
    return parser.parse_args(arguments)


# Tasks ---------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """Examples, each a list of tokens and a list of targets, IGNORED where nothing is to be learned."""

    name: str
    train: list[tuple[list[int], list[int]]] = field(default_factory=list)
    held_out: list[tuple[list[int], list[int]]] = field(default_factory=list)
    cut: int = 0  # examples that were longer than allowed


def read(path: Path, tokenizer: Any, max_length: int) -> Task:
    """Read a task.

    Raises:
        ValueError: a line is no example, or there are too few lines; the message names file and line.
    """
    task, forms = Task(path.stem), ({"prompt", "completion"}, {"text"})
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        fits = isinstance(found, dict) and any(keys <= found.keys() for keys in forms)
        if not fits or not all(isinstance(value, str) for key, value in found.items() if key in set().union(*forms)):
            raise ValueError(f"{path}, line {number} has neither texts 'prompt' and 'completion' nor a text 'text'")
        prompt = tokenizer(found["prompt"])["input_ids"] if "prompt" in found else []
        # what follows a prompt is not its beginning: no token that marks one
        answer = tokenizer(found["completion"], add_special_tokens=False) if prompt else tokenizer(found["text"])
        tokens = [*prompt, *answer["input_ids"], tokenizer.eos_token_id]
        targets = [IGNORED] * len(prompt) + tokens[len(prompt) :]
        task.cut += len(tokens) > max_length
        # the end of an example is what is to be learned
        example = tokens[-max_length:], targets[-max_length:]
        (task.train if number % HELD_OUT else task.held_out).append(example)
    if len(task.train) < HELD_OUT - 1 or not task.held_out:
        raise ValueError(
            f"{path} has {len(task.train) + len(task.held_out)} examples; a task needs {HELD_OUT} at least"
        )
    return task


def batch_of(examples: list[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    """Return examples as tensors of equal length."""
    longest = max(len(tokens) for tokens, _ in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens, targets in examples:
        missing = longest - len(tokens)
        rows["input_ids"].append(tokens + [padding] * missing)
        rows["attention_mask"].append([1] * len(tokens) + [0] * missing)
        rows["labels"].append(targets + [IGNORED] * missing)
    return {name: torch.tensor(values) for name, values in rows.items()}


# Ranks ---------------------------------------------------------------------------------------------------------------


class Ranks:
    """The processes of this run; one, unless torchrun or accelerate has started more."""

    def __init__(self) -> None:
        self.started = "RANK" in os.environ
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        if self.started:
            dist.init_process_group("nccl" if on_gpu else "gloo")
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.started else (0, 1)

    def sum(self, *values: float) -> list[float]:
        """Return the sums of numbers over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.started:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.started:
            dist.barrier()


# The run -------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come: what a checkpoint has beside model and optimizer."""

    options: dict[str, Any]  # what must be the same when the run goes on
    task: int = 0
    step: int = 0  # of the task
    results: list[list[float]] = field(default_factory=list)  # row t: on every task, after learning task t, in percent
    telemetry: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: str = ""  # the folder


class Run:
    """A model, an optimizer and tasks, on this rank."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        self.options, self.ranks = options, ranks
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {options.model} has no end-of-sequence token; set its eos_token")
        self.padding = self.tokenizer.pad_token_id
        if self.padding is None:
            self.padding = self.tokenizer.eos_token_id
        self.tasks = [read(path, self.tokenizer, options.max_length) for path in options.tasks]
        self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        self.model.to(ranks.device)
        self.parameters = sum(param.numel() for param in self.model.parameters())
        self.trained: nn.Module = self.model  # what is called in training
        if ranks.started and options.shard == "fsdp2":
            blocks = set(self.model._no_split_modules or ())
            for module in self.model.modules():
                if type(module).__name__ in blocks:
                    fully_shard(module)
            fully_shard(self.model)
        elif ranks.started:
            self.trained = DistributedDataParallel(self.model)
        self.optimizer = self._optimizer()
        self.mask: dict[str, Tensor] = {}  # piece: the entries that are trained for the present task
        self.progress = Progress(_fixed(options))

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of a method, with weight decay of matrices alone."""
        options, named = self.options, list(self.model.named_parameters())
        groups = [
            {"params": [(name, p) for name, p in named if (p.dim() > 1) == matrices], "weight_decay": decay}
            for matrices, decay in ((True, options.weight_decay), (False, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        if options.method == "adamw":
            return torch.optim.AdamW(groups, lr=options.learning_rate)
        # bfloat16 weights are too coarse for small steps, which stochastic rounding takes on average
        rounding = "stochastic" if options.dtype == "bfloat16" else "nearest"
        if options.method == "piece":
            return SparseAdamW(groups, lr=options.learning_rate, rounding=rounding, trainable={})
        return EPIAdamW(
            groups,
            lr=options.learning_rate,
            rounding=rounding,
            isolation_ratio=options.isolation_ratio,
            mask_interval=options.mask_interval,
            importance_beta=options.importance_beta,
        )

    def steps(self, task: Task) -> int:
        """Return the number of steps of a task."""
        steps = self.options.steps
        return steps or max(1, math.ceil(self.options.epochs * len(task.train) / self.options.batch_size))

    # Training --------------------------------------------------------------------------------------------------------

    def learn(self) -> None:
        """Learn the tasks that are left, from the step at which the run stood."""
        progress, total = self.progress, sum(map(self.steps, self.tasks))
        done = sum(map(self.steps, self.tasks[: progress.task])) + progress.step
        with tqdm(total=total, initial=done, unit="step", disable=self.ranks.rank > 0) as bar:
            while progress.task < len(self.tasks):
                task = self.tasks[progress.task]
                bar.set_description(task.name)
                if progress.step == 0 and isinstance(self.optimizer, SparseAdamW):
                    self.select(task)
                self.model.train()
                for examples in self._batches(task, progress.step):
                    loss = self._step(examples, progress.step, self.steps(task))
                    progress.step += 1
                    bar.set_postfix_str(f"loss {loss:.3f}")
                    bar.update()
                    if progress.step % self.options.checkpoint_every == 0 and progress.step < self.steps(task):
                        self.save()
                self._end(task)
                self.save()

    def select(self, task: Task) -> None:
        """Choose the entries to train for a task, by the examples at its beginning.

        The gradients are those of the model that is used later, without dropout.
        """
        self.model.eval()
        # the same examples on every rank: gradients of a sharded model are averaged
        batches = [self._batch([example]) for example in task.train[: self.options.examples]]
        scores = fisher(self.model, batches, lambda model, batch: model(**batch).loss, progress=self.ranks.rank == 0)
        self.mask = top_k(scores, self.options.share)
        self.optimizer.select(self.mask)  # type: ignore[attr-defined]

    def _batches(self, task: Task, first: int) -> Iterator[list[tuple[list[int], list[int]]]]:
        """Yield the examples of each step from `first` on, which follow from the seed, the task and the step."""
        size, count = self.options.batch_size, len(task.train)
        order: list[int] = []
        epoch = 0
        for step in range(self.steps(task)):
            while len(order) < size:
                seed = 1_000_003 * (1_000_003 * self.options.seed + self.progress.task) + epoch
                order += torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
                epoch += 1
            chosen, order = order[:size], order[size:]
            if step >= first:
                yield [task.train[i] for i in chosen]

    def _step(self, examples: list[tuple[list[int], list[int]]], step: int, steps: int) -> float:
        """Take a step with these examples, shared out over the ranks, and return the mean loss of their tokens."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * schedule(step, steps)
        loss, _, tokens = self._measured(self.trained, examples)
        (total,) = self.ranks.sum(tokens)
        # ranks average their gradients: each token shall count the same, whichever rank has it
        (loss * (self.ranks.size / total)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.ranks.sum(float(loss.detach()))[0] / total

    def _batch(self, examples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        return {name: rows.to(self.ranks.device) for name, rows in batch_of(examples, self.padding).items()}

    def _measured(self, model: nn.Module, examples: list[tuple[list[int], list[int]]]) -> tuple[Tensor, int, int]:
        """Return the summed loss of this rank's share of examples, the tokens it predicts, and how many there are."""
        mine = examples[self.ranks.rank :: self.ranks.size]
        # a rank without examples calls the model all the same: the others wait for it
        batch = {
            name: rows.to(self.ranks.device) for name, rows in batch_of(mine or examples[:1], self.padding).items()
        }
        targets = batch.pop("labels")[:, 1:]
        if not mine:
            targets = torch.full_like(targets, IGNORED)
        logits = model(**batch).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        counted = targets != IGNORED
        return loss, int(((logits.argmax(-1) == targets) & counted).sum()), int(counted.sum())

    def _end(self, task: Task) -> None:
        """End a task: measure, and keep what the method has to keep."""
        optimizer, progress = self.optimizer, self.progress
        if isinstance(optimizer, EPIAdamW):
            optimizer.refresh()  # protects what this task has used
        if isinstance(optimizer, SparseAdamW):
            delta = optimizer.delta()
            if self.ranks.rank == 0:
                save_delta(delta, self.options.out / f"{progress.task + 1}-{task.name}.safetensors")
        progress.results.append([self.accuracy(each) for each in self.tasks])
        progress.task, progress.step = progress.task + 1, 0

    @torch.no_grad()
    def accuracy(self, task: Task) -> float:
        """Return the share of the held-out tokens that the model predicts, in percent."""
        self.model.eval()
        right = tokens = 0
        for first in range(0, len(task.held_out), self.options.batch_size):
            _, hits, count = self._measured(self.model, task.held_out[first : first + self.options.batch_size])
            right, tokens = right + hits, tokens + count
        hits, count = self.ranks.sum(right, tokens)
        return 100 * hits / count if count else math.nan

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint that any number of ranks can load; the one before is removed when this one is whole."""
        progress, out = self.progress, self.options.out
        if isinstance(self.optimizer, EPIAdamW):
            progress.telemetry = self.optimizer.telemetry()
        before, progress.checkpoint = progress.checkpoint, f"checkpoint-{progress.task}-{progress.step}"
        state, of_optimizer = get_state_dict(self.model, self.optimizer)
        held = {"model": state, "optimizer": of_optimizer, "mask": self.mask}
        checkpoint.save(held, checkpoint_id=out / progress.checkpoint)
        if self.ranks.rank == 0:
            part = out / "progress.part"
            part.write_text(json.dumps(asdict(progress)))
            part.replace(out / "progress.json")
            if before and before != progress.checkpoint:
                shutil.rmtree(out / before, ignore_errors=True)
        self.ranks.wait()

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one.

        Raises:
            ValueError: it was written with other options; the message names them.
        """
        file = self.options.out / "progress.json"
        if not file.exists():
            return
        found = Progress(**json.loads(file.read_text()))
        now = json.loads(json.dumps(self.progress.options))
        differ = [name for name in now if found.options.get(name) != now[name]]
        if differ:
            said = ", ".join(f"{name}={found.options.get(name)!r}, now {now[name]!r}" for name in differ)
            raise ValueError(f"{self.options.out} has a run with {said}. Give the same options, or another --out")
        self.progress = found
        if isinstance(self.optimizer, SparseAdamW):  # whose state has the size of what it trains
            self.mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self.model.named_parameters()}
            checkpoint.load({"mask": self.mask}, checkpoint_id=self.options.out / found.checkpoint)
            self.optimizer.select(self.mask)
        state, of_optimizer = get_state_dict(self.model, self.optimizer)
        held = {"model": state, "optimizer": of_optimizer}
        checkpoint.load(held, checkpoint_id=self.options.out / found.checkpoint)
        set_state_dict(self.model, self.optimizer, model_state_dict=state, optim_state_dict=held["optimizer"])
        if isinstance(self.optimizer, EPIAdamW):
            self.optimizer.load_telemetry(found.telemetry)

    # What comes out --------------------------------------------------------------------------------------------------

    def tell(self) -> None:
        """Print the results, and write model and report."""
        options, progress, names = self.options, self.progress, [task.name for task in self.tasks]
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=whole)
        if self.ranks.rank > 0:
            return
        self.model.save_pretrained(options.out / "model", state_dict=weights)
        self.tokenizer.save_pretrained(options.out / "model")
        width = max(len("after "), *map(len, names)) + 8
        print("\nHeld-out tokens that are predicted, in percent")
        print(" " * width + "".join(f"{name:>{width}}" for name in names))
        for name, row in zip(names, progress.results, strict=True):
            print(f"{'after ' + name:{width}}" + "".join(f"{value:{width}.1f}" for value in row))
        for title, measure in (
            ("right after learning (AP)", average_performance),
            ("at the end (OP)", overall_performance),
            ("change by later tasks (BWT)", backward_transfer),
        ):
            print(f"{title}: {measure(progress.results):.1f}")
        page = report.write(
            options.out / "report.html",
            f"{options.method} on {', then '.join(names)}",
            facts={
                "model": options.model,
                "parameters": f"{self.parameters:,}",
                "method": options.method,
                "learning rate": options.learning_rate,
                "steps": ", ".join(str(self.steps(task)) for task in self.tasks),
                "seed": options.seed,
            },
            tasks=names,
            results={options.method: progress.results},
            measure="held-out tokens predicted (%)",
            telemetry={options.method: progress.telemetry} if options.method == "epi" else None,
            note=NOTE,
        )
        print(f"Model: {options.out / 'model'}\nReport, to open in a browser: {page}")


def schedule(step: int, steps: int) -> float:
    """Return what multiplies the learning rate: up in a line, then down along a cosine to 0 after the last step."""
    warm = math.ceil(WARM_UP * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _fixed(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a run must keep: all but where it writes, how often, and on how many ranks."""
    free = ("out", "checkpoint_every", "shard")
    return {name: str(value) for name, value in vars(options).items() if name not in free}


def main(arguments: list[str] | None = None) -> None:
    """Train on this rank."""
    options = parse(arguments)
    ranks = Ranks()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        run = Run(options, ranks)
        for task in run.tasks if ranks.rank == 0 else ():
            print(f"{task.name}: {len(task.train)} examples, {len(task.held_out)} held out, {task.cut} cut", flush=True)
        run.resume()
        run.learn()
        run.tell()
        ranks.wait()
    finally:
        if ranks.started:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
