"""plm score: the numbers of Python in every layout, and a refusal of what a model or a layout cannot do."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import (
    ANKH,
    ESM2,
    HEAVY,
    LIGHT,
    PROTEINS,
    SEQUENCE,
    Plm,
    no_model_is_loaded,
    outputs,
    save_tiny_bert,
    save_tiny_progen2,
    save_tiny_t5,
)

import plm
from plm.outputs import read_embeddings
from plm.scoring import Score, own_log_probs


@pytest.fixture(scope="module")
def ankh(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_t5(tmp_path_factory.mktemp("models") / "ankh_tiny", ANKH)


@pytest.fixture(scope="module")
def progen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_progen2(tmp_path_factory.mktemp("models") / "progen2_tiny")


def read_csv(text: str, delimiter: str = ",") -> tuple[dict[str, Any], list[list[str]]]:
    """The provenance of a table, and its rows."""
    comment, *lines = text.splitlines()
    return json.loads(comment.removeprefix("#")), list(csv.reader(lines, delimiter=delimiter))


def table_of(scores: list[Score]) -> list[list[str]]:
    """What a table should hold: floats written so that they read back as the same number."""
    head = ["id", "residues", "log_likelihood", "mean"]
    rows = zip(PROTEINS, scores, strict=True)
    return [head, *([id, str(len(s.per_residue)), repr(s.total), repr(s.mean)] for id, s in rows)]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_hold_what_python_gives(
    run: Plm, model: plm.Model, fasta: str, tmp_path: Path, suffix: str, delimiter: str
) -> None:
    code, out, err = run("score", fasta, "-m", ESM2, "-o", f"out.{suffix}")
    assert (code, out) == (0, "") and err.startswith("3 proteins, 86 residues in ")
    provenance, rows = read_csv((tmp_path / f"out.{suffix}").read_text(), delimiter)
    assert rows == table_of(plm.score(model, PROTEINS.values()))
    assert (provenance["model"], provenance["how"], provenance["task"]) == ("esm2_tiny", "pseudo-likelihood", None)
    assert outputs(tmp_path, "in.fasta") == [f"out.{suffix}"]


def test_a_single_pass_to_stdout(run: Plm, model: plm.Model, fasta: str) -> None:
    code, out, _ = run("score", fasta, "-m", ESM2, "--how", "single-pass")
    provenance, rows = read_csv(out)
    assert code == 0 and rows == table_of(plm.score(model, PROTEINS.values(), how="single-pass"))
    assert rows != table_of(plm.score(model, PROTEINS.values()))
    assert provenance["how"] == "single-pass"


def test_every_residue(run: Plm, model: plm.Model, fasta: str) -> None:
    code, out, _ = run("score", fasta, "-m", ESM2, "--per-residue")
    first, *rows = map(json.loads, out.splitlines())
    assert code == 0 and first["provenance"]["sequences"] == 3
    for row, id, expected in zip(rows, PROTEINS, plm.score(model, PROTEINS.values()), strict=True):
        assert (row["id"], row["log_likelihood"], row["mean"]) == (id, expected.total, expected.mean)
        np.testing.assert_array_equal(np.float32(row["per_residue"]), expected.per_residue.numpy())
        # Nine digits are enough for a float32; as a float64 it would have seventeen.
        assert max(len(repr(number)) for number in row["per_residue"]) < 16


def test_a_t5_and_its_licence(run: Plm, ankh: str) -> None:
    with pytest.warns(plm.LicenceNotice):
        expected = plm.score(plm.load(ankh), SEQUENCE)[0]
    code, out, err = run("score", SEQUENCE, "-m", ankh, "--format", "jsonl")
    row = json.loads(out.splitlines()[1])
    assert code == 0
    assert row == {"id": "1", "residues": 22, "log_likelihood": expected.total, "mean": expected.mean}
    notes = [line for line in err.splitlines() if line.startswith("Note: ")]
    assert len(notes) == 2 and "may not be used commercially" in notes[1]
    assert run("score", SEQUENCE, "-m", ankh, "--quiet").err == ""


def test_pairs(run: Plm, tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "igbert_tiny")
    (expected,) = plm.score(plm.load(folder), [(HEAVY, LIGHT)])
    code, out, _ = run("score", f"{HEAVY}|{LIGHT}", "-m", folder)
    assert code == 0 and read_csv(out)[1][1] == ["1", "25", repr(expected.total), repr(expected.mean)]


def test_both_directions_of_progen2(run: Plm, progen2: str, fasta: str) -> None:
    scores = plm.score(plm.load(progen2), PROTEINS.values())
    code, out, _ = run("score", fasta, "-m", progen2)
    provenance, (head, *rows) = read_csv(out)
    assert code == 0 and provenance["how"] == "likelihood"
    assert head == ["id", "residues", "log_likelihood", "mean", "forward", "backward"]
    for row, wanted, found in zip(rows, table_of(scores)[1:], scores, strict=True):
        assert found.forward is not None and found.backward is not None
        assert row == [*wanted, repr(found.forward.total), repr(found.backward.total)]


@pytest.mark.parametrize("how", ["forward", "backward"])
def test_one_direction_of_progen2(run: Plm, progen2: str, fasta: str, how: Any) -> None:
    code, out, _ = run("score", fasta, "-m", progen2, "--how", how)
    provenance, rows = read_csv(out)
    assert code == 0 and provenance["how"] == how
    assert rows == table_of(plm.score(plm.load(progen2), PROTEINS.values(), how=how))


def test_every_residue_of_progen2(run: Plm, progen2: str) -> None:
    (expected,) = plm.score(plm.load(progen2), SEQUENCE)
    assert expected.forward is not None and expected.backward is not None
    code, out, _ = run("score", SEQUENCE, "-m", progen2, "--per-residue")
    row = json.loads(out.splitlines()[1])
    np.testing.assert_array_equal(np.float32(row.pop("per_residue")), expected.per_residue.numpy())
    assert code == 0 and row == {
        "id": "1",
        "residues": 22,
        "log_likelihood": expected.total,
        "mean": expected.mean,
        "forward": expected.forward.total,
        "backward": expected.backward.total,
    }


def test_what_progen2_cannot_score(run: Plm, progen2: str, tmp_path: Path) -> None:
    """Usage errors end with 2, bad sequences with 4; one that is too long can be left out, which ends with 3."""
    for how in ("pseudo-likelihood", "single-pass"):
        code, out, err = run("score", SEQUENCE, "-m", progen2, "--how", how, "-o", "out.csv")
        assert (code, out) == (2, "") and f"so it has no '{how}'; choose 'likelihood', 'forward' or 'backward'" in err
    for sequence, told in (
        ("MKJ", "record 2 'b': character 'J' at position 3 is not in the vocabulary"),
        ("1MK2", "record 2 'b': '1' at position 1"),
        ("M" * 79, "record 2 'b': 79 residues; progen2_tiny takes at most 78"),
    ):
        (tmp_path / "bad.fasta").write_text(f">a\nMKT\n>b\n{sequence}\n")
        code, out, err = run("score", "bad.fasta", "-m", progen2, "-o", "out.csv")
        assert (code, out) == (4, "") and told in err and "'a'" not in err
    assert outputs(tmp_path, "bad.fasta") == []
    code, out, err = run("score", "bad.fasta", "-m", progen2, "--too-long", "skip")
    assert code == 3 and [row[0] for row in read_csv(out)[1]] == ["id", "a"]
    assert "Failed: " in err and "79 residues" in err


def test_embeddings_and_contacts_of_progen2(run: Plm, progen2: str, fasta: str, tmp_path: Path) -> None:
    """A row per residue; no vector of a start token, and no contacts."""
    assert run("embed", fasta, "-m", progen2, "-o", "out.npz").code == 0
    back = read_embeddings(tmp_path / "out.npz")
    for array, wanted in zip(back.arrays, plm.embed(plm.load(progen2), PROTEINS.values()), strict=True):
        np.testing.assert_array_equal(array, wanted.numpy())
    code, out, err = run("embed", fasta, "-m", progen2, "--pool", "cls")
    assert (code, out) == (2, "") and "the start token of progen2_tiny sees nothing" in err
    code, out, err = run("contacts", fasta, "-m", progen2, "-o", "maps.npz")
    assert (code, out) == (2, "") and "progen2_tiny has no contact head" in err
    assert outputs(tmp_path, "in.fasta") == ["out.npz"]


def test_summary_as_json(run: Plm, fasta: str) -> None:
    code, out, err = run("score", fasta, "-m", ESM2, "-o", "out.csv", "--json", "--quiet")
    summary = json.loads(out)
    assert (code, err) == (0, "") and summary["seconds"] > 0
    assert (summary["proteins"], summary["residues"], summary["output"]) == (3, 86, "out.csv")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--json",), "with --json the summary goes to stdout: give the scores a file"),
        (("--per-residue", "-o", "out.csv"), ".jsonl"),
        (("--per-residue", "--format", "csv"), "write --per-residue as jsonl"),
        (("-o", "out.npz"), "names no layout"),
        (("--how", "guess"), "--how"),
        (("--dtype", "int4"), "--dtype"),
    ],
)
def test_usage_errors(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], told: str
) -> None:
    no_model_is_loaded(monkeypatch)
    code, out, err = run("score", SEQUENCE, "-m", ESM2, *argv)
    assert (code, out) == (2, "") and told in err and "Usage: plm score" in err
    assert outputs(tmp_path) == []


def test_what_a_model_cannot_do(run: Plm, ankh: str, tmp_path: Path) -> None:
    encoder = save_tiny_t5(tmp_path / "encoder", ANKH, decoder_layers=0)
    for folder, argv, told in (
        (ankh, ("--how", "single-pass"), "a T5 has no single-pass score"),
        (ankh, ("--task", "nlu"), "Invalid value for --task: task 'nlu' is unknown; ankh_tiny has no tasks"),
        (ankh, ("--dtype", "float16"), "Invalid value for --dtype: dtype float16 cannot be used"),
        (encoder, (), "an encoder alone"),
    ):
        code, out, err = run("score", SEQUENCE, "-m", folder, "-o", "out.csv", *argv)
        assert (code, out) == (2, "") and told in err
    assert outputs(tmp_path) == ["encoder"]


def test_whole_or_not_at_all(run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure midway leaves no output, and an old one is what it was."""
    (tmp_path / "old.csv").write_text("precious")
    with monkeypatch.context() as patch:
        no_model_is_loaded(patch)
        code, _, err = run("score", fasta, "-m", ESM2, "-o", "old.csv")
        assert code == 4 and "exists already" in err
    for argv in (("-o", "old.csv", "--overwrite"), ("-o", "new.csv"), ()):
        with monkeypatch.context() as patch:
            fails_midway(patch)
            code, out, err = run("score", fasta, "-m", ESM2, *argv)
        assert (code, out) == (5, "") and "NaN or an infinity" in err
    assert outputs(tmp_path, "in.fasta") == ["old.csv"] and (tmp_path / "old.csv").read_text() == "precious"
    assert run("score", fasta, "-m", ESM2, "-o", "old.csv", "--overwrite").code == 0
    assert len((tmp_path / "old.csv").read_text().splitlines()) == 5


def fails_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second protein's log-probabilities are infinite."""
    divisors = iter([1, 0])
    monkeypatch.setattr("plm.scoring.own_log_probs", lambda *given: own_log_probs(*given) / next(divisors))
