"""Antibodies: heavy and light chain joined by ``|``, or in two columns of a table."""

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plm.sequences import Fault, InputError, Reading, Record, read_records

# Ten rows of Thera-SAbDab, as in Merck/BioPhi-2021-publication, data/sabdab/TheraSAbDab_clean.tsv (MIT), with seven of
# its columns and commas for tabs. A nanobody has no light chain, a single light domain no heavy chain.
THERASABDAB = """\
Therapeutic,Format,Heavy Sequence,Light Sequence,Heavy Sequence (if bispec),Light Sequence (if bispec),Target
Abagovomab,Whole mAb,QVKLQESGAELARPGASVKLSCKASGYTFTNYWMQWVKQRPGQGLDWIGAIYPGDGNTRYTHKFKGKATLTADKSSSTAYMQLSSLASEDSGVYYCARGEGNYAWFAYWGQGTTVTVSS,DIELTQSPASLSASVGETVTITCQASENIYSYLAWHQQKQGKSPQLLVYNAKTLAGGVSSRFSGSGSGTHFSLKIKSLQPEDFGIYYCQHHYGILPTFGGGTKLEIK,,,CA125
Abituzumab,Whole mAb,QVQLQQSGGELAKPGASVKVSCKASGYTFSSFWMHWVRQAPGQGLEWIGYINPRSGYTEYNEIFRDKATMTTDTSTSTAYMELSSLRSEDTAVYYCASFLGRGAMDYWGQGTTVTVSS,DIQMTQSPSSLSASVGDRVTITCRASQDISNYLAWYQQKPGKAPKLLIYYTSKIHSGVPSRFSGSGSGTDYTFTISSLQPEDIATYYCQQGNTFPYTFGQGTKVEIK,,,ITGAV
Abrilumab,Whole mAb,QVQLVQSGAEVKKPGASVKVSCKVSGYTLSDLSIHWVRQAPGKGLEWMGGFDPQDGETIYAQKFQGRVTMTEDTSTDTAYMELSSLKSEDTAVYYCATGSSSSWFDPWGQGTLVTVSS,DIQMTQSPSSVSASVGDRVTITCRASQGISSWLAWYQQKPGKAPKLLIYGASNLESGVPSRFSGSGSGTDFTLTISSLQPEDFANYYCQQANSFPWTFGQGTKVEIK,,,α4β7
Acapatamab,Bispecific scFv,QVQLVESGGGLVKPGESLRLSCAASGFTFSDYYMYWVRQAPGKCLEWVAIISDGGYYTYYSDIIKGRFTISRDNAKNSLYLQMNSLKAEDTAVYYCARGFPLLRHGAMDYWGQGTLVTVSS,DIQMTQSPSSLSASVGDRVTITCKASQNVDTNVAWYQQKPGQAPKSLIYSASYVYWDVPSRFSGSASGTDFTLTISSVQSEDFATYYCQQYDQQLITFGCGTKLEIK,EVQLVESGGGLVQPGGSLKLSCAASGFTFNKYAMNWVRQAPGKGLEWVARIRSKYNNYATYYADSVKDRFTISRDDSKNTAYLQMNNLKTEDTAVYYCVRHGNFGNSYISYWAYWGQGTLVTVSS,QTVVTQEPSLTVSPGGTVTLTCGSSTGAVTSGNYPNWVQQKPGQAPRGLIGGTKFLAPGTPARFSGSLLGGKAALTLSGVQPEDEAEYYCVLWYSNRWVFGGGTKLTVL,FOLH1;CD3E
Actoxumab,Whole mAb,QVQLVESGGGVVQPGRSLRLSCAASGFSFSNYGMHWVRQAPGKGLEWVALIWYDGSNEDYTDSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCARWGMVRGVIDVFDIWGQGTVVTVSS,DIQMTQSPSSVSASVGDRVTITCRASQGISSWLAWYQHKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQANSFPWTFGQGTKVEIK,,,Toxin A
Caplacizumab,Nanobody,EVQLVESGGGLVQPGGSLRLSCAASGRTFSYNPMGWFRQAPGKGRELVAAISRTGGSTYYPDSVEGRFTISRDNAKRMVYLQMNSLRAEDTAVYYCAAAGVRAEDGRVRTLPSEYTFWGQGTQVTVSS,,,,VWF
Carlumab,Whole mAb,QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYGISWVRQAPGQGLEWMGGIIPIFGTANYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYCARYDGIYGELDFWGQGTLVTVSS,EIVLTQSPATLSLSPGERATLSCRASQSVSDAYLAWYQQKPGQAPRLLIYDASSRATGVPARFSGSGSGTDFTLTISSLEPEDFAVYYCHQYIQLHSFTFGQGTKVEIK,,,CCL2
Carotuximab,Whole mAb,EVKLEESGGGLVQPGGSMKLSCAASGFTFSDAWMDWVRQSPEKGLEWVAEIRSKASNHATYYAESVKGRFTISRDDSKSSVYLQMNSLRAEDTGIYYCTRWRRFFDSWGQGTTLTVSS,QIVLSQSPAILSASPGEKVTMTCRASSSVSYMHWYQQKPGSSPKPWIYATSNLASGVPVRFSGSGSGTSYSLTISRVEAEDAATYYCQQWSSNPLTFGAGTKLELK,,,ENG
Lulizumab,Single Domain Variable Fragment;L,,DIQMTQSPSSLSASVGDRVTITCRASRPIWPFLEWYQQKPGKAPKLLIYFTSRLRHGVPSRFSGSGSGTCFTLTISSLQPEDFATYYCLQNVANPATFSQGTKVEIK,,,CD28
Trastuzumab,Whole mAb,EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS,DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK,,,ERBB2
"""  # noqa: E501
TABLE = THERASABDAB.replace(",", "\t").encode()
ROWS = [line.split(",") for line in THERASABDAB.splitlines()[1:]]
WHOLE = [row for row in ROWS if row[2] and row[3]]
HEAD = TABLE.splitlines(keepends=True)[0]
WHOLE_TABLE = HEAD + "".join("\t".join(row) + "\n" for row in WHOLE).encode()
PAIRS = [(row[0], f"{row[2]}|{row[3]}") for row in WHOLE]
NOTE = "heavy chains read from column 'Heavy Sequence', light chains from column 'Light Sequence'"
INCOMPLETE = "What to do: a pair is HEAVY|LIGHT: give it both chains, or leave such records out with --skip-empty"


def read(tmp_path: Path, content: bytes, name: str = "antibodies.fasta", **policies: Any) -> Reading:
    path = tmp_path / name
    path.write_bytes(content)
    return read_records(path, **policies)


def sequences(reading: Reading) -> list[tuple[str, str]]:
    return [(record.id, record.sequence) for record in reading.records]


def message(tmp_path: Path, content: bytes, name: str = "antibodies.fasta", **policies: Any) -> str:
    """The whole message, without the folder."""
    with pytest.raises(InputError) as error:
        read(tmp_path, content, name, **policies)
    return str(error.value).removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b">sp|P1|CET1 x\nVQLSS|EVVIK\n>b\nVQL|EVV\n", "a.fasta"),
        (b">sp|P1|CET1 x\nVQL\nSS\n|\nEV\nVIK\n>b\nVQL|\nEVV\n", "a.fasta"),
        (gzip.compress(b">sp|P1|CET1 x\r\nVQLSS|\r\nEVVIK\r\n>b\r\nVQL|EVV\r\n"), "a.fasta.gz"),
        (b"id,sequence\nsp|P1|CET1,VQLSS|EVVIK\nb,VQL|EVV\n", "a.csv"),
        (b'"id";"sequence"\r\n"sp|P1|CET1";"VQLSS|\r\nEVVIK"\r\nb;VQL|EVV\r\n', "a.csv"),
        (b'id,VH,vl\n"sp|P1|CET1","VQL\nSS",EVVIK\nb,VQL,EVV\n', "a.csv"),
        (b"light chain;Heavy_Chain;name\r\nEVVIK;VQLSS;sp|P1|CET1\r\nEVV;VQL;b\r\n", "a.txt"),
    ],
    ids=["fasta", "wrapped", "gz-crlf", "cell", "quoted-cell", "columns", "columns-sniffed"],
)
def test_pairs_in_every_kind_of_file(tmp_path: Path, content: bytes, name: str) -> None:
    reading = read(tmp_path, content, name)
    assert sequences(reading) == [("sp|P1|CET1", "VQLSS|EVVIK"), ("b", "VQL|EVV")]
    assert [record.chains for record in reading.records] == [("VQLSS", "EVVIK"), ("VQL", "EVV")]
    assert reading.lengths == [10, 6]
    assert [id.split("|")[1:2] for id in reading.ids] == [["P1"], []]


def test_pairs_in_lines_and_literals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = read(tmp_path, b"VQL|EVV\nV Q L | E V V\nVQL | EVV\n", "a.txt")
    assert sequences(lines) == [("1", "VQL|EVV"), ("2", "VQL|EVV"), ("3", "VQL|EVV")]
    assert lines.changes == [
        "no '>' found: 3 lines read as one sequence each",
        "spaces removed in 2 sequences",
    ]
    assert message(tmp_path, b"cet VQL|EVV\n", "a.txt") == (
        "a.txt: line 1: several words in a line that is read as one sequence\n"
        "What to do: write FASTA (`>name`, then the sequence), or a table with a first line such as `id,sequence`"
    )
    assert read_records("VQL | EVV").records == [Record("1", "VQL|EVV", "", 0, 1)]
    with pytest.raises(InputError) as error:
        read_records("VQL|")
    assert str(error.value) == f"the literal sequence: record 1 '1': no light chain\n{INCOMPLETE}"


def test_each_chain_is_tidied(tmp_path: Path) -> None:
    reading = read(tmp_path, b">a\nvQL** | E<mask>vV*\n>b\nV-Q.L*|*E*V\n", on_stop="X", strip_gaps=True)
    assert sequences(reading) == [("a", "VQL|E<mask>VV"), ("b", "VQL|XEXV")]
    assert reading.changes == [
        "spaces removed in 1 sequences",
        "terminal stops (*) removed from 2 sequences",
        "2 lowercase letters upper-cased",
        "2 gaps (- or .) removed",
        "2 inner stops (*) read as X",
    ]
    assert reading.lengths == [7, 7]
    lower = read(tmp_path, b">a\nDVV|pQ*\n", case="lower")
    assert sequences(lower) == [("a", "dvv|pq")]


@pytest.mark.parametrize(
    ("sequence", "line", "reason", "hint"),
    [
        (b"VQL|", 1, "no light chain", INCOMPLETE),
        (b"VQL|*", 1, "no light chain", INCOMPLETE),
        (b" |EVV", 1, "no heavy chain", INCOMPLETE),
        (b"|", 1, "no heavy and no light chain", INCOMPLETE),
        (b"A||B", 1, "3 chains", "What to do: a pair is HEAVY|LIGHT: two chains with one | between them"),
        (b"A|B|C|D", 1, "4 chains", "What to do: a pair is HEAVY|LIGHT: two chains with one | between them"),
        (
            b"VQL|E\nV1V",
            3,
            "'1' at position 3 of the light chain",
            "What to do: sequences hold the letters A-Z, and <mask> or | where the model has them",
        ),
        (
            b"VQL**|E\nV1V",
            3,
            "'1' at position 3 of the light chain",
            "What to do: sequences hold the letters A-Z, and <mask> or | where the model has them",
        ),
        (
            b"V*\nQL|EVV",
            2,
            "'*' at position 2 of the heavy chain",
            "What to do: a stop inside a sequence: --on-stop X reads it as X, --on-stop skip leaves the sequence out",
        ),
        (
            b"VQL|\nE-V",
            3,
            "'-' at position 2 of the light chain",
            "What to do: gaps of an alignment: --strip-gaps removes them",
        ),
    ],
)
def test_bad_pairs(tmp_path: Path, sequence: bytes, line: int, reason: str, hint: str) -> None:
    content = b">cet x\n" + sequence + b"\n>good\nVQL|EVV\n"
    assert message(tmp_path, content) == f"antibodies.fasta: line {line}, record 1 'cet': {reason}\n{hint}"


def test_pairs_and_single_chains_do_not_mix(tmp_path: Path) -> None:
    hint = "What to do: give all records as pairs HEAVY|LIGHT, or none"
    assert message(tmp_path, b">a\nVQL|EVV\n>b\nVQL\n>c\nVQL|EVV\n>d\nEVV\n>e\nV|E\n") == (
        "antibodies.fasta: 2 faults\n"
        "  line 3, record 2 'b': a single chain among pairs\n"
        "  line 7, record 4 'd': a single chain among pairs\n" + hint
    )
    assert message(tmp_path, b"id,seq\na,VQL\nb,VQL|EVV\nc,EVV\n", "t.csv") == (
        f"t.csv: line 3, record 2 'b': a pair among single chains\n{hint}"
    )
    # As many of either: a chain that was forgotten is likelier than one too many. Other faults keep their place.
    assert message(tmp_path, b">a\nVQL\n>b\nM1\n>c\nVQL|EVV\n") == (
        "antibodies.fasta: 2 faults\n"
        "  line 1, record 1 'a': a single chain among pairs\n"
        f"  line 4, record 2 'b': '1' at position 2\n{hint}\n"
        "What to do: sequences hold the letters A-Z, and <mask> or | where the model has them"
    )


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda table: table.replace(b"\n", b"\r\n")])
def test_therapeutic_antibodies(tmp_path: Path, pack: Any) -> None:
    """The table as it is published: of four columns with sequences, those of the first arm."""
    reading = read(tmp_path, pack(WHOLE_TABLE), "therasabdab.tsv")
    assert sequences(reading) == PAIRS and len(PAIRS) == 8
    assert reading.changes == [NOTE]
    assert reading.lengths == [len(row[2]) + len(row[3]) for row in WHOLE]
    assert reading.records[2].line == 4
    second = read(
        tmp_path,
        pack(WHOLE_TABLE),
        "therasabdab.tsv",
        heavy_column="heavy_sequence_(if bispec)",
        light_column="Light Sequence (if bispec)",
        empty="skip",
    )
    bispecific = next(row for row in ROWS if row[4])
    assert [list(record.chains) for record in second.records] == [bispecific[4:6]] and second.changes == []


def test_therapeutic_antibodies_without_a_chain(tmp_path: Path) -> None:
    assert message(tmp_path, TABLE, "therasabdab.tsv") == (
        "therasabdab.tsv: 2 faults\n"
        "  line 7, record 6 'Caplacizumab': no light chain\n"
        f"  line 10, record 9 'Lulizumab': no heavy chain\n{INCOMPLETE}"
    )
    reading = read(tmp_path, TABLE, "therasabdab.tsv", empty="skip")
    assert sequences(reading) == PAIRS
    hint = INCOMPLETE.removeprefix("What to do: ")
    assert reading.failed == [
        Fault("no light chain", hint, 7, 6, "Caplacizumab"),
        Fault("no heavy chain", hint, 10, 9, "Lulizumab"),
    ]
    heavy = read(tmp_path, TABLE, "therasabdab.tsv", column="Heavy Sequence", empty="skip")
    assert sequences(heavy) == [(row[0], row[2]) for row in ROWS if row[2]]


@pytest.mark.parametrize("cell", [b"", b" ", b"na", b"NA", b"N/A", b"NaN", b"None", b"NULL", b"-"])
def test_cells_that_say_no_chain(tmp_path: Path, cell: bytes) -> None:
    """All but the first two and the last could be residues; in a column of chains nobody means them so."""
    expected = f"t.csv: line 2, record 1 'a': no light chain\n{INCOMPLETE}"
    assert message(tmp_path, b"id,heavy,light\na,VQL," + cell + b"\n", "t.csv") == expected
    assert message(tmp_path, b"id,heavy,light\na,VQL\n", "t.csv") == expected  # a row that ends early
    assert read(tmp_path, b"id,sequence\na,NA\n", "t.csv").records[0].sequence == "NA"


def test_observed_antibody_space(tmp_path: Path) -> None:
    """Its files begin with a line of JSON, and its sequence_heavy is DNA, which would pass for a protein."""
    content = (
        b'"{""Run"": ""SRR10358523"", ""Species"": ""human""}"\n'
        b"sequence_id_heavy,sequence_heavy,sequence_alignment_aa_heavy,sequence_id_light,sequence_light,"
        b"sequence_alignment_aa_light\n"
        b"AAACCTG-1_contig_2,GTGCAGCTG,VQL,AAACCTG-1_contig_1,GAAGTTGTT,EVV\n"
    )
    reading = read(tmp_path, gzip.compress(content), "SRR10358523_paired.csv.gz")
    assert reading.records == [Record("AAACCTG-1_contig_2", "VQL|EVV", "AAACCTG-1_contig_2", 3, 1)]
    assert reading.changes == [
        "the first line, which is JSON, left out",
        "heavy chains read from column 'sequence_alignment_aa_heavy', light chains from column "
        "'sequence_alignment_aa_light'",
    ]


def test_a_column_of_sequences_goes_first(tmp_path: Path) -> None:
    content = b"id,Sequence,VH,VL\na,MKTV,VQL,EVV\n"
    reading = read(tmp_path, content, "t.csv")
    assert sequences(reading) == [("a", "MKTV")]
    assert reading.changes == ["column 'Sequence' read; --heavy-column 'VH' --light-column 'VL' reads pairs"]
    assert read(tmp_path, content, "t.csv", column="sequence").changes == []
    chosen = read(tmp_path, content, "t.csv", heavy_column="vh", light_column="vl")
    assert sequences(chosen) == [("a", "VQL|EVV")] and chosen.changes == []
    braces = read(
        tmp_path, b"id,Heavy {aa},Light {}\na,VQL,EVV\n", "t.csv", heavy_column="heavy {AA}", light_column="light_{}"
    )
    assert sequences(braces) == [("a", "VQL|EVV")]


@pytest.mark.parametrize(
    "asked",
    [{"heavy_column": "VH"}, {"light_column": "VL"}, {"column": "x", "heavy_column": "VH", "light_column": "VL"}],
)
def test_one_column_or_two(tmp_path: Path, asked: dict[str, str]) -> None:
    assert message(tmp_path, b"id,VH,VL\na,VQL,EVV\n", "t.csv", **asked) == (
        "t.csv: two columns hold pairs, one column holds sequences\n"
        "What to do: give --heavy-column and --light-column, or --column alone"
    )


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    assert message(tmp_path, b"id,VH,VL\na,VQL,EVV\n", "t.csv", heavy_column="H", light_column="L") == (
        "t.csv: 2 faults\n  line 1: no column for --heavy-column H\n  line 1: no column for --light-column L\n"
        "What to do: choose one with --heavy-column; there are: id, VH, VL\n"
        "What to do: choose one with --light-column; there are: id, VH, VL"
    )
    assert message(tmp_path, b"id,VH,light\na,VQL,EVV\n", "t.csv") == (
        "t.csv: line 1: no column of sequences\n"
        "What to do: choose one with --column, or two with --heavy-column and --light-column; there are: id, VH, light"
    )
    assert message(tmp_path, b">a\nVQL|EVV\n", heavy_column="VH", light_column="VL") == (
        "antibodies.fasta: this is FASTA, which has no columns\nWhat to do: leave the column away"
    )


texts = st.text("MKTVkt*-. 1", max_size=12)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(heavy=texts, light=texts, on_stop=st.sampled_from(["error", "X", "skip"]), strip_gaps=st.booleans())
def test_a_pair_reads_as_its_chains_do(tmp_path: Path, heavy: str, light: str, on_stop: str, strip_gaps: bool) -> None:
    def attempt(text: str) -> tuple[str, ...]:
        try:
            reading = read(tmp_path, f">a\n{text}\n".encode(), on_stop=on_stop, strip_gaps=strip_gaps, empty="skip")
        except InputError as error:
            return ("fault", re.sub(" of the .* chain", "", error.faults[0].reason))
        if not reading.records:
            return ("left out", re.sub(" of the .* chain", "", reading.failed[0].reason))
        return reading.records[0].chains

    one, other, pair = attempt(heavy), attempt(light), attempt(f"{heavy}|{light}")
    if len(one) == len(other) == 1:
        assert pair == one + other
    elif ("left out", "empty sequence") in (one, other):
        assert pair[0] == "left out" and re.fullmatch("no (heavy|light|heavy and no light) chain", pair[1])
    else:
        assert pair == (one if len(one) == 2 else other)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.lists(texts, min_size=1, max_size=5),
    on_stop=st.sampled_from(["error", "X", "skip"]),
    strip_gaps=st.booleans(),
)
def test_single_chains_against_the_rules_spelt_out(
    tmp_path: Path, raw: list[str], on_stop: str, strip_gaps: bool
) -> None:
    """The reader's short cuts for plain records give what the rules give, one after the other."""
    tidy = {}
    for i, text in enumerate(raw):
        text = text.replace(" ", "")
        text = text.replace("-", "").replace(".", "") if strip_gaps else text
        text = text.rstrip("*").upper()
        text = text.replace("*", "X") if on_stop == "X" else text
        tidy[str(i)] = text
    bad = [i for i, text in tidy.items() if not (text.isascii() and text.isalpha())]
    content = "".join(f">{i}\n{text}\n" for i, text in enumerate(raw)).encode()
    try:
        reading = read(tmp_path, content, on_stop=on_stop, strip_gaps=strip_gaps)
    except InputError as error:
        found = {fault.id for fault in error.faults}
        assert found == set(bad) or (on_stop == "skip" and found < set(bad))
    else:
        assert sequences(reading) == [(i, text) for i, text in tidy.items() if i not in bad]
        assert [fault.id for fault in reading.failed] == bad
        assert all("*" in tidy[i] for i in bad)
