"""Every way to fail has its exit code, says what to do, and leaves nothing behind."""

import gzip
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import ESM1B, ESM2, FASTA, Plm, no_model_is_loaded, outputs
from safetensors.torch import load_file, save_file

import plm

# -- bad input: exit 4


BAD_INPUTS = {
    "empty file": (b"", "empty"),
    "empty record": (b">a\n>b\nMK\n", "empty sequence"),
    "inner stop": (b">a\nMK*MK\n", "'*' at position 3"),
    "gaps": (b">a\nMK-MK\n", "--strip-gaps"),
    "NUL": (b">a\nMK\0MK\n", "NUL"),
    "no header": (b"MKTAY\n", "header"),
    "torn archive": (gzip.compress(FASTA.encode())[:-9], "archive"),
    "unknown letter": (b">a\nMK\n>b\nMKJ\n", "in.fasta: line 3, record 2 'b': character 'J' at position 3"),
    "two chains": (b">a\nMK|MT\n", "in.fasta: line 1, record 1 'a': character '|' at position 3"),
    "pairs and single chains": (b">a\nMK\n>b\nMK|MT\n>c\nMT\n", "in.fasta: line 3, record 2 'b': a pair among"),
    "a prompt": (b">a\nMK_MT\n", "in.fasta: line 2, record 1 'a': '_' at position 3"),
    "repeated id": (b">a\nMK\n>a\nMT\n", "used before"),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_bad_input(run: Plm, tmp_path: Path, what: str) -> None:
    data, told = BAD_INPUTS[what]
    (tmp_path / "in.fasta").write_bytes(data)
    code, out, err = run("embed", "in.fasta", "-m", ESM2, "-o", "out.h5", "--duplicates", "error")
    assert (code, out) == (4, "") and told in err and "Traceback" not in err
    assert outputs(tmp_path, "in.fasta") == []


def test_skipping_long_sequences_hides_no_other_fault(run: Plm, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(f">long\n{'A' * 1023}\n>b\nMKJ\n")
    code, _, err = run("embed", "in.fasta", "-m", ESM1B, "-o", "out.h5", "--too-long", "skip")
    assert code == 4 and "line 3, record 2 'b': character 'J'" in err and "long" not in err


def test_too_long_is_said_before_anything_is_computed(
    run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA an index beyond the position table of ESM-1b poisons the whole process."""
    monkeypatch.setattr("plm.models.esm.ESM.encode", None)
    (tmp_path / "in.fasta").write_text(f">empty\n>fits\n{'A' * 1022}\n>long\n{'A' * 1023}\n")
    code, _, err = run("embed", "in.fasta", "-m", ESM1B, "-o", "out.h5", "--skip-empty")
    told = "in.fasta: line 4, record 3 'long': 1,023 residues; esm1b_tiny takes at most 1,022"
    assert code == 4 and told in err and "'fits'" not in err
    assert outputs(tmp_path, "in.fasta") == []


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
        ("contacts", "there.npz"): "exists already",
        ("contacts", "missing/out.png"): "create it first",
        ("contacts", "out.png"): "plm-torch[plot]",
    }
    for (verb, path), told in cases.items():
        source = "MKT" if path.endswith(".png") else fasta
        code, out, err = run(verb, source, "-m", ESM2, "-o", path)
        assert (code, out) == (4, "") and told in err
    assert outputs(tmp_path, "in.fasta") == ["there.npz"] and (tmp_path / "there.npz").read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["out.safetensors", "out.npz", "out.h5", "out.parquet", "maps.npz", "maps.safetensors"]
)
def test_full_disk(run: Plm, fasta: str, tmp_path: Path, name: str) -> None:
    """The limit on the size of a file stands in for a disk that fills up while results are written."""
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
    assert code == 2 and "no contact head" in err
    assert outputs(tmp_path, "headless") == []


# -- memory, and errors that nobody foresaw


def cuda_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_memory(*_: object, **__: object) -> None:
    torch.empty(1 << 50)  # four petabytes


@pytest.mark.parametrize("fail", [cuda_memory, cpu_memory])
def test_out_of_memory(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None]) -> None:
    monkeypatch.setattr("plm.models.esm.ESM.encode", fail)
    code, out, err = run("embed", "MKT", "-m", ESM2, "-o", "out.h5")
    assert (code, out) == (6, "") and "out of memory" in err and "What to do" in err
    assert outputs(tmp_path) == []


def test_a_bug_keeps_its_traceback(run: Plm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("plm.models.esm.ESM.encode", fail)
    with pytest.raises(KeyError, match="a bug"):
        run("embed", "MKT", "-m", ESM2, "-o", "out.h5")
    assert outputs(tmp_path) == []
    monkeypatch.setenv("PLM_DEBUG", "1")
    with pytest.raises(plm.UnknownModelError):
        run("embed", "MKT", "-m", "esm3", "-o", "out.h5")


def test_the_input_is_never_overwritten(run: Plm, fasta: str) -> None:
    """``-o`` with the input's own name and --overwrite once replaced the proteins by their embeddings."""
    before = Path(fasta).read_bytes()
    code, _, err = run("embed", fasta, "-m", ESM2, "-o", fasta, "--format", "npz", "--overwrite")
    assert code == 2
    assert "is the input" in err
    assert Path(fasta).read_bytes() == before
