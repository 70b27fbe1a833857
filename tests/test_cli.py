"""The command line: help and usage, and every verb but embed."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import click
import numpy as np
import pytest
import torch
from command_line import ESM2, PROTEINS, SEQUENCE, Plm, no_model_is_loaded, outputs
from safetensors.torch import load_file

import plm
from plm.cli import annotate, contacts, convert, embed, fold, generate, options, score
from plm.cli.table import table
from plm.outputs import FORMATS, read_embeddings

# -- help and usage: exit 2


def test_help_and_usage_errors_come_without_torch() -> None:
    """torch takes seconds to import: help, mistakes in options and bad sequences must not wait for it."""
    program = """
import sys
from plm.cli import main
verbs = ("models", "embed", "contacts", "score", "generate", "annotate", "fold", "convert", "verify", "doctor")
assert [main([verb, "--help"]) for verb in verbs] == [0] * 10
assert main(["--help"]) == main(["--version"]) == 0
assert [main(["nonsense"]), main(["embed", "MKT"]), main(["embed", "MKT", "-m", "x", "--dtype", "int4"])] == [2] * 3
assert main(["embed", "MKT", "-m", "x"]) == main(["contacts", "MKT", "-m", "x"]) == 2
assert main(["fold", "MKT", "-m", "x"]) == main(["fold", "MKT", "-m", "x", "-o", "out", "--hide", "0.1"]) == 2
assert main(["fold", "mkt", "-m", "x", "-o", "out"]) == main(["fold", "no/such.fasta", "-m", "x", "-o", "out"]) == 4
assert main(["score", "MKT"]) == main(["generate", "MKT", "-m", "x", "--top-p", "2"]) == 2
assert main(["embed", "no/such.fasta", "-m", "x", "--pool", "mean"]) == main(["generate", "no/such", "-m", "x"]) == 4
assert not {"torch", "numpy", "huggingface_hub"} & set(sys.modules), "imported too early"
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)


def test_written_out_choices_are_those_of_the_library() -> None:
    from plm.conversion import Form
    from plm.embedding import Pool
    from plm.esmfold import chains
    from plm.outputs.proteins import ENDS
    from plm.outputs.rows import LAYOUTS
    from plm.outputs.writer import DTYPES as STORED
    from plm.placement import DTYPES, EIGHT_BIT, NAMES
    from plm.scoring import How
    from plm.structures import Numbering

    command_modules = {
        name: sys.modules[f"plm.cli.{name}"] for name in ("embed", "score", "generate", "annotate", "fold", "convert")
    }
    assert command_modules["embed"].FORMATS == FORMATS
    assert set(command_modules["embed"].STORED) == set(STORED)
    assert (*get_args(Pool), "none") == command_modules["embed"].POOLS
    assert get_args(How) == command_modules["score"].HOW
    annotate = command_modules["annotate"]
    assert set(annotate.LISTS + annotate.VECTORS) == set(FORMATS) - {"esm-pt"} and set(annotate.LISTS) < set(LAYOUTS)
    assert set(command_modules["score"].FORMATS) < set(LAYOUTS) == set(command_modules["generate"].FORMATS)
    fold = command_modules["fold"]
    assert {f".{name}" for name in fold.FORMATS} < set(ENDS) and set(fold.NUMBERINGS) == set(get_args(Numbering))
    assert (fold.LINKER, fold.RESIDUE_GAP) == (chains.LINKER, chains.RESIDUE_GAP)
    assert get_args(Form) == command_modules["convert"].FORMS
    assert ("auto", *DTYPES) == options.DTYPES and (*options.COMPUTED, EIGHT_BIT) == options.LOADED == ("auto", *NAMES)


@pytest.mark.parametrize(
    "command", [embed, contacts, score, generate, annotate, fold, convert], ids=lambda command: command.name
)
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
        (("-o", "out.h5", "--seed", "-1"), "--seed"),
        (("-o", "out.docx"), "names no layout"),
        (("-o", "out.csv"), "pooled embeddings only"),
        (("-o", "out/", "--pool", "max"), "no place for pooling 'max'"),
        (("-o", "-", "--pool", "mean", "--format", "npz"), "stdout takes csv, tsv or jsonl, not npz"),
        (("--json", "--pool", "mean"), "-o"),
        ((), "--pool mean"),
    ],
)
def test_usage_errors(run: Plm, tmp_path: Path, argv: tuple[str, ...], told: str) -> None:
    code, out, err = run("embed", "MKT", "-m", ESM2, *argv)
    assert (code, out) == (2, "") and told in err and "Usage: plm embed" in err
    assert outputs(tmp_path) == []


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
    for argv in ((), ("-o", "-"), ("-o", "-", "--format", "npz"), ("-o", "out.foo"), ("-o", "out.png")):
        code, out, err = run("contacts", fasta, "-m", ESM2, *argv)
        assert (code, out) == (2, "") and "npz" in err
    assert outputs(tmp_path, "in.fasta") == []


# -- the other verbs


def test_models(run: Plm) -> None:
    code, out, err = run("models")
    head, *lines = out.splitlines()
    assert (code, err) == (0, "") and head.split() == ["NAME", "FAMILY", "PARAMETERS", "LICENCE", "HERE", "NOTE"]
    assert [line.split()[0] for line in lines if line[0] != " "] == [row.name for row in plm.available()]
    assert max(map(len, lines)) <= 120
    rows = {row["name"]: row for row in json.loads(run("models", "--json").out)}
    assert list(rows) == [row.name for row in plm.available()]
    row = rows["esm2-8m"]
    assert (row["parameters"], row["licence"], row["source"]) == (7_512_353, "MIT", "facebook/esm2_t6_8M_UR50D")
    assert (rows["igbert"]["pairs"], rows["igbert-unpaired"]["pairs"]) == (True, False)


def test_a_table_keeps_all_words_within_its_width() -> None:
    lines = [("NAME", "NOTE"), ("a", "one two three four-five"), ("bcd", "")]
    assert table(lines, 15) == "NAME  NOTE\na     one two\n      three\n      four-five\nbcd"
    assert table(lines) == "NAME  NOTE\na     one two three four-five\nbcd"


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
    written = sorted(str(file) for file in Path("own").iterdir())
    assert code == 0 and sorted(json.loads(out)["files"]) == written
    assert {"own/config.json", "own/model.safetensors"} <= set(written)
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
    assert run("verify", ESM2, "--dtype", "bfloat16", "--offline", "--quiet") == (code, "a table\n", "")
    expected = {"source": ESM2, "dtype": "bfloat16", "revision": None, "offline": True}
    assert asked == expected | {"device": torch.device("cuda" if torch.cuda.is_available() else "cpu")}
    result = run("verify", ESM2, "--json")
    assert result.code == code and json.loads(result.out) == {"passed": passed}


def test_verify_says_what_loading_says(run: Plm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the licence a note; of float16, which some models do not take, a usage error."""

    def verify(source: str, *, dtype: str, **options: Any) -> SimpleNamespace:
        if dtype == "float16":
            raise ValueError("dtype float16 cannot be used")
        warnings.warn("not for sale", plm.LicenceNotice, stacklevel=2)
        return SimpleNamespace(passed=True)

    monkeypatch.setattr(plm, "verify", verify, raising=False)
    assert run("verify", ESM2).err == "Note: not for sale\n"
    assert run("verify", ESM2, "--quiet").err == ""
    code, _, err = run("verify", ESM2, "--dtype", "float16")
    assert code == 2 and "Invalid value for --dtype: dtype float16 cannot be used" in err


def test_doctor(run: Plm) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    found = json.loads(run("doctor", "--json").out)
    assert [line.split("  ")[0] for line in out.splitlines()] == list(found)
    assert found["torch"] == torch.__version__ and "esm2-8m" in found["fit on the cpu (float32)"]
    assert not [value for value in found.values() if "unknown" in str(value)]


def test_doctor_without_a_gpu(run: Plm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = json.loads(run("doctor", "--json").out)
    assert {found[name] for name in ("cuda dtypes", "kernels on the gpu", "encoder graphs")} == {"none: no CUDA device"}
    assert found["cpu dtypes"].endswith("; auto: float32")


def test_doctor_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision without a bias is torch's, whatever Triton has."""
    doctor = sys.modules["plm.cli.doctor"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("plm_kernels.backends.triton_available", lambda: True)
    for varlen, wanted in ((True, "triton with a bias or in float32, else torch's varlen"), (False, "triton")):
        monkeypatch.setattr("plm_kernels.packed_attention.varlen_available", lambda varlen=varlen: varlen)
        assert f"attention: {wanted}" in doctor.kernels()
    assert doctor.cuda_dtypes() == "fastest: bfloat16, then float32-bfloat16, then float32; auto: bfloat16"


@pytest.mark.parametrize("category", [plm.KernelWarning, plm.GraphWarning])
def test_warnings_of_the_library_are_notes(category: type[Warning], run: Plm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: they came with file, line and code, also under --quiet. Those of others are shown as ever."""
    inner = plm.models.esm.ESM.embed_tokens

    def warned(*arguments: object) -> object:
        warnings.warn("no ptxas", category, 2)
        return inner(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("plm.models.esm.ESM.embed_tokens", warned)
    command = ("embed", "MKT", "-m", ESM2, "--pool", "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = run(*command)
        assert code == 0 and err.count("Note: no ptxas\n") == 1 and category.__name__ not in err
        code, _, err = run(*command, "--quiet")
        assert code == 0 and err == ""
    category = UserWarning
    with pytest.warns(UserWarning, match="no ptxas"):
        assert "no ptxas" not in run(*command).err


def test_doctor_never_fails(run: Plm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked when something is broken: here every probe is."""
    doctor = sys.modules["plm.cli.doctor"]

    def broken() -> object:
        raise OSError("libtorch_cpu.so: cannot open shared object file\nand more")

    monkeypatch.setattr(doctor, "PROBES", dict.fromkeys(doctor.PROBES, broken))
    code, out, _ = run("doctor")
    assert code == 0 and out.count("unknown: OSError: libtorch_cpu.so") == len(doctor.PROBES) == out.count("\n")


def test_doctor_finds_only_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor multiplies by packed weights, the weights lie in memory twice."""
    doctor = sys.modules["plm.cli.doctor"]
    assert {"esm2-150m", "progen2-small"} < {*doctor.fitting(10**9, 4)} < {*doctor.fitting(2 * 10**9, 2)}
    assert "esm2-650m" in {*doctor.fitting(2 * 10**9, 2)} - {*doctor.fitting(10**9, 4)}
    monkeypatch.setattr(doctor, "memory_limit", lambda: 5 * 10**9)
    for packed in (False, True):
        monkeypatch.setattr(doctor, "packed_weights", lambda packed=packed: packed)
        assert ("esm2-650m" in doctor.fitting_cpu()) is not packed
