"""Embeddings out, in the layouts that people's tools read.

| format        | suffix           | holds                        | read with         | memory                        |
|---------------|------------------|------------------------------|-------------------|-------------------------------|
| `safetensors` | `.safetensors`   | packed [n, c], or [b, c]     | safetensors       | constant                      |
| `npz`         | `.npz`           | an array per id              | numpy             | constant                      |
| `h5`          | `.h5` `.hdf5`    | a dataset per id             | h5py              | constant                      |
| `bio-h5`      |                  | the same, keyed by number    | h5py              | constant                      |
| `parquet`     | `.parquet`       | a row per sequence           | pandas, polars    | 64 MB; pooled: all rows       |
| `esm-pt`      | a folder         | a file per sequence          | torch             | constant                      |
| `csv` `tsv`   | `.csv` `.tsv`    | a row per sequence, pooled   | anything          | all rows                      |
| `jsonl`       | `.jsonl`         | a line per sequence, pooled  | jq, pandas        | all rows                      |

The module of each layout says where its provenance is and how it is read in three lines.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plm.outputs.esm_pt import EsmPtWriter, read_esm_pt
from plm.outputs.hdf5 import BioH5Writer, H5Writer, read_h5
from plm.outputs.npz import NpzWriter, read_npz
from plm.outputs.output import Output
from plm.outputs.packed import SafetensorsWriter, read_safetensors
from plm.outputs.parquet import ParquetWriter, read_parquet
from plm.outputs.target import FileTarget, FolderTarget, LayoutError, OutputError, StandardOutput, Target
from plm.outputs.text import CsvWriter, JsonlWriter, TsvWriter, read_csv, read_jsonl, read_tsv
from plm.outputs.writer import DTYPES, Contents, Embeddings, Writer

__all__ = ["FORMATS", "Embeddings", "LayoutError", "Output", "OutputError", "Writer", "open_writer", "read_embeddings"]


@dataclass(frozen=True)
class Layout:
    """One row per format."""

    suffixes: tuple[str, ...]
    writer: type[Writer]
    read: Callable[[Path], Embeddings]


LAYOUTS = {
    "safetensors": Layout((".safetensors",), SafetensorsWriter, read_safetensors),
    "npz": Layout((".npz",), NpzWriter, read_npz),
    "h5": Layout((".h5", ".hdf5"), H5Writer, read_h5),
    "bio-h5": Layout((), BioH5Writer, read_h5),
    "parquet": Layout((".parquet",), ParquetWriter, read_parquet),
    "esm-pt": Layout((), EsmPtWriter, read_esm_pt),
    "csv": Layout((".csv",), CsvWriter, read_csv),
    "tsv": Layout((".tsv",), TsvWriter, read_tsv),
    "jsonl": Layout((".jsonl",), JsonlWriter, read_jsonl),
}
FORMATS = tuple(LAYOUTS)


def open_writer(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    ids: Sequence[str],
    lengths: Sequence[int],
    channels: int,
    dtype: str = "float32",
    pooled: bool,
    layer: int | None,
    provenance: Mapping[str, object],
    overwrite: bool = False,
) -> Writer:
    """Open an output for the embeddings of `ids`; to be used in a ``with`` statement, before any work is done.

    Args:
        path: its suffix chooses the layout; a folder, or a path that ends in ``/``, is esm-pt; ``"-"`` is stdout.
        format: one of FORMATS, instead of the suffix.
        lengths: residues of each sequence.
        dtype: what is stored: float32, float16 or float64. Tensors of any float dtype are taken.
        pooled: whether an embedding is [c] instead of [length, c].
        layer: number of the layer, as esm-pt writes it: 0 are the embeddings. None: it is not of one layer.
        provenance: stored inside the output as JSON, as it is given.
        overwrite: replace an existing target, when the new one is complete.

    Raises:
        LayoutError: before any work: an unknown layout, or one that cannot hold this.
        OutputError: before any work: the target exists; its folder is missing or closed; too little space; a missing
            library.
    """
    name = _choose(path, format)
    layout = LAYOUTS[name]
    if len(ids) != len(lengths):
        raise ValueError(f"{len(ids)} ids and {len(lengths)} lengths; every sequence has one of each")
    if dtype not in DTYPES:
        raise LayoutError(f"cannot store {dtype}; choose {', '.join(DTYPES)} (bfloat16 fits into float32 exactly)")
    if not pooled and not layout.writer.per_residue:
        able = ", ".join(name for name, layout in LAYOUTS.items() if layout.writer.per_residue)
        raise LayoutError(f"{name} holds pooled embeddings only; pool them (mean, max, cls), or write {able}")
    contents = Contents(tuple(ids), tuple(lengths), channels, dtype, pooled, layer, json.dumps(dict(provenance)))
    target: Target
    if os.fspath(path) == "-":
        target = StandardOutput()
    elif name == "esm-pt":
        target = FolderTarget(path, overwrite=overwrite, size=contents.size)
    else:
        target = FileTarget(path, overwrite=overwrite, size=contents.size)
    return layout.writer(target, contents)


def read_embeddings(path: str | os.PathLike[str], *, format: str | None = None) -> Embeddings:
    """Read an output of any layout back: ids, arrays ([length, c] or [c]) and provenance, in input order."""
    name = _choose(path, format)
    if not Path(path).exists():
        raise OutputError(f"no such file: {os.fspath(path)}")
    return LAYOUTS[name].read(Path(path))


def _choose(path: str | os.PathLike[str], format: str | None) -> str:
    text = os.fspath(path)
    if format is not None and format not in LAYOUTS:
        raise LayoutError(f"unknown format {format!r}; choose one of {', '.join(LAYOUTS)}")
    if text == "-":
        if format not in ("csv", "tsv", "jsonl"):
            raise LayoutError(
                f"stdout takes csv, tsv or jsonl, not {format or 'an unnamed format'}; choose with --format"
            )
        return format
    if format is not None:
        return format
    suffix = Path(text).suffix.lower()
    for name, layout in LAYOUTS.items():
        if suffix in layout.suffixes and not text.endswith(("/", os.sep)):
            return name
    if text.endswith(("/", os.sep)) or os.path.isdir(text):  # noqa: PTH112 - Path.is_dir() may raise
        return "esm-pt"
    known = ", ".join(suffix for layout in LAYOUTS.values() for suffix in layout.suffixes)
    raise LayoutError(f"{text}: the suffix {suffix!r} names no layout; use {known}, a folder for esm-pt, or --format")
