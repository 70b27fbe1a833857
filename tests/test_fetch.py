"""Downloads against servers on this machine: whole, interrupted, wrong, missing and switched off."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_server import COMMIT, Handler, Server, Site, sha256

import plm
from plm_weights.errors import CheckpointError, DownloadError, UnknownModelError
from plm_weights.fetch import download, fetch, home, weight_files
from plm_weights.registry import Checkpoint, File

BODY = bytes(range(256)) * 20_000  # 5 MB: several chunks
REPOSITORY = {"config.json": b'{"model_type": "esm"}', "vocab.txt": b"<cls>", "model.safetensors": b"weights" * 1000}


def take_for_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of another machine fails at once."""
    look_up = socket.getaddrinfo

    def guarded(host: str, *rest: Any, **more: Any) -> Any:
        assert host == "127.0.0.1", f"a test asked for {host}"
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    """A server of our own, taken for the hub, and empty caches."""
    server = Server(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(Handler, "site", Site(url), raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PLM_HOME", str(tmp_path / "plm"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    take_for_hub(url, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield Handler.site
    server.shutdown()
    server.server_close()
    thread.join()


def published(site: Site, body: bytes = BODY) -> File:
    """A file on the server whose registry entry is right."""
    site.files["/models/tiny.pt"] = body
    return File("tiny.pt", len(body), (sha256(body),), f"{site.url}/models/tiny.pt")


def hub_row(site: Site, files: dict[str, bytes] | None = None) -> Checkpoint:
    """A repository on the server and its row, with the hashes of the large files."""
    files = REPOSITORY if files is None else files
    site.files |= {f"/org/model/resolve/{site.commit}/{name}": body for name, body in files.items()}
    known = tuple(File(name, len(body), (sha256(body),)) for name, body in files.items() if name != "config.json")
    return Checkpoint("tiny", "esm", "MIT", "none", hub="org/model", revision=site.commit, files=known)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_download_is_whole_and_reports_its_progress(site: Site, tmp_path: Path) -> None:
    file, seen = published(site), list[tuple[int, int | None]]()
    download(file, tmp_path / "tiny.pt", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "tiny.pt").read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY)) and seen == sorted(seen)
    assert names(tmp_path) == ["plm", "tiny.pt"]


def test_broken_connections_are_resumed_where_they_broke(site: Site, tmp_path: Path) -> None:
    """Every answer but the last breaks off; each try asks only for what is missing, and the hash covers all pieces."""
    file = published(site)
    site.cuts = [1_500_000, 2_000_000]
    download(file, tmp_path / "tiny.pt", tries=2, pause=0)
    assert (tmp_path / "tiny.pt").read_bytes() == BODY
    assert [asked for _, _, asked in site.asked] == [None, "bytes=1500000-", "bytes=3500000-"]


def test_a_second_run_continues_the_first(site: Site, tmp_path: Path) -> None:
    """A run that gives up keeps its piece under a name that nobody takes for the file."""
    file = published(site)
    site.cuts = [1_000_000]
    with pytest.raises(DownloadError, match=r"failed 1 times.*1,000,000 bytes are kept in .*tiny\.pt\.part"):
        download(file, tmp_path / "tiny.pt", tries=1, pause=0)
    assert names(tmp_path) == ["tiny.pt.part"]
    download(file, tmp_path / "tiny.pt")
    assert (tmp_path / "tiny.pt").read_bytes() == BODY
    assert site.asked[-1][2] == "bytes=1000000-"


def test_a_server_without_ranges_starts_over(site: Site, tmp_path: Path) -> None:
    file = published(site)
    site.cuts, site.ranges = [1_000_000], False
    download(file, tmp_path / "tiny.pt", pause=0)
    assert (tmp_path / "tiny.pt").read_bytes() == BODY


def test_a_server_that_tells_no_length_is_held_to_the_published_size(site: Site, tmp_path: Path) -> None:
    """Such an answer looks whole when its connection breaks."""
    file = published(site)
    site.cuts, site.lengths = [1_000_000], False
    download(file, tmp_path / "tiny.pt", pause=0)
    assert (tmp_path / "tiny.pt").read_bytes() == BODY
    assert len(site.asked) == 2


@pytest.mark.parametrize("piece", [BODY, BODY + b"!", b"stale" * 10], ids=["whole", "too long", "of another file"])
def test_any_piece_left_behind_leads_to_the_right_file(site: Site, tmp_path: Path, piece: bytes) -> None:
    (tmp_path / "tiny.pt.part").write_bytes(piece)
    download(published(site), tmp_path / "tiny.pt", pause=0)
    assert (tmp_path / "tiny.pt").read_bytes() == BODY


def test_server_errors_are_tried_again_and_client_errors_are_not(site: Site, tmp_path: Path) -> None:
    file = published(site)
    site.statuses = [503, 429]
    download(file, tmp_path / "tiny.pt", pause=0)
    assert len(site.asked) == 3
    site.asked.clear()
    with pytest.raises(DownloadError, match=r"models/none\.pt answered HTTP 404"):
        download(File("none.pt", url=f"{site.url}/models/none.pt"), tmp_path / "none.pt", pause=0)
    assert len(site.asked) == 1 and names(tmp_path) == ["plm", "tiny.pt"]


@pytest.mark.parametrize("wrong", [BODY[:-1] + b"!", BODY[:-1]], ids=["one byte differs", "one byte less"])
def test_wrong_bytes_leave_nothing_behind(site: Site, tmp_path: Path, wrong: bytes) -> None:
    file = published(site)
    site.files["/models/tiny.pt"] = wrong
    with pytest.raises(DownloadError, match=r"not the published file.*was deleted|it was replaced"):
        download(file, tmp_path / "tiny.pt", pause=0)
    assert names(tmp_path) == []


def test_disk_space_is_looked_at_before_data(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"needs 5,120,000 bytes, .* has 1,000 left"):
        download(published(site), tmp_path / "tiny.pt")
    assert names(tmp_path) == []


def test_two_downloads_at_once_ask_once(site: Site, tmp_path: Path) -> None:
    """The second waits for the lock and finds the file there."""
    file = published(site)
    threads = [threading.Thread(target=download, args=(file, tmp_path / "tiny.pt")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "tiny.pt").read_bytes() == BODY and len(site.asked) == 1


def test_original_form_downloads_both_files_once(site: Site, tmp_path: Path) -> None:
    """The model and its contact regression come to lie side by side; afterwards no network is needed."""
    file = published(site)
    regression = File("tiny-contact-regression.pt", url=f"{site.url}/models/tiny.pt")
    row = Checkpoint("tiny", "esm", "MIT", "none", originals=(file, regression))
    path = fetch(row, form="original")
    assert path == home() / "originals" / "tiny.pt" == tmp_path / "plm" / "originals" / "tiny.pt"
    assert names(path.parent) == ["tiny-contact-regression.pt", "tiny.pt"]
    site.asked.clear()
    assert fetch(row, form="original", offline=True) == path and not site.asked


def test_files_of_fair_esm_are_used_where_they_lie(site: Site, tmp_path: Path) -> None:
    file = published(site)
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "tiny.pt").write_bytes(BODY)
    row = Checkpoint("tiny", "esm", "MIT", "none", originals=(file,))
    assert fetch(row, form="original", offline=True) == hub / "tiny.pt" and not site.asked
    (hub / "tiny.pt").write_bytes(BODY[:-1] + b"!")
    with pytest.raises(DownloadError, match=r"checkpoints/tiny\.pt is not the published file.*Delete"):
        fetch(row, form="original", offline=True)


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_original_form_offline_says_what_to_do(site: Site, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", switch == "environment")
    row = Checkpoint("tiny", "esm", "MIT", "none", originals=(published(site),))
    with pytest.raises(DownloadError, match=r"tiny\.pt is missing.*switched off.*put the file of http"):
        fetch(row, form="original", offline=switch == "argument")
    assert not site.asked


@pytest.fixture
def twice_published(site: Site, golden: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """The tiny ESM-2 as its authors' two files on the server and on a hub where it is missing; known by name."""
    originals = []
    for name in ("esm2_tiny.pt", "esm2_tiny-contact-regression.pt"):
        body = (golden / "esm" / "esm2_tiny" / name).read_bytes()
        site.files[f"/models/{name}"] = body
        originals.append(File(name, len(body), (sha256(body),), f"{site.url}/models/{name}"))
    row = Checkpoint("tiny", "esm", "MIT", "none", hub="org/model", revision=COMMIT, originals=tuple(originals))
    monkeypatch.setattr("plm_weights.registry._BY_NAME", {"tiny": row, "esm2_tiny": row})
    return row


def test_originals_of_fair_esm_serve_where_the_hub_cannot(
    twice_published: Checkpoint, golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Offline, and where the download fails; only when both files are there and right, and never for a revision."""
    folder, tiny = tmp_path / "torch" / "hub" / "checkpoints", golden / "esm" / "esm2_tiny"
    folder.mkdir(parents=True)
    shutil.copyfile(tiny / "esm2_tiny.pt", folder / "esm2_tiny.pt")
    with pytest.raises(DownloadError, match=r"org/model@0123.* network is switched off"):
        plm.load("tiny", offline=True)
    shutil.copyfile(tiny / "esm2_tiny-contact-regression.pt", folder / "esm2_tiny-contact-regression.pt")
    assert "instead" not in caplog.text
    for offline in (True, False):
        caplog.clear()
        origin = plm.load("tiny", offline=offline).checkpoint
        assert [file.path for file in origin.files] == [folder / file.name for file in twice_published.originals]
        assert (origin.name, origin.source, origin.revision) == ("tiny", twice_published.originals[0].url, None)
        assert f"The original files in {folder} are used instead" in caplog.text
    with pytest.raises(DownloadError, match="org/model@main"):
        plm.load("tiny", revision="main", offline=True)
    damaged = bytearray((folder / "esm2_tiny.pt").read_bytes())
    damaged[-1] ^= 1
    (folder / "esm2_tiny.pt").write_bytes(damaged)
    with pytest.raises(DownloadError, match="org/model@0123"):
        plm.load("tiny", offline=True)


def test_a_prefix_asks_for_the_authors_own_files(twice_published: Checkpoint, site: Site) -> None:
    origin = plm.load("fair-esm:esm2_tiny").checkpoint
    assert [path for _, path, _ in site.asked] == [f"/models/{file.name}" for file in twice_published.originals]
    assert (origin.name, origin.source, origin.revision) == ("tiny", twice_published.originals[0].url, None)
    assert [file.path.parent for file in origin.files] == [home() / "originals"] * 2
    site.asked.clear()
    plm.load("fair-esm:tiny", offline=True)
    assert not site.asked
    with pytest.raises(ValueError, match="original files have no revisions"):
        plm.load("fair-esm:tiny", revision="main")


def test_hub_form_downloads_once_and_takes_one_set_of_weights(site: Site) -> None:
    row = hub_row(site, REPOSITORY | {"pytorch_model.bin": b"the same weights", "tf_model.h5": b"and again"})
    folder = fetch(row)
    assert names(folder) == ["config.json", "model.safetensors", "vocab.txt"]
    assert {name: (folder / name).read_bytes() for name in REPOSITORY} == REPOSITORY
    site.asked.clear()
    assert fetch(row) == folder == fetch(row, offline=True)
    assert not site.asked, "a complete pinned snapshot needs no network"


def test_hub_form_follows_the_index_of_shards(site: Site) -> None:
    """Without safetensors the shards of the .bin are taken; while one is missing the set does not count."""
    shards = {f"pytorch_model-0000{i}-of-00002.bin": b"%d" % i for i in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    row = hub_row(site, {"config.json": b"{}", "pytorch_model.bin.index.json": index, **shards})
    folder = fetch(row)
    assert [path.name for path in weight_files(folder)] == ["pytorch_model.bin.index.json", *shards]
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert weight_files(folder) == ()
    with pytest.raises(DownloadError, match=r"org/model@0123.*switched off.*hf download org/model --revision 0123"):
        fetch(row, offline=True)
    assert fetch(row) == folder and len(weight_files(folder)) == 3


def test_hub_form_takes_a_lone_bin_and_every_file_of_a_tokenizer(site: Site) -> None:
    """As Ankh and ProtT5 are published. Other states of the training that lie there, too, stay where they are."""
    files = dict.fromkeys(("spiece.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"), b"{}")
    files |= {"config.json": b"{}", "pytorch_model.bin": b"weights"}
    folder = fetch(hub_row(site, files | {"pytorch_model_600k.bin": b"younger", "flax_model.msgpack": b"again"}))
    assert names(folder) == sorted(files)


def test_hub_bytes_are_hashed_once_and_again_after_a_change(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub compares sizes only, so a file of the right size and wrong bytes is ours to find."""
    row = hub_row(site)
    folder = fetch(row)
    weights = (folder / "model.safetensors").resolve()
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed a second time"))
        fetch(row)
    weights.write_bytes(b"WEIGHTS" * 1000)
    with pytest.raises(DownloadError, match=rf"model\.safetensors is not the published file.*Delete {weights}"):
        fetch(row)
    weights.unlink()
    assert (fetch(row) / "model.safetensors").read_bytes() == REPOSITORY["model.safetensors"]


def test_hub_serves_other_bytes_than_the_registry_knows(site: Site) -> None:
    row = hub_row(site)
    site.files[f"/org/model/resolve/{COMMIT}/model.safetensors"] = b"WEIGHTS" * 1000
    with pytest.raises(DownloadError, match=r"model\.safetensors is not the published file"):
        fetch(row)


def test_unknown_hub_id_says_that_nothing_is_pinned(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A branch is asked for each time; its large files are still compared with the hash that the hub promised."""
    hub_row(site)
    folder = fetch("org/model")
    assert folder.name == COMMIT and "no hashes are on record" in caplog.text
    (folder / "model.safetensors").resolve().write_bytes(b"WEIGHTS" * 1000)
    with pytest.raises(DownloadError, match=r"not the published file"):
        fetch("org/model", offline=True)


@pytest.mark.parametrize("files", [{}, {"config.json": b"{}", "tf_model.h5": b"weights"}], ids=["empty", "tensorflow"])
def test_repository_without_weights(site: Site, files: dict[str, bytes]) -> None:
    with pytest.raises(DownloadError, match=r"org/model@0123.* has no complete set of weights"):
        fetch(hub_row(site, files))


def test_hub_out_of_reach(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    take_for_hub(f"http://127.0.0.1:{port}", monkeypatch)
    with pytest.raises(DownloadError, match=r"org/model@main could not be downloaded: .*HF_ENDPOINT"):
        fetch("org/model")


def test_environment_names_the_mirror_and_the_switch(site: Site, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE as a user sets them, in a process of its own; the token is not shown."""
    hub_row(site)
    script = "from plm_weights.fetch import fetch; print(fetch('org/model'))"
    environment = os.environ | {"HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path / "user"), "HF_TOKEN": "hf_secret"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(**more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-c", script], env=environment | more, capture_output=True, text=True)

    online = run()
    assert online.stdout.startswith(str(tmp_path / "user" / "hub")), online.stderr
    site.asked.clear()
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout, offline.stderr
    assert not site.asked
    assert "hf_secret" not in online.stderr + offline.stderr


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(CheckpointError, match=r"names files outside its folder: \.\./secret"):
        weight_files(tmp_path / "folder")
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"not an index of shards"):
        weight_files(tmp_path / "folder")


def test_what_cannot_be_asked_for(site: Site) -> None:
    row = Checkpoint("tiny", "esm", "MIT", "none", hub="org/model")
    with pytest.raises(UnknownModelError, match=r"esm2-650m"):
        fetch("esm2-65m")
    with pytest.raises(DownloadError, match=r"no original files"):
        fetch(row, form="original")
    with pytest.raises(ValueError, match=r"no revisions"):
        fetch(row, form="original", revision="main")
    assert not site.asked


def test_the_shipped_checkpoint_is_a_folder_of_the_package() -> None:
    import plm_weights

    assert fetch("plm-mini") == Path(plm_weights.__path__[0]) / "plm_mini"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLM_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("PLM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "plm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "plm"
