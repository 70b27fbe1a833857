"""Every layout holds what was written, appears whole or not at all, and opens with the library it is made for."""

import csv
import json
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
from torch import Tensor

from plm.outputs import FORMATS, LayoutError, OutputError, Writer, open_writer, read_embeddings

IDS = ["sp|P1|CET1", "a/../b c", "a/../b c", "é"]
LENGTHS = [3, 1, 63, 5]
CHANNELS = 7
PROVENANCE = {
    "model": "esm2-8m",
    "pooling": "mean",
    "sha256": {"model.safetensors": "00ff"},
    "command": ["π", "\udce9"],
}
PATHS = {name: f"out.{name}" for name in FORMATS} | {"esm-pt": "out/", "bio-h5": "bio.h5"}
TEXT = ("csv", "tsv", "jsonl")
BINARY = tuple(name for name in FORMATS if name not in TEXT)
CASES = [(name, pooled) for name in FORMATS for pooled in (True, False) if pooled or name in BINARY]


def embeddings(pooled: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(CHANNELS,) if pooled else (length, CHANNELS) for length in LENGTHS]
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_(path: Path | str, **changes: Any) -> Writer:
    about: dict[str, Any] = {"ids": IDS, "lengths": LENGTHS, "channels": CHANNELS, "provenance": PROVENANCE}
    return open_writer(path, **(about | {"pooled": True, "layer": 6} | changes))


def write(path: Path | str, tensors: list[Tensor], order: tuple[int, ...] = (2, 0, 3, 1), **changes: Any) -> None:
    with open_(path, **changes) as writer:
        for index in order:
            writer.write(index, tensors[index])


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(("name", "pooled"), CASES)
def test_round_trip(tmp_path: Path, name: str, pooled: bool, dtype: str) -> None:
    """Written longest first, read in input order: every value, id and piece of provenance."""
    tensors = embeddings(pooled, torch.float64)
    path = f"{tmp_path}/{PATHS[name]}"
    write(path, tensors, format=name, pooled=pooled, dtype=dtype)
    back = read_embeddings(path, format=name)
    assert back.ids == IDS and back.provenance == PROVENANCE
    wanted = np.dtype("float32" if name in TEXT else dtype)
    for array, tensor in zip(back.arrays, tensors, strict=True):
        assert array.dtype == wanted
        np.testing.assert_array_equal(array, tensor.numpy().astype(dtype).astype(wanted))
    assert listing(tmp_path) == [PATHS[name].strip("/")]


@pytest.mark.parametrize("name", BINARY)
def test_bfloat16_is_stored_as_float32_exactly(tmp_path: Path, name: str) -> None:
    tensors = embeddings(False, torch.bfloat16)
    write(f"{tmp_path}/{PATHS[name]}", tensors, format=name, pooled=False)
    for array, tensor in zip(read_embeddings(f"{tmp_path}/{PATHS[name]}").arrays, tensors, strict=True):
        np.testing.assert_array_equal(array, tensor.float().numpy())


@pytest.mark.parametrize("name", FORMATS)
def test_no_sequences(tmp_path: Path, name: str) -> None:
    """All records may have been skipped by a policy; the output is then empty, not broken."""
    path = f"{tmp_path}/{PATHS[name]}"
    write(path, [], (), format=name, ids=[], lengths=[])
    back = read_embeddings(path)
    assert (back.ids, back.arrays) == ([], [])


def test_safetensors_opens_with_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = embeddings(False)
    write(tmp_path / "out.safetensors", tensors, pooled=False)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.get_tensor("offsets").tolist() == [0, 3, 4, 67, 72]
        assert file.get_tensor("lengths").tolist() == LENGTHS
        assert torch.equal(file.get_tensor("embeddings"), torch.cat(tensors))
        start, stop = file.get_tensor("offsets")[2:4]
        assert torch.equal(file.get_slice("embeddings")[start:stop], tensors[2])
        assert json.loads(file.metadata()["ids"]) == IDS
        assert json.loads(file.metadata()["provenance"]) == PROVENANCE


def test_a_header_that_safetensors_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plm.outputs.maps import LAYOUTS, open_maps

    monkeypatch.setattr("plm.outputs.by_offset.HEADER_LIMIT", 300)
    with pytest.raises(OutputError, match="4 ids are too many for a safetensors header"):
        open_(tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match="4 ids are too many for a safetensors header"):
        open_maps(tmp_path / "a.safetensors", LAYOUTS["safetensors"], ids=IDS, lengths=LENGTHS, provenance="{}")


@pytest.mark.parametrize("layout", ["npz", "safetensors"])
def test_maps_in_any_order(tmp_path: Path, layout: str) -> None:
    from safetensors.numpy import load_file

    from plm.outputs.maps import LAYOUTS, open_maps

    maps = [torch.rand(length, length) for length in LENGTHS]
    path = tmp_path / f"maps.{layout}"
    with open_maps(path, LAYOUTS[layout], ids=IDS, lengths=LENGTHS, provenance=json.dumps(PROVENANCE)) as writer:
        for index in (2, 0, 3, 1):
            writer.write(index, maps[index])
    arrays = load_file(path) if layout == "safetensors" else np.load(path)
    for name, expected in zip(["sp|P1|CET1", "a_.._b c", "a_.._b c.2", "é"], maps, strict=True):
        np.testing.assert_array_equal(arrays[name], expected.numpy())


def test_npz_opens_with_numpy(tmp_path: Path) -> None:
    tensors = embeddings(False)
    write(tmp_path / "out.npz", tensors, pooled=False)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        names = ["sp|P1|CET1", "a_.._b c", "a_.._b c.2", "é"]
        assert set(arrays.files) == {*names, "provenance.json"}
        for name, tensor in zip(names, tensors, strict=True):
            np.testing.assert_array_equal(arrays[name], tensor.numpy())


@pytest.mark.parametrize(
    ("name", "keys"), [("h5", ["sp|P1|CET1", "a_.._b c", "a_.._b c.2", "é"]), ("bio-h5", ["0", "1", "2", "3"])]
)
def test_h5_opens_with_h5py(tmp_path: Path, name: str, keys: list[str]) -> None:
    """A slash in a key would make a group, in which ``for id, data in file.items()`` finds no data."""
    h5py = pytest.importorskip("h5py")
    tensors = embeddings(False)
    write(tmp_path / "out.h5", tensors, pooled=False, format=name)
    with h5py.File(tmp_path / "out.h5") as file:
        assert {key: value.attrs["original_id"] for key, value in file.items()} == dict(zip(keys, IDS, strict=True))
        for key, tensor in zip(keys, tensors, strict=True):
            np.testing.assert_array_equal(file[key][:], tensor.numpy())
        assert json.loads(file.attrs["provenance"]) == PROVENANCE


@pytest.mark.parametrize("pooled", [True, False])
def test_parquet_opens_with_pyarrow(tmp_path: Path, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("plm.outputs.parquet.GROUP_BYTES", 64 * CHANNELS * 4)  # two sequences fill a group
    tensors = embeddings(pooled)
    write(tmp_path / "out.parquet", tensors, pooled=pooled)
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["index"].to_pylist() == ([0, 1, 2, 3] if pooled else [0, 2, 1, 3])
    assert parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == (1 if pooled else 2)
    assert table["id"].to_pylist() == [IDS[index] for index in table["index"].to_pylist()]
    assert table["embedding"].to_pylist() == [tensors[index].tolist() for index in table["index"].to_pylist()]
    assert json.loads(table.schema.metadata[b"provenance"]) == PROVENANCE


def test_esm_pt_has_the_keys_of_fair_esm(tmp_path: Path) -> None:
    """fair-esm uses the whole header as a path: ``../`` leaves the folder, and long headers fail."""
    ids = ["../escape", "/etc/passwd", "x" * 300, "P1", "p1", "..", "", "\0"]
    tensors = [torch.full((2, CHANNELS), float(i)) for i in range(8)]
    write(tmp_path / "out", tensors, tuple(range(8)), format="esm-pt", ids=ids, lengths=[2] * 8, pooled=False)
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == sorted(
        [
            "provenance.json",
            "_._escape.pt",
            "_etc_passwd.pt",
            "x" * 200 + ".pt",
            "P1.pt",
            "p1.2.pt",
            "_..pt",
            "_.pt",
            "_.2.pt",
        ]
    )
    result = torch.load(tmp_path / "out" / "P1.pt", weights_only=True)
    assert result["label"] == "P1" and list(result["representations"]) == [6]
    assert torch.equal(result["representations"][6], tensors[3])


def test_esm_pt_names_the_pooling(tmp_path: Path) -> None:
    for pooling, key in (("mean", "mean_representations"), ("cls", "bos_representations")):
        write(f"{tmp_path}/{pooling}/", embeddings(True), provenance={"pooling": pooling})
        assert key in torch.load(tmp_path / pooling / "sp|P1|CET1.pt", weights_only=True)
    with pytest.raises(LayoutError, match="no place for pooling 'max'"):
        open_(f"{tmp_path}/max/", provenance={"pooling": "max"})
    with pytest.raises(LayoutError, match="layer -1"):
        open_(f"{tmp_path}/negative/", layer=-1)


def test_text_is_plain_text(tmp_path: Path) -> None:
    rows = [torch.tensor([0.1, 1e-5, -2.0]), torch.tensor([1e20, 0.0, 3.5])]
    options = {"ids": ['a,"b"', "#c"], "lengths": [4, 5], "channels": 3, "provenance": {"model": "m"}}
    for name in TEXT:
        write(tmp_path / f"out.{name}", rows, (1, 0), **options)
    first, *table = (tmp_path / "out.csv").read_text().splitlines()
    assert first == '# {"model": "m"}'
    assert list(csv.reader(table)) == [
        ["id", "length", "e0", "e1", "e2"],
        ['a,"b"', "4", "0.1", "1e-05", "-2.0"],
        ["#c", "5", "1e+20", "0.0", "3.5"],
    ]
    assert list(csv.reader((tmp_path / "out.tsv").read_text().splitlines()[1:], delimiter="\t")) == list(
        csv.reader(table)
    )
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"provenance": {"model": "m"}},
        {"id": 'a,"b"', "length": 4, "embedding": [0.1, 1e-05, -2.0]},
        {"id": "#c", "length": 5, "embedding": [1e20, 0.0, 3.5]},
    ]


def test_stdout(capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> None:
    """A pipe gets exactly what the file would hold, and nothing at all when the run fails."""
    write(tmp_path / "out.jsonl", embeddings(True))
    write("-", embeddings(True), format="jsonl")
    assert capfdbinary.readouterr().out == (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match="were not written"):
        write("-", embeddings(True), (0, 1), format="csv")
    assert capfdbinary.readouterr().out == b""
    for format in ("h5", None):
        with pytest.raises(LayoutError, match="stdout takes csv, tsv or jsonl"):
            open_("-", format=format)


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
    with pytest.raises(OutputError, match=rf"needs {library}: pip install 'plm-torch\[{suffix}\]'"):
        open_(tmp_path / f"out.{suffix}")


def test_link_is_written_through(tmp_path: Path) -> None:
    """Renaming over a symbolic link would leave the file it points to as it was."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out.npz").symlink_to(tmp_path / "scratch" / "real.npz")
    write(tmp_path / "out.npz", embeddings(True))
    assert (tmp_path / "out.npz").is_symlink() and read_embeddings(tmp_path / "scratch" / "real.npz").ids == IDS


@pytest.mark.parametrize("name", FORMATS)
def test_equal_runs_give_equal_bytes(tmp_path: Path, name: str) -> None:
    """No time of day and no memory addresses in an output, so that two runs can be compared by checksum."""
    written = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        write(f"{tmp_path}/{run}/{PATHS[name]}", embeddings(True), format=name)
        files = sorted(file for file in (tmp_path / run).rglob("*") if file.is_file())
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]
