"""``esm-pt``: a folder with one ``{label}.pt`` per sequence, as fair-esm's `esm-extract` writes.

    result = torch.load("out/P12345.pt", weights_only=True)
    result["representations"][33]                       # [length, c]

Pooled embeddings are under ``mean_representations`` or ``bos_representations``. ``label`` is the id; the file's name is
the id made safe, so that no header leaves the folder. Two keys are added to fair-esm's: ``index`` (place in the input)
and ``provenance`` (JSON), which also lies in the folder as ``provenance.json``.
"""

import io
import json
from pathlib import Path

import torch

from plm.outputs.target import MARKER, LayoutError, Target
from plm.outputs.writer import Array, Contents, Embeddings, Writer, safe_names

NAME_LIMIT = 200  # bytes; file systems take 255, and ".pt" and the suffix of a repeat come after
POOLED = {"mean": "mean_representations", "cls": "bos_representations"}


class EsmPtWriter(Writer):
    """Streams: one file per sequence."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        if contents.layer is None:
            raise LayoutError("esm-pt names a layer by its number, and this is of none; use .h5 or .safetensors")
        if contents.layer < 0:
            raise LayoutError(f"esm-pt counts layers from 0 (embeddings) up; got layer {contents.layer}")
        self._key = "representations"
        if contents.pooled:
            pooling = json.loads(contents.provenance).get("pooling", "mean")
            if pooling not in POOLED:
                raise LayoutError(f"esm-pt has no place for pooling {pooling!r}; use {' or '.join(POOLED)}, or .h5")
            self._key = POOLED[pooling]
        self._names = safe_names(contents.ids, NAME_LIMIT)

    def _begin(self) -> None:
        self.target.temporary.mkdir()

    def _put(self, index: int, array: Array) -> None:
        result = {
            "label": self.contents.ids[index],
            self._key: {self.contents.layer: torch.from_numpy(array.copy())},  # a view would save all of its batch
            "index": index,
            "provenance": self.contents.provenance,
        }
        data = io.BytesIO()  # torch turns a full disk into an error of its own; bytes are written by Python
        torch.save(result, data)
        (self.target.temporary / f"{self._names[index]}.pt").write_bytes(data.getbuffer())

    def _finish(self) -> None:
        (self.target.temporary / MARKER).write_text(self.contents.provenance)

    def _abandon(self) -> None:
        """Nothing is open."""


def read_esm_pt(path: Path) -> Embeddings:
    files = [torch.load(file, weights_only=True) for file in path.glob("*.pt")]
    files.sort(key=lambda file: int(file["index"]))
    keys = ("representations", *POOLED.values())
    arrays = [next(iter(file[key].values())).numpy() for file in files for key in keys if key in file]
    return Embeddings([file["label"] for file in files], arrays, json.loads((path / MARKER).read_text()))
