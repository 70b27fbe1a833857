"""Sequences in: FASTA, CSV/TSV, one sequence per line, stdin, or a literal sequence.

Bytes are read as a stream of lines and checked one record at a time with byte tables; single characters are looked at
only when something is wrong. Nothing is changed silently: `Reading.changes` says what was changed and how often. All
faults of a source are collected into one `InputError`, so that a file is repaired once.

An antibody is one sequence too, its heavy and light chain joined by ``|``. A table may hold them in two columns.
So is a complex, its chains joined by ``:``.
"""

import gzip
import lzma
import os
import re
import zlib

from plm.sequences.collector import Collector
from plm.sequences.letters import PROMPT_SIGNS
from plm.sequences.records import Case, Duplicates, Empty, Fault, InputError, Naming, OnStop, Reading, Record
from plm.sequences.sources import open_source, read_source
from plm.sequences.tables import Columns

__all__ = [
    "Case",
    "Duplicates",
    "Empty",
    "Fault",
    "InputError",
    "Naming",
    "OnStop",
    "Reading",
    "Record",
    "read_records",
]


def read_records(
    source: str | os.PathLike[str],
    *,
    column: str | None = None,
    heavy_column: str | None = None,
    light_column: str | None = None,
    id_column: str | None = None,
    case: Case = "upper",
    prompts: bool = False,
    complexes: bool = False,
    on_stop: OnStop = "error",
    strip_gaps: bool = False,
    duplicates: Duplicates = "suffix",
    empty: Empty = "error",
    id: Naming = "first-word",
) -> Reading:
    """Read every sequence of a file, of stdin (``"-"``), or of a literal sequence in capitals.

    The kind of file is told by its content first (compression, then ``>``), then by its suffix. A string that is not an
    existing file and could be a path is refused, never taken for residues.

    Spaces inside a sequence are removed, and counted. Only in text of one sequence per line they may stand between
    single letters alone (``M K T``, as ProtBert takes it) or around ``|``: there, words are more likely a name, or
    prose.

    A source holds single chains or pairs ``HEAVY|LIGHT``, never both. Neither chain of a pair may be missing. Where
    there may be ``complexes``, it holds any of these.

    Args:
        column, id_column: columns of a CSV/TSV table; by default the first of SEQUENCE_COLUMNS and ID_COLUMNS
            (`plm.sequences.tables`).
        heavy_column, light_column: the columns of the two chains, instead of ``column``; by default, in a table without
            a column of sequences, the first two of CHAIN_COLUMNS. Case does not matter in names, nor space or ``_``.
        case: the case that letters are brought to, and the changed ones counted; "keep" both; or refuse all but
            "capitals". 3Di states, as ProstT5 takes them, are "lower". With these and "keep", a literal sequence may
            have lowercase letters.
        prompts: whether ``_`` may stand for residues that a model is to fill in, and ``1`` and ``2`` for the ends of a
            protein, from which a model writes.
        complexes: whether a record may have any number of chains, ``A:B:C``; pairs are read as such as well.
        on_stop: what an inner ``*`` is: an error, the letter X, or a reason to leave the sequence out. Stops at the end
            of a chain are always removed, and counted.
        strip_gaps: remove ``-`` and ``.`` (aligned FASTA) instead of refusing them.
        duplicates: give the later ones the suffix ``.2``, ``.3``...; refuse them; or keep the first only.
        empty: whether a record without residues, or a pair without one of its chains, is an error or left out.
        id: the first word of the header, all of it, the accession in ``sp|P12345|NAME``, or the record's number.

    Raises:
        InputError: with all faults of the source, their lines and records, and what to do.
    """
    collector = Collector(case, on_stop, strip_gaps, duplicates, empty, id, prompts, complexes)
    name = "stdin" if source == "-" else os.fspath(source)
    # Path.exists() would raise for a literal sequence that is longer than a path may be.
    if isinstance(source, str) and source != "-" and not os.path.exists(source):  # noqa: PTH110
        capitals = case in ("upper", "capitals")
        letters, how = ("A-Z", "in capitals, as MKTAYIAK") if capitals else ("A-Za-z", "as letters alone")
        letters += PROMPT_SIGNS if prompts else ":" if complexes else ""
        if not re.fullmatch(rf"(?:[{letters}|*\s-]|<\w+>)+", source):
            hint = f"check the spelling; a literal sequence is written {how}"
            raise InputError(repr(source), [Fault("no such file", hint)])
        collector.notes.append("the input was taken as a literal sequence: there is no file of that name")
        collector.add("", [source.encode()])
        return collector.finish("the literal sequence")
    try:
        with open_source(source) as stream:
            read_source(collector, stream, name, Columns(column, heavy_column, light_column, id_column))
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(name, [Fault(f"torn or damaged archive ({error})", "fetch or pack the file again")]) from error
    except OSError as error:
        raise InputError(name, [Fault(error.strerror or str(error), "give a readable file")]) from error
    return collector.finish(name)
