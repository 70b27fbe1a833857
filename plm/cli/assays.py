"""What ``plm variants`` works on: variants in a table or all of a scan, with the wild type of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import click

from plm import mutations
from plm.sequences import Fault, InputError, Reading, Record, read_records
from plm.sequences.assays import Assay, read_assay

T = TypeVar("T")
SCAN_COLUMNS = ["mutant", "position", "wild_type", "residue"]


@dataclass(frozen=True)
class Table:
    """Variants as they were given, the wild type of each, the number of its first residue, and changes to the input."""

    assay: Assay
    wild_types: list[str]
    offset: int
    changes: list[str]

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """The rows of each wild type."""
        found: dict[str, list[int]] = {}
        for i, wild_type in enumerate(self.wild_types):
            found.setdefault(wild_type, []).append(i)
        return found

    @property
    def reading(self) -> Reading:
        """A record for each variant: its name and line, and the residues of its wild type."""
        each = zip(self.assay.variants, self.wild_types, self.assay.lines, strict=True)
        records = [Record(name, wild, name, line, i) for i, (name, wild, line) in enumerate(each, 1)]
        return Reading(self.assay.source, records, self.changes, [])

    def each(self, work: Callable[[str, list[str]], T]) -> list[T]:
        """What ``work`` makes of every wild type and its variants.

        Raises: InputError with all faults that it finds in them, and their lines.
        """
        found, faults = [], []
        for wild_type, rows in self.groups.items():
            try:
                found.append(work(wild_type, [self.assay.variants[i] for i in rows]))
            except InputError as error:
                for fault in error.faults:
                    i = rows[fault.record - 1]
                    faults.append(replace(fault, line=self.assay.lines[i], record=i + 1))
        if faults:
            raise InputError(self.assay.source, sorted(faults, key=lambda fault: fault.record))
        return found

    def check(self) -> None:
        """Raises: InputError with every variant that cannot be read or does not match its wild type."""
        self.each(lambda wild_type, names: mutations.mutated(wild_type, names, self.offset))

    def check_free(self, columns: Iterable[str]) -> None:
        """Raises: InputError if the table has columns of these names."""
        if taken := [name for name in columns if name in self.assay.columns]:
            hint = "rename what is there, or leave it out: every score gets a column of its model's name"
            raise InputError(self.assay.source, [Fault(f"a column {taken[0]!r} is there already", hint)])

    def substitutions(self) -> list[tuple[int, str] | None]:
        """Place (from 0, chains run on) and new residue of each variant that is a single substitution."""
        found: dict[int, tuple[int, str]] = {}
        for wild_type, rows in self.groups.items():
            names = [self.assay.variants[i] for i in rows]
            for i, text in zip(rows, mutations.mutated(wild_type, names, self.offset), strict=True):
                wild, text = wild_type.replace("|", ""), text.replace("|", "")
                if len(text) == len(wild):
                    changed = [(at, new) for at, (old, new) in enumerate(zip(wild, text, strict=True)) if old != new]
                    if len(changed) == 1:
                        found[i] = changed[0]
        return [found.get(i) for i in range(len(self.wild_types))]


def read_table(
    source: str, sequence: str | None, sequence_column: str | None, mutant_column: str | None, offset: int
) -> Table:
    """A table of variants, and their wild types from elsewhere or from one of its columns. Raises: InputError."""
    assay = read_assay(source, mutant_column=mutant_column)
    if sequence is not None:
        wild_type, _, changes = read_wild_type(sequence)
        return Table(assay, [wild_type] * len(assay.rows), offset, [*assay.notes, *changes])
    wild_types = ["".join(cell.split()) for cell in assay.column(str(sequence_column))]
    if empty := [line for line, text in zip(assay.lines, wild_types, strict=True) if not text]:
        reason, hint = f"no wild type in column {sequence_column!r}", "fill it in, or leave the row out"
        raise InputError(assay.source, [Fault(reason, hint, line) for line in empty])
    return Table(assay, wild_types, offset, assay.notes)


def read_scan(source: str, offset: int) -> Table:
    """All single substitutions of the one protein in the input. Raises: InputError, click.UsageError."""
    wild_type, line, changes = read_wild_type(source)
    names = mutations.single_substitutions(wild_type, offset)
    rows = [[name, name[1:-1], name[0], name[-1]] for name in names]
    assay = Assay(source, SCAN_COLUMNS, rows, [line] * len(rows), "mutant", [])
    return Table(assay, [wild_type] * len(rows), offset, changes)


def read_wild_type(source: str) -> tuple[str, int, list[str]]:
    """The one sequence of a file or a literal, its line, and what was changed in it."""
    reading = read_records(source)
    if len(reading.records) != 1:
        raise click.UsageError(f"{source} has {len(reading.records):,} sequences; a wild type is one.")
    return reading.records[0].sequence, reading.records[0].line, reading.changes
