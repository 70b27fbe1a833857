"""From a file or stdin to records: what is it packed with, what kind of text is in it, and where do records begin?"""

import bz2
import gzip
import io
import itertools
import lzma
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from plm.sequences.collector import Collector
from plm.sequences.records import TOKEN, Fault, InputError
from plm.sequences.tables import Columns, is_head, read_table

FASTA_SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
PACKED_SUFFIXES = (".gz", ".bgz", ".bz2", ".xz")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
UNPACKERS: dict[bytes, Callable[[BinaryIO], Any]]
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
UNREADABLE = {
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8 or plain text"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8 or plain text"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unzip it, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "unpack it with `zstd -d`"),
}


@contextmanager
def open_source(source: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file or stdin as a stream of unpacked bytes; told by content. All members of an archive are read (bgzip)."""
    with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as file:
        stream = file if file.seekable() else io.BytesIO(file.read())  # a pipe cannot be rewound
        head = stream.read(6)
        stream.seek(-len(head), os.SEEK_CUR)
        unpack = next((opener for magic, opener in UNPACKERS.items() if head.startswith(magic)), None)
        yield io.BufferedReader(unpack(stream)) if unpack else stream


def read_source(collector: Collector, stream: BinaryIO, name: str, asked: Columns) -> None:
    """Find out what the text is from its first line that is neither blank nor a comment, and read it as that."""
    lines = _lines(stream)
    for number, line in lines:
        if number == 1:
            for magic, (what, hint) in UNREADABLE.items():
                if line.startswith(magic):
                    raise InputError(name, [Fault(f"this is {what}", hint)])
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.startswith((b'{"', b'"{""')):  # every file of the Observed Antibody Space begins so
                collector.notes.append("the first line, which is JSON, left out")
                continue
        if not _ignored(line):
            break
    else:
        raise InputError(name, [Fault("empty: no sequence in it", "give a file with at least one sequence")])
    lines = itertools.chain([(number, line)], lines)

    suffixes = reversed(Path(name.lower()).suffixes)
    suffix = next((suffix for suffix in suffixes if suffix not in PACKED_SUFFIXES), "")
    if line.startswith(b">"):
        if any(asked):
            raise InputError(name, [Fault("this is FASTA, which has no columns", "leave the column away")])
        _read_fasta(collector, lines)
    elif suffix in FASTA_SUFFIXES:
        hint = "put a line such as `>name` above each sequence, or call a file of one sequence per line .txt"
        start = line.decode(errors="replace")[:30]
        raise InputError(name, [Fault(f"text without a header: {start!r}", hint, number)])
    elif any(asked) or suffix in TABLE_SUFFIXES or is_head(line):
        read_table(collector, lines, name, asked)
    else:
        _read_plain(collector, lines)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends, which may be LF, CRLF or CR."""
    chunks = (chunk.removesuffix(b"\n").removesuffix(b"\r") for chunk in stream)
    return enumerate((line for chunk in chunks for line in chunk.split(b"\r")), 1)


def _ignored(line: bytes) -> bool:
    return line.startswith(b";") or not line.strip()


def _read_fasta(collector: Collector, lines: Iterable[tuple[int, bytes]]) -> None:
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


def _read_plain(collector: Collector, lines: Iterable[tuple[int, bytes]]) -> None:
    for number, line in lines:
        if _ignored(line):
            continue
        chains = [chain.split() for chain in TOKEN.sub(b"X", line).split(b"|")]
        if any(len(words) > 1 and max(map(len, words)) > 1 for words in chains):
            hint = "write FASTA (`>name`, then the sequence), or a table with a first line such as `id,sequence`"
            collector.faults.append(Fault("several words in a line that is read as one sequence", hint, number))
        else:
            collector.changes["no '>' found: {:,} lines read as one sequence each"] += 1
            collector.add("", [line], number, number)
