"""What the tests of the command line share: inputs, tiny models, what a run printed, and what it left behind."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from plm.models.bert import BERT
from plm.models.bert import Config as BertConfig
from plm.models.progen2 import Config as ProGen2Config
from plm.models.progen2 import ProGen2
from plm.models.proteinbert import Config as ProteinBERTConfig
from plm.models.proteinbert import ProteinBERT
from plm.models.t5 import T5
from plm.models.t5 import Config as T5Config
from plm_weights import write_safetensors

GOLDEN = Path(__file__).parent / "golden" / "esm"
ESM2, ESM1B = str(GOLDEN / "esm2_tiny"), str(GOLDEN / "esm1b_tiny")  # rotary; learned positions, at most 1,022 residues
FOLDS = str(GOLDEN.parent / "esmfold" / "a_hub_layout")  # an ESMFold
PROTEINS = {"P1": "MKTAYIAKQRQISFVKSHFSRQ", "P2": "M", "P3": "MXBUZO" + "ACDEFGHIKLNPQRSTVWY" * 3}
KNOWN = PROTEINS | {"P3": PROTEINS["P3"].replace("MXBUZO", "MXU")}  # to ProteinBERT, which has no B, Z and O
SEQUENCE = PROTEINS["P1"]
FASTA = "".join(f">{id} a header\n{sequence}\n" for id, sequence in PROTEINS.items())


# The size of its vocabulary tells what a T5 is.
ANKH, ANKH3, PROTT5, PROSTT5 = 144, 256, 128, 150
HEAVY, LIGHT = "EVQLVESGGGLVQPGG", "DIQMTQSPS"


def save_tiny_t5(folder: Path, vocabulary: int, *, decoder_layers: int = 2) -> str:
    """A random T5 in this library's own form."""
    config = T5Config(vocabulary, 2, decoder_layers, 16, 2, 8, 32, "gated-silu", 64, 128, 1e-6, tied=False)
    return save(folder, T5(config), "t5", asdict(config))


def save_tiny_bert(folder: Path, *, positions: int = 64) -> str:
    """A random BERT in this library's own form."""
    config = BertConfig(30, 2, 16, 2, 32, positions, 2)
    return save(folder, BERT(config), "bert", asdict(config))


def save_tiny_progen2(folder: Path, *, positions: int = 80) -> str:
    """A random ProGen2 in this library's own form."""
    config = ProGen2Config(32, 32, 2, 16, 8, 2, 64, positions)
    return save(folder, ProGen2(config), "progen2", asdict(config))


def save_tiny_proteinbert(folder: Path, *, annotations: int = 40) -> str:
    """A random ProteinBERT in this library's own form."""
    config = ProteinBERTConfig(26, annotations, 2, 16, 32, 4, 8)
    return save(folder, ProteinBERT(config), "proteinbert", asdict(config))


def save(folder: Path, net: torch.nn.Module, family: str, config: dict[str, object]) -> str:
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.ones_like(tensor)
        if "norm" in name and name.endswith("weight")
        else torch.randn(tensor.shape, generator=random) / 4
        for name, tensor in net.state_dict().items()
    }
    settings = json.dumps({"format": "plm", "family": family, "config": config})
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", state, {"format": "pt"}, beside={"config.json": settings})
    return str(folder)


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
