"""safetensors files that are written piece by piece: every place in them is known before the first number is."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import accumulate

from plm.outputs.target import OutputError, Target
from plm.outputs.writer import Array, Contents, Writer

CODES = {"float16": "F16", "float32": "F32", "float64": "F64"}
ITEM_BYTES = {"F16": 2, "F32": 4, "F64": 8, "I64": 8}
HEADER_LIMIT = 100_000_000  # bytes; safetensors refuses more


class OffsetWriter(Writer):
    """The header is computed first, then each array is written at its place: memory stays constant."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        item = contents.numpy_dtype.itemsize
        sizes = (item * math.prod(contents.shape(index)) for index in range(len(contents.ids)))
        self._places = [*accumulate(sizes, initial=0)]

    def _lay_out(
        self, metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...]]], tables: bytes = b""
    ) -> None:
        """Compute the header of ``tensors`` (name, dtype, shape), which lie end to end.

        ``tables`` are the data of the first of them; the arrays of `contents` fill the rest in input order.
        """
        header: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for name, dtype, shape in tensors:
            start, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data begin aligned
        if len(text) > HEADER_LIMIT:
            ids = f"{len(self.contents.ids):,} ids"
            raise OutputError(f"{ids} are too many for a safetensors header; choose another layout, or split the input")
        self._front = len(text).to_bytes(8, "little") + text + tables

    def _begin(self) -> None:
        self._file = self.target.temporary.open("wb")
        self._file.write(self._front)

    def _put(self, index: int, array: Array) -> None:
        self._file.seek(len(self._front) + self._places[index])
        self._file.write(array.data)

    def _finish(self) -> None:
        self._file.close()

    def _abandon(self) -> None:
        with suppress(OSError):  # closing writes what is buffered, which fails again on a full disk
            self._file.close()
