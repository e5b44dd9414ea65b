"""Tests of the libraries that train models with our optimizers: `make integrations`, in an environment of their own.

They need no network: models are made from configurations, with random weights.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# read when the libraries are imported, which the tests' files do
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# the scripts of processes that tests start
collect_ignore = ["trainer_ranks.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # the libraries warn of much that is not ours; what is ours stays an error
        ours = "error:.*(mask|isolat|layer of its own|bind_deepspeed)"
        item.add_marker(pytest.mark.filterwarnings("default", ours), append=False)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write into their current folder unless told otherwise."""
    monkeypatch.chdir(tmp_path)
