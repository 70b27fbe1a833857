"""What every test leans on: one seed, one thread, the folder of stored truths, and the command line."""

from pathlib import Path

import pytest
import torch
from command_line import ESM2, FASTA, Plm, Result

import plm
from plm.cli import main

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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plm:
    """``plm ...`` in an empty folder, with what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLM_DEBUG", raising=False)

    def run(*argv: str) -> Result:
        code = main(argv)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def fasta(tmp_path: Path) -> str:
    """The path of a file with `PROTEINS`."""
    path = tmp_path / "in.fasta"
    path.write_text(FASTA)
    return str(path)


@pytest.fixture(scope="session")
def model() -> plm.Model:
    """The tiny ESM-2, as Python loads it."""
    return plm.load(ESM2)
