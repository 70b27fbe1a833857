"""``.safetensors``: all sequences packed end to end, as inside the models.

``embeddings`` is [n, c] with the residues of sequence i in rows ``offsets[i]`` to ``offsets[i + 1]``; pooled it is
[b, c] and there are no offsets. ``lengths`` [b] counts residues. The file's metadata holds ``ids`` (a JSON list) and
``provenance`` (a JSON object). A part is read without the rest:

    with safe_open("out.safetensors", "pt") as file:
        start, stop = file.get_tensor("offsets")[2:4]
        third = file.get_slice("embeddings")[start:stop]
"""

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import safe_open

from plm.outputs.target import OutputError, Target
from plm.outputs.writer import Array, Contents, Embeddings, Writer

CODES = {"float16": "F16", "float32": "F32", "float64": "F64"}
HEADER_LIMIT = 100_000_000  # bytes; safetensors refuses more


class SafetensorsWriter(Writer):
    """The header is computed first, then each embedding is written at its place: memory stays constant."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        rows = [1] * len(contents.ids) if contents.pooled else contents.lengths
        self._offsets = np.cumsum([0, *rows], dtype="<i8")
        tables = {"lengths": np.asarray(contents.lengths, dtype="<i8")}
        if not contents.pooled:
            tables["offsets"] = self._offsets
        metadata = {"ids": json.dumps(contents.ids), "provenance": contents.provenance}
        header: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for name, table in tables.items():
            header[name] = {"dtype": "I64", "shape": table.shape, "data_offsets": (end, end := end + table.nbytes)}
        header["embeddings"] = {
            "dtype": CODES[contents.dtype],
            "shape": (contents.rows, contents.channels),
            "data_offsets": (end, end + contents.size),
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data begin aligned
        if len(text) > HEADER_LIMIT:
            raise OutputError(f"{len(contents.ids):,} ids are too many for a safetensors header; write .h5 or .parquet")
        self._front = len(text).to_bytes(8, "little") + text + b"".join(table.tobytes() for table in tables.values())

    def _begin(self) -> None:
        self._file = self.target.temporary.open("wb")
        self._file.write(self._front)

    def _put(self, index: int, array: Array) -> None:
        row_bytes = self.contents.channels * array.itemsize
        self._file.seek(len(self._front) + int(self._offsets[index]) * row_bytes)
        self._file.write(array.data)

    def _finish(self) -> None:
        self._file.close()

    def _abandon(self) -> None:
        with suppress(OSError):  # closing writes what is buffered, which fails again on a full disk
            self._file.close()


def read_safetensors(path: Path) -> Embeddings:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        rows = file.get_tensor("embeddings")
        offsets = file.get_tensor("offsets") if "offsets" in set(file.keys()) else None
    arrays = list(rows) if offsets is None else [rows[start:stop] for start, stop in pairwise(offsets)]
    return Embeddings(json.loads(metadata["ids"]), arrays, json.loads(metadata["provenance"]))
