"""Plain tables."""

import textwrap
from collections.abc import Sequence


def table(lines: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Cells in columns two spaces apart. With a ``width`` the last column goes on below itself."""
    *widths, last = [max(map(len, column)) for column in zip(*lines, strict=True)]
    start = sum(widths) + 2 * len(widths)
    room = last if width is None else width - start
    texts = []
    for *cells, note in lines:
        first, *others = textwrap.wrap(note, room, break_on_hyphens=False) or [""] if width else [note]
        front = "".join(cell.ljust(size + 2) for cell, size in zip(cells, widths, strict=True))
        texts += [(front + first).rstrip(), *(" " * start + other for other in others)]
    return "\n".join(texts)
