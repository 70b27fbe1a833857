"""What every test leans on: one seed, one thread, the folder of stored truths, and the command line."""

import os
from pathlib import Path

import pytest
import torch
from command_line import ESM2, FASTA, Plm, Result

import plm
from plm.cli import main
from plm.conversion import to_transformers
from plm.models.esm import ESM, Config, initialise

# The networks of these tests are tiny. On a busy machine a second thread makes them seventy times slower, not faster.
torch.set_num_threads(1)

# Without a GPU Triton's kernels are interpreted. Triton looks at this when a kernel is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers are the same in every run and in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def random_8m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ESM-2 8M as the hub publishes it, with random weights."""
    torch.manual_seed(0)
    config = Config(6, 320, 20, 1280, None, False, True, 1e-5, contact_head=True)
    net = ESM(config)
    initialise(net, torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("published") / "esm2-8m"
    to_transformers(net.state_dict(), config, folder)
    return folder


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
