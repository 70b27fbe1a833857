"""``.csv``, ``.tsv`` and ``.jsonl``: pooled embeddings as text, also to stdout.

The first line carries the provenance: ``# {...}`` in a table, ``{"provenance": {...}}`` in JSON lines. It is a part of
the file, not a file beside it, so that the two cannot be separated and the output still appears in one step.

    pandas.read_csv("out.csv", skiprows=1)              # id, length, e0, e1, ...
    jq -c 'select(.id) | .embedding' out.jsonl

Rows are in input order, and numbers are the shortest decimals that read back as the same number. Text does not say its
dtype: `read_embeddings` gives float32.
"""

import csv
import json
from pathlib import Path
from typing import ClassVar

import numpy as np

from plm.outputs.target import Target
from plm.outputs.writer import Array, Contents, Embeddings, Writer


class TextWriter(Writer):
    """Keeps the pooled matrix [b, c] in memory until the end."""

    per_residue = False

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        dtype = np.promote_types(contents.dtype, np.float32)  # readers of text know no float16
        self._matrix = np.empty((len(contents.ids), contents.channels), dtype)

    def _begin(self) -> None:
        self.target.temporary.touch()

    def _put(self, index: int, array: Array) -> None:
        self._matrix[index] = array

    def _abandon(self) -> None:
        """Nothing is open."""


class CsvWriter(TextWriter):
    delimiter: ClassVar[str] = ","

    def _finish(self) -> None:
        contents = self.contents
        with self.target.temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(f"# {contents.provenance}\n")
            table = csv.writer(file, delimiter=self.delimiter, lineterminator="\n")
            table.writerow(["id", "length", *(f"e{channel}" for channel in range(contents.channels))])
            for id, length, row in zip(contents.ids, contents.lengths, self._matrix, strict=True):
                table.writerow([id, length, *row.astype(str)])


class TsvWriter(CsvWriter):
    delimiter = "\t"


class JsonlWriter(TextWriter):
    def _finish(self) -> None:
        contents = self.contents
        with self.target.temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(f'{{"provenance": {contents.provenance}}}\n')
            for id, length, row in zip(contents.ids, contents.lengths, self._matrix, strict=True):
                numbers = ", ".join(row.astype(str))
                file.write(f'{{"id": {json.dumps(id)}, "length": {length}, "embedding": [{numbers}]}}\n')


def read_csv(path: Path, delimiter: str = ",") -> Embeddings:
    with path.open(encoding="utf-8", newline="") as file:
        provenance = json.loads(file.readline().removeprefix("#"))
        rows = list(csv.reader(file, delimiter=delimiter))[1:]
    arrays: list[Array] = [np.array(row[2:], dtype=np.float32) for row in rows]
    return Embeddings([row[0] for row in rows], arrays, provenance)


def read_tsv(path: Path) -> Embeddings:
    return read_csv(path, "\t")


def read_jsonl(path: Path) -> Embeddings:
    with path.open(encoding="utf-8") as file:
        first, *rows = map(json.loads, file)
    arrays: list[Array] = [np.array(row["embedding"], dtype=np.float32) for row in rows]
    return Embeddings([row["id"] for row in rows], arrays, first["provenance"])
