"""Rank correlation."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation of paired numbers: Pearson's of their ranks, where equal numbers share their mean rank.

    Returns: a number from -1 to 1; NaN where either side has fewer than two different numbers.
    Raises: ValueError for different lengths, or numbers that have no rank.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} numbers and {len(y)}; pairs are needed")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a NaN or an infinity has no rank; leave such pairs out")
    one, other = (ranks(values) - (len(x) + 1) / 2 for values in (x, y))
    scale = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / scale) if scale > 0 else float("nan")


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks from 1; equal numbers share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    mean: NDArray[np.float64] = last - (counts - 1) / 2
    return mean[inverse]
