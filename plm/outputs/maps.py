"""Contact maps out: one array [length, length] per sequence, whole or not at all, as all outputs.

    maps = np.load("out.npz")                           # or safetensors.numpy.load_file("out.safetensors")
    first = maps["sp|O13297|CET1_YEAST"]

Ids are made safe as for embeddings in npz. In safetensors the metadata holds ``ids``, ``names`` and ``provenance``.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from plm.outputs.by_offset import OffsetWriter
from plm.outputs.npz import NpzWriter
from plm.outputs.target import FileTarget, Target
from plm.outputs.writer import Contents, Writer, safe_names


@dataclass(frozen=True)
class Maps(Contents):
    """One square per sequence."""

    def shape(self, index: int) -> tuple[int, ...]:
        return (self.lengths[index], self.lengths[index])

    @property
    def size(self) -> int:
        return sum(length * length for length in self.lengths) * self.numpy_dtype.itemsize


class SafetensorsMaps(OffsetWriter):
    """A tensor per id."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        names = safe_names(["__metadata__", *contents.ids])[1:]
        metadata = {"ids": json.dumps(contents.ids), "names": json.dumps(names), "provenance": contents.provenance}
        self._lay_out(metadata, [(name, "F32", contents.shape(index)) for index, name in enumerate(names)])


LAYOUTS: dict[str, type[Writer]] = {"npz": NpzWriter, "safetensors": SafetensorsMaps}


def open_maps(
    path: str | os.PathLike[str],
    writer: type[Writer],
    *,
    ids: Sequence[str],
    lengths: Sequence[int],
    provenance: str,
    overwrite: bool = False,
) -> Writer:
    """A writer of maps, as `plm.outputs.open_writer` is one of embeddings. ``provenance`` is JSON.

    ``writer`` is one of `LAYOUTS`, or another that takes a map per sequence.

    Raises: OutputError, before any work.
    """
    contents = Maps(tuple(ids), tuple(lengths), 0, "float32", pooled=False, layer=0, provenance=provenance)
    return writer(FileTarget(path, overwrite=overwrite, size=contents.size), contents)
