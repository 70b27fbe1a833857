"""Real processes that are interrupted, terminated, or lose their reader: no output is left and no traceback shown."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ANKH, ESM2, save_tiny_t5

# A shell that runs tests in the background lets its children ignore SIGINT: undo that.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from plm.cli import main
sys.exit(main())
"""


def start(folder: Path, *argv: str, model: str = ESM2) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, *argv, "-m", model]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def long_input(folder: Path) -> str:
    """More than the signal waits for."""
    (folder / "in.fasta").write_text("".join(f">{i}\n{'ACDEFGHIKL' * 100}\n" for i in range(1000)))
    return "in.fasta"


def interrupt(process: subprocess.Popen[str], folder: Path, number: signal.Signals) -> tuple[str, str]:
    """Send the signal once the output has been begun; what was printed."""
    deadline = time.monotonic() + 120
    while not list(folder.glob(".plm-*.part")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_writes(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "embed", long_input(tmp_path), "-o", "out.npz")
    out, err = interrupt(process, tmp_path, number)
    assert (process.returncode, out, err) == (130, "", "Error: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_sequences_are_written(tmp_path: Path, number: signal.Signals) -> None:
    model = save_tiny_t5(tmp_path / "ankh_tiny", ANKH)
    process = start(tmp_path, "generate", long_input(tmp_path), "-o", "out.fasta", "-q", model=model)
    out, err = interrupt(process, tmp_path, number)
    assert (process.returncode, out, err) == (130, "", "Error: interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ankh_tiny", "in.fasta"]


def test_reader_has_gone(tmp_path: Path) -> None:
    """As in ``plm embed ... | head``."""
    process = start(tmp_path, "embed", "MKTAYIAKQR", "--pool", "mean", "--quiet")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (141, "")
