"""A user's table of what the outputs of a model stand for: Gene Ontology terms by the index of the output.

The table of the published ProteinBERT is not public, so none comes with the library. What is known of it: 8,943 terms
with at least 100 proteins each, in ascending order of their GO ids (by what is printed in its authors' notebook).
"""

import csv
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from plm.sequences import Fault, InputError
from plm.sequences.sources import open_source

GO = re.compile(r"GO:\d{7}")
INDEX_COLUMNS = ("index",)
TERM_COLUMNS = ("term", "go_id", "go", "go_term", "id")
NAME_COLUMNS = ("name",)
SHAPE = "a GO id is GO: and seven digits; a first line may name the columns index, term and name"
NUMBERS = "outputs are numbered from 0"


class Term(NamedTuple):
    """A GO id, and its name if the table has one; `line` is where it stands."""

    id: str
    name: str
    line: int


@dataclass(frozen=True)
class Terms:
    """A table that has been read: the term of every index, whether the table numbers them, and the file's hash."""

    source: str
    sha256: str
    terms: Mapping[int, Term]
    numbered: bool

    def get(self, index: int) -> Term | None:
        """The term of an output; None if a partial table has none."""
        return self.terms.get(index)

    def check(self, count: int, *, partial: bool = False) -> None:
        """Prove that the table is of a model with ``count`` outputs.

        Args:
            partial: whether outputs may have no term. Only a table that numbers its terms can be partial.

        Raises: InputError with every index that the model does not have, and how many outputs have no term.
        """
        beyond = [(index, term) for index, term in self.terms.items() if index >= count]
        if beyond and self.numbered:
            told = f"the model has {count:,} outputs, from 0 to {count - 1:,}"
            raise InputError(self.source, [Fault(f"index {i:,}; {told}", NUMBERS, term.line) for i, term in beyond])
        if len(self.terms) != count and not (self.numbered and partial):
            reason = f"{len(self.terms):,} terms, and the model has {count:,} outputs"
            hint = "give a line for each output, in their order, or number those that you know: index, then GO id"
            if self.numbered:
                missing = next(index for index in range(count) if index not in self.terms)
                reason += f"; the first without one is {missing:,}"
                hint = "complete the table, or say that it is meant with partial=True (--partial-terms)"
            raise InputError(self.source, [Fault(reason, hint)])


def read_terms(path: str | os.PathLike[str], count: int | None = None, *, partial: bool = False) -> Terms:
    """Read a table of GO terms: CSV or TSV (or packed), one of

    - a first line that names its columns: ``index``, ``term`` (or ``go_id``, ``go``, ``go_term``, ``id``), ``name``;
    - lines without one: index, GO id and perhaps a name;
    - a GO id in every line, and perhaps a name, in the order of the outputs.

    Args:
        count: outputs of the model (``model.net.config.annotations``), which the table is proven to fit. None leaves
            that to ``Terms.check``.
        partial: as ``Terms.check``.

    Raises: InputError with every line that has no term, an index or a term that came before, or does not fit.
    """
    name = os.fspath(path)
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        with open_source(Path(path)) as stream:
            text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(name, [Fault(f"no text in UTF-8 ({error.reason})", "save it as UTF-8")]) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(name, [Fault(f"torn or damaged archive ({error})", "fetch or pack the file again")]) from error
    except OSError as error:
        raise InputError(name, [Fault(error.strerror or str(error), "give a readable file")]) from error
    rows = _rows(name, text)
    columns = _columns(name, rows)
    terms = _terms(name, rows, columns)
    found = Terms(name, digest, terms, columns.index is not None)
    if count is not None:
        found.check(count, partial=partial)
    return found


@dataclass(frozen=True)
class Columns:
    """Where index, term and name stand; how many columns there are; and whether the first line names them."""

    index: int | None
    term: int
    name: int | None
    width: int
    named: bool


def _rows(source: str, text: str) -> list[tuple[int, list[str]]]:
    """The lines that are not empty, and their cells. Raises: InputError."""
    head = text.partition("\n")[0]
    delimiter = "\t" if "\t" in head else max(",;", key=head.count)  # names of terms have commas in them
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, end = [], 0
    try:
        for row in table:
            line, end = end + 1, table.line_num
            if any(cells := [cell.strip() for cell in row]):
                rows.append((line, cells))
    except csv.Error as error:
        raise InputError(source, [Fault(f"not a table ({error})", "check the quotes in it", table.line_num)]) from None
    if not rows:
        raise InputError(source, [Fault("no term in it", SHAPE)])
    return rows


def _columns(source: str, rows: list[tuple[int, list[str]]]) -> Columns:
    """By the names in the first line, or by what stands there. Raises: InputError."""
    line, cells = rows[0]
    names = [cell.casefold() for cell in cells]
    known = (INDEX_COLUMNS, TERM_COLUMNS, NAME_COLUMNS)
    index, term, name = (next((names.index(one) for one in choices if one in names), None) for choices in known)
    if term is not None:
        return Columns(index, term, name, len(cells), named=True)
    if index is not None or name is not None:
        raise InputError(source, [Fault("no column of GO ids, such as 'term'", SHAPE, line)])
    if len(cells) > 1 and not GO.fullmatch(cells[0]):
        return Columns(0, 1, 2, 3, named=False)
    return Columns(None, 0, 1, 2, named=False)


def _terms(source: str, rows: list[tuple[int, list[str]]], columns: Columns) -> dict[int, Term]:
    """The term of every index. Raises: InputError with every line that is at fault."""
    terms: dict[int, Term] = {}
    lines: dict[str, int] = {}
    faults = []
    for place, (line, cells) in enumerate(rows[columns.named :]):
        if len(cells) > columns.width:
            hint = "put cells that hold the delimiter in quotes"
            faults.append(Fault(f"{len(cells)} cells, and there are {columns.width} columns", hint, line))
        cells += [""] * (columns.width - len(cells))
        term = Term(cells[columns.term], "" if columns.name is None else cells[columns.name], line)
        written = str(place) if columns.index is None else cells[columns.index]
        if not GO.fullmatch(term.id):
            faults.append(Fault(f"{term.id!r} is no GO id", SHAPE, line))
        elif term.id in lines:
            faults.append(Fault(f"{term.id} is also in line {lines[term.id]}", "give each term once", line))
        lines.setdefault(term.id, line)
        if not re.fullmatch("[0-9]{1,9}", written):
            faults.append(Fault(f"{written!r} is no index", NUMBERS, line))
        elif (index := int(written)) in terms:
            faults.append(Fault(f"index {index} is also in line {terms[index].line}", "give each index once", line))
        else:
            terms[index] = term
    if faults:
        raise InputError(source, faults)
    if not terms:
        raise InputError(source, [Fault("no term in it", SHAPE)])
    return terms
