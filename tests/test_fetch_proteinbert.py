"""ProteinBERT from servers on this machine: the authors' pickle at both of its addresses, and the hub's SavedModel."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import equal
from local_server import COMMIT, Site, sha256
from test_fetch import hub_row, only_this_machine, site  # noqa: F401  (fixtures)

import plm
from plm_weights.errors import DownloadError
from plm_weights.fetch import fetch, home, is_here, weight_files
from plm_weights.registry import Checkpoint, File

GOLDEN = Path(__file__).parent / "golden" / "proteinbert"
PICKLE = (GOLDEN / "tiny_2blocks" / "weights.pkl").read_bytes()
INDEX, DATA = "variables/variables.index", "variables/variables.data-00000-of-00001"
SAVED = {"saved_model.pb": b"a graph", "keras_metadata.pb": b"unused", "README.md": b"a card"} | {
    name: (GOLDEN / "saved_model" / name).read_bytes() for name in (INDEX, DATA)
}
NAME = "epoch_1_sample_2.pkl"


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No user's ``~/proteinbert_models`` has a part in a test."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def row(site: Site, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:  # noqa: F811
    """The tiny model as its authors' pickle on the server, at two addresses; known by name."""
    site.files |= {f"/lfs/{NAME}": PICKLE, f"/records/full_{NAME}": PICKLE}
    first, mirror = f"{site.url}/lfs/{NAME}", f"{site.url}/records/full_{NAME}"
    originals = (File(NAME, len(PICKLE), (sha256(PICKLE),), first, (mirror,)),)
    row = Checkpoint("tiny", "proteinbert", "MIT", "none", hub="org/model", originals=originals, preferred="original")
    monkeypatch.setattr("plm_weights.registry._BY_NAME", {"tiny": row, "org/model": row})
    return row


def saved(site: Site, files: dict[str, bytes] | None = None) -> None:  # noqa: F811
    hub_row(site, SAVED if files is None else files)


def reference() -> dict[str, object]:
    return dict(plm.load(GOLDEN / "tiny_2blocks").net.state_dict())


# ------------------------------------------------------------------------------------------------ the authors' pickle


def test_its_name_means_the_authors_pickle(site: Site, row: Checkpoint) -> None:  # noqa: F811
    assert not is_here(row)
    model = plm.load("tiny")
    assert equal(model.net.state_dict(), reference())  # type: ignore[arg-type]
    assert [path for _, path, _ in site.asked] == [f"/lfs/{NAME}"]
    origin = model.checkpoint
    assert [file.path for file in origin.files] == [home() / "originals" / NAME]
    assert (origin.name, origin.source, origin.revision) == ("tiny", row.originals[0].url, None)
    site.asked.clear()
    assert is_here(row) and plm.load("original:tiny", offline=True).checkpoint == origin and not site.asked


@pytest.mark.parametrize("fault", ["gone", "other bytes", "replaced"])
def test_the_second_address_serves_where_the_first_does_not(
    fault: str,
    site: Site,  # noqa: F811
    row: Checkpoint,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = PICKLE[:-1] + b"!" if fault == "other bytes" else b"moved"
    site.files[f"/lfs/{NAME}"] = wrong
    if fault == "gone":
        del site.files[f"/lfs/{NAME}"]
    path = fetch(row)
    assert path.name == NAME and path.read_bytes() == PICKLE
    assert f"Next is {row.originals[0].mirrors[0]}" in caplog.text and row.originals[0].url in caplog.text  # type: ignore[operator]
    assert [path for _, path, _ in site.asked][-1] == f"/records/full_{NAME}"


def test_both_addresses_go_on_with_one_piece(site: Site, row: Checkpoint) -> None:  # noqa: F811
    """What came from the first is not asked for again."""
    piece = home() / "originals" / f"{NAME}.part"
    piece.parent.mkdir(parents=True)
    piece.write_bytes(PICKLE[:10_000])
    del site.files[f"/lfs/{NAME}"]
    assert fetch(row).read_bytes() == PICKLE
    assert [asked for _, _, asked in site.asked] == ["bytes=10000-", "bytes=10000-"]


def test_no_address_has_it(site: Site, row: Checkpoint) -> None:  # noqa: F811
    """The error tells every address, and where the file may be put by hand."""
    site.files.clear()
    with pytest.raises(DownloadError) as error:
        fetch(row)
    head, first, second, advice = str(error.value).splitlines()
    assert head == f"{NAME} of tiny could not be downloaded from {site.url.removeprefix('http://')}:"
    assert f"/lfs/{NAME} answered HTTP 404" in first and f"/records/full_{NAME} answered HTTP 404" in second
    assert advice.endswith(f"put it into {home() / 'originals'} as {NAME}.")


def test_a_file_of_the_original_is_used_where_it_lies(site: Site, row: Checkpoint, tmp_path: Path) -> None:  # noqa: F811
    """Its loader keeps it in the home folder, under the published name. A torn one is an error."""
    left = tmp_path / "home" / "proteinbert_models" / NAME
    left.parent.mkdir(parents=True)
    left.write_bytes(PICKLE)
    assert is_here(row) and fetch(row) == left and not site.asked
    assert plm.load("tiny").checkpoint.source == row.originals[0].url
    left.write_bytes(PICKLE[:-1])
    with pytest.raises(DownloadError, match=rf"{NAME} has 51,366 bytes, published are 51,367: delete"):
        fetch(row)


def test_offline_says_what_to_do(row: Checkpoint) -> None:
    with pytest.raises(DownloadError, match=rf"{NAME} is missing .*switched off.*put the file of http.*{NAME} there"):
        fetch(row, offline=True)


# ------------------------------------------------------------------------------------------------ the hub's SavedModel


def test_a_hub_id_means_the_saved_model(site: Site, row: Checkpoint) -> None:  # noqa: F811
    """Fetched without what nobody reads, and at a commit only once."""
    saved(site)
    model = plm.load("org/model", revision=COMMIT)
    assert equal(model.net.state_dict(), reference())  # type: ignore[arg-type]
    folder = fetch("org/model", revision=COMMIT)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *("saved_model.pb", INDEX, DATA)
    }
    assert weight_files(folder) == (folder / INDEX, folder / DATA)
    origin = model.checkpoint
    assert (origin.name, origin.source, origin.revision) == ("tiny", "org/model", COMMIT)
    assert [file.path for file in origin.files] == [folder / INDEX, folder / DATA]
    site.asked.clear()
    assert fetch("org/model", revision=COMMIT) == fetch("org/model", revision=COMMIT, offline=True) == folder
    assert not site.asked, "a complete pinned snapshot needs no network"


def test_a_saved_model_is_found_offline(site: Site, row: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """By its hub id, and in place of the pickle where that is out of reach."""
    saved(site)
    assert not is_here(row)
    with pytest.raises(DownloadError, match=r"org/model@main is not in .*hf download org/model"):
        fetch("org/model", offline=True)
    folder = fetch("org/model")
    assert "no hashes are on record" in caplog.text and is_here(row)
    assert fetch("org/model", offline=True) == folder
    assert fetch("tiny", offline=True) == folder and f"The hub files in {folder} are used instead" in caplog.text


def test_a_saved_model_that_is_not_whole_does_not_count(site: Site, row: Checkpoint) -> None:  # noqa: F811
    parts = {f"variables/variables.data-0000{i}-of-00002": b"%d" % i for i in (0, 1)}
    saved(site, {"saved_model.pb": b"", INDEX: b"an index", **parts})
    folder = fetch("org/model")
    assert weight_files(folder) == (folder / INDEX, *(folder / name for name in parts))
    (folder / "variables/variables.data-00001-of-00002").unlink()
    assert weight_files(folder) == () and not is_here(row)
    with pytest.raises(DownloadError, match="switched off"):
        fetch("org/model", offline=True)


@pytest.mark.parametrize(
    "files", [{"saved_model.pb": b""}, {INDEX: b"x"}, {DATA: b"x"}], ids=lambda files: next(iter(files))
)
def test_a_repository_without_a_whole_saved_model(files: dict[str, bytes], site: Site) -> None:  # noqa: F811
    saved(site, files)
    with pytest.raises(DownloadError, match=rf"has no complete set of weights: none of model\.safetensors, .*{INDEX}"):
        fetch("org/model")


def test_damaged_data_are_found(site: Site) -> None:  # noqa: F811
    """By the hash that the hub promised."""
    saved(site)
    folder = fetch("org/model")
    real = (folder / DATA).resolve()
    real.write_bytes(bytes(len(SAVED[DATA])))
    with pytest.raises(DownloadError, match=r"data-00000-of-00001 is not the published file"):
        fetch("org/model", offline=True)


def test_other_sets_of_weights_come_first(site: Site, row: Checkpoint) -> None:  # noqa: F811
    """A folder that `plm.convert` wrote, uploaded beside the SavedModel: safetensors before a pickle before that."""
    config = (GOLDEN / "tiny_2blocks" / "config.json").read_bytes()
    saved(site, SAVED | {"weights.pkl": PICKLE, "config.json": config})
    folder = fetch("org/model")
    assert weight_files(folder) == (folder / "weights.pkl",) and not (folder / "variables").exists()
    assert equal(plm.load("org/model").net.state_dict(), reference())  # type: ignore[arg-type]


def test_weights_of_a_name_that_nobody_knows(site: Site, tmp_path: Path) -> None:  # noqa: F811
    """A row without a second address fails with the first."""
    file = File(NAME, len(PICKLE), (sha256(PICKLE),), f"{site.url}/nowhere/{NAME}")
    row = Checkpoint("tiny", "proteinbert", "MIT", "none", originals=(file,), preferred="original")
    with pytest.raises(DownloadError, match=rf"nowhere/{NAME} answered HTTP 404"):
        fetch(row)
    assert len(site.asked) == 1
    shutil.copyfile(GOLDEN / "tiny_2blocks" / "weights.pkl", tmp_path / NAME)
    assert fetch(replace(row), cache_dir=tmp_path) == tmp_path / NAME
