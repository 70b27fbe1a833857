"""The reader takes every well-formed file as it is meant, and refuses every other with the place and a remedy."""

import bz2
import gzip
import io
import lzma
import os
import re
import string
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plm.sequences import InputError, Reading, Record, read_records


def read(tmp_path: Path, content: bytes, name: str = "proteins.fasta", **policies: Any) -> Reading:
    path = tmp_path / name
    path.write_bytes(content)
    return read_records(path, **policies)


def pairs(reading: Reading) -> list[tuple[str, str]]:
    return [(record.id, record.sequence) for record in reading.records]


def message(tmp_path: Path, content: bytes, name: str = "proteins.fasta", **policies: Any) -> str:
    with pytest.raises(InputError) as error:
        read(tmp_path, content, name, **policies)
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b">a first\nMKTV\n>b\nACD\n",
        b">a first\nMKTV\n>b\nACD",
        b">a first\r\nMK\r\nTV\r\n>b\r\nACD\r\n",
        b">a first\rMK\rTV\r>b\rACD\r",
        b"\xef\xbb\xbf>a first\nMKTV\n>b\nACD\n",
        b"\n\n  \n>a first\nMKTV\n\n>b\n\nACD\n\n",
        b"; written in 1985\n>a first\n; a comment\nMKTV\n>b\nACD\n",
        b"> a first \nMKTV\n>b\nACD\n",
        b">a first\nMKTV\n>b\n" + b"\n".join([b"A", b"C", b"D"]),
    ],
    ids=["plain", "no-final-newline", "crlf", "cr", "bom", "blank-lines", "comments", "space-after->", "wrapped"],
)
def test_equal_content_reads_equally(tmp_path: Path, content: bytes) -> None:
    """Line ends, byte order marks, blank lines and wrapping are no part of a sequence, and no change worth a word."""
    reading = read(tmp_path, content)
    assert pairs(reading) == [("a", "MKTV"), ("b", "ACD")]
    assert [record.header for record in reading.records] == ["a first", "b"]
    assert reading.changes == [] and reading.failed == []


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_records_know_their_lines(tmp_path: Path, end: bytes) -> None:
    assert read(tmp_path, b"\n>a x\nMK\nTV\n>b\nACD\n".replace(b"\n", end)).records == [
        Record("a", "MKTV", "a x", 2, 1),
        Record("b", "ACD", "b", 5, 2),
    ]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".gz", lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:])),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        ("", gzip.compress),
    ],
    ids=["gz", "bgzip-members", "bz2", "xz", "packed-without-suffix"],
)
def test_compression_is_told_by_content(tmp_path: Path, suffix: str, pack: Any) -> None:
    assert pairs(read(tmp_path, pack(b">a\nMKTV\n>b\nACD\n"), "proteins.fasta" + suffix)) == [
        ("a", "MKTV"),
        ("b", "ACD"),
    ]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_torn_archive(tmp_path: Path, pack: Any) -> None:
    """Half a download must not pass for a shorter proteome."""
    packed = pack(b"".join(b">%d\nMKTV%s\n" % (i, bytes([65 + i % 20]) * (i % 97)) for i in range(3000)))
    assert "torn or damaged archive" in message(tmp_path, packed[: len(packed) // 2], "proteins.fasta.gz")


def test_changes_are_made_and_counted(tmp_path: Path) -> None:
    reading = read(tmp_path, b">a\nmkTV*\n>a\nAC DE\tF\n>a\nACD**\n>a.2\nW\n")
    assert pairs(reading) == [("a", "MKTV"), ("a.2", "ACDEF"), ("a.3", "ACD"), ("a.2.2", "W")]
    assert set(reading.changes) == {
        "terminal stops (*) removed from 2 sequences",
        "2 lowercase letters upper-cased",
        "spaces removed in 1 sequences",
        "3 repeated ids made unique with a suffix (.2, .3, ...)",
    }
    assert reading.records[1].header == "a"


def test_tokens_keep_their_case(tmp_path: Path) -> None:
    reading = read(tmp_path, b">a\nmk<mask>tv\n>wrapped\nM<ma\nsk>K\n")
    assert [sequence for _, sequence in pairs(reading)] == ["MK<mask>TV", "M<mask>K"]
    assert reading.changes == ["4 lowercase letters upper-cased"]
    assert reading.lengths == [5, 3]
    assert (reading.source, reading.ids) == (str(tmp_path / "proteins.fasta"), ["a", "wrapped"])


def test_case(tmp_path: Path) -> None:
    """Foldseek writes 3Di states in capitals, ProstT5 takes them in lowercase."""
    content = b">a\nDVvq*L<MASK>P*\n"
    lower = read(tmp_path, content, case="lower", on_stop="X")
    assert pairs(lower) == [("a", "dvvqxl<MASK>p")]
    assert lower.changes == [
        "terminal stops (*) removed from 1 sequences",
        "4 uppercase letters lower-cased",
        "1 inner stops (*) read as X",
    ]
    kept = read(tmp_path, content, case="keep", on_stop="X")
    assert pairs(kept) == [("a", "DVvqXL<MASK>P")]
    assert kept.changes == ["terminal stops (*) removed from 1 sequences", "1 inner stops (*) read as X"]
    for case, letters in (("upper", "A-Z"), ("lower", "a-z"), ("keep", "A-Za-z")):
        assert message(tmp_path, b">a\nDv1\n", case=case).endswith(
            "record 1 'a': '1' at position 3\n"
            f"What to do: sequences hold the letters {letters}, and <mask> or | where the model has them"
        )
    with pytest.raises(ValueError, match="case is one of upper, capitals, lower, keep, not 'title'"):
        read(tmp_path, content, case="title")


def test_literals_in_lowercase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could be the name of a file, so they are taken only where case is spoken of."""
    monkeypatch.chdir(tmp_path)
    assert pairs(read_records("dvVq", case="lower")) == [("1", "dvvq")]
    assert pairs(read_records("dvVq", case="keep")) == [("1", "dvVq")]
    with pytest.raises(InputError, match="a literal sequence is written in capitals, as MKTAYIAK"):
        read_records("dvVq")
    with pytest.raises(InputError, match="a literal sequence is written as letters alone"):
        read_records("dvvq.fasta", case="lower")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty", "at least one sequence"]),
        (b" \n; only a comment\n", ["empty"]),
        (b"MKTV\nACD\n", ["line 1", "without a header: 'MKTV'", ">name", ".txt"]),
        (b"\nsome words\n>a\nMKTV\n", ["line 2", "without a header"]),
        (b">a\n>b\nMK\n", ["line 1", "record 1 'a'", "empty sequence", "--skip-empty"]),
        (b">a\nMK\n>b\n", ["line 3", "record 2 'b'", "empty sequence"]),
        (b">a\n*\n", ["empty sequence"]),
        (b">a\nMKT\nAC*D*\n", ["line 3", "record 1 'a'", "'*' at position 6", "--on-stop X"]),
        (b">a\nMK--TV\n", ["line 2", "'-' at position 3", "--strip-gaps"]),
        (b">a\nMK.TV\n", ["'.' at position 3", "--strip-gaps"]),
        (b">a\nMK\n;c\n\nT1V\n", ["line 5", "'1' at position 4", "letters A-Z"]),
        (b">a\nMK\0TV\n", ["line 2", r"'\x00' at position 3", "NUL byte"]),
        (b">a\0b\nMKTV\n", ["line 1", "NUL byte in the header"]),
        ("\N{BYTE ORDER MARK}>a\nMKTV\n".encode("utf-16-le"), ["UTF-16", "UTF-8"]),
        (">a\nMK\N{CYRILLIC CAPITAL LETTER TE}V\n".encode(), ["position 3", "U+0422"]),
        (b">a\nMK\xe9V\n", ["position 3", "U+FFFD"]),
        (b">a\nMK>TV\n", ["'>' at position 3"]),
        (b">a\nMK<>TV\n", ["'<' at position 3"]),
        (b"PK\x03\x04 and so on", ["zip archive", "CSV"]),
    ],
)
def test_faults_say_where_and_what_to_do(tmp_path: Path, content: bytes, words: list[str]) -> None:
    text = message(tmp_path, content)
    assert "proteins.fasta" in text and "What to do" in text
    assert [word for word in words if word not in text] == []


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    content = b"".join(b">p%d\nMK%sV\n" % (i, b"1" if i % 2 else b"*") for i in range(26)) + b">good\nMKTV\n"
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert [(fault.line, fault.record, fault.id) for fault in error.value.faults] == [
        (2 * i + 2, i + 1, f"p{i}") for i in range(26)
    ]
    lines = str(error.value).splitlines()
    assert lines[0].endswith("proteins.fasta: 26 faults") and lines[1] == "  line 2, record 1 'p0': '*' at position 3"
    assert lines[11] == "  ... and 16 more"
    assert [line.split(":")[0] for line in lines[12:]] == ["What to do"] * 2  # one remedy for each kind of fault


def test_policies(tmp_path: Path) -> None:
    content = b">a\nM*K\n>b\nA-C.D\n>b\nW\n>c\n"
    reading = read(tmp_path, content, on_stop="X", strip_gaps=True, duplicates="first", empty="skip")
    assert pairs(reading) == [("a", "MXK"), ("b", "ACD")]
    assert reading.changes == [
        "1 inner stops (*) read as X",
        "2 gaps (- or .) removed",
        "1 records with a repeated id left out",
    ]
    assert [record.number for record in reading.records] == [1, 2]
    assert [str(fault) for fault in reading.failed] == ["line 7, record 4 'c': empty sequence"]
    skipped = read(tmp_path, b">a\nM*K\n>b\nACD\n", on_stop="skip")
    assert skipped.records == [Record("b", "ACD", "b", 3, 2)]  # the number is that of the file, not of the survivors
    assert [fault.id for fault in skipped.failed] == ["a"]
    assert "record 2 'b': this id was used before" in message(tmp_path, b">b\nM\n>b\nK\n", duplicates="error")
    with pytest.raises(ValueError, match="on_stop is one of error, X, skip, not 'x'"):
        read(tmp_path, content, on_stop="x")


def test_positions_count_what_is_kept(tmp_path: Path) -> None:
    """With gaps stripped the position and the line are those of the residue, not of the column in the alignment."""
    assert "line 3, record 1 'a': '1' at position 4" in message(tmp_path, b">a\n--M K-\nT-1\n", strip_gaps=True)


@pytest.mark.parametrize(
    ("naming", "ids"),
    [
        ("first-word", ["sp|P1|CET1", "plain", "3"]),
        ("header", ["sp|P1|CET1 an enzyme", "plain", "3"]),
        ("accession", ["P1", "plain", "3"]),
        ("index", ["1", "2", "3"]),
    ],
)
def test_ids(tmp_path: Path, naming: Any, ids: list[str]) -> None:
    reading = read(tmp_path, b">sp|P1|CET1 an enzyme\nM\n>plain\nK\n>\nT\n", id=naming)
    assert [record.id for record in reading.records] == ids


def test_header_that_is_not_utf8(tmp_path: Path) -> None:
    """Biopython and dnaio stop with a UnicodeDecodeError on such a file."""
    reading = read(tmp_path, b">a prot\xe9ine\nMK\n>b\xc3\xa9\nAC\n")
    assert [record.header for record in reading.records] == ["a protéine", "bé"]
    assert reading.changes == ["1 lines that are not UTF-8 read as Latin-1"]


@pytest.mark.parametrize("name", ["plain.txt", "plain.seq", "plain"])
def test_plain_text(tmp_path: Path, name: str) -> None:
    reading = read(tmp_path, b"MKTV\n\nACD*\n", name)
    assert reading.records == [Record("1", "MKTV", "", 1, 1), Record("2", "ACD", "", 3, 2)]
    assert "no '>' found: 2 lines read as one sequence each" in reading.changes
    text = message(tmp_path, b"MKTV\na\tMKTV\nhello world\nM K <mask>\n", name)
    assert "2 faults" in text and "line 2: several words" in text and "line 3: several words" in text
    assert "FASTA" in text


def test_spaced_letters_are_one_sequence(tmp_path: Path) -> None:
    """ProtBert's own examples are written so. Words are not: `CET MKTV` would be embedded with its name."""
    reading = read(tmp_path, b"M K <mask> V \nACD\n", "plain.txt")
    assert pairs(reading) == [("1", "MK<mask>V"), ("2", "ACD")]
    assert "spaces removed in 1 sequences" in reading.changes
    assert pairs(read_records("MKTAYIAKQR QISFVK")) == [("1", "MKTAYIAKQRQISFVK")]  # a literal in blocks of ten


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"name,Sequence,note\na,MKTV,\nb,ac d,x\n", "table.csv"),
        (b"\xef\xbb\xbfname;Sequence\r\na;MKTV\r\nb;acd\r\n", "table.csv"),
        (b"id\tseq\na\tMKTV\n\nb\tacd\n", "table.tsv"),
        (b"id\tseq\na\tMKTV\nb\tacd\n", "table.txt"),
        (b'id,seq\na,"MK\nTV"\n"b",acd\n', "table.csv"),
    ],
    ids=["csv", "excel", "tsv", "sniffed", "quoted-newline"],
)
def test_tables(tmp_path: Path, content: bytes, name: str) -> None:
    assert pairs(read(tmp_path, content, name)) == [("a", "MKTV"), ("b", "ACD")]


def test_table_columns(tmp_path: Path) -> None:
    content = b"Therapeutic,Heavy,Light\nabciximab,MK,TV\nother,M1,W\n"
    reading = read(tmp_path, content, "t.csv", column="light", id_column="Therapeutic")
    assert reading.records == [Record("abciximab", "TV", "abciximab", 2, 1), Record("other", "W", "other", 3, 2)]
    assert "line 3, record 2 'other': '1' at position 2" in message(
        tmp_path, content, "t.csv", column="Heavy", id_column="Therapeutic"
    )
    assert message(tmp_path, b"Name,Residues\na,MK\n", "t.csv").endswith(
        "t.csv: line 1: no column of sequences\nWhat to do: choose one with --column, or two with --heavy-column and "
        "--light-column; there are: Name, Residues"
    )
    assert message(tmp_path, content, "t.csv", column="nothing", id_column="none").endswith(
        "t.csv: 2 faults\n  line 1: no column for --column nothing\n  line 1: no column for --id-column none\n"
        "What to do: choose one with --column; there are: Therapeutic, Heavy, Light\n"
        "What to do: choose one with --id-column; there are: Therapeutic, Heavy, Light"
    )
    assert "empty sequence" in message(tmp_path, b"id,seq\na\n", "t.csv")
    assert "line 1: not a table (field larger" in message(tmp_path, b"M" * 200_000, "t.csv")
    assert "FASTA, which has no columns" in message(tmp_path, b">a\nMK\n", column="seq")


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b">a\nMKTV\n", gzip.compress(b">a\nMKTV\n")):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        assert pairs(read_records("-")) == [("a", "MKTV")]


def test_pipe_that_cannot_be_rewound(tmp_path: Path) -> None:
    """``plm embed <(zcat proteins.gz)`` gives a pipe; looking at its first bytes must not lose them."""
    reader, writer = os.pipe()
    os.write(writer, b">a\nMKTV\n")
    os.close(writer)
    assert pairs(read_records(f"/dev/fd/{reader}")) == [("a", "MKTV")]
    os.close(reader)


def test_literal_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reading = read_records("MK<mask>TV")
    assert reading.records == [Record("1", "MK<mask>TV", "", 0, 1)]
    assert reading.changes == ["the input was taken as a literal sequence: there is no file of that name"]
    assert len(read_records("MKTV" * 20_000).records[0].sequence) == 80_000  # longer than any path may be
    with pytest.raises(InputError, match=r"the literal sequence: record 1 '1': '\*' at position 3"):
        read_records("MK*TV")
    for path in ("proteins.fasta", "MKTV.fa", "PROTEINS.FASTA", "data/MKTV", "mktv", ""):
        with pytest.raises(InputError, match="no such file"):
            read_records(path)
    (tmp_path / "MKTV").write_bytes(b">a\nW\n")
    assert pairs(read_records("MKTV")) == [("a", "W")]  # a file goes first


def test_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_records(tmp_path / "missing.fasta")
    with pytest.raises(InputError, match="Is a directory"):
        read_records(tmp_path)


letters = st.text(string.ascii_uppercase, min_size=1, max_size=200)
names = st.text(string.ascii_letters + string.digits + "|_.:;/#é", min_size=1, max_size=20)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.tuples(names, letters), min_size=1, max_size=8, unique_by=lambda pair: pair[0]),
    width=st.integers(1, 80),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_round_trip(tmp_path: Path, records: list[tuple[str, str]], width: int, end: str) -> None:
    """Whatever the width of the lines and their ends, what was written is read."""
    lines = []
    for name, sequence in records:
        lines += [f">{name}", *(sequence[start : start + width] for start in range(0, len(sequence), width))]
    assert pairs(read(tmp_path, end.join(lines).encode())) == records


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from(
                [b">", b"a", b"MK", b"\n", b"\r", b"*", b"-", b"\0", b"<mask>", b"<", b",", b"\t", b'"', b"\xe9", b"|"]
            )
        ).map(b"".join),
        st.binary(max_size=60).map(lambda tail: gzip.compress(b">a\nMKTV\n")[:20] + tail),
    ),
    name=st.sampled_from(["a.fasta", "a.csv", "a.tsv", "a.txt", "a.gz"]),
    policies=st.fixed_dictionaries(
        {
            "case": st.sampled_from(["upper", "lower", "keep"]),
            "on_stop": st.sampled_from(["error", "X", "skip"]),
            "strip_gaps": st.booleans(),
            "duplicates": st.sampled_from(["suffix", "error", "first"]),
            "empty": st.sampled_from(["error", "skip"]),
            "id": st.sampled_from(["first-word", "header", "accession", "index"]),
        }
    ),
)
def test_any_bytes_give_records_or_an_input_error(
    tmp_path: Path, content: bytes, name: str, policies: dict[str, Any]
) -> None:
    """No other exception leaves the reader, ids are unique, and only letters, tokens and one ``|`` come through."""
    try:
        reading = read(tmp_path, content, name, **policies)
    except InputError:
        return
    assert len({record.id for record in reading.records}) == len(reading.records)
    letters = {"upper": "A-Z", "lower": "a-z", "keep": "A-Za-z"}[policies["case"]]
    chain = rf"(?:[{letters}]|<\w+>)+"
    assert all(record.id and re.fullmatch(rf"{chain}(\|{chain})?", record.sequence) for record in reading.records)
    assert len({len(record.chains) for record in reading.records}) <= 1
