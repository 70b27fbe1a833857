"""``.npz``: one array per sequence under its id, as `numpy.savez` would write; ``provenance.json`` lies in the archive.

    arrays = np.load("out.npz")
    first = arrays["sp|O13297|CET1_YEAST"]

Slashes, control characters and repeats in ids are replaced (`safe_names`). The JSON holds ``ids`` and ``names`` (the
archive's keys) in input order, and ``provenance``.
"""

import json
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from plm.outputs.target import Target
from plm.outputs.writer import Array, Contents, Embeddings, Writer, safe_names

INDEX = "provenance.json"


class NpzWriter(Writer):
    """Streams: each array goes into the archive when it comes."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        self._names = safe_names([INDEX, *contents.ids])[1:]  # an id of that name gets a suffix

    def _begin(self) -> None:
        self._archive = zipfile.ZipFile(self.target.temporary, "w")

    def _put(self, index: int, array: Array) -> None:
        entry = zipfile.ZipInfo(f"{self._names[index]}.npy")  # without the time of day: equal runs give equal bytes
        with self._archive.open(entry, "w", force_zip64=True) as member:
            np.lib.format.write_array(member, array, allow_pickle=False)

    def _finish(self) -> None:
        index = {"ids": self.contents.ids, "names": self._names, "provenance": json.loads(self.contents.provenance)}
        self._archive.writestr(zipfile.ZipInfo(INDEX), json.dumps(index))
        self._archive.close()

    def _abandon(self) -> None:
        with suppress(OSError):  # closing writes the directory, which fails again on a full disk
            self._archive.close()


def read_npz(path: Path) -> Embeddings:
    with np.load(path, allow_pickle=False) as arrays:
        index = json.loads(arrays[INDEX])
        return Embeddings(index["ids"], [arrays[name] for name in index["names"]], index["provenance"])
