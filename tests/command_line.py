"""What the tests of the command line share: inputs, what a run printed, and what it left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

GOLDEN = Path(__file__).parent / "golden" / "esm"
ESM2, ESM1B = str(GOLDEN / "esm2_tiny"), str(GOLDEN / "esm1b_tiny")  # rotary; learned positions, at most 1,022 residues
PROTEINS = {"P1": "MKTAYIAKQRQISFVKSHFSRQ", "P2": "M", "P3": "MXBUZO" + "ACDEFGHIKLNPQRSTVWY" * 3}
SEQUENCE = PROTEINS["P1"]
FASTA = "".join(f">{id} a header\n{sequence}\n" for id, sequence in PROTEINS.items())


class Result(NamedTuple):
    code: int
    out: str
    err: str


Plm = Callable[..., Result]


def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("too late: the model is being loaded")

    monkeypatch.setattr("plm.loading.load", load)


def outputs(folder: Path, *inputs: str) -> list[str]:
    """What lies in the folder beside the inputs, hidden files included."""
    return sorted(path.name for path in folder.iterdir() if path.name not in inputs)
