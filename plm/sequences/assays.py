"""CSV and TSV of variants, as ProteinGym and fair-esm publish assays: every cell is kept as it was written."""

import csv
import gzip
import io
import lzma
import math
import os
import zlib
from collections import Counter
from dataclasses import dataclass

from plm.sequences.records import Fault, InputError
from plm.sequences.sources import open_source

MUTANT_COLUMNS = ("mutant", "mutation", "variant", "mutated_sequence")
MISSING = ("", "na", "n/a", "nan", "none", "null")  # what a cell without a number says, in any case


@dataclass(frozen=True)
class Assay:
    """A table of variants. `lines` says where each row begins in the source, from 1."""

    source: str
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]
    mutant_column: str
    notes: list[str]

    @property
    def variants(self) -> list[str]:
        return self.column(self.mutant_column)

    def column(self, name: str) -> list[str]:
        """The cells of one column. Raises: InputError naming the columns that there are."""
        if name not in self.columns:
            raise InputError(self.source, [Fault(f"no column {name!r}", _there(self.columns), self.lines[0] - 1)])
        at = self.columns.index(name)
        return [row[at] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """A column as numbers, NaN where there is none. Raises: InputError with every cell that is no number."""
        values, faults = [], []
        for cell, line in zip(self.column(name), self.lines, strict=True):
            text = cell.strip()
            try:
                values.append(math.nan if text.casefold() in MISSING else float(text))
            except ValueError:
                faults.append(Fault(f"{cell!r} in column {name!r} is no number", "mend it, or leave it empty", line))
        if faults:
            raise InputError(self.source, faults)
        return values


def read_assay(source: str | os.PathLike[str], *, mutant_column: str | None = None) -> Assay:
    """Read a table of variants from a file (packed or not), or from stdin (``"-"``).

    Args:
        mutant_column: the column that holds the variants; by default the first of MUTANT_COLUMNS that is there.

    Raises:
        InputError: with all faults of the table and their lines; where a column is missing, with those that are there.
    """
    name = "stdin" if source == "-" else os.fspath(source)
    try:
        with open_source(source) as stream:
            raw = stream.read()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(name, [Fault(f"torn or damaged archive ({error})", "fetch or pack the file again")]) from error
    except OSError as error:
        raise InputError(name, [Fault(error.strerror or str(error), "give a readable file")]) from error
    notes = []
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
        notes.append("the table is not UTF-8 and was read as Latin-1")
    first, rest, skipped = *text.partition("\n")[::2], 0
    if first.startswith("# {"):
        text, skipped = rest, 1
        notes.append("the first line, which says where the table came from, left out")
    return _read(name, text, skipped, mutant_column, notes)


def _read(name: str, text: str, skipped: int, wanted: str | None, notes: list[str]) -> Assay:
    head = text.partition("\n")[0]
    table = csv.reader(io.StringIO(text, newline=""), delimiter=max(",\t;", key=head.count), strict=True)
    columns: list[str] = []
    rows, lines, faults, mutant_column, end = [], [], [], "", skipped
    try:
        for row in table:
            line, end = end + 1, skipped + table.line_num
            if not row:
                continue
            if not columns:
                columns, mutant_column = row, _mutant_column(name, row, wanted, line)
                continue
            if len(row) > len(columns):
                hint = "put cells that hold the delimiter in quotes"
                faults.append(Fault(f"{len(row)} cells, and there are {len(columns)} columns", hint, line))
            rows.append(row + [""] * (len(columns) - len(row)))
            lines.append(line)
    except csv.Error as error:
        faults.append(Fault(f"not a table ({error})", "check the quotes in it", skipped + table.line_num))
    if not rows and not faults:
        faults.append(Fault("no variant in it", "give a table with a first line of names and a row for each variant"))
    if faults:
        raise InputError(name, faults)
    if mutant_column not in ("mutant", wanted):
        notes.append(f"variants read from column {mutant_column!r}")
    return Assay(name, columns, rows, lines, mutant_column, notes)


def _mutant_column(name: str, columns: list[str], wanted: str | None, line: int) -> str:
    """The column of the variants. Raises: InputError if it is not there, or if two columns have one name."""
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        reason = f"more than one column is called {', '.join(map(repr, twice))}"
        raise InputError(name, [Fault(reason, "give each a name of its own", line)])
    found = next((column for column in ([wanted] if wanted else MUTANT_COLUMNS) if column in columns), None)
    if found is None:
        reason = f"no column {wanted!r}" if wanted else "no column of variants, such as 'mutant'"
        raise InputError(name, [Fault(reason, f"choose one with --mutant-column; {_there(columns)}", line)])
    return found


def _there(columns: list[str]) -> str:
    return f"there are: {', '.join(map(repr, columns))}"
