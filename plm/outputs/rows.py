"""Results that are rows: ``.csv``, ``.tsv``, ``.jsonl``, and ``.fasta`` for sequences that were written.

The first line of a table and of JSON lines carries the provenance, as in `plm.outputs.text`; FASTA has no place for it.

    pandas.read_csv("scores.csv", skiprows=1)
    jq -c 'select(.id)' scores.jsonl

Rows are in input order, and numbers are the shortest decimals that read back as the same number.
"""

import csv
import io
import json
import math
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from plm.outputs.output import Output
from plm.outputs.target import FileTarget, LayoutError, StandardOutput, Target

Row = Mapping[str, object]


class RowsWriter(Output):
    """An output of rows, any number for each sequence. Their text is kept in memory until the end."""

    def __init__(self, target: Target, ids: Sequence[str], columns: Sequence[str], provenance: str) -> None:
        super().__init__(target, ids)
        self.columns, self.provenance = columns, provenance
        self._texts = [""] * len(ids)

    def write(self, index: int, rows: Sequence[Row]) -> None:
        """Write the rows of sequence `index` (its place in `ids`). Each has a value for every column, the first an id.

        Raises:
            ValueError: a wrong index, or a second writing.
            FloatingPointError: a value is NaN or infinite.
        """
        self._check_free(index)
        for row in rows:
            for column, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise FloatingPointError(f"{row['id']}: {column} is {value}; check the weights with `plm verify`")
        self._texts[index] = "".join(map(self._text, rows))
        self._written[index] = True

    def _begin(self) -> None:
        self.target.temporary.touch()

    def _finish(self) -> None:
        with self.target.temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(self._head())
            file.writelines(self._texts)

    def _abandon(self) -> None:
        """Nothing is open."""

    @abstractmethod
    def _head(self) -> str:
        """What comes before all rows."""

    @abstractmethod
    def _text(self, row: Row) -> str:
        """One row, end of line included."""


class CsvRows(RowsWriter):
    delimiter: ClassVar[str] = ","

    def _head(self) -> str:
        return f"# {self.provenance}\n" + self._line(self.columns)

    def _text(self, row: Row) -> str:
        cells = (row[column] for column in self.columns)
        return self._line([";".join(cell) if isinstance(cell, tuple) else cell for cell in cells])

    def _line(self, cells: Sequence[object]) -> str:
        text = io.StringIO()
        csv.writer(text, delimiter=self.delimiter, lineterminator="\n").writerow(cells)
        return text.getvalue()


class TsvRows(CsvRows):
    delimiter = "\t"


class JsonlRows(RowsWriter):
    def _head(self) -> str:
        return f'{{"provenance": {self.provenance}}}\n'

    def _text(self, row: Row) -> str:
        return json.dumps({column: row[column] for column in self.columns}) + "\n"


class FastaRows(RowsWriter):
    def _head(self) -> str:
        return ""

    def _text(self, row: Row) -> str:
        mean = "none" if row["ll_mean"] is None else f"{row['ll_mean']:.3f}"
        return f">{row['id']} ll_mean={mean} stopped_by={row['stopped_by']}\n{row['sequence']}\n"


@dataclass(frozen=True)
class Layout:
    """One row per format."""

    suffixes: tuple[str, ...]
    writer: type[RowsWriter]


LAYOUTS = {
    "fasta": Layout((".fasta", ".fa", ".faa"), FastaRows),
    "csv": Layout((".csv",), CsvRows),
    "tsv": Layout((".tsv",), TsvRows),
    "jsonl": Layout((".jsonl",), JsonlRows),
}


def layout_of(path: str | os.PathLike[str], choices: Sequence[str]) -> str:
    """The layout that a path means by its suffix; stdout (``"-"``) means the first choice.

    Raises: LayoutError if it is none of ``choices``.
    """
    if path == "-":
        return choices[0]
    suffix = Path(path).suffix.lower()
    for name in choices:
        if suffix in LAYOUTS[name].suffixes:
            return name
    known = ", ".join(suffix for name in choices for suffix in LAYOUTS[name].suffixes)
    raise LayoutError(f"{path}: the suffix {suffix!r} names no layout of these rows; use {known}, or --format")


def open_rows(
    path: str | os.PathLike[str],
    layout: str,
    *,
    ids: Sequence[str],
    columns: Sequence[str],
    provenance: Mapping[str, object],
    overwrite: bool = False,
) -> RowsWriter:
    """An output of rows with these columns, as `plm.outputs.open_writer` is one of embeddings.

    Args:
        layout: one of LAYOUTS.
        ids: what each sequence of the input is called.

    Raises: OutputError, before any work.
    """
    target = StandardOutput() if path == "-" else FileTarget(path, overwrite=overwrite, size=0)
    return LAYOUTS[layout].writer(target, ids, columns, json.dumps(dict(provenance)))
