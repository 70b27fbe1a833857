"""Plain tables."""

from collections.abc import Sequence


def table(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
