"""`epi_kernels.integrations.transformers` in a transformers Trainer, on one process.

Seven steps, a checkpoint and seven more are fourteen steps, bit for bit: weights, states, masks, telemetry and logs.
The optimizers get Trainer's own groups with names, and what TrainingArguments say. The callback's figures reach every
other callback, and it says what would otherwise pass in silence.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small import ARGUMENTS, LAYERS, llama, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from epi_kernels import EPIAdamW, EPILion, IsolatedOptimizer, MaskedAdamW, SparseAdamW
from epi_kernels.delta import apply_delta
from epi_kernels.integrations.transformers import IsolationCallback, optimizer_cls_and_kwargs

ISOLATION = {"isolation_ratio": 0.1, "mask_interval": 3, "importance_beta": 0.5}


def arguments(folder: Path | str = "run", **given: Any) -> TrainingArguments:
    usual = {**ARGUMENTS, "max_steps": 14, "weight_decay": 0.1}
    return TrainingArguments(output_dir=str(folder), **{**usual, **given})


def masks(share: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {name: torch.rand(param.shape) < share for name, param in llama().named_parameters()}


# what a user writes after `optimizer_cls_and_kwargs(`, but for `args`
OPTIMIZERS: dict[str, tuple[type, Any]] = {
    "EPIAdamW": (EPIAdamW, lambda: ISOLATION),
    "EPIAdamW with exp_avg_sq": (EPIAdamW, lambda: {**ISOLATION, "importance": "exp_avg_sq"}),
    "EPILion": (EPILion, lambda: ISOLATION),
    "IsolatedOptimizer of optim": (IsolatedOptimizer, lambda: ISOLATION),
    "IsolatedOptimizer of base": (
        IsolatedOptimizer,
        lambda: {**ISOLATION, "base": torch.optim.SGD, "base_settings": {"momentum": 0.9}},
    ),
    "MaskedAdamW": (MaskedAdamW, lambda: {"frozen": masks(0.5)}),
    "SparseAdamW": (SparseAdamW, lambda: {"trainable": masks(0.01)}),
}


def trainer_of(args: TrainingArguments, kind: str = "EPIAdamW", **given: Any) -> Trainer:
    optimizer, settings = OPTIMIZERS[kind]
    callbacks = [IsolationCallback()] if hasattr(optimizer, "telemetry") else []
    usual: dict[str, Any] = {"model": llama(), "train_dataset": rows(), "callbacks": callbacks}
    if "optimizers" not in given:
        usual["optimizer_cls_and_kwargs"] = optimizer_cls_and_kwargs(optimizer, args, **settings())
    return Trainer(args=args, **{**usual, **given})


def ours(trainer: Trainer) -> Any:
    return trainer.optimizer.optimizer


def assert_equal(one: Any, two: Any, where: str = "state") -> None:
    """Compare nested states bit for bit."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
        assert torch.equal(torch.signbit(one), torch.signbit(two)) or not one.is_floating_point(), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{where}.{i}")
    else:
        assert one == two, where


def losses(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "in pieces": {"gradient_accumulation_steps": 2},
    "in bfloat16": {"bf16": True},
    "clipped hard": {"max_grad_norm": 0.01},
    "unclipped, with callbacks restored": {"max_grad_norm": 0.0, "restore_callback_states_from_checkpoint": True},
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [*((kind, "as it is") for kind in OPTIMIZERS), *(("EPIAdamW", way) for way in list(WAYS)[1:])],
)
def test_seven_steps_and_seven_more_are_fourteen(kind: str, way: str) -> None:
    straight = trainer_of(arguments("straight", save_strategy="steps", save_steps=7, **WAYS[way]), kind)
    straight.train()
    resumed = trainer_of(arguments("resumed", save_strategy="steps", save_steps=7, **WAYS[way]), kind)
    resumed.train(resume_from_checkpoint="straight/checkpoint-7")

    assert resumed.state.global_step == 14
    assert_equal(dict(straight.model.named_parameters()), dict(resumed.model.named_parameters()))
    assert_equal(ours(straight).state_dict(), ours(resumed).state_dict())
    assert losses(straight) == losses(resumed)
    assert len(losses(straight)) == 14
    if hasattr(ours(straight), "telemetry"):
        records = ours(straight).telemetry()
        assert [record["step"] for record in records] == [3, 6, 9, 12]
        assert ours(resumed).telemetry() == records
        assert [layer["layer"] for layer in records[0]["layers"]] == LAYERS
        for param, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(ours(straight).isolation_mask(param), ours(resumed).isolation_mask(other))


# Groups and arguments ------------------------------------------------------------------------------------------------


def with_frozen_embeddings() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    model.model.embed_tokens.requires_grad_(False)
    return model


MODELS = {
    "Llama": llama,
    "tied Llama": lambda: llama(tie_word_embeddings=True),
    "Llama with frozen embeddings": with_frozen_embeddings,
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=8)),
    "BERT": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    ),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_groups_are_the_trainers_with_names(make: Any) -> None:
    model, args = make(), arguments()
    theirs = Trainer(model, args).create_optimizer()
    factory, settings = optimizer_cls_and_kwargs(EPIAdamW, args)
    optimizer = factory()(model, **settings)
    filled = [group for group in theirs.param_groups if group["params"]]
    for group, other in zip(optimizer.param_groups, filled, strict=True):
        assert list(map(id, group["params"])) == list(map(id, other["params"]))
        for key in ("lr", "betas", "eps", "weight_decay"):
            assert group[key] == other[key]
    names = {id(param): name for name, param in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(param)] for param in group["params"]]


def test_names_are_those_of_the_bare_model() -> None:
    wrapped = torch.compile(nn.ModuleDict({"module": llama()}))
    args = arguments()
    trainable = {f"_orig_mod.module.{name}": mask for name, mask in masks(0.1).items()}
    factory, settings = optimizer_cls_and_kwargs(SparseAdamW, args, trainable=trainable)
    optimizer = factory()(wrapped, **settings)
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == masks(0.1).keys()


def test_training_arguments_count_when_training_begins() -> None:
    args = arguments(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    trainer = trainer_of(args)
    args.learning_rate, args.weight_decay = 0.02, 0.3  # as a hyperparameter search does
    trainer.train()
    group, other = ours(trainer).param_groups
    assert (group["betas"], group["eps"], group["initial_lr"]) == ((0.8, 0.95), 1e-6, 0.02)
    assert (group["weight_decay"], other["weight_decay"]) == (0.3, 0.0)


def test_lion_keeps_betas_of_its_own() -> None:
    args = arguments()
    factory, settings = optimizer_cls_and_kwargs(EPILion, args)
    assert factory()(llama(), **settings).defaults["betas"] == (0.9, 0.99)
    factory, settings = optimizer_cls_and_kwargs(EPILion, args, betas=(0.95, 0.98))
    assert factory()(llama(), **settings).defaults["betas"] == (0.95, 0.98)


@pytest.mark.parametrize(
    ("optimizer", "settings", "error", "text"),
    [
        (EPIAdamW, {"lr": 0.1}, ValueError, "lr=0.1 is the trainer's: set learning_rate in TrainingArguments"),
        (EPIAdamW, {"eps": 1e-6}, ValueError, "eps=1e-06 is the trainer's: set adam_epsilon in TrainingArguments"),
        (EPIAdamW, {"betas": (0.9, 0.9)}, ValueError, "set adam_beta1 and adam_beta2 in TrainingArguments"),
        (EPILion, {"weight_decay": 0.1}, ValueError, "weight_decay=0.1 is the trainer's"),
        (EPIAdamW, {"isolation_share": 0.1}, TypeError, "EPIAdamW takes no 'isolation_share'; it takes params, lr"),
        (EPIAdamW, {"base": torch.optim.SGD}, ValueError, "EPIAdamW has no base; base=SGD is for IsolatedOptimizer"),
        (IsolatedOptimizer, {"base_settings": {"momentum": 0.9}}, ValueError, "are for base=; pass that class too"),
        (lambda params: None, {}, TypeError, "pass a class, such as EPIAdamW"),
    ],
)
def test_what_cannot_be_is_refused_at_once(optimizer: Any, settings: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        optimizer_cls_and_kwargs(optimizer, arguments(), **settings)
    assert text in str(raised.value)


def test_an_unknown_setting_is_refused_with_what_the_optimizer_is_given() -> None:
    factory, settings = optimizer_cls_and_kwargs(SparseAdamW, arguments(), trainable={"head": torch.ones(1)})
    with pytest.raises(ValueError, match="trainable has the unknown name 'head'"):
        factory()(llama(), **settings)


# Every optimizer -----------------------------------------------------------------------------------------------------


def test_frozen_entries_stay_and_others_move() -> None:
    trainer, before, frozen = trainer_of(arguments(max_steps=3), "MaskedAdamW"), llama(), masks(0.5)
    trainer.train()
    for (name, param), old in zip(trainer.model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(param[frozen[name]], old[frozen[name]]), name
        assert (param[~frozen[name]] != old[~frozen[name]]).float().mean() > 0.4, name  # rows of absent tokens rest


def test_a_delta_on_the_model_from_before_is_the_trained_model() -> None:
    trainer, model, trainable = trainer_of(arguments(max_steps=3), "SparseAdamW"), llama(), masks(0.01)
    trainer.train()
    task = ours(trainer).delta()
    assert sum(len(positions) for positions, _ in task.values()) == sum(int(mask.sum()) for mask in trainable.values())
    apply_delta(model, task)
    assert_equal(dict(model.named_parameters()), dict(trainer.model.named_parameters()))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_isolation_goes_around_what_the_arguments_name(optim: str) -> None:
    args = arguments(max_steps=6, optim=optim, optim_args="momentum=0.5" if optim == "sgd" else None)
    trainer = trainer_of(args, "IsolatedOptimizer of optim")
    plain = Trainer(llama(), args).create_optimizer()
    trainer.train()
    assert type(ours(trainer).base) is type(plain)
    for key, value in plain.defaults.items():
        if key != "lr":
            assert ours(trainer).defaults[key] == value, key
    assert [layer["layer"] for layer in ours(trainer).telemetry(last=True)["layers"]] == LAYERS
    assert "isolation/jaccard" in losses(trainer)[-1]


def test_a_base_that_cannot_have_these_groups_is_refused() -> None:
    factory, settings = optimizer_cls_and_kwargs(IsolatedOptimizer, arguments(), base=torch.optim.Rprop)
    with pytest.raises(ValueError, match=r"Rprop has no weight decay, and args.weight_decay is 0.1; set it to 0"):
        factory()(llama(), **settings)
    factory, settings = optimizer_cls_and_kwargs(IsolatedOptimizer, arguments(), base=torch.optim.Muon)
    with pytest.raises(ValueError, match="2D"):  # Muon's own words
        factory()(llama(), **settings)


def test_a_base_that_makes_its_own_groups_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments()
    factory, settings = optimizer_cls_and_kwargs(IsolatedOptimizer, args)
    for found in [(lambda: None, {}), (torch.optim.SGD, {"params": [], "lr": 0.1})]:
        monkeypatch.setattr(
            Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model, found=found: found)
        )
        with pytest.raises(ValueError, match="makes parameter groups of its own; give the class of an optimizer as ba"):
            factory()(llama(), **settings)


def test_half_of_the_weights_in_bfloat16() -> None:
    trainer = trainer_of(arguments(max_steps=6), model=llama().bfloat16())
    trainer.train()
    assert {state["exp_avg"].dtype for state in ours(trainer).state.values()} == {torch.float32}
    assert ours(trainer).telemetry(last=True)["protected_share"] == pytest.approx(0.1, abs=1e-3)


def test_a_model_from_model_init_and_a_second_run() -> None:
    trainer = trainer_of(arguments(max_steps=6), model=None, model_init=lambda: llama())
    trainer.train()
    first, records = ours(trainer), ours(trainer).telemetry()
    trainer.train()  # makes model and optimizer anew
    assert ours(trainer) is not first
    assert ours(trainer).telemetry() == records
    assert losses(trainer)[-1]["isolation/refreshed_at"] == 6


def test_an_optimizer_that_was_made_before() -> None:
    model, args = llama(), arguments(max_steps=6, save_strategy="steps", save_steps=5)
    optimizer = EPIAdamW(model.named_parameters(), lr=0.01, **ISOLATION)
    trainer = trainer_of(args, model=model, optimizers=(optimizer, None))
    trainer.train()
    assert losses(trainer)[-1]["isolation/refreshed_at"] == 6

    model = llama()
    optimizer = EPIAdamW(model.named_parameters(), lr=0.01, **ISOLATION)
    again = trainer_of(args, model=model, optimizers=(optimizer, None))
    again.train(resume_from_checkpoint="run/checkpoint-5")
    assert losses(again) == losses(trainer)


# Logs ----------------------------------------------------------------------------------------------------------------


class Seen(TrainerCallback):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


KEYS = {f"isolation/{key}" for key in ("refreshed_at", "protected_share", "locked", "released", "jaccard", "nonfinite")}


@pytest.mark.parametrize("when", ["before another", "after another", "added to the trainer", "as a class"])
def test_figures_reach_tensorboard_and_every_callback(when: str) -> None:
    seen, callback = Seen(), IsolationCallback()
    given = {
        "before another": [callback, seen],
        "after another": [seen, callback],
        "added to the trainer": [seen],
        "as a class": [seen, IsolationCallback],
    }[when]
    trainer = trainer_of(arguments(report_to="tensorboard"), callbacks=given)
    if when == "added to the trainer":
        trainer.add_callback(callback)
    names = [type(one).__name__ for one in trainer.callback_handler.callbacks]
    trainer.train()
    assert sorted(names) == sorted(type(one).__name__ for one in trainer.callback_handler.callbacks)

    (events,) = Path().rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    records = {record["step"]: record for record in ours(trainer).telemetry()}
    for key in ("protected_share", "locked", "released", "jaccard", "nonfinite"):
        points = {point.step: point.value for point in board.Scalars(f"train/isolation/{key}")}
        assert points == {step: pytest.approx(records[step - step % 3][key], rel=1e-6) for step in range(3, 15)}, key
    for logs in (seen.logs, trainer.state.log_history):
        of_steps = [entry for entry in logs if "loss" in entry]
        assert [entry.keys() >= KEYS for entry in of_steps] == [False] * 2 + [True] * 12
    assert sum(records[step]["released"] for step in (6, 9, 12)) > 0


def test_evaluations_have_no_figures_of_isolation() -> None:
    args = arguments(max_steps=6, eval_strategy="steps", eval_steps=3)
    trainer = trainer_of(args, eval_dataset=rows(8))
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert not any(key.startswith("isolation") for entry in evaluated for key in entry)
    trainer.evaluate()


class Spoiling(TrainerCallback):
    """Makes a few gradients NaN before the fifth step, once Trainer has taken their norm."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            kwargs["model"].lm_head.weight.grad[0, :5] = torch.nan


def test_nonfinite_gradients_are_counted_in_the_logs() -> None:
    args = arguments(max_steps=5)
    made = optimizer_cls_and_kwargs(EPIAdamW, args, mask_interval=5)
    trainer = trainer_of(args, optimizer_cls_and_kwargs=made, callbacks=[Spoiling(), IsolationCallback()])
    with pytest.warns(RuntimeWarning, match="lm_head.weight: 5 squared gradients were NaN") as caught:
        trainer.train()
    assert [w.filename for w in caught] == [__file__]
    assert losses(trainer)[-1]["isolation/nonfinite"] == 5


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_telemetry_in_plain_json() -> None:
    trainer = trainer_of(arguments(max_steps=7, save_strategy="steps", save_steps=7))
    trainer.train()
    saved = json.loads(Path("run/checkpoint-7/trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["IsolationCallback"]["telemetry"] == ours(trainer).telemetry()


def test_a_checkpoint_of_a_run_without_the_callback() -> None:
    args = arguments(max_steps=14, save_strategy="steps", save_steps=7)
    trainer_of(args, callbacks=[]).train()
    resumed = trainer_of(args)
    resumed.train(resume_from_checkpoint="run/checkpoint-7")
    assert [record["step"] for record in ours(resumed).telemetry()] == [9, 12]
    saved = json.loads(Path("run/checkpoint-14/trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["IsolationCallback"]["telemetry"] == ours(resumed).telemetry()


def test_a_checkpoint_in_another_folder() -> None:
    trainer_of(arguments("elsewhere", max_steps=7, save_strategy="steps", save_steps=7)).train()
    Path("elsewhere/checkpoint-7").rename("moved")
    resumed = trainer_of(arguments())
    resumed.train(resume_from_checkpoint="moved")
    assert [record["step"] for record in ours(resumed).telemetry()] == [3, 6, 9, 12]


def test_the_overlap_with_the_first_mask_goes_on_after_a_resumption() -> None:
    def trainer() -> Trainer:
        args = arguments(save_strategy="steps", save_steps=7, logging_steps=7)
        return trainer_of(args, callbacks=[IsolationCallback(first_mask=True)])

    straight = trainer()
    straight.train()
    first = torch.load("run/first_mask.pt", weights_only=True)
    now = {name: ours(straight).isolation_mask(param) for name, param in straight.model.named_parameters()}
    both = sum(int((mask & first[name]).sum()) for name, mask in now.items())
    either = sum(int((mask | first[name]).sum()) for name, mask in now.items())
    between, last = [entry["isolation/first_jaccard"] for entry in losses(straight)]
    assert between < 1.0  # the first mask is that of step 3, between two logs, and not that of step 6
    assert 0.0 < last == both / either < 1.0

    resumed = trainer()
    resumed.train(resume_from_checkpoint="run/checkpoint-7")
    assert losses(resumed) == losses(straight)
    resumed.log({"loss": 0.0})  # after training nothing is added
    assert "isolation/first_jaccard" not in resumed.state.log_history[-1]


def test_a_first_mask_that_is_not_there_is_missed() -> None:
    trainer_of(arguments("elsewhere", max_steps=7, save_strategy="steps", save_steps=7)).train()
    resumed = trainer_of(arguments(), callbacks=[IsolationCallback(first_mask=True)])
    with pytest.warns(UserWarning, match=r"no run/first_mask.pt, which a run with first_mask=True writes"):
        resumed.train(resume_from_checkpoint="elsewhere/checkpoint-7")
    assert losses(resumed)[7]["isolation/first_jaccard"] == 1.0


# What would otherwise pass in silence --------------------------------------------------------------------------------


def test_a_run_that_protects_nothing_is_told_so() -> None:
    args = arguments(max_steps=5, save_strategy="steps", save_steps=2)
    for settings, warned in [
        ({"mask_interval": 6}, True),
        ({"mask_interval": 5}, False),
        ({"mask_interval": None}, False),
    ]:
        made = optimizer_cls_and_kwargs(EPIAdamW, args, **settings)
        trainer = trainer_of(args, optimizer_cls_and_kwargs=made)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        text = "training ends at step 5, before the first refresh of the masks at step 6: nothing is protected. Choose"
        assert [w.filename for w in caught if text in str(w.message)] == [__file__] * warned

    # after a refresh in an earlier part of the run
    trainer_of(arguments(max_steps=4, save_strategy="steps", save_steps=4)).train()
    resumed = trainer_of(arguments(max_steps=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.train(resume_from_checkpoint="run/checkpoint-4")
    assert ours(resumed).telemetry(last=True)["step"] == 3


@pytest.mark.parametrize("kind", ["torch", "MaskedAdamW", "SparseAdamW"])
def test_an_optimizer_without_refreshes_is_refused(kind: str) -> None:
    args = arguments(optim="adamw_torch")
    given = {"optimizer_cls_and_kwargs": None} if kind == "torch" else {}
    trainer = trainer_of(args, "EPIAdamW" if kind == "torch" else kind, callbacks=[IsolationCallback()], **given)
    name = "AdamW" if kind == "torch" else kind
    with pytest.raises(TypeError, match=rf"nothing to log: {name} does not choose masks as training goes on. Pass"):
        trainer.train()


def test_a_callback_that_no_trainer_calls_is_refused() -> None:
    optimizer = EPIAdamW(llama().named_parameters())
    with pytest.raises(RuntimeError, match="is called by no transformers.Trainer; pass it in Trainer"):
        IsolationCallback().on_train_begin(None, None, None, optimizer=optimizer)


def test_no_warning_of_the_optimizers_points_into_a_library() -> None:
    args = arguments(max_steps=1)
    trainer = Trainer(llama(), args, train_dataset=rows(), optimizer_cls_and_kwargs=(EPIAdamW, {"lr": 0.1}))
    with pytest.warns(UserWarning, match="each tensor is a layer of its own") as caught:
        trainer.train()
    assert [w.filename for w in caught if "layer of its own" in str(w.message)] == [__file__]
