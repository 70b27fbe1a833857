"""The command line: right numbers in every layout, streams kept apart, and an exit code for every way to fail."""

import csv
import gzip
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import click
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import plm
from plm.cli import contacts, convert, embed, main, options
from plm.outputs import FORMATS, read_embeddings

GOLDEN = Path(__file__).parent / "golden" / "esm"
ESM2, ESM1B = str(GOLDEN / "esm2_tiny"), str(GOLDEN / "esm1b_tiny")  # rotary; learned positions, at most 1,022 residues
PROTEINS = {"P1": "MKTAYIAKQRQISFVKSHFSRQ", "P2": "M", "P3": "MXBUZO" + "ACDEFGHIKLNPQRSTVWY" * 3}
FASTA = "".join(f">{id} a header\n{sequence}\n" for id, sequence in PROTEINS.items())


class Result(NamedTuple):
    code: int
    out: str
    err: str


Plm = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plm:
    """``plm ...`` in an empty folder, with what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLM_DEBUG", raising=False)

    def run(*argv: str) -> Result:
        code = main(argv)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def fasta(tmp_path: Path) -> str:
    path = tmp_path / "in.fasta"
    path.write_text(FASTA)
    return str(path)


@pytest.fixture(scope="module")
def model() -> plm.Model:
    return plm.load(ESM2)


def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("too late: the model is being loaded")

    monkeypatch.setattr("plm.loading.load", load)


def outputs(folder: Path, *inputs: str) -> list[str]:
    """What lies in the folder beside the inputs, hidden files included."""
    return sorted(path.name for path in folder.iterdir() if path.name not in inputs)


# -- help and usage: exit 2


def test_help_and_usage_errors_come_without_torch() -> None:
    """torch takes seconds to import: help, mistakes in options and bad sequences must not wait for it."""
    program = """
import sys
from plm.cli import main
verbs = ("models", "embed", "contacts", "convert", "verify", "doctor")
assert [main([verb, "--help"]) for verb in verbs] == [0] * 6
assert main(["--help"]) == main(["--version"]) == 0
assert [main(["nonsense"]), main(["embed", "MKT"]), main(["embed", "MKT", "-m", "x", "--dtype", "int8"])] == [2] * 3
assert main(["embed", "MKT", "-m", "x"]) == main(["contacts", "MKT", "-m", "x"]) == 2
assert main(["embed", "no/such.fasta", "-m", "x", "--pool", "mean"]) == 4
assert not {"torch", "numpy", "huggingface_hub"} & set(sys.modules), "imported too early"
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)


def test_written_out_choices_are_those_of_the_library() -> None:
    from plm.conversion import Form
    from plm.embedding import Pool
    from plm.loading import DTYPES
    from plm.outputs.writer import DTYPES as STORED

    command_modules = {name: sys.modules[f"plm.cli.{name}"] for name in ("embed", "convert")}
    assert command_modules["embed"].FORMATS == FORMATS
    assert set(command_modules["embed"].STORED) == set(STORED)
    assert (*get_args(Pool), "none") == command_modules["embed"].POOLS
    assert get_args(Form) == command_modules["convert"].FORMS
    assert ("auto", *DTYPES) == options.DTYPES


@pytest.mark.parametrize("command", [embed, contacts, convert], ids=lambda command: command.name)
def test_every_option_has_help(command: click.Command) -> None:
    assert [option.name for option in command.params if isinstance(option, click.Option) and not option.help] == []


def test_without_a_model_the_message_names_models_that_exist(run: Plm) -> None:
    code, out, err = run("embed", "MKT", "-o", "out.h5")
    assert (code, out) == (2, "")
    named = {row.name for row in plm.available()} & set(err.replace(",", " ").split())
    assert {"esm2-650m", "esm2-8m", "plm-mini"} <= named


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("-o", "out.h5", "--layer", "5"), "has layers 0 to 4"),
        (("-o", "out.h5", "--device", "abacus"), "'abacus' cannot be used"),
        (("-o", "out.h5", "--max-tokens", "0"), "--max-tokens"),
        (("--json", "--pool", "mean"), "-o"),
        ((), "--pool mean"),
    ],
)
def test_usage_errors(run: Plm, tmp_path: Path, argv: tuple[str, ...], told: str) -> None:
    code, out, err = run("embed", "MKT", "-m", ESM2, *argv)
    assert (code, out) == (2, "") and told in err and "Usage: plm embed" in err
    assert outputs(tmp_path) == []


# -- embed: what is written


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
    argv = ("--layer", "-2", "--dtype", "bfloat16", "--store", "float16", "--pool", "max")
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
        "input": fasta,
        "input_sha256": hashlib.sha256(FASTA.encode()).hexdigest(),
        "changes": [],
        "sequences": 3,
        "layer": 3,
        "pooling": "max",
        "stored": "float16",
    }


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


# -- inputs


SEQUENCE = PROTEINS["P1"]
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


BAD_INPUTS = {
    "empty file": (b"", "empty"),
    "empty record": (b">a\n>b\nMK\n", "empty sequence"),
    "inner stop": (b">a\nMK*MK\n", "'*' at position 3"),
    "gaps": (b">a\nMK-MK\n", "--strip-gaps"),
    "NUL": (b">a\nMK\0MK\n", "NUL"),
    "no header": (b"MKTAY\n", "header"),
    "torn archive": (gzip.compress(FASTA.encode())[:-9], "archive"),
    "unknown letter": (b">a\nMKJ\n", "'J' at position 3"),
    "repeated id": (b">a\nMK\n>a\nMT\n", "used before"),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_bad_input(run: Plm, tmp_path: Path, what: str) -> None:
    data, told = BAD_INPUTS[what]
    (tmp_path / "in.fasta").write_bytes(data)
    code, out, err = run("embed", "in.fasta", "-m", ESM2, "-o", "out.h5", "--duplicates", "error")
    assert (code, out) == (4, "") and told in err and "Traceback" not in err
    assert outputs(tmp_path, "in.fasta") == []


def test_too_long_is_said_before_anything_is_computed(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA an index beyond the position table of ESM-1b poisons the whole process."""
    monkeypatch.setattr("plm.models.esm.ESM.forward", None)
    (tmp_path / "in.fasta").write_text(f">fits\n{'A' * 1022}\n>long\n{'A' * 1023}\n")
    code, _, err = run("embed", "in.fasta", "-m", ESM1B, "-o", "out.h5")
    assert code == 4 and "'long': 1,023 residues; esm1b_tiny takes at most 1,022" in err and "'fits'" not in err
    assert outputs(tmp_path, "in.fasta") == []


# -- some sequences failed: exit 3


def test_what_is_skipped_is_listed(run: Plm, tmp_path: Path) -> None:
    masked = "A" * 1021 + "<mask>"  # 1,022 residues
    (tmp_path / "in.fasta").write_text(f">a\nMKT\n>long\n{'A' * 1023}\n>empty\n>stop\nM*K\n>b\n{masked}\n")
    argv = ("--too-long", "skip", "--skip-empty", "--on-stop", "skip")
    code, out, err = run("embed", "in.fasta", "-m", ESM1B, "-o", "out.npz", "--json", *argv)
    assert code == 3 and read_embeddings("out.npz").ids == ["a", "b"]
    assert [failed["id"] for failed in json.loads(out)["failed"]] == ["empty", "stop", "long"]
    *failed, summary = err.splitlines()
    assert [line.split(":")[0] for line in failed] == ["Failed"] * 3
    assert "2 proteins, 1,025 residues" in summary and summary.endswith("3 failed")


def test_nothing_left_gives_no_output(run: Plm, tmp_path: Path) -> None:
    code, out, err = run("embed", "A" * 1023, "-m", ESM1B, "-o", "out.npz", "--too-long", "skip", "--json")
    assert code == 3 and "Failed" in err and json.loads(out)["output"] is None
    assert outputs(tmp_path) == []


# -- outputs that cannot be written: exit 4


def test_unwritable_outputs_fail_before_the_model_is_loaded(
    run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_model_is_loaded(monkeypatch)
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "there.npz").write_text("precious")
    cases = {
        ("embed", "there.npz"): "exists already",
        ("embed", "missing/out.npz"): "create it first",
        ("embed", "out.h5"): "plm-torch[h5]",
        ("embed", "out.docx"): "names no layout",
        ("embed", "out.csv"): "pooled embeddings only",
        ("contacts", "there.npz"): "exists already",
        ("contacts", "missing/out.png"): "create it first",
        ("contacts", "out.png"): "plm-torch[plot]",
    }
    for (verb, path), told in cases.items():
        source = "MKT" if path.endswith(".png") else fasta
        code, out, err = run(verb, source, "-m", ESM2, "-o", path)
        assert (code, out) == (4, "") and told in err
    assert outputs(tmp_path, "in.fasta") == ["there.npz"] and (tmp_path / "there.npz").read_text() == "precious"


def test_overwrite(run: Plm, fasta: str, tmp_path: Path) -> None:
    (tmp_path / "out.npz").write_text("old")
    assert run("embed", fasta, "-m", ESM2, "-o", "out.npz", "--overwrite").code == 0
    assert read_embeddings(tmp_path / "out.npz").ids == list(PROTEINS)


@pytest.mark.parametrize("name", ["out.safetensors", "out.npz", "out.parquet", "maps.npz", "maps.safetensors"])
def test_full_disk(run: Plm, fasta: str, tmp_path: Path, name: str) -> None:
    """The limit on the size of a file stands in for a disk that fills up while results are written.

    Not for .h5: h5py complains about it again from its destructors, which pytest takes for errors.
    """
    verb = "contacts" if name.startswith("maps") else "embed"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        code, out, err = run(verb, fasta, "-m", ESM2, "-o", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (4, "") and f"{name}: File too large" in err and "Traceback" not in err
    assert outputs(tmp_path, "in.fasta") == []


# -- models: exit 5


def test_unknown_model_with_suggestion(run: Plm, tmp_path: Path) -> None:
    code, _, err = run("embed", "MKT", "-m", "esm2-8mm", "-o", "out.h5")
    assert code == 5 and "did you mean esm2-8m" in err
    assert run("embed", "MKT", "-m", "no/such/folder", "-o", "out.h5").code == 5
    assert outputs(tmp_path) == []


def test_offline(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    code, _, err = run("embed", "MKT", "-m", "organisation/model", "--offline", "-o", "out.h5")
    assert code == 5 and "network is switched off" in err


def checkpoint(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """A copy of the tiny ESM-2 with other tensors."""
    tensors = load_file(Path(ESM2, "model.safetensors"))
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes(Path(ESM2, "config.json").read_bytes())
    return str(folder)


def test_unusable_checkpoints(run: Plm, tmp_path: Path) -> None:
    torn = Path(checkpoint(tmp_path / "torn", lambda tensors: None), "model.safetensors")
    torn.write_bytes(torn.read_bytes()[:-100])
    missing = checkpoint(tmp_path / "missing", lambda tensors: tensors.pop("lm_head.bias"))
    broken = checkpoint(tmp_path / "broken", lambda tensors: tensors["lm_head.bias"].fill_(torch.nan))
    (tmp_path / "empty").mkdir()
    for folder, told in ((str(torn.parent), "model.safetensors"), (missing, "lm_head.bias"), ("empty", "no weights")):
        for argv in (("embed", "MKT", "-m", folder, "-o", "out.h5"), ("convert", folder, "out"), ("verify", folder)):
            code, _, err = run(*argv)
            assert code == 5 and told in err and "Traceback" not in err, argv
    assert run("convert", broken, "out").code == 5
    assert outputs(tmp_path) == ["broken", "empty", "missing", "torn"]


def test_not_a_number(run: Plm, tmp_path: Path) -> None:
    norm = "esm.encoder.emb_layer_norm_after.bias"
    broken = checkpoint(tmp_path / "broken", lambda tensors: tensors[norm].fill_(torch.nan))
    code, _, err = run("embed", "MKT", "-m", broken, "-o", "out.h5")
    assert code == 5 and "NaN" in err
    assert outputs(tmp_path, "broken") == []


def test_no_contact_head(run: Plm, tmp_path: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "contact_head" in name]:
            del tensors[name]

    code, _, err = run("contacts", "MKT", "-m", checkpoint(tmp_path / "headless", remove), "-o", "out.npz")
    assert code == 5 and "no contact head" in err
    assert outputs(tmp_path, "headless") == []


# -- memory, and errors that nobody foresaw


def cuda_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_memory(*_: object, **__: object) -> None:
    torch.empty(1 << 50)  # four petabytes


@pytest.mark.parametrize("fail", [cuda_memory, cpu_memory])
def test_out_of_memory(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None]) -> None:
    monkeypatch.setattr("plm.models.esm.ESM.forward", fail)
    code, out, err = run("embed", "MKT", "-m", ESM2, "-o", "out.h5")
    assert (code, out) == (6, "") and "out of memory" in err and "What to do" in err
    assert outputs(tmp_path) == []


def test_a_bug_keeps_its_traceback(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("plm.models.esm.ESM.forward", fail)
    with pytest.raises(KeyError, match="a bug"):
        run("embed", "MKT", "-m", ESM2, "-o", "out.h5")
    assert outputs(tmp_path) == []
    monkeypatch.setenv("PLM_DEBUG", "1")
    with pytest.raises(plm.UnknownModelError):
        run("embed", "MKT", "-m", "esm3", "-o", "out.h5")


# -- contacts


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_contact_maps_are_those_of_python(run: Plm, model: plm.Model, fasta: str, suffix: str) -> None:
    assert run("contacts", fasta, "-m", ESM2, "-o", f"out.{suffix}").code == 0
    if suffix == "npz":
        with np.load("out.npz") as arrays:
            maps = {name: torch.from_numpy(arrays[name]) for name in PROTEINS}
            assert json.loads(arrays["provenance.json"])["provenance"]["model"] == "esm2_tiny"
    else:
        maps = load_file("out.safetensors")
    assert list(maps) == list(PROTEINS)
    for map, expected in zip(maps.values(), plm.contacts(model, PROTEINS.values()), strict=True):
        assert torch.equal(map, expected)


def test_drawn_contact_map(run: Plm, tmp_path: Path) -> None:
    """An id with dollar signs is no formula for matplotlib."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "in.fasta").write_text(f">P$1$_{'x' * 100}\n{SEQUENCE}\n")
    code, out, _ = run("contacts", "in.fasta", "-m", ESM2, "-o", "map.PNG")
    assert (code, out) == (0, "")
    with image.open("map.PNG") as drawing:
        assert drawing.format == "PNG" and drawing.width > 1000
        assert json.loads(drawing.text["Description"])["model"] == "esm2_tiny"
    assert outputs(tmp_path) == ["in.fasta", "map.PNG"]


def test_a_drawing_has_residue_1_in_the_upper_left_corner(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from plm.plots import draw_contacts

    draw_contacts([[1.0, 0.0], [0.0, 0.0]], tmp_path / "map.png", title="two residues")
    with image.open(tmp_path / "map.png") as drawing:
        pixels = np.asarray(drawing.convert("L")).astype(int)
    height, width = pixels.shape
    upper, lower = pixels[height // 3], pixels[2 * height // 3]
    assert upper[width // 4] < 80 and upper[width // 2] > 200 and lower[width // 4] > 200


def test_what_contacts_cannot_write(run: Plm, fasta: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model_is_loaded(monkeypatch)
    for argv in ((), ("-o", "-"), ("-o", "out.h5"), ("-o", "out.png")):
        code, out, err = run("contacts", fasta, "-m", ESM2, *argv)
        assert (code, out) == (2, "") and "npz" in err
    assert outputs(tmp_path, "in.fasta") == []


# -- the other verbs


def test_models(run: Plm) -> None:
    code, out, err = run("models")
    head, *lines = out.splitlines()
    assert (code, err) == (0, "") and head.split() == ["NAME", "FAMILY", "PARAMETERS", "LICENCE", "HERE", "SOURCE"]
    assert [line.split()[0] for line in lines] == [row.name for row in plm.available()]
    rows = {row["name"]: row for row in json.loads(run("models", "--json").out)}
    assert list(rows) == [row.name for row in plm.available()]
    row = rows["esm2-8m"]
    assert (row["parameters"], row["licence"], row["source"]) == (7_512_353, "MIT", "facebook/esm2_t6_8M_UR50D")


def test_models_says_what_is_on_this_machine(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    row = next(row for row in plm.available() if row.name == "esm2-8m")
    folder = tmp_path / "models--facebook--esm2_t6_8M_UR50D" / "snapshots" / str(row.revision)
    folder.mkdir(parents=True)

    def here() -> list[str]:
        return [row["name"] for row in json.loads(run("models", "--json").out) if row["here"] and row["revision"]]

    (folder / "config.json").write_text("{}")
    assert here() == []
    (folder / "model.safetensors").touch()
    assert here() == ["esm2-8m"]


def test_convert_and_use_the_result(run: Plm, model: plm.Model) -> None:
    code, out, _ = run("convert", ESM2, "own", "--json")
    assert code == 0 and json.loads(out)["files"] == ["own/config.json", "own/model.safetensors"]
    assert run("convert", "own", "esm2_back.pt", "--to", "original").out == ""
    assert run("embed", SEQUENCE, "-m", "esm2_back.pt", "-o", "out.npz").code == 0
    np.testing.assert_array_equal(read_embeddings("out.npz").arrays[0], plm.embed(model, SEQUENCE)[0].numpy())
    assert run("convert", ESM2, "own").code == 4  # it is there already
    assert run("convert", ESM2).code == 2


def test_convert_explains_the_key_map(run: Plm, tmp_path: Path) -> None:
    code, out, _ = run("convert", ESM2, "--explain")
    assert code == 0 and out.splitlines()[0].split() == ["PUBLISHED", "PLM", "HOW"]
    assert ["lm_head.layer_norm.weight", "lm_head.norm.weight", "as", "it", "is"] in [
        line.split() for line in out.splitlines()
    ]
    rows = json.loads(run("convert", ESM2, "--explain", "--json").out)
    assert {"published": "lm_head.bias", "plm": "lm_head.bias", "how": "as it is"} in rows
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 5)])
def test_verify(run: Plm, monkeypatch: pytest.MonkeyPatch, passed: bool, code: int) -> None:
    asked: dict[str, Any] = {}

    class Report(SimpleNamespace):
        def as_dict(self) -> dict[str, bool]:
            return {"passed": self.passed}

        def __str__(self) -> str:
            return "a table"

    def verify(source: str, **options: Any) -> Report:
        asked.update(options, source=source)
        return Report(passed=passed)

    monkeypatch.setattr(plm, "verify", verify, raising=False)
    assert run("verify", ESM2, "--dtype", "bfloat16", "--offline") == (code, "a table\n", "")
    expected = {"source": ESM2, "dtype": "bfloat16", "revision": None, "offline": True}
    assert asked == expected | {"device": torch.device("cuda" if torch.cuda.is_available() else "cpu")}
    result = run("verify", ESM2, "--json")
    assert result.code == code and json.loads(result.out) == {"passed": passed}


def test_doctor(run: Plm) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    found = json.loads(run("doctor", "--json").out)
    assert [line.split("  ")[0] for line in out.splitlines()] == list(found)
    assert found["torch"] == torch.__version__ and "esm2-8m" in found["fit on the cpu (float32)"]
    assert not [value for value in found.values() if "unknown" in str(value)]


def test_doctor_never_fails(run: Plm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked when something is broken: here every probe is."""
    doctor = sys.modules["plm.cli.doctor"]

    def broken() -> object:
        raise OSError("libtorch_cpu.so: cannot open shared object file\nand more")

    monkeypatch.setattr(doctor, "PROBES", dict.fromkeys(doctor.PROBES, broken))
    code, out, _ = run("doctor")
    assert code == 0 and out.count("unknown: OSError: libtorch_cpu.so") == len(doctor.PROBES) == out.count("\n")


def test_doctor_finds_only_what_fits() -> None:
    fitting = sys.modules["plm.cli.doctor"].fitting
    assert fitting(10**9, 4)[-1] == "esm2-150m" and "esm2-650m" in fitting(2 * 10**9, 2)
