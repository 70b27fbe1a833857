"""ESMFold from servers on this machine: the authors' files with their language model's, and the hub's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import equal
from local_server import Site, sha256
from safetensors.torch import load_file
from test_fetch import hub_row, only_this_machine, site  # noqa: F401  (fixtures)
from test_loading_esmfold import CONTACTS, HUB, ORIGINAL, SAVED, STEM, TRUNK

import plm
from plm_weights.errors import DownloadError
from plm_weights.fetch import fetch, home, is_here
from plm_weights.registry import Checkpoint, File

FILES = {name: (ORIGINAL / name).read_bytes() for name in (TRUNK, STEM, CONTACTS)}


@pytest.fixture
def row(site: Site, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:  # noqa: F811
    """The tiny model as esmfold-v0: only its authors' files, known by name."""
    site.files |= {f"/models/{name}": content for name, content in FILES.items()}
    originals = tuple(
        File(name, len(content), (sha256(content),), f"{site.url}/models/{name}") for name, content in FILES.items()
    )
    row = Checkpoint("tiny", "esmfold", "MIT", "none", originals=originals, preferred="original")
    monkeypatch.setattr("plm_weights.registry._BY_NAME", {"tiny": row})
    return row


def test_the_language_model_comes_along(site: Site, row: Checkpoint) -> None:  # noqa: F811
    model = plm.load("tiny")
    assert equal(model.net.state_dict(), plm.load(SAVED).net.state_dict())
    assert [path for _, path, _ in site.asked] == [f"/models/{name}" for name in FILES]
    assert [file.path for file in model.checkpoint.files] == [home() / "originals" / name for name in FILES]
    assert (model.checkpoint.name, model.checkpoint.source) == ("tiny", row.originals[0].url)
    site.asked.clear()
    assert plm.load("original:tiny", offline=True).checkpoint == model.checkpoint and not site.asked


def test_a_language_model_that_is_here_is_not_fetched_again(site: Site, row: Checkpoint) -> None:  # noqa: F811
    """As ESM-2 3B may be; but without its trunk the model is not here, nor the other way round."""
    folder = home() / "originals"
    folder.mkdir(parents=True)
    (folder / STEM).write_bytes(FILES[STEM])
    assert not is_here(row)
    assert fetch(row) == folder / TRUNK and is_here(row)
    assert [path for _, path, _ in site.asked] == [f"/models/{name}" for name in (TRUNK, CONTACTS)]
    (folder / STEM).unlink()
    assert not is_here(row)
    with pytest.raises(DownloadError, match=rf"{STEM} is missing and the network is switched off"):
        fetch(row, offline=True)


def test_a_wrong_file_is_found_out(site: Site, row: Checkpoint) -> None:  # noqa: F811
    site.files[f"/models/{STEM}"] = FILES[STEM][:-1] + b"!"
    with pytest.raises(DownloadError, match=rf"{STEM} is not the published file: its sha256 is"):
        fetch(row)


def test_the_hub_does_not_have_it(row: Checkpoint) -> None:
    with pytest.raises(DownloadError, match="tiny is not on the hub: use the original form"):
        fetch(row, form="hub")


def test_the_hubs_files(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A pickle, its settings and its vocabulary, which is not that of the language model."""
    torch.save(load_file(HUB / "model.safetensors"), tmp_path / "x.bin")
    vocabulary = "\n".join([*"ARNDCQEGHILKMFPSTWYVX", "<pad>", "<mask>", "<cls>", "<sep>", "<eos>"]).encode()
    files = {"config.json": (HUB / "config.json").read_bytes(), "vocab.txt": vocabulary}
    known = hub_row(site, files | {"pytorch_model.bin": (tmp_path / "x.bin").read_bytes(), "README.md": b"a card"})
    row = replace(known, name="tiny", family="esmfold")
    monkeypatch.setattr("plm_weights.registry._BY_NAME", {"tiny": row})
    model = plm.load("tiny")
    assert equal(model.net.state_dict(), plm.load(HUB).net.state_dict())
    assert [file.name for file in model.checkpoint.files] == ["pytorch_model.bin"]
    assert (model.checkpoint.source, model.checkpoint.revision) == ("org/model", site.commit)
    assert not any(path.endswith("README.md") for _, path, _ in site.asked)
