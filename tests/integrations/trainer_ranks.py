"""The processes of test_ranks.py: ``torchrun --nproc-per-node 2 trainer_ranks.py <what> <folder>``.

<what> is "ddp", "fsdp2", "fsdp2-masked", "fsdp2-sparse", "zero-1", "zero-2" or "zero-3" of DeepSpeed, or "zero-given",
where the optimizer was made before the trainer.
"""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.update(GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
WHAT, FOLDER, RANK = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
if WHAT.startswith("zero"):
    # Trainer offers DeepSpeed on a GPU only, and accelerate takes it on a CPU if told to
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", TORCH_EXTENSIONS_DIR=str(FOLDER / "extensions"))
    import deepspeed.ops

    # an extension for one machine's processes, built when it is first asked for; gloo alone does
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402
from small import LAYERS, llama, rows  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from epi_kernels import EPIAdamW, MaskedAdamW, SparseAdamW  # noqa: E402
from epi_kernels.integrations.transformers import IsolationCallback, optimizer_cls_and_kwargs  # noqa: E402

ENTRIES = sum(param.numel() for param in llama().parameters())


class FSDP2Trainer(Trainer):
    """Trainer over accelerate's FSDP2, which both offer on a GPU only: their code, on a way that is closed without."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def arguments(name: str, **given: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(FOLDER / name),
        max_steps=14,
        save_strategy="steps",
        save_steps=7,
        learning_rate=0.01,
        weight_decay=0.1,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        **given,
    )


def trained(args: TrainingArguments, checkpoint: str | None, optimizer: Any, **settings: Any) -> Trainer:
    kind = FSDP2Trainer if WHAT.startswith("fsdp2") else Trainer
    trainer = kind(
        llama(),
        args,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(optimizer, args, **settings),
        callbacks=[IsolationCallback(first_mask=not WHAT.startswith("zero"))] if optimizer is EPIAdamW else [],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def ours(trainer: Trainer) -> Any:
    inner = trainer.optimizer
    while not isinstance(inner, (EPIAdamW, MaskedAdamW, SparseAdamW)):
        inner = inner.optimizer
    return inner


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: whole(param.detach()).clone() for name, param in trainer.model.named_parameters()}


def gathered(value: Any) -> list[Any]:
    every: list[Any] = [None, None]
    dist.all_gather_object(every, value)
    return every


def losses(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def masks(share: float) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {name: torch.rand(param.shape) < share for name, param in llama().named_parameters()}


def resumes(args: dict[str, Any]) -> Trainer:
    """Seven steps and seven more are fourteen, on every rank; returns the run in one go."""
    settings = {"isolation_ratio": 0.1, "mask_interval": 3, "importance_beta": 0.5}
    straight = trained(arguments("straight", **args), None, EPIAdamW, **settings)
    records = ours(straight).telemetry()
    assert [record["step"] for record in records] == [3, 6, 9, 12], records
    for record in records:
        assert record["eligible"] == ENTRIES
        assert record["protected"] == int(0.1 * ENTRIES)
        assert sorted(layer["layer"] for layer in record["layers"]) == sorted(LAYERS)
    assert records[-1]["released"] > 0
    every = gathered(records)
    assert every[0] == every[1]

    state, parts = weights(straight), {p: s for p, s in ours(straight).state.items()}
    resumed = trained(arguments("straight", **args), str(FOLDER / "straight/checkpoint-7"), EPIAdamW, **settings)
    for name, param in weights(resumed).items():
        assert torch.equal(param, state[name]), name
    for one, other in zip(parts.values(), ours(resumed).state.values(), strict=True):
        for key, value in one.items():
            assert torch.equal(*(t.to_local() if isinstance(t, DTensor) else t for t in (value, other[key]))), key
    assert ours(resumed).telemetry() == records
    assert losses(resumed) == losses(straight)
    last = losses(straight)[-1]
    assert last["isolation/refreshed_at"] == 12
    if not WHAT.startswith("zero"):
        every = gathered(last["isolation/first_jaccard"])
        assert 0.0 < every[0] == every[1] < 1.0
    return straight


def ddp() -> None:
    trainer = resumes({})
    mine = [ours(trainer).isolation_mask(param) for param in trainer.model.parameters()]
    every = gathered(mine)
    assert all(map(torch.equal, *every))


def fsdp2() -> None:
    trainer = resumes({})
    assert all(isinstance(param, DTensor) for param in trainer.model.parameters())
    held = sum(int(ours(trainer).isolation_mask(param).sum()) for param in trainer.model.parameters())
    assert sum(gathered(held)) == int(0.1 * ENTRIES)


def fsdp2_fixed(optimizer: Any, argument: str, share: float) -> None:
    """Masks follow to the parameters that FSDP2 makes: what is frozen stays, and the rest moves."""
    marked, before = masks(share), {name: param.detach().clone() for name, param in llama().named_parameters()}
    after = weights(trained(arguments("run"), None, optimizer, **{argument: marked}))
    moving = 0.0
    for name, mask in marked.items():
        frozen = mask if argument == "frozen" else ~mask
        assert torch.equal(after[name][frozen], before[name][frozen]), name
        moving += float((after[name] != before[name])[~frozen].float().mean()) / len(marked)
    assert moving > 0.9, moving


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
    }


def zero(stage: int) -> None:
    """The optimizer is bound to the engine by the callback: layers are the model's, and no warning says otherwise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = resumes({"deepspeed": config(stage), "bf16": True})
    assert trainer.model_wrapped.zero_optimization_stage() == stage
    assert trainer.model_wrapped.module is trainer.model
    assert not any("bind_deepspeed" in str(w.message) for w in caught)


def zero_given() -> None:
    """Trainer drops such an optimizer under DeepSpeed and trains AdamW; the callback does not let that pass."""
    model = llama()
    trainer = Trainer(
        model,
        arguments("run", deepspeed=config(1), bf16=True),
        train_dataset=rows(),
        optimizers=(EPIAdamW(model.named_parameters()), None),
        callbacks=[IsolationCallback()],
    )
    try:
        trainer.train()
    except TypeError as error:
        assert "AdamW does not choose masks as training goes on" in str(error), error  # noqa: PT017
        assert "with DeepSpeed it drops optimizers=(optimizer, None)" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("another optimizer was taken")


def main() -> None:
    if WHAT == "ddp":
        ddp()
    elif WHAT == "fsdp2":
        fsdp2()
    elif WHAT == "fsdp2-masked":
        fsdp2_fixed(MaskedAdamW, "frozen", 0.5)
    elif WHAT == "fsdp2-sparse":
        fsdp2_fixed(SparseAdamW, "trainable", 0.1)
    elif WHAT == "zero-given":
        zero_given()
    else:
        zero(int(WHAT[-1]))


def leave() -> None:
    """End this process once both ranks have passed, without taking gloo's threads down one by one."""
    dist.barrier()
    time.sleep(0.5)  # until the last rank is out of the barrier
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()
