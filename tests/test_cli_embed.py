"""plm embed: right numbers in every layout, streams kept apart, and nothing changed or left out in silence."""

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ESM1B, ESM2, FASTA, PROTEINS, SEQUENCE, Plm, outputs

import plm
from plm.outputs import FORMATS, read_embeddings


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_holds_what_python_gives(
    run: Plm, model: plm.Model, fasta: str, tmp_path: Path, name: str
) -> None:
    pool = "mean" if name in ("csv", "tsv", "jsonl") else None
    path = tmp_path / {"esm-pt": "out", "bio-h5": "bio.h5"}.get(name, f"out.{name}")
    code, out, err = run("embed", fasta, "-m", ESM2, "-o", str(path), "--format", name, "--pool", pool or "none")
    assert (code, out) == (0, "") and err.count("\n") == 1
    back = read_embeddings(path, format=name)
    assert back.ids == list(PROTEINS)
    for array, tensor in zip(back.arrays, plm.embed(model, PROTEINS.values(), pool=pool), strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())
    assert outputs(tmp_path, "in.fasta") == [path.name]


def test_provenance_says_how_each_number_came_about(run: Plm, fasta: str, tmp_path: Path) -> None:
    argv = ("--layer", "-2", "--dtype", "bfloat16", "--store", "float16", "--pool", "max", "--seed", "7")
    assert run("embed", fasta, "-m", ESM2, "-o", "out.npz", *argv).code == 0
    back = read_embeddings(tmp_path / "out.npz")
    assert all(array.dtype == np.float16 for array in back.arrays)
    date = back.provenance.pop("date")
    assert date.endswith("+00:00")
    unknown = "unknown: see where the files came from"
    assert back.provenance == {
        "plm": plm.__version__,
        "torch": torch.__version__,
        "model": "esm2_tiny",
        "source": ESM2,
        "revision": None,
        "sha256": {"model.safetensors": hashlib.sha256(Path(ESM2, "model.safetensors").read_bytes()).hexdigest()},
        "licence": unknown,
        "citation": unknown,
        "dtype": "bfloat16",
        "device": "cpu",
        "seed": 7,
        "input": fasta,
        "input_sha256": hashlib.sha256(FASTA.encode()).hexdigest(),
        "changes": [],
        "sequences": 3,
        "layer": 3,
        "pooling": "max",
        "per_chain": False,
        "task": None,
        "pad_to": None,
        "stored": "float16",
    }


def test_hashes_of_the_hubs_cache_are_not_computed_again(
    run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files lie there under their sha256, which `fetch` has compared. A path that a user gives proves nothing."""
    cached = tmp_path / "snapshot"
    cached.mkdir()
    (cached / "config.json").symlink_to(Path(ESM2, "config.json"))
    (tmp_path / ("ab" * 32)).write_bytes(Path(ESM2, "model.safetensors").read_bytes())
    (cached / "model.safetensors").symlink_to(tmp_path / ("ab" * 32))
    digest = hashlib.sha256(Path(ESM2, "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr("plm.loading.fetch", lambda name, **options: cached)
    for name, expected in (("some/model", "ab" * 32), (str(cached), digest)):
        assert run("embed", fasta, "-m", name, "-o", "out.npz", "--overwrite").code == 0
        assert read_embeddings("out.npz").provenance["sha256"] == {"model.safetensors": expected}


def test_data_goes_to_stdout_and_the_rest_to_stderr(run: Plm, model: plm.Model, fasta: str) -> None:
    for argv in ((), ("-o", "-"), ("--format", "csv", "--quiet")):
        code, out, err = run("embed", fasta, "-m", ESM2, "--pool", "mean", *argv)
        comment, *table = out.splitlines()
        assert code == 0 and json.loads(comment.removeprefix("#"))["model"] == "esm2_tiny"
        head, *rows = csv.reader(table)
        assert head[:3] == ["id", "length", "e0"] and [row[0] for row in rows] == list(PROTEINS)
        written = np.array([row[2:] for row in rows], dtype=np.float32)
        expected = torch.stack(plm.embed(model, PROTEINS.values(), pool="mean"))
        np.testing.assert_array_equal(written, expected.numpy())
        assert (
            err == "" if "--quiet" in argv else err.startswith("3 proteins, 86 residues in ") and err.count("\n") == 1
        )


def test_summary_as_json(run: Plm, fasta: str) -> None:
    code, out, err = run("embed", fasta, "-m", ESM2, "-o", "out.npz", "--json", "--quiet")
    summary = json.loads(out)
    assert (code, err) == (0, "") and summary.pop("seconds") > 0 and summary.pop("residues_per_second") > 0
    assert summary == {
        "proteins": 3,
        "residues": 86,
        "device": "cpu",
        "dtype": "float32",
        "model": "esm2_tiny",
        "revision": None,
        "output": "out.npz",
        "changes": [],
        "failed": [],
    }


def test_progress_only_on_a_terminal(run: Plm, fasta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "/86.0 [" in run("embed", fasta, "-m", ESM2, "-o", "a.npz").err
    assert run("embed", fasta, "-m", ESM2, "-o", "b.npz", "--quiet").err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    assert "/86.0 [" not in run("embed", fasta, "-m", ESM2, "-o", "c.npz").err


def test_overwrite(run: Plm, fasta: str, tmp_path: Path) -> None:
    (tmp_path / "out.npz").write_text("old")
    assert run("embed", fasta, "-m", ESM2, "-o", "out.npz", "--overwrite").code == 0
    assert read_embeddings(tmp_path / "out.npz").ids == list(PROTEINS)


# -- inputs


INPUTS = {
    "plain.fasta": f">P1\n{SEQUENCE}\n".encode(),
    "packed.fasta.gz": gzip.compress(f">P1\n{SEQUENCE}\n".encode()),
    "odd.fasta": b"\xef\xbb\xbf>P1\r\n" + SEQUENCE[:9].lower().encode() + b"\r\n" + SEQUENCE[9:].encode() + b"*\r\n",
    "table.csv": f"name,chain\nP1,{SEQUENCE}\n".encode(),
    "gaps.fasta": f">P1\n--{SEQUENCE[:5]}..{SEQUENCE[5:]}-\n".encode(),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_mean_the_same(run: Plm, model: plm.Model, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(INPUTS[name])
    argv = {"table.csv": ["--column", "chain", "--id-column", "name"], "gaps.fasta": ["--strip-gaps"]}.get(name, [])
    code, _, err = run("embed", name, "-m", ESM2, "-o", "out.npz", *argv)
    assert code == 0
    back = read_embeddings("out.npz")
    assert back.ids == ["P1"]
    np.testing.assert_array_equal(back.arrays[0], plm.embed(model, SEQUENCE)[0].numpy())
    notes = [line.removeprefix("Note: ") for line in err.splitlines()[:-1]]
    assert notes == back.provenance["changes"] and len(notes) == {"odd.fasta": 2, "gaps.fasta": 1}.get(name, 0)


def test_stdin_and_literal_sequence(run: Plm, model: plm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(INPUTS["plain.fasta"])))
    assert run("embed", "-", "-m", ESM2, "-o", "stdin.npz").code == 0
    code, _, err = run("embed", SEQUENCE, "-m", ESM2, "-o", "literal.npz")
    assert code == 0 and "taken as a literal sequence" in err
    for name, source in (("stdin", "-"), ("literal", "literal sequence")):
        back = read_embeddings(f"{name}.npz")
        np.testing.assert_array_equal(back.arrays[0], plm.embed(model, SEQUENCE)[0].numpy())
        assert (back.provenance["input"], back.provenance["input_sha256"]) == (source, None)


# -- some sequences failed: exit 3


def test_what_is_skipped_is_listed(run: Plm, tmp_path: Path) -> None:
    masked = "A" * 1021 + "<mask>"  # 1,022 residues
    (tmp_path / "in.fasta").write_text(f">a\nMKT\n>long\n{'A' * 1023}\n>empty\n>stop\nM*K\n>b\n{masked}\n")
    argv = ("--too-long", "skip", "--skip-empty", "--on-stop", "skip")
    code, out, err = run("embed", "in.fasta", "-m", ESM1B, "-o", "out.npz", "--json", *argv)
    assert code == 3 and read_embeddings("out.npz").ids == ["a", "b"]
    assert [failed["id"] for failed in json.loads(out)["failed"]] == ["empty", "stop", "long"]
    assert "line 3, record 2 'long': 1,023 residues" in err
    *failed, summary = err.splitlines()
    assert [line.split(":")[0] for line in failed] == ["Failed"] * 3
    assert "2 proteins, 1,025 residues" in summary and summary.endswith("3 failed")


def test_nothing_left_gives_no_output(run: Plm, tmp_path: Path) -> None:
    code, out, err = run("embed", "A" * 1023, "-m", ESM1B, "-o", "out.npz", "--too-long", "skip", "--json")
    assert code == 3 and "Failed" in err and json.loads(out)["output"] is None
    assert outputs(tmp_path) == []
