"""Sequences in: FASTA, CSV/TSV, one sequence per line, stdin, or a literal sequence.

Bytes are read as a stream of lines and checked one record at a time with byte tables; single characters are looked at
only when something is wrong. Nothing is changed silently: `Reading.changes` says what was changed and how often. All
faults of a source are collected into one `InputError`, so that a file is repaired once.
"""

import bz2
import csv
import gzip
import io
import itertools
import lzma
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

OnStop = Literal["error", "X", "skip"]
Duplicates = Literal["suffix", "error", "first"]
Empty = Literal["error", "skip"]
Naming = Literal["first-word", "header", "accession", "index"]

SPACES = b" \t\v\f\r\n"
GAPS = b"-."
# All letters pass: which of B J O U X Z a model knows is its tokenizer's affair. "|" joins the chains of an antibody.
ALLOWED = bytes(range(ord("A"), ord("Z") + 1)) + b"|"
NOT_ALLOWED = re.compile(rb"[^A-Z|]")
TOKEN = re.compile(rb"<\w+>")  # <mask> and its kin
CASED = re.compile(rb"<\w+>|[a-z]+")  # what upper-casing looks at: tokens, to leave them alone, and lowercase letters
LITERAL = re.compile(r"(?:[A-Z|*\s-]|<\w+>)+")

FASTA_SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
PACKED_SUFFIXES = (".gz", ".bgz", ".bz2", ".xz")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
SEQUENCE_COLUMNS = ("sequence", "seq", "protein_sequence", "aa_sequence")
ID_COLUMNS = ("id", "name", "accession", "entry", "identifier", "protein_id", "sequence_id")
UNPACKERS: dict[bytes, Callable[[BinaryIO], Any]]
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
UNREADABLE = {
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8 or plain text"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8 or plain text"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unzip it, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "unpack it with `zstd -d`"),
}
HINTS = {
    "*": "a stop inside a sequence: --on-stop X reads it as X, --on-stop skip leaves the sequence out",
    "-": "gaps of an alignment: --strip-gaps removes them",
    ".": "gaps of an alignment: --strip-gaps removes them",
    "\0": "a NUL byte: the file is damaged or not text, fetch it again",
}
FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Record:
    """One sequence. `id` is unique within its reading, `header` is what the source called it, `line` is where it begins
    (1-based; 0 for a literal sequence), `number` counts the records of the source from 1, those left out included."""

    id: str
    sequence: str
    header: str
    line: int
    number: int

    @property
    def length(self) -> int:
        """Residues; a token such as ``<mask>`` is one."""
        return len(TOKEN.sub(b"X", self.sequence.encode()))


@dataclass(frozen=True)
class Fault:
    """What is wrong, where, and what to do. `line` and `record` are 1-based; 0 where there is none."""

    reason: str
    hint: str
    line: int = 0
    record: int = 0
    id: str = ""

    def __str__(self) -> str:
        places = [f"line {self.line}"] * (self.line > 0) + [f"record {self.record} {self.id!r}"] * (self.record > 0)
        return f"{', '.join(places)}: {self.reason}" if places else self.reason


class InputError(ValueError):
    """Bad sequences or files. `faults` holds all that was found; the message shows the first ten."""

    def __init__(self, source: str, faults: Iterable[Fault]) -> None:
        self.source, self.faults = source, tuple(faults)
        shown, count = self.faults[:FAULTS_SHOWN], len(self.faults)
        lines = [f"{source}: {shown[0]}"] if count == 1 else [f"{source}: {count} faults", *map(str, shown)]
        if count > FAULTS_SHOWN:
            lines.append(f"... and {count - FAULTS_SHOWN} more")
        hints = dict.fromkeys(f"What to do: {fault.hint}" for fault in shown)
        super().__init__("\n".join(["\n  ".join(lines), *hints]))


@dataclass(frozen=True)
class Reading:
    """What was read: the name of the source, its records in input order, one sentence for each kind of change, and what
    a policy left out."""

    source: str
    records: list[Record]
    changes: list[str]
    failed: list[Fault]

    @property
    def ids(self) -> list[str]:
        return [record.id for record in self.records]

    @property
    def lengths(self) -> list[int]:
        return [record.length for record in self.records]


def read_records(
    source: str | os.PathLike[str],
    *,
    column: str | None = None,
    id_column: str | None = None,
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
    single letters alone (``M K T``, as ProtBert takes it): there, words are more likely a name, or prose.

    Args:
        column, id_column: columns of a CSV/TSV table; by default the first of SEQUENCE_COLUMNS and ID_COLUMNS.
        on_stop: what an inner ``*`` is: an error, the letter X, or a reason to leave the sequence out. Stops at the end
            are always removed, and counted.
        strip_gaps: remove ``-`` and ``.`` (aligned FASTA) instead of refusing them.
        duplicates: give the later ones the suffix ``.2``, ``.3``...; refuse them; or keep the first only.
        id: the first word of the header, all of it, the accession in ``sp|P12345|NAME``, or the record's number.

    Raises:
        InputError: with all faults of the source, their lines and records, and what to do.
    """
    collector = _Collector(on_stop, strip_gaps, duplicates, empty, id)
    name = "stdin" if source == "-" else os.fspath(source)
    # Path.exists() would raise for a literal sequence that is longer than a path may be.
    if isinstance(source, str) and source != "-" and not os.path.exists(source):  # noqa: PTH110
        if not LITERAL.fullmatch(source):
            hint = "check the spelling; a literal sequence is written in capitals, as MKTAYIAK"
            raise InputError(repr(source), [Fault("no such file", hint)])
        collector.changes["the input was taken as a literal sequence: there is no file of that name"] += 1
        collector.add("", [source.encode()], 0)
        return collector.finish("the literal sequence")
    try:
        with _open(source) as stream:
            _read(collector, stream, name, column, id_column)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(name, [Fault(f"torn or damaged archive ({error})", "fetch or pack the file again")]) from error
    except OSError as error:
        raise InputError(name, [Fault(error.strerror or str(error), "give a readable file")]) from error
    return collector.finish(name)


@dataclass
class _Collector:
    """Applies the policies record by record and keeps the books."""

    on_stop: OnStop
    strip_gaps: bool
    duplicates: Duplicates
    empty: Empty
    naming: Naming
    seen: int = 0
    records: list[Record] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    failed: list[Fault] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # id -> the next suffix to try when it comes again

    def __post_init__(self) -> None:
        for name, choices in (("on_stop", OnStop), ("duplicates", Duplicates), ("empty", Empty), ("naming", Naming)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}")

    def finish(self, source: str) -> Reading:
        if not self.seen and not self.faults:
            self.faults.append(Fault("no sequence in it", "give at least one sequence"))
        if self.faults:
            raise InputError(source, self.faults)
        return Reading(source, self.records, [what.format(count) for what, count in self.changes.items()], self.failed)

    def text(self, raw: bytes) -> str:
        """Headers and table cells as text. Old files are Latin-1, in which every byte is a character."""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.changes["{:,} lines that are not UTF-8 read as Latin-1"] += 1
            return raw.decode("latin-1")

    def add(self, header: str, pieces: list[bytes], line: int = 0, first: int = 0) -> None:
        """Take one record, which begins at `line` and whose residues begin at line `first`."""
        self.seen += 1
        name = self._name(header)
        sequence = self._tidy(b"".join(pieces))
        if problem := self._problem(header, sequence):
            reason, hint, position = problem
            if position >= 0 and first:
                line = self._line_of(position, pieces, first)
            fault = Fault(reason, hint, line, self.seen, name)
            stop = sequence[position : position + 1] == b"*"
            skip = (self.empty == "skip" and not sequence) or (self.on_stop == "skip" and stop)
            (self.failed if skip else self.faults).append(fault)
            return
        if name in self.ids and self.duplicates == "suffix":
            self.changes["{:,} repeated ids made unique with a suffix (.2, .3, ...)"] += 1
            name = self._unique(name)
        if name not in self.ids:
            self.ids[name] = 2
            self.records.append(Record(name, sequence.decode("ascii"), header, line, self.seen))
        elif self.duplicates == "first":
            self.changes["{:,} records with a repeated id left out"] += 1
        else:
            hint = "rename it, or use --duplicates suffix or --duplicates first"
            self.faults.append(Fault("this id was used before", hint, line, self.seen, name))

    def _name(self, header: str) -> str:
        words = header.split(maxsplit=1)
        if not words or self.naming == "index":
            return str(self.seen)
        if self.naming == "header":
            return header
        fields = words[0].split("|")  # sp|P12345|NAME_YEAST
        return fields[1] if self.naming == "accession" and len(fields) > 1 and fields[1] else words[0]

    def _unique(self, name: str) -> str:
        while (candidate := f"{name}.{self.ids[name]}") in self.ids:
            self.ids[name] += 1  # remembered, so that many equal ids stay linear
        return candidate

    def _tidy(self, raw: bytes) -> bytes:
        """Do the changes that the policies allow, and count them."""
        sequence = raw.translate(None, SPACES)
        if len(sequence) != len(raw):
            self.changes["spaces removed in {:,} sequences"] += 1
        if self.strip_gaps and (gaps := sequence.count(b"-") + sequence.count(b".")):
            self.changes["{:,} gaps (- or .) removed"] += gaps
            sequence = sequence.translate(None, GAPS)
        if sequence.endswith(b"*"):
            self.changes["terminal stops (*) removed from {:,} sequences"] += 1
            sequence = sequence.rstrip(b"*")
        if sequence != sequence.upper():
            upper = CASED.sub(lambda match: match[0] if match[0].startswith(b"<") else match[0].upper(), sequence)
            if changed := sum(old != new for old, new in zip(sequence, upper, strict=True)):
                self.changes["{:,} lowercase letters upper-cased"] += changed
            sequence = upper
        if self.on_stop == "X" and b"*" in sequence:
            self.changes["{:,} inner stops (*) read as X"] += sequence.count(b"*")
            sequence = sequence.replace(b"*", b"X")
        return sequence

    def _problem(self, header: str, sequence: bytes) -> tuple[str, str, int] | None:
        """Reason, hint and 0-based position (-1: not among the residues) of the first thing that is wrong, or None."""
        if "\0" in header:
            return "NUL byte in the header", "the file is damaged or not text: fetch it again", -1
        if not sequence:
            return "empty sequence", "give it residues, remove it, or leave such records out with --skip-empty", -1
        if not sequence.translate(None, ALLOWED):
            return None
        plain = TOKEN.sub(lambda match: b"X" * len(match[0]), sequence)
        if not (found := NOT_ALLOWED.search(plain)):
            return None
        position = found.start()
        # All before it is ASCII, so the position in bytes is the position in characters.
        character = sequence[position:].decode(errors="replace")[0]
        code = "" if character.isascii() else f" (U+{ord(character):04X})"  # some look like a Latin letter
        hint = HINTS.get(character, "sequences hold the letters A-Z, and <mask> or | where the model has them")
        return f"{character!r}{code} at position {position + 1}", hint, position

    def _line_of(self, position: int, pieces: list[bytes], first: int) -> int:
        """The line that holds a position of the tidied sequence, whose `pieces` begin at line `first`."""
        dropped = SPACES + GAPS if self.strip_gaps else SPACES
        ends = itertools.accumulate(len(piece.translate(None, dropped)) for piece in pieces)
        return next(line for line, end in enumerate(ends, first) if position < end)


@contextmanager
def _open(source: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file or stdin as a stream of unpacked bytes; told by content. All members of an archive are read (bgzip)."""
    with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as file:
        stream = file if file.seekable() else io.BytesIO(file.read())  # a pipe cannot be rewound
        head = stream.read(6)
        stream.seek(-len(head), os.SEEK_CUR)
        unpack = next((opener for magic, opener in UNPACKERS.items() if head.startswith(magic)), None)
        yield io.BufferedReader(unpack(stream)) if unpack else stream


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends, which may be LF, CRLF or CR."""
    chunks = (chunk.removesuffix(b"\n").removesuffix(b"\r") for chunk in stream)
    return enumerate((line for chunk in chunks for line in chunk.split(b"\r")), 1)


def _read(collector: _Collector, stream: BinaryIO, name: str, column: str | None, id_column: str | None) -> None:
    """Find out what the text is from its first line that is neither blank nor a comment, and read it as that."""
    lines = _lines(stream)
    for number, line in lines:
        if number == 1:
            for magic, (what, hint) in UNREADABLE.items():
                if line.startswith(magic):
                    raise InputError(name, [Fault(f"this is {what}", hint)])
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not _ignored(line):
            break
    else:
        raise InputError(name, [Fault("empty: no sequence in it", "give a file with at least one sequence")])
    lines = itertools.chain([(number, line)], lines)

    suffixes = reversed(Path(name.lower()).suffixes)
    suffix = next((suffix for suffix in suffixes if suffix not in PACKED_SUFFIXES), "")
    columns = {cell.strip(' "').casefold() for cell in re.split("[,;\t]", line.decode("latin-1"))}
    if line.startswith(b">"):
        if column or id_column:
            raise InputError(name, [Fault("this is FASTA, which has no columns", "leave the column away")])
        _read_fasta(collector, lines)
    elif suffix in FASTA_SUFFIXES:
        hint = "put a line such as `>name` above each sequence, or call a file of one sequence per line .txt"
        start = line.decode(errors="replace")[:30]
        raise InputError(name, [Fault(f"text without a header: {start!r}", hint, number)])
    elif column or id_column or suffix in TABLE_SUFFIXES or columns.intersection(SEQUENCE_COLUMNS):
        _read_table(collector, lines, name, column, id_column)
    else:
        _read_plain(collector, lines)


def _ignored(line: bytes) -> bool:
    return line.startswith(b";") or not line.strip()


def _read_fasta(collector: _Collector, lines: Iterable[tuple[int, bytes]]) -> None:
    header, start = b"", 0
    pieces: list[bytes] = []
    for number, line in lines:
        if line.startswith(b">"):
            if start:
                collector.add(collector.text(header), pieces, start, start + 1)
            header, start, pieces = line[1:].strip(), number, []
        else:
            pieces.append(b"" if line.startswith(b";") else line)
    collector.add(collector.text(header), pieces, start, start + 1)


def _read_plain(collector: _Collector, lines: Iterable[tuple[int, bytes]]) -> None:
    for number, line in lines:
        if _ignored(line):
            continue
        if len(words := TOKEN.sub(b"X", line).split()) > 1 and max(map(len, words)) > 1:
            hint = "write FASTA (`>name`, then the sequence), or a table with a first line such as `id,sequence`"
            collector.faults.append(Fault("several words in a line that is read as one sequence", hint, number))
        else:
            collector.changes["no '>' found: {:,} lines read as one sequence each"] += 1
            collector.add("", [line], number, number)


def _read_table(
    collector: _Collector, lines: Iterator[tuple[int, bytes]], name: str, column: str | None, id_column: str | None
) -> None:
    before, head = next(lines)
    first = collector.text(head)
    delimiter = max(",\t;", key=first.count)
    columns = next(csv.reader([first], delimiter=delimiter))
    sequence_at = _find_column(columns, [column] if column else SEQUENCE_COLUMNS)
    id_at = _find_column(columns, [id_column] if id_column else ID_COLUMNS)
    if sequence_at is None or (id_column and id_at is None):
        wanted = "--column" if sequence_at is None else "--id-column"
        hint = f"choose one with {wanted}; there are: {', '.join(columns)}"
        raise InputError(name, [Fault(f"no column for {wanted} {column or 'sequence'}", hint, before)])
    rows = csv.reader((collector.text(line) for _, line in lines), delimiter=delimiter)
    try:
        for row in rows:
            if row:
                row += [""] * (len(columns) - len(row))
                line = before + rows.line_num
                collector.add("" if id_at is None else row[id_at], [row[sequence_at].encode()], line, line)
    except csv.Error as error:
        collector.faults.append(Fault(f"not a table ({error})", "check the quotes in it", before + rows.line_num))


def _find_column(columns: list[str], wanted: Sequence[str]) -> int | None:
    """The first of the `wanted` names that is there, whatever its case."""
    names = [name.strip().casefold() for name in columns]
    return next((names.index(name.casefold()) for name in wanted if name.casefold() in names), None)
