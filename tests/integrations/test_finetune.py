"""`examples/finetune.py` on a tiny random Llama that is made on the spot.

- Every method learns two tasks, and writes model, report and, for PIECE, a delta for each task.
- A run that was interrupted in the middle of a task ends bit for bit as one that was not.
- Under torchrun, with FSDP2 or DDP, it ends with the results of one process.
- What is wrong with a file, or with options that changed, is said before anything is written.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMON = ["--steps", "6", "--batch-size", "4", "--learning-rate", "0.01", "--mask-interval", "2", "--share", "0.05"]


@pytest.fixture(autouse=True)
def example_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sys.modules.pop("finetune", None)


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Return the options of a run: a model of 30 thousand parameters and two tasks of 40 lines."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_of = {character: number for number, character in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab={**bytes_of, "<end>": len(bytes_of)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(bytes_of) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    sums = [json.dumps({"prompt": f"{i}+{i}=", "completion": str(2 * i)}) for i in range(40)]
    texts = [json.dumps({"text": f"line {i} of a text"}) for i in range(40)]
    for name, lines in (("sums", sums), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return ["--model", str(tmp_path / "llama"), "--tasks", *(str(tmp_path / f"{n}.jsonl") for n in ("sums", "texts"))]


def run(given: list[str], out: Path, *more: str) -> dict[str, Any]:
    import finetune

    finetune.main([*given, *COMMON, "--out", str(out), *more])
    return json.loads((out / "progress.json").read_text())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(out / "model").state_dict())


@pytest.mark.parametrize("method", ["epi", "piece", "adamw"])
def test_every_method_learns_two_tasks_and_reports(
    method: str, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    progress = run(given, out, "--method", method)
    said = capsys.readouterr().out
    assert "sums: 36 examples, 4 held out, 0 cut" in said
    assert progress["task"] == 2
    assert [len(row) for row in progress["results"]] == [2, 2]
    page = (out / "report.html").read_text()
    assert f"<h1>{method} on sums, then texts</h1>" in page
    assert ("What was protected" in page) == (method == "epi")
    start = dict(AutoModelForCausalLM.from_pretrained(given[1]).state_dict())
    changed = sum(int((weights(out)[name] != value).sum()) for name, value in start.items())
    total = sum(value.numel() for value in start.values())
    if method == "piece":
        assert 0 < changed <= 2 * int(0.05 * total)
        assert sorted(path.name for path in out.glob("*.safetensors")) == ["1-sums.safetensors", "2-texts.safetensors"]
    else:
        assert changed > 0.5 * total
    # three refreshes of each task, and one at its end
    assert [record["step"] for record in progress["telemetry"]] == (
        [2, 4, 6, 6, 8, 10, 12, 12] if method == "epi" else []
    )


@pytest.mark.parametrize("method", ["epi", "piece", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_run_ends_as_one_that_was_not(
    method: str, dtype: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune

    options = ("--method", method, "--checkpoint-every", "4", "--dtype", dtype)
    straight = run(given, tmp_path / "straight", *options)
    step = finetune.Run._step

    def interrupted(self: Any, examples: Any, number: int, steps: int) -> float:
        if self.progress.task == 1 and number == 5:
            raise KeyboardInterrupt
        return step(self, examples, number, steps)

    monkeypatch.setattr(finetune.Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(given, tmp_path / "again", *options)
    assert json.loads((tmp_path / "again" / "progress.json").read_text())["step"] == 4
    monkeypatch.undo()
    resumed = run(given, tmp_path / "again", *options)
    assert resumed == straight
    expected = weights(tmp_path / "straight")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "again").items())
    assert [path.name for path in (tmp_path / "again").glob("checkpoint-*")] == ["checkpoint-2-0"]


@pytest.mark.parametrize(
    ("method", "shard"), [("epi", "fsdp2"), ("piece", "fsdp2"), ("epi", "ddp"), ("adamw", "fsdp2")]
)
def test_two_ranks_end_with_the_results_of_one(method: str, shard: str, given: list[str], tmp_path: Path) -> None:
    alone = run(given, tmp_path / "alone", "--method", method)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "finetune.py"), *given, *COMMON, "--out", str(tmp_path / "ranks")]
    done = subprocess.run(
        [*command, "--method", method, "--shard", shard], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = json.loads((tmp_path / "ranks" / "progress.json").read_text())
    assert len(ranks["results"]) == 2
    first, second = (weights(tmp_path / name) for name in ("alone", "ranks"))
    start = dict(AutoModelForCausalLM.from_pretrained(given[1]).state_dict())
    # gradients are summed in another order: the first steps of Adam take the sign of what is near 0
    apart, moved = (
        sum(float((one[name] - other[name]).abs().sum()) for name in first)
        for one, other in ((first, second), (first, start))
    )
    assert apart < 0.05 * moved
    if method == "epi":
        protected = [[record["protected"] for record in of["telemetry"]] for of in (alone, ranks)]
        assert protected[0] == protected[1]


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no json": (lambda path: path.write_text("hello\n" * 20), "sums.jsonl, line 1 is not JSON"),
    "other keys": (lambda path: path.write_text('{"question": "?"}\n' * 20), "line 1 has neither texts 'prompt'"),
    "numbers": (lambda path: path.write_text('{"text": 1}\n' * 20), "line 1 has neither texts 'prompt'"),
    "too few": (lambda path: path.write_text('{"text": "a"}\n' * 5), "has 5 examples; a task needs 10 at least"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_is_no_task_is_refused(bad: str, given: list[str], tmp_path: Path) -> None:
    write, message = BAD[bad]
    write(tmp_path / "sums.jsonl")
    with pytest.raises(ValueError, match=message):
        run(given, tmp_path / "out")


def test_a_run_does_not_go_on_with_other_options(given: list[str], tmp_path: Path) -> None:
    run(given, tmp_path / "out")
    with pytest.raises(ValueError, match="learning_rate='0.01', now '0.5'. Give the same options, or another --out"):
        run(given, tmp_path / "out", "--learning-rate", "0.5")


def test_long_examples_are_cut_at_their_beginning_and_counted(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(given, tmp_path / "out", "--max-length", "8")
    assert "texts: 36 examples, 4 held out, 40 cut" in capsys.readouterr().out
