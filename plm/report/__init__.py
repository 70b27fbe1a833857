"""One page that shows many predicted structures, and needs nothing but a browser: no network, no other file.

It holds the structures as text, 3Dmol (BSD-3, see ``vendored``) to show them, and pLDDT and PAE as numbers, which
``page.js`` draws. A line in its head forbids the page to fetch anything.
"""

import base64
import html
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TextIO

import numpy as np
import numpy.typing as npt

from plm.plots import MOST_ERROR

CELLS = 512  # of the map of PAE in each direction; longer proteins show means of some residues
UNIT = 1 / 8  # Å per step of PAE as it is stored, in bytes
MARK = '<meta name="generator" content="plm fold">'


@dataclass(frozen=True)
class Shown:
    """One protein on the page.

    Attributes:
        about: a line of text below its name.
        structure: the text of a file in the ``layout`` pdb or cif.
        chains: residues of each chain, under the name that it has in the file.
        plddt: ``[L]``, 0 to 100.
        pae: ``[L, L]`` in Å.
        starts: the number of each chain's first residue in the file; 1 unless told.
    """

    id: str
    about: str
    structure: str
    layout: str
    chains: Mapping[str, str]
    plddt: Sequence[float]
    pae: npt.ArrayLike
    starts: Sequence[int] = ()


@dataclass(frozen=True)
class Row:
    """What the table says of a protein."""

    id: str
    length: int
    chains: int
    mean_plddt: float
    ptm: float


def write_report(file: TextIO, rows: Sequence[Row], proteins: Iterable[Shown], *, title: str, subtitle: str) -> None:
    """Write the page to ``file``. ``proteins`` come in the order of ``rows``, and only one at a time is in memory."""
    here = files(__name__)
    page, style, script = (here.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    viewer, licence = (
        here.joinpath("vendored", name).read_text("utf-8") for name in ("3Dmol-min.js", "3Dmol-LICENSE.txt")
    )
    told = {"title": html.escape(title), "subtitle": html.escape(subtitle), "style": style}
    file.write(page.format(**told, rows="".join(as_row(i, row) for i, row in enumerate(rows))))
    for i, (_, protein) in enumerate(zip(rows, proteins, strict=True)):
        file.write(f'<script type="application/json" id="p{i}">{as_data(protein)}</script>\n')
    file.write(f"<!-- 3Dmol.js 2.5.5\n{licence}-->\n<script>{viewer}</script>\n")
    file.write(f"<script>\n{script}</script>\n</body>\n</html>\n")


def as_row(number: int, row: Row) -> str:
    """A line of the table."""
    cells = (html.escape(row.id), row.length, row.chains, f"{row.mean_plddt:.1f}", f"{row.ptm:.3f}")
    return f'<tr tabindex="0" data-of="p{number}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'


def as_data(protein: Shown) -> str:
    """What ``page.js`` reads: JSON, in which no tag can begin."""
    cells, step = coarse(np.asarray(protein.pae, np.float64))
    starts = protein.starts or [1] * len(protein.chains)
    told = {
        "id": protein.id,
        "about": protein.about,
        "layout": protein.layout,
        "chains": [
            {"name": name, "sequence": sequence, "start": start}
            for (name, sequence), start in zip(protein.chains.items(), starts, strict=True)
        ],
        "plddt": [round(value, 1) for value in protein.plddt],
        "step": step,
        "unit": UNIT,
        "most": MOST_ERROR / UNIT,
        "structure": packed(protein.structure.encode()),
        "pae": packed(np.rint(cells.clip(0, MOST_ERROR) / UNIT).astype(np.uint8).tobytes()),
    }
    return json.dumps(told, separators=(",", ":")).replace("<", "\\u003c")


def coarse(map: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], int]:
    """The map ``[L, L]`` in at most ``CELLS`` cells each way: means of squares of so many residues."""
    step = max(1, math.ceil(len(map) / CELLS))
    starts = np.arange(0, len(map), step)
    sums = np.add.reduceat(np.add.reduceat(map, starts, 0), starts, 1)
    counts = np.diff([*starts, len(map)])
    return sums / np.outer(counts, counts), step


def packed(content: bytes) -> str:
    """Smaller, and in letters."""
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")
