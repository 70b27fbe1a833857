"""What is given in place of a checkpoint is told as what it is, with what to do."""

import shutil
from pathlib import Path

import pytest

import plm
from plm_weights import CheckpointError, open_tensors

SAVED = Path(__file__).parent / "golden" / "proteinbert" / "saved_model"
DATA = "variables.data-00000-of-00001"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 191800918\n"
PAGES = (b"<!DOCTYPE html>\n<html>", b"\xef\xbb\xbf\n <HTML lang='en'>")
NAMES = ("x.pt", "x.pkl", "pytorch_model.bin", "model.safetensors", "model.safetensors.index.json", "variables.index")


def refused(path: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_pointers_and_pages(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(LFS)
    refused(path, "is a pointer of Git LFS.* `git lfs pull`")
    for page in PAGES:
        path.write_bytes(page)
        refused(path, r"is a web page \(HTML\)")


def test_a_pointer_in_place_of_the_data_of_a_saved_model(tmp_path: Path) -> None:
    shutil.copytree(SAVED, tmp_path / "saved")
    (tmp_path / "saved" / "variables" / DATA).write_bytes(LFS)
    with pytest.raises(CheckpointError, match=f"{DATA} is a pointer of Git LFS"):
        plm.load(tmp_path / "saved")


def test_parts_of_a_saved_model(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(SAVED, folder)
    (folder / "saved_model.pb").write_bytes(b"\x08\x01\x12\x00")
    refused(folder / "saved_model.pb", f"is the graph of a SavedModel, .*: give its folder, {folder}")
    refused(folder / "variables" / DATA, f"give its folder, {folder}, or variables.index beside it")
    shutil.copyfile(folder / "variables" / DATA, folder / "mine.data-00000-of-00001")
    refused(folder / "mine.data-00000-of-00001", f"give its folder, {folder}, or mine.index beside it")


@pytest.mark.parametrize(("name", "data"), [("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)), ("x.keras", b"PK\x03\x04")])
def test_other_files_of_keras(name: str, data: bytes, tmp_path: Path) -> None:
    """By themselves, and as all that a folder holds."""
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, "is not read: Keras' .h5 and .keras files .* SavedModel, or pickle")
    with pytest.raises(CheckpointError, match=f"{name} is not read"):
        plm.load(tmp_path)
