"""What every test leans on: one seed, one thread, and the folder of stored truths."""

from pathlib import Path

import pytest
import torch

# The networks of these tests are tiny. On a busy machine a second thread makes them seventy times slower, not faster.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers are the same in every run and in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folders of tiny random checkpoints beside what the originals compute from them."""
    return Path(__file__).parent / "golden"
