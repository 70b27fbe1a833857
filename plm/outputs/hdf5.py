"""``.h5``: one dataset per sequence at the root, [length, c] or [c], as UniProt publishes its embeddings.

    with h5py.File("out.h5") as file:
        embeddings = {dataset.attrs["original_id"]: dataset[:] for dataset in file.values()}
        print(file.attrs["provenance"])

Keys are the ids with slashes (which would make groups) and the like replaced; ``original_id`` is the id itself and
``index`` its place in the input. ``bio-h5`` is the layout of bio_embeddings: keys are the numbers of the sequences.
"""

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from plm.outputs.target import OutputError, Target
from plm.outputs.writer import Array, Contents, Embeddings, Writer, require, safe_names

ATTRIBUTE_LIMIT = 64_000  # bytes; HDF5 keeps larger attributes only in a format that old readers do not know


class PatientFile(io.FileIO):
    """A file that keeps its first error, and from then on only pretends to write.

    HDF5 writes what it has gathered when it likes, and does not recover from a write that fails: every object that is
    closed later complains, and in the end the process crashes.
    """

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and not self.error:
                done += super().write(view[done:])
        except BaseException as error:  # Ctrl-C, too
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            if not self.error:
                super().truncate(size)
        except BaseException as error:
            self.error = error
        return self.tell() if size is None else size

    def check(self) -> None:
        """Raise what was kept."""
        if self.error:
            raise self.error


class H5Writer(Writer):
    """Streams: HDF5 writes each dataset when it comes."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        self._h5py = require("h5py", "h5")
        if len(contents.provenance.encode()) > ATTRIBUTE_LIMIT:
            raise OutputError(f"the provenance is longer than {ATTRIBUTE_LIMIT} bytes, too long for HDF5")
        self._names = safe_names(contents.ids)

    def _begin(self) -> None:
        self._disk = PatientFile(self.target.temporary, "w+")
        self._file = self._h5py.File(self._disk, "w")
        self._file.attrs["provenance"] = self.contents.provenance

    def _put(self, index: int, array: Array) -> None:
        try:
            dataset = self._file.create_dataset(self._names[index], data=array)
            dataset.attrs["original_id"] = self.contents.ids[index]
            dataset.attrs["index"] = index
        finally:
            self._disk.check()

    def _finish(self) -> None:
        try:
            self._file.close()
        finally:
            self._disk.check()
        self._disk.close()

    def _abandon(self) -> None:
        with suppress(OSError, RuntimeError):  # what it reads back may lack what was not written
            self._file.close()
        self._disk.close()


class BioH5Writer(H5Writer):
    """Keys are ``"0"``, ``"1"``, ...: `simple_remapping` of bio_embeddings."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        self._names = [str(index) for index in range(len(contents.ids))]


def read_h5(path: Path) -> Embeddings:
    with require("h5py", "h5").File(path) as file:
        datasets = sorted(file.values(), key=lambda dataset: int(dataset.attrs["index"]))
        ids = [str(dataset.attrs["original_id"]) for dataset in datasets]
        return Embeddings(ids, [np.asarray(dataset) for dataset in datasets], json.loads(file.attrs["provenance"]))
