"""``.parquet``: a row per sequence, for pandas, polars and DuckDB.

    table = pandas.read_parquet("out.parquet")          # index, id, length, embedding
    matrix = numpy.stack(table["embedding"])            # pooled: [b, c]

``embedding`` is a list of c numbers, or a list of such lists per residue; ``index`` is the place in the input, and the
file's metadata holds ``provenance``. Pooled rows come in input order. Rows per residue are written in groups of about
64 MB as they are computed, so they are in input order within a group only: sort by ``index`` where that matters.
"""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from plm.outputs.target import Target
from plm.outputs.writer import Array, Contents, Embeddings, Writer, require

GROUP_BYTES = 64 * 2**20


class ParquetWriter(Writer):
    """Keeps pooled rows until the end; streams rows per residue in groups."""

    def __init__(self, target: Target, contents: Contents) -> None:
        super().__init__(target, contents)
        self._arrow, self._parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
        arrow = self._arrow
        self._row = arrow.list_(arrow.from_numpy_dtype(np.dtype(contents.dtype)), contents.channels)
        columns = [("index", arrow.int64()), ("id", arrow.string()), ("length", arrow.int32())]
        columns.append(("embedding", self._row if contents.pooled else arrow.list_(self._row)))
        self._schema = arrow.schema(columns, metadata={"provenance": contents.provenance})
        self._group: dict[int, Array] = {}
        self._bytes = 0

    def _begin(self) -> None:
        self._file = self._parquet.ParquetWriter(self.target.temporary, self._schema)

    def _put(self, index: int, array: Array) -> None:
        self._group[index] = array.copy()  # the caller may use its tensor again
        self._bytes += array.nbytes
        if self._bytes > GROUP_BYTES and not self.contents.pooled:
            self._flush()

    def _flush(self) -> None:
        arrow, contents, indices = self._arrow, self.contents, sorted(self._group)
        values = np.concatenate([np.empty(0, contents.dtype), *(self._group[index].ravel() for index in indices)])
        embeddings = arrow.FixedSizeListArray.from_arrays(arrow.array(values), contents.channels)
        lengths = [contents.lengths[index] for index in indices]
        if not contents.pooled:
            offsets = arrow.array(np.cumsum([0, *lengths]), arrow.int32())
            embeddings = arrow.ListArray.from_arrays(offsets, embeddings)
        columns = [indices, [contents.ids[index] for index in indices], lengths, embeddings]
        self._file.write_table(arrow.table(columns, schema=self._schema))
        self._group, self._bytes = {}, 0

    def _finish(self) -> None:
        self._flush()
        self._file.close()

    def _abandon(self) -> None:
        with suppress(OSError):  # closing writes the footer, which fails again on a full disk
            self._file.close()


def read_parquet(path: Path) -> Embeddings:
    parquet = require("pyarrow.parquet", "parquet")
    table = parquet.read_table(path)
    rows = [row.values for row in table["embedding"]]
    if parquet.read_schema(path).field("embedding").type.value_type.num_fields:  # lists of lists: per residue
        arrays = [row.flatten().to_numpy().reshape(len(row), -1) for row in rows]
    else:
        arrays = [row.to_numpy() for row in rows]
    order, ids = np.argsort(table["index"].to_numpy()), table["id"].to_pylist()
    provenance = json.loads(table.schema.metadata[b"provenance"])
    return Embeddings([ids[place] for place in order], [arrays[place] for place in order], provenance)
