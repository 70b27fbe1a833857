"""ProteinBERT in plm embed, score and variants: the numbers of Python, with and without pads."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ESM2, KNOWN, SEQUENCE, Plm, outputs, save_tiny_proteinbert

import plm
from plm.outputs import read_embeddings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_proteinbert(tmp_path_factory.mktemp("models") / "proteinbert_tiny")


@pytest.fixture
def fasta(tmp_path: Path) -> str:
    (tmp_path / "in.fasta").write_text("".join(f">{id}\n{sequence}\n" for id, sequence in KNOWN.items()))
    return "in.fasta"


def read_csv(text: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    comment, *lines = text.splitlines()
    return json.loads(comment.removeprefix("#")), list(csv.DictReader(lines))


@pytest.mark.parametrize("pad_to", [None, 70])
@pytest.mark.parametrize("pool", ["none", "mean", "global"])
@pytest.mark.parametrize("layer", ["-1", "0", "all"])
def test_embeddings_are_those_of_python(
    run: Plm, tiny: str, fasta: str, layer: str, pool: Any, pad_to: int | None
) -> None:
    padding = ("--pad-to", str(pad_to)) if pad_to else ()
    code, _, err = run("embed", fasta, "-m", tiny, "-o", "out.npz", "--layer", layer, "--pool", pool, *padding)
    assert code == 0, err
    back = read_embeddings("out.npz")
    number: Any = layer if layer == "all" else int(layer) % 3
    assert (back.provenance["layer"], back.provenance["pad_to"]) == (number, pad_to)
    assert back.provenance["pooling"] == (None if pool == "none" else pool)
    chosen = None if pool == "none" else pool
    wanted = plm.embed(plm.load(tiny), KNOWN.values(), layer=number, pool=chosen, pad_to=pad_to)
    for array, tensor in zip(back.arrays, wanted, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())


def test_global_vectors_to_stdout(run: Plm, tiny: str) -> None:
    code, out, _ = run("embed", SEQUENCE, "-m", tiny, "--pool", "global", "--pad-to", "512")
    (row,) = read_csv(out)[1]
    (wanted,) = plm.embed(plm.load(tiny), SEQUENCE, pool="global", pad_to=512)
    assert code == 0 and row["length"] == "22"
    np.testing.assert_array_equal(np.float32(list(row.values())[2:]), wanted.numpy())


@pytest.mark.parametrize("pad_to", [None, 70])
def test_scores_are_those_of_python(run: Plm, tiny: str, fasta: str, pad_to: int | None) -> None:
    padding = ("--pad-to", str(pad_to)) if pad_to else ()
    code, out, _ = run("score", fasta, "-m", tiny, *padding)
    provenance, rows = read_csv(out)
    assert code == 0 and (provenance["how"], provenance["pad_to"]) == ("single-pass", pad_to)
    scores = plm.score(plm.load(tiny), KNOWN.values(), pad_to=pad_to)
    assert [float(row["log_likelihood"]) for row in rows] == [each.total for each in scores]


@pytest.mark.parametrize("pad_to", [None, 70])
def test_a_scan_is_that_of_python(run: Plm, tiny: str, pad_to: int | None) -> None:
    padding = ("--pad-to", str(pad_to)) if pad_to else ()
    code, out, _ = run("variants", "--scan", SEQUENCE, "-m", tiny, *padding)
    provenance, rows = read_csv(out)
    assert code == 0 and len(rows) == 19 * 22
    assert (provenance["how"], provenance["pad_to"]) == ("wt-marginals", pad_to)
    wanted = plm.variants(plm.load(tiny), SEQUENCE, [row["mutant"] for row in rows], pad_to=pad_to)
    assert [float(row["proteinbert_tiny"]) for row in rows] == wanted


CANNOT = {
    "a layer": (("embed", "--pool", "mean", "--layer", "3"), "--layer: proteinbert_tiny has layers 0 to 2"),
    "a word": (("embed", "--pool", "mean", "--layer", "last"), "'last' is neither a number nor 'all'"),
    "esm-pt": (("embed", "-o", "out/", "--layer", "all"), "esm-pt names a layer by its number, and this is of none"),
    "esm-pt pool": (("embed", "-o", "out/", "--pool", "global"), "esm-pt has no place for pooling 'global'"),
    "hidden residues": (("score", "--how", "pseudo-likelihood"), "has no token that hides a residue"),
    "likelihood": (("score", "--how", "likelihood"), "so it has no 'likelihood'; choose 'single-pass'"),
    "marginals": (("variants", "--scan", "--how", "masked-marginals"), "choose 'wt-marginals'"),
    "no room": (("score", "--pad-to", "2"), "--pad-to"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_it_cannot_do(run: Plm, tiny: str, tmp_path: Path, case: str) -> None:
    (verb, *argv), told = CANNOT[case]
    code, out, err = run(verb, *argv, SEQUENCE, "-m", tiny)
    assert (code, out) == (2, "") and told in err
    assert outputs(tmp_path) == []


OTHERS = {
    "embed": (("embed", "--pool", "mean", "--pad-to", "512"), "--pad-to: pad_to is for ProteinBERT"),
    "score": (("score", "--pad-to", "512"), "--pad-to: pad_to is for ProteinBERT"),
    "variants": (("variants", "--scan", "--pad-to", "512"), "--pad-to: pad_to is for ProteinBERT"),
    "global": (("embed", "--pool", "global"), "--pool: esm2_tiny has no global vector"),
    "all": (("embed", "--pool", "mean", "--layer", "all"), "--layer: all layers side by side are ProteinBERT's"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_families_have_none_of_this(run: Plm, tmp_path: Path, case: str) -> None:
    (verb, *argv), told = OTHERS[case]
    code, out, err = run(verb, *argv, SEQUENCE, "-m", ESM2)
    assert (code, out) == (2, "") and told in err
    assert outputs(tmp_path) == []


def test_too_long_for_the_pads(run: Plm, tiny: str, tmp_path: Path) -> None:
    """Named before anything is computed, or left out and listed."""
    (tmp_path / "in.fasta").write_text(f">a\nMKT\n>b\n{'M' * 19}\n>c\n{'A' * 18}\n")
    for verb, argv in (("embed", ("--pool", "global", "-o", "out.npz")), ("score", ("-o", "out.csv"))):
        command = (verb, "in.fasta", "-m", tiny, "--pad-to", "20", *argv)
        code, out, err = run(*command)
        assert (code, out) == (4, "") and "line 3, record 2 'b': 19 residues; pad_to=20 takes at most 18" in err
        assert "pad to 2 more than its residues" in err and outputs(tmp_path, "in.fasta", "out.npz") == []
        code, _, err = run(*command, "--too-long", "skip")
        assert code == 3 and "Failed: " in err
    assert read_embeddings("out.npz").ids == ["a", "c"]
    (tmp_path / "assay.csv").write_text("mutant\nM1A\n")
    code, _, err = run("variants", "assay.csv", "-m", tiny, "--sequence", "M" * 19, "--pad-to", "20")
    assert code == 4 and "19 residues; pad_to=20 takes at most 18" in err


def test_letters_that_it_does_not_know(run: Plm, tiny: str, tmp_path: Path) -> None:
    """Its authors' code reads them as <OTHER>, in silence."""
    code, _, err = run("embed", "MKB", "-m", tiny, "--pool", "global")
    assert code == 4 and "character 'B' at position 3" in err and "Write <OTHER> in its place" in err
    (tmp_path / "in.fasta").write_text(">a\nMK<OTHER>\n")
    code, out, _ = run("embed", "in.fasta", "-m", tiny, "--pool", "global")
    (wanted,) = plm.embed(plm.load(tiny), "MK<OTHER>", pool="global")
    (row,) = read_csv(out)[1]
    assert code == 0 and row["length"] == "3"
    np.testing.assert_array_equal(np.float32(list(row.values())[2:]), wanted.numpy())


def test_contacts_and_new_sequences(run: Plm, tiny: str, tmp_path: Path) -> None:
    code, _, err = run("contacts", SEQUENCE, "-m", tiny, "-o", "maps.npz")
    assert code == 2 and "proteinbert_tiny has no contact head" in err
    code, _, err = run("generate", SEQUENCE, "-m", tiny, "-o", "new.fasta")
    assert code == 2 and "proteinbert_tiny writes no sequences" in err
    assert outputs(tmp_path) == []


def test_help_says_what_the_original_form_is(run: Plm) -> None:
    text = " ".join(run("convert", "--help").out.split())
    assert "of ProteinBERT weights.pkl with config.json; ESMFold has none" in text
