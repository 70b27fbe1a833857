"""Contact maps out: arrays in npz or safetensors, or a drawing. Whole or not at all, as all outputs."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from plm.outputs.npz import NpzWriter
from plm.outputs.target import FileTarget, Target
from plm.outputs.writer import Array, Contents, Writer, require, safe_names


@dataclass(frozen=True)
class Maps(Contents):
    """One square per sequence."""

    def shape(self, index: int) -> tuple[int, ...]:
        return (self.lengths[index], self.lengths[index])

    @property
    def size(self) -> int:
        return sum(length * length for length in self.lengths) * self.numpy_dtype.itemsize


class SafetensorsMaps(Writer):
    """A tensor per id. The header is known before the maps, so each is written at its place when it comes."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        names = safe_names(["__metadata__", *contents.ids])[1:]
        metadata = {"ids": json.dumps(contents.ids), "names": json.dumps(names), "provenance": contents.provenance}
        header: dict[str, object] = {"__metadata__": metadata}
        self._places = [0]
        for name, length in zip(names, contents.lengths, strict=True):
            self._places.append(self._places[-1] + 4 * length * length)
            header[name] = {"dtype": "F32", "shape": [length, length], "data_offsets": self._places[-2:]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data begin aligned
        self._front = len(text).to_bytes(8, "little") + text

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


class DrawnMap(Writer):
    """The map of the one sequence, with its provenance in the PNG's text."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        require("matplotlib", "plot")

    def _begin(self) -> None:
        self.target.temporary.touch()

    def _put(self, index: int, array: Array) -> None:
        self._map = array

    def _finish(self) -> None:
        from plm.plots import draw_contacts

        provenance = self.contents.provenance
        title, model = self.contents.ids[0], str(json.loads(provenance)["model"])
        draw_contacts(
            self._map, self.target.temporary, title=title, subtitle=model, metadata={"Description": provenance}
        )

    def _abandon(self) -> None:
        """Nothing is open."""


WRITERS: dict[str, type[Writer]] = {"npz": NpzWriter, "safetensors": SafetensorsMaps, "png": DrawnMap}


def open_maps(
    path: str, layout: str, ids: Sequence[str], lengths: Sequence[int], provenance: str, overwrite: bool
) -> Writer:
    """A writer of [L, L] maps, as `plm.outputs.open_writer` is one of embeddings. ``provenance`` is JSON.

    Raises: OutputError, before any work.
    """
    contents = Maps(tuple(ids), tuple(lengths), 0, "float32", pooled=False, layer=0, provenance=provenance)
    return WRITERS[layout](FileTarget(path, overwrite=overwrite, size=contents.size), contents)
