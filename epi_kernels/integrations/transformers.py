"""Hugging Face transformers: optimizers with named parameters in Trainer and TRL's trainers, and isolation in its logs.

::

    args = TrainingArguments(output_dir="out", learning_rate=1e-5)
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(EPIAdamW, args, isolation_ratio=0.01),
        callbacks=[IsolationCallback()],
    )

The module needs transformers 5, whose Trainer takes an optimizer factory.
"""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_optimizer import is_optimizer_factory

from epi_kernels.distributed import is_dtensor
from epi_kernels.engine.groups import params_of, without_wrappers
from epi_kernels.first_mask import FirstMask
from epi_kernels.isolation.isolating import Isolating
from epi_kernels.notices import warn

# settings that are the trainer's, and the names that TrainingArguments has for them
_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_ADAM_ARGUMENTS = {"betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon"}

# by these a Trainer hands an optimizer parameters in groups that we do not make
_OWN_PARAMETERS = frozenset({"params", "model", "optimizer_dict"})

# what is logged of a record: its key there, and ours after "isolation/"
LOGGED = {
    "step": "refreshed_at",
    "protected_share": "protected_share",
    "locked": "locked",
    "released": "released",
    "jaccard": "jaccard",
    "nonfinite": "nonfinite",
}


def optimizer_cls_and_kwargs(
    optimizer: type[Optimizer],
    args: TrainingArguments,
    *,
    base: type[Optimizer] | None = None,
    base_settings: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple["type[NamedParameters]", dict[str, Any]]:
    """Return what ``Trainer(optimizer_cls_and_kwargs=...)`` takes: one of our optimizers over named parameters.

    Trainer itself hands an optimizer no names, so each tensor would be a layer of its own. Here the optimizer gets the
    parameters that require a gradient with their names in the model, without what wrappers add to them, in Trainer's
    two groups: with weight decay, and without it for biases and norms (`Trainer.get_decay_parameter_names`). It is made
    when training begins, from the model that is trained then: with ``peft_config`` in TRL, ``model_init`` and DeepSpeed
    too.

    Args:
        optimizer: EPIAdamW, EPILion, MaskedAdamW, SparseAdamW or IsolatedOptimizer.
        args: those of the trainer; read when the optimizer is made, as a hyperparameter search has set them then.
            ``learning_rate`` and ``weight_decay`` count for every optimizer; ``adam_beta1``, ``adam_beta2`` and
            ``adam_epsilon`` for those that are AdamW; ``optim`` and ``optim_args`` choose the base of an
            IsolatedOptimizer, and are without effect for the others, as with any ``optimizer_cls_and_kwargs``.
            Clipping, accumulation, precision and the scheduler are Trainer's own.
        base: for IsolatedOptimizer, a class to use in the place of what ``args.optim`` names. It is given the groups
            and ``lr``, and `base_settings`.
        base_settings: further arguments of `base`.
        settings: the optimizer's other arguments, such as ``isolation_ratio``, or ``frozen`` and ``trainable``
            with names of the model's parameters.

    Raises:
        TypeError: `optimizer` is not an optimizer class, or does not take a setting.
        ValueError: a setting is one that `args` has, or `base` is not for this optimizer.

    When the optimizer is made, its own constructor may raise; and ValueError is raised if ``args.optim`` names a base
    that makes groups of its own, or if the base knows no weight decay and ``args.weight_decay`` is not 0.

    Example:
        >>> import torch
        >>> from epi_kernels import EPIAdamW
        >>> args = TrainingArguments(learning_rate=1e-5, weight_decay=0.1)
        >>> factory, settings = optimizer_cls_and_kwargs(EPIAdamW, args, isolation_ratio=0.1)
        >>> model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
        >>> optimizer = factory()(model, **settings)  # a Trainer does this
        >>> [(group["param_names"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(['blocks.0.weight'], 1e-05, 0.1), (['blocks.0.bias'], 1e-05, 0.0)]
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(f"optimizer is {optimizer!r}; pass a class, such as EPIAdamW, which is constructed later")
    taken = inspect.signature(optimizer).parameters
    if base is not None and "base" not in taken:
        raise ValueError(f"{optimizer.__name__} has no base; base={base.__name__} is for IsolatedOptimizer")
    if base_settings is not None and base is None:
        raise ValueError(f"base_settings={dict(base_settings)} are for base=; pass that class too")
    for name, argument in (_ARGUMENTS | (_ADAM_ARGUMENTS if issubclass(optimizer, AdamW) else {})).items():
        if name in settings:
            raise ValueError(f"{name}={settings[name]!r} is the trainer's: set {argument} in TrainingArguments")
    for name in settings:
        if name not in taken:
            raise TypeError(f"{optimizer.__name__} takes no {name!r}; it takes {', '.join(taken)}")
    own = {"optimizer": optimizer, "args": args, "settings": settings}
    if "base" in taken:
        own |= {"base": base, "base_settings": dict(base_settings or {})}
    return NamedParameters, own


class NamedParameters:
    """A factory in the sense of transformers, which calls ``NamedParameters()(model, **kwargs)`` to get an optimizer.

    `optimizer_cls_and_kwargs` has checked the arguments, which are its own.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        optimizer: type[Optimizer],
        args: TrainingArguments,
        settings: Mapping[str, Any],
        base: type[Optimizer] | None = None,
        base_settings: Mapping[str, Any] | None = None,
    ) -> Optimizer:
        """Return the optimizer of a model's parameters."""
        groups = grouped(model, args.weight_decay)
        if base_settings is not None:
            return optimizer(_base(model, args, groups, base, base_settings), **settings)  # type: ignore[arg-type]
        of_args: dict[str, Any] = {"lr": args.learning_rate}
        if issubclass(optimizer, AdamW):
            of_args |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        masks = {
            argument: {without_wrappers(key) if isinstance(key, str) else key: mask for key, mask in given.items()}
            for argument in ("frozen", "trainable")
            if isinstance(given := settings.get(argument), Mapping)
        }
        return optimizer(groups, **of_args, **{**settings, **masks})


def grouped(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return a model's parameters that require a gradient, named, in a group with weight decay and one without.

    A group without parameters is left out.
    """
    # Trainer's method, which uses nothing of the trainer
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups[name not in decaying]["params"].append((without_wrappers(name), param))
    return [group for group in groups if group["params"]]


def _base(
    model: nn.Module,
    args: TrainingArguments,
    groups: list[dict[str, Any]],
    base: type[Optimizer] | None,
    base_settings: Mapping[str, Any],
) -> Optimizer:
    """Return the base of an IsolatedOptimizer; see `optimizer_cls_and_kwargs`."""
    if base is None:
        base, chosen = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if is_optimizer_factory(base) or _OWN_PARAMETERS & chosen.keys():
            raise ValueError(
                f"optim={str(args.optim)!r} makes parameter groups of its own; give the class of an optimizer as base="
            )
    else:
        chosen = {"lr": args.learning_rate, **base_settings}
    made: Optimizer = base(groups, **chosen)
    if args.weight_decay and "weight_decay" not in made.defaults:
        raise ValueError(
            f"{base.__name__} has no weight decay, and args.weight_decay is {args.weight_decay}; set it to 0"
        )
    return made


class IsolationCallback(TrainerCallback, ExportableState):
    """Puts what the last refresh of the masks did into a Trainer's logs, and its telemetry into checkpoints.

    Trainer's logs with a loss, and so TensorBoard, W&B and ``trainer.state.log_history``, get from the first refresh on
    (TensorBoard and W&B show every key of Trainer's under "train/"):

    - ``isolation/refreshed_at``: the optimizer's step of the last refresh, of which the other figures are.
    - ``isolation/protected_share``: protected / eligible entries.
    - ``isolation/locked``, ``isolation/released``: entries that are protected since this refresh, or no longer.
    - ``isolation/jaccard``: overlap with the mask before it, 1 for the same entries, 0 for none in common.
    - ``isolation/nonfinite``: NaN or infinite squared gradients so far, on this rank.
    - ``isolation/first_jaccard``: overlap with the first mask, on request.

    The callback goes before all others, so these figures reach every other callback wherever it stands in the list.
    Reading them waits for the device; steps that are not logged do not. A checkpoint has all records of
    ``optimizer.telemetry()`` in its trainer_state.json, and ``resume_from_checkpoint`` brings them back. Under
    DeepSpeed the callback binds the optimizer to the engine.

    At the start of training a warning says if the run ends before the first refresh: nothing is protected then.

    Args:
        first_mask: log the overlap with the first mask too. The mask, a byte for each entry that competes, is kept on
            every rank, and once in ``<output_dir>/first_mask.pt``, where a resumed run finds it.

    Raises:
        TypeError: at the start of training, if the optimizer does not choose masks as training goes on.
        RuntimeError: at the start of training, if no Trainer calls the callback.
        ValueError: a checkpoint has a telemetry that is none, DeepSpeed steps another optimizer, or the optimizer was
            made before an adapter (``peft_config``) and would train nothing.
        NotImplementedError: the first mask is asked for, under DeepSpeed or FSDP1.

    Example:
        >>> callback = IsolationCallback()  # Trainer(..., callbacks=[IsolationCallback()])
        >>> callback.state()
        {'args': {'first_mask': False}, 'attributes': {}, 'telemetry': []}
    """

    def __init__(self, first_mask: bool = False) -> None:
        self.first_mask = first_mask
        self._optimizer: Any = None  # the one in training
        self._first: FirstMask | None = None  # its first mask, if asked for
        # the step of a refresh, and the overlap with the first mask since then
        self._overlap: tuple[int, float | None] = (0, None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer, bind it to DeepSpeed, bring telemetry back, and warn of a run that protects nothing."""
        optimizer, trainer = _unwrapped(kwargs["optimizer"]), _calling_trainer()
        if trainer.is_deepspeed_enabled and self.first_mask:
            raise NotImplementedError(
                "first_mask=True under DeepSpeed, whose flat partitions are different ones on each rank; leave it out"
            )
        params = params_of(optimizer.param_groups)
        if not trainer.is_deepspeed_enabled and not any(param.requires_grad for param in params):
            raise ValueError(
                "no parameter of the optimizer requires a gradient: it was made before the trainer put an adapter into "
                "the model, and would train nothing. Pass optimizer_cls_and_kwargs= in the place of optimizers="
            )
        handler, name = trainer.callback_handler, type(self).__name__
        # a new list: the handler is on its way through the old one
        handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]
        if trainer.is_deepspeed_enabled and hasattr(optimizer, "bind_deepspeed"):
            optimizer.bind_deepspeed(trainer.model_wrapped)
        if state.global_step:  # resumed
            saved = state.stateful_callbacks.get(name, {})
            optimizer.load_telemetry(saved.get("telemetry", []))
        self._optimizer, self._first, self._overlap = optimizer, None, (0, None)
        if self.first_mask:
            self._first = _first_mask_of(optimizer, _first_file(args))
        # a checkpoint that was saved without this callback has no place for it, which Trainer does not expect
        state.stateful_callbacks[name] = self.state()
        _warn_of_short_run(optimizer, state.max_steps - state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the first mask, if it is asked for and was chosen in this step."""
        if self._first is not None and not self._first.masks:
            group = self._optimizer.param_groups[0]
            if group["mask_interval"] is not None and group["isolation_clock"] >= group["mask_interval"]:
                self._take_first(args)

    def _take_first(self, args: TrainingArguments) -> None:
        """Keep the present mask as the first one, if anything is protected, and write it once."""
        assert self._first is not None
        if self._first.overlap() is not None:
            whole = {
                name: mask.full_tensor() if is_dtensor(mask) else mask  # type: ignore[attr-defined]
                for name, mask in self._first.masks.items()
            }
            if args.process_index == 0:
                torch.save(whole, _first_file(args))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to logs of training steps, and to Trainer's history."""
        if self._optimizer is None or logs is None or "loss" not in logs:
            return
        record = self._optimizer.telemetry(last=True)
        if record is None:
            return
        figures = {f"isolation/{ours}": record[key] for key, ours in LOGGED.items()}
        if self._first is not None:
            if not self._first.masks:  # only a device knew that there was a refresh, or a program has asked for it
                self._take_first(args)
            if self._overlap[0] != record["step"]:  # it takes a pass over all masks, and exchanges between ranks
                self._overlap = (record["step"], self._first.overlap())
            figures["isolation/first_jaccard"] = self._overlap[1]
        logs.update(figures)
        state.log_history[-1].update(figures)  # which has a copy of the logs from before the callbacks

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer."""
        self._optimizer = self._first = None

    def state(self) -> dict[str, Any]:
        """Return what Trainer writes into a checkpoint's trainer_state.json."""
        telemetry = [] if self._optimizer is None else self._optimizer.telemetry()
        # Trainer makes a callback anew from arguments and attributes, if asked to; telemetry is the optimizer's
        return {"args": {"first_mask": self.first_mask}, "attributes": {}, "telemetry": telemetry}


def _first_file(args: TrainingArguments) -> Path:
    return Path(args.output_dir) / "first_mask.pt"


def _first_mask_of(optimizer: Isolating, file: Path) -> FirstMask:
    """Return the first mask of an optimizer, from a file if its masks were chosen in an earlier part of the run."""
    first = FirstMask(optimizer)
    if first.overlap() is None:  # nothing is protected yet: the first mask is still to come
        return first
    if file.exists():
        first.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    else:
        warn(f"there is no {file}, which a run with first_mask=True writes: the overlap is with the mask resumed from")
    return first


def _calling_trainer() -> Trainer:
    """Return the Trainer that calls a callback: events hand over neither it nor the list of its callbacks."""
    frame = sys._getframe(1)
    while not isinstance(frame.f_locals.get("self"), Trainer):
        if frame.f_back is None:
            raise RuntimeError("IsolationCallback is called by no transformers.Trainer; pass it in Trainer(callbacks=)")
        frame = frame.f_back
    return frame.f_locals["self"]


def _unwrapped(optimizer: Any) -> Any:
    """Return our optimizer, which accelerate's and DeepSpeed's wrappers have under ``optimizer``."""
    inner = optimizer
    while not isinstance(inner, Isolating):
        if getattr(inner, "optimizer", None) is None:
            raise TypeError(
                f"IsolationCallback has nothing to log: {type(inner).__name__} does not choose masks as training goes "
                "on. Pass optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(EPIAdamW, args) to the trainer; with "
                "DeepSpeed it drops optimizers=(optimizer, None)"
            )
        inner = inner.optimizer
    return inner


def _warn_of_short_run(optimizer: Any, steps: int) -> None:
    """Warn if there is no refresh before the run ends in so many steps, and was none before."""
    group = optimizer.param_groups[0]
    interval, last = group["mask_interval"], group["isolation_clock"] + steps
    if interval is not None and last < interval:
        warn(
            f"training ends at step {last}, before the first refresh of the masks at step {interval}: nothing is "
            f"protected. Choose a mask_interval well below {last}"
        )
