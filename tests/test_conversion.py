"""`plm.convert`: nothing of the user's is replaced, nothing half written stays, and every form is what it says."""

import argparse
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIGS, fair
from safetensors.torch import load_file, save_file

import plm
from plm.conversion import Form, original_name
from plm.models.esm import Config
from plm_weights import open_tensors
from plm_weights.registry import find

FORMS: tuple[Form, ...] = ("plm", "transformers", "original")


@pytest.fixture
def esm2(golden: Path) -> Path:
    return golden / "esm" / "esm2_tiny"


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the hub form with other tensors."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    shutil.copyfile(source / "config.json", folder / "config.json")
    return folder


def without(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", FORMS)
def test_the_files_returned_are_those_written(esm2: Path, tmp_path: Path, form: Form) -> None:
    files = plm.convert(esm2, tmp_path / "a" / "b", to=form)
    assert sorted(files) == sorted((tmp_path / "a" / "b").iterdir())
    again = plm.load(files[-1]).net.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in plm.load(esm2).net.state_dict().items())


@pytest.mark.parametrize(
    "form, name",
    [
        ("plm", "config.json"),
        ("plm", "model.safetensors"),
        ("transformers", "config.json"),
        ("transformers", "vocab.txt"),
        ("original", "esm2_t4.pt"),
        ("original", "esm2_t4-contact-regression.pt"),
    ],
)
def test_a_file_that_is_there_is_never_replaced(esm2: Path, tmp_path: Path, form: Form, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name} would be replaced; remove it or choose another target"):
        plm.convert(esm2, tmp_path, to=form)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_where_a_folder_is_wanted(esm2: Path, tmp_path: Path, form: Form, below: str) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"taken is a file where a folder is wanted"):
        plm.convert(esm2, tmp_path / "taken" / below, to=form)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [10, 20_000], ids=["first file", "last file"])
def test_a_full_disk_leaves_nothing_behind(esm2: Path, tmp_path: Path, form: Form, size: int) -> None:
    (tmp_path / "here").mkdir()
    for target in (tmp_path / "new" / "folder", tmp_path / "here"):
        with full_disk(size), pytest.raises(OSError, match=rf"{target}/.*could not be written: .*[Ff]ile too large"):
            plm.convert(esm2, target, to=form)
        assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_not_a_number_is_not_converted(esm2: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.bias"][3] = torch.inf

    source = changed(esm2, tmp_path / "broken", spoil)
    with pytest.raises(
        plm.CheckpointError, match=r"broken/model\.safetensors has NaN or infinite values in lm_head\.bias"
    ):
        plm.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_fair_esm_knows() -> None:
    """Of a folder as target: the published name, else one that begins as the architecture's names do."""
    esm1b, esm2 = (Config(**CONFIGS[name]) for name in ("esm1b_tiny", "esm2_tiny"))
    assert original_name(esm2, find("esm2-8m")) == "esm2_t6_8M_UR50D.pt"
    assert original_name(esm2, find("plm-mini")) == "esm2_t4.pt"
    assert original_name(esm1b, None) == "esm1b_t3.pt"
    assert original_name(replace(esm1b, norm_before=False, contact_head=False), None) == "esm1v_t3.pt"


def test_esm2_without_a_contact_head_to_fair_esm(esm2: Path, tmp_path: Path) -> None:
    """fair-esm's core loader takes it; the local one wants a regression beside it."""
    import esm

    source = changed(esm2, tmp_path / "source", without("contact_head"))
    (file,) = plm.convert(source, tmp_path / "out", to="original")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file)
    with pytest.warns(UserWarning, match="Regression weights not found"):
        net, _ = esm.pretrained.load_model_and_alphabet_core(file.stem, content)
    theirs = {f"encoder.{k}": v for k, v in net.state_dict().items() if k.startswith("lm_head.")}
    assert theirs and all(torch.equal(tensor, fair("esm2_tiny")[name]) for name, tensor in theirs.items())


def test_what_fair_esm_has_no_place_for(esm2: Path, tmp_path: Path) -> None:
    heads = load_file(esm2 / "heads.safetensors")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor for name, tensor in heads.items() if "pooler" in name or "classifier" in name})

    for name, change, says in (
        ("bare", without("lm_head"), "has no language-model head; fair-esm"),
        ("heads", add, "has a pooler, a sequence classifier, a token classifier; fair-esm has no pooler"),
    ):
        with pytest.raises(plm.CheckpointError, match=says):
            plm.convert(changed(esm2, tmp_path / name, change), tmp_path / "out", to="original")
    assert not (tmp_path / "out").exists()


def test_the_mask_row_of_fair_esms_esm1b_becomes_zero(golden: Path, tmp_path: Path) -> None:
    """As fair-esm makes it on loading; from fair-esm to fair-esm it stays."""
    source, name = golden / "esm" / "esm1b_tiny" / "esm1b_tiny.pt", "encoder.sentence_encoder.embed_tokens.weight"
    stored = open_tensors(source)[name]
    own = load_file(plm.convert(source, tmp_path / "own")[-1])["embed.weight"]
    assert stored[32].any() and not own[32].any() and torch.equal(own[:32], stored[:32])
    back = plm.convert(source, tmp_path / "back", to="original")[-1]
    assert torch.equal(open_tensors(back)[name], stored)


def test_files_are_as_readable_as_any_other(golden: Path, tmp_path: Path) -> None:
    """safetensors leaves its files to their owner alone, which breaks a folder that a group shares."""
    plm.convert(golden / "esm" / "esm2_tiny", tmp_path / "out")
    assert len({path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}) == 1


def test_the_vocabulary_comes_along(golden: Path, tmp_path: Path) -> None:
    """From one folder into another; what lies beside a fair-esm file is not about it, and it takes nothing along."""
    folder = golden / "esm" / "esm2_tiny"
    plm.convert(folder, tmp_path / "own")
    assert (tmp_path / "own" / "vocab.txt").read_bytes() == (folder / "vocab.txt").read_bytes()
    assert {path.name for path in plm.convert(folder / "esm2_tiny.pt", tmp_path / "fair")} == {
        "config.json",
        "model.safetensors",
    }
    assert {path.suffix for path in plm.convert(folder, tmp_path / "back", to="original")} == {".pt"}
