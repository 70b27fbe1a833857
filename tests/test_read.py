"""Checkpoint files: what torch and safetensors write is read exactly, and nothing else is read at all."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from plm_weights import CheckpointError, open_tensors, read_fair_esm, write_fair_esm, write_safetensors
from plm_weights.pickles import DTYPES, LEGACY_MAGIC, LEGACY_PROTOCOL, STORAGES

GOLDEN = Path(__file__).parent / "golden" / "esm"
ALL_DTYPES = sorted({*STORAGES.values(), *DTYPES.values()}, key=str)
FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
FIXTURE_IS_CONSTANT = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def save(content: object, path: Path, legacy: bool, protocol: int = 2) -> Path:
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal in dtype, shape and every bit (NaN too, and dtypes that cannot be compared)."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(bits(ours), bits(theirs))


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


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
    assert source.keys() == views.keys()
    assert all(same(source[name], view) for name, view in views.items())


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict_with_parameters_and_other_things(legacy: bool, protocol: int, tmp_path: Path) -> None:
    """A state dict carries ``_metadata`` as an attribute; parameters are wrapped; the rest becomes ``extras``."""
    state = nn.Linear(3, 2).state_dict()
    state["parameter"] = nn.Parameter(torch.ones(2))
    path = save({**state, "step": 7, "rate": 0.5, "names": ["a", ("b", None)]}, tmp_path / "a.pth", legacy, protocol)
    source = open_tensors(path)
    assert source.keys() == {"weight", "bias", "parameter"}
    assert all(same(source[name], tensor.detach()) for name, tensor in state.items())
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


@FORMATS
@FIXTURE_IS_CONSTANT
@given(data=st.data())
def test_a_damaged_pickle_is_read_or_refused(legacy: bool, tmp_path: Path, data: st.DataObject) -> None:
    """No other exception than CheckpointError, whatever bytes change."""
    args = argparse.Namespace(arch="x")
    content = save({"args": args, "model": {"a": torch.ones(2, 2), "b": torch.zeros(1)}}, tmp_path / "w.pt", legacy)
    damaged = bytearray(content.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.pt"
    path.write_bytes(damaged)
    try:
        source = open_tensors(path)
        assert all(source[name].shape == source.meta[name].shape for name in source)
    except CheckpointError:
        pass


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


# ------------------------------------------------------------------------------------------------ hostile files


class Stored:
    """Stands for a storage in a handmade checkpoint."""

    def __init__(self, key: str, count: int, kind: object = torch.FloatStorage) -> None:
        self.identity = ("storage", kind, key, "cpu", count)


class Rebuilt:
    """Pickles as a tensor that claims whatever it is told."""

    def __init__(self, storage: object, offset: object, shape: object, stride: object, *rest: object) -> None:
        self.arguments = (storage, offset, shape, stride, False, collections.OrderedDict(), *rest)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Call:
    """Pickles as the call of a function: the classic gadget."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


class Pickler(pickle.Pickler):
    legacy = False

    def persistent_id(self, item: object) -> object:
        if isinstance(item, Stored):
            return (*item.identity, None) if self.legacy else item.identity
        return None


def pickled(content: object, legacy: bool) -> bytes:
    file = io.BytesIO()
    pickler = Pickler(file, 2)
    pickler.legacy = legacy
    pickler.dump(content)
    return file.getvalue()


def handmade(path: Path, content: bytes, legacy: bool, storages: dict[str, bytes] | None = None) -> Path:
    """A checkpoint with this pickle and these float32 storages."""
    storages = storages or {}
    if legacy:
        system = {"protocol_version": LEGACY_PROTOCOL, "little_endian": True, "type_sizes": {}}
        parts = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, LEGACY_PROTOCOL, system)]
        parts += [content, pickle.dumps(list(storages), 2)]
        parts += [struct.pack("<q", len(storage) // 4) + storage for storage in storages.values()]
        path.write_bytes(b"".join(parts))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/version", "3\n")
            for key, storage in storages.items():
                archive.writestr(f"archive/data/{key}", storage)
    return path


@FORMATS
def test_handmade_checkpoints_are_as_torch_makes_them(legacy: bool, tmp_path: Path) -> None:
    """Guards the tests below: an honest handmade file is accepted, also by torch."""
    content = pickled({"w": Rebuilt(Stored("0", 6), 1, (2, 2), (2, 1))}, legacy)
    path = handmade(tmp_path / "x.pt", content, legacy, {"0": torch.arange(6.0).numpy().tobytes()})
    wanted = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert same(open_tensors(path)["w"], wanted)
    assert same(torch.load(path, weights_only=True)["w"], wanted)


def attacks(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would leave a marker file, and the name that the error must contain."""
    shell, python = f"echo > {marker}", f"open({str(marker)!r}, 'w')"
    system = f"{os.system.__module__}.system"
    state = Call(os.system, shell)
    namespace = argparse.Namespace(arch=Call(builtins.eval, python))
    return {
        "system": (pickle.dumps({"model": state}, 2), system),
        "system, protocol 0": (pickle.dumps({"model": state}, 0), system),
        "system, protocol 4": (pickle.dumps({"model": state}, 4), system),
        "eval": (pickle.dumps(Call(builtins.eval, python), 2), "builtin__.eval"),
        "exec": (pickle.dumps(Call(builtins.exec, python), 4), "builtins.exec"),
        "open": (pickle.dumps(Call(builtins.open, str(marker), "w"), 4), "io.open"),
        "nested": (pickle.dumps({"model": [({"x": Call(getattr, Call(eval, "1"), "y")},)]}, 4), "builtins.getattr"),
        "within a namespace": (pickle.dumps({"args": namespace, "model": {}}, 2), "builtin__.eval"),
        "torch.load": (pickle.dumps(Call(torch.load, str(marker)), 2), "torch.serialization.load"),
        "torch.hub": (pickle.dumps(Call(torch.hub.load, "a/b", "c"), 2), "torch.hub.load"),
        "instance": (f"(S'{shell}'\ni{os.system.__module__}\nsystem\n.".encode(), system.replace(".", " ")),
        "object": (f"(c{os.system.__module__}\nsystem\nS'{shell}'\no.".encode(), system),
        "dotted": (b"\x80\x04\x8c\x08argparse\x8c\x13Namespace.__class__\x93.", "argparse.Namespace.__class__"),
        "through torch": (b"ctorch\nos.system\n(S'" + shell.encode() + b"'\ntR.", "torch.os.system"),
        "state of a class": (b"cargparse\nNamespace\n}(S'__init__'\ncos\nsystem\nub.", "os.system"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    }


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_a_pickle_that_would_run_code_does_not(attack: str, container: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    content, name = attacks(marker)[attack]
    if container == "bare":
        path.write_bytes(content)
    else:
        handmade(path, content, container == "legacy")
    with pytest.raises(CheckpointError) as error:
        open_tensors(path)
    assert name in str(error.value)
    assert str(path) in str(error.value)
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Guards the test above: with Python's own unpickler the shell attack does leave its marker."""
    pickle.loads(attacks(tmp_path / "marker")["system"][0])
    assert (tmp_path / "marker").exists()


LAUGHS = b"".join(bytes([0x68, depth, 0x68, depth, 0x86, 0x71, depth + 1]) for depth in range(60))  # (x, x), 60 deep


@FORMATS
@pytest.mark.parametrize(
    "content, says",
    {
        "a string of a terabyte": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "pickle|item of|torn"),
        "bytes of an exabyte": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "pickle|item of|torn"),
        "a memo of four billion": (b"\x80\x02}r\xff\xff\xff\xff.", "no tensors|not the storage|list of storages|torn"),
        "an unknown memo": (b"\x80\x02h\x07.", "malformed"),
        "an empty stack": (b"\x80\x02R.", "malformed"),
        "an empty pickle": (b".", "malformed"),
        "no end": (b"\x80\x02}", "pickle"),
        "a key that takes forever to hash": (b"\x80\x02K\x01q\x00" + LAUGHS + b"}h<K\x01s.", "tuple as the key"),
        "a shape that takes forever to print": (b"\x80\x02K\x01q\x00" + LAUGHS + b"Q.", "outside itself"),
        "a list that holds itself": (b"\x80\x02]q\x00h\x00a.", "not a dict|list of storages|torn"),
        "a dict that is a number": (b"\x80\x02K\x01K\x01K\x01s.", "treats a int as a dict"),
        "a list that is a dict": (b"\x80\x02}K\x01a.", "treats a dict as a list"),
        "state of a tuple": (b"\x80\x02)}b.", "treats a tuple as a dict"),
        "a call with arguments": (b"\x80\x02cargparse\nNamespace\nK\x01\x85R.", "calls argparse.Namespace"),
    }.values(),
)
def test_absurd_pickles_are_refused(content: bytes, says: str, legacy: bool, tmp_path: Path) -> None:
    """Claims without substance, and structures made to exhaust a reader that hashes or prints them."""
    path = handmade(tmp_path / "x.pt", content, legacy)
    with pytest.raises(CheckpointError, match=says):
        open_tensors(path)


@FORMATS
@pytest.mark.parametrize(
    "tensor, says",
    [
        (Rebuilt(Stored("0", 6), 0, (7,), (1,)), "larger than its storage"),
        (Rebuilt(Stored("0", 6), 1, (2, 3), (3, 1)), "larger than its storage"),
        (Rebuilt(Stored("0", 6), 0, (2, 2), (5, 1)), "larger than its storage"),
        (Rebuilt(Stored("0", 6), 0, (2**31, 2**31, 2**31), (0, 0, 0)), "larger than its storage"),
        (Rebuilt(Stored("0", 6), 2**62, (1,), (1,)), "larger than its storage"),
        (Rebuilt(Stored("0", 6), 0, (2**62, 0, 2**62), (1, 1, 1)), "larger than its storage"),
        (Rebuilt(Stored("0", 6), 0, (1,) * 65, (1,) * 65), "65 axes"),
        (Rebuilt(Stored("0", 6), -1, (1,), (1,)), "where a count belongs"),
        (Rebuilt(Stored("0", 6), 0, (2, 2), (1, -1)), "where a count belongs"),
        (Rebuilt(Stored("0", 6), 0, (2,), (1, 1)), "1 axes with 2 strides"),
        (Rebuilt(Stored("0", 6), 0, 6, 1), "where a shape belongs"),
        (Rebuilt("0", 0, (6,), (1,)), "arguments that torch.save does not write"),
        (Rebuilt(Stored("0", 7), 0, (7,), (1,)), "shorter than 28 bytes"),
        (Rebuilt(Stored("0", -6), 0, (0,), (1,)), "where a count belongs"),
        (Rebuilt(Stored("1", 6), 0, (6,), (1,)), "storages 1 are missing|list of storages"),
        (Rebuilt(Stored("0", 6, torch.QInt8Storage), 0, (6,), (1,)), "torch.QInt8Storage"),
    ],
)
def test_a_tensor_must_lie_in_its_storage(tensor: Rebuilt, says: str, legacy: bool, tmp_path: Path) -> None:
    path = handmade(tmp_path / "x.pt", pickled({"w": tensor}, legacy), legacy, {"0": bytes(24)})
    with pytest.raises(CheckpointError, match=says):
        open_tensors(path)


def test_zip_archives_that_torch_would_not_write(tmp_path: Path) -> None:
    content = pickled({"w": Rebuilt(Stored("0", 1), 0, (1,), (1,))}, False)
    archives: dict[str, list[tuple[str, bytes, int]]] = {
        "compressed": [("a/data.pkl", content, zipfile.ZIP_DEFLATED), ("a/data/0", bytes(4), zipfile.ZIP_STORED)],
        "not one of torch.save": [("data.pkl", content, zipfile.ZIP_STORED)],
        "big-endian": [
            ("a/data.pkl", content, zipfile.ZIP_STORED),
            ("a/byteorder", b"big", zipfile.ZIP_STORED),
            ("a/data/0", bytes(4), zipfile.ZIP_STORED),
        ],
    }
    for says, records in archives.items():
        path = tmp_path / "x.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name, record, compression in records:
                archive.writestr(name, record, compression)
        with pytest.raises(CheckpointError, match=says):
            open_tensors(path)


def test_a_zip_archive_of_the_future(tmp_path: Path) -> None:
    """zipfile refuses it with NotImplementedError, which once got through."""
    path = save({"a": torch.ones(1)}, tmp_path / "x.pt", False)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 200  # the version needed to read the first record
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="version"):
        open_tensors(path)


# ------------------------------------------------------------------------------------------------ laziness


def test_optimizer_state_is_never_read(tmp_path: Path) -> None:
    """As in the published ESM-1b file, whose greater part is optimizer state; here it is a hole of 64 GiB on disk."""
    hole = 2**36
    content = {
        "model": {"w": Rebuilt(Stored("0", 4), 0, (4,), (1,))},
        "last_optimizer_state": {"exp_avg": Rebuilt(Stored("1", hole // 4), 0, (hole // 4,), (1,))},
    }
    path = tmp_path / "x.pt"
    handmade(path, pickled(content, True), True, {"0": torch.arange(4.0).numpy().tobytes(), "1": b""})
    with path.open("r+b") as file:
        file.seek(-8, io.SEEK_END)
        file.write(struct.pack("<q", hole // 4))
        file.truncate(file.tell() + hole)
    tracemalloc.start()
    source = open_tensors(path)
    assert same(source["w"], torch.arange(4.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(source) == ["w"]
    assert peak < 2**24

    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="ends within storage 2 of 2"):
        open_tensors(path)


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    """Opening reads names; taking a slice of a storage reads only that slice."""
    base = torch.zeros(2**22)
    path = save({"base": base, "slice": base[1000:1010], "other": torch.zeros(2**22)}, tmp_path / "x.pt", False)
    tracemalloc.start()
    source = open_tensors(path)
    source["slice"]
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


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
    assert all(same(source[name], tensor) for name, tensor in tensors.items())
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


CONFIGS = {
    "esm1b_tiny": {"layers": 3, "channels": 24, "heads": 3, "feed_forward": 52, "learned_positions": 1026},
    "esm2_tiny": {"layers": 4, "channels": 32, "heads": 4, "feed_forward": 128, "learned_positions": None},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_fair_esm_loads_what_we_write(name: str, tmp_path: Path) -> None:
    import esm

    original = read_fair_esm(GOLDEN / name / f"{name}.pt")
    path = tmp_path / f"{name}.pt"
    tensors = dict(original)
    tensors["encoder.lm_head.weight"] = tensors["encoder.sentence_encoder.embed_tokens.weight"]
    write_fair_esm(path, tensors, CONFIGS[name] | {"token_dropout": True, "norm_eps": 1e-5})
    written = read_fair_esm(path)
    assert written.keys() == original.keys()
    assert all(same(written[key], original[key]) for key in original)
    with torch.serialization.safe_globals([argparse.Namespace]):
        ours, _ = esm.pretrained.load_model_and_alphabet_local(path)
        theirs, _ = esm.pretrained.load_model_and_alphabet_local(GOLDEN / name / f"{name}.pt")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(same(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{name}-contact-regression.pt", f"{name}.pt"]


def test_fair_esm_files_that_its_loader_would_refuse(tmp_path: Path) -> None:
    config = CONFIGS["esm2_tiny"] | {"token_dropout": True, "norm_eps": 1e-5}
    head = {"contact_head.regression.bias": torch.zeros(1)}
    for name, tensors, changed, says in (
        ("model.pt", head, {}, "must start with esm2"),
        ("esm2.bin", head, {}, "must end in .pt"),
        ("esm2.pt", {}, {}, "must contain esm1v"),
        ("esm2_esm1v.pt", head, {}, "must contain esm1v"),
        ("esm2.pt", head, {"feed_forward": 127}, "4 \\* channels"),
        ("esm2.pt", head, {"norm_eps": 1e-12}, "1e-5"),
    ):
        with pytest.raises(ValueError, match=says):
            write_fair_esm(tmp_path / name, tensors, config | changed)
    assert list(tmp_path.iterdir()) == []


def test_golden_files_read_as_torch_load_reads_them() -> None:
    for path in sorted(GOLDEN.glob("*/*.pt")):
        with torch.serialization.safe_globals([argparse.Namespace]):
            theirs = torch.load(path)["model"]
        ours = open_tensors(path)
        assert ours.keys() == theirs.keys()
        assert all(same(ours[name], theirs[name]) for name in theirs)
