"""Tar archives of checkpoints: what is unpacked is right and flat, and nothing bad leaves a trace."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_server import Site, sha256
from test_fetch import only_this_machine, site  # noqa: F401  (fixtures)

import plm
from plm_weights import archives
from plm_weights.archives import is_archive, unpack, unpacked
from plm_weights.errors import CheckpointError, DownloadError
from plm_weights.fetch import fetch, home, is_here
from plm_weights.registry import Checkpoint, File

CASE = Path(__file__).parent / "golden" / "progen2" / "bin_fp16_large_vocab"
FILES = {name: (CASE / name).read_bytes() for name in ("config.json", "pytorch_model.bin")}
WEIGHTS = "pytorch_model.bin"


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: object) -> bytes:
    """One member as it lies in an archive. ``size`` may claim more than there is."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def tar(*members: bytes) -> bytes:
    return b"".join(members) + bytes(1024)


def published(prefix: str = "./") -> bytes:
    """The layout of the authors' archives."""
    return tar(*(member(prefix + name, content) for name, content in FILES.items()))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def left(folder: Path) -> set[str]:
    """What lies there, but for locks."""
    return {path.name for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.mark.parametrize("prefix", ["./", "", "progen2-small/", "./a/b/"])
@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gz", "plain"])
def test_known_files_are_unpacked_flat(tmp_path: Path, prefix: str, compress: Callable[[bytes], bytes]) -> None:
    more = member("README.md", b"x"), member("run.sh", b"rm -rf /", mode=0o777), member("a", kind=tarfile.DIRTYPE)
    archive = write(tmp_path / "a.tar.gz", compress(b"".join(more) + published(prefix)))
    assert is_archive(archive)
    files = unpack(archive, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in files} == FILES and files[-1].name == WEIGHTS
    assert left(tmp_path) == {"a.tar.gz", "out", *FILES}
    assert all(file.stat().st_mode & 0o111 == 0 for file in files)


def test_checkpoints_are_no_archives(tmp_path: Path) -> None:
    safetensors = CASE.parent / "half_rotary_buffers" / "model.safetensors"
    assert not any(map(is_archive, (CASE / WEIGHTS, CASE / "config.json", safetensors, write(tmp_path / "x", b""))))


HOSTILE = {
    "absolute": (member("/elsewhere/pytorch_model.bin", b"x"), "'/elsewhere/pytorch_model.bin' has an absolute name"),
    "absolute, unwanted": (member("/etc/cron.d/x", b"x"), "'/etc/cron.d/x' has an absolute name"),
    "parent": (member("../pytorch_model.bin", b"x"), r"'\.\./pytorch_model\.bin' would be extracted to .* outside"),
    "deep parent": (member("a/../../x", b"x"), r"'a/\.\./\.\./x' would be extracted to .* outside"),
    "symbolic link": (
        member("config.json", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
        r"'config\.json' is a link or a device",
    ),
    "link within": (member("config.json", kind=tarfile.SYMTYPE, linkname="x"), "is a link or a device"),
    "hard link": (member(WEIGHTS, kind=tarfile.LNKTYPE, linkname="../../x"), "is a link or a device"),
    "character device": (member("zero", kind=tarfile.CHRTYPE), "'zero' is a link or a device"),
    "block device": (member("disk", kind=tarfile.BLKTYPE), "'disk' is a link or a device"),
    "pipe": (member(WEIGHTS, kind=tarfile.FIFOTYPE), "is a link or a device"),
    "twice": (member("b/config.json", b"{}"), r"two files config\.json, of which '\./config\.json' is the second"),
    "larger than any disk": (member("x", size=1 << 60), r"'x' claims 1,152,921,504,606,846,976 bytes, .* make room"),
    "a size below zero": (member("x", size=-1024), "'x' claims -1,024 bytes"),
    "a size that leads back": (  # to the start, which tarfile takes for the end, or to the member itself
        member("x", kind=tarfile.GNUTYPE_SPARSE, size=-512),
        r"(no pytorch_model\.bin|its members have no end \(after 3, at 'x'\))",
    ),
    "members without number": (member("x") * 10_001, "its members have no end"),
    "endless name": (
        member("x", kind=tarfile.GNUTYPE_LONGNAME, size=1 << 40),
        "claims to be 1,099,511,627,776 bytes long",
    ),
    "endless attributes": (
        member("x", kind=tarfile.XHDTYPE, size=1 << 40),
        "claims to be 1,099,511,627,776 bytes long",
    ),
    "names of names": (member("x", b"y", kind=tarfile.GNUTYPE_LONGNAME) * 5000, "maximum recursion depth"),
    "a date that is none": (member("tokenizer.json", b"{}", mtime=1 << 70), "timestamp out of range"),
}


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_leave_nothing(tmp_path: Path, name: str, order: str) -> None:
    """Whether the bad member comes before the good files or behind them."""
    bad, says = HOSTILE[name]
    if name == "twice" and order == "last":
        says = "of which 'b/config.json' is the second"
    good = published()
    whole = bad + good if order == "first" else good[:-1024] + bad + bytes(1024)
    (tmp_path / "in").mkdir()  # a name with one .. in front would still land in the folder of this test
    archive = write(tmp_path / "in" / "a.tar.gz", gzip.compress(whole))
    with pytest.raises(CheckpointError, match=rf"a\.tar\.gz cannot be unpacked: .*{says}"):
        unpack(archive, tmp_path / "in" / "out")
    assert left(tmp_path) == {"in", "a.tar.gz"}


def test_an_archive_that_is_torn_anywhere_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(published())
    for cut in (*range(2, 40), *range(40, len(whole), len(whole) // 50), len(whole) - 8, len(whole) - 1):
        with pytest.raises(CheckpointError, match=r"a\.tar\.gz cannot be unpacked: .*fetch it again"):
            unpack(write(tmp_path / "a.tar.gz", whole[:cut]), tmp_path / "out")
        assert left(tmp_path) == {"a.tar.gz"}


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    """Stored without compression, so that nothing but the checksum at the end can tell."""
    whole = bytearray(gzip.compress(published(), compresslevel=0))
    whole[len(whole) // 2] ^= 1
    with pytest.raises(CheckpointError, match="CRC check failed"):
        unpack(write(tmp_path / "a.tar.gz", bytes(whole)), tmp_path / "out")
    assert left(tmp_path) == {"a.tar.gz"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b"{}"), "truncated header"),
        (gzip.compress(b"weights" * 1000), "."),
        (gzip.compress(b""), "empty file"),
        (gzip.compress(tar(member("config.json", b"{}"))), "no model.safetensors and no pytorch_model.bin"),
        (gzip.compress(published() + bytes(2 << 20)), "more than 1,048,576 bytes follow its last member"),
        (gzip.compress(published()) + b"more", "Not a gzipped file"),
    ],
    ids=["json", "weights", "nothing", "no weights", "a long tail", "a foreign tail"],
)
def test_what_is_no_archive_of_a_checkpoint(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.tar\.gz cannot be unpacked: .*{says}"):
        unpack(write(tmp_path / "a.tar.gz", content), tmp_path / "out")
    assert left(tmp_path) == {"a.tar.gz"}


def test_no_more_is_claimed_than_the_disk_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"'\./pytorch_model\.bin' claims 505,359 bytes, .* has 1,000 left"):
        unpack(write(tmp_path / "a.tar.gz", gzip.compress(published())), tmp_path / "out")
    assert left(tmp_path) == {"a.tar.gz"}


def test_a_zip_bomb_is_not_decompressed_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that nobody wants is read past in small pieces."""
    largest = []

    class Watched(gzip.GzipFile):
        def readinto(self, buffer: Any) -> int:
            largest.append(len(buffer))
            return super().readinto(buffer)

        def read(self, size: int | None = -1) -> bytes:
            largest.append(1 << 62 if size is None or size < 0 else size)
            return super().read(size)

    archive = write(tmp_path / "a.tar.gz", gzip.compress(member("zeros", bytes(32 << 20)) + published(), 1))
    monkeypatch.setattr(gzip, "GzipFile", Watched)
    unpack(archive, tmp_path / "out")
    assert 0 < max(largest) <= archives.LONGEST_READ


def test_interrupted_runs_leave_no_folder_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it writes: only the half-made folder stays, under a name that nobody takes for it."""
    archive = write(tmp_path / "a.tar.gz", gzip.compress(published()))
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # as when the process is killed
        with pytest.raises(KeyboardInterrupt):
            unpack(archive, tmp_path / "out")
    assert left(tmp_path) == {"a.tar.gz", "out.part", "config.json"}
    unpack(archive, tmp_path / "out")
    assert left(tmp_path) == {"a.tar.gz", "out", *FILES}


def test_many_may_unpack_at_once(tmp_path: Path) -> None:
    archive, found = write(tmp_path / "a.tar.gz", gzip.compress(published())), list[Path]()
    runs = [threading.Thread(target=lambda: found.append(unpacked(archive, tmp_path / "cache"))) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert (found[0] / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_an_archive_is_unpacked_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, cache = write(tmp_path / "mine.tar.gz", gzip.compress(published())), tmp_path / "cache"
    folder = unpacked(archive, cache)
    assert folder.name.startswith("mine-")
    with monkeypatch.context() as patched:
        patched.setattr(archives, "unpack", lambda *_: pytest.fail("unpacked a second time"))
        assert unpacked(archive, cache) == folder
    write(archive, gzip.compress(tar(member("config.json", b"{}"), member(WEIGHTS, b"other"))))
    again = unpacked(archive, cache)
    assert again != folder and (again / WEIGHTS).read_bytes() == b"other"


@pytest.mark.parametrize("name", ["model.tar.gz", "model.tgz", "model.tar", "model"])
def test_an_archive_is_loaded_as_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By what it holds, whatever it is called."""
    monkeypatch.setenv("PLM_HOME", str(tmp_path / "home"))
    (tmp_path / "in").mkdir()
    compress = bytes if name == "model.tar" else gzip.compress
    archive = write(tmp_path / "in" / name.replace("model", "progen2-mine"), compress(published()))
    model, folder = plm.load(archive), plm.load(CASE)
    assert all(
        bool((ours == theirs).all())
        for ours, theirs in zip(model.net.state_dict().values(), folder.net.state_dict().values(), strict=True)
    )
    origin = model.checkpoint
    assert (origin.name, origin.source) == ("progen2-mine", str(archive))
    assert origin.sha256() == folder.checkpoint.sha256()
    assert origin.files[0].path.is_relative_to(home() / "unpacked")
    assert sorted(path.name for path in plm.convert(archive, tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert plm.verify(archive).passed


def test_a_hostile_pickle_within_an_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLM_HOME", str(tmp_path / "home"))
    mark = tmp_path / "ran"
    pickle = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    archive = write(tmp_path / "a.tar.gz", gzip.compress(tar(member("config.json", b"{}"), member(WEIGHTS, pickle))))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read.*Nothing in it was run"):
        plm.load(archive)
    assert not mark.exists()


@pytest.fixture
def row(site: Site, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:  # noqa: F811
    """The tiny ProGen2 as its authors would publish it, known by name, and a port that the hub does not have."""
    site.files["/checkpoints/tiny.tar.gz"] = gzip.compress(published())
    row = Checkpoint(
        "tiny",
        "progen2",
        "BSD-3-Clause",
        "none",
        hub="org/model",
        originals=(File("config.json"), File(WEIGHTS, len(FILES[WEIGHTS]), (sha256(FILES[WEIGHTS]),))),
        archive=f"{site.url}/checkpoints/tiny.tar.gz",
        preferred="original",
    )
    monkeypatch.setattr("plm_weights.registry._BY_NAME", {"tiny": row, "org/model": row})
    return row


def offer_port(site: Site) -> None:  # noqa: F811
    """A model of the same family on the hub."""
    for name in ("config.json", "model.safetensors"):
        content = (CASE.parent / "half_rotary_buffers" / name).read_bytes()
        site.files[f"/org/model/resolve/{site.commit}/{name}"] = content


@pytest.mark.parametrize("name", ["tiny", "original:tiny"])
def test_a_name_means_the_authors_archive(row: Checkpoint, site: Site, name: str) -> None:  # noqa: F811
    """Downloaded and unpacked once; the archive is not kept; afterwards no network is needed."""
    assert not is_here(row)
    origin = plm.load(name).checkpoint
    folder = home() / "originals" / "tiny"
    assert [path for _, path, _ in site.asked] == ["/checkpoints/tiny.tar.gz"]
    assert (origin.name, origin.source, origin.revision) == ("tiny", row.archive, None)
    assert [file.path for file in origin.files] == [folder / WEIGHTS]
    assert left(folder.parent) == {"tiny", *FILES} and is_here(row)
    site.asked.clear()
    plm.load(name, offline=True)
    assert not site.asked


def test_a_hub_id_and_a_revision_mean_the_port(row: Checkpoint, site: Site) -> None:  # noqa: F811
    offer_port(site)
    for source, revision in (("org/model", None), ("tiny", "main")):
        origin = plm.load(source, revision=revision).checkpoint
        assert (origin.source, origin.revision) == ("org/model", site.commit)
    assert not any("tar.gz" in path for _, path, _ in site.asked)


def test_the_port_serves_where_the_archive_cannot_be_had(
    row: Checkpoint,
    site: Site,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    offer_port(site)
    with pytest.raises(DownloadError, match=r"config\.json is missing.*switched off.*put the file of .*tiny\.tar\.gz"):
        plm.load("tiny", offline=True)
    plm.load("org/model")
    origin = plm.load("tiny", offline=True).checkpoint
    assert (origin.source, origin.revision) == ("org/model", site.commit)
    assert "The hub files in" in caplog.text and "are used instead" in caplog.text


@pytest.mark.parametrize("fault", ["torn", "other weights", "hostile"])
def test_a_wrong_archive_is_not_kept(row: Checkpoint, site: Site, fault: str) -> None:  # noqa: F811
    """The next run downloads it again."""
    good = site.files["/checkpoints/tiny.tar.gz"]
    bad, says = {
        "torn": (good[:-100], r"tiny\.tar\.gz cannot be unpacked"),
        "other weights": (
            gzip.compress(published().replace(FILES[WEIGHTS], FILES[WEIGHTS][:-1] + b"!")),
            r"pytorch_model\.bin is not the published file.*Delete",
        ),
        "hostile": (gzip.compress(member("../x", b"x") + published()), "outside"),
    }[fault]
    site.files["/checkpoints/tiny.tar.gz"] = bad
    with pytest.raises(CheckpointError, match=says):
        fetch(row)
    assert not (home() / "originals" / "tiny.tar.gz").exists()
    site.files["/checkpoints/tiny.tar.gz"] = good
    if fault == "other weights":
        (home() / "originals" / "tiny" / WEIGHTS).unlink()
    assert (fetch(row) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_an_interrupted_run_keeps_the_archive(
    row: Checkpoint,
    site: Site,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which took long to download."""
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: None)
        patched.setattr(tarfile.TarFile, "extract", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(row)
    assert left(home() / "originals") == {"tiny.tar.gz"}
    site.asked.clear()
    fetch(row)
    assert not site.asked and left(home() / "originals") == {"tiny", *FILES}


def test_many_may_fetch_at_once(row: Checkpoint, site: Site) -> None:  # noqa: F811
    found = list[Path]()
    runs = [threading.Thread(target=lambda: found.append(fetch(row))) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert found == [home() / "originals" / "tiny"] * 4 and len(site.asked) == 1


def test_room_is_asked_for_before_unpacking(row: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive, which took long to download, is kept for the next run."""
    sizes = iter([1 << 40, 1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(sizes)))
    with pytest.raises(DownloadError, match=r"tiny\.tar\.gz unpacks to 505,359 bytes, 1,000 are left"):
        fetch(row, form="original")
    assert left(home() / "originals") == {"tiny.tar.gz"}
