"""Checkpoint files: what torch and safetensors write is read exactly, and only what is asked for."""

from __future__ import annotations

import argparse
import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIGS, FIXTURE_IS_CONSTANT, FORMATS, GOLDEN, equal, same, save
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from plm_weights import CheckpointError, open_tensors, read_fair_esm, write_fair_esm, write_safetensors
from plm_weights.pickles import DTYPES, STORAGES

ALL_DTYPES = sorted({*STORAGES.values(), *DTYPES.values()}, key=str)


def numbers(dtype: torch.dtype, count: int = 24) -> Tensor:
    """Any bits are fine, except that a bool is 0 or 1."""
    random = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 256, (count * dtype.itemsize,), generator=random, dtype=torch.uint8)
    return drawn.bool() if dtype == torch.bool else drawn.view(dtype)


# ------------------------------------------------------------------------------------------------ what torch writes


@FORMATS
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype_and_view_is_read_as_it_was_saved(dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    base = numbers(dtype)
    tensors = {
        "whole": base,
        "matrix": base.reshape(4, 6),
        "transposed": base.reshape(4, 6).T,
        "every other": base.reshape(4, 6)[1:3, ::2],
        "scalar": base[5],
        "empty": base[:0],
        "no rows": base[:0].reshape(0, 3),
        "repeated": base[:1].expand(7),
    }
    path = save(tensors, tmp_path / "x.pt", legacy)
    source = open_tensors(path)
    assert list(source) == list(tensors)
    for name, tensor in tensors.items():
        meta = source.meta[name]
        assert (meta.device.type, meta.dtype, meta.shape) == ("meta", tensor.dtype, tensor.shape)
        assert same(source[name], tensor), name
        assert source[name].stride() == tensor.stride(), name
    assert source.files == (path,)
    if not (legacy and dtype in DTYPES.values()):  # which torch writes but cannot read
        theirs = torch.load(path, weights_only=True)
        assert all(same(source[name], theirs[name]) for name in theirs)


@FORMATS
@FIXTURE_IS_CONSTANT
@given(data=st.data())
def test_any_view_of_a_shared_storage(legacy: bool, tmp_path: Path, data: st.DataObject) -> None:
    base = torch.arange(data.draw(st.integers(1, 40)), dtype=torch.float32)
    views = {}
    for index in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        stride = data.draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape)))
        reach = 0 if 0 in shape else sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if reach < len(base):
            views[f"{index}"] = base.as_strided(shape, stride, data.draw(st.integers(0, len(base) - 1 - reach)))
    views["base"] = base
    source = open_tensors(save(views, tmp_path / "x.bin", legacy))
    assert equal(source, views)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict_with_parameters_and_other_things(legacy: bool, protocol: int, tmp_path: Path) -> None:
    """A state dict carries ``_metadata`` as an attribute; parameters are wrapped; the rest becomes ``extras``."""
    state = nn.Linear(3, 2).state_dict()
    state["parameter"] = nn.Parameter(torch.ones(2))
    path = save({**state, "step": 7, "rate": 0.5, "names": ["a", ("b", None)]}, tmp_path / "a.pth", legacy, protocol)
    source = open_tensors(path)
    assert equal(source, {name: tensor.detach() for name, tensor in state.items()})
    assert source.extras == {"step": 7, "rate": 0.5, "names": ["a", ("b", None)]}
    assert open_tensors(save(state, tmp_path / "b.pth", legacy, protocol)).keys() == state.keys()


def test_the_model_of_a_training_checkpoint_is_found(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(arch="roberta_large", nested=argparse.Namespace(depth=2)),
        "model": {"w": torch.ones(2)},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(2)}}},
    }
    source = open_tensors(save(content, tmp_path / "x.pt", False))
    assert source.keys() == {"w"}
    assert source.extras["args"] == {"arch": "roberta_large", "nested": {"depth": 2}}
    assert source.extras.keys() == {"args", "last_optimizer_state"}


@pytest.mark.parametrize(
    "content, says",
    [
        ([torch.ones(1)], "holds a list, not a dict"),
        ({"state_dict": {"w": torch.ones(1)}}, r"no tensors at its top or under 'model', only \['state_dict'\]"),
        ({"model": {"w": torch.ones(1), "note": "x"}}, r"not tensors: \['note'\]"),
        ({3: torch.ones(1)}, r"keys that are not names: \[3\]"),
        ({"w": torch.ones(1, dtype=torch.complex64).conj()}, "conjugated"),
        ({"w": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"net": nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_dict_of_plain_tensors_is_refused(content: object, says: str, tmp_path: Path) -> None:
    path = save(content, tmp_path / "x.pt", False)
    with pytest.raises(CheckpointError, match=says) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Opening reads names; taking a slice of a storage reads only that slice."""
    base = torch.zeros(2**22)
    path = save({"base": base, "slice": base[1000:1010], "other": torch.zeros(2**22)}, tmp_path / "x.pt", False)
    tracemalloc.start()
    source = open_tensors(path)
    source["slice"]
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------ torn files


@FORMATS
def test_a_torn_pickle_is_an_error_wherever_it_is_cut(legacy: bool, tmp_path: Path) -> None:
    whole = save({"model": {"a": torch.ones(40), "b": torch.zeros(3, dtype=torch.int64)}}, tmp_path / "w.pt", legacy)
    content, path = whole.read_bytes(), tmp_path / "torn.pt"
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError) as error:
            open_tensors(path)
        assert str(path) in str(error.value), cut


def test_a_torn_safetensors_file_is_an_error_wherever_it_is_cut(tmp_path: Path) -> None:
    whole, path = tmp_path / "w.safetensors", tmp_path / "torn.safetensors"
    save_file({"a": torch.ones(5), "b": torch.zeros(2, dtype=torch.bfloat16)}, whole)
    for cut in range(len(content := whole.read_bytes())):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError) as error:
            open_tensors(path)
        assert str(path) in str(error.value), cut


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = save({"a": torch.ones(1000)}, tmp_path / "x.pt", True)
    source = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="became shorter"):
        source["a"]


@pytest.mark.parametrize("name", ["absent.pt", "notes.txt", "folder.safetensors"])
def test_what_is_not_a_checkpoint_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=name):
        open_tensors(tmp_path / name)


@pytest.mark.parametrize("content", [b"hello, this is text", b"PK\x03\x04 cut", b"\x80\x02", b"", b"12345678{torn"])
def test_what_cannot_be_read_says_what_to_do(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt .*[Ff]etch it again"):
        open_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["last.ckpt", "weights", "x.safetensors", "x.bin"])
def test_the_kind_of_a_file_is_seen_in_its_bytes(name: str, tmp_path: Path) -> None:
    """Every format under every name. A safetensors header may begin like a pickle or a zip: its length comes first."""
    path = tmp_path / name
    for legacy in (False, True):
        assert open_tensors(save({"a": torch.ones(2)}, path, legacy)).keys() == {"a"}
    for length in (0x80, int.from_bytes(b"PK", "little")):
        header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
        path.write_bytes(struct.pack("<Q", length) + header + b"\7")
        assert open_tensors(path)["a"].tolist() == [7]


# ------------------------------------------------------------------------------------------------ safetensors


def test_safetensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "tied": base,
        "to it": base,
        "transposed": base.T,
        "half": base.half(),
        "first": (pair := torch.ones(2, 3))[0],
        "second": pair[1],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "also empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.ones(1)),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {"format": "pt", "note": "é"})
    source = open_tensors(path)
    assert source.keys() == tensors.keys()
    assert source.extras == {"format": "pt", "note": "é"}
    for name, tensor in tensors.items():
        assert source.meta[name].device.type == "meta"
        assert (source.meta[name].shape, source.meta[name].dtype) == (tensor.shape, tensor.dtype)
        assert same(source[name], tensor.detach()), name
    with pytest.raises(KeyError, match="nothing"):
        source["nothing"]


def test_a_name_given_twice_in_safetensors(tmp_path: Path) -> None:
    """The safetensors library takes the last of two entries without a word."""
    path = tmp_path / "x.safetensors"
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = f"{{{entry},{entry}}}".encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(CheckpointError, match="a described more than once"):
        open_tensors(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(2)}, {})
    overlapping = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_safetensors(path, {"a": overlapping, "b": overlapping[1:]}, {})
    assert list(tmp_path.iterdir()) == [path]
    assert same(open_tensors(path)["a"], torch.ones(2))


# ------------------------------------------------------------------------------------------------ shards


def sharded(folder: Path, suffix: str) -> tuple[Path, dict[str, Tensor]]:
    tensors = {f"layers.{index}.weight": torch.full((3,), float(index)) for index in range(5)}
    places = {}
    for shard, names in {f"m-1{suffix}": list(tensors)[:2], f"m-2{suffix}": list(tensors)[2:]}.items():
        part = {name: tensors[name] for name in names}
        if suffix == ".safetensors":
            save_file(part, folder / shard, {"format": "pt"})
        else:
            torch.save(part, folder / shard)
        places.update(dict.fromkeys(names, shard))
    index = folder / f"m{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": places}))
    return index, tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(suffix: str, tmp_path: Path) -> None:
    index, tensors = sharded(tmp_path, suffix)
    source = open_tensors(index)
    assert list(source) == list(tensors)
    assert equal(source, tensors)
    assert source.files == (index, tmp_path / f"m-1{suffix}", tmp_path / f"m-2{suffix}")
    assert source.extras == ({"format": "pt"} if suffix == ".safetensors" else {})


def test_all_faults_of_a_shard_index_at_once(tmp_path: Path) -> None:
    index, _ = sharded(tmp_path, ".bin")
    content = json.loads(index.read_text())
    places = content["weight_map"]
    del places["layers.0.weight"]
    places["layers.2.weight"] = "m-1.bin"
    places |= {"far": "../m-3.bin", "root": "/m-3.bin", "lost": "m-4.bin", "ring": index.name}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as error:
        open_tensors(index)
    assert str(error.value).splitlines()[1:-1] == [
        "  '../m-3.bin': not the name of a checkpoint file in the folder of the index",
        "  '/m-3.bin': not the name of a checkpoint file in the folder of the index",
        f"  {index.name!r}: not the name of a checkpoint file in the folder of the index",
        f"  {tmp_path / 'm-4.bin'} is not there (or not a file); give a checkpoint file",
        "  layers.0.weight: in m-1.bin, but the index does not say so",
        "  layers.2.weight: in m-2.bin, but the index does not say so",
        "  layers.2.weight: the index says it is in m-1.bin, which does not have it",
    ]
    assert str(index) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "[" * 10**5,
    ],
)
def test_what_is_no_shard_index(content: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="is not a shard index"):
        open_tensors(path)


# ------------------------------------------------------------------------------------------------ fair-esm


def test_the_contact_regression_beside_a_model_is_joined(tmp_path: Path) -> None:
    torch.save({"args": None, "model": {"a": torch.ones(1)}}, tmp_path / "m.pt")
    alone = read_fair_esm(tmp_path / "m.pt")
    assert (list(alone), alone.files) == (["a"], (tmp_path / "m.pt",))

    regression = tmp_path / "m-contact-regression.pt"
    save({"model": {"contact_head.regression.bias": torch.full((1,), 2.0)}}, regression, True)
    joined = read_fair_esm(tmp_path / "m.pt")
    assert {name: tensor.item() for name, tensor in joined.items()} == {"a": 1.0, "contact_head.regression.bias": 2.0}
    assert joined.meta.keys() == joined.keys()
    assert joined.files == (tmp_path / "m.pt", regression)
    assert joined.extras == {"args": None}

    torch.save({"model": {"a": torch.ones(1)}}, regression)
    with pytest.raises(CheckpointError, match=r"^a: both in"):
        read_fair_esm(tmp_path / "m.pt")


@pytest.mark.parametrize("name", CONFIGS)
def test_fair_esm_loads_what_we_write(name: str, tmp_path: Path) -> None:
    import esm

    original = read_fair_esm(GOLDEN / name / f"{name}.pt")
    path = tmp_path / f"{name}.pt"
    tensors = dict(original)
    tensors["encoder.lm_head.weight"] = tensors["encoder.sentence_encoder.embed_tokens.weight"]
    write_fair_esm(path, tensors, CONFIGS[name])
    assert equal(read_fair_esm(path), original)
    with torch.serialization.safe_globals([argparse.Namespace]):
        ours, _ = esm.pretrained.load_model_and_alphabet_local(path)
        theirs, _ = esm.pretrained.load_model_and_alphabet_local(GOLDEN / name / f"{name}.pt")
    assert equal(ours.state_dict(), theirs.state_dict())
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{name}-contact-regression.pt", f"{name}.pt"]


def test_fair_esm_files_that_its_loader_would_refuse(tmp_path: Path) -> None:
    head = {"contact_head.regression.bias": torch.zeros(1)}
    for name, tensors, changed, says in (
        ("model.pt", head, {}, "must start with esm2"),
        ("esm2.bin", head, {}, "must end in .pt"),
        ("esm2_esm1v.pt", head, {}, "must not contain esm1v"),
        ("esm2.pt", head, {"feed_forward": 127}, "4 \\* channels"),
        ("esm2.pt", head, {"norm_eps": 1e-12}, "1e-5"),
    ):
        with pytest.raises(ValueError, match=says):
            write_fair_esm(tmp_path / name, tensors, CONFIGS["esm2_tiny"] | changed)
    assert list(tmp_path.iterdir()) == []


def test_golden_files_read_as_torch_load_reads_them() -> None:
    for path in sorted(GOLDEN.glob("*/*.pt")):
        with torch.serialization.safe_globals([argparse.Namespace]):
            theirs = torch.load(path)["model"]
        assert equal(open_tensors(path), theirs)
