"""plm variants: every column of the table kept, the numbers of Python added, scans, pictures, and refusals."""

import csv
import gzip
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from command_line import ESM1B, ESM2, SEQUENCE, Plm, no_model_is_loaded, outputs

import plm
from plm import variant_effects
from plm.cli.variants import _models_given
from plm.mutations import single_substitutions
from plm.ranks import spearman
from plm.sequences.assays import read_assay

EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
PROGEN2 = str(Path(__file__).parent / "golden" / "progen2" / "half_rotary_buffers")
ROWS = [
    ["mutant", "DMS_score", 'odd, "quoted" name', "empty", "target_seq"],
    ["M1A", "0.10", "a,b", "", SEQUENCE],
    ["K2E:T3A", "-1e3", "two\nlines", "", SEQUENCE],
    ["WT", "007", ' "spaces" ', "", SEQUENCE],
    ["Y5F", "", "µ", "", SEQUENCE],
    ["M1A", "NaN", "again", "", SEQUENCE],
    ["Q22W", "2.5", "last", "", SEQUENCE],
]
NAMES = [row[0] for row in ROWS[1:]]


@pytest.fixture
def assay(tmp_path: Path) -> str:
    return write(tmp_path / "assay.csv", ROWS)


def write(path: Path, rows: list[list[str]], delimiter: str = ",") -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path.name


def read(path: str | Path, delimiter: str = ",") -> tuple[dict[str, Any], list[list[str]]]:
    """The provenance of a table, and its rows."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        comment = file.readline()
        return json.loads(comment.removeprefix("#")), list(csv.reader(file, delimiter=delimiter))


def scores(model: str, names: list[str], **settings: Any) -> list[str]:
    return [repr(value) for value in plm.variants(plm.load(model), SEQUENCE, names, **settings)]


# Tables


@pytest.mark.parametrize("how", ["masked-marginals", "wt-marginals", "pseudo-ppl", "pseudo-ppl-published"])
def test_every_cell_is_kept_and_a_column_added(run: Plm, assay: str, how: str) -> None:
    code, out, err = run("variants", assay, "-m", ESM2, "--sequence", SEQUENCE, "--how", how, "-o", "out.csv")
    provenance, rows = read("out.csv")
    assert (code, out) == (0, "") and "6 variants in " in err and err.rstrip().endswith("-> out.csv")
    assert [row[:-1] for row in rows] == ROWS
    assert [row[-1] for row in rows] == ["esm2_tiny", *scores(ESM2, NAMES, how=how)]
    assert (provenance["how"], provenance["offset"], provenance["model"]) == (how, 1, "esm2_tiny")
    assert provenance["wild_types"] == [SEQUENCE] and len(provenance["input_sha256"]) == 64


def test_in_other_layouts_and_from_other_files(run: Plm, assay: str, tmp_path: Path) -> None:
    wanted = [["esm2_tiny", *scores(ESM2, NAMES)][i] for i in range(7)]
    write(tmp_path / "assay.tsv", ROWS, "\t")
    (tmp_path / "marked.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / assay).read_bytes()))
    (tmp_path / "wild.fasta").write_text(f">w\n{SEQUENCE[:10].lower()}\n{SEQUENCE[10:]}\n")
    for source in ("assay.tsv", "marked.csv.gz"):
        assert run("variants", source, "-m", ESM2, "--sequence", "wild.fasta", "-o", f"{source}.tsv").code == 0
        _, rows = read(f"{source}.tsv", "\t")
        assert [row[:-1] for row in rows] == ROWS and [row[-1] for row in rows] == wanted
    code, out, _ = run("variants", assay, "-m", ESM2, "--sequence-column", "target_seq", "--format", "jsonl")
    first, *lines = map(json.loads, out.splitlines())
    assert code == 0 and first["provenance"]["model"] == "esm2_tiny"
    assert [[*line.values()][:-1] for line in lines] == ROWS[1:]
    assert [repr(line["esm2_tiny"]) for line in lines] == wanted[1:]


def test_the_output_is_an_input(run: Plm, assay: str) -> None:
    assert run("variants", assay, "-m", ESM2, "--sequence", SEQUENCE, "-o", "one.csv").code == 0
    code, _, err = run("variants", "one.csv", "-m", ESM1B, "--sequence", SEQUENCE, "-o", "two.csv")
    assert code == 0 and "the first line, which says where the table came from, left out" in err
    assert [row[-2:] for row in read("two.csv")[1]] == [
        ["esm2_tiny", "esm1b_tiny"],
        *map(list, zip(scores(ESM2, NAMES), scores(ESM1B, NAMES), strict=True)),
    ]


def test_a_wild_type_in_every_row(run: Plm, tmp_path: Path) -> None:
    rows = [["mutant", "wild"], ["M1A", "MKT"], ["V2A", "AVL"], ["K2A", "MKT"]]
    code, out, _ = run("variants", write(tmp_path / "in.csv", rows), "-m", ESM2, "--sequence-column", "wild")
    model = plm.load(ESM2)
    one, three = plm.variants(model, "MKT", ["M1A", "K2A"])
    (two,) = plm.variants(model, "AVL", ["V2A"])
    assert code == 0 and [line.rpartition(",")[2] for line in out.splitlines()[2:]] == [*map(repr, (one, two, three))]


def test_whole_sequences_of_any_length(run: Plm, tmp_path: Path) -> None:
    """As the indels of ProteinGym."""
    texts = [SEQUENCE[1:], SEQUENCE + "G", SEQUENCE]
    source = write(tmp_path / "in.csv", [["mutated_sequence"], *([text] for text in texts)])
    for model, argv, how in ((ESM2, ("--how", "pseudo-ppl"), "pseudo-ppl"), (PROGEN2, (), "likelihood")):
        code, out, err = run("variants", source, "-m", model, "--sequence", SEQUENCE, *argv)
        assert code == 0 and "variants read from column 'mutated_sequence'" in err
        assert [line.rpartition(",")[2] for line in out.splitlines()[2:]] == scores(model, texts, how=how)
    code, _, err = run("variants", source, "-m", ESM2, "--sequence", SEQUENCE)
    assert code == 4 and "line 2, record 1" in err and "--how pseudo-ppl" in err


def test_an_ensemble_has_a_column_for_each_and_their_mean(run: Plm, assay: str) -> None:
    code, out, err = run("variants", assay, "-m", ESM2, "-m", ESM1B, "--sequence", SEQUENCE, "-o", "out.csv", "--json")
    provenance, rows = read("out.csv")
    each = [scores(model, NAMES) for model in (ESM2, ESM1B)]
    mean = [repr(fmean(map(float, pair))) for pair in zip(*each, strict=True)]
    assert code == 0 and [row[-3:] for row in rows] == [
        ["esm2_tiny", "esm1b_tiny", "mean"], *map(list, zip(*each, mean, strict=True))
    ]  # fmt: skip
    assert [source["model"] for source in provenance["ensemble"]] == ["esm2_tiny", "esm1b_tiny"]
    assert json.loads(out)["model"] == "esm2_tiny + esm1b_tiny" and "with esm2_tiny + esm1b_tiny" in err
    assert _models_given(None, None, ("esm1v-all",)) == tuple(f"esm1v-{i}" for i in range(1, 6))  # type: ignore[arg-type]


def test_the_assay(run: Plm, assay: str) -> None:
    argv = ("variants", assay, "-m", ESM2, "--sequence", SEQUENCE, "--assay-column", "DMS_score", "-o", "out.csv")
    code, out, err = run(*argv, "--json")
    found = [float(value) for value in scores(ESM2, ["M1A", "K2E:T3A", "WT", "Q22W"])]
    wanted = spearman(found, [0.1, -1000, 7, 2.5])
    assert code == 0 and f"Spearman of esm2_tiny with DMS_score: {wanted:.4f} over 4 variants" in err
    assert "2 rows without a number in 'DMS_score' are not in the correlation: lines 6, 7" in err
    assert json.loads(out)["spearman"] == {"esm2_tiny": wanted}
    assert run(*argv, "--overwrite", "--quiet").err == ""


# Scans


def test_a_scan(run: Plm) -> None:
    names = single_substitutions("MKTA", offset=24)
    code, out, err = run("variants", "--scan", "MKTA", "-m", ESM2, "--offset", "24")
    _, head, *rows = out.splitlines()
    wanted = plm.variants(plm.load(ESM2), "MKTA", names, offset=24)
    assert code == 0 and "76 variants" in err and head == "mutant,position,wild_type,residue,esm2_tiny"
    assert rows == [f"{n},{n[1:-1]},{n[0]},{n[-1]},{value!r}" for n, value in zip(names, wanted, strict=True)]


@pytest.mark.parametrize("argv", [("-o", "scan.png"), ("-o", "scan.csv", "--heatmap", "scan.png")])
def test_a_heat_map(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]) -> None:
    """20 rows, a column per residue, the wild type's own cells left to the drawing."""
    from PIL import Image

    from plm.cli import drawing

    drawn: list[Any] = []
    real = drawing.draw_scan
    monkeypatch.setattr(drawing, "draw_scan", lambda *given, **named: (drawn.append(given), real(*given, **named))[1])
    code, out, _ = run("variants", "--scan", SEQUENCE, "-m", ESM2, *argv)
    assert (code, out) == (0, "") and outputs(tmp_path) == sorted(name for name in argv if "." in name)
    scores, wild_type = drawn[0][:2]
    names = dict(zip(single_substitutions(SEQUENCE), map(float, all_scores()), strict=True))
    for row, letter in enumerate(drawing.RESIDUES):
        for place, old in enumerate(SEQUENCE):
            value = scores[row][place]
            assert value != value if letter == old else value == names[f"{old}{place + 1}{letter}"]
    with Image.open(tmp_path / "scan.png") as picture:
        assert json.loads(picture.text["Description"])["how"] == "masked-marginals"  # type: ignore[attr-defined]
        assert wild_type == SEQUENCE and min(picture.size) > 500


def all_scores() -> list[str]:
    return scores(ESM2, single_substitutions(SEQUENCE))


def test_a_long_protein_and_one_without_contrast_are_drawn(tmp_path: Path) -> None:
    from plm.plots import RESIDUES, draw_scan

    for length, value in ((1, 0.0), (250, -1.0), (1700, 2.0)):
        path = tmp_path / f"{length}.png"
        draw_scan([[value] * length for _ in RESIDUES], ("MKX" * length)[:length], path, title="$x$")
        assert path.stat().st_size > 1000


# The real assay


def test_a_real_assay_from_end_to_end(run: Plm, tmp_path: Path) -> None:
    """4,996 mutants of a beta-lactamase with the model that ships with plm, and what ESM-1v's authors published."""
    source, wild = str(EXAMPLES / "blat_ecolx.csv.gz"), str(EXAMPLES / "blat_ecolx.fasta")
    code, out, err = run(
        "variants", source, "-m", "plm-mini", "--how", "wt-marginals", "--sequence", wild, "--offset", "24",
        "--assay-column", "2500", "-o", "scored.csv", "--json",
    )  # fmt: skip
    assert code == 0 and "Spearman of plm-mini with 2500: " in err and "over 4,996 variants" in err
    before, (_, rows) = read_assay(source), read(tmp_path / "scored.csv")
    assert [row[:-1] for row in rows] == [before.columns, *before.rows]
    found = json.loads(out)["spearman"]["plm-mini"]
    assert found == spearman([float(row[-1]) for row in rows[1:]], before.numbers("2500")) and -1 < found < 1
    # What ESM-1v's authors published beside the assay; a known 0.66, to the two digits in which it was measured before.
    assert spearman(before.numbers("esm1v_t33_650M_UR90_1"), before.numbers("2500")) == pytest.approx(0.66, abs=0.005)


# Errors


def test_variants_that_do_not_match_are_all_named(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model_is_loaded(monkeypatch)
    rows = [["mutant", "note"], ["A1M", "two\nlines"], ["M1A", ""], ["K22E", ""], ["W99A", ""], ["hello!", ""]]
    code, out, err = run(
        "variants", write(tmp_path / "in.csv", rows), "-m", ESM2, "--sequence", SEQUENCE, "-o", "o.csv"
    )
    assert (code, out) == (4, "") and outputs(tmp_path, "in.csv") == []
    assert "in.csv: 4 faults" in err
    assert "line 2, record 1 'A1M': position 1 is M in the wild type; the variant says A" in err
    assert "line 5, record 3 'K22E': position 22 is Q in the wild type; the variant says K" in err
    assert "line 6, record 4 'W99A': position 99 is outside the wild type, which has 1 to 22" in err
    assert "line 7, record 5 'hello!': 'hello!' is no change of a sequence" in err


def test_letters_of_no_model_are_named_with_their_lines(run: Plm, tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", [["mutant"], ["M1A"], ["M1J"], ["K2J"]])
    code, out, err = run("variants", source, "-m", ESM2, "--sequence", SEQUENCE)
    assert (code, out) == (4, "") and "line 3, record 2 'M1J': character 'J'" in err and "line 4, record 3" in err


@pytest.mark.parametrize(
    ("text", "argv", "told"),
    [
        ("a,b\n1,2\n", (), "line 1: no column of variants, such as 'mutant'\nWhat to do: choose one with"),
        ("a,b\n1,2\n", (), "there are: 'a', 'b'"),
        (
            "a,b\n1,2\n",
            ("--mutant-column", "c"),
            "no column 'c'\nWhat to do: choose one with --mutant-column; there are",
        ),
        ("mutant,b\nM1A,2\n", ("--assay-column", "c"), "no column 'c'\nWhat to do: there are: 'mutant', 'b'"),
        ("mutant,b\nM1A,2\nM1C,x\n", ("--assay-column", "b"), "line 3: 'x' in column 'b' is no number"),
        ("mutant,b\nM1A,2,3\n", (), "line 2: 3 cells, and there are 2 columns"),
        ("mutant,b,b\nM1A,2,3\n", (), "more than one column is called 'b'"),
        ('mutant,b\nM1A,"2\n', (), "not a table"),
        ("mutant,b\n", (), "no variant in it"),
        ("", (), "no variant in it"),
        ("mutant,esm2_tiny\nM1A,2\n", (), "a column 'esm2_tiny' is there already"),
    ],
)
def test_bad_tables(run: Plm, tmp_path: Path, text: str, argv: tuple[str, ...], told: str) -> None:
    (tmp_path / "in.csv").write_text(text)
    code, out, err = run("variants", "in.csv", "-m", ESM2, "--sequence", SEQUENCE, "-o", "out.csv", *argv)
    assert (code, out) == (4, "") and told in err and "in.csv: " in err
    assert outputs(tmp_path, "in.csv") == []


def test_files_that_cannot_be_read(run: Plm, tmp_path: Path) -> None:
    (tmp_path / "torn.csv.gz").write_bytes(gzip.compress(b"mutant\nM1A\n" * 99)[:-12])
    for source, told in (("torn.csv.gz", "torn or damaged archive"), ("none.csv", "No such file")):
        code, _, err = run("variants", source, "-m", ESM2, "--sequence", SEQUENCE)
        assert code == 4 and told in err
    (tmp_path / "latin.csv").write_bytes("mutant,µ\nM1A,ü\n".encode("latin-1"))
    code, out, err = run("variants", "latin.csv", "-m", ESM2, "--sequence", SEQUENCE)
    assert code == 0 and "read as Latin-1" in err and out.splitlines()[1] == "mutant,µ,esm2_tiny"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("in.csv",), "give the wild type with --sequence or --sequence-column, or as the input with --scan"),
        (("in.csv", "--sequence", "MKT", "--sequence-column", "b"), "give the wild type with"),
        (("MKT", "--scan", "--sequence", "MKT"), "with --scan the input is the wild type: leave out --sequence"),
        (("MKT", "--scan", "--assay-column", "x"), "leave out --assay-column"),
        (("MKT", "--scan", "--json"), "give the scores a file with -o"),
        (("MKT", "--scan", "-o", "a.png", "--heatmap", "b.png"), "a.png and b.png are pictures"),
        (("MKT", "--scan", "-o", "a.npz"), "names no layout"),
        (("MKT", "--scan", "--how", "guess"), "--how"),
        (("MKT", "--scan", "-m", ESM2), "is given twice"),
        (("two.fasta", "--scan"), "two.fasta has 2 sequences; a wild type is one"),
        (("in.csv", "--sequence-column", "wild", "-o", "a.png"), "a heat map shows one wild type; the input has 2"),
        (("in.csv", "--sequence", "MKT", "-o", "in.csv", "--overwrite"), "in.csv is the input"),
        (
            ("in.csv", "--sequence", "wild.csv", "-o", "wild.csv", "--overwrite"),
            "wild.csv is the file of --sequence; --overwrite would destroy it",
        ),
    ],
)
def test_usage_errors(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], told: str
) -> None:
    no_model_is_loaded(monkeypatch)
    write(tmp_path / "in.csv", [["mutant", "wild"], ["M1A", "MKT"], ["M1A", "MKV"]])
    (tmp_path / "two.fasta").write_text(">a\nMKT\n>b\nMKV\n")
    (tmp_path / "wild.csv").write_text("sequence\nMKT\n")
    code, out, err = run("variants", *argv, "-m", ESM2)
    assert (code, out) == (2, "") and told in err and "Usage: plm variants" in err
    assert outputs(tmp_path, "in.csv", "two.fasta", "wild.csv") == []
    assert (tmp_path / "wild.csv").read_text() == "sequence\nMKT\n"
    assert run("variants", "MKT", "--scan").err.count("choose a model with -m") == 1


def test_what_a_model_cannot_do(run: Plm) -> None:
    for models, argv, told in (
        ((ESM2,), ("--how", "likelihood"), "Invalid value for --how: esm2_tiny has no likelihood"),
        ((PROGEN2,), ("--how", "wt-marginals"), "half_rotary_buffers reads in one direction"),
        ((ESM2,), ("--task", "nlu"), "Invalid value for --task"),
        ((ESM2, PROGEN2), (), "likelihood and masked-marginals have no common scale"),
    ):
        names = [part for model in models for part in ("-m", model)]
        code, out, err = run("variants", "--scan", "MKT", *names, *argv)
        assert (code, out) == (2, "") and told in err


def test_whole_or_not_at_all(run: Plm, assay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure midway leaves neither table nor picture, and an old one is what it was."""
    (tmp_path / "old.csv").write_text("precious")
    argv = ("variants", assay, "-m", ESM2, "--sequence", SEQUENCE, "--heatmap", "new.png")
    with monkeypatch.context() as patch:
        no_model_is_loaded(patch)
        code, _, err = run(*argv, "-o", "old.csv")
        assert code == 4 and "exists already" in err
    with monkeypatch.context() as patch:
        patch.setattr(variant_effects, "log_probs", lambda logits: logits / 0)
        for output in ("old.csv", "new.csv"):
            code, out, err = run(*argv, "-o", output, "--overwrite")
            assert (code, out) == (5, "") and "NaN or an infinity" in err
    assert outputs(tmp_path, assay) == ["old.csv"] and (tmp_path / "old.csv").read_text() == "precious"
    assert run(*argv, "-o", "old.csv", "--overwrite").code == 0
    assert outputs(tmp_path, assay) == ["new.png", "old.csv"] and len(read("old.csv")[1]) == len(ROWS)
