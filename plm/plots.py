"""Drawings. Needs matplotlib: ``pip install 'plm-torch[plot]'``."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

TITLE_LIMIT = 40  # characters, as wide as the map


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
