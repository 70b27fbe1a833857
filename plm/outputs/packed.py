"""``.safetensors``: all sequences packed end to end, as inside the models.

``embeddings`` is [n, c] with the residues of sequence i in rows ``offsets[i]`` to ``offsets[i + 1]``; pooled it is
[b, c] and there are no offsets. ``lengths`` [b] counts residues. The file's metadata holds ``ids`` (a JSON list) and
``provenance`` (a JSON object). A part is read without the rest:

    with safe_open("out.safetensors", "pt") as file:
        start, stop = file.get_tensor("offsets")[2:4]
        third = file.get_slice("embeddings")[start:stop]
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import safe_open

from plm.outputs.by_offset import CODES, OffsetWriter
from plm.outputs.target import Target
from plm.outputs.writer import Contents, Embeddings


class SafetensorsWriter(OffsetWriter):
    """Small tables first, then the embeddings."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        tables = {"lengths": np.asarray(contents.lengths, dtype="<i8")}
        if not contents.pooled:
            tables["offsets"] = np.cumsum([0, *contents.lengths], dtype="<i8")
        tensors = [(name, "I64", table.shape) for name, table in tables.items()]
        tensors.append(("embeddings", CODES[contents.dtype], (contents.rows, contents.channels)))
        metadata = {"ids": json.dumps(contents.ids), "provenance": contents.provenance}
        self._lay_out(metadata, tensors, b"".join(table.tobytes() for table in tables.values()))


def read_safetensors(path: Path) -> Embeddings:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        rows = file.get_tensor("embeddings")
        offsets = file.get_tensor("offsets") if "offsets" in set(file.keys()) else None
    arrays = list(rows) if offsets is None else [rows[start:stop] for start, stop in pairwise(offsets)]
    return Embeddings(json.loads(metadata["ids"]), arrays, json.loads(metadata["provenance"]))
