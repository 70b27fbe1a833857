"""The variables of a Keras SavedModel: what TensorFlow wrote is read exactly, and nothing absurd is believed."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from checkpoints import FIXTURE_IS_CONSTANT, equal, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plm_weights import CheckpointError, open_tensors
from plm_weights.proteinbert import weights
from plm_weights.saved_model import MAGIC, data_files, masked_crc32c

GOLDEN = Path(__file__).parent / "golden" / "proteinbert"
VARIABLES = GOLDEN / "saved_model" / "variables"
INDEX, DATA = "variables.index", "variables.data-00000-of-00001"
HEADER = b"\x08\x01\x1a\x02\x08\x01"  # one data file, little-endian, a version


# ------------------------------------------------------------------------------------------------ written by hand


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def block(entries: list[tuple[bytes, bytes]], kind: int = 0) -> bytes:
    """Every key whole, so one restart; the tests of the golden read keys that share their beginnings."""
    content = b"".join(b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in entries)
    content += struct.pack("<II", 0, 1) + bytes([kind])
    return content + struct.pack("<I", masked_crc32c(content))


def table(*blocks: bytes) -> bytes:
    """An index of these blocks, and of one that lists them, by its end."""
    content, listed = b"", []
    for number, each in enumerate(blocks):
        listed.append((bytes([number]), varint(len(content)) + varint(len(each) - 5)))
        content += each
    listing, no_filters = block(listed), block([])
    end = varint(len(content)) + varint(len(no_filters) - 5)
    end += varint(len(content + no_filters)) + varint(len(listing) - 5)
    return content + no_filters + listing + end.ljust(40, b"\0") + MAGIC


def entry(dtype: int, shape: tuple[int, ...], offset: int, size: int, shard: int = 0) -> bytes:
    """A BundleEntryProto."""
    axes = b"".join(b"\x12" + varint(len(axis)) + axis for axis in (b"\x08" + varint(size) for size in shape))
    fields = b"\x08" + varint(dtype) + b"\x12" + varint(len(axes)) + axes + b"\x18" + varint(shard)
    return fields + b"\x20" + varint(offset) + b"\x28" + varint(size) + b"\x35\0\0\0\0"


def index(*entries: tuple[bytes, bytes], header: bytes = HEADER) -> bytes:
    return table(block([(b"", header), *entries]))


GOOD = (b"a", entry(1, (2, 3), 0, 24))


def write(folder: Path, index: bytes, data: bytes = bytes(64)) -> Path:
    (folder / DATA).write_bytes(data)
    (folder / INDEX).write_bytes(index)
    return folder / INDEX


def refused(path: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------------------------------ what TensorFlow wrote


def test_the_same_tensors_as_the_pickle_of_the_same_model() -> None:
    """Bit for bit; names tell the layers in the order of the list."""
    saved, pickled = open_tensors(VARIABLES / INDEX), open_tensors(GOLDEN / "tiny_2blocks" / "weights.pkl")
    assert equal({weight.pickled: saved[weight.keras] for weight in weights(2)}, pickled)
    assert saved.keys() == {weight.keras for weight in weights(2)}
    assert saved.extras == {"_CHECKPOINTABLE_OBJECT_GRAPH": None}
    assert saved.files == (VARIABLES / INDEX, VARIABLES / DATA)
    for name, meta in saved.meta.items():
        assert (meta.device.type, meta.dtype, meta.shape) == ("meta", torch.float32, saved[name].shape)


@pytest.mark.parametrize(("content", "crc"), [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA)])
def test_checksum(content: bytes, crc: int) -> None:
    """Check values of CRC-32C (RFC 3720, B.4, and the catalogue of CRCs), under LevelDB's mask."""
    assert masked_crc32c(content) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_variables_are_read_one_at_a_time(tmp_path: Path) -> None:
    size = 2**22
    entries = [(bytes([97 + i]), entry(1, (size // 4,), i * size, size)) for i in range(4)]
    path = write(tmp_path, index(*entries))
    with (tmp_path / DATA).open("wb") as file:
        file.truncate(4 * size)
    tracemalloc.start()
    source = open_tensors(path)
    source["c"]
    assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    tracemalloc.stop()


def test_every_dtype(tmp_path: Path) -> None:
    """With none, one and several axes, and none of a kind; in TensorFlow's numbers of types.proto."""
    held: dict[str, tuple[int, Tensor]] = {
        "a": (1, torch.tensor([[1.5, 2.5, 3.5]])),
        "b": (2, torch.tensor(0.1, dtype=torch.float64)),
        "c": (3, torch.tensor([-3], dtype=torch.int32)),
        "d": (9, torch.tensor(7)),
        "e": (14, torch.ones(1, 1, 2, dtype=torch.bfloat16)),
        "f": (19, torch.ones(2, dtype=torch.float16)),
        "g": (1, torch.ones(0, 3)),
    }
    data, entries = b"", []
    for name, (number, tensor) in held.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
        entries.append((name.encode(), entry(number, tuple(tensor.shape), len(data), len(raw))))
        data += raw
    assert equal(open_tensors(write(tmp_path, index(*entries), data)), {name: each[1] for name, each in held.items()})


def test_several_data_files(tmp_path: Path) -> None:
    entries = [(b"a", entry(1, (2,), 4, 8, shard=1)), (b"b", entry(1, (), 0, 4, shard=0))]
    path = write(tmp_path, index(*entries, header=b"\x08\x02"))
    (tmp_path / DATA).unlink()
    files = data_files(path, 2)
    assert [file.name for file in files] == [f"variables.data-0000{i}-of-00002" for i in (0, 1)]
    files[0].write_bytes(struct.pack("<f", 5))
    refused(path, "variables.data-00001-of-00002, which holds a, does not lie beside it")
    files[1].write_bytes(struct.pack("<3f", 6, 7, 8))
    source = open_tensors(path)
    assert equal(source, {"a": torch.tensor([7.0, 8.0]), "b": torch.tensor(5.0)})
    assert source.files == (path, *files) == (path, *data_files(path))


# ------------------------------------------------------------------------------------------------ torn and damaged


def test_a_torn_index_is_an_error_wherever_it_is_cut(tmp_path: Path) -> None:
    """TensorFlow's in steps of 41 bytes, a small one byte by byte."""
    shutil.copyfile(VARIABLES / DATA, tmp_path / DATA)
    for whole, step in (((VARIABLES / INDEX).read_bytes(), 41), (index(GOOD), 1)):
        for cut in range(0, len(whole), step):
            (tmp_path / INDEX).write_bytes(whole[:cut])
            refused(tmp_path / INDEX, "fetch it again")


def test_torn_data(tmp_path: Path) -> None:
    """Whatever is missing at the end; after opening it is found when it is read."""
    path, data = tmp_path / INDEX, (VARIABLES / DATA).read_bytes()
    shutil.copyfile(VARIABLES / INDEX, path)
    refused(path, f"{DATA}, which holds .*, does not lie beside it")
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        (tmp_path / DATA).write_bytes(data[:cut])
        refused(path, f"{DATA} ends within .*; it is torn")
    (tmp_path / DATA).write_bytes(data)
    source = open_tensors(path)
    (tmp_path / DATA).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{DATA} became shorter"):
        source[next(iter(source))]


@FIXTURE_IS_CONSTANT
@given(data=st.data())
def test_a_damaged_index_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Any other byte before the footer is found by a checksum."""
    shutil.copyfile(VARIABLES / DATA, tmp_path / DATA)
    damaged = bytearray((VARIABLES / INDEX).read_bytes())
    place = data.draw(st.integers(0, len(damaged) - 49))
    damaged[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / INDEX).write_bytes(damaged)
    refused(tmp_path / INDEX, "checksum does not match")


@FIXTURE_IS_CONSTANT
@given(data=st.data())
def test_a_hostile_index_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Damage that its author has signed: no other exception than CheckpointError."""
    entries = [(b"", HEADER), (b"a", entry(1, (2, 3), 0, 24)), (b"b", entry(9, (), 24, 8))]
    damaged = bytearray(block(entries)[:-5])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    signed = bytes(damaged) + b"\0" + struct.pack("<I", masked_crc32c(bytes(damaged) + b"\0"))
    path = write(tmp_path, table(signed))
    try:
        source = open_tensors(path)
        assert all(source[name].shape == source.meta[name].shape for name in source)
    except CheckpointError:
        pass


def test_handmade_indexes_are_as_tensorflow_makes_them(tmp_path: Path) -> None:
    """Guards the tests below: honest ones are accepted."""
    path = write(tmp_path, index((b"a", entry(1, (2, 3), 8, 24))), struct.pack("<8f", *range(8)))
    assert same(open_tensors(path)["a"], torch.arange(2.0, 8.0).view(2, 3))


@pytest.mark.parametrize(
    ("content", "says"),
    {
        "no table": (b"hello, this is text", "does not end as an index does"),
        "nothing": (b"", "does not end as an index does"),
        "a footer alone": (bytes(40) + MAGIC, "does not lie in the file"),
        "no entries": (table(), "no header"),
        "no header": (table(block([GOOD])), "no header"),
        "big-endian": (index(GOOD, header=b"\x08\x01\x10\x01"), "big-endian"),
        "no data files": (index(GOOD, header=b""), "claims 0 data files"),
        "data files without end": (index(GOOD, header=b"\x08" + varint(2**40)), "claims 1,099,511,627,776 data files"),
        "compressed": (table(block([(b"", HEADER), GOOD], kind=1)), "it is compressed, .*save the model again"),
        "a key twice": (index(GOOD, GOOD), "not in order"),
        "a block twice": (table(block([(b"", HEADER)]), block([GOOD]), block([GOOD])), "not in order"),
        "two headers": (index((b"", HEADER)), "not in order"),
        "a long key": (index((b"a" * 1025, GOOD[1])), "makes no sense"),
        "a name that is no text": (index((b"\xff", GOOD[1])), "codec"),
        "another data file": (index((b"a", entry(1, (2, 3), 0, 24, shard=1))), "a lies in data file 2 of 1"),
        "beyond the data": (index((b"a", entry(1, (2, 3), 41, 24))), "ends within a; it is torn"),
        "far beyond": (index((b"a", entry(1, (2, 3), 2**62, 24))), "ends within a; it is torn"),
        "an offset below zero": (index((b"a", entry(1, (2, 3), 2**64 - 8, 24))), "field 4 of an entry is no count"),
        "fewer bytes": (index((b"a", entry(1, (2, 3), 0, 20))), r"shape \(2, 3\) and torch.float32 has 20 bytes"),
        "a large shape": (index((b"a", entry(1, (2**59, 2), 0, 24))), "has 24 bytes"),
        "an absurd shape": (index((b"a", entry(1, (2**62, 2**62), 0, 24))), "larger than any memory"),
        "an absurd one without numbers": (index((b"a", entry(1, (0, 2**62, 2**62), 0, 0))), "larger than any memory"),
        "an unknown size": (index((b"a", entry(1, (2**64 - 1,), 0, 4))), "field 1 of an entry is no count"),
        "many axes": (index((b"a", entry(1, (1,) * 65, 0, 4))), "has 4 bytes"),
        "an unknown dtype": (index((b"a", entry(8, (2,), 0, 16))), "TensorFlow's dtype 8; read are 1, 2, 3"),
        "no dtype": (index((b"a", b"")), "TensorFlow's dtype 0"),
        "pieces": (index((b"a", GOOD[1] + b"\x3a\x00")), "lies in several pieces"),
        "a shape that is a number": (index((b"a", b"\x08\x01\x10\x01")), "field 2 of an entry is no message"),
        "a size that is bytes": (index((b"a", b"\x08\x01\x2a\x01\x01")), "field 5 of an entry is no count"),
        "a field that is cut": (index((b"a", b"\x08\x01\x12\x7f")), "ends too early"),
        "a group": (index((b"a", b"\x0b")), "kind 3"),
        "a number without end": (index((b"a", b"\x08" + b"\xff" * 11)), "no end"),
    }.values(),
)
def test_absurd_indexes_are_refused(content: bytes, says: str, tmp_path: Path) -> None:
    refused(write(tmp_path, content), says)


def test_an_absurdly_large_index(tmp_path: Path) -> None:
    path = write(tmp_path, b"")
    with path.open("wb") as file:
        file.truncate(2**40)
    refused(path, "an index of 1,099,511,627,776 bytes")
