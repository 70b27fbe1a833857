"""esm-cpp 0.2.1 (Ayan Goel, Apache-2.0): ESM-2 in C++ for CPUs, in float32 and in 8 bits. And plm doing what it does.

It packs sequences without pads as we do, and gives logits of all tokens, so plm has to give them as well. Its 8 bits
are its own recipe: activations of a few proteins are observed, SmoothQuant moves their outliers into the weights, and
both weights and activations are rounded. The number of its threads is fixed when its process begins.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import scratch
from inputs import proteins
from measuring import Contestant, Missing
from torch import Tensor

import plm
from peers.process import Peer
from plm import running
from plm.loading import Model
from plm.packing import in_order

PYTHON = Path(__file__).parents[2] / ".venv" / "esm-cpp" / "bin" / "python"
CALIBRATION = 4  # proteins whose activations are observed


class EsmCpp:
    """Strings in; logits are left in its process, unless there are few enough of them to be compared."""

    FEW = 1000  # tokens

    def __init__(self, folder: Path, int8: bool, threads: int) -> None:
        python = Path(os.environ.get("PLM_BENCH_ESM_CPP", PYTHON))
        if not python.exists():
            raise Missing("it has no environment; `make .venv/esm-cpp` makes it")
        script = Path(__file__).with_name("esm_cpp_process.py")
        self.peer = Peer(python, script, {"ESM_NUM_THREADS": str(threads)})
        self.process = self.peer.process
        calibration = proteins("antibodies", CALIBRATION) if int8 else []
        self.about = self.peer.ask(
            do="load", weights=str(folder / "model.safetensors"), int8=int8, calibration=calibration
        )

    def __call__(self, sequences: Sequence[str]) -> list[Tensor]:
        few = sum(map(len, sequences)) < self.FEW
        file = scratch() / f"logits-{self.process.pid}.npz"
        self.peer.ask(do="logits", sequences=list(sequences), save=str(file) if few else None)
        if not few:
            return []
        with np.load(file) as found:
            return [torch.from_numpy(found[name]) for name in found.files]

    def close(self) -> None:
        self.peer.close()


def own_logits(model: Model, sequences: Sequence[str]) -> list[Tensor]:
    """Logits ``[t, v]`` of every token, start and end included."""
    rows = running.encode(model, list(sequences))
    found = running.run(model, rows, lambda batch, _: batch.split(model.net(batch).logits))
    return in_order(found, len(rows))


def contestants(folder: Path, own: Sequence[str], threads: int) -> dict[str, Contestant]:
    """esm-cpp in float32 and in 8 bits, and plm in the dtypes ``own``."""

    def plm_run(dtype: str) -> Any:
        model = plm.load(folder, dtype=dtype, device="cpu")
        return lambda sequences: own_logits(model, sequences)

    return {
        "esm-cpp float32": Contestant(lambda: EsmCpp(folder, False, threads), "float32"),
        "esm-cpp int8": Contestant(lambda: EsmCpp(folder, True, threads), "int8"),
        **{f"plm {dtype}": Contestant(lambda dtype=dtype: plm_run(dtype), dtype) for dtype in own},
    }


def exact(folder: Path) -> Any:
    """Logits in float64."""
    return lambda sequences: own_logits(plm.load(folder, dtype="float64", device="cpu"), sequences)
