"""An output appears whole or not at all, and what cannot be written is refused before any work."""

import os
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embeddings import CHANNELS, IDS, PATHS, embeddings, listing, open_, write

from plm.outputs import FORMATS, LayoutError, OutputError, Writer, read_embeddings


def stop_midway(writer: Writer) -> None:
    raise KeyboardInterrupt


def forget_one(writer: Writer) -> None:
    pass


def fill_the_disk(writer: Writer) -> None:
    def put(index: int, array: object) -> None:
        raise OSError(28, "No space left on device")

    writer._put = put  # type: ignore[method-assign]
    writer.write(3, embeddings(True)[3])


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("fail", "error", "words"),
    [
        (stop_midway, KeyboardInterrupt, "^$"),
        (forget_one, ValueError, "1 of 4 sequences were not written, among them 'é'"),
        (fill_the_disk, OutputError, "No space left on device"),
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_whole_or_not_at_all(
    tmp_path: Path, name: str, existing: bool, fail: Callable[[Writer], None], error: type[BaseException], words: str
) -> None:
    path = f"{tmp_path}/{PATHS[name]}"
    if existing:
        write(path, embeddings(True), format=name, provenance={"run": 1})
    before = listing(tmp_path)
    with pytest.raises(error, match=words), open_(path, format=name, overwrite=existing) as writer:
        for index in range(3):
            writer.write(index, torch.zeros(CHANNELS))
        fail(writer)
    assert listing(tmp_path) == before
    if existing:
        back = read_embeddings(path)
        assert back.provenance == {"run": 1}
        np.testing.assert_array_equal(back.arrays, torch.stack(embeddings(True)).numpy())


FULL_DISK = """
import os, resource, sys, torch
from plm.outputs import OutputError, open_writer
path, name, limit, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pooled = name in ("csv", "tsv", "jsonl") or count > 20
torch.save(0, os.devnull)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    ids, lengths = [str(i) for i in range(count)], [100] * count
    about = dict(ids=ids, lengths=lengths, channels=300, pooled=pooled, layer=0, provenance={})
    with open_writer(path, format=name, **about) as writer:
        for index in range(count):
            writer.write(index, torch.randn(300 if pooled else (100, 300)))
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize(
    ("name", "limit", "count"),
    [
        *((n, m, 20) for n in ("safetensors", "npz", "h5", "parquet", "esm-pt", "csv", "jsonl") for m in (10, 60_000)),
        ("h5", 1_000_000, 2000),
    ],
)
def test_full_disk(tmp_path: Path, name: str, limit: int, count: int) -> None:
    """The system itself refuses to write on, at once or midway. HDF5 with many datasets open then crashed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-c", FULL_DISK, f"{folder}/{PATHS[name]}", name, str(limit), str(count)]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("cannot write ") and "File too large" in run.stdout
    assert listing(folder) == []


INTERRUPTED = """
import sys, time, torch
from plm.outputs import open_writer
about = dict(ids=["a", "b"], lengths=[9, 9], channels=4, pooled=False, layer=0, provenance={})
with open_writer(sys.argv[1], **about) as writer:
    writer.write(0, torch.zeros(9, 4))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.parametrize("name", ["safetensors", "h5", "esm-pt"])
def test_interrupt(tmp_path: Path, name: str) -> None:
    """Ctrl-C as a user presses it: a signal to a process at work."""
    command = [sys.executable, "-c", INTERRUPTED, f"{tmp_path}/{PATHS[name]}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    assert len(listing(tmp_path)) == 1  # the temporary one
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert listing(tmp_path) == []


def test_write_checks_what_it_gets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 4"), open_(tmp_path / "out.npz", dtype="float16") as writer:
        for index in (0, 1, 2):
            writer.write(index, torch.zeros(CHANNELS))
        with pytest.raises(ValueError, match="sequence 0 was written before"):
            writer.write(0, torch.zeros(CHANNELS))
        for index in (4, -1):
            with pytest.raises(ValueError, match=rf"sequence {index} is not in 0\.\.3"):
                writer.write(index, torch.zeros(CHANNELS))
        with pytest.raises(ValueError, match=r"'é': an embedding of shape \[5, 7\], wanted \[7\]"):
            writer.write(3, torch.zeros(5, CHANNELS))
        for value in (float("nan"), 70_000.0):  # the second is infinite in float16
            with pytest.raises(ValueError, match="'é': the embedding is not finite in float16"):
                writer.write(3, torch.full((CHANNELS,), value))


def test_the_caller_may_use_its_tensor_again(tmp_path: Path) -> None:
    """Layouts that keep rows until the end must keep a copy."""
    for name in FORMATS:
        with open_(f"{tmp_path}/{PATHS[name]}", format=name) as writer:
            row = torch.ones(CHANNELS)
            for index in range(4):
                writer.write(index, row.fill_(index))
        assert [array[0] for array in read_embeddings(f"{tmp_path}/{PATHS[name]}").arrays] == [0, 1, 2, 3]


def test_targets_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.h5").write_bytes(b"precious")
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_bytes(b"precious")
    (tmp_path / "folder" / "provenance.json").write_bytes(b"{}")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "esm2_t33_650M_UR50D.pt").write_bytes(b"precious")
    for path, words, options in [
        ("file.h5", "exists already", {}),
        ("folder.h5", "not an ordinary file", {"format": "h5", "overwrite": True}),
        ("file.h5/out.h5", "is not a folder", {}),
        ("missing/out.h5", "is not a folder; create it first", {}),
        ("folder", "not empty", {}),
        ("folder", "not written by plm or holds other files", {"overwrite": True}),
        ("weights", "not written by plm or holds other files", {"overwrite": True}),
        ("x" * 300 + ".h5", "name too long", {}),
        ("file.h5", "it is a file, and esm-pt needs a folder", {"format": "esm-pt", "overwrite": True}),
        ("out.h5", "too long for HDF5", {"provenance": {"command": "x" * 70_000}}),
    ]:
        with pytest.raises(OutputError, match=words):
            open_(tmp_path / path, **options)
    with pytest.raises(ValueError, match="4 ids and 1 lengths"):
        open_(tmp_path / "out.h5", lengths=[1])
    with pytest.raises(OutputError, match="no such file"):
        read_embeddings(tmp_path / "missing.h5")

    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(100))
    with pytest.raises(OutputError, match="are free"):
        open_(tmp_path / "out.h5")

    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"takes no new files \(Permission denied\); choose another folder"):
        open_(tmp_path / "out.h5")
    assert listing(tmp_path) == ["file.h5", "folder", "folder.h5", "weights"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_folder_that_only_claims_to_be_writable() -> None:
    """Its mode lets root write, and its disk has no room at all: that is not the reason to give."""
    with pytest.raises(OutputError, match="/proc takes no new files"):
        open_("/proc/out.h5")


@pytest.mark.parametrize(
    ("path", "words", "options"),
    [
        ("out.xyz", "'.xyz' names no layout; use .safetensors", {}),
        ("out", "folder for esm-pt", {}),
        ("out.h5", "unknown format 'hdf'; choose one of safetensors", {"format": "hdf"}),
        ("out.csv", "csv holds pooled embeddings only", {"pooled": False}),
        ("out.h5", "cannot store bfloat16", {"dtype": "bfloat16"}),
    ],
)
def test_impossible_layouts(tmp_path: Path, path: str, words: str, options: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match=words):
        open_(tmp_path / path, **options)


@pytest.mark.parametrize(("suffix", "library"), [("h5", "h5py"), ("parquet", "pyarrow")])
def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OutputError, match=rf"needs {library}: pip install {library} .*'plm-torch\[{suffix}\]'"):
        open_(tmp_path / f"out.{suffix}")


def test_link_is_written_through(tmp_path: Path) -> None:
    """Renaming over a symbolic link would leave the file it points to as it was."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out.npz").symlink_to(tmp_path / "scratch" / "real.npz")
    write(tmp_path / "out.npz", embeddings(True))
    assert (tmp_path / "out.npz").is_symlink() and read_embeddings(tmp_path / "scratch" / "real.npz").ids == IDS
