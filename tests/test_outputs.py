"""Every layout holds what was written, and opens with the library it is made for."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from embeddings import BINARY, CASES, CHANNELS, IDS, LENGTHS, PATHS, PROVENANCE, TEXT, embeddings, listing, open_, write

from plm.outputs import FORMATS, LayoutError, OutputError, read_embeddings


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
