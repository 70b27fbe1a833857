"""CSV and TSV: which columns hold the sequences, or the two chains of antibodies."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from plm.sequences.collector import Collector
from plm.sequences.records import Fault, InputError

SEQUENCE_COLUMNS = ("sequence", "seq", "protein_sequence", "aa_sequence")
CHAIN_COLUMNS = (
    ("sequence_alignment_aa_heavy", "sequence_alignment_aa_light"),  # OAS, where sequence_heavy is DNA
    ("heavy", "light"),
    ("heavy_chain", "light_chain"),
    ("vh", "vl"),
    ("heavy_sequence", "light_sequence"),  # Thera-SAbDab
    ("sequence_heavy", "sequence_light"),
)
ID_COLUMNS = (
    *("id", "name", "accession", "entry", "identifier", "protein_id", "sequence_id"),
    *("therapeutic", "sequence_id_heavy"),  # Thera-SAbDab, OAS
)
NO_CHAIN = ("na", "n/a", "nan", "none", "null", "-")  # what a cell without a chain says, in any case


class Columns(NamedTuple):
    """The columns that were asked for."""

    sequence: str | None
    heavy: str | None
    light: str | None
    id: str | None


def is_head(line: bytes) -> bool:
    """Whether this looks like the first line of a table of sequences or pairs."""
    columns = [cell.strip(' "') for cell in re.split("[,;\t]", line.decode("latin-1"))]
    return bool(_find(columns, zip(SEQUENCE_COLUMNS)) or _find(columns, CHAIN_COLUMNS))


def read_table(collector: Collector, lines: Iterator[tuple[int, bytes]], name: str, asked: Columns) -> None:
    """Read a table, whose first line names the columns."""
    start, head = next(lines)
    first = collector.text(head)
    texts = itertools.chain([first], (collector.text(line) for _, line in lines))
    rows = csv.reader(texts, delimiter=max(",\t;", key=first.count))
    try:
        columns = next(rows)
        if faults := _column_faults(columns, asked, start):
            raise InputError(name, faults)
        sequence_at = _sequence_columns(collector, columns, asked)
        id_at = _find(columns, zip([asked.id] if asked.id else ID_COLUMNS))
        for row in filter(None, rows):
            row += [""] * (len(columns) - len(row))
            cells = [row[at] for at in sequence_at]
            if len(cells) == 2:
                cells = ["" if cell.strip().casefold() in NO_CHAIN else cell for cell in cells]
            line = start + rows.line_num - 1
            collector.add(row[id_at[0]] if id_at else "", ["|".join(cells).encode()], line, line)
    except csv.Error as error:
        collector.faults.append(Fault(f"not a table ({error})", "check the quotes in it", start + rows.line_num - 1))


def _column_faults(columns: list[str], asked: Columns, line: int) -> list[Fault]:
    """What is wrong with the columns that were asked for, or that nothing was asked for and nothing is recognised."""
    if (asked.heavy is None) != (asked.light is None) or (asked.sequence and asked.heavy):
        hint = "give --heavy-column and --light-column, or --column alone"
        return [Fault("two columns hold pairs, one column holds sequences", hint)]
    there = f"there are: {', '.join(columns)}"
    options = zip(("--column", "--heavy-column", "--light-column", "--id-column"), asked, strict=True)
    faults = [
        Fault(f"no column for {option} {column}", f"choose one with {option}; {there}", line)
        for option, column in options
        if column and not _find(columns, [(column,)])
    ]
    recognised = asked.sequence or asked.heavy or _find(columns, [*zip(SEQUENCE_COLUMNS), *CHAIN_COLUMNS])
    if not recognised:
        hint = f"choose one with --column, or two with --heavy-column and --light-column; {there}"
        faults.append(Fault("no column of sequences", hint, line))
    return faults


def _sequence_columns(collector: Collector, columns: list[str], asked: Columns) -> list[int]:
    """Where the sequence is, or heavy and light chain."""
    if asked.heavy and asked.light:
        return _find(columns, [(asked.heavy, asked.light)])
    if asked.sequence:
        return _find(columns, [(asked.sequence,)])
    sequence, pair = _find(columns, zip(SEQUENCE_COLUMNS)), _find(columns, CHAIN_COLUMNS)
    if pair:
        heavy, light = (columns[at] for at in pair)
        collector.notes.append(
            f"column {columns[sequence[0]]!r} read; --heavy-column {heavy!r} --light-column {light!r} reads pairs"
            if sequence
            else f"heavy chains read from column {heavy!r}, light chains from column {light!r}"
        )
    return sequence or pair


def _find(columns: list[str], choices: Iterable[Sequence[str]]) -> list[int]:
    """Where the names of the first choice are that are all there, or []. Case does not matter, nor space or _."""
    there = [_plain(name) for name in columns]
    plain = ([_plain(name) for name in choice] for choice in choices)
    return next(([there.index(name) for name in names] for names in plain if set(names) <= set(there)), [])


def _plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")
