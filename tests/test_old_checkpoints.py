"""Checkpoints that earlier commits wrote load, and training goes on from them bit for bit.

The archives in `tests/checkpoints` hold checkpoints of every class and layout, and what the commit that wrote them made
of the steps that followed; `tests/checkpoints/write.py` says how. Masks are chosen twice in these steps.

- Masks and importances have the same bits on every backend: at the load, and after the steps.
- Parameters have the bits that the same backend recorded. Those of the reference, and those that a torch optimizer
  inside of IsolatedOptimizer moves, are torch's work: where torch itself now computes other bits than it did when the
  file was written (another processor, another version), they are within a bound instead.
- Without the load, the same steps end elsewhere (negative control).
"""

import contextlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from states import same_state
from tolerances import RUN_OF_8_IN_BFLOAT16, RUN_OF_12
from torch import Tensor

if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from checkpoints import write

ARCHIVES = sorted(write.HERE.glob("*.zip"))
FILES = [
    (archive, name)
    for archive in ARCHIVES
    for name in zipfile.ZipFile(archive).namelist()
    if name.endswith(".pt") and "/" not in name
]
each_file = pytest.mark.parametrize(
    ("archive", "name"), FILES, ids=[f"{archive.stem}: {name.removesuffix('.pt')}" for archive, name in FILES]
)
pytestmark = [
    # without a process group torch says that there is none, and unnamed parameters have layers of their own
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:the optimizer was given no parameter names:UserWarning"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Return where the files of each archive are."""
    found = {}
    for archive in ARCHIVES:
        found[archive] = tmp_path_factory.mktemp(archive.stem)
        zipfile.ZipFile(archive).extractall(found[archive])
    return found


def read(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def written_by(archive: Path) -> str:
    return zipfile.ZipFile(archive).comment.decode()


def ranks(archive: Path, name: str) -> contextlib.AbstractContextManager[None]:
    """Return a process group of one where the file needs one; also to be read, where it holds sharded tensors."""
    # a sharded tensor in a file is an object of torch's, of which it promises nothing to its other versions
    if "sharded" in name and written_by(archive) != f"torch {write.torch_version()}":
        pytest.skip(f"sharded tensors are read by the torch that wrote them: {written_by(archive)}")
    return write.one_rank() if name.startswith("one rank") else contextlib.nullcontext()


def one_rounding() -> bool:
    """Return whether torch multiplies and adds with one rounding, as on every processor that has written a file."""
    factor = torch.full((64,), 1 + 2.0**-12)
    return bool((torch.addcmul(-factor * factor, factor, factor) == 2.0**-24).all())


def within(value: Tensor, expected: Tensor) -> bool:
    """Return whether two runs end as near as runs whose roundings differ."""
    bound = RUN_OF_8_IN_BFLOAT16 if value.dtype == torch.bfloat16 else RUN_OF_12
    return torch.allclose(value, expected, rtol=0, atol=bound)


@each_file
def test_an_old_checkpoint_loads_and_goes_on(archive: Path, name: str, folders: dict[Path, Path], backend: str) -> None:
    folder = folders[archive]
    if backend == "triton" and name.startswith(("one rank", "flattened")):
        pytest.skip("the interpreter takes its time, and these reach a kernel as the same plain tensors")
    with ranks(archive, name):
        record = read(folder, name)
        if backend != "reference" and "native" not in record["afterwards"]["parameters"]:
            pytest.skip("this backend does not take parameters of this dtype: see test_backends.py")
        optimizer, parameters = write.resumed(record, folder, backend)
        assert same_state(write.observed(optimizer, parameters), record["at save"])
        write.train(optimizer, parameters, record["seeds"])
        masks = write.observed(optimizer, parameters)
        recorded = {key: record["afterwards"][key] for key in masks}
        assert same_state(masks, recorded)
        ended = {name: write.whole(parameter) for name, parameter in parameters.items()}
    expected = record["afterwards"]["parameters"].get(backend)
    if expected is None:  # a backend that the writer did not have
        return
    if backend == "reference" and not one_rounding():
        computes_the_same = False
    else:
        alone = record["afterwards"].get("base alone")
        computes_the_same = alone is None or same_state(write.base_alone(record), alone)
    for key, value in ended.items():
        same = same_state(value, expected[key])
        assert same or (not computes_the_same and within(value, expected[key])), key


@each_file
def test_without_the_load_the_steps_end_elsewhere(archive: Path, name: str, folders: dict[Path, Path]) -> None:
    folder = folders[archive]
    with ranks(archive, name):
        record = read(folder, name)
        parameters = dict(write.module_of(record["parameters"], record["layout"]).named_parameters())
        optimizer = write.build(record, parameters, "reference")
        write.train(optimizer, parameters, record["seeds"])
        ended = {name: write.whole(parameter) for name, parameter in parameters.items()}
    recorded = record["afterwards"]["parameters"]["reference"]
    assert not all(within(value, recorded[key]) for key, value in ended.items())


def test_full_states_of_shards_load_where_nothing_is_sharded(folders: dict[Path, Path], backend: str) -> None:
    full = [(archive, name) for archive, name in FILES if name.startswith("one rank, full, ")]
    assert full
    for archive, name in full:
        record = {**read(folders[archive], name), "layout": write.PLAIN, "form": write.NESTED}
        optimizer, parameters = write.resumed(record, folders[archive], backend)
        write.train(optimizer, parameters, record["seeds"])
        masks = write.observed(optimizer, parameters)
        assert same_state(masks, {key: record["afterwards"][key] for key in masks}), name


def test_masks_change_in_the_recorded_steps(folders: dict[Path, Path]) -> None:
    """Of a fixed mask, and of no isolation, nothing changes; and masks that stood still would show little."""
    for archive, name in FILES:
        if name.startswith("one rank"):
            continue
        record = read(folders[archive], name)
        masks, before = record["afterwards"]["masks"], record["at save"]["masks"]
        chosen = record["class"] in ("EPIAdamW", "IsolatedOptimizer") and record["arguments"]["isolation_ratio"]
        assert same_state(masks, before) != bool(chosen), name
        assert any(mask.any() for mask in masks.values()) or not record["arguments"].get("isolation_ratio", 1.0)
