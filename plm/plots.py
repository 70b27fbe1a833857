"""Drawings. Needs matplotlib: ``pip install 'plm-torch[plot]'``."""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

TITLE_LIMIT = 40  # characters, as wide as the map
RESIDUES = "GAVLIMCPFYWSTNQHKRDE"  # small, hydrophobic, aromatic, polar, charged
WRAP = 80  # positions side by side
CELL = 0.14  # inches
# From which pLDDT on AlphaFold's database calls a residue very sure, sure, unsure and very unsure, and its colours.
BANDS = ((90, "#0053D6"), (70, "#65CBF3"), (50, "#FFDB13"), (0, "#FF7D45"))
MOST_ERROR = 31.75  # Å, the largest that ESMFold can predict


def draw_contacts(
    probabilities: npt.ArrayLike,
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Draw a contact map ``[L, L]`` as a PNG file: residue 1 in the upper left corner, white to blue for 0 to 1."""
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may look for a screen
    from matplotlib.ticker import MaxNLocator

    map = np.asarray(probabilities)
    length = len(map)
    first, last = 0.5, length + 0.5  # residue i is the square around i
    figure = Figure(figsize=(6.8, 5.8), layout="compressed")
    axes = figure.add_subplot()
    image = axes.imshow(map, cmap="Blues", vmin=0, vmax=1, origin="upper", extent=(first, last, last, first))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1, prune=None))
        axis.set_label_text("residue")
    short = title if len(title) <= TITLE_LIMIT else f"{title[: TITLE_LIMIT - 1]}…"
    # An id may hold dollar signs, which are no formula.
    axes.set_title(short, loc="left", fontsize=11, fontweight="bold", pad=20, parse_math=False)
    axes.annotate(subtitle, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=9, color="0.4", parse_math=False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label("probability of contact (Cβ–Cβ < 8 Å)")
    bar.outline.set_visible(False)
    figure.savefig(path, format="png", dpi=200, metadata=dict(metadata or {}))


def draw_scan(
    scores: npt.ArrayLike,
    wild_type: str,
    path: str | Path,
    *,
    offset: int = 1,
    title: str,
    subtitle: str = "",
    label: str = "score",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Draw scores ``[20, L]`` of single substitutions as a PNG file: rows as in ``RESIDUES``, a column per position.

    Red is below 0, blue above; a dot marks the wild type's residue, grey is what has no score (NaN). The colours end at
    the 99th percentile of the sizes, so that a few outliers do not wash out the rest. Long proteins go on below.
    """
    from matplotlib.figure import Figure

    map = np.ma.masked_invalid(np.array(scores, np.float64))
    own = [(place, RESIDUES.index(letter)) for place, letter in enumerate(wild_type) if letter in RESIDUES]
    for place, row in own:
        map[row, place] = 0
    panels = -(-len(wild_type) // (WRAP if len(wild_type) <= 20 * WRAP else 3 * WRAP))
    wrap = -(-len(wild_type) // (10 * panels)) * 10 if panels > 1 else len(wild_type)  # alike, in whole tens
    starts = range(0, len(wild_type), wrap)
    left, right, top, gap = 0.5, 1.0, 0.75, 0.55  # inches around the maps, and between them
    wide, high = wrap * CELL, len(RESIDUES) * CELL
    width, height = max(left + wide + right, 4), top + len(starts) * (high + gap)
    figure = Figure(figsize=(width, height))
    sizes = np.abs(map.compressed())
    limit = float(np.percentile(sizes, 99)) if sizes.any() else 1.0
    for number, start in enumerate(starts):
        part = wild_type[start : start + wrap]
        bottom = height - top - number * (high + gap) - high
        box = (left / width, bottom / height, len(part) * CELL / width, high / height)
        axes = figure.add_axes(box, facecolor="0.85")
        image = axes.imshow(map[:, start : start + wrap], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        here = [(place - start, row) for place, row in own if start <= place < start + wrap]
        axes.scatter([x for x, _ in here], [y for _, y in here], s=5, color="0.25", linewidths=0)
        axes.xaxis.remove_overlapping_locs = False  # letters above and numbers below stand at the same places
        axes.set_yticks(range(len(RESIDUES)), list(RESIDUES), fontsize=6.5, family="monospace")
        numbers = [place for place in range(len(part)) if (start + place + offset) % 10 == 0 or start + place == 0]
        axes.set_xticks(numbers, [str(start + place + offset) for place in numbers], fontsize=7)
        axes.set_xticks(range(len(part)), list(part), fontsize=6.5, family="monospace", minor=True)
        axes.tick_params(
            axis="x", which="minor", length=0, pad=1, top=True, bottom=False, labeltop=True, labelbottom=False
        )
        axes.tick_params(axis="both", which="major", length=2, pad=2)
        axes.spines[:].set_visible(False)
    side = figure.add_axes(((left + wide + 0.25) / width, (height - top - high) / height, 0.12 / width, high / height))
    bar = figure.colorbar(image, cax=side, extend="both" if sizes.any() and sizes.max() > limit else "neither")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
    short = title if len(title) <= TITLE_LIMIT else f"{title[: TITLE_LIMIT - 1]}…"
    figure.text(left / width, 1 - 0.1 / height, short, fontsize=11, fontweight="bold", va="top", parse_math=False)
    figure.text(left / width, 1 - 0.32 / height, subtitle, fontsize=9, color="0.4", va="top", parse_math=False)
    dpi = min(200.0, 60_000 / height)  # a PNG ends at 65,535 pixels
    figure.savefig(path, format="png", dpi=dpi, metadata=dict(metadata or {}))


def draw_confidence(
    plddt: npt.ArrayLike,
    pae: npt.ArrayLike,
    path: str | Path,
    *,
    chains: Mapping[str, int] | None = None,
    title: str,
    subtitle: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Draw how sure a predicted structure is as a PNG file.

    On the left pLDDT ``[L]`` (0 to 100) along the residues, on AlphaFold's bands; on the right PAE ``[L, L]`` in Å,
    dark green for 0: the error expected of the residue in a column once that in the row is aligned. ``chains`` says of
    several how many residues each has, under its name; lines mark where one ends.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values, errors = np.asarray(plddt), np.asarray(pae)
    length = len(values)
    first, last = 0.5, length + 0.5
    names, counts = zip(*(chains or {"": length}).items(), strict=True)
    spans = list(pairwise(accumulate(counts, initial=0)))
    figure = Figure(figsize=(11.5, 5), layout="compressed")
    line, map = figure.subplots(1, 2, width_ratios=(1.15, 1))
    top = 100.0
    for least, colour in BANDS:
        line.axhspan(least, top, color=colour, alpha=0.22, linewidth=0)
        top = least
    for start, stop in spans:
        residues = range(start + 1, stop + 1)
        line.plot(residues, values[start:stop], color="0.15", linewidth=1.2, marker="." if length == 1 else None)
    line.set(xlim=(first, last), ylim=(0, 100), yticks=[0, *(least for least, _ in BANDS[:-1]), 100])
    line.set_ylabel("pLDDT")
    image = map.imshow(
        errors, cmap="Greens_r", vmin=0, vmax=MOST_ERROR, origin="upper", extent=(first, last, last, first)
    )
    map.set_ylabel("aligned residue")
    for axes, name in ((line, "residue"), (map, "scored residue")):
        axes.set_xlabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        for number, (start, stop) in enumerate(spans if len(spans) > 1 else ()):
            if number:
                axes.axvline(start + 0.5, color="0.15", linewidth=0.8)
            middle = (start + stop) / (2 * length)
            axes.text(middle, 1.01, names[number], transform=axes.transAxes, ha="center", va="bottom", fontsize=8)
    map.yaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    for start, _ in spans[1:]:
        map.axhline(start + 0.5, color="0.15", linewidth=0.8)
    bar = figure.colorbar(image, ax=map, fraction=0.046, pad=0.03)
    bar.set_label("expected error (Å)")
    bar.outline.set_visible(False)
    short = title if len(title) <= TITLE_LIMIT else f"{title[: TITLE_LIMIT - 1]}…"
    line.set_title(short, loc="left", fontsize=11, fontweight="bold", pad=30, parse_math=False)
    line.annotate(
        subtitle, (0, 1), (0, 18), "axes fraction", "offset points", fontsize=9, color="0.4", parse_math=False
    )
    figure.savefig(path, format="png", dpi=150, metadata=dict(metadata or {}))
