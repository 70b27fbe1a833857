"""ProteinBERT's pickle of numpy arrays, read without running anything that lies in it, and written; without numpy.

It holds ``(n_annotations, weights, optimizer)``: a number, a list of float32 arrays in the order of Keras'
``get_weights()``, and the state of the optimizer, which is a list or None (nadavbra/protein_bert@83198c9,
proteinbert/model_generation.py). An array is four names of numpy; any other name is refused. Opening a file notes where
the arrays lie. Their bytes are read when they are asked for, and those of the optimizer, two thirds of the published
file, are passed over.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from plm_weights.errors import CheckpointError
from plm_weights.pickle_machine import ERRORS, Bounded, Global, Machine, as_counts

MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2, and since
RECONSTRUCT, SCALAR = ({f"{module}.{name}" for module in MODULES} for name in ("_reconstruct", "scalar"))
ADVICE = {
    "_codecs.encode": "it is of protocol 0, 1 or 2, which make bytes by a call",
    **{
        f"numpy.{core}.numeric._frombuffer": "it is of protocol 5, which lays arrays down in another way"
        for core in ("core", "_core")
    },
}
SIZES = {"f4": 4, "i8": 8}  # bytes
MOST_AXES = 32  # of a numpy array
# A number or none, then a list: how these begin, behind their protocol, since protocol 4 the size of a frame, and the
# mark of a tuple of more than three.
START = re.compile(rb"\x80[\x02-\x05](?:\x95.{8})?\(?(?:K.|M..|J.{4})?\]", re.DOTALL)
NAMES = re.compile(rb"numpy\._?core")  # where any pickle of arrays begins


@dataclass(frozen=True)
class Span:
    """Bytes in the file, unread."""

    start: int
    size: int


@dataclass
class Dtype:
    """A numpy dtype, of which a pickle tells the byte order afterwards."""

    code: str
    order: str = ""


@dataclass
class StoredArray:
    """Where an array lies, which a pickle tells after it has announced one."""

    shape: tuple[int, ...] = ()
    span: Span | None = None


class ArrayPickle(Machine):
    """A pickle of numpy arrays, each as a :class:`StoredArray`. A number of numpy's becomes None: only the optimizer
    has such."""

    writer, content = "numpy", "plain arrays"
    allowed = frozenset({*RECONSTRUCT, *SCALAR, "numpy.ndarray", "numpy.dtype"})

    def constant(self, value: object, end: int) -> object:
        return Span(end - len(value), len(value)) if isinstance(value, bytes) else value

    def named(self, module: object, attribute: object) -> Global:
        told = isinstance(module, str) and isinstance(attribute, str)
        if told and (why := ADVICE.get(f"{module}.{attribute}")):
            raise ValueError(
                f"{why}; only 3 and 4 are read. If you trust its author, load it with Python and save it again with "
                "protocol=4"
            )
        return super().named(module, attribute)

    def call(self, name: str, arguments: object) -> object:
        match arguments:
            case (Global(name="numpy.ndarray"), (0,), Span(size=1)) if name in RECONSTRUCT:
                return StoredArray()
            case (str(code), align, copy) if name == "numpy.dtype" and (align, copy) in ((False, True), (0, 1)):
                if code not in SIZES:
                    raise ValueError(f"it has an array of dtype {code[:20]!r}; ProteinBERT's are 'f4', float32")
                return Dtype(code)
            case (Dtype(code=code, order="<"), Span(size=size)) if name in SCALAR and size == SIZES[code]:
                return None
        raise self.refusal(name)

    def built(self, item: object, state: object) -> object:
        match item, state:
            case Dtype(order=""), (3, str(order), None, None, None, -1, -1, 0):
                if order != "<":
                    raise ValueError("it was written on a big-endian machine; save it again on a little-endian one")
                item.order = order
                return item
            case StoredArray(span=None), (1, shape, Dtype(order="<") as dtype, bool(fortran), Span() as span):
                item.shape, item.span = as_counts(shape), span
                self.check(item.shape, dtype, fortran, span)
                return item
        raise self.refusal(f"a {type(item).__name__}")

    def check(self, shape: tuple[int, ...], dtype: Dtype, fortran: bool, span: Span) -> None:
        """Raises: ValueError for an array that is none of ProteinBERT's."""
        if len(shape) > MOST_AXES:
            raise ValueError(f"it has an array of {len(shape)} axes")
        if dtype.code != "f4":
            raise ValueError(f"it has an array of dtype {dtype.code!r}; ProteinBERT's are 'f4', float32")
        if fortran:
            raise ValueError(f"its array {shape} lies in Fortran's order; save numpy.ascontiguousarray of it")
        if prod(size or 1 for size in shape) * SIZES[dtype.code] >= 2**63:
            raise ValueError(f"it has an array {shape}, larger than any memory")
        if span.size != SIZES[dtype.code] * prod(shape):
            raise ValueError(f"its array {shape} has {span.size:,} bytes, wanted {SIZES[dtype.code] * prod(shape):,}")


class ArrayFile:
    """ProteinBERT's pickle: the number of annotations that it tells, and its arrays.

    Raises: CheckpointError naming the file and the reason: here for all that can be known without reading an array
    (torn, hostile, foreign), in ``read`` if the file changed since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with Bounded(io.FileIO(path)) as file:
            try:
                self.annotations, self.arrays = _parts(ArrayPickle().load(file))
                if file.read(1):
                    raise ValueError("something follows its pickle")
            except (*ERRORS, OverflowError) as error:
                reason = "its pickle is malformed" if isinstance(error, LookupError) else error
                raise CheckpointError(
                    f"{path} cannot be read as a pickle of ProteinBERT: {reason}. If it may be torn, fetch it again."
                ) from error

    def read(self, array: StoredArray) -> Tensor:
        """The array with its own memory."""
        assert array.span is not None
        buffer = bytearray(array.span.size)
        with self.path.open("rb") as file:
            file.seek(array.span.start)
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{self.path} became shorter while it was read")
        flat = torch.frombuffer(buffer, dtype=torch.float32) if buffer else torch.empty(0)
        return flat.view(array.shape)


def _parts(root: object) -> tuple[int, list[StoredArray]]:
    wanted = "wanted is (n_annotations, weights, optimizer_weights), as the authors publish it"
    match root:
        case (int(count), list(items), None | list()) if not isinstance(count, bool):
            arrays = [item for item in items if isinstance(item, StoredArray) and item.span is not None]
            if len(arrays) < len(items):
                raise ValueError(f"{len(items) - len(arrays)} of its {len(items)} weights are no arrays")
            return count, arrays
        case (_, list(), None | list()):
            raise ValueError(
                "its first item, the number of annotations, is no whole number of Python's: save int(n_annotations)"
            )
        case (list(), list() | None):
            raise ValueError(
                f"it holds two items, weights and an optimizer's state, as the authors' first files; {wanted}"
            )
        case list():
            raise ValueError(
                f"it holds a list of {len(root)} weights alone, as of a model that was fine-tuned; {wanted}"
            )
    told = f"{len(root)} items" if isinstance(root, tuple) else f"a {type(root).__name__}"
    raise ValueError(f"it holds {told}; {wanted}")


def dump(file: IO[bytes], annotations: int, arrays: Sequence[Tensor]) -> None:
    """Write ``(annotations, arrays, None)`` as Python's own pickler does: protocol 3, names as before numpy 2, which
    every numpy reads. ``arrays`` are float32."""
    _Pickler(file).dump(annotations, arrays)


class _Pickler:
    """What is written is remembered under consecutive numbers, as by Python's, whether or not it comes again."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.remembered = 0
        self.names: dict[str, int] = {}

    def dump(self, annotations: int, arrays: Sequence[Tensor]) -> None:
        self.file.write(b"\x80\x03" + _whole(annotations) + b"]")
        self.put()
        self.file.write(b"(")
        for array in arrays:
            self.array(array)
        self.file.write(b"eN\x87")
        self.put()
        self.file.write(b".")

    def array(self, array: Tensor) -> None:
        self.name("numpy.core.multiarray\n_reconstruct")
        self.name("numpy\nndarray")
        self.numbers(0)
        self.again("b", b"C\x01b")
        self.put(b"\x87")
        self.put(b"R")
        self.file.write(b"(K\x01")
        self.numbers(*array.shape)
        self.dtype()
        self.file.write(b"\x89")  # not in Fortran's order
        content = bytearray(array.numel() * array.itemsize)
        if content:
            torch.frombuffer(content, dtype=torch.float32).copy_(array.detach().flatten())
        size = len(content)
        self.file.write(b"C" + bytes([size]) if size < 256 else b"B" + struct.pack("<I", size))
        self.put(content)
        self.put(b"t")
        self.file.write(b"b")

    def dtype(self) -> None:
        if self.again("float32"):
            return
        self.name("numpy\ndtype")
        self.put(b"X\x02\0\0\0f4")
        self.put(b"\x89\x88\x87")
        self.put(b"R")
        self.names["float32"] = self.remembered - 1
        self.file.write(b"(K\x03")
        self.put(b"X\x01\0\0\0<")
        self.put(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t")
        self.file.write(b"b")

    def name(self, name: str) -> None:
        self.again(name, b"c" + name.encode() + b"\n")

    def numbers(self, *values: int) -> None:
        """A tuple of up to three whole numbers. The empty one is not remembered."""
        if values:
            self.put(b"".join(map(_whole, values)) + (b"\x85", b"\x86", b"\x87")[len(values) - 1])
        else:
            self.file.write(b")")

    def again(self, name: str, first: bytes = b"") -> bool:
        """Write what was remembered under ``name``, or ``first`` if there is nothing yet."""
        if name in self.names:
            self.numbered(b"h", b"j", self.names[name])
            return True
        if first:
            self.names[name] = self.remembered
            self.put(first)
        return False

    def put(self, content: bytes | bytearray = b"") -> None:
        """Write ``content`` and remember what it makes."""
        self.file.write(content)
        self.numbered(b"q", b"r", self.remembered)
        self.remembered += 1

    def numbered(self, short: bytes, long: bytes, number: int) -> None:
        self.file.write(short + bytes([number]) if number < 256 else long + struct.pack("<I", number))


def _whole(value: int) -> bytes:
    if value < 2**8:
        return b"K" + struct.pack("<B", value)
    return b"M" + struct.pack("<H", value) if value < 2**16 else b"J" + struct.pack("<i", value)
