"""plm annotate: the most probable of each protein as a list, or vectors of all; with a user's own terms."""

import csv
import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ESM2, KNOWN, SEQUENCE, Plm, no_model_is_loaded, outputs, save_tiny_proteinbert
from test_cli_signals import interrupt, long_input, start

import plm
from plm.annotation import ranked
from plm.outputs import read_embeddings

TERMS = "".join(f"{i}\tGO:{i + 2:07}\tname, {i}\n" for i in range(40))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_proteinbert(tmp_path_factory.mktemp("models") / "proteinbert_tiny")


@pytest.fixture
def table(tmp_path: Path) -> str:
    (tmp_path / "go.tsv").write_text(TERMS)
    return "go.tsv"


@pytest.fixture
def fasta(tmp_path: Path) -> str:
    (tmp_path / "in.fasta").write_text("".join(f">{id}\n{sequence}\n" for id, sequence in KNOWN.items()))
    return "in.fasta"


def expected(tiny: str, **options: Any) -> dict[str, torch.Tensor]:
    return dict(zip(KNOWN, plm.annotate(plm.load(tiny), KNOWN.values(), **options), strict=True))


def read_list(text: str, delimiter: str = ",") -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The provenance of a list, and its rows."""
    comment, *lines = text.splitlines()
    return json.loads(comment.removeprefix("#")), list(csv.DictReader(lines, delimiter=delimiter))


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_lists_hold_the_ten_most_probable(run: Plm, tiny: str, fasta: str, suffix: str, delimiter: str) -> None:
    code, out, err = run("annotate", fasta, "-m", tiny, "-o", f"out.{suffix}")
    assert (code, out) == (0, "") and err.startswith("3 proteins, 83 residues in ")
    provenance, rows = read_list(Path(f"out.{suffix}").read_text(), delimiter)
    assert list(rows[0]) == ["id", "index", "probability"]
    assert [row["id"] for row in rows] == [id for id in KNOWN for _ in range(10)]
    for id, found in expected(tiny).items():
        of_it = [row for row in rows if row["id"] == id]
        assert [int(row["index"]) for row in of_it] == found.argsort(descending=True)[:10].tolist()
        written = np.float32([row["probability"] for row in of_it])
        np.testing.assert_array_equal(written, found.sort(descending=True).values[:10].numpy())
    told = {name: provenance[name] for name in ("model", "pad_to", "listed", "terms", "terms_sha256", "partial_terms")}
    assert told == {
        "model": "proteinbert_tiny",
        "pad_to": None,
        "listed": "top 10",
        "terms": None,
        "terms_sha256": None,
        "partial_terms": False,
    }


def test_names_are_those_of_the_users_table(run: Plm, tiny: str, fasta: str, table: str) -> None:
    code, out, _ = run("annotate", fasta, "-m", tiny, "--terms", table, "--top", "3", "--pad-to", "70")
    provenance, rows = read_list(out)
    assert code == 0 and list(rows[0]) == ["id", "index", "term", "name", "probability"] and len(rows) == 9
    for row in rows:
        index = int(row["index"])
        assert (row["term"], row["name"]) == (f"GO:{index + 2:07}", f"name, {index}")
    own, padded = expected(tiny), expected(tiny, pad_to=70)
    assert [int(row["index"]) for row in rows[:3]] == ranked(padded["P1"], top=3)
    assert not torch.equal(own["P1"], padded["P1"])
    assert (provenance["pad_to"], provenance["listed"], provenance["terms"]) == (70, "top 3", "go.tsv")
    assert provenance["terms_sha256"] == hashlib.sha256(TERMS.encode()).hexdigest()


def test_a_partial_table_has_to_be_meant(run: Plm, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "part.tsv").write_text("3\tGO:0000005\n")
    argv = ("annotate", SEQUENCE, "-m", tiny, "--terms", "part.tsv", "--all", "--format", "jsonl")
    code, out, err = run(*argv)
    assert (code, out) == (4, "") and "1 terms, and the model has 40 outputs; the first without one is 0" in err
    code, out, _ = run(*argv, "--partial-terms")
    first, *rows = map(json.loads, out.splitlines())
    assert code == 0 and first["provenance"]["partial_terms"] is True and len(rows) == 40
    assert {row["index"]: row["term"] for row in rows} == {**dict.fromkeys(range(40)), 3: "GO:0000005"}


def test_what_is_probable_enough(run: Plm, tiny: str, fasta: str) -> None:
    """A protein with nothing so probable has no row, and that is said."""
    found = expected(tiny)
    highest = sorted(float(each.max()) for each in found.values())
    least = (highest[0] + highest[1]) / 2
    code, out, err = run("annotate", fasta, "-m", tiny, "--min-probability", repr(least))
    provenance, rows = read_list(out)
    assert code == 0 and provenance["listed"] == f"probability of at least {least:g}"
    wanted = {id: int((each >= least).sum()) for id, each in found.items()}
    assert {id: [row["id"] for row in rows].count(id) for id in KNOWN} == wanted and 0 in wanted.values()
    assert f"Note: 1 of 3 proteins have no annotation with a probability of at least {least:g}, and no row" in err
    assert "Note" not in run("annotate", fasta, "-m", tiny, "--min-probability", repr(least), "--quiet").err


def test_all_of_them(run: Plm, tiny: str, fasta: str) -> None:
    code, out, _ = run("annotate", fasta, "-m", tiny, "--all")
    provenance, rows = read_list(out)
    assert code == 0 and provenance["listed"] == "all"
    assert [row["id"] for row in rows] == [id for id in KNOWN for _ in range(40)]


@pytest.mark.parametrize("name", ["out.safetensors", "out.npz", "out.h5", "out.parquet", "bio.h5"])
def test_vectors_hold_all_of_them(run: Plm, tiny: str, fasta: str, name: str) -> None:
    argv = ("--format", "bio-h5") if name == "bio.h5" else ()
    assert run("annotate", fasta, "-m", tiny, "-o", name, "--pad-to", "70", *argv).code == 0
    back = read_embeddings(name)
    assert back.ids == list(KNOWN) and back.provenance["annotations"] == 40 and back.provenance["pad_to"] == 70
    for array, wanted in zip(back.arrays, expected(tiny, pad_to=70).values(), strict=True):
        np.testing.assert_array_equal(array, wanted.numpy())


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--json",), "with --json the summary goes to stdout: give the annotations a file"),
        (("--top", "3", "--all"), "--top and --all choose what is listed: give one of them"),
        (("--top", "3", "--min-probability", "0.5"), "--top and --min-probability choose"),
        (("--min-probability", "0", "--all"), "--min-probability and --all choose"),
        (("--top", "0"), "--top"),
        (("--min-probability", "1.5"), "--min-probability"),
        (("--min-probability", "nan"), "--min-probability': nan is not in the range 0<=x<=1"),
        (("--pad-to", "2"), "--pad-to"),
        (("--partial-terms",), "--partial-terms is of a table: give it with --terms"),
        (("--top", "3", "-o", "out.h5"), "--top is of a list, and out.h5 holds whole vectors: write .csv"),
        (("--terms", "go.tsv", "-o", "out.npz"), "--terms is of a list, and out.npz holds whole vectors"),
        (("-o", "out.txt"), "use .csv, .tsv, .jsonl, .safetensors, .npz, .h5, .hdf5, .parquet, or --format"),
        (("-o", "out/"), "out/ is not named like a layout of annotations"),
        (("--format", "npz"), "stdout takes csv, tsv or jsonl, not npz"),
    ],
)
def test_usage_errors(
    run: Plm, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], told: str
) -> None:
    no_model_is_loaded(monkeypatch)
    code, out, err = run("annotate", SEQUENCE, "-m", ESM2, *argv)
    assert (code, out) == (2, "") and told in err and "Usage: plm annotate" in err
    assert outputs(tmp_path, table) == []


def test_the_users_table_is_kept(run: Plm, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under whatever name the output means it."""
    no_model_is_loaded(monkeypatch)
    (tmp_path / "link.csv").symlink_to(table)
    for name in (table, f"./{table}", "link.csv"):
        code, out, err = run("annotate", SEQUENCE, "-m", ESM2, "--terms", table, "-o", name, "--overwrite")
        assert (code, out) == (2, "") and f"{name} is the file of --terms; --overwrite would destroy it" in err
    assert (tmp_path / table).read_text() == TERMS


def test_a_faulty_table_is_told_before_a_model_is_loaded(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_model_is_loaded(monkeypatch)
    (tmp_path / "go.tsv").write_text("0\tGO:0000002\n0\tGO:3\n")
    code, out, err = run("annotate", SEQUENCE, "-m", ESM2, "--terms", "go.tsv", "-o", "out.csv")
    assert (code, out) == (4, "") and "line 2: 'GO:3' is no GO id" in err and "line 2: index 0 is also in line 1" in err
    assert run("annotate", SEQUENCE, "-m", ESM2, "--terms", "none.tsv").code == 4
    assert outputs(tmp_path, "go.tsv") == []


def test_models_and_sequences_that_cannot_be(run: Plm, tiny: str, table: str, tmp_path: Path) -> None:
    code, out, err = run("annotate", SEQUENCE, "-m", ESM2, "-o", "out.csv")
    assert (code, out) == (2, "") and "esm2_tiny predicts no annotations; use a ProteinBERT" in err
    (tmp_path / "longer.tsv").write_text(TERMS + "40\tGO:0000042\n")
    code, out, err = run("annotate", SEQUENCE, "-m", tiny, "--terms", "longer.tsv", "-o", "out.csv")
    assert (code, out) == (4, "") and "longer.tsv: line 41: index 40; the model has 40 outputs, from 0 to 39" in err
    (tmp_path / "in.fasta").write_text(f">a\nMKT\n>b\n{'M' * 19}\n>c\n{'A' * 30}\n")
    argv = ("annotate", "in.fasta", "-m", tiny, "--pad-to", "20", "-o", "out.csv")
    code, out, err = run(*argv)
    assert (code, out) == (4, "") and "in.fasta: 2 faults" in err
    assert "line 3, record 2 'b': 19 residues; pad_to=20 takes at most 18" in err
    assert outputs(tmp_path, "in.fasta", "longer.tsv", table) == []
    code, _, err = run(*argv, "--too-long", "skip", "--top", "1")
    assert code == 3 and err.count("Failed: ") == 2
    assert [row["id"] for row in read_list(Path("out.csv").read_text())[1]] == ["a"]


def test_summary_as_json(run: Plm, tiny: str, fasta: str) -> None:
    code, out, err = run("annotate", fasta, "-m", tiny, "-o", "out.csv", "--json", "--quiet")
    summary = json.loads(out)
    assert (code, err) == (0, "")
    assert (summary["proteins"], summary["residues"], summary["output"]) == (3, 83, "out.csv")


def test_whole_or_not_at_all(run: Plm, tiny: str, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure midway leaves no output, and an old one is what it was."""
    (tmp_path / "old.csv").write_text("precious")
    assert run("annotate", fasta, "-m", tiny, "-o", "old.csv").code == 4
    order = iter([ranked])
    monkeypatch.setattr("plm.annotation.ranked", lambda *given, **how: next(order, interrupted)(*given, **how))
    assert run("annotate", fasta, "-m", tiny, "-o", "old.csv", "--overwrite").code == 130
    assert outputs(tmp_path, "in.fasta") == ["old.csv"] and (tmp_path / "old.csv").read_text() == "precious"


def interrupted(*given: object, **how: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_writes(tmp_path: Path, number: signal.Signals) -> None:
    model = save_tiny_proteinbert(tmp_path / "tiny")
    process = start(tmp_path, "annotate", long_input(tmp_path), "-o", "out.csv", model=model)
    out, err = interrupt(process, tmp_path, number)
    assert (process.returncode, out, err) == (130, "", "Error: interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", "tiny"]
