"""Pickles made or damaged by hand: no code runs, nothing absurd is believed, and every refusal names the file."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FIXTURE_IS_CONSTANT, FORMATS, same, save
from hypothesis import given
from hypothesis import strategies as st

from plm_weights import CheckpointError, open_tensors
from plm_weights.pickles import LEGACY_MAGIC, LEGACY_PROTOCOL


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
