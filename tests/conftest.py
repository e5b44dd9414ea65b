"""What every test gets: a fixed seed, and the float arithmetic that torch has by default."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
