"""torch's pickled checkpoints (``.bin``, ``.pt``, ``.pth``), read without running anything that lies in them.

The pickles within them run on the harmless :class:`~plm_weights.pickle_machine.Machine`. The few names that saved
tensors need are interpreted here; any other name is refused.

Both containers that ``torch.save`` has written are read, little-endian only:

- zip (torch >= 1.6): records ``<root>/data.pkl`` and ``<root>/data/<key>``, stored uncompressed;
- legacy: five pickles (magic, protocol, system, object, storage keys), then each storage's int64 count and bytes.

Opening a file reads the pickles and finds the storages. Tensors are views of private memory maps, so what nobody asks
for (two thirds of the published ESM-1b file are optimizer state) is never read, and nothing is in memory twice.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from plm_weights import omegaconf_pickles, pickle_machine
from plm_weights.errors import CheckpointError
from plm_weights.omegaconf_pickles import Items, Leaf, Metadata, Settings
from plm_weights.pickle_machine import Bounded, Global, Machine, as_count, as_counts, as_dict, fill

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

STORAGES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.storage.UntypedStorage": torch.uint8,  # counted in bytes
}
# Younger dtypes have no storage class: torch stores their bytes and names the dtype itself.
DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("complex32", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
}
ALLOWED = {
    *STORAGES,
    *DTYPES,
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "argparse.Namespace",
    *omegaconf_pickles.NAMES,
}


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file: its key, its dtype and the element count that the pickle claims."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``offset`` and ``stride`` count elements of ``dtype`` within ``storage``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to one past the last; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


class Namespace(dict[str, object]):
    """What an ``argparse.Namespace`` held, by name."""


class TorchFile:
    """A ``torch.save`` file: ``root`` is the saved object, with a :class:`StoredTensor` where a tensor was.

    Raises: CheckpointError naming the file and the reason: here for all that can be known without reading a tensor
    (torn, hostile, foreign), in ``read`` if the file changed since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with Bounded(io.FileIO(path)) as file:
            try:
                self.root, storages, self._places = _open_zip(file) if file.peek(2)[:2] == b"PK" else _open_legacy(file)
                for storage in storages:
                    if storage.bytes > self._places[storage.key][1]:
                        raise ValueError(f"its storage {storage.key} is shorter than {storage.bytes:,} bytes")
            except ERRORS as error:
                reason = "its pickle is malformed" if isinstance(error, LookupError) else error
                raise CheckpointError(
                    f"{path} cannot be read as a torch checkpoint: {reason}. If it may be torn, fetch it again."
                ) from error

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor, strided as it was saved; of its storage only the needed span is read.

        It is a view of a private memory map, so that writing into it does not change the file. What is smaller than a
        page, or does not lie at a multiple of its size (as in the legacy container), has its own memory.
        """
        if not tensor.span:
            return torch.empty(0, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride)
        size = tensor.span * tensor.dtype.itemsize
        begin = self._places[tensor.storage.key][0] + tensor.offset * tensor.dtype.itemsize
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            if begin + size > file.seek(0, io.SEEK_END):
                raise CheckpointError(f"{self.path} became shorter while it was read")
            if begin % tensor.dtype.itemsize or size < mmap.ALLOCATIONGRANULARITY:
                file.seek(begin)
                flat = torch.frombuffer(bytearray(file.read(size)), dtype=tensor.dtype)
            else:
                mapped = mmap.mmap(file.fileno(), begin - page + size, access=mmap.ACCESS_COPY, offset=page)
                flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.span, offset=begin - page)
        return flat.as_strided(tensor.shape, tensor.stride)


# what a damaged file makes of the code below and of zipfile, which raises NotImplementedError for a wrong version
ERRORS = (*pickle_machine.ERRORS, NotImplementedError, zipfile.BadZipFile)
Places = dict[str, tuple[int, int]]  # storage key -> first byte in the file, bytes


def _open_zip(file: Bounded) -> tuple[object, list[Storage], Places]:
    end = file.seek(0, io.SEEK_END)
    places: Places = {}
    for record in zipfile.ZipFile(file).infolist():
        file.seek(record.header_offset)
        signature, *_, name_length, extra_length = struct.unpack("<4s5H3I2H", file.read(30))
        begin = record.header_offset + 30 + name_length + extra_length
        if signature != b"PK\x03\x04" or begin + record.file_size > end:
            raise ValueError(f"its record {record.filename!r} does not lie in the file, which is torn")
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {record.filename!r} is compressed, which torch.save never does")
        if record.filename in places:
            raise ValueError(f"it has two records {record.filename!r}")
        places[record.filename] = begin, record.file_size

    roots = [name.removesuffix("data.pkl") for name in places if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(roots) != 1:
        raise ValueError("it is a zip archive, but not one of torch.save: it has no record <name>/data.pkl")

    def content(name: str) -> bytes:
        file.seek(places[name][0])
        return file.read(places[name][1])

    order = roots[0] + "byteorder"
    if order in places and content(order) != b"little":
        raise ValueError("it was written on a big-endian machine; save it again on a little-endian one")
    root, storages = unpickle(io.BytesIO(content(roots[0] + "data.pkl")))
    prefix = roots[0] + "data/"
    places = {name.removeprefix(prefix): place for name, place in places.items() if name.startswith(prefix)}
    if missing := sorted({storage.key for storage in storages} - places.keys()):
        raise ValueError(f"its storages {', '.join(missing[:10])} are missing; the file is torn")
    return root, storages, places


def _open_legacy(file: Bounded) -> tuple[object, list[Storage], Places]:
    if unpickle(file)[0] != LEGACY_MAGIC or unpickle(file)[0] != LEGACY_PROTOCOL:
        raise ValueError("it is not a file of torch.save")
    system = unpickle(file)[0]
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine; save it again on a little-endian one")
    root, storages = unpickle(file)
    keys = unpickle(file)[0]
    by_key = {storage.key: storage for storage in reversed(storages)}  # of several claims, the first holds
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(by_key):
        raise ValueError("its list of storages is not that of its tensors")

    position = file.tell()
    end = file.seek(0, io.SEEK_END)
    places: Places = {}
    for key in keys:
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8).ljust(8, b"\xff"))  # short: -1
        position += 8
        size = count * by_key[key].dtype.itemsize
        if count < 0 or position + size > end:
            raise ValueError(f"it ends within storage {len(places) + 1} of {len(keys)}; the file is torn")
        places[key] = position, size
        position += size
    return root, storages, places


class TorchPickle(Machine):
    """The next pickle of a ``torch.save`` file, with tensors as :class:`StoredTensor`, and the storages it names."""

    writer, content, allowed = "torch.save", "plain tensors", ALLOWED

    def __init__(self) -> None:
        self.storages: list[Storage] = []

    def call(self, name: str, arguments: object) -> object:
        """What the few calls of a saved tensor mean."""
        match name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "argparse.Namespace", ():
                return Namespace()
            case "torch._utils._rebuild_parameter", (StoredTensor() as tensor, *_):
                return tensor
            case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, shape, stride, _, _, *rest):
                return _tensor(storage, storage.dtype, offset, shape, stride, rest)
            case "torch._utils._rebuild_tensor_v3", (
                Storage() as storage, offset, shape, stride, _, _, Global(name=dtype), *rest
            ) if dtype in DTYPES:  # fmt: skip
                return _tensor(storage, DTYPES[dtype], offset, shape, stride, rest)
        if (made := omegaconf_pickles.made(name, arguments)) is not None:
            return made
        raise self.refusal(name)

    def built(self, item: object, state: object) -> object:
        match item:
            case Namespace():
                fill(item, list(as_dict(state)), list(as_dict(state).values()))
                return item
            case Settings() | Items() | Leaf() | Metadata():
                return omegaconf_pickles.filled(item, state)
        return as_dict(item)  # attributes of an OrderedDict (``_metadata`` of a state dict): not kept

    def outside(self, identity: object) -> object:
        self.storages.append(_storage(identity))
        return self.storages[-1]


def unpickle(file: IO[bytes]) -> tuple[object, list[Storage]]:
    """The object of the next pickle in ``file``, and the storages it names. Raises: as ``Machine.load``."""
    machine = TorchPickle()
    return machine.load(file), machine.storages


def _tensor(
    storage: Storage, dtype: torch.dtype, offset: object, shape: object, stride: object, rest: list[object]
) -> StoredTensor:
    if any(rest):
        raise ValueError("it holds a conjugated or negated view; save a plain tensor")
    tensor = StoredTensor(storage, dtype, as_count(offset), as_counts(shape), as_counts(stride))
    if len(tensor.shape) != len(tensor.stride) or len(tensor.shape) > 64:
        raise ValueError(f"it holds a tensor of {len(tensor.shape)} axes with {len(tensor.stride)} strides")
    reach = (tensor.offset + tensor.span) * dtype.itemsize if tensor.span else 0
    if reach > storage.bytes or prod(size or 1 for size in tensor.shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"it holds a tensor {tensor.shape} larger than its storage of {storage.bytes:,} bytes")
    return tensor


def _storage(identity: object) -> Storage:
    match identity:
        # the legacy format adds a None, which once was a view of another storage
        case ("storage", Global(name=kind), str(key), _, count) | (
            "storage", Global(name=kind), str(key), _, count, None
        ) if kind in STORAGES:  # fmt: skip
            return Storage(key, STORAGES[kind], as_count(count))
    raise ValueError("its pickle refers to something outside itself that is not the storage of a plain tensor")
