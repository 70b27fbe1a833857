"""The variables of a Keras SavedModel (``variables/variables.index`` and its data), read without TensorFlow.

The index is a LevelDB table: blocks of sorted keys that share their beginnings, found by another such block, found by a
footer. Its values are protocol buffers: a ``BundleHeaderProto`` under the empty key, and for each variable a
``BundleEntryProto`` that says where its bytes lie in which data file. Sources: tensorflow/core/protobuf/
tensor_bundle.proto, leveldb/doc/table_format.md.

The index is compared with its checksums. The data are not, as 64 MB would take Python more than ten seconds: there the
places of all variables must lie in the file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from plm_weights.errors import CheckpointError
from plm_weights.strangers import LFS, LONGEST_HEAD, stranger

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER, TRAILER = 48, 5  # bytes
LONGEST_INDEX, LONGEST_KEY = 2**22, 2**10  # bytes; that of the published ProteinBERT has some 8,000
MOST_SHARDS = 1000
# tensorflow/core/framework/types.proto
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
STRING = 7
ERRORS = (ValueError, TypeError, LookupError, OSError, struct.error)


class Fields(dict[int, list[int | bytes]]):
    """The fields of a protocol buffer by number, each with all of its values."""

    def number(self, field: int) -> int:
        """The last value of a field, as the format wants it, or 0."""
        value = self.get(field, [0])[-1]
        if not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError(f"field {field} of an entry is no count")
        return value

    def messages(self, field: int) -> list[Fields]:
        values = self.get(field, [])
        if not all(isinstance(value, bytes) for value in values):
            raise ValueError(f"field {field} of an entry is no message")
        return [parsed(value) for value in values if isinstance(value, bytes)]


@dataclass(frozen=True)
class Variable:
    """Where a variable lies: in data file ``shard``, from ``offset``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Block(NamedTuple):
    offset: int
    size: int


class Bundle:
    """The variables of an index by name; ``texts`` are those variables that hold no numbers.

    Raises: CheckpointError naming the file and the reason: here for all that can be known without reading a variable
    (torn, hostile, foreign), in ``read`` if a file changed since.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.variables, self.texts, self.shards = _open(path)
        except ERRORS as error:
            reason = "it is malformed" if isinstance(error, LookupError) else error
            raise CheckpointError(
                f"{path} cannot be read as the variables of a SavedModel: {reason}. If it may be torn, fetch it again."
            ) from error

    def read(self, name: str) -> Tensor:
        """The variable with its own memory."""
        variable = self.variables[name]
        buffer = bytearray(variable.size)
        path = self.shards[variable.shard]
        with path.open("rb") as file:
            file.seek(variable.offset)
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{path} became shorter while it was read")
        flat = torch.frombuffer(buffer, dtype=variable.dtype) if buffer else torch.empty(0, dtype=variable.dtype)
        return flat.view(variable.shape)


def data_files(index: Path, count: int | None = None) -> tuple[Path, ...]:
    """The files that belong to an index: ``count`` of them, or as many as the names of those beside it say."""
    stem = index.name.removesuffix(".index")
    if count is None:
        beside = (
            re.fullmatch(r".*\.data-[0-9]{5}-of-([0-9]{5})", file.name) for file in index.parent.glob(f"{stem}.*")
        )
        count = max((int(found[1]) for found in beside if found), default=1)
    return tuple(index.with_name(f"{stem}.data-{shard:05d}-of-{count:05d}") for shard in range(count))


def _open(path: Path) -> tuple[dict[str, Variable], list[str], tuple[Path, ...]]:
    size = path.stat().st_size
    if size > LONGEST_INDEX:
        raise ValueError(f"an index of {size:,} bytes; those of known models are below {LONGEST_INDEX:,}")
    entries = list(_table(path.read_bytes()))
    if not entries or entries[0][0] != b"":
        raise ValueError("it has no header")
    header = parsed(entries[0][1])
    if header.number(2):
        raise ValueError("it was written on a big-endian machine; save it again on a little-endian one")
    count = header.number(1)
    if not 1 <= count <= MOST_SHARDS:
        raise ValueError(f"it claims {count:,} data files")
    shards = data_files(path, count)
    variables: dict[str, Variable] = {}
    texts: list[str] = []
    for key, value in entries[1:]:
        name, entry = key.decode(), parsed(value)
        ends = entry.number(4) + entry.number(5)
        if entry.number(3) >= count:
            raise ValueError(f"{name} lies in data file {entry.number(3) + 1:,} of {count}")
        file = shards[entry.number(3)]
        if not file.is_file():
            raise ValueError(f"{file.name}, which holds {name}, does not lie beside it")
        if ends > file.stat().st_size:
            with file.open("rb") as content:
                if (head := content.read(LONGEST_HEAD)).startswith(LFS):
                    raise ValueError(stranger(file, head))
            raise ValueError(f"{file.name} ends within {name}; it is torn")
        if entry.number(1) == STRING:
            texts.append(name)
        else:
            variables[name] = _variable(name, entry)
    return variables, texts, shards


def _variable(name: str, entry: Fields) -> Variable:
    if 7 in entry:
        raise ValueError(f"{name} lies in several pieces, as of a model on several machines; save it on one")
    if (dtype := DTYPES.get(entry.number(1))) is None:
        raise ValueError(f"{name} has TensorFlow's dtype {entry.number(1)}; read are {', '.join(map(str, DTYPES))}")
    shapes = entry.messages(2)
    shape = tuple(axis.number(1) for each in shapes for axis in each.messages(2))
    variable = Variable(dtype, shape, entry.number(3), entry.number(4))
    if prod(size or 1 for size in shape[:64]) * dtype.itemsize >= 2**63:
        raise ValueError(f"{name} has shape {shape[:64]}, larger than any memory")
    if len(shape) > 64 or variable.size != entry.number(5):
        raise ValueError(f"{name} of shape {shape[:64]} and {dtype} has {entry.number(5):,} bytes")
    return variable


# ------------------------------------------------------------------------------------------------ LevelDB's table


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values in the order of the keys."""
    if content[-len(MAGIC) :] != MAGIC or len(content) < FOOTER:
        raise ValueError("it does not end as an index does; it is torn")
    footer = Reader(content[-FOOTER:])
    _block(content, footer.handle())  # it would list filters; TensorFlow writes none, and so only its checksum counts
    last = b""
    first = True
    for _, handle in _entries(_block(content, footer.handle())):
        for key, value in _entries(_block(content, Reader(handle).handle())):
            if not first and key <= last:  # else a few blocks could be listed without end
                raise ValueError("its keys are not in order")
            last, first = key, False
            yield key, value


def _block(content: bytes, block: Block) -> bytes:
    end = block.offset + block.size
    if end + TRAILER > len(content) - FOOTER:
        raise ValueError("one of its blocks does not lie in the file; it is torn")
    kind, checksum = struct.unpack_from("<BI", content, end)
    if masked_crc32c(content[block.offset : end + 1]) != checksum:
        raise ValueError("a checksum does not match; it is damaged")
    if kind:
        raise ValueError("it is compressed, which TensorFlow's own are not; save the model again with TensorFlow")
    return content[block.offset : end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each key begins with as many bytes of the one before as its entry says."""
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise ValueError("one of its blocks has no end")
    reader, key = Reader(block[:end]), b""
    while not reader.at_end:
        shared, own, size = reader.varint(), reader.varint(), reader.varint()
        if shared > len(key) or shared + own > LONGEST_KEY:
            raise ValueError("one of its keys makes no sense")
        key = key[:shared] + reader.take(own)
        yield key, reader.take(size)


class Reader:
    """Reads what follows, and never beyond the end."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    @property
    def at_end(self) -> bool:
        return self.at == len(self.content)

    def take(self, size: int) -> bytes:
        if size > len(self.content) - self.at:
            raise ValueError("an entry ends too early; it is torn")
        self.at += size
        return self.content[self.at - size : self.at]

    def varint(self) -> int:
        """Seven bits a byte, the lowest first; the highest bit says that more follow."""
        value = 0
        for shift in range(0, 70, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number has no end")

    def handle(self) -> Block:
        return Block(self.varint(), self.varint())


# ------------------------------------------------------------------------------------------------ protocol buffers


def parsed(content: bytes) -> Fields:
    """The fields of a message, without their meaning: numbers are whole, all else is bytes."""
    fields, reader = Fields(), Reader(content)
    while not reader.at_end:
        field, kind = divmod(reader.varint(), 8)
        value: int | bytes
        match kind:
            case 0:
                value = reader.varint()
            case 1 | 5:
                value = reader.take(8 if kind == 1 else 4)
            case 2:
                value = reader.take(reader.varint())
            case _:
                raise ValueError(f"an entry has a field of kind {kind}")
        fields.setdefault(field, []).append(value)
    return fields


# ------------------------------------------------------------------------------------------------ checksums


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, its bits reversed
        table.append(byte)
    return tuple(table)


def masked_crc32c(content: bytes) -> int:
    """LevelDB's checksum: a CRC-32C, turned and shifted so that a checksum of checksums is no trap."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
