"""Four sequences with awkward ids, and embeddings of them to write into every layout."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plm.outputs import FORMATS, Writer, open_writer

IDS = ["sp|P1|CET1", "a/../b c", "a/../b c", "é"]
LENGTHS = [3, 1, 63, 5]
CHANNELS = 7
PROVENANCE = {
    "model": "esm2-8m",
    "pooling": "mean",
    "sha256": {"model.safetensors": "00ff"},
    "command": ["π", "\udce9"],
}
PATHS = {name: f"out.{name}" for name in FORMATS} | {"esm-pt": "out/", "bio-h5": "bio.h5"}
TEXT = ("csv", "tsv", "jsonl")
BINARY = tuple(name for name in FORMATS if name not in TEXT)
CASES = [(name, pooled) for name in FORMATS for pooled in (True, False) if pooled or name in BINARY]


def embeddings(pooled: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(CHANNELS,) if pooled else (length, CHANNELS) for length in LENGTHS]
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_(path: Path | str, **changes: Any) -> Writer:
    about: dict[str, Any] = {"ids": IDS, "lengths": LENGTHS, "channels": CHANNELS, "provenance": PROVENANCE}
    return open_writer(path, **(about | {"pooled": True, "layer": 6} | changes))


def write(path: Path | str, tensors: list[Tensor], order: tuple[int, ...] = (2, 0, 3, 1), **changes: Any) -> None:
    with open_(path, **changes) as writer:
        for index in order:
            writer.write(index, tensors[index])
