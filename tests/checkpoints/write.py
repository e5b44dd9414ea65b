"""Writes checkpoints of every class and layout, each with what training makes of it.

    PYTHONPATH=.:tests python tests/checkpoints/write.py

The files go into a zip archive beside this script, named after the commit that wrote them. It is checked in, and
`tests/test_old_checkpoints.py` loads the files with the package as it is now. The archive of an old commit is never
written again: whatever has changed since, the package must load it. To add an archive, run the script in a checkout
of the commit whose checkpoints must stay loadable. Two runs write the same bytes.

The comment of an archive names the torch that wrote it. A file is a dict that ``torch.load(weights_only=True)`` reads:

- "written by": the commit, the version of torch and what the processor can do;
- "class", "arguments", "groups", "named", "base", "layout": how to construct the optimizer again (see `build`);
- "parameters": their values when the checkpoint was written, after step LAST;
- "state" and "form": the checkpoint, and what call made it (see `load`); for the form FOLDER, "folder" names it;
- "at save": what the optimizer protects then (see `observed`), and the importances;
- "seeds": of the gradients of the steps that follow (see `gradients`);
- "afterwards": what it protects after these steps, the same on all backends, and the "parameters" of each backend.
"""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from states import same_state
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

import epi_kernels

HERE = Path(__file__).parent
BACKENDS = ("native", "reference")
LAST = 10  # the checkpoint is written after this step, in the middle of an interval of 4
SEEDS = list(range(LAST + 1, 19))  # the steps after it: masks are chosen again at 12 and at 16
SHAPES = {
    "blocks.0.weight": (6, 7),
    "blocks.0.bias": (6,),
    "blocks.1.weight": (9, 5),
    "head.weight": (5, 3),
    "head.scale": (1,),
}

# the layout of the parameters
PLAIN, ONE_RANK = "plain tensors", "FSDP2 on one rank"
# what call made the state
STATE_DICT = "optimizer.state_dict()"
NESTED = "get_optimizer_state_dict"
FULL = "get_optimizer_state_dict, full_state_dict"
FLATTENED = "get_optimizer_state_dict, flatten_optimizer_state_dict"
FOLDER = "torch.distributed.checkpoint"
FOLDER_FLATTENED = "torch.distributed.checkpoint, flatten_optimizer_state_dict"
OPTIONS: dict[str, dict[str, bool]] = {
    NESTED: {},
    FULL: {"full_state_dict": True},
    FLATTENED: {"flatten_optimizer_state_dict": True},
    FOLDER: {},
    FOLDER_FLATTENED: {"flatten_optimizer_state_dict": True},
}

Parameters = dict[str, Parameter]


# What the writer and the test share ----------------------------------------------------------------------------------


def drawn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return multiples of 1/256 between -4 and 4.

    They have the same bits on every machine. Those of torch.randn depend on the instructions that a processor has.
    """

    def whole() -> Tensor:
        return torch.randint(-1024, 1025, tuple(shape), generator=generator).double() / 256

    return (torch.complex(whole(), whole()) if dtype.is_complex else whole()).to(dtype)


def gradients(parameters: Parameters, seed: int) -> dict[str, Tensor | None]:
    """Return the gradient of each parameter in a step: from its seed alone. All but the first parameter miss some."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor | None] = {}
    for i, (name, parameter) in enumerate(parameters.items()):
        gradient = drawn(parameter.shape, parameter.dtype, generator) / 8.0**i
        found[name] = None if (seed + i) % 5 == 0 and i else gradient
    return found


def train(optimizer: Any, parameters: Parameters, seeds: Sequence[int]) -> None:
    """Take a step for each seed."""
    for seed in seeds:
        for name, gradient in gradients(parameters, seed).items():
            parameter = parameters[name]
            if gradient is not None and isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, or of all of a DTensor."""
    plain = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return plain.detach().clone()


def observed(optimizer: Any, parameters: Parameters) -> dict[str, dict[str, Tensor]]:
    """Return what an optimizer says of each parameter: "masks", and "importances" where the class has them."""
    if isinstance(optimizer, epi_kernels.SparseAdamW):
        return {"masks": {name: whole(optimizer.trainable_mask(p)) for name, p in parameters.items()}}
    found = {"masks": {name: whole(optimizer.isolation_mask(p)) for name, p in parameters.items()}}
    if not isinstance(optimizer, epi_kernels.MaskedAdamW):
        found["importances"] = {name: whole(optimizer.importance(p)) for name, p in parameters.items()}
    return found


def module_of(values: dict[str, Tensor], layout: str) -> nn.Module:
    """Return a module with parameters of these names and values, in a layout."""
    module = nn.Module()
    for name, value in values.items():
        owner = module
        *path, last = name.split(".")
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, Parameter(value.clone()))
    if layout == ONE_RANK:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return module


def build(record: dict[str, Any], parameters: Parameters, backend: str) -> Any:
    """Return the optimizer that a file describes, over parameters of the names that it has."""

    def copied(arguments: dict[str, Any]) -> dict[str, Any]:
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}

    def given(names: Sequence[str]) -> list[Any]:
        return [(name, parameters[name]) if record["named"] else parameters[name] for name in names]

    groups = [{"params": given(group["parameters"]), **copied(group["settings"])} for group in record["groups"]]
    arguments = copied(record["arguments"])
    if not record["named"]:
        for key in {"frozen", "trainable"} & arguments.keys():
            arguments[key] = {parameters[name]: mask for name, mask in arguments[key].items()}
    kind = getattr(epi_kernels, record["class"])
    if record["base"]:
        base = getattr(torch.optim, record["base"]["class"])(groups, **copied(record["base"]["arguments"]))
        return kind(base, **arguments, backend=backend)
    return kind(groups, **arguments, backend=backend)


def load(record: dict[str, Any], folder: Path, module: nn.Module, optimizer: Any) -> None:
    """Load the checkpoint of a file that lies in `folder`, as the call that made it asks for."""
    form = record["form"]
    if form == STATE_DICT:
        for group in record["state"]["param_groups"]:
            group.update(record["changed in the groups"])
        optimizer.load_state_dict(record["state"])
        return
    options = StateDictOptions(**OPTIONS[form])
    state = record.get("state")
    if state is None:
        state = {"optimizer": get_optimizer_state_dict(module, optimizer, options=options)}
        checkpoint.load(state, checkpoint_id=folder / record["folder"])
        state = state["optimizer"]
    set_optimizer_state_dict(module, optimizer, state, options=options)


def resumed(record: dict[str, Any], folder: Path, backend: str) -> tuple[Any, Parameters]:
    """Return the optimizer of a file, its checkpoint loaded, and its parameters."""
    module = module_of(record["parameters"], record["layout"])
    parameters = dict(module.named_parameters())
    optimizer = build(record, parameters, backend)
    load(record, folder, module, optimizer)
    return optimizer, parameters


def base_alone(record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the parameters after the further steps of the base optimizer of a file without any isolation.

    They are all torch's work: their bits tell whether torch computes here as it did where the file was written.
    """
    parameters = {name: Parameter(value.clone()) for name, value in record["parameters"].items()}
    base = getattr(torch.optim, record["base"]["class"])(parameters.values(), **record["base"]["arguments"])
    base.load_state_dict({**record["state"], "param_groups": _settings_of_the_base(record, base)})
    train(base, parameters, record["seeds"])
    return {name: whole(parameter) for name, parameter in parameters.items()}


def _settings_of_the_base(record: dict[str, Any], base: Any) -> list[dict[str, Any]]:
    known = base.state_dict()["param_groups"][0]
    return [{key: group[key] for key in known if key in group} for group in record["state"]["param_groups"]]


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Make a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# What is written -----------------------------------------------------------------------------------------------------

ISOLATION: dict[str, Any] = {"isolation_ratio": 0.2, "mask_interval": 4, "importance_beta": 0.75}
EPI: dict[str, Any] = {"lr": 2**-6, "weight_decay": 0.125, **ISOLATION}
HALVES = {
    name: torch.arange(torch.Size(shape).numel()).view(shape) % 2 == 0
    for name, shape in SHAPES.items()
    if name.endswith("weight")
}
GROUPS: list[dict[str, Any]] = [
    {"parameters": ["blocks.0.weight", "blocks.1.weight"], "settings": {"lr": 2**-5, "betas": (0.75, 0.875)}},
    {"parameters": ["head.weight"], "settings": {"weight_decay": 0.0}},
    {"parameters": ["blocks.0.bias", "head.scale"], "settings": {"eps": 2**-20}},
]
EPI_GROUPS = [
    {**group, "settings": {**group["settings"], **own}}
    for group, own in zip(
        GROUPS,
        ({"importance_beta": 0.5}, {"isolation_ratio": 0.5}, {"isolation_ratio": 0.0}),
        strict=True,
    )
]


def epi(**settings: Any) -> dict[str, Any]:
    """Return the description of an EPIAdamW."""
    return {"class": "EPIAdamW", "arguments": {**EPI, **settings}}


def masked(**settings: Any) -> dict[str, Any]:
    """Return the description of a MaskedAdamW."""
    return {"class": "MaskedAdamW", "arguments": {"lr": 2**-6, "frozen": HALVES, **settings}}


def sparse(**settings: Any) -> dict[str, Any]:
    """Return the description of a SparseAdamW."""
    return {"class": "SparseAdamW", "arguments": {"lr": 2**-6, "trainable": HALVES, **settings}}


def isolated(base: str, **settings: Any) -> dict[str, Any]:
    """Return the description of an IsolatedOptimizer around a torch optimizer with these settings."""
    return {
        "class": "IsolatedOptimizer",
        "arguments": ISOLATION,
        "base": {"class": base, "arguments": {"lr": 2**-6, **settings}},
    }


def of_torch(description: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return a description of one of ours that goes on from a state of torch.optim.AdamW with these settings."""
    common = {key: description["arguments"][key] for key in ("lr", "weight_decay")}
    return {**description, "state of": {"class": "AdamW", "arguments": {**common, **settings}}}


MOMENTUM = isolated("SGD", momentum=0.875)
SHARDED = {
    "importance ema": epi(),
    "importance exp_avg_sq": epi(importance="exp_avg_sq"),
    "MaskedAdamW": masked(),
    "SparseAdamW": sparse(),
    "isolated SGD with momentum": MOMENTUM,
}
UNNAMED = {"named": False}
BFLOAT16, FLOAT16 = {"dtype": torch.bfloat16}, {"dtype": torch.float16}
FLOAT64, COMPLEX = {"dtype": torch.float64}, {"dtype": torch.complex64}

# name of the file -> what differs from named float32 parameters in one group and as plain tensors
CASES: dict[str, dict[str, Any]] = {
    "EPIAdamW, importance ema": epi(),
    "EPIAdamW, importance exp_avg_sq": epi(importance="exp_avg_sq"),
    "EPIAdamW, importance exp_avg_sq, amsgrad": epi(importance="exp_avg_sq", amsgrad=True),
    "EPIAdamW, amsgrad": epi(amsgrad=True),
    "EPIAdamW, scope layer": epi(scope="layer"),
    "EPIAdamW, normalize none, layers tensor": epi(normalize="none", layers="tensor"),
    "EPIAdamW, threshold histogram": epi(threshold="histogram"),
    "EPIAdamW, isolation off": epi(isolation_ratio=0.0),
    "EPIAdamW, fused": epi(fused=True),
    "EPIAdamW, maximize": epi(maximize=True),
    "EPIAdamW, lr and betas in tensors": epi(lr=torch.tensor(2**-6), betas=(torch.tensor(0.75), torch.tensor(0.875))),
    "EPIAdamW, unnamed": epi() | UNNAMED,
    "EPIAdamW, several groups": epi() | {"groups": EPI_GROUPS},
    "EPIAdamW, several groups, unnamed, importance exp_avg_sq": epi(importance="exp_avg_sq")
    | {"groups": EPI_GROUPS}
    | UNNAMED,
    "EPIAdamW, bfloat16": epi() | BFLOAT16,
    "EPIAdamW, bfloat16, importance exp_avg_sq": epi(importance="exp_avg_sq") | BFLOAT16,
    "EPIAdamW, float16": epi() | FLOAT16,
    "EPIAdamW, float64": epi() | FLOAT64,
    "EPIAdamW, complex": epi() | COMPLEX,
    "EPIAdamW, complex, amsgrad": epi(amsgrad=True) | COMPLEX,
    # No CPU captures graphs. The state is one of a captured step, and goes on with the flag off.
    "EPIAdamW, capturable": epi() | {"changed in the groups": {"capturable": False}},
    "EPIAdamW from torch's AdamW": of_torch(epi()),
    "EPIAdamW from torch's AdamW, fused, amsgrad": of_torch(epi(), fused=True, amsgrad=True),
    "EPIAdamW from torch's AdamW, importance exp_avg_sq": of_torch(epi(importance="exp_avg_sq")),
    "EPIAdamW from torch's AdamW, bfloat16": of_torch(epi()) | BFLOAT16,
    "MaskedAdamW": masked(),
    "MaskedAdamW, unnamed": masked() | UNNAMED,
    "MaskedAdamW, amsgrad": masked(amsgrad=True),
    "MaskedAdamW, bfloat16": masked() | BFLOAT16,
    "MaskedAdamW, complex": masked() | COMPLEX,
    "MaskedAdamW, several groups": masked() | {"groups": GROUPS},
    "SparseAdamW": sparse(),
    "SparseAdamW, unnamed": sparse() | UNNAMED,
    "SparseAdamW, bfloat16": sparse() | BFLOAT16,
    "SparseAdamW, several groups": sparse() | {"groups": GROUPS},
    "IsolatedOptimizer around SGD with momentum": MOMENTUM,
    "IsolatedOptimizer around SGD with momentum, unnamed": MOMENTUM | UNNAMED,
    "IsolatedOptimizer around AdamW": isolated("AdamW"),
    "IsolatedOptimizer around AdamW, bfloat16": isolated("AdamW") | BFLOAT16,
    "IsolatedOptimizer around Adafactor": isolated("Adafactor"),
    "IsolatedOptimizer around RMSprop": isolated("RMSprop", momentum=0.5, centered=True),
    **{
        f"flattened, {name}": description | {"form": FLATTENED, "layout": PLAIN}
        for name, description in SHARDED.items()
    },
    **{
        f"one rank, {what}, {name}": description | {"form": form, "layout": ONE_RANK}
        for name, description in SHARDED.items()
        for what, form in (
            ("sharded", STATE_DICT),
            ("nested and sharded", NESTED),
            ("full", FULL),
            ("folder", FOLDER),
            ("flattened folder", FOLDER_FLATTENED),
        )
    },
}


def file_name(case: str) -> str:
    """Return the name of a case's file."""
    return f"{case}.pt"


def write(case: str, description: dict[str, Any], folder: Path, writer: dict[str, str]) -> None:
    """Train, save, go on from what was saved on each backend, and write all of it into a file of `folder`."""
    record = {
        "written by": writer,
        "base": None,
        "groups": [{"parameters": list(SHAPES), "settings": {}}],
        "named": True,
        "layout": PLAIN,
        "form": STATE_DICT,
        "changed in the groups": {},
        "seeds": SEEDS,
        **description,
    }
    dtype = record.pop("dtype", torch.float32)
    backends = [backend for backend in BACKENDS if backend == "reference" or dtype != torch.float64]
    source = record.pop("state of", None)
    generator = torch.Generator().manual_seed(0)
    module = module_of({name: drawn(shape, dtype, generator) for name, shape in SHAPES.items()}, record["layout"])
    parameters = dict(module.named_parameters())
    if source:
        optimizer = getattr(torch.optim, source["class"])(parameters.items(), **source["arguments"])
    else:
        # what is changed before the load was on when the state was made
        were = {key: not value for key, value in record["changed in the groups"].items()}
        optimizer = build({**record, "arguments": {**record["arguments"], **were}}, parameters, backends[0])
    with graphs_on_the_cpu():
        train(optimizer, parameters, range(1, LAST + 1))

    record["parameters"] = {name: whole(parameter) for name, parameter in parameters.items()}
    name = file_name(case)
    if record["form"] == STATE_DICT:
        record["state"] = optimizer.state_dict()
    else:
        state = get_optimizer_state_dict(module, optimizer, options=StateDictOptions(**OPTIONS[record["form"]]))
        if record["form"] in (FOLDER, FOLDER_FLATTENED):
            record["folder"] = name.removesuffix(".pt")
            place = checkpoint.FileSystemWriter(folder / record["folder"], sync_files=False)
            place.save_id = "written by tests/checkpoints/write.py"  # which is else another one in each run
            checkpoint.save({"optimizer": state}, storage_writer=place)
        else:
            record["state"] = state

    torch.save(record, folder / name)
    found = {}
    for backend in backends:
        again = torch.load(folder / name, weights_only=True)
        one, its_parameters = resumed(again, folder, backend)
        at_save = observed(one, its_parameters)
        train(one, its_parameters, SEEDS)
        found[backend] = (at_save, observed(one, its_parameters), {n: whole(p) for n, p in its_parameters.items()})
    at_save, afterwards, values = found[backends[0]]
    assert all(same_state((at_save, afterwards), others[:2]) for others in found.values()), f"{case}: other masks"
    if not source:
        with graphs_on_the_cpu():
            train(optimizer, parameters, SEEDS)
        straight = {name: whole(parameter) for name, parameter in parameters.items()}
        assert same_state(straight, values), f"{case}: it does not go on as without a checkpoint"

    # as it was saved: the tensors of the state that was handed out have been stepped since
    record = torch.load(folder / name, weights_only=True)
    # bits that are the same on all backends are in the file once
    by_backend = {
        backend: {name: values[name] if same_state(values[name], value) else value for name, value in others[2].items()}
        for backend, others in found.items()
    }
    record |= {"at save": at_save, "afterwards": {**afterwards, "parameters": by_backend}}
    if record["base"] and record["form"] == STATE_DICT and record["layout"] == PLAIN:
        record["afterwards"]["base alone"] = base_alone(torch.load(folder / name, weights_only=True))
    without_hashes(record.get("state"))
    torch.save(record, folder / name)


@contextlib.contextmanager
def graphs_on_the_cpu() -> Iterator[None]:
    """Let the package believe that a CPU captures graphs, which its check of capturable asks torch."""
    with contextlib.ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("epi_kernels") and hasattr(module, "_get_capturable_supported_devices"):
                there = mock.patch.object(module, "_get_capturable_supported_devices", return_value=["cpu"])
                patches.enter_context(there)
        yield


def without_hashes(state: Any) -> Any:
    """Return a state whose sharded tensors have forgotten their hashes, which are others in each run."""
    for tensor in state.values() if isinstance(state, dict) else ():
        without_hashes(tensor)
        if isinstance(tensor, DTensor):
            tensor._spec._hash = tensor.device_mesh._hash = None
    return state


def torch_version() -> str:
    """Return the version of torch without what it was built for."""
    return torch.__version__.split("+")[0]


def commit() -> str:
    """Return the short hash of the commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Write all of CASES."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default=commit(), help="the commit that the files say wrote them [HEAD]")
    arguments = parser.parse_args()
    archive = HERE / f"{arguments.commit}.zip"
    writer = {
        "commit": arguments.commit,
        "torch": torch_version(),
        "processor": f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}",
    }
    # torch says of the forms without a process group that there is none
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    warnings.filterwarnings("ignore", "the optimizer was given no parameter names")
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(archive, "x", zipfile.ZIP_DEFLATED) as packed:
        packed.comment = f"torch {torch_version()}".encode()
        os.chdir(place)  # a folder of torch.distributed.checkpoint has its own path in it: let that be a relative one
        for case, description in CASES.items():
            with one_rank() if description.get("layout") == ONE_RANK else contextlib.nullcontext():
                write(case, description, Path(), writer)
        for file in sorted(file for file in Path().rglob("*") if file.is_file()):
            packed.writestr(zipfile.ZipInfo(str(file)), file.read_bytes(), zipfile.ZIP_DEFLATED)
        os.chdir(HERE)
    print(f"{len(CASES)} checkpoints in {archive}, {archive.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
